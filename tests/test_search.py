"""Search: order of hits, shards, and files that are no index."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
import torch
from harness import refused_here
from knn_files import DIM, exact_neighbours, random_rows, write_datastore

from knn_utils import block_search, faiss_files, search
from knn_utils.block_search import in_order, searching_threads
from knn_utils.datastore import Datastore
from knn_utils.search import KNNSearcher
from utils.errors import InputError

pytestmark = pytest.mark.unit


def write_index(path: Path, keys: np.ndarray, factory: str = "Flat") -> Path:
    index = faiss.index_factory(keys.shape[1], factory)
    if not index.is_trained:
        index.train(keys.astype(np.float32))
    index.add(keys.astype(np.float32))
    faiss.write_index(index, str(path))
    return path


def with_ties(rows: int = 300) -> np.ndarray:
    """Keys of which many are equal, so that ties fall on every place."""
    keys, _ = random_rows(rows)
    keys[40:90] = keys[10]
    keys[200:204] = keys[5]
    return keys


@pytest.mark.parametrize("k", [1, 5, 30, 51, 120, 300])
def test_hits_stand_by_distance_then_row_number_also_where_k_divides_a_tie(tmp_path: Path, k: int) -> None:
    keys = np.round(with_ties() * 4) / 4  # exact in float32, so that equal distances are equal bits
    searcher = KNNSearcher(write_index(tmp_path / "flat.index", keys), probe=1)
    distances, ids = searcher.search(keys, k)
    expected_distances, expected_ids = exact_neighbours(keys, keys, k)
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-4, atol=1e-3)
    searched = np.sort(ids, axis=1)
    assert (np.diff(searched, axis=1) > 0).all()
    same = distances[:, 1:] == distances[:, :-1]
    assert (ids[:, 1:][same] > ids[:, :-1][same]).all()
    # Rows whose k-th place divides the tie of 51 equal keys: the lowest row numbers of it are kept.
    for row in (10, 40, 89):
        ties = [*[10], *range(40, 90)][: min(k, 51)]
        assert ids[row, : len(ties)].tolist() == ties
    assert (ids == expected_ids).mean() > 0.99


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "IVF4,PQ4"])
def test_a_tie_of_many_equal_keys_is_looked_through_once_not_for_each_of_them(tmp_path: Path, factory: str) -> None:
    keys, _ = random_rows(3000)
    equal = np.arange(100, 2900)
    keys[equal] = keys[0]
    searcher = KNNSearcher(write_index(tmp_path / "i.index", keys, factory), probe=1)
    (shard,) = searcher._shards
    asked, ask = [], shard._ask
    shard._ask = lambda queries, k: asked.append(len(queries) * k) or ask(queries, k)
    _, ids = searcher.search(keys[2000:2900], 16)
    assert (ids == [0, *range(100, 115)]).all()
    assert sum(asked) < 2 * 900 * 17  # for each of them it were 900 · 5,600
    assert (searcher.search(keys[:1], 16)[1] == ids[:1]).all() and (
        searcher.search(keys[:1], 9)[1] == ids[:1, :9]
    ).all()


@pytest.mark.parametrize("factory", ["IVF8,Flat", "OPQ4,IVF8,PQ4x4"])
def test_probe_reaches_the_lists_wherever_they_are_in_the_index(tmp_path: Path, factory: str) -> None:
    keys, _ = random_rows(400)
    path = write_index(tmp_path / "any.index", keys, factory)
    few, all_lists = (KNNSearcher(path, probe=probe).search(keys, 390) for probe in (1, 1000))
    # Lists that hold fewer than k rows leave places without a hit.
    missing = few[1] < 0
    assert missing.any() and not (all_lists[1] < 0).any()
    assert np.isinf(few[0][missing]).all() and np.isfinite(few[0][~missing]).all()


def refuses(call) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_does_not_fit_the_index_is_refused_in_one_line(tmp_path: Path) -> None:
    keys, values = random_rows(120)
    path = write_index(tmp_path / "flat.index", keys)
    searcher = KNNSearcher(path, probe=1)
    assert "--k 121" in refuses(lambda: searcher.search(keys, 121))
    assert "--k 0" in refuses(lambda: searcher.search(keys, 0))
    assert "8 wide" in refuses(lambda: searcher.search(keys[:, :8], 3))
    assert "--probe 0" in refuses(lambda: KNNSearcher(path, probe=0))
    assert "no such index" in refuses(lambda: KNNSearcher(tmp_path / "none.index", probe=1))
    wide = Datastore.open(write_datastore(tmp_path / "wide", np.tile(keys, 2), values))
    assert "32 wide" in refuses(lambda: KNNSearcher(path, probe=1, datastore=wide))
    longer = Datastore.open(write_datastore(tmp_path / "long", *random_rows(150)))
    assert "--extend" in refuses(lambda: KNNSearcher(path, probe=1, datastore=longer))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_query_that_is_not_finite_is_named(tmp_path: Path, bad: float) -> None:
    keys, _ = random_rows(2000)
    searcher = KNNSearcher(write_index(tmp_path / "flat.index", keys), probe=1)
    keys[1500, 3] = bad
    assert "dstore.arrow: row 1500 " in refuses(lambda: searcher.search(keys, 3, source="dstore.arrow"))


@pytest.mark.parametrize("factory", ["Flat", "IVF8,PQ4x4"])
def test_a_truncated_index_is_refused(tmp_path: Path, factory: str) -> None:
    keys, _ = random_rows(400)
    data = write_index(tmp_path / "whole.index", keys, factory).read_bytes()
    cut = tmp_path / "cut.index"
    for content in (b"", data[:20], data[: len(data) // 2], data[:-1], b"no index at all" * 100):
        cut.write_bytes(content)
        assert "cut.index: not a whole FAISS index" in refuses(lambda: KNNSearcher(cut, probe=1))


def test_an_index_of_another_kind_is_refused(tmp_path: Path) -> None:
    keys, path = random_rows(50)[0].astype(np.float32), tmp_path / "x.index"
    index = faiss.IndexFlatIP(DIM)
    index.add(keys)
    faiss.write_index(index, str(path))
    assert "squared L2" in refuses(lambda: KNNSearcher(path, probe=1))
    index = faiss.IndexIDMap(faiss.IndexFlatL2(DIM))
    index.add_with_ids(keys, np.arange(50) + 1000)
    faiss.write_index(index, str(path))
    assert "1049" in refuses(lambda: KNNSearcher(path, probe=1).search(keys, 50))


@pytest.mark.parametrize(("k", "shards"), [(1, 2), (64, 3), (100, 2), (300, 8)])
def test_merged_lists_are_those_of_sorting_all_hits_though_few_of_them_are_looked_at(k: int, shards: int) -> None:
    random, found = np.random.default_rng(k), []
    for shard in range(shards):
        # Whole numbers, so that ties fall on every place; the last shard holds few rows, one row hits nothing.
        distances = np.sort(random.integers(0, 40 + 60 * shard, (25, k)).astype(np.float32), axis=1)
        ids = np.sort(random.integers(0, 1000, (25, k)), axis=1) + 1000 * shard
        distances[0], ids[0] = np.inf, -1
        if shard == shards - 1:
            distances[:, k // 3 :], ids[:, k // 3 :] = np.inf, -1
        found.append((distances, ids))
    distances, ids = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    merged = search.merge(found, k)
    assert (merged[0] == np.take_along_axis(distances, order, 1)).all()
    assert (merged[1] == np.take_along_axis(ids, order, 1)).all()
    reach = search.farthest([search.sample(each, k) for each, _ in found], k)
    kept = sum(search.within(*each, reach)[0] for each in found)
    assert (kept >= k).all() or np.isinf(reach).any()


@pytest.mark.parametrize("first_row", [0, 1 << 33])
def test_hits_that_travel_keep_row_numbers_of_any_size(monkeypatch: pytest.MonkeyPatch, first_row: int) -> None:
    monkeypatch.setattr(block_search, "send", lambda rows, leaving, coming: rows)
    distances, ids = np.sort(np.random.default_rng(0).random((9, 200), np.float32)), np.arange(1800).reshape(9, 200)
    lists = block_search.exchange((distances, ids + first_row), [9], 0, 200, first_row + 1800)
    found = search.merge_ragged(lists, 200)
    assert (found[0] == distances).all() and (found[1] == ids + first_row).all()


def test_an_index_may_take_what_is_free_on_a_card_shared_by_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_files, "default_device", lambda: torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 << 30, 96 << 30))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert faiss_files.room_for_index(True) == 37 << 30
    assert faiss_files.room_for_index(False) > 0
    monkeypatch.setenv("MLPMEM_INDEX_GB", "1.5")
    assert faiss_files.room_for_index(True) == 1.5e9
    monkeypatch.setenv("MLPMEM_INDEX_GB", "much")
    assert "MLPMEM_INDEX_GB much" in refuses(lambda: faiss_files.room_for_index(True))


def test_threads_keep_the_order_and_hand_errors_on() -> None:
    with searching_threads(3) as pool:
        assert list(in_order(lambda number: number * 2, range(50), pool, 5)) == list(range(0, 100, 2))

    def fail(number: int) -> int:
        if number == 7:
            raise InputError("seven")
        return number

    with searching_threads(3) as pool:
        results = in_order(fail, range(50), pool, 5)
        assert [next(results) for _ in range(7)] == list(range(7))
        with pytest.raises(InputError, match="seven"):
            next(results)


def test_a_gpu_asked_for_without_one_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    if faiss.get_num_gpus():
        pytest.skip("FAISS has a GPU here")
    keys, _ = random_rows(50)
    searcher = KNNSearcher(write_index(tmp_path / "flat.index", keys), probe=1, gpu=True)
    assert not searcher.on_gpu
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        ("knn_utils.build_index", ("--dstore_path", "x")),
        (
            "train_base",
            ("--model_name_or_path", "x", "--dataset_name", "x", "--knn", "--index_file", "x", "--val_file", "x"),
        ),
        (
            "knn_utils.preflight",
            ("--tokens", 9, "--dim", 8, "--vocab", 9, "--base_parameters", 9, "--index_factory", "Flat"),
        ),
    ],
)
def test_without_faiss_a_command_says_what_to_install_before_it_reads_anything(monkeypatch, module, flags) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setenv("MLPMEM_TRACEBACK", "1")
    line = refused_here(module, *flags)
    assert "FAISS cannot be imported" in line and '".[cpu]"' in line and '".[gpu]"' in line


def test_without_faiss_no_index_is_opened(monkeypatch, tmp_path: Path) -> None:
    keys, _ = random_rows(50)
    path = write_index(tmp_path / "flat.index", keys)
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert '".[cpu]"' in refuses(lambda: KNNSearcher(path, probe=1))


@pytest.mark.parametrize(
    ("wheel", "capability", "works"),
    [(True, (7, 0), True), (True, (8, 9), True), (True, (9, 0), False), (True, (12, 0), False), (False, (9, 0), True)],
)
def test_a_gpu_for_which_the_wheel_has_no_code_is_left_alone(monkeypatch, capsys, wheel, capability, works) -> None:
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss_files, "default_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(faiss_files, "distributions", lambda name: [name] if wheel and name == "faiss-gpu-cu12" else [])
    assert faiss_files.has_gpu() is works
    said = capsys.readouterr().out
    assert said.count("\n") == (not works)
    assert works or ("conda-forge" in said and ".".join(map(str, capability)) in said)


def test_the_shards_of_an_index_share_one_working_memory_on_their_gpu(tmp_path: Path, monkeypatch) -> None:
    made, used = [], []
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "GpuClonerOptions", SimpleNamespace, raising=False)
    monkeypatch.setattr(faiss, "StandardGpuResources", lambda: made.append(object()) or made[-1], raising=False)
    to_card = lambda resources, device, index, options: used.append(resources) or index  # noqa: E731
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", to_card, raising=False)
    path, lock = write_index(tmp_path / "flat.index", random_rows(50)[0]), threading.Lock()
    faiss_files.gpu_resources.cache_clear()
    try:
        for _ in range(3):
            search.IndexShard(faiss_files.Shard(path), 1, lock)
    finally:
        faiss_files.gpu_resources.cache_clear()
    assert len(made) == 1 and used == made * 3


@pytest.mark.parametrize(("factory", "half"), [("IVF4,PQ48", False), ("IVF4,PQ64", True), ("OPQ64,IVF4,PQ64", True)])
def test_long_codes_go_to_a_gpu_with_half_precision_tables(monkeypatch, factory, half) -> None:
    cloned = []
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "GpuClonerOptions", SimpleNamespace, raising=False)
    monkeypatch.setattr(faiss_files, "gpu_resources", lambda: None)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", lambda *arguments: cloned.append(arguments[3]), raising=False)
    faiss_files.to_gpu(faiss.index_factory(192, factory))
    assert cloned[0].useFloat16 is half
