"""Nearest-neighbour search: an index in one FAISS file and the values of its rows; float16 queries in, squared distances
and datastore row numbers out.

Each process opens the whole index, memory-mapped or on its GPU, and searches its own queries. Beside an index `X.index` is
its record `X.index.made.json`, and if it was too large for memory when it was merged, its inverted lists `X.index.ivfdata`.
FAISS files without a record are read too.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from knn_utils.datastore import Datastore
from knn_utils.distribution import float32_from_float16
from utils.artefact import Made, read_made, require
from utils.cli import say, started_together
from utils.errors import InputError, one_line
from utils.files import atomic

BLOCK_ROWS = 256  # queries that a CPU searches at once: their hits stay in the cache until they are aggregated


def check_faiss() -> None:
    """Raise InputError unless FAISS, which comes with an extra, can be imported."""
    try:
        import faiss  # noqa: F401
    except ImportError as error:
        remedy = 'pip install ".[cpu]", or ".[gpu]" on a machine with a GPU (README.md)'
        raise InputError(f"FAISS cannot be imported ({one_line(error, 160)}); {remedy}") from None


def lists_path(path: str | os.PathLike) -> Path:
    """The file of the inverted lists of an index that was merged on disk."""
    return Path(f"{path}.ivfdata")


def read_faiss(path: str | os.PathLike, *, memory_map: bool = False) -> Any:
    """A FAISS index from its file. With `memory_map` its inverted lists stay on disk, in the page cache that all processes
    share. Raises InputError if there is no such file, if it is truncated, or not an index over squared L2."""
    import faiss

    flags = faiss.IO_FLAG_READ_ONLY | faiss.IO_FLAG_ONDISK_SAME_DIR
    if memory_map and not lists_path(path).exists():  # lists in a file of their own are mapped anyway
        flags |= faiss.IO_FLAG_MMAP
    try:
        index = faiss.read_index(str(path), flags)
        if index.metric_type != faiss.METRIC_L2:
            raise ValueError("its distances are not squared L2")
    except Exception as error:
        reason = f"cannot be read as an index ({faiss_reason(error)})"
        raise InputError(f"{path}: {reason}; build it with python -m knn_utils.build_index") from None
    lists = inverted_lists(index)
    if isinstance(lists, faiss.OnDiskInvertedLists):
        lists.prefetch_nthread = 0  # else each search starts 32 threads that touch pages ahead of the scan
    return index


def inverted_lists(index: Any) -> Any:
    """The inverted lists of an index, None where it has none."""
    import faiss

    ivf = faiss.try_extract_index_ivf(index)
    return None if ivf is None else faiss.downcast_InvertedLists(ivf.invlists)


def set_probe(index: Any, probe: int) -> None:
    """Set how many inverted lists are searched per query, in an index that has them."""
    import faiss

    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        ivf.nprobe = min(probe, ivf.nlist)


def write_faiss(index: Any, path: Path) -> None:
    """Write a FAISS index to `path`, atomically. Raises OSError where FAISS cannot write."""
    import faiss

    with atomic(path) as temporary:
        try:
            faiss.write_index(index, str(temporary))
        except RuntimeError as error:
            number = errno.ENOSPC if "No space left" in str(error) else errno.EIO
            raise OSError(number, faiss_reason(error), str(path)) from None


def faiss_reason(error: Exception) -> str:
    """The end of a FAISS message, without the names of functions and source files before it."""
    return one_line(str(error).rpartition(": ")[2], 160)


def has_gpu() -> bool:
    """Whether the installed FAISS sees a GPU, for `--knn_gpu`; prints a line if not."""
    import faiss

    if not faiss.get_num_gpus():
        say("--knn_gpu: ignored, FAISS sees no GPU; with a GPU install a FAISS for it (README.md)")
    return faiss.get_num_gpus() > 0


def to_gpu(index: Any, *, spread: bool = False) -> Any:
    """`index` on this process's GPU, or with `spread` divided among all GPUs where this is the only process.

    Codes are looked up in half precision: tables for long codes do not fit a GPU's shared memory otherwise.
    """
    import faiss

    options = faiss.GpuMultipleClonerOptions()
    options.useFloat16 = True
    if spread and not started_together() and faiss.get_num_gpus() > 1:
        options.shard = True
        return faiss.index_cpu_to_all_gpus(index, options)
    device = int(os.environ.get("LOCAL_RANK", "0")) % faiss.get_num_gpus()
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), device, index, options)


def load_values(path: str | os.PathLike) -> np.ndarray:
    """The values of the indexed rows (`--val_path`): int32 (rows,), memory-mapped where possible.

    `path` is a .npy file, a datastore (file or folder), or a name ending in .pkl, which is never opened: it stands for
    the .npy beside it, or for the datastore beside it. Raises InputError for anything else.
    """
    path = Path(path)
    npy = path.with_suffix(".npy")
    if path.suffix == ".npy" or (path.suffix == ".pkl" and npy.is_file()):
        values = np.load(npy, mmap_mode="r", allow_pickle=False).reshape(-1)
        if values.dtype.kind not in "iu":
            raise InputError(f"{npy}: expected token ids, found {values.dtype}")
        return values.astype(np.int32, copy=False)
    if path.suffix == ".pkl":  # beside dstore_{model_type}_{subset}_{dim}.arrow
        found = list(path.parent.glob(f"dstore_*_{path.stem.removesuffix('_vals')}_*.arrow"))
        if len(found) != 1:
            raise InputError(f"{path}: pickles are not read, and {npy.name} is not beside it; name that file")
        path = found[0]
    return Datastore.open(path).vals()


class KNNSearcher:
    """An index, opened for searching. Threads may search at the same time.

    Args:
        probe: inverted lists searched per query; ignored by an index that has none.
        gpu: search on the GPU if FAISS sees one.
        datastore: the indexed `Datastore`, to check that the index belongs to it; raises InputError if not.

    Attributes: `path`, `rows`, `dim`, `on_gpu`, and `made`, the record of the index (None for a foreign file).
    """

    def __init__(self, index_path: str | Path, *, probe: int, gpu: bool = False, datastore: Any = None) -> None:
        check_faiss()
        if probe < 1:
            raise InputError(f"--probe {probe}: expected 1 or more")
        self.path, self.made = Path(index_path), read_made(index_path)
        self.on_gpu = gpu and has_gpu()
        index = read_faiss(index_path, memory_map=not self.on_gpu)
        self.rows, self.dim = index.ntotal, index.d
        if datastore is not None:
            self.check_width(datastore.path, datastore.dim)
            self.check_indexed(datastore.path, datastore.rows, datastore.made)
        set_probe(index, probe)
        if self.on_gpu:
            index = to_gpu(index, spread=True)
        self._index = index
        self._turn = threading.Lock() if self.on_gpu else contextlib.nullcontext()  # a GPU takes one batch at a time

    def check_width(self, source: object, dim: int) -> None:
        """Raise InputError unless keys of width `dim` can be searched for."""
        if dim != self.dim:
            raise InputError(f"{source}: keys are {dim} wide, but the index {self.path} takes {self.dim}")

    def check_indexed(self, source: object, rows: int, made: Made | None = None) -> None:
        """Raise InputError unless `source`, of so many rows and of the record `made`, is what was indexed."""
        if rows != self.rows:
            remedy = "name the indexed datastore or its values (--val_path)"
            raise InputError(f"{self.path}: indexes {self.rows} rows, but {source} holds {rows}; {remedy}")
        require(self.path, self.made, datastore=made and made.id)

    def check_k(self, k: int) -> None:
        """Raise InputError unless the index has k rows."""
        if not 1 <= k <= self.rows:
            raise InputError(f"--k {k}: expected 1 to {self.rows}, the rows of {self.path}")

    def search(
        self, queries: np.ndarray, k: int, source: object = "queries", first_row: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest rows of each query (n, dim), float16 or float32: distances (n, k) float32, squared L2, rising, and
        row numbers (n, k) int64; infinity and -1 where the searched lists hold fewer than k.

        `source` and `first_row` name the queries in messages. Raises InputError if k or the width does not fit the index,
        or if a query holds NaN or infinity.
        """
        self.check_k(k)
        self.check_width(source, queries.shape[-1])
        queries = finite_keys(queries, first_row, source)
        with self._turn:
            distances, ids = self._index.search(queries, k)
        distances[ids < 0] = np.inf
        return distances, ids


def open_searcher(index_path: str | Path, val_path: str | Path, *, probe: int, gpu: bool = False) -> KNNSearcher:
    """The index whose rows have the values at `val_path`. Raises InputError if they do not belong together."""
    if Path(val_path).suffix not in (".npy", ".pkl"):
        return KNNSearcher(index_path, probe=probe, gpu=gpu, datastore=Datastore.open(val_path))
    searcher = KNNSearcher(index_path, probe=probe, gpu=gpu)
    searcher.check_indexed(val_path, len(load_values(val_path)))
    return searcher


def finite_keys(keys: np.ndarray, first_row: int, source: object) -> np.ndarray:
    """`keys` (n, dim) as float32. Raises InputError naming the first row that holds NaN or infinity."""
    keys = float32_from_float16(keys)
    bad = np.flatnonzero(~np.isfinite(keys).all(axis=1))
    if len(bad):
        raise InputError(
            f"{source}: row {first_row + bad[0]} holds NaN or infinity in its hidden state; check the base"
        )
    return keys


def map_in_order(work: Callable[[Any], Any], items: Iterable[Any], threads: int) -> Iterator[Any]:
    """Yield `work(item)` for each item in order, computed by `threads` threads at most `threads` + 2 items ahead.

    FAISS, NumPy and torch release the interpreter while they compute, so one thread searches while another aggregates and
    the caller writes. Inside a thread each of the libraries uses that thread only.
    """
    import faiss
    import torch

    def use_one_thread() -> None:
        faiss.omp_set_num_threads(1)
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(threads, thread_name_prefix="search", initializer=use_one_thread)
    try:
        source = iter(items)
        waiting: deque[Future] = deque(pool.submit(work, item) for item in islice(source, threads + 2))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(work, item) for item in islice(source, 1))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
