"""Nearest-neighbour search: float16 queries in, squared distances and datastore row numbers out.

`KNNSearcher` opens one index file or a folder of shards, on CPU or GPU. Hits come in one order whatever the index is made
of: by distance, then by row number, also across the k-th place; so several shards, in one process or in many, give what
one whole index gives.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from pathlib import Path
from typing import Any

import numpy as np

from knn_utils.belonging import check_indexed
from knn_utils.distribution import float32_from_float16
from knn_utils.faiss_files import (
    Shard,
    check_faiss,
    everyone_has_room,
    faiss_reason,
    find_index,
    has_gpu,
    read_faiss,
    set_probe,
    to_gpu,
)
from utils.errors import InputError, one_line

# Queries that go through FAISS at once on a CPU: their hits stay in the cache until they are aggregated.
BLOCK_ROWS = 256
# Distances of each list that tell, before lists are merged, how far the k nearest of all of them can reach.
SAMPLES = 64
GPU_MAX_K = 2048
# Queries whose hits are kept, since their k-th place divides a tie.
TIES_KEPT = 256
# Row numbers stay below 2 ** 40; above them stands a hit's place among the distances of its row.
ROW_BITS = 40

Hits = tuple[np.ndarray, np.ndarray]
# Hits of n rows laid end to end: how many each row has (n,) int64, their distances and row numbers.
Ragged = tuple[np.ndarray, np.ndarray, np.ndarray]


class IndexShard:
    """One FAISS index, opened. Threads may search at the same time.

    Args:
        probe: inverted lists searched per query.
        gpu: a lock, where the index is to go to this process's GPU, which works on one batch at a time.

    Raises:
        InputError: not an index, or not the one that is recorded.
    """

    def __init__(self, shard: Shard, probe: int, gpu: threading.Lock | None) -> None:
        self.path, self.first_row = shard.path, shard.first_row
        index = read_faiss(shard.path, memory_map=gpu is None)
        self.rows, self.dim = index.ntotal, index.d
        if shard.rows not in (None, self.rows):
            raise InputError(
                f"{shard.path}: holds {self.rows} rows, its record says {shard.rows}; build the index again"
            )
        set_probe(index, probe)
        if gpu is not None:
            try:
                index = to_gpu(index, half_precision=True)
            except RuntimeError as error:
                reason = one_line(error, 200)
                raise InputError(
                    f"--knn_gpu: {self.path} cannot be searched on the GPU ({reason}); leave the flag out"
                ) from None
        self._index, self._turn = index, gpu
        # Equal keys in the datastore are equal queries, whose ties may hold many thousand rows: each is looked at once.
        self._of_tie = functools.lru_cache(TIES_KEPT)(self._nearest_of_tie)

    def nearest(self, queries: np.ndarray, k: int) -> Hits:
        """The k nearest rows, equal distances by row number, also where the k-th place divides them.

        `queries` (n, dim) float32; distances (n, k) float32 and row numbers (n, k) int64, infinity and -1 where
        there is no hit. On a GPU a tie at the k-th place may be divided otherwise.
        """
        within = min(k, self.rows)
        # One more than is asked for shows whether the last place divides a tie.
        wanted = within if self._turn else min(within + 1, self.rows)
        distances, ids = self._ask(queries, wanted)
        cut = np.flatnonzero(is_cut(distances, ids, within)) if within < wanted < self.rows else ()
        distances, ids = distances[:, :within], ids[:, :within]
        for row in cut:
            distances[row], ids[row] = self._of_tie(queries[row].tobytes(), within)
        missing = ((0, 0), (0, k - within))
        return np.pad(distances, missing, constant_values=np.inf), np.pad(ids, missing, constant_values=-1)

    def _nearest_of_tie(self, query: bytes, k: int) -> Hits:
        """The k nearest rows of one query, distances and row numbers (k,), where the k-th place divides a tie."""
        asked, still_cut = k + 1, True
        while still_cut:
            asked = min(2 * asked, self.rows)
            distances, ids = self._ask(np.frombuffer(query, np.float32)[None], asked)
            still_cut = asked < self.rows and is_cut(distances, ids, k)[0]
        return distances[0, :k].copy(), ids[0, :k].copy()

    def _ask(self, queries: np.ndarray, k: int) -> Hits:
        """FAISS's k nearest, by rising distance, ties by row number."""
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
        else:
            ids += self.first_row
        order_ties(distances, ids)
        return distances, ids


class KNNSearcher:
    """An index, opened for searching.

    Args:
        index_path: a FAISS file or an index folder of `build_index`.
        probe: inverted lists searched per query; without meaning for an index that has none.
        gpu: search on this process's GPU; without one, says so and searches on the CPU.
        datastore: the indexed `Datastore`, which is checked to be that; None where only its values are at hand.
        share: (process, processes) of a run whose processes all open the index: where it is in shards and not each
            of them has room for all, each opens some, and `candidates` of all together make the hits (`search_blocks`).

    Attributes:
        rows: indexed rows; dim: width of keys; fingerprint: tells indexes apart; record: what build_index recorded,
        None for a foreign index; made: what made the indexed rows; on_gpu: whether the GPU is used; share.

    Raises:
        InputError: not an index, damaged, or not that of the datastore.
    """

    def __init__(
        self,
        index_path: str | Path,
        *,
        probe: int,
        gpu: bool = False,
        datastore: Any = None,
        share: tuple[int, int] | None = None,
    ) -> None:
        check_faiss()
        if probe < 1:
            raise InputError(f"--probe {probe}: expected 1 or more")
        files = find_index(index_path)
        self.path, self.record, self.fingerprint = files.path, files.record, files.fingerprint
        self.on_gpu = gpu and has_gpu()
        # A single file cannot be shared out; every process maps it.
        divisible = share is not None and share[1] > 1 and len(files.shards) > 1
        self.share = share if divisible and not everyone_has_room(files, self.on_gpu) else None
        # Neighbouring shards, so that processes in their order are rows in their order.
        process, processes = self.share or (0, 1)
        count, lock = len(files.shards), threading.Lock() if self.on_gpu else None
        mine = files.shards[count * process // processes : count * (process + 1) // processes]
        self._shards = [IndexShard(shard, probe, lock) for shard in mine]
        self.made = (self.record or {}).get("datastore", {}).get("settings") or (datastore and datastore.settings) or {}
        described = self.record or {"rows": self._shards[0].rows, "dim": self._shards[0].dim}
        self.rows, self.dim = described["rows"], described["dim"]
        if not self.rows:
            raise InputError(f"{self.path}: the index holds no rows; build it with python -m knn_utils.build_index")
        if datastore is not None:
            self.check_width(datastore.path, datastore.dim)
            if datastore.rows != self.rows:
                grown = datastore.rows > self.rows
                hint = "add its new rows with build_index --extend" if grown else "name the one it indexes (--val_path)"
                raise InputError(
                    f"{self.path}: indexes {self.rows} rows, but the datastore {datastore.path} holds "
                    f"{datastore.rows}; {hint}"
                )
            check_indexed(self, datastore)

    def check_width(self, source: object, dim: int) -> None:
        """Raise InputError unless keys of width `dim` can be searched for."""
        if dim != self.dim:
            raise InputError(
                f"{source}: keys are {dim} wide, but the index {self.path} takes {self.dim}; "
                "name the index of the same model and layer"
            )

    def check_k(self, k: int) -> None:
        """Raise InputError unless k hits can be asked of this index."""
        if k < 1:
            raise InputError(f"--k {k}: expected 1 or more")
        if k > self.rows:
            raise InputError(f"--k {k}: the index {self.path} holds only {self.rows} rows; give a smaller --k")
        if self.on_gpu and k > GPU_MAX_K:
            raise InputError(
                f"--k {k}: a GPU returns at most {GPU_MAX_K} hits; give a smaller --k or leave --knn_gpu out"
            )

    def search(self, queries: np.ndarray, k: int, source: str | Path = "queries") -> Hits:
        """The k nearest rows of each query.

        Args:
            queries: (n, dim) float16 or float32, n above 0.
            k: hits per query, at most `rows`.
            source: where the queries come from, for messages.

        Returns:
            distances (n, k) float32, squared L2, rising; infinity where there is no hit.
            ids (n, k) int64, row numbers, rising among equal distances; -1 where the probed lists held fewer than k.

        Raises:
            InputError: k or the width does not fit the index, or a query holds NaN or infinity.
        """
        self.check_k(k)
        block_rows = len(queries) if self.on_gpu else 4 * BLOCK_ROWS
        blocks = []
        for start in range(0, len(queries), block_rows):
            block = self.checked(queries[start : start + block_rows], start, source)
            blocks.append(self.candidates(block, k))
        distances, ids = zip(*blocks, strict=True)
        return np.concatenate(distances), np.concatenate(ids)

    def checked(self, queries: np.ndarray, first_row: int, source: str | Path) -> np.ndarray:
        """`queries` (n, dim) as float32. Raises InputError for another width and for NaN or infinity."""
        self.check_width(source, queries.shape[-1])
        block = float32_from_float16(queries)
        check_finite(block, first_row, source)
        return block

    def candidates(self, queries: np.ndarray, k: int) -> Hits:
        """The k nearest that this process's shards hold: distances and ids, (n, k) each."""
        if not self._shards:
            return np.full((len(queries), k), np.inf, np.float32), np.full((len(queries), k), -1, np.int64)
        return merge([shard.nearest(queries, k) for shard in self._shards], k)


def check_finite(queries: np.ndarray, first_row: int, source: object) -> None:
    """Raise InputError naming the first row of `queries` (n, dim) that holds NaN or infinity."""
    bad = np.flatnonzero(~np.isfinite(queries).all(axis=1))
    if len(bad):
        raise InputError(
            f"{source}: row {first_row + bad[0]} holds NaN or infinity in its hidden state; "
            "check the model, or write the datastore again in float32"
        )


def is_cut(distances: np.ndarray, ids: np.ndarray, k: int) -> np.ndarray:
    """(n,) whether the hits (n, more than k) end within a tie that the k-th place divides."""
    return (distances[:, k - 1] == distances[:, -1]) & (ids[:, -1] >= 0)


def order_ties(distances: np.ndarray, ids: np.ndarray) -> None:
    """Put hits of equal distance in the order of their row numbers, in place; distances (n, k) already rise."""
    same = distances[:, 1:] == distances[:, :-1]
    tied = np.flatnonzero(same.any(axis=1))
    if not len(tied):
        return
    # One sort by (place among the row's distances, row number), several times as fast as sorting by two keys.
    keys = np.zeros((len(tied), distances.shape[1]), dtype=np.int64)
    np.cumsum(~same[tied], axis=1, out=keys[:, 1:])
    keys <<= ROW_BITS
    keys |= ids[tied] + 1  # -1, no hit, is 0
    keys.sort(axis=1)
    ids[tied] = (keys & ((1 << ROW_BITS) - 1)) - 1


def merge(found: list[Hits], k: int) -> Hits:
    """The k nearest of several shards' hits, by distance, then row number: lists of (n, k or more) → (n, k).

    The shards stand in the order of their row numbers, and hits within each in the order of `IndexShard.nearest`.
    """
    if len(found) == 1:
        return found[0]
    reach = farthest([sample(distances, k) for distances, _ in found], k)
    return merge_ragged([within(*hits, reach) for hits in found], k)


def sample(distances: np.ndarray, k: int) -> np.ndarray:
    """Of rising distances (n, k or more) each m-th, where m is k / SAMPLES: (n, SAMPLES or fewer) float32."""
    every = -(-k // SAMPLES)
    return np.ascontiguousarray(distances[:, every - 1 : k : every])


def farthest(samples: list[np.ndarray], k: int) -> np.ndarray:
    """A distance (n,) float32 that at least k hits of all lists do not exceed, by the `sample` of each: little above that
    of the k-th. Infinity where the lists may hold fewer."""
    every = -(-k // SAMPLES)
    # Each distance of a sample stands for so many hits that are no farther.
    enough = -(-k // every) - 1
    return np.partition(np.concatenate(samples, axis=1), enough, axis=1)[:, enough]


def within(distances: np.ndarray, ids: np.ndarray, reach: np.ndarray) -> Ragged:
    """The hits (n, any) no farther than `reach` (n,)."""
    kept = distances <= reach[:, None]
    return kept.sum(axis=1), distances[kept], ids[kept]


def merge_ragged(found: list[Ragged], k: int) -> Hits:
    """As `merge`, of the hits of each shard that are `within` reach of the k nearest."""
    counts = np.stack([count for count, _, _ in found])  # (shards, n)
    width = max(counts.sum(axis=0).max(), k)
    # Where each shard's hits of each row begin: row by row, and in a row shard by shard.
    starts = np.arange(counts.shape[1]) * width + np.cumsum(counts, axis=0) - counts
    distances = np.full(counts.shape[1] * width, np.inf, np.float32)
    ids = np.full(len(distances), -1, np.int64)
    for start, (count, far, rows) in zip(starts, found, strict=True):
        place = np.arange(len(far)) + np.repeat(start - (np.cumsum(count) - count), count)
        distances[place], ids[place] = far, rows
    distances, ids = distances.reshape(-1, width), ids.reshape(-1, width)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, axis=1), np.take_along_axis(ids, order, axis=1)
