"""Building an index: names, small datastores, interruptions, parts and processes, bad input."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest
from harness import command, refused_here, together
from knn_files import DIM, exact_neighbours, random_rows, stops_at_rename, write_datastore

from knn_utils import build_index
from knn_utils.build_index import default_names, supported, training_sample
from knn_utils.datastore import Datastore
from knn_utils.search import KNNSearcher
from utils.artefact import read_made

ROWS = 400
MODULE = "knn_utils.build_index"


@pytest.fixture(autouse=True)
def errors_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPMEM_TRACEBACK", "1")


@pytest.fixture
def dstore(tmp_path: Path) -> Path:
    return write_datastore(tmp_path / f"dstore_gpt_neox_train_{DIM}.arrow", *random_rows(ROWS))


def build(dstore: Path, *more: object, index: str | None = None) -> Path:
    path = dstore.parent / (index or f"train_{DIM}.index")
    command(MODULE, "--dstore_path", dstore, "--index_path", path, *more)
    return path


def refused(dstore: Path, *more: object) -> str:
    return refused_here(MODULE, "--dstore_path", dstore, *more)


def test_index_and_values_are_beside_the_datastore(dstore: Path) -> None:
    command(MODULE, "--dstore_path", dstore, "--index_factory", "Flat")
    keys, values = random_rows(ROWS)
    index = dstore.parent / f"train_{DIM}.index"
    searcher = KNNSearcher(index, probe=1, datastore=Datastore.open(dstore))
    np.testing.assert_array_equal(searcher.search(keys, 10)[1], exact_neighbours(keys, keys, 10)[1])
    np.testing.assert_array_equal(np.load(dstore.parent / "train_vals.npy", allow_pickle=False), values)
    made, store = read_made(index), Datastore.open(dstore).made
    assert made.rows == ROWS and made.settings["factory"] == "Flat" and made.settings["layer_position"] == -1
    assert made.made_from == {**store.made_from, "datastore": store.id}
    visible = {item.name for item in dstore.parent.iterdir() if not item.name.startswith(".")}
    assert visible == {dstore.name, index.name, f"{index.name}.made.json", "train_vals.npy"}


@pytest.mark.unit
@pytest.mark.parametrize(
    ("dstore", "index_path", "index", "values"),
    [
        ("d/dstore_gpt2_train_1280.arrow", None, "d/train_1280.index", "d/train_vals.npy"),
        ("d/mine", None, "d/mine.index", "d/mine_vals.npy"),
        ("d/dstore_gpt2_test_64.arrow", "e/x.index", "e/x.index", "e/test_vals.npy"),
    ],
)
def test_default_names(dstore, index_path, index, values) -> None:
    assert default_names(Path(dstore), index_path) == (Path(index), Path(values))


@pytest.mark.unit
@pytest.mark.parametrize(
    ("asked", "rows", "factory"),
    [
        ("OPQ16,IVF4096_HNSW32,PQ16", 39_000, "OPQ16,IVF1000_HNSW32,PQ16"),
        ("IVF4096,PQ32", 10_000_000, "IVF4096,PQ32"),
        ("IVF4,Flat", 200, "IVF4,Flat"),
        ("IVF4096,PQ32", 255, "Flat"),
        ("IVF4096,PQ32x4fs", 255, "IVF6,PQ32x4fs"),
    ],
)
def test_centroids_are_lowered_to_what_the_rows_support(asked, rows, factory) -> None:
    assert supported(asked, rows) == factory


def test_the_default_flags_build_a_small_index(dstore: Path, capfd: pytest.CaptureFixture) -> None:
    index = KNNSearcher(build(dstore, "--code_size", 4), probe=100)
    ids = index.search(random_rows(ROWS)[0], 50)[1]
    assert (ids[:, :10] == np.arange(ROWS)[:, None]).any(axis=1).mean() > 0.9
    assert "WARNING" not in capfd.readouterr().err


def test_a_complete_index_stays_and_overwrite_replaces_it(dstore: Path, capsys) -> None:
    index = build(dstore, "--index_factory", "Flat")
    before, values = index.stat().st_mtime_ns, dstore.parent / "train_vals.npy"
    values.unlink()
    build(dstore, "--index_factory", "Flat")
    assert "nothing to do" in capsys.readouterr().out
    assert index.stat().st_mtime_ns == before and values.is_file()
    assert "IVF4,Flat" in refused(dstore, "--index_factory", "IVF4,Flat")
    build(dstore, "--index_factory", "IVF4,Flat", "--overwrite")
    assert read_made(index).settings["factory"] == "IVF4,Flat"


def test_files_of_other_origin_are_not_replaced(dstore: Path) -> None:
    index = dstore.parent / f"train_{DIM}.index"
    index.write_bytes(b"precious")
    assert index.name in refused(dstore, "--code_size", 4)
    assert index.read_bytes() == b"precious"
    np.save(dstore.parent / "train_vals.npy", np.arange(7))
    line = refused(dstore, "--index_path", dstore.parent / "b.index", "--code_size", 4)
    assert "train_vals.npy" in line


@pytest.mark.parametrize(("factory", "part_rows"), [("Flat", 150), ("IVF8,PQ4x4", 150), ("HNSW8", ROWS)])
def test_a_build_stopped_at_any_rename_is_continued(tmp_path: Path, monkeypatch, factory: str, part_rows: int) -> None:
    dstore = write_datastore(tmp_path / "dstore", *random_rows(ROWS))
    flags = ("--index_factory", factory, "--num_keys_to_add_at_a_time", 150)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # HNSW depends on the order in which threads add
    whole = build(dstore, *flags, index="whole.index").read_bytes()
    number, stopped = 0, True
    while stopped:
        name = f"stopped{number}.index"
        stopped = stops_at_rename(monkeypatch, lambda name=name: build(dstore, *flags, index=name), number)
        index = build(dstore, *flags, index=name)
        assert index.read_bytes() == whole
        assert not list(tmp_path.glob("*.building"))
        number += 1
    faiss.omp_set_num_threads(threads)
    assert number >= 5


@pytest.mark.parametrize("factory", ["Flat", "SQ8", "IVF8,Flat", "OPQ4,IVF8,PQ4x4", "IVF8,PQ4x4fs", "HNSW8"])
def test_parts_give_what_adding_all_rows_gives(tmp_path: Path, factory: str) -> None:
    keys, values = random_rows(ROWS)
    dstore = write_datastore(tmp_path / "dstore", keys, values)
    indexes = [
        build(dstore, "--index_factory", factory, "--num_keys_to_add_at_a_time", rows, index=f"{rows}.index")
        for rows in (1000, 130)
    ]
    one, parts = (KNNSearcher(index, probe=8).search(keys, 20) for index in indexes)
    np.testing.assert_array_equal(one[0], parts[0])
    np.testing.assert_array_equal(one[1], parts[1])


def test_an_index_larger_than_memory_is_merged_on_disk(tmp_path: Path, monkeypatch) -> None:
    keys, values = random_rows(ROWS)
    dstore = write_datastore(tmp_path / "dstore", keys, values)
    flags = ("--index_factory", "IVF8,Flat", "--num_keys_to_add_at_a_time", 150)
    in_memory = KNNSearcher(build(dstore, *flags, index="memory.index"), probe=8).search(keys, 20)
    monkeypatch.setattr(build_index, "MEMORY_SHARE", 0)
    index = build(dstore, *flags, index="disk.index")
    assert (tmp_path / "disk.index.ivfdata").stat().st_size > index.stat().st_size
    for found, expected in zip(KNNSearcher(index, probe=8).search(keys, 20), in_memory, strict=True):
        np.testing.assert_array_equal(found, expected)
    monkeypatch.undo()
    monkeypatch.setenv("MLPMEM_TRACEBACK", "1")
    build(dstore, *flags, "--overwrite", index="disk.index")
    np.testing.assert_array_equal(KNNSearcher(index, probe=8).search(keys, 20)[1], in_memory[1])
    assert not (tmp_path / "disk.index.ivfdata").exists()


def test_several_processes_build_the_index_of_one(tmp_path: Path) -> None:
    dstore = write_datastore(tmp_path / "dstore", *random_rows(ROWS))
    flags = ("--index_factory", "IVF8,PQ4x4", "--num_keys_to_add_at_a_time", 90)
    one = build(dstore, *flags, index="one.index")
    many = ("--dstore_path", dstore, *flags, "--index_path", tmp_path / "many.index")
    for process in together(tmp_path / "log", 3, MODULE, *many):
        process.done()
    assert (tmp_path / "many.index").read_bytes() == one.read_bytes()
    assert read_made(tmp_path / "many.index") == read_made(one)


@pytest.mark.unit
def test_the_training_sample_is_a_thousand_runs_at_seeded_rows(tmp_path: Path) -> None:
    keys = np.random.default_rng(0).standard_normal((12_000, 2)).astype(np.float16)
    datastore = Datastore.open(write_datastore(tmp_path / "d", keys, np.zeros(12_000, np.int32), part_rows=5000))
    sample = training_sample(datastore, 4_000, seed=3)
    rows = {row.tobytes(): number for number, row in enumerate(keys.astype(np.float32))}
    numbers = np.array([rows[row.tobytes()] for row in sample]).reshape(1000, 4)
    assert (np.diff(numbers, axis=1) == 1).all() and len(np.unique(numbers)) == 4_000
    np.testing.assert_array_equal(sample, training_sample(datastore, 4_000, seed=3))
    assert (sample != training_sample(datastore, 4_000, seed=4)).any()
    np.testing.assert_array_equal(training_sample(datastore, 20_000, seed=3), keys.astype(np.float32))


def test_a_key_that_is_not_finite_is_named_and_no_index_appears(tmp_path: Path) -> None:
    keys, values = random_rows(ROWS)
    keys[321, 5] = np.nan
    dstore = write_datastore(tmp_path / "dstore", keys, values)
    line = refused(dstore, "--index_factory", "Flat")
    assert str(dstore) in line and "row 321 " in line
    assert not list(tmp_path.glob("dstore.index*"))


# Unknown; not squared L2 of the keys; rows cannot be added, found again or saved.
@pytest.mark.parametrize(
    "factory",
    [
        *("nonsense", "IVF4,PQ5", "PQ4x40"),
        *("LSH", "ITQ8,LSH", "L2norm,Flat", "L2norm,IVF4,Flat", "PCAW8,Flat", "RQ2x4_Nnone"),
        *("IDMap,Flat", "IDMap2,IVF4,Flat", "ZnLattice2x8_4", "IVF4,FlatDedup"),
    ],
)
def test_a_factory_that_cannot_be_used_is_refused(dstore: Path, factory: str) -> None:
    assert factory in refused(dstore, "--index_factory", factory)
    build(dstore, "--index_factory", "Flat")  # nothing of the attempt is in the way


@pytest.mark.parametrize("factory", ["PCA8,Flat", "OPQ4_8,IVF4,PQ4x4", "IVF4,SQ8", "PQ4x4fs", "NSG8,Flat", "RQ2x4"])
def test_factories_that_approximate_squared_distances_are_taken(dstore: Path, factory: str) -> None:
    distances, _ = KNNSearcher(build(dstore, "--index_factory", factory), probe=4).search(random_rows(ROWS)[0], 5)
    assert np.isfinite(distances).all()


@pytest.mark.parametrize("rows", [1, 2])
def test_the_smallest_datastores_are_indexed(tmp_path: Path, rows: int) -> None:
    keys, values = random_rows(rows)
    dstore = write_datastore(tmp_path / "dstore", keys, values)
    assert KNNSearcher(build(dstore), probe=1).search(keys, 1)[1].tolist() == [[row] for row in range(rows)]


def test_numbers_out_of_range_are_refused(dstore: Path) -> None:
    for flag in ("--ncentroids", "--code_size", "--probe", "--num_keys_to_add_at_a_time"):
        assert f"{flag} 0" in refused(dstore, flag, 0)
    assert "--seed -1" in refused(dstore, "--seed", -1)
