"""Search: probes, files that are no index, what does not belong together, threads."""

from __future__ import annotations

import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
from harness import refused_here
from knn_files import DIM, random_rows, write_datastore

from knn_utils.datastore import Datastore
from knn_utils.search import KNNSearcher, load_values, map_in_order
from utils.errors import InputError

pytestmark = pytest.mark.unit


def write_index(path: Path, keys: np.ndarray, factory: str = "Flat", metric: int = faiss.METRIC_L2) -> Path:
    index = faiss.index_factory(keys.shape[1], factory, metric)
    index.train(keys.astype(np.float32))
    index.add(keys.astype(np.float32))
    faiss.write_index(index, str(path))
    return path


def refuses(call) -> str:
    with pytest.raises(InputError) as caught:
        call()
    return str(caught.value)


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
    for k in (0, 121):
        assert f"--k {k}" in refuses(lambda k=k: searcher.search(keys, k))
    assert "8 wide" in refuses(lambda: searcher.search(keys[:, :8], 3))
    assert "--probe 0" in refuses(lambda: KNNSearcher(path, probe=0))
    wide = Datastore.open(write_datastore(tmp_path / "wide", np.tile(keys, 2), values))
    longer = Datastore.open(write_datastore(tmp_path / "long", *random_rows(150)))
    for datastore in (wide, longer):
        assert str(datastore.path) in refuses(lambda store=datastore: KNNSearcher(path, probe=1, datastore=store))
    keys[50, 3] = np.nan
    assert "dstore.arrow: row 1050 " in refuses(lambda: searcher.search(keys, 3, "dstore.arrow", 1000))


@pytest.mark.parametrize("factory", ["Flat", "IVF8,PQ4x4"])
def test_a_file_that_is_no_index_over_squared_l2_is_refused(tmp_path: Path, factory: str) -> None:
    keys, _ = random_rows(400)
    data = write_index(tmp_path / "whole.index", keys, factory).read_bytes()
    product = write_index(tmp_path / "product.index", keys, factory, faiss.METRIC_INNER_PRODUCT).read_bytes()
    bad = tmp_path / "bad.index"
    assert "bad.index" in refuses(lambda: KNNSearcher(bad, probe=1))
    for content in (b"", data[:20], data[: len(data) // 2], data[:-1], b"no index at all" * 100, product):
        bad.write_bytes(content)
        assert "bad.index" in refuses(lambda: KNNSearcher(bad, probe=1))


def test_values_are_read_from_npy_datastore_and_the_originals_name(tmp_path: Path) -> None:
    keys, values = random_rows(60)
    dstore = write_datastore(tmp_path / f"dstore_gpt2_d_{DIM}.arrow", keys, values)
    np.save(tmp_path / "e_vals.npy", values.astype(np.int64)[:, None])
    for path in (dstore, tmp_path / "d_vals.pkl", tmp_path / "e_vals.npy", tmp_path / "e_vals.pkl"):
        found = load_values(path)
        np.testing.assert_array_equal(found, values)
        assert found.dtype == np.int32


def test_threads_keep_the_order_and_hand_errors_on() -> None:
    assert list(map_in_order(lambda number: number * 2, range(50), 3)) == list(range(0, 100, 2))
    results = map_in_order(lambda number: 1 / (7 - number), range(50), 3)
    assert [next(results) for _ in range(7)] == [1 / (7 - number) for number in range(7)]
    with pytest.raises(ZeroDivisionError):
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
