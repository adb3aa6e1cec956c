"""Datastore and kNN-target files: columns, layouts on disk, and rows that come back as they went in."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from knn_utils import datastore as arrow_files
from knn_utils.datastore import Datastore, KNNTargets, TargetRows, datastore_schema, targets_schema
from knn_utils.faiss_files import load_values
from knn_utils.parts import PartedOutput, datastore_batch, targets_batch, write_single_file
from utils.errors import InputError

pytestmark = pytest.mark.unit

DIM = 3
ROWS = 23
RNG = np.random.default_rng(0)
KEYS = RNG.normal(size=(ROWS, DIM)).astype(np.float16)
VALS = RNG.integers(0, 97, ROWS).astype(np.int32)
LOGPROB = RNG.normal(size=ROWS).astype(np.float32)
COUNTS = RNG.integers(0, 6, ROWS).astype(np.int32)
BOUNDS = np.concatenate([[0], np.cumsum(COUNTS)])
TARGETS = TargetRows(
    id_cnt=COUNTS,
    token_id=RNG.integers(0, 97, int(BOUNDS[-1])).astype(np.int32),
    prob=RNG.random(int(BOUNDS[-1])).astype(np.float16),
    label=VALS,
    distance=RNG.random(ROWS).astype(np.float32),
)
COLUMNS = ("id_cnt", "token_id", "prob", "label", "distance")


def rows_of_targets(start: int, stop: int, distance: bool = True) -> TargetRows:
    entries = slice(BOUNDS[start], BOUNDS[stop])
    return TargetRows(
        TARGETS.id_cnt[start:stop],
        TARGETS.token_id[entries],
        TARGETS.prob[entries],
        TARGETS.label[start:stop],
        TARGETS.distance[start:stop] if distance else None,
    )


def key_batches(start: int, stop: int, size: int, logprob: bool = False) -> list[pa.RecordBatch]:
    bounds = [(first, min(first + size, stop)) for first in range(start, stop, size)]
    return [datastore_batch(KEYS[a:b], VALS[a:b], LOGPROB[a:b] if logprob else None) for a, b in bounds]


def target_batches(start: int, stop: int, size: int, distance: bool = True) -> list[pa.RecordBatch]:
    bounds = [(first, min(first + size, stop)) for first in range(start, stop, size)]
    return [targets_batch(rows_of_targets(a, b, distance)) for a, b in bounds]


def write(path: Path, batches: list[pa.RecordBatch]) -> Path:
    write_single_file(path, batches[0].schema, batches)
    return path


def write_parts(path: Path, kind: str, plan: list[int], settings: dict | None = None) -> Path:
    schema = datastore_schema(DIM) if kind == "datastore" else targets_schema()
    batches = key_batches if kind == "datastore" else target_batches
    output = PartedOutput(path, kind=kind, settings=settings or {}, part_rows=plan, schema=schema)
    for number in output.mine():
        start = output.row_start(number)
        with output.write(number) as part:
            for batch in batches(start, start + plan[number], 4):
                part.write(batch)
    output.finish()
    return path


def assert_same_targets(found: TargetRows, expected: TargetRows) -> None:
    for name in COLUMNS:
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert one.dtype == other.dtype and np.array_equal(one, other), name


RANGES = [(0, ROWS), (0, 0), (ROWS, ROWS), (0, 1), (3, 4), (4, 8), (5, 7), (2, 17), (22, 23)]


# The columns


def test_the_columns_are_those_of_the_original() -> None:
    assert datastore_schema(DIM) == pa.schema({"keys": pa.list_(pa.float16(), DIM), "vals": pa.int32()})
    assert targets_schema(distance=False) == pa.schema(
        {"id_cnt": pa.int32(), "token_id": pa.list_(pa.int32()), "prob": pa.list_(pa.float16()), "label": pa.int32()}
    )
    assert targets_schema().names == list(COLUMNS)
    batch = targets_batch(TARGETS)
    batch.validate(full=True)
    assert batch.column("token_id").to_pylist()[:3] == [
        TARGETS.token_id[BOUNDS[row] : BOUNDS[row + 1]].tolist() for row in range(3)
    ]
    assert key_batches(0, ROWS, ROWS, logprob=True)[0].schema.names == ["keys", "vals", "logprob"]


def test_other_libraries_read_what_is_written(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder = write_parts(tmp_path / "dstore", "datastore", [10, 13])
    rows = datasets.Dataset.from_file(str(folder / "part-00001.arrow"))
    assert rows[2]["vals"] == VALS[12] and np.array_equal(np.array(rows[2]["keys"], np.float16), KEYS[12])


@pytest.mark.parametrize(
    ("keys", "vals", "logprob"),
    [
        (KEYS.astype(np.float32), VALS, None),
        (KEYS, VALS.astype(np.int64), None),
        (KEYS, VALS[:-1], None),
        (KEYS[0], VALS, None),
        (KEYS, VALS, LOGPROB.astype(np.float64)),
    ],
)
def test_rows_of_the_wrong_type_or_length_are_not_written(keys, vals, logprob) -> None:
    with pytest.raises(ValueError, match="expected"):
        datastore_batch(keys, vals, logprob)
    rows = rows_of_targets(0, ROWS)
    for changes in ({"id_cnt": COUNTS + np.int32(1)}, {"prob": rows.prob[:-1]}):
        with pytest.raises(ValueError, match="expected"):
            targets_batch(replace(rows, **changes))


# Reading


@pytest.mark.parametrize("size", [1, 4, 100])
@pytest.mark.parametrize("plan", [None, [ROWS], [10, 13], [1] * ROWS])
def test_any_range_of_a_datastore_comes_back(tmp_path: Path, plan: list[int] | None, size: int) -> None:
    if plan is None:
        datastore = Datastore.open(write(tmp_path / "dstore.arrow", key_batches(0, ROWS, size, logprob=True)))
        assert np.array_equal(datastore.logprob(3, 12), LOGPROB[3:12]) and datastore.settings == {}
    else:
        datastore = Datastore.open(write_parts(tmp_path / "dstore", "datastore", plan, {"k": 4}))
        assert datastore.logprob() is None and datastore.settings == {"k": 4}
    assert (len(datastore), datastore.rows, datastore.dim) == (ROWS, ROWS, DIM)
    for start, stop in RANGES:
        keys, vals = datastore.keys(start, stop), datastore.vals(start, stop)
        assert keys.dtype == np.float16 and keys.shape == (stop - start, DIM)
        assert vals.dtype == np.int32 and np.array_equal(vals, VALS[start:stop])
        assert np.array_equal(keys, KEYS[start:stop])
    numbers = RNG.integers(0, ROWS, 50)
    assert np.array_equal(datastore.gather_keys(numbers), KEYS[numbers])
    assert datastore.gather_keys(np.array([], np.int64)).shape == (0, DIM)


@pytest.mark.parametrize("plan", [None, [10, 13], [1] * ROWS])
def test_any_range_of_targets_comes_back(tmp_path: Path, plan: list[int] | None) -> None:
    if plan is None:
        targets = KNNTargets.open(write(tmp_path / "knn.arrow", target_batches(0, ROWS, 4)))
    else:
        targets = KNNTargets.open(write_parts(tmp_path / "knn", "knn_targets", plan))
    assert len(targets) == ROWS
    for start, stop in RANGES:
        assert_same_targets(targets.read(start, stop), rows_of_targets(start, stop))
        assert np.array_equal(targets.labels(start, stop), VALS[start:stop])
    assert np.array_equal(targets.labels(), VALS)


def test_rows_within_a_batch_are_views_of_the_file(tmp_path: Path) -> None:
    datastore = Datastore.open(write(tmp_path / "d.arrow", key_batches(0, ROWS, 8)))
    assert np.shares_memory(datastore.keys(1, 5), datastore.keys(3, 8))
    assert np.shares_memory(datastore.vals(1, 5), datastore.vals(3, 8))
    assert not datastore.keys(1, 5).flags.writeable
    targets = KNNTargets.open(write(tmp_path / "k.arrow", target_batches(0, ROWS, 8)))
    one, other = targets.read(8, 14), targets.read(10, 16)
    for name in COLUMNS:
        assert np.shares_memory(getattr(one, name), getattr(other, name)), name


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc")
def test_opening_does_not_read_the_rows(tmp_path: Path) -> None:
    keys = np.zeros((1 << 14, 64), np.float16)
    path = write(tmp_path / "d.arrow", [datastore_batch(keys, np.zeros(1 << 14, np.int32))] * 20)
    datastore = Datastore.open(path)
    resident, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if "-" in fields[0] and not fields[0].endswith(":"):
            inside = fields[-1] == str(path)
        elif inside and fields[0] == "Rss:":
            resident += int(fields[1])
    assert len(datastore) == 20 << 14
    assert 0 < resident < path.stat().st_size / 1024 / 4


def test_more_parts_than_are_kept_open_are_read_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_files, "OPEN_FILES", 2)
    monkeypatch.setattr(arrow_files, "OPEN_BATCHES", 2)
    path = write_parts(tmp_path / "d", "datastore", [4] * 5 + [3])
    datastore = Datastore.open(path)
    assert np.array_equal(datastore.keys(), KEYS) and np.array_equal(datastore.keys(1, 3), KEYS[1:3])
    assert np.array_equal(datastore.gather_keys(np.arange(ROWS)[::-1]), KEYS[::-1])
    # A part is checked when it is opened, which with many parts is when it is first read.
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["parts"][3]["rows"], manifest["parts"][5]["rows"] = 3, 4
    (path / "manifest.json").write_text(json.dumps(manifest))
    datastore = Datastore.open(path)
    assert len(datastore.keys(0, 12)) == 12
    with pytest.raises(InputError, match=r"part-00003.arrow: 4 rows, the manifest records 3"):
        datastore.keys()


@pytest.mark.parametrize("rows", [(-1, 3), (3, ROWS + 1), (5, 4), (ROWS + 1, ROWS + 1)])
def test_rows_outside_the_file_are_refused(tmp_path: Path, rows: tuple[int, int]) -> None:
    datastore = Datastore.open(write(tmp_path / "d.arrow", key_batches(0, ROWS, 8)))
    targets = KNNTargets.open(write(tmp_path / "k.arrow", target_batches(0, ROWS, 8)))
    for read in (datastore.keys, datastore.vals, targets.read, targets.labels):
        with pytest.raises(InputError, match=f"rows {rows[0]} to {rows[1]} were asked for, it holds {ROWS}"):
            read(*rows)
    for number in (-1, ROWS):
        with pytest.raises(InputError, match="were asked for"):
            datastore.gather_keys(np.array([0, number]))


# Layouts of others


def table(columns: dict[str, pa.Array]) -> list[pa.RecordBatch]:
    batch = pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))
    return [batch.slice(0, 9), batch.slice(9)]


@pytest.mark.parametrize(
    "keys", [pa.list_(pa.float16(), DIM), pa.list_(pa.float16()), pa.large_list(pa.float16())], ids=str
)
@pytest.mark.parametrize("vals", [pa.int32(), pa.int64(), pa.list_(pa.int32(), 1), pa.list_(pa.int64(), 1)], ids=str)
def test_datastores_of_other_writers_are_read(tmp_path: Path, keys: pa.DataType, vals: pa.DataType) -> None:
    values = [[int(value)] if pa.types.is_fixed_size_list(vals) else int(value) for value in VALS]
    path = write(tmp_path / "d.arrow", table({"vals": pa.array(values, vals), "keys": pa.array(list(KEYS), keys)}))
    datastore = Datastore.open(path, verify=True)
    assert datastore.dim == DIM and np.array_equal(datastore.keys(), KEYS)
    assert datastore.vals(4, 12).dtype == np.int32 and np.array_equal(datastore.vals(4, 12), VALS[4:12])
    assert np.array_equal(datastore.gather_keys(np.array([20, 2])), KEYS[[20, 2]])


@pytest.mark.parametrize("lists", [pa.list_, pa.large_list])
@pytest.mark.parametrize("tokens", [pa.int32(), pa.int64()])
@pytest.mark.parametrize("probs", [np.float16, np.float32])
def test_targets_of_other_writers_are_read(tmp_path: Path, lists, tokens: pa.DataType, probs: type) -> None:
    rows = [slice(BOUNDS[row], BOUNDS[row + 1]) for row in range(ROWS)]
    columns = {
        "id_cnt": pa.array(COUNTS, tokens),
        "token_id": pa.array([TARGETS.token_id[row] for row in rows], lists(tokens)),
        "prob": pa.array([TARGETS.prob[row].astype(probs) for row in rows], lists(pa.from_numpy_dtype(probs))),
        "label": pa.array(VALS),
    }
    targets = KNNTargets.open(write(tmp_path / "k.arrow", table(columns)), verify=True)
    for start, stop in RANGES:
        assert_same_targets(targets.read(start, stop), rows_of_targets(start, stop, distance=False))


def saved_dataset(path: Path, shards: int):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "id_cnt": datasets.Value("int32"),
            "token_id": datasets.Sequence(datasets.Value("int32")),
            "prob": datasets.Sequence(datasets.Value("float16")),
            "label": datasets.Value("int32"),
        }
    )
    rows = [slice(BOUNDS[row], BOUNDS[row + 1]) for row in range(ROWS)]
    columns = {
        "id_cnt": COUNTS.tolist(),
        "token_id": [TARGETS.token_id[row] for row in rows],
        "prob": [TARGETS.prob[row] for row in rows],
        "label": VALS.tolist(),
    }
    saved = datasets.Dataset.from_dict(columns, features=features)
    saved.save_to_disk(str(path), num_shards=shards)
    return saved


@pytest.mark.parametrize("shards", [1, 3, 12])
def test_targets_saved_by_datasets_are_read_in_the_order_of_their_state(tmp_path: Path, shards: int) -> None:
    saved_dataset(tmp_path / "knn", shards)
    (tmp_path / "knn" / "cache-0123.arrow").write_bytes(b"not part of it")
    targets = KNNTargets.open(tmp_path / "knn")
    assert_same_targets(targets.read(0), rows_of_targets(0, ROWS, distance=False))
    state = tmp_path / "knn" / "state.json"
    content = json.loads(state.read_text())
    content["_data_files"].reverse()
    state.write_text(json.dumps(content))
    backwards = np.concatenate(np.array_split(VALS, shards)[::-1])
    assert np.array_equal(KNNTargets.open(tmp_path / "knn").labels(), backwards)


def test_shards_in_a_folder_without_manifest_are_read_by_number(tmp_path: Path) -> None:
    for number in range(12):
        write(
            tmp_path / f"knn_{number}.arrow", target_batches(min(2 * number, 22), min(2 * number + 2, ROWS), 1, False)
        )
    (tmp_path / "README.md").write_text("kNN targets")
    targets = KNNTargets.open(tmp_path)
    assert_same_targets(targets.read(0), rows_of_targets(0, ROWS, distance=False))


def test_a_folder_that_is_not_one_whole_table_says_what_it_holds(tmp_path: Path) -> None:
    shards, tables, stores, splits = (tmp_path / name for name in ("shards", "tables", "stores", "splits"))
    for folder, names in (
        (shards, ("data-00000-of-00003.arrow", "data-00002-of-00003.arrow")),
        (tables, ("dstore_gpt2_train_3.arrow", "dstore_gpt2_validation_3.arrow")),
    ):
        for name in names:
            write(folder / name, key_batches(0, 4, 4))
    write_parts(stores / "dstore_gpt2_train_3.arrow", "datastore", [ROWS])
    saved_dataset(splits / "train", 1)
    (splits / "dataset_dict.json").write_text('{"splits": ["train"]}')
    write(tmp_path / "widths" / "d_0.arrow", key_batches(0, 4, 4))
    write(tmp_path / "widths" / "d_1.arrow", [datastore_batch(np.ones((2, 5), np.float16), VALS[:2])])
    for folder, message in (
        (shards, "2 of 3 shards are there"),
        (tables, "not the shards of one table"),
        (stores, r"no Arrow file in it.*dstore_gpt2_train_3.arrow: name one"),
        (splits, "holds several splits; name one of them"),
        (tmp_path / "widths", r"d_1.arrow: has other columns than d_0.arrow"),
        (tmp_path / "nothing.arrow", "no such file or folder; expected a datastore"),
    ):
        with pytest.raises(InputError, match=message):
            Datastore.open(folder)


# What is refused


def test_one_kind_of_file_is_not_taken_for_the_other(tmp_path: Path) -> None:
    keys = write(tmp_path / "d.arrow", key_batches(0, ROWS, 8))
    targets = write(tmp_path / "k.arrow", target_batches(0, ROWS, 8))
    with pytest.raises(InputError, match="no column id_cnt among keys, vals"):
        KNNTargets.open(keys)
    with pytest.raises(InputError, match="no column keys among id_cnt"):
        Datastore.open(targets)
    with pytest.raises(InputError, match="holds a datastore, expected kNN targets"):
        KNNTargets.open(write_parts(tmp_path / "d", "datastore", [ROWS]))


RAGGED = pa.array([KEYS[row, : 2 if row == 12 else DIM] for row in range(ROWS)], pa.list_(pa.float16()))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("keys", pa.array(["x"] * ROWS), "column keys is string"),
        ("keys", RAGGED, "not a whole, readable"),
        ("vals", pa.array(VALS + 0.5), "truncated converting to int32"),
        ("vals", pa.array([[1, 2]] * ROWS, pa.list_(pa.int32(), 2)), "Unsupported cast"),
        ("vals", pa.array([None if row == 12 else 1 for row in range(ROWS)], pa.int32()), "column vals holds nulls"),
        ("vals", pa.array([1 << 40] * ROWS), "1099511627776 not in range"),
        ("logprob", pa.array(["x"] * ROWS), "not a whole, readable"),
    ],
)
def test_columns_of_other_types_are_refused(tmp_path: Path, name: str, values: pa.Array, message: str) -> None:
    columns = {"keys": pa.array(list(KEYS), pa.list_(pa.float16(), DIM)), "vals": pa.array(VALS)} | {name: values}
    path = write(tmp_path / "d.arrow", table(columns))
    with pytest.raises(InputError, match=rf"d\.arrow: .*{message}"):
        Datastore.open(path).vals()


def test_targets_whose_lists_disagree_with_their_counts_are_refused(tmp_path: Path) -> None:
    batch = targets_batch(rows_of_targets(0, ROWS))
    wrong = COUNTS.copy()
    wrong[[3, 4]] += (1, -1)
    columns = dict(zip(batch.schema.names, batch.columns, strict=True)) | {"id_cnt": pa.array(wrong)}
    targets = KNNTargets.open(write(tmp_path / "k.arrow", table(columns)))
    assert len(targets.read(5, 9).id_cnt) == 4
    with pytest.raises(InputError, match="list lengths of token_id"):
        targets.read(2, 9)


def test_an_empty_table_is_refused(tmp_path: Path) -> None:
    batch = datastore_batch(KEYS[:0], VALS[:0])
    for batches in ([], [batch]):
        write_single_file(tmp_path / "d.arrow", batch.schema, batches)
        with pytest.raises(InputError, match="holds no rows"):
            Datastore.open(tmp_path / "d.arrow")


@pytest.mark.parametrize("cut", [1, 8, 9, 200])
def test_a_truncated_file_is_refused_at_opening(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path / "d.arrow", key_batches(0, ROWS, 8))
    os.truncate(path, path.stat().st_size - cut)
    with pytest.raises(InputError, match=r"d.arrow: not a whole, readable Arrow IPC stream"):
        Datastore.open(path)


@pytest.mark.parametrize("content", [b"", b"x", b"PAR1" * 50, b"ARROW1\0\0" * 50, "twice"])
def test_a_file_that_is_no_stream_or_more_than_one_is_refused(tmp_path: Path, content) -> None:
    path = write(tmp_path / "d.arrow", key_batches(0, 8, 8))
    path.write_bytes(path.read_bytes() * 2 if content == "twice" else content)
    with pytest.raises(InputError, match="not a whole, readable Arrow IPC stream"):
        Datastore.open(path)


def test_a_part_of_another_size_or_a_missing_one_is_refused_at_opening(tmp_path: Path) -> None:
    folder = write_parts(tmp_path / "d", "datastore", [10, 13])
    last = folder / "part-00001.arrow"
    content = last.read_bytes()
    for other in (content[:-1], content + b"\0"):
        last.write_bytes(other)
        with pytest.raises(InputError, match=rf"part-00001.arrow: has \d+ bytes, the manifest records {len(content)}"):
            Datastore.open(folder)
    last.unlink()
    with pytest.raises(InputError, match=r"part-00001.arrow: has no bytes"):
        Datastore.open(folder)


def test_a_changed_byte_is_noticed_on_request(tmp_path: Path) -> None:
    folder = write_parts(tmp_path / "d", "datastore", [10, 13])
    part = folder / "part-00001.arrow"
    content = bytearray(part.read_bytes())
    content[-20] ^= 1
    part.write_bytes(content)
    assert len(Datastore.open(folder)) == ROWS
    with pytest.raises(InputError, match=r"part-00001.arrow: does not match its checksum"):
        Datastore.open(folder, verify=True)


# The values of the indexed rows


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16, ">i4"])
@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_values_are_read_from_npy(tmp_path: Path, dtype, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "train_vals.npy", VALS.astype(dtype).reshape(shape))
    values = load_values(tmp_path / "train_vals.npy")
    assert values.dtype == np.int32 and np.array_equal(values, VALS)
    assert np.array_equal(load_values(tmp_path / "train_vals.pkl"), VALS)


def test_values_are_read_from_a_datastore_and_from_the_one_beside_a_pickle(tmp_path: Path) -> None:
    folder = write_parts(tmp_path / "dstore_gpt2_train_3.arrow", "datastore", [10, 13])
    write(tmp_path / "dstore_gpt2_validation_3.arrow", key_batches(3, 9, 2))
    (tmp_path / "train_vals.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert np.array_equal(load_values(folder), VALS)
    assert np.array_equal(load_values(tmp_path / "train_vals.pkl"), VALS)
    assert np.array_equal(load_values(tmp_path / "validation_vals.pkl"), VALS[3:9])
    for name, expected in ((tmp_path / "test_vals.pkl", "test_vals.pkl: pickles are not read"), (".", "no Arrow file")):
        with pytest.raises(InputError, match=expected):
            load_values(name)


@pytest.mark.parametrize(
    "values",
    [np.ones(3), np.ones((3, 2), np.int32), np.empty(0, np.int32), np.array([1 << 40]), np.array(3), np.array([{}])],
)
def test_an_npy_of_anything_but_values_is_refused(tmp_path: Path, values: np.ndarray) -> None:
    np.save(tmp_path / "vals.npy", values)
    with pytest.raises(InputError, match=r"vals.npy: not the values of a datastore"):
        load_values(tmp_path / "vals.npy")
