"""Processes that each hold some of an index: what reaches them, and how fast, when lists are exchanged whole or reduced.

    python -m torch.distributed.run --standalone --nproc_per_node 8 -m benchmarks.exchange

Each process has random lists of k hits for a block of every process; no search runs. "Whole": every list goes to the
block's process, which sorts them all. "Reduced": `knn_utils.block_search.exchange`. The hits are compared. The two take
turns; the ratio is the median over the turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch.distributed as distributed

from knn_utils import block_search
from knn_utils.search import Hits, merge_ragged, nearest_first

K, BLOCK_ROWS, TURNS = 1024, 256, 9


def main() -> None:
    distributed.init_process_group("gloo")
    process, processes = distributed.get_rank(), distributed.get_world_size()
    random, rows = np.random.default_rng(process), [BLOCK_ROWS] * processes
    shape = (BLOCK_ROWS * processes, K)
    found = (
        np.sort(random.random(shape, dtype=np.float32), axis=1),
        random.integers(0, 1 << 20, shape) + (process << 20),
    )
    received = 0
    send = block_search.send

    def counted(array: np.ndarray, leaving: list[int], coming: list[int]) -> np.ndarray:
        nonlocal received
        result = send(array, leaving, coming)
        received += result.nbytes - result[: coming[process]].nbytes
        return result

    def reduced() -> Hits:
        return merge_ragged(block_search.exchange(found, rows, process, K, 1 << 30), K)

    def whole() -> Hits:
        for owner in range(processes):
            part = tuple(array[owner * BLOCK_ROWS : (owner + 1) * BLOCK_ROWS] for array in found)
            everyones = [None] * processes if owner == process else None
            distributed.gather_object(part, everyones, dst=owner)
            if everyones:
                hits = nearest_first(*(np.concatenate(each, axis=1) for each in zip(*everyones, strict=True)), K)
        return hits

    def seconds(work: Callable[[], Hits]) -> float:
        distributed.barrier()
        begin = time.perf_counter()
        work()
        distributed.barrier()
        return time.perf_counter() - begin

    block_search.send = counted
    ours, theirs = reduced(), whole()
    assert all((a == b).all() for a, b in zip(ours, theirs, strict=True))
    block_search.send = send
    turns = [(seconds(whole), seconds(reduced)) for _ in range(TURNS)]
    if process == 0:
        print(f"{processes} processes, {K} hits of each for a row, {BLOCK_ROWS} rows of each at once")
        print(f"received for a row: whole {12 * K * (processes - 1)} bytes, reduced {received / BLOCK_ROWS:.0f} bytes")
        for name, times in zip(("whole", "reduced"), zip(*turns, strict=True), strict=True):
            print(f"{name}: {BLOCK_ROWS * processes / statistics.median(times):.0f} rows/s, all processes together")
        print(f"reduced, of whole: {statistics.median(a / b for a, b in turns):.2f} times the rows/s")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
