"""Building an index: names, small datastores, what is there already, interruptions, growth, shards, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import faiss
import numpy as np
import pytest
from harness import command, refused_here
from knn_files import DIM, exact_neighbours, random_rows, stops_at_rename, write_datastore

from knn_utils import build_index
from knn_utils.build_index import default_names
from knn_utils.datastore import Datastore
from knn_utils.index_training import supported, training_sample
from knn_utils.search import KNNSearcher
from utils.errors import InputError

ROWS = 400
MODULE = "knn_utils.build_index"


@pytest.fixture(autouse=True)
def errors_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPMEM_TRACEBACK", "1")


@pytest.fixture
def dstore(tmp_path: Path) -> Path:
    return write_datastore(tmp_path / f"dstore_gpt_neox_train_{DIM}.arrow", *random_rows(ROWS))


def build(dstore: Path, *more: object) -> None:
    command(MODULE, "--dstore_path", dstore, *more)


def contents(path: Path) -> dict[str, bytes]:
    """Every file of an index, without what may differ between two builds of it."""
    files = sorted(path.glob("*.index")) if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files}


def test_an_index_and_the_values_are_written_beside_the_datastore_under_the_originals_names(dstore: Path) -> None:
    build(dstore, "--index_factory", "Flat")
    index = dstore.parent / f"train_{DIM}.index"
    keys, values = random_rows(ROWS)
    np.testing.assert_array_equal(np.load(dstore.parent / "train_vals.npy", allow_pickle=False), values)
    searcher = KNNSearcher(index, probe=1, datastore=Datastore.open(dstore))
    np.testing.assert_array_equal(searcher.search(keys, 10)[1], exact_neighbours(keys, keys, 10)[1])
    assert sorted(item.name for item in dstore.parent.iterdir()) == [
        dstore.name,
        index.name,
        f"{index.name}.json",
        "train_vals.npy",
    ]


@pytest.mark.unit
@pytest.mark.parametrize(
    ("dstore", "index_path", "index", "values"),
    [
        ("d/dstore_gpt2_train_1280.arrow", None, "d/train_1280.index", "d/train_vals.npy"),
        ("d/mine", None, "d/mine.index", "d/mine_vals.npy"),
        ("d/dstore_gpt2_test_64.arrow", "e/x.index", "e/x.index", "e/test_vals.npy"),
    ],
)
def test_names_come_from_the_datastores_name_where_it_has_the_originals_form(dstore, index_path, index, values) -> None:
    assert default_names(Path(dstore), index_path) == (Path(index), Path(values))


@pytest.mark.unit
@pytest.mark.parametrize(
    ("asked", "rows", "factory", "said"),
    [
        ("IVF4096,PQ32", 20_000, "IVF512,PQ32", "4096 to 512"),
        ("OPQ16,IVF4096_HNSW32,PQ16", 39_000, "OPQ16,IVF1000_HNSW32,PQ16", "4096 to 1000"),
        ("IVF4096,PQ32", 10_000_000, "IVF4096,PQ32", ""),
        ("IVF4,Flat", 200, "IVF4,Flat", ""),
        ("IVF4096,PQ32", 3_000, "IVF76,PQ32", "Flat is exact and fast"),
        ("IVF4096,PQ32", 255, "Flat", "255 keys are too few"),
    ],
)
def test_an_index_is_lowered_to_what_the_rows_support_and_that_is_said(asked, rows, factory, said) -> None:
    found, remarks = supported(asked, rows)
    assert found == factory and said in " ".join(remarks) and bool(said) == bool(remarks)


def test_the_default_flags_build_a_small_index(dstore: Path, capfd: pytest.CaptureFixture) -> None:
    build(dstore, "--code_size", 4)
    index = KNNSearcher(dstore.parent / "train_16.index", probe=100)
    ids = index.search(random_rows(ROWS)[0], 50)[1]
    assert (ids[:, :10] == np.arange(ROWS)[:, None]).any(axis=1).mean() > 0.9
    assert "WARNING" not in capfd.readouterr().err


@pytest.mark.unit
def test_a_complete_index_is_left_alone_also_one_of_an_earlier_version(dstore: Path, capsys) -> None:
    build(dstore, "--index_factory", "Flat")
    index, values = dstore.parent / "train_16.index", dstore.parent / "train_vals.npy"
    before = index.stat().st_mtime_ns
    values.unlink()
    record = json.loads(index.with_name(f"{index.name}.json").read_text())
    for fingerprint in (record["datastore"]["fingerprint"], "0" * 64):  # of all rows, which is not compared any more
        record["datastore"]["fingerprint"] = fingerprint
        index.with_name(f"{index.name}.json").write_text(json.dumps(record))
        capsys.readouterr()
        build(dstore, "--index_factory", "Flat")
        assert "nothing to do" in capsys.readouterr().out
    assert index.stat().st_mtime_ns == before and values.is_file()


def test_another_request_is_refused_naming_what_changed_and_overwrite_replaces(dstore: Path) -> None:
    build(dstore, "--index_factory", "Flat")
    line = refused_here(MODULE, "--dstore_path", dstore, "--index_factory", "IVF4,Flat")
    assert "Flat there, IVF4,Flat now" in line and "--overwrite" in line
    build(dstore, "--index_factory", "IVF4,Flat", "--overwrite")
    record = json.loads((dstore.parent / "train_16.index.json").read_text())
    assert record["factory"] == "IVF4,Flat"
    build(dstore, "--index_factory", "Flat", "--num_shards", 2, "--overwrite")
    assert (dstore.parent / "train_16.index").is_dir()
    build(dstore, "--index_factory", "Flat", "--overwrite")
    index = dstore.parent / "train_16.index"
    assert index.is_file()
    # A file of another origin is not replaced unasked.
    index.with_name("train_16.index.json").unlink()
    index.write_bytes(b"precious")
    assert "--overwrite" in refused_here(MODULE, "--dstore_path", dstore, "--code_size", 4)
    assert index.read_bytes() == b"precious"


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("factory", ["Flat", "IVF8,PQ4x4"])
def test_a_build_stopped_at_any_rename_is_continued_to_the_same_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int, factory: str
) -> None:
    dstore = write_datastore(tmp_path / "dstore", *random_rows(ROWS))

    def work(index: Path) -> None:
        build(dstore, "--index_factory", factory, "--num_shards", shards, "--index_path", index)

    work(tmp_path / "whole.index")
    whole = contents(tmp_path / "whole.index")
    number = 0
    while True:
        index = tmp_path / f"stopped{number}" / "whole.index"
        index.parent.mkdir()
        stopped = stops_at_rename(monkeypatch, lambda index=index: work(index), number)
        if stopped:
            work(index)
        assert contents(index) == whole
        KNNSearcher(index, probe=1, datastore=Datastore.open(dstore))
        assert not list(index.parent.glob("*.building"))
        if not stopped:
            break
        number += 1
    assert number >= 5


def test_a_long_build_is_saved_on_the_way_and_continued_from_there(
    dstore: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(dstore, "--index_factory", "Flat", "--index_path", dstore.parent / "whole.index")
    index = dstore.parent / "stopped.index"
    monkeypatch.setattr(build_index, "CHECKPOINT_SECONDS", -1)

    def work() -> None:
        build(dstore, "--index_factory", "Flat", "--num_keys_to_add_at_a_time", 90, "--index_path", index)

    # plan.json, trained.index, two saves, then the third is lost
    assert stops_at_rename(monkeypatch, work, 4)
    partial = next(dstore.parent.glob("stopped.index.building/*.partial"))
    assert faiss.read_index(str(partial)).ntotal == 180
    work()
    assert index.read_bytes() == (dstore.parent / "whole.index").read_bytes()


@pytest.mark.parametrize("shards", [1, 2])
def test_rows_that_a_datastore_has_grown_by_are_added_without_training_again(tmp_path: Path, shards: int) -> None:
    dstore = tmp_path / "dstore"
    keys, values = random_rows(ROWS)
    write_datastore(dstore, keys[:250], values[:250])
    index = tmp_path / "dstore.index"
    build(dstore, "--index_factory", "IVF4,PQ4x4", "--num_shards", shards)
    assert "nothing to do" not in refused_here(MODULE, "--dstore_path", dstore, "--index_factory", "Flat")
    write_datastore(dstore, keys, values, existing=[100, 100, 50])
    line = refused_here(MODULE, "--dstore_path", dstore, "--index_factory", "IVF4,PQ4x4", "--num_shards", shards)
    assert "--extend" in line
    with pytest.raises(Exception, match="--extend"):
        KNNSearcher(index, probe=4, datastore=Datastore.open(dstore))
    build(dstore, "--index_factory", "IVF4,PQ4x4", "--extend", "--num_shards", shards)
    grown = KNNSearcher(index, probe=4, datastore=Datastore.open(dstore))
    assert grown.record["history"] == [{"rows_before": 250, "rows_after": ROWS}]
    # The same as adding all rows to an index that was trained on the first ones.
    files = sorted(index.glob("shard-*.index")) if index.is_dir() else [index]
    reference = faiss.read_index(str(files[0]))
    reference.reset()
    reference.add(keys.astype(np.float32))
    reference.nprobe = 4
    distances, _ = reference.search(keys.astype(np.float32), 20)
    np.testing.assert_array_equal(grown.search(keys, 20)[0], distances)
    np.testing.assert_array_equal(np.load(tmp_path / "dstore_vals.npy"), values)
    build(dstore, "--index_factory", "IVF4,PQ4x4", "--extend")


@pytest.mark.parametrize("shards", [1, 2])
def test_an_extension_stopped_at_any_rename_is_finished_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    keys, values = random_rows(ROWS)
    flags = ("--index_factory", "Flat", "--num_shards", shards)
    number, stopped = 0, True
    while stopped:
        dstore = tmp_path / str(number) / "dstore"
        write_datastore(dstore, keys[:250], values[:250])
        build(dstore, *flags)
        write_datastore(dstore, keys, values, existing=[100, 100, 50])
        stopped = stops_at_rename(monkeypatch, lambda dstore=dstore: build(dstore, *flags, "--extend"), number)
        build(dstore, *flags, "--extend")
        searcher = KNNSearcher(dstore.parent / "dstore.index", probe=1, datastore=Datastore.open(dstore))
        np.testing.assert_array_equal(searcher.search(keys, 5)[1], exact_neighbours(keys, keys, 5)[1])
        number += 1
    assert number >= 5


@pytest.mark.unit
def test_an_index_is_not_extended_by_other_rows(tmp_path: Path) -> None:
    keys, values = random_rows(ROWS)
    build(write_datastore(tmp_path / "a", keys[:200], values[:200]), "--index_factory", "Flat")
    other = write_datastore(tmp_path / "b", *random_rows(ROWS, seed=5))
    line = refused_here(MODULE, "--dstore_path", other, "--index_path", tmp_path / "a.index", "--extend")
    assert "first 200 rows" in line
    assert "without --extend" in refused_here(MODULE, "--dstore_path", other, "--extend")


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "IVF8,PQ4x4"])
def test_three_shards_give_what_one_index_gives(tmp_path: Path, factory: str) -> None:
    keys, values = random_rows(ROWS)
    keys[100:140] = keys[20]
    keys[390:] = keys[20]
    dstore = write_datastore(tmp_path / "dstore", keys, values)
    build(dstore, "--index_factory", factory, "--index_path", tmp_path / "one.index")
    build(dstore, "--index_factory", factory, "--index_path", tmp_path / "three.index", "--num_shards", 3)
    one, three = (KNNSearcher(tmp_path / f"{name}.index", probe=3) for name in ("one", "three"))
    for k in (1, 7, 45, 300):
        for here, there in zip(three.search(keys, k), one.search(keys, k), strict=True):
            np.testing.assert_array_equal(here, there)


@pytest.mark.unit
def test_the_training_sample_is_a_thousand_runs_at_seeded_places(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    keys = random.standard_normal((12_000, 2)).astype(np.float16)
    datastore = Datastore.open(write_datastore(tmp_path / "d", keys, np.zeros(12_000, np.int32), part_rows=5000))
    sample = training_sample(datastore, 4_000, seed=3)
    assert sample.shape == (4_000, 2)
    rows = {row.tobytes(): number for number, row in enumerate(keys.astype(np.float32))}
    numbers = np.array([rows[row.tobytes()] for row in sample]).reshape(1000, 4)
    assert (np.diff(numbers, axis=1) == 1).all() and len(np.unique(numbers)) == 4_000
    np.testing.assert_array_equal(sample, training_sample(datastore, 4_000, seed=3))
    assert (sample != training_sample(datastore, 4_000, seed=4)).any()
    np.testing.assert_array_equal(training_sample(datastore, 20_000, seed=3), keys.astype(np.float32))


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat"])
def test_a_key_that_is_not_finite_is_named_and_no_index_appears(tmp_path: Path, factory: str) -> None:
    keys, values = random_rows(ROWS)
    keys[321, 5] = np.nan
    dstore = write_datastore(tmp_path / "dstore", keys, values)
    line = refused_here(MODULE, "--dstore_path", dstore, "--index_factory", factory)
    assert str(dstore) in line and "row 321 " in line
    assert not (tmp_path / "dstore.index").exists()


def test_what_faiss_cannot_build_is_one_line(dstore: Path) -> None:
    for factory in ("nonsense", "IVF4,PQ5", "PQ4x40"):
        assert factory in refused_here(MODULE, "--dstore_path", dstore, "--index_factory", factory)
    for flag in ("--ncentroids", "--code_size", "--probe", "--num_shards", "--num_keys_to_add_at_a_time"):
        assert f"{flag} 0" in refused_here(MODULE, "--dstore_path", dstore, flag, 0)
    many = ("--index_factory", "Flat", "--num_shards", 10**12)
    assert "--num_shards 1000000000000" in refused_here(MODULE, "--dstore_path", dstore, *many)
    for seed in (-1, 1 << 31):
        assert f"--seed {seed}" in refused_here(MODULE, "--dstore_path", dstore, "--seed", seed)
    assert "1, 2, 4, 8, 16" in refused_here(MODULE, "--dstore_path", dstore, "--code_size", 5)


@pytest.mark.unit
def test_an_index_that_does_not_fit_its_record_is_refused(dstore: Path) -> None:
    build(dstore, "--index_factory", "Flat")
    index = dstore.parent / "train_16.index"
    record = index.with_name("train_16.index.json")
    good = json.loads(record.read_text())
    for changes, expected in (
        ({"format_version": 2}, "newer program"),
        ({"shards": [good["shards"][0] | {"file": "other.index"}]}, "no such file"),
        ({"shards": [good["shards"][0] | {"bytes": 5}]}, "truncated"),
    ):
        record.write_text(json.dumps(good | changes))
        with pytest.raises(InputError, match=expected):
            KNNSearcher(index, probe=1)
