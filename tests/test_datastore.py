"""Readers of datastores and kNN targets: any rows, from any layout on disk, come back as they went in."""

from __future__ import annotations

import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

from knn_utils import datastore as module
from knn_utils.datastore import Datastore, KNNTargets, TargetRows, check_rows, datastore_schema, targets_schema
from knn_utils.parts import datastore_batch, targets_batch, write_stream
from utils.artefact import Made, begin
from utils.errors import InputError

pytestmark = pytest.mark.unit

DIM, ROWS = 3, 23
RNG = np.random.default_rng(0)
KEYS = RNG.normal(size=(ROWS, DIM)).astype(np.float16)
VALS = RNG.integers(0, 97, ROWS).astype(np.int32)
LOGPROB = RNG.normal(size=ROWS).astype(np.float32)
COUNTS = RNG.integers(0, 6, ROWS).astype(np.int32)
BOUNDS = np.concatenate([[0], np.cumsum(COUNTS)])
TOKENS = RNG.integers(0, 97, int(BOUNDS[-1])).astype(np.int32)
PROBS = RNG.random(int(BOUNDS[-1])).astype(np.float16)
DISTANCE = RNG.random(ROWS).astype(np.float32)
COLUMNS = ("id_cnt", "token_id", "prob", "label", "distance")
RANGES = [(0, ROWS), (0, 0), (ROWS, ROWS), (0, 1), (3, 4), (4, 8), (5, 7), (2, 17), (22, 23)]


def targets_of(start: int, stop: int, distance: bool = True) -> TargetRows:
    rows, entries = slice(start, stop), slice(BOUNDS[start], BOUNDS[stop])
    return TargetRows(COUNTS[rows], TOKENS[entries], PROBS[entries], VALS[rows], DISTANCE[rows] if distance else None)


def batches(kind: str, start: int, stop: int, size: int) -> list[pa.RecordBatch]:
    bounds = [(first, min(first + size, stop)) for first in range(start, stop, size)]
    if kind == "datastore":
        return [datastore_batch(KEYS[a:b], VALS[a:b], LOGPROB[a:b]) for a, b in bounds]
    return [targets_batch(targets_of(a, b)) for a, b in bounds]


def write(path: Path, found: list[pa.RecordBatch]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_stream(path, found[0].schema, found)
    return path


def write_parts(path: Path, kind: str, part_rows: list[int], size: int = 4) -> Path:
    recorded = part_rows if kind == "datastore" else part_rows[0]
    making = begin(path, Made(kind, {"part_rows": recorded, "layer_position": -1}, ROWS, {"base": "b"}))
    schema = datastore_schema(DIM, logprob=True) if kind == "datastore" else targets_schema()
    starts = np.cumsum([0, *part_rows])
    for number in making.own_parts(len(part_rows)):
        write_stream(making.part(number), schema, batches(kind, starts[number], starts[number + 1], size))
    making.finish()
    return path


def assert_same_targets(found: TargetRows, expected: TargetRows) -> None:
    for name in COLUMNS:
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert one.dtype == other.dtype and np.array_equal(one, other), name


def test_the_columns_are_those_of_the_original() -> None:
    assert datastore_schema(DIM) == pa.schema({"keys": pa.list_(pa.float16(), DIM), "vals": pa.int32()})
    lists = {"token_id": pa.list_(pa.int32()), "prob": pa.list_(pa.float16())}
    assert targets_schema(distance=False) == pa.schema({"id_cnt": pa.int32(), **lists, "label": pa.int32()})


@pytest.mark.parametrize("size", [1, 4, 100])
@pytest.mark.parametrize("part_rows", [None, [0, 10, 0, 13], [1] * ROWS])
def test_any_range_of_a_datastore_comes_back(tmp_path: Path, part_rows: list[int] | None, size: int) -> None:
    if part_rows is None:
        store = Datastore.open(write(tmp_path / "dstore.arrow", batches("datastore", 0, ROWS, size)))
        assert store.made is None
    else:
        store = Datastore.open(write_parts(tmp_path / "dstore.arrow", "datastore", part_rows, size))
        assert store.made.settings["part_rows"] == part_rows and store.made.made_from == {"base": "b"}
    assert (store.rows, store.dim, store.path) == (ROWS, DIM, tmp_path / "dstore.arrow")
    for start, stop in RANGES:
        keys, vals = store.keys(start, stop), store.vals(start, stop)
        assert keys.dtype == np.float16 and keys.shape == (stop - start, DIM) and vals.dtype == np.int32
        assert np.array_equal(keys, KEYS[start:stop]) and np.array_equal(vals, VALS[start:stop])
        assert np.array_equal(store.logprob(start, stop), LOGPROB[start:stop])


@pytest.mark.parametrize("part_rows", [None, [12, 11], [1] * ROWS])
def test_any_range_of_targets_comes_back(tmp_path: Path, part_rows: list[int] | None) -> None:
    if part_rows is None:
        targets = KNNTargets.open(write(tmp_path / "knn.arrow", batches("knn_targets", 0, ROWS, 4)))
    else:
        targets = KNNTargets.open(write_parts(tmp_path / "knn", "knn_targets", part_rows))
    assert targets.rows == ROWS
    for start, stop in RANGES:
        assert_same_targets(targets.read(start, stop), targets_of(start, stop))
        assert np.array_equal(targets.labels(start, stop), VALS[start:stop])


def test_rows_within_a_batch_are_views_of_the_file(tmp_path: Path) -> None:
    store = Datastore.open(write(tmp_path / "d.arrow", batches("datastore", 0, ROWS, 8)))
    assert np.shares_memory(store.keys(1, 5), store.keys(3, 8)) and not store.keys(1, 5).flags.writeable
    targets = KNNTargets.open(write(tmp_path / "k.arrow", batches("knn_targets", 0, ROWS, 8)))
    for name in COLUMNS:
        assert np.shares_memory(getattr(targets.read(8, 14), name), getattr(targets.read(10, 16), name)), name


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc")
def test_opening_does_not_read_the_rows(tmp_path: Path) -> None:
    keys = np.zeros((1 << 14, 64), np.float16)
    path = write(tmp_path / "d.arrow", [datastore_batch(keys, np.zeros(1 << 14, np.int32))] * 20)
    store = Datastore.open(path)
    resident, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if "-" in fields[0] and not fields[0].endswith(":"):
            inside = fields[-1] == str(path)
        elif inside and fields[0] == "Rss:":
            resident += int(fields[1])
    assert store.rows == 20 << 14
    assert 0 < resident < path.stat().st_size / 1024 / 4


def test_parts_are_opened_when_read_and_few_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OPEN_FILES", 2)
    monkeypatch.setattr(module, "OPEN_BATCHES", 2)
    path = write_parts(tmp_path / "d", "datastore", [4] * 5 + [3])
    store = Datastore.open(path)
    assert np.array_equal(store.keys(), KEYS) and np.array_equal(store.keys(1, 3), KEYS[1:3])
    (path / "part-00003.arrow").unlink()
    store = Datastore.open(path)
    assert len(store.keys(0, 12)) == 12
    with pytest.raises(InputError, match=r"part-00003\.arrow"):
        store.keys()


def test_rows_outside_the_file_raise_an_index_error(tmp_path: Path) -> None:
    store = Datastore.open(write(tmp_path / "d.arrow", batches("datastore", 0, ROWS, 8)))
    reads = [(store.keys, rows) for rows in ((-1, 3), (3, ROWS + 1), (5, 4))]
    for read, rows in reads:
        with pytest.raises(IndexError):
            read(*rows)
    with pytest.raises(InputError, match=f"d.arrow.*{ROWS}.*30"):
        check_rows(store, 30)


def table(columns: dict[str, pa.Array]) -> list[pa.RecordBatch]:
    batch = pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))
    return [batch.slice(0, 9), batch.slice(9)]


@pytest.mark.parametrize("vals", [pa.int64(), pa.list_(pa.int32(), 1), pa.list_(pa.int64(), 1)], ids=str)
def test_datastores_of_other_writers_are_read(tmp_path: Path, vals: pa.DataType) -> None:
    values = [int(value) if vals == pa.int64() else [int(value)] for value in VALS]
    keys = pa.array(list(KEYS.astype(np.float32)), pa.list_(pa.float32(), DIM))
    store = Datastore.open(write(tmp_path / "d.arrow", table({"vals": pa.array(values, vals), "keys": keys})))
    assert store.dim == DIM and np.array_equal(store.keys(), KEYS) and store.logprob() is None
    assert store.vals(4, 12).dtype == np.int32 and np.array_equal(store.vals(4, 12), VALS[4:12])


@pytest.mark.parametrize("lists", [pa.list_, pa.large_list])
def test_targets_of_other_writers_are_read(tmp_path: Path, lists) -> None:
    rows = [slice(BOUNDS[row], BOUNDS[row + 1]) for row in range(ROWS)]
    columns = {
        "id_cnt": pa.array(COUNTS, pa.int64()),
        "token_id": pa.array([TOKENS[row] for row in rows], lists(pa.int64())),
        "prob": pa.array([PROBS[row].astype(np.float32) for row in rows], lists(pa.float32())),
        "label": pa.array(VALS),
    }
    targets = KNNTargets.open(write(tmp_path / "k.arrow", table(columns)))
    for start, stop in RANGES:
        assert_same_targets(targets.read(start, stop), targets_of(start, stop, distance=False))


def test_a_datasets_folder_is_read(tmp_path: Path) -> None:
    write(tmp_path / "knn.arrow", batches("knn_targets", 0, ROWS, 8))
    saved = datasets.Dataset.from_file(str(tmp_path / "knn.arrow"))
    saved.save_to_disk(str(tmp_path / "knn"), num_shards=12)
    (tmp_path / "knn" / "cache-0123.arrow").write_bytes(b"not part of it")
    assert_same_targets(KNNTargets.open(tmp_path / "knn").read(0), targets_of(0, ROWS))


def test_shards_in_a_folder_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in range(12):
        write(tmp_path / f"knn_{number}.arrow", batches("knn_targets", 2 * number, min(2 * number + 2, ROWS), 1))
    (tmp_path / "README.md").write_text("kNN targets")
    assert_same_targets(KNNTargets.open(tmp_path).read(0), targets_of(0, ROWS))


def test_a_folder_that_is_not_one_table_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    for name in ("dstore_gpt2_train_3.arrow", "dstore_gpt2_validation_3.arrow"):
        write(tmp_path / "tables" / name, batches("datastore", 0, 4, 4))
        write_parts(tmp_path / "stores" / name, "datastore", [ROWS])
    for folder in ("tables", "stores"):
        with pytest.raises(InputError, match=r"dstore_gpt2_train_3\.arrow"):
            Datastore.open(tmp_path / folder)
    with pytest.raises(InputError, match="nowhere"):
        Datastore.open(tmp_path / "nowhere")


def test_one_kind_of_file_is_not_taken_for_the_other(tmp_path: Path) -> None:
    for kind, reader in (("datastore", KNNTargets), ("knn_targets", Datastore)):
        for path in (write(tmp_path / "file", batches(kind, 0, ROWS, 8)), write_parts(tmp_path / kind, kind, [ROWS])):
            with pytest.raises(InputError, match=path.name):
                reader.open(path)


@pytest.mark.parametrize("cut", [1, 8, 9, 200, None])
def test_a_truncated_file_is_refused_at_opening(tmp_path: Path, cut: int | None) -> None:
    path = write(tmp_path / "d.arrow", batches("datastore", 0, ROWS, 8))
    os.truncate(path, path.stat().st_size - cut if cut else 0)
    with pytest.raises(InputError, match=r"d\.arrow"):
        Datastore.open(path)
