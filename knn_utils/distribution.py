"""From neighbours to probabilities: turns the hits of a search into kNN distributions.

`log_weights` is the kernel. The other functions sum its weights: by token into sparse targets (`aggregate`), for one
label at several temperatures (`label_probability`), over the whole vocabulary (`dense_probability`). Only the last
allocates an array that grows with the vocabulary.

Of n queries with k hits each: `distances` (n, k) float32, squared L2; `ids` (n, k) int64, row numbers in the index, and
`tokens` (n, k) int32, the values of those rows, both -1 where there is no hit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

BLOCK_HITS = 1 << 18  # hits that are processed at once, so that their arrays fit the cache
LARGEST_INT32, LARGEST_INT64 = np.iinfo(np.int32).max, np.iinfo(np.int64).max


def log_weights(above: np.ndarray, nearest: np.ndarray, knn_temp: float) -> np.ndarray:
    """The kernel: the logarithm of each hit's weight, p ∝ exp(-distance / knn_temp) (Khandelwal et al. 2020, eq. 2).

    Subtracting a constant from a row's log-weights does not change its distribution, so the distance of the nearest hit
    is left out: nothing underflows. To change the kernel, or to let the temperature depend on the distance, change
    this function only.

    Args:
        above: (n, k) float32, squared L2 distance of each hit minus that of the row's nearest hit; infinity where there
            is no hit, whose weight must be 0.
        nearest: (n, 1) float32, squared distance of the row's nearest hit, 0 for a row without hits.
        knn_temp: temperature, above 0.

    Returns:
        (n, k) float32.
    """
    return above * np.float32(-1 / knn_temp)


class Distributions(NamedTuple):
    """Sparse distributions of n rows, concatenated: `id_cnt` (n,) int32 entries of each row; `token_id` int32 and `prob`
    float16, each row's tokens by falling probability (ties: by token); `distance` (n,) float32, squared, of the nearest
    hit, infinity for a row without hits."""

    id_cnt: np.ndarray
    token_id: np.ndarray
    prob: np.ndarray
    distance: np.ndarray


def float32_from_float16(values: np.ndarray) -> np.ndarray:
    """`values` as float32; read-only input is fine. (NumPy's own conversion takes 60 times as long.)"""
    import torch

    if values.dtype != np.float16:
        return np.ascontiguousarray(values, np.float32)
    return torch.from_numpy(np.array(values)).float().numpy()  # a copy, since torch wants writable memory


def drop_own_row(ids: np.ndarray, own_rows: np.ndarray) -> None:
    """Discard each query itself from its hits, in place: for datastore rows that search their own datastore.

    Ties and quantised distances move the own row, `own_rows` (n,) int64, from the first place. Where it is not among the k
    hits, the farthest is dropped, so that k-1 remain. Dropped hits become -1.
    """
    own = ids == own_rows[:, None]
    own[~own.any(axis=1), -1] = True
    ids[own] = -1


def hit_tokens(ids: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The tokens of the hits, from the indexed rows' `values` (rows,) int32."""
    tokens = np.take(values, ids)
    tokens[ids < 0] = -1
    return tokens


def aggregate(distances: np.ndarray, tokens: np.ndarray, *, knn_temp: float, threshold: float) -> Distributions:
    """The kNN distribution of each row, which the memory learns (paper, section 3): p(token) is the sum of the weights
    of the hits with that token, divided by the sum of all.

    Probabilities up to `threshold`, compared in float32, are dropped; the rest is not normalised again.
    """
    n, k = tokens.shape
    rows = max(BLOCK_HITS // k, 1)
    blocks = [
        _aggregate_block(distances[start : start + rows], tokens[start : start + rows], knn_temp, threshold)
        for start in range(0, max(n, 1), rows)
    ]
    return Distributions(*(np.concatenate(columns) for columns in zip(*blocks, strict=True)))


def _aggregate_block(distances: np.ndarray, tokens: np.ndarray, knn_temp: float, threshold: float) -> Distributions:
    import torch

    n, k = tokens.shape
    above, nearest = _above_nearest(distances, tokens)
    weights = np.exp(log_weights(above, nearest, knn_temp))  # (n, k)
    totals = weights.sum(axis=1)
    nearest = np.where(totals > 0, nearest[:, 0], np.float32(np.inf))
    totals[totals == 0] = 1

    # Sum by token: sort keys `token << 32 | bits of the weight`, which is several times as fast as np.argsort. A weight is
    # not negative, so its bits order like an integer, and it is read back from the sorted keys.
    keys = np.empty((n, k), dtype="<i8")
    halves = keys.view("<i4").reshape(n, k, 2)
    halves[..., 0] = weights.view(np.int32)
    halves[..., 1] = tokens
    keys.sort(axis=1)
    begins = np.ones((n, k), dtype=bool)
    np.not_equal(halves[:, 1:, 1], halves[:, :-1, 1], out=begins[:, 1:])
    starts = np.flatnonzero(begins)  # (entries,) flat position of each token's first hit
    np.copyto(weights.view(np.int32), halves[..., 0])
    sums = np.add.reduceat(weights.ravel(), starts) if len(starts) else np.empty(0, np.float32)
    prob = sums / totals[starts // k]
    token = halves[..., 1].reshape(-1)[starts]
    kept = (prob > threshold) & (token >= 0)
    starts, prob, token = starts[kept], prob[kept], token[kept]

    # Order by falling probability, then token: the keys of the entries that are left, sorted in the same way.
    keys.fill(LARGEST_INT64)
    keys.reshape(-1)[starts] = (LARGEST_INT32 - prob.view(np.int32)).astype(np.int64) << 32 | token
    keys.sort(axis=1)
    ordered = keys[keys < LARGEST_INT64]
    prob = (LARGEST_INT32 - (ordered >> 32)).astype(np.int32).view(np.float32)
    id_cnt = np.bincount(starts // k, minlength=n).astype(np.int32)
    return Distributions(id_cnt, ordered.astype(np.int32), torch.from_numpy(prob).half().numpy(), nearest)


def _above_nearest(distances: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Arguments of `log_weights`: (n, k) distances above the nearest hit's, and (n, 1) that of the nearest hit."""
    if tokens.size and tokens.min() < 0:
        distances = np.where(tokens < 0, np.float32(np.inf), distances)
    nearest = distances.min(axis=1, initial=np.float32(np.inf), keepdims=True)
    nearest[np.isinf(nearest)] = 0
    return distances - nearest, nearest


def label_probability(
    distances: np.ndarray, ids: np.ndarray, values: np.ndarray, labels: np.ndarray, temperatures: Sequence[float]
) -> np.ndarray:
    """kNN probability of each row's label, `labels` (n,) int32, at several temperatures, from one search: (n,
    temperatures) float64; 0 for a label that no hit has and for rows without hits. `values`: those of the indexed rows.
    """
    n, k = ids.shape
    result = np.zeros((n, len(temperatures)), dtype=np.float64)
    rows = max(BLOCK_HITS // k, 1)
    for start in range(0, n, rows):
        block = slice(start, start + rows)
        tokens = hit_tokens(ids[block], values)  # (rows, k)
        above, nearest = _above_nearest(distances[block], tokens)
        match = (tokens == np.asarray(labels)[block, None]).astype(np.float32)
        for column, temperature in enumerate(temperatures):
            weights = np.exp(log_weights(above, nearest, temperature))
            total = weights.sum(axis=1, dtype=np.float64)
            hit = (weights * match).sum(axis=1, dtype=np.float64)
            np.divide(hit, total, out=result[block, column], where=total > 0)
    return result


def dense_probability(distances: np.ndarray, tokens: np.ndarray, vocabulary: int, knn_temp: float) -> np.ndarray:
    """The kNN distribution over the whole vocabulary, for mixing into logits: (n, vocabulary) float64, all 0 in a row
    without hits."""
    n = len(tokens)
    weights = np.exp(log_weights(*_above_nearest(distances, tokens), knn_temp)).astype(np.float64)  # (n, k)
    weights /= np.maximum(weights.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    place = np.arange(n)[:, None] * vocabulary + np.maximum(tokens, 0)  # (n, k) in the flattened result
    return np.bincount(place.ravel(), weights.ravel(), minlength=n * vocabulary).reshape(n, vocabulary)
