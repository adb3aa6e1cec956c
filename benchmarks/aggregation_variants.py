"""Hits of a search to sparse distributions, several ways in one run, each on one thread: rows a second.

    python -m benchmarks.aggregation_variants

A search runs one such thread on each core, so what counts is the work of one. All ways end in the same entries, by
falling probability; what differs is how the weights of equal tokens are added. Distances and tokens are random, tokens
by Zipf's law; `numba` is measured where it is installed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.cli import flag, parse
from utils.errors import InputError, check_positive, command

# A way adds the weights (n, k) of equal tokens (n, k): entries' row numbers (m,), tokens (m,), sums (m,).
Way = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]
OURS = "one sort of packed keys (knn_utils.distribution)"
KNN_TEMP, THRESHOLD = 16.0, 1e-8


@dataclass
class AggregationArguments:
    rows: int = flag(2048, "rows of hits")
    k: int = flag(1024, "hits of a row")
    vocab: int = flag(49152, "size of the vocabulary")
    zipf: float = flag(1.3, "exponent of the tokens' frequencies: a larger one gives fewer different tokens")
    block_rows: int = flag(256, "rows at once, as the search hands them over")
    repeats: int = flag(5, "timed rounds after one of warm-up")

    def check(self) -> None:
        """Raises InputError."""
        for name in ("rows", "k", "vocab", "block_rows", "repeats"):
            check_positive(f"--{name}", getattr(self, name))
        if not self.zipf > 1:
            raise InputError(f"--zipf {self.zipf:g}: expected a number above 1")


def unique_by_row(weights: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A loop over rows: unique tokens, then a count with weights."""
    found = []
    for number, (weight, token) in enumerate(zip(weights, tokens, strict=True)):
        unique, inverse = np.unique(token, return_inverse=True)
        found.append((np.full(len(unique), number), unique, np.bincount(inverse, weight).astype(np.float32)))
    row, token, total = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return row, token, total


def stable_sort(weights: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sort tokens of all rows with their order, gather the weights, reduce between changes."""
    n, k = tokens.shape
    order = np.argsort(tokens, axis=1, kind="stable")
    token = np.take_along_axis(tokens, order, axis=1)
    weight = np.take_along_axis(weights, order, axis=1)
    begins = np.ones((n, k), dtype=bool)
    begins[:, 1:] = token[:, 1:] != token[:, :-1]
    starts = np.flatnonzero(begins)
    return starts // k, token.ravel()[starts], np.add.reduceat(weight.ravel(), starts)


def torch_sort(weights: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same with torch: sort, unique_consecutive, index_add."""
    import torch

    n = len(tokens)
    token, order = torch.sort(torch.from_numpy(tokens), dim=1)
    weight = torch.gather(torch.from_numpy(weights), 1, order)
    keys = token.long() + (torch.arange(n)[:, None] << 32)
    unique, inverse = torch.unique_consecutive(keys, return_inverse=True)
    total = torch.zeros(len(unique)).index_add_(0, inverse.ravel(), weight.ravel())
    found = unique.numpy()
    return found >> 32, (found & 0xFFFFFFFF).astype(np.int32), total.numpy()


def torch_dense(weights: np.ndarray, tokens: np.ndarray, vocabulary: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Add into a dense array (rows, vocabulary), few rows at a time, and read what is not zero."""
    import torch

    rows, found = 16, []
    for start in range(0, len(tokens), rows):
        some = torch.from_numpy(tokens[start : start + rows]).long()
        dense = torch.zeros(len(some), vocabulary)
        dense.scatter_add_(1, some, torch.from_numpy(weights[start : start + rows]))
        row, token = dense.nonzero(as_tuple=True)
        found.append(((row + start).numpy(), token.int().numpy(), dense[row, token].numpy()))
    row, token, total = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return row, token, total


def arrow_groups(weights: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A hash table of Arrow: group by (row, token), sum."""
    import pyarrow as pa

    n, k = tokens.shape
    key = tokens.ravel().astype(np.int64) | (np.repeat(np.arange(n), k) << 32)
    table = pa.table({"key": key, "weight": weights.ravel()})
    grouped = table.group_by("key", use_threads=False).aggregate([("weight", "sum")])
    found = grouped["key"].to_numpy()
    return found >> 32, (found & 0xFFFFFFFF).astype(np.int32), grouped["weight_sum"].to_numpy().astype(np.float32)


def compiled_hash(vocabulary: int) -> tuple[Way, float] | None:
    """A table of the vocabulary's size, compiled by numba, and the seconds of its import and compilation; None without."""
    start = time.perf_counter()
    try:
        from numba import njit
    except ImportError:
        return None

    @njit(nogil=True)
    def add(weights, tokens, totals, row, token, total):  # pragma: no cover (compiled)
        entries = 0
        for i in range(tokens.shape[0]):
            first = entries
            for j in range(tokens.shape[1]):
                t = tokens[i, j]
                if totals[t] == 0.0:
                    row[entries], token[entries] = i, t
                    entries += 1
                totals[t] += weights[i, j]
            for e in range(first, entries):
                total[e] = totals[token[e]]
                totals[token[e]] = 0.0
        return entries

    totals = np.zeros(vocabulary, dtype=np.float32)

    def way(weights: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        row, token = np.empty(tokens.size, np.int64), np.empty(tokens.size, np.int32)
        total = np.empty(tokens.size, np.float32)
        count = add(weights, tokens, totals, row, token, total)
        return row[:count], token[:count], total[:count]

    way(np.ones((1, 1), np.float32), np.zeros((1, 1), np.int32))
    return way, time.perf_counter() - start


def finished(way: Way, distances: np.ndarray, tokens: np.ndarray, token_bits: int) -> Any:
    """(id_cnt, token_id, prob) of a block, weights and order as `aggregate` makes them, sums as `way` does."""
    from knn_utils.distribution import by_falling_probability

    shifted = distances - distances.min(axis=1, keepdims=True)
    shifted *= np.float32(-1 / KNN_TEMP)
    weights = np.exp(shifted, out=shifted)
    row, token, total = way(weights, tokens)
    prob = total / weights.sum(axis=1)[row]
    kept = prob > THRESHOLD
    return by_falling_probability(row[kept], token[kept], prob[kept], len(tokens), token_bits)


def runs_of(arguments: AggregationArguments, distances: np.ndarray, tokens: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Each way over all blocks, by name; a run returns the last block's entries."""
    from knn_utils.distribution import aggregate

    bits = max(int(tokens.max()).bit_length(), 1)
    ways: dict[str, Way] = {
        "numpy: unique and bincount, row by row": unique_by_row,
        "numpy: argsort, take, reduceat": stable_sort,
        "torch: sort, unique_consecutive, index_add": torch_sort,
        "torch: dense rows, scatter_add, nonzero": lambda w, t: torch_dense(w, t, arguments.vocab),
        "pyarrow: group_by, sum": arrow_groups,
    }
    compiled = compiled_hash(arguments.vocab)
    if compiled is None:
        print("numba is not installed: its row is left out")
    else:
        ways[f"numba: table of the vocabulary (start {compiled[1]:.1f} s)"] = compiled[0]
    blocks = [slice(start, start + arguments.block_rows) for start in range(0, arguments.rows, arguments.block_rows)]

    def ours() -> Any:
        found = [aggregate(distances[b], tokens[b], knn_temp=KNN_TEMP, threshold=THRESHOLD) for b in blocks]
        return found[-1][:3]

    def all_blocks(way: Way) -> Any:
        return [finished(way, distances[b], tokens[b], bits) for b in blocks][-1]

    return {OURS: ours} | {name: (lambda way=way: all_blocks(way)) for name, way in ways.items()}


@command
def main() -> None:
    """Parse, measure, print."""
    (arguments,) = parse(AggregationArguments, description="Hits to sparse distributions, several ways.")
    arguments.check()
    import torch

    from benchmarks.measure import median, ratio, rounds

    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    shape = (arguments.rows, arguments.k)
    tokens = ((random.zipf(arguments.zipf, shape) - 1) % arguments.vocab).astype(np.int32)
    distances = np.sort(random.gamma(4.0, 8.0, shape).astype(np.float32), axis=1)
    runs = runs_of(arguments, distances, tokens)
    reference = runs[OURS]()
    print(
        f"{arguments.rows} rows of {arguments.k} hits, vocabulary {arguments.vocab}, one thread; the last block has "
        f"{reference[0].mean():.0f} different tokens a row\n\n{'way':52s} {'rows/s':>9s} {'seconds, of ours':>17s}"
    )
    for name, run in runs.items():
        found = run()
        same = np.array_equal(found[0], reference[0]) and np.allclose(found[2], reference[2], rtol=2e-3, atol=1e-6)
        if not same:
            raise InputError(f"{name}: gives other distributions")
    seconds = rounds(runs, arguments.repeats, warm_up=False)
    for name in runs:
        print(f"{name:52s} {arguments.rows / median(seconds[name]):9,.0f} {ratio(seconds, name, OURS):17.2f}")


if __name__ == "__main__":
    main()
