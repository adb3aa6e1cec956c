"""Searching many rows of a datastore: by threads, and by several processes that share an index.

Processes that each hold some of an index's shards work in rounds: every process searches one block of each process in its
shards, then they exchange, for each row, only the hits that can be among its k nearest.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice, zip_longest
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as distributed

from knn_utils.faiss_files import arrays_group
from knn_utils.search import Hits, KNNSearcher, Ragged, farthest, merge_ragged, sample, within

Block = tuple[int, int]
Item = TypeVar("Item")
Result = TypeVar("Result")


def search_blocks(
    searcher: KNNSearcher,
    datastore: Any,
    ranges: list[Block],
    block_rows: int,
    k: int,
    use: Callable[[Block, np.ndarray, np.ndarray], Result],
) -> Iterator[Result]:
    """Yield `use(block, distances, ids)` for each block [start, stop) of the datastore's row ranges, in order.

    Where the searcher holds a share of the index only, all processes must call this, each with ranges of its own (of
    any number), and read it to its end. The queries do not travel, all processes read the same datastore.

    Raises:
        InputError: as `KNNSearcher.search`.
    """
    import faiss

    searcher.check_k(k)
    # FAISS's own number of threads, which OMP_NUM_THREADS sets. With a GPU one thread searches, another aggregates.
    threads = max(faiss.omp_get_max_threads(), 2 if searcher.on_gpu else 1)

    def keys(block: Block) -> np.ndarray:
        return searcher.checked(datastore.keys(*block), block[0], datastore.path)

    with searching_threads(threads) as pool:
        if searcher.share is None:

            def whole(block: Block) -> Result:
                return use(block, *searcher.candidates(keys(block), k))

            yield from in_order(whole, blocks_of(ranges, block_rows), pool, threads + 2)
            return
        process, processes = searcher.share

        def own_part(blocks: tuple[Block | None, ...]) -> tuple[Block | None, list[int], Hits]:
            """Of a round's blocks, one of each process: (own block, rows of each block, hits of all)."""
            queries = [keys(block) if block else np.empty((0, searcher.dim), np.float32) for block in blocks]
            return blocks[process], list(map(len, queries)), searcher.candidates(np.concatenate(queries), k)

        def exchanged(part: tuple[Block | None, list[int], Hits]) -> tuple[Block | None, list[Ragged]]:
            block, rows, found = part
            return block, exchange(found, rows, process, k, searcher.rows)

        def finished(part: tuple[Block | None, list[Ragged]]) -> tuple[Result, ...]:
            block, lists = part
            return (use(block, *merge_ragged(lists, k)),) if block else ()

        rounds = zip_longest(*(blocks_of(theirs, block_rows) for theirs in everyones(ranges, process, processes)))
        # The exchange, in this thread and in the same order everywhere, goes on while threads search and merge.
        parts = map(exchanged, in_order(own_part, rounds, pool, threads + 2))
        for result in in_order(finished, parts, pool, threads + 2):
            yield from result


def everyones(ranges: list[Block], process: int, processes: int) -> list[list[Block]]:
    """The row ranges of every process."""
    counts = torch.zeros(processes, dtype=torch.int64)
    counts[process] = len(ranges)
    distributed.all_reduce(counts, group=arrays_group())
    table = torch.zeros((processes, int(counts.max()), 2), dtype=torch.int64)
    table[process, : len(ranges)] = torch.tensor(ranges, dtype=torch.int64).reshape(-1, 2)
    distributed.all_reduce(table, group=arrays_group())
    return [[tuple(block) for block in theirs[:count].tolist()] for theirs, count in zip(table, counts, strict=True)]


def exchange(found: Hits, rows: list[int], process: int, k: int, indexed: int) -> list[Ragged]:
    """What every process holds of the k nearest of this process's block: for each, its hits within reach.

    First a sample of the distances goes to the block's process, which says how far its k nearest can reach; then the
    hits no farther. Of P processes each receives a little more than k hits a row, where whole lists would be P times k.

    Args:
        found: this process's hits of all blocks of a round, distances and ids (sum of rows, k).
        rows: of each process's block, 0 for one that has none left.
        indexed: rows of the index, whose numbers travel as int32 where they fit.
    """
    distances, ids = found
    own, everyone = rows[process], len(rows)
    samples = send(sample(distances, k), rows, [own] * everyone)
    reach = farthest(np.split(samples, everyone), k) if own else np.empty(0, np.float32)
    counts, near, numbers = within(distances, ids, send(np.tile(reach, everyone), [own] * everyone, rows))
    theirs = np.split(send(counts, rows, [own] * everyone), everyone)
    leaving = [int(part.sum()) for part in np.split(counts, np.cumsum(rows)[:-1])]
    coming = [int(part.sum()) for part in theirs]
    numbers = numbers.astype(np.int32 if indexed < 1 << 31 else np.int64)
    lists = (np.split(send(each, leaving, coming), np.cumsum(coming)[:-1]) for each in (near, numbers))
    return list(zip(theirs, *lists, strict=True))


def send(rows: np.ndarray, leaving: list[int], coming: list[int]) -> np.ndarray:
    """Send each process its `leaving` rows of an array, which lie in the processes' order; returns the `coming` ones."""
    received = torch.empty((sum(coming), *rows.shape[1:]), dtype=torch.from_numpy(rows).dtype)
    distributed.all_to_all_single(received, torch.from_numpy(rows), coming, leaving, group=arrays_group())
    return received.numpy()


def blocks_of(ranges: Iterable[Block], block_rows: int) -> Iterator[Block]:
    """The blocks [start, stop) of row ranges, counted from the start of each range."""
    for first, last in ranges:
        for start in range(first, last, block_rows):
            yield start, min(start + block_rows, last)


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], pool: ThreadPoolExecutor, ahead: int
) -> Iterator[Result]:
    """Yield `work(item)` for each item in order, worked on by the pool's threads, `ahead` items ahead of the reader."""
    source = iter(items)
    waiting: deque[Future[Result]] = deque(pool.submit(work, item) for item in islice(source, ahead))
    while waiting:
        yield waiting.popleft().result()
        waiting.extend(pool.submit(work, item) for item in islice(source, 1))


@contextlib.contextmanager
def searching_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads; what waits is given up at the end.

    FAISS, NumPy and torch release the interpreter while they compute, so one thread searches while another
    aggregates and the caller writes; inside a thread each of them keeps to that thread.
    """
    import faiss

    def keep_to_this_thread() -> None:
        faiss.omp_set_num_threads(1)
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(count, thread_name_prefix="search", initializer=keep_to_this_thread)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
