"""Nearest-neighbour search: float16 queries in, squared distances and datastore row numbers out.

One class for one index file or a folder of shards, on CPU or GPU, with optional exact re-ranking. Hits come in one
order whatever the index is made of: by distance, then by row number, also across the k-th place; so several shards,
in one process or in many, give what one whole index gives. Knows nothing of values, temperatures or files of targets.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from knn_utils.distribution import float32_from_float16
from knn_utils.faiss_files import Shard, faiss_reason, find_index, read_faiss
from utils.errors import InputError, one_line

# Queries that go through FAISS at once on a CPU: their hits stay in the cache until they are aggregated.
BLOCK_ROWS = 256
# Hits held at once while ties at the k-th place are looked into, and bytes of keys while re-ranking.
TIE_HITS = 1 << 21
REFINE_BYTES = 64 << 20
GPU_MAX_K = 2048

Hits = tuple[np.ndarray, np.ndarray]


class IndexShard:
    """One FAISS index, opened: rows from `first_row` on. Threads may search at the same time.

    Raises:
        InputError: not an index, or not the one that is recorded.
    """

    def __init__(self, shard: Shard, first_row: int, probe: int, gpus: int) -> None:
        self.path, self.first_row = shard.path, first_row
        index = read_faiss(shard.path, memory_map=not gpus)
        self.rows, self.dim = index.ntotal, index.d
        if shard.rows is not None and shard.rows != self.rows:
            raise InputError(
                f"{shard.path}: holds {self.rows} rows, its record says {shard.rows}; build the index again"
            )
        set_probe(index, probe)
        self._index = self._to_gpu(index, gpus) if gpus else index
        # A GPU works on one batch at a time; meanwhile other threads aggregate.
        self._turn = threading.Lock() if gpus else None

    def _to_gpu(self, index: Any, gpus: int) -> Any:
        import faiss

        options = faiss.GpuClonerOptions()
        # Codes of 56 bytes and more need half-precision tables to fit a GPU's shared memory.
        options.useFloat16 = True
        self._resources = faiss.StandardGpuResources()
        device = int(os.environ.get("LOCAL_RANK", "0")) % gpus
        try:
            return faiss.index_cpu_to_gpu(self._resources, device, index, options)
        except RuntimeError as error:
            raise InputError(
                f"--knn_gpu: {self.path} cannot be searched on the GPU ({one_line(error, 200)}); leave the flag out"
            ) from None

    def nearest(self, queries: np.ndarray, k: int) -> Hits:
        """The k nearest rows, equal distances by row number, also where the k-th place divides them.

        `queries` (n, dim) float32; distances (n, k) float32 and row numbers (n, k) int64, infinity and -1 where
        there is no hit. On a GPU a tie at the k-th place may be divided otherwise.
        """
        within = min(k, self.rows)
        wanted = within if self._turn else min(within + 1, self.rows)
        distances, ids = self._ask(queries, wanted)
        if wanted > within:
            tied = (distances[:, within - 1] == distances[:, within]) & (ids[:, within] >= 0)
            distances, ids = distances[:, :within], ids[:, :within]
            undecided = np.flatnonzero(tied)
            while len(undecided):
                wanted = min(2 * wanted, self.rows)
                undecided = self._settle(queries, wanted, undecided, distances, ids)
        order_ties(distances, ids, self.first_row + self.rows)
        if within < k:
            distances = np.pad(distances, ((0, 0), (0, k - within)), constant_values=np.inf)
            ids = np.pad(ids, ((0, 0), (0, k - within)), constant_values=-1)
        return distances, ids

    def _settle(
        self, queries: np.ndarray, wanted: int, rows: np.ndarray, distances: np.ndarray, ids: np.ndarray
    ) -> np.ndarray:
        """Ask `wanted` hits for `rows`; fill in those whose tie at the last place ends, return the others."""
        k = ids.shape[1]
        open_rows = []
        at_once = max(TIE_HITS // wanted, 1)
        for start in range(0, len(rows), at_once):
            some = rows[start : start + at_once]
            more_distances, more_ids = self._ask(queries[some], wanted)
            still = (more_distances[:, k - 1] == more_distances[:, -1]) & (more_ids[:, -1] >= 0) & (wanted < self.rows)
            settled = np.flatnonzero(~still)
            if len(settled):
                chosen_distances, chosen_ids = more_distances[settled], more_ids[settled]
                order_ties(chosen_distances, chosen_ids, self.first_row + self.rows)
                distances[some[settled]], ids[some[settled]] = chosen_distances[:, :k], chosen_ids[:, :k]
            open_rows.append(some[still])
        return np.concatenate(open_rows)

    def _ask(self, queries: np.ndarray, k: int) -> Hits:
        """FAISS's k nearest, by rising distance, ties in any order."""
        try:
            with self._turn or contextlib.nullcontext():
                distances, ids = self._index.search(queries, k)
        except RuntimeError as error:
            raise InputError(
                f"{self.path}: cannot be searched ({faiss_reason(error)}); if it is damaged, build it again"
            ) from None
        if ids.size and ids.max() >= self.rows:
            raise InputError(
                f"{self.path}: numbers its rows up to {ids.max()}, expected 0 to {self.rows - 1}; "
                "build the index with python -m knn_utils.build_index"
            )
        if ids.size and ids.min() < 0:
            distances[ids < 0] = np.inf
            ids[ids >= 0] += self.first_row
        elif self.first_row:
            ids += self.first_row
        return distances, ids


class KNNSearcher:
    """An index, opened for searching.

    Args:
        index_path: a FAISS file or an index folder of `build_index`.
        probe: inverted lists searched per query; without meaning for an index that has none.
        gpu: search on this process's GPU; without one, says so and searches on the CPU.
        refine_factor: 0 for the index's own distances; r: the r·k candidates nearest by the index are ranked by
            exact squared distance from the datastore's keys, and the k nearest of them returned.
        datastore: the indexed `Datastore`; its width and row count are checked. Needed for `refine_factor`.
        share: (process, processes): open only this process's shards; then `candidates` of all processes together
            make the hits (block_search.py).

    Attributes:
        rows: indexed rows; dim: width of keys; fingerprint: tells indexes apart; record: what build_index recorded,
        None for a foreign index; on_gpu: whether the GPU is used; share.

    Raises:
        InputError: not an index, damaged, or not that of the datastore.
    """

    def __init__(
        self,
        index_path: str | Path,
        *,
        probe: int,
        gpu: bool = False,
        refine_factor: int = 0,
        datastore: Any = None,
        share: tuple[int, int] | None = None,
    ) -> None:
        if probe < 1:
            raise InputError(f"--probe {probe}: expected 1 or more")
        if refine_factor < 0 or (refine_factor and datastore is None):
            raise InputError(f"--refine_factor {refine_factor}: expected 0 or more, and the indexed datastore's keys")
        self.path = Path(index_path)
        files = find_index(self.path)
        self.record, self.fingerprint = files.record, files.fingerprint
        # A single file cannot be shared out; every process maps it.
        self.share = share if share and share[1] > 1 and len(files.shards) > 1 else None
        self._refine_factor, self._datastore = refine_factor, datastore
        gpus = gpu_count() if gpu else 0
        self.on_gpu = gpus > 0
        if gpu and not gpus:
            from utils.loading import say

            say("--knn_gpu: FAISS sees no GPU here, the search runs on the CPU")
        mine = files.shards
        if self.share is not None:
            # Neighbouring shards, so that processes in their order are rows in their order.
            process, processes = self.share
            mine = mine[len(mine) * process // processes : len(mine) * (process + 1) // processes]
        self._shards = [IndexShard(shard, shard.first_row, probe, gpus) for shard in mine]
        if self.record is None:
            self.rows, self.dim = self._shards[0].rows, self._shards[0].dim
        else:
            self.rows, self.dim = self.record["rows"], self.record["dim"]
        for shard in self._shards:
            if shard.dim != self.dim:
                raise InputError(
                    f"{shard.path}: takes keys of width {shard.dim}, its record says {self.dim}; build the index again"
                )
        if not self.rows:
            raise InputError(f"{self.path}: the index holds no rows; build it with python -m knn_utils.build_index")
        if datastore is not None:
            self._check_datastore(datastore)

    def _check_datastore(self, datastore: Any) -> None:
        if datastore.dim != self.dim:
            raise InputError(
                f"{datastore.path}: keys are {datastore.dim} wide, but the index {self.path} takes {self.dim}; "
                "name the index of this datastore"
            )
        if datastore.rows != self.rows:
            grown = datastore.rows > self.rows
            hint = "add its new rows with build_index --extend" if grown else "name the one it indexes (--val_path)"
            raise InputError(
                f"{self.path}: indexes {self.rows} rows, but the datastore {datastore.path} holds {datastore.rows}; "
                f"{hint}"
            )

    def check_k(self, k: int) -> None:
        """Raise InputError unless k hits can be asked of this index."""
        if k < 1:
            raise InputError(f"--k {k}: expected 1 or more")
        if k > self.rows:
            raise InputError(f"--k {k}: the index {self.path} holds only {self.rows} rows; give a smaller --k")
        if self.on_gpu and self.width(k) > GPU_MAX_K:
            raise InputError(
                f"--k {k}: a GPU returns at most {GPU_MAX_K} hits (k times --refine_factor), "
                "give a smaller --k or leave --knn_gpu out"
            )

    def width(self, k: int) -> int:
        """Candidates that the index is asked for where k hits are wanted."""
        return min(k * max(self._refine_factor, 1), self.rows)

    def search(
        self, queries: np.ndarray, k: int, *, first_row: int = 0, source: str | Path = "queries"
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest rows of each query.

        Args:
            queries: (n, dim) float16 or float32.
            k: hits per query, at most `rows`.
            first_row, source: number and origin of the first query, for messages.

        Returns:
            distances (n, k) float32, squared L2, rising; infinity where there is no hit.
            ids (n, k) int64, row numbers, rising among equal distances; -1 where the probed lists held fewer than k.

        Raises:
            InputError: k or the width does not fit the index, or a query holds NaN or infinity.
        """
        self.check_k(k)
        block_rows = max(len(queries), 1) if self.on_gpu else 4 * BLOCK_ROWS
        blocks = []
        for start in range(0, len(queries), block_rows):
            block = self.checked(queries[start : start + block_rows], first_row + start, source)
            blocks.append(self.hits(block, [self.candidates(block, k)], k))
        if len(blocks) == 1:
            return blocks[0]
        if not blocks:
            return np.empty((0, k), np.float32), np.empty((0, k), np.int64)
        return np.concatenate([block[0] for block in blocks]), np.concatenate([block[1] for block in blocks])

    def checked(self, queries: np.ndarray, first_row: int, source: str | Path) -> np.ndarray:
        """`queries` (n, dim) as float32. Raises InputError for another width and for NaN or infinity."""
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise InputError(
                f"{source}: keys are {queries.shape[-1]} wide, but the index {self.path} takes {self.dim}; "
                "name the index of the same model and layer"
            )
        block = float32_from_float16(queries)
        check_finite(block, first_row, source)
        return block

    def candidates(self, queries: np.ndarray, k: int) -> Hits:
        """What this process's shards hold among the `width(k)` nearest: distances and ids, (n, width(k)) each."""
        width = self.width(k)
        found = [shard.nearest(queries, width) for shard in self._shards]
        if found:
            return merge(found, width)
        return np.full((len(queries), width), np.inf, np.float32), np.full((len(queries), width), -1, np.int64)

    def hits(self, queries: np.ndarray, candidates: list[Hits], k: int) -> Hits:
        """The k nearest among the candidates of all processes, re-ranked by exact distance if that was asked for."""
        distances, ids = merge(candidates, self.width(k))
        if self._refine_factor:
            return rank_exactly(queries, ids, self._datastore.gather_keys, k, self.rows)
        return distances, ids


def gpu_count() -> int:
    """GPUs that the installed FAISS can use."""
    import faiss

    return faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0


def set_probe(index: Any, probe: int) -> None:
    """Set how many inverted lists a query visits, wherever in the index they are; nothing to set without lists."""
    import faiss

    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        ivf.nprobe = min(probe, ivf.nlist)


def check_finite(queries: np.ndarray, first_row: int, source: object) -> None:
    """Raise InputError naming the first row of `queries` (n, dim) float32 that holds NaN or infinity."""
    # One sum finds them all; a sum of finite numbers that overflows is cleared by the closer look.
    with np.errstate(invalid="ignore", over="ignore"):
        suspects = np.flatnonzero(~np.isfinite(queries.sum(axis=1)))
    for row in suspects:
        if not np.isfinite(queries[row]).all():
            raise InputError(
                f"{source}: row {first_row + row} holds NaN or infinity in its hidden state; "
                "check the model, or write the datastore again in float32"
            )


def order_ties(distances: np.ndarray, ids: np.ndarray, rows: int) -> None:
    """Put hits of equal distance in the order of their row numbers, in place; distances (n, k) already rise."""
    same = distances[:, 1:] == distances[:, :-1]
    tied = np.flatnonzero(same.any(axis=1))
    if not len(tied):
        return
    bits = max(int(rows).bit_length(), 1)
    place = np.zeros((len(tied), distances.shape[1]), dtype=np.int64)
    np.cumsum(~same[tied], axis=1, out=place[:, 1:])
    place <<= bits
    missing = (1 << bits) - 1
    picked = ids[tied]
    place |= np.where(picked < 0, missing, picked)
    place.sort(axis=1)
    place &= missing
    place[place == missing] = -1
    ids[tied] = place


def merge(found: list[Hits], k: int) -> Hits:
    """The k nearest of several shards' hits, by distance, then row number: lists of (n, any) → (n, k).

    The shards stand in the order of their row numbers, and hits within each in the order of `IndexShard.nearest`.
    """
    if len(found) == 1:
        return found[0]
    distances = np.concatenate([part[0] for part in found], axis=1)
    ids = np.concatenate([part[1] for part in found], axis=1)
    distances += np.float32(0)  # -0 becomes 0
    bits = distances.view(np.int32)
    # Bits that order as the numbers do, negative ones too (product quantisation may round below 0), above the place.
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64) << 32
    order |= np.arange(distances.shape[1])
    order.sort(axis=1)
    place = order[:, :k] & 0xFFFFFFFF
    return np.take_along_axis(distances, place, axis=1), np.take_along_axis(ids, place, axis=1)


def rank_exactly(
    queries: np.ndarray, candidates: np.ndarray, gather_keys: Callable[[np.ndarray], np.ndarray], k: int, rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k candidates nearest by exact squared L2 distance, ties by row number.

    Args:
        queries: (n, dim) float32.
        candidates: (n, c) int64 row numbers, -1 for none; sorted in place.
        gather_keys: row numbers (m,) → keys (m, dim) float16.
        rows: of the datastore; where all of them fit, many queries share the keys they have in common.

    Returns:
        distances (n, k) float32 and ids (n, k) int64, as `KNNSearcher.search`.
    """
    import faiss

    count, dim = queries.shape
    width = candidates.shape[1]
    candidates.sort(axis=1)
    keep = min(k, width)
    distances = np.full((count, k), np.inf, dtype=np.float32)
    ids = np.full((count, k), -1, dtype=np.int64)
    fits = rows * dim * 4 <= REFINE_BYTES
    at_once = count if fits else max(REFINE_BYTES // (width * dim * 4), 1)
    for start in range(0, count, max(at_once, 1)):
        asked = candidates[start : start + at_once]  # (b, c)
        unique, inverse = np.unique(np.maximum(asked, 0), return_inverse=True)
        keys = float32_from_float16(gather_keys(unique))  # (unique, dim)
        local = np.ascontiguousarray(inverse.reshape(asked.shape), dtype=np.int64)
        exact = np.empty(asked.shape, dtype=np.float32)
        block = np.ascontiguousarray(queries[start : start + len(asked)])
        faiss.fvec_L2sqr_by_idx(
            faiss.swig_ptr(exact),
            faiss.swig_ptr(block),
            faiss.swig_ptr(keys),
            faiss.swig_ptr(local),
            dim,
            len(asked),
            width,
        )
        exact[asked < 0] = np.inf
        # Candidates rise within a row, so (bits of the distance, position) orders as (distance, row number).
        order = (exact.view(np.int32).astype(np.int64) << 32) | np.arange(width)
        order.sort(axis=1)
        position = order[:, :keep] & 0xFFFFFFFF
        distances[start : start + len(asked), :keep] = np.take_along_axis(exact, position, axis=1)
        ids[start : start + len(asked), :keep] = np.take_along_axis(asked, position, axis=1)
    return distances, ids
