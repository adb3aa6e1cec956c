"""Searching a datastore's rows block by block: by several threads, and by several processes that share an index.

Knows how the work is divided and how hits travel; how a block is searched is in search.py, and what becomes of its
hits is the caller's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from itertools import islice, zip_longest
from typing import Any, TypeVar

import numpy as np

from knn_utils.search import Hits, KNNSearcher

Item = TypeVar("Item")
Result = TypeVar("Result")
Block = tuple[int, int]


def blocks_of(ranges: Iterable[Block], block_rows: int) -> Iterator[Block]:
    """The blocks [start, stop) of row ranges, counted from the start of each range."""
    for first, last in ranges:
        for start in range(first, last, block_rows):
            yield start, min(start + block_rows, last)


def search_blocks(
    searcher: KNNSearcher,
    datastore: Any,
    ranges: list[Block],
    block_rows: int,
    k: int,
    use: Callable[[Block, np.ndarray, np.ndarray], Result],
) -> Iterator[Result]:
    """Yield `use(block, distances, ids)` for each block of the row ranges, in order.

    `use` runs in threads. Where the searcher holds a share of the index only, all processes must call this, each with
    ranges of its own (of any number), and read it to its end: every block is searched by all of them.

    Raises:
        InputError: as `KNNSearcher.search`.
    """
    searcher.check_k(k)
    # With a GPU one thread searches at a time, and another aggregates meanwhile.
    threads = max(search_threads(), 2 if searcher.on_gpu else 1)
    if searcher.share is not None:
        yield from _search_together(searcher, datastore, ranges, block_rows, k, use, threads)
        return

    def whole(block: Block) -> Result:
        start, stop = block
        keys = datastore.keys(start, stop)
        return use(block, *searcher.search(keys, k, first_row=start, source=datastore.path))

    yield from in_order(whole, blocks_of(ranges, block_rows), threads)


def _search_together(
    searcher: KNNSearcher,
    datastore: Any,
    ranges: list[Block],
    block_rows: int,
    k: int,
    use: Callable[[Block, np.ndarray, np.ndarray], Result],
    threads: int,
) -> Iterator[Result]:
    """Round by round, every process searches one block of each process in its own shards, and returns the hits.

    The queries do not travel, all processes read the same datastore; the hits go to the process whose block it is.
    """
    import torch.distributed as distributed

    process, processes = searcher.share
    # NumPy arrays travel by gloo whatever the GPUs talk by.
    group = None
    if distributed.get_backend() != "gloo":
        group = distributed.new_group(backend="gloo", timeout=timedelta(days=7))
    everyones_ranges: list[Any] = [None] * processes
    distributed.all_gather_object(everyones_ranges, ranges, group=group)
    rounds = zip_longest(*(blocks_of(theirs, block_rows) for theirs in everyones_ranges))
    turns = ((owner, block) for blocks in rounds for owner, block in enumerate(blocks) if block is not None)

    def own_part(turn: tuple[int, Block]) -> tuple[int, Block, np.ndarray, Hits]:
        owner, (start, stop) = turn
        queries = searcher.checked(datastore.keys(start, stop), start, datastore.path)
        return owner, (start, stop), queries, searcher.candidates(queries, k)

    for owner, block, queries, found in in_order(own_part, turns, threads):
        everyones = [_collect(part, owner, process, processes, group) for part in found]
        if owner == process:
            yield use(block, *searcher.hits(queries, list(zip(*everyones, strict=True)), k))


def _collect(part: np.ndarray, owner: int, process: int, processes: int, group: Any) -> list[np.ndarray]:
    """Every process's `part` (of one shape and dtype), at the owner; an empty list elsewhere."""
    import torch
    import torch.distributed as distributed

    tensor = torch.from_numpy(np.ascontiguousarray(part))
    parts = [torch.empty_like(tensor) for _ in range(processes)] if owner == process else None
    distributed.gather(tensor, parts, dst=owner, group=group)
    return [item.numpy() for item in parts] if parts else []


def search_threads() -> int:
    """Threads that a search may use here: FAISS's own number, which OMP_NUM_THREADS sets."""
    import faiss

    return max(faiss.omp_get_max_threads(), 1)


def in_order(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Yield `work(item)` for each item in order, worked on by `threads` threads, few items ahead of the reader.

    FAISS, NumPy and torch release the interpreter while they compute, so one thread searches while another
    aggregates and the caller writes; inside a thread each of them keeps to that thread.
    """
    import faiss
    import torch

    def keep_to_this_thread() -> None:
        faiss.omp_set_num_threads(1)
        torch.set_num_threads(1)

    source = iter(items)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="search", initializer=keep_to_this_thread)
    try:
        waiting: deque[Future[Result]] = deque(pool.submit(work, item) for item in islice(source, threads + 2))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(work, item) for item in islice(source, 1))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
