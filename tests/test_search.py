"""Search: hits, files that are no index, what does not belong together, threads."""

from __future__ import annotations

import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
from harness import refused_here
from knn_files import DIM, exact_neighbours, random_rows, write_datastore

from knn_utils.datastore import Datastore
from knn_utils.search import KNNSearcher, load_values, map_in_order
from utils.errors import InputError

pytestmark = pytest.mark.unit


def write_index(path: Path, keys: np.ndarray, factory: str = "Flat") -> Path:
    index = faiss.index_factory(keys.shape[1], factory)
    if not index.is_trained:
        index.train(keys.astype(np.float32))
    index.add(keys.astype(np.float32))
    faiss.write_index(index, str(path))
    return path


def refuses(call) -> str:
    with pytest.raises(InputError) as caught:
        call()
    return str(caught.value)


def test_hits_are_the_nearest_rows_by_rising_distance(tmp_path: Path) -> None:
    keys, _ = random_rows(300)
    distances, ids = KNNSearcher(write_index(tmp_path / "flat.index", keys), probe=1).search(keys, 30)
    expected_distances, expected_ids = exact_neighbours(keys, keys, 30)
    assert (ids == expected_ids).mean() > 0.99 and (np.diff(distances, axis=1) >= 0).all()
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("factory", ["IVF8,Flat", "OPQ4,IVF8,PQ4x4"])
def test_probe_reaches_the_lists_of_any_index(tmp_path: Path, factory: str) -> None:
    keys, _ = random_rows(400)
    path = write_index(tmp_path / "any.index", keys, factory)
    few, all_lists = (KNNSearcher(path, probe=probe).search(keys, 390) for probe in (1, 1000))
    missing = few[1] < 0  # the searched lists hold fewer than k rows
    assert missing.any() and not (all_lists[1] < 0).any()
    assert np.isinf(few[0][missing]).all() and np.isfinite(few[0][~missing]).all()


def test_what_does_not_fit_the_index_is_refused(tmp_path: Path) -> None:
    keys, values = random_rows(120)
    path = write_index(tmp_path / "flat.index", keys)
    searcher = KNNSearcher(path, probe=1)
    assert "--k 121" in refuses(lambda: searcher.search(keys, 121))
    assert "--k 0" in refuses(lambda: searcher.search(keys, 0))
    assert "8 wide" in refuses(lambda: searcher.search(keys[:, :8], 3))
    assert "--probe 0" in refuses(lambda: KNNSearcher(path, probe=0))
    assert "none.index" in refuses(lambda: KNNSearcher(tmp_path / "none.index", probe=1))
    wide = Datastore.open(write_datastore(tmp_path / "wide", np.tile(keys, 2), values))
    assert "32 wide" in refuses(lambda: KNNSearcher(path, probe=1, datastore=wide))
    longer = Datastore.open(write_datastore(tmp_path / "long", *random_rows(150)))
    assert "150" in refuses(lambda: KNNSearcher(path, probe=1, datastore=longer))


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_a_query_that_is_not_finite_is_named(tmp_path: Path, bad: float) -> None:
    keys, _ = random_rows(200)
    searcher = KNNSearcher(write_index(tmp_path / "flat.index", keys), probe=1)
    keys[150, 3] = bad
    assert "dstore.arrow: row 1150 " in refuses(lambda: searcher.search(keys, 3, "dstore.arrow", 1000))


@pytest.mark.parametrize("factory", ["Flat", "IVF8,PQ4x4"])
def test_a_truncated_index_is_refused(tmp_path: Path, factory: str) -> None:
    keys, _ = random_rows(400)
    data = write_index(tmp_path / "whole.index", keys, factory).read_bytes()
    cut = tmp_path / "cut.index"
    for content in (b"", data[:20], data[: len(data) // 2], data[:-1], b"no index at all" * 100):
        cut.write_bytes(content)
        assert "cut.index" in refuses(lambda: KNNSearcher(cut, probe=1))


def test_an_index_of_inner_products_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.index"
    index = faiss.IndexFlatIP(DIM)
    index.add(random_rows(50)[0].astype(np.float32))
    faiss.write_index(index, str(path))
    assert "x.index" in refuses(lambda: KNNSearcher(path, probe=1))


@pytest.mark.parametrize("name", ["d_vals.npy", "d_vals.pkl", "dstore_gpt2_d_16.arrow"])
def test_values_are_read_from_npy_datastore_and_the_originals_name(tmp_path: Path, name: str) -> None:
    keys, values = random_rows(60)
    write_datastore(tmp_path / "dstore_gpt2_d_16.arrow", keys, values)
    if name.endswith(".npy"):
        np.save(tmp_path / name, values.astype(np.int64)[:, None])
    found = load_values(tmp_path / name)
    np.testing.assert_array_equal(found, values)
    assert found.dtype == np.int32


def test_values_of_other_kinds_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([0.5]))
    (tmp_path / "c.pkl").write_bytes(b"")
    for name in ("a.npy", "c.pkl"):
        assert name in refuses(lambda name=name: load_values(tmp_path / name))


def test_threads_keep_the_order_and_hand_errors_on() -> None:
    assert list(map_in_order(lambda number: number * 2, range(50), 3)) == list(range(0, 100, 2))

    def fail(number: int) -> int:
        if number == 7:
            raise InputError("seven")
        return number

    results = map_in_order(fail, range(50), 3)
    assert [next(results) for _ in range(7)] == list(range(7))
    with pytest.raises(InputError, match="seven"):
        next(results)


def test_a_gpu_asked_for_without_one_is_reported_in_one_line(tmp_path: Path, capsys) -> None:
    if faiss.get_num_gpus():
        pytest.skip("FAISS has a GPU here")
    path = write_index(tmp_path / "flat.index", random_rows(50)[0])
    assert not KNNSearcher(path, probe=1, gpu=True).on_gpu
    assert capsys.readouterr().out.count("--knn_gpu") == 1


def test_without_faiss_one_line_says_what_to_install(monkeypatch, tmp_path: Path) -> None:
    path = write_index(tmp_path / "flat.index", random_rows(50)[0])
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setenv("MLPMEM_TRACEBACK", "1")
    assert '".[cpu]"' in refuses(lambda: KNNSearcher(path, probe=1))
    assert '".[cpu]"' in refused_here("knn_utils.build_index", "--dstore_path", "x")
