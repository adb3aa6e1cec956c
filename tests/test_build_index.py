"""Building an index: names, factories, parts, interruptions, bad input."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest
from harness import command, refused_here
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


def build(dstore: Path, factory: str, *more: object, name: str = f"train_{DIM}") -> Path:
    index = dstore.parent / f"{name}.index"
    command(MODULE, "--dstore_path", dstore, "--index_path", index, "--index_factory", factory, *more)
    return index


def search(index: Path, k: int = 20) -> tuple[np.ndarray, np.ndarray]:
    return KNNSearcher(index, probe=8).search(random_rows(ROWS)[0], k)


def test_index_and_values_are_beside_the_datastore(dstore: Path) -> None:
    command(MODULE, "--dstore_path", dstore, "--index_factory", "Flat")
    keys, values = random_rows(ROWS)
    index = dstore.parent / f"train_{DIM}.index"
    np.testing.assert_array_equal(search(index, 10)[1], exact_neighbours(keys, keys, 10)[1])
    np.testing.assert_array_equal(np.load(dstore.parent / "train_vals.npy", allow_pickle=False), values)
    made, store = read_made(index), read_made(dstore)
    assert made.rows == ROWS and made.settings["factory"] == "Flat" and made.settings["layer_position"] == -1
    assert made.made_from == {**store.made_from, "datastore": store.id}
    visible = {item.name for item in dstore.parent.iterdir() if not item.name.startswith(".")}
    assert visible == {dstore.name, index.name, f"{index.name}.made.json", "train_vals.npy"}
    assert default_names(Path("d/mine"), None) == (Path("d/mine.index"), Path("d/mine_vals.npy"))


@pytest.mark.unit
def test_centroids_are_lowered_to_what_the_rows_support() -> None:
    assert supported("OPQ16,IVF4096_HNSW32,PQ16", 39_000) == "OPQ16,IVF1000_HNSW32,PQ16"
    assert supported("IVF4096,PQ32", 10_000_000) == "IVF4096,PQ32"
    assert supported("IVF4096,PQ32", 255) == "Flat"
    assert supported("IVF4096,PQ32x4fs", 255) == "IVF6,PQ32x4fs"


@pytest.mark.parametrize("rows", [1, ROWS])
def test_the_default_flags_index_a_small_datastore(tmp_path: Path, rows: int, capfd) -> None:
    dstore = write_datastore(tmp_path / "d", *random_rows(rows))
    command(MODULE, "--dstore_path", dstore, "--code_size", 4)
    ids = KNNSearcher(tmp_path / "d.index", probe=100).search(random_rows(rows)[0], min(rows, 10))[1]
    assert (ids == np.arange(rows)[:, None]).any(axis=1).mean() > 0.9
    assert "WARNING" not in capfd.readouterr().err


def test_a_complete_index_stays_and_overwrite_replaces_it(dstore: Path, capsys) -> None:
    index, flags = build(dstore, "Flat"), ("--index_factory", "Flat")
    before, values = index.stat().st_mtime_ns, dstore.parent / "train_vals.npy"
    values.unlink()
    build(dstore, "Flat")
    assert "nothing to do" in capsys.readouterr().out
    assert index.stat().st_mtime_ns == before and values.is_file()
    assert "IVF4,Flat" in refused_here(MODULE, "--dstore_path", dstore, "--index_factory", "IVF4,Flat")
    build(dstore, "IVF4,Flat", "--overwrite")
    assert read_made(index).settings["factory"] == "IVF4,Flat"
    np.save(values, np.arange(7))  # of another datastore
    assert values.name in refused_here(
        MODULE, "--dstore_path", dstore, "--index_path", dstore.parent / "b.index", *flags
    )


@pytest.mark.parametrize("factory", ["Flat", "OPQ4,IVF8,PQ4x4", "HNSW8"])
def test_a_build_stopped_at_any_rename_is_continued(dstore: Path, monkeypatch, factory: str) -> None:
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # HNSW depends on the order in which threads add
    whole = build(dstore, factory, name="whole").read_bytes()
    number, stopped = 0, True
    while stopped:
        name, parts = f"stopped{number}", (factory, "--num_keys_to_add_at_a_time", 150)
        stopped = stops_at_rename(monkeypatch, lambda given=parts, name=name: build(dstore, *given, name=name), number)
        other_size = 150 + number % 2  # parts may have another size when a build continues
        assert build(dstore, *parts[:2], other_size, name=name).read_bytes() == whole
        assert not list(dstore.parent.glob("*.building"))
        number += 1
    faiss.omp_set_num_threads(threads)
    assert number >= 5


@pytest.mark.parametrize("factory", ["SQ8", "IVF8,Flat", "PCA8,Flat", "PQ4x4fs", "IVF8,PQ4x4fs", "NSG8,Flat", "RQ2x4"])
def test_parts_give_what_adding_all_rows_gives(dstore: Path, factory: str) -> None:
    one = search(build(dstore, factory, name="one"))
    parts = search(build(dstore, factory, "--num_keys_to_add_at_a_time", 130, name="parts"))
    np.testing.assert_allclose(one[0], parts[0], rtol=1e-4, atol=1e-4)
    assert (one[1] == parts[1]).mean() > 0.99  # matrix products of other sizes are rounded otherwise


def test_an_index_larger_than_memory_is_merged_on_disk(dstore: Path, monkeypatch) -> None:
    flags = ("IVF8,Flat", "--num_keys_to_add_at_a_time", 150)
    in_memory = search(build(dstore, *flags, name="memory"))
    with monkeypatch.context() as patch:
        patch.setattr(build_index, "MEMORY_SHARE", 0)
        index = build(dstore, *flags, name="disk")
    lists = dstore.parent / "disk.index.ivfdata"
    assert lists.stat().st_size > index.stat().st_size
    np.testing.assert_array_equal(search(index), in_memory)
    np.testing.assert_array_equal(search(build(dstore, *flags, "--overwrite", name="disk")), in_memory)
    assert not lists.exists()


@pytest.mark.unit
def test_the_training_sample_is_a_thousand_runs_at_seeded_rows(tmp_path: Path) -> None:
    keys = np.random.default_rng(0).standard_normal((12_000, 2)).astype(np.float16)
    datastore = Datastore.open(write_datastore(tmp_path / "d", keys, np.zeros(12_000, np.int32), part_rows=5000))
    sample = training_sample(datastore, 4_000, seed=3)
    rows = {row.tobytes(): number for number, row in enumerate(keys.astype(np.float32))}
    numbers = np.array([rows[row.tobytes()] for row in sample]).reshape(1000, 4)
    assert (np.diff(numbers, axis=1) == 1).all() and len(np.unique(numbers)) == 4_000
    assert (sample != training_sample(datastore, 4_000, seed=4)).any()


def test_a_key_that_is_not_finite_is_named_and_no_index_appears(tmp_path: Path) -> None:
    keys, values = random_rows(ROWS)
    keys[321, 5] = np.nan
    dstore = write_datastore(tmp_path / "dstore", keys, values)
    assert f"{dstore}: row 321 " in refused_here(MODULE, "--dstore_path", dstore, "--index_factory", "Flat")
    assert not list(tmp_path.glob("dstore.index*"))


# Unknown; distances that are not squared L2 of the keys; rows that cannot be added or saved.
@pytest.mark.parametrize(
    "factory",
    [
        *("nonsense", "IVF4,PQ5", "LSH", "ITQ8,LSH", "L2norm,Flat", "L2norm,IVF4,Flat", "PCAW8,Flat", "RQ2x4_Nnone"),
        *("IDMap,Flat", "IDMap2,IVF4,Flat", "ZnLattice2x8_4"),
    ],
)
def test_a_factory_that_cannot_be_used_is_refused(dstore: Path, factory: str) -> None:
    assert factory in refused_here(MODULE, "--dstore_path", dstore, "--index_factory", factory)
    build(dstore, "Flat")  # nothing of the attempt is in the way
