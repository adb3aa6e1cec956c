"""From neighbours to probabilities: the one place where the hits of a search become a kNN distribution.

`log_weights` is the kernel. Everything else here adds its weights up: by token into sparse targets (`aggregate`), for
one label at several temperatures (`label_probability`), over the whole vocabulary (`dense_probability`). Only the last
makes an array that grows with the vocabulary, and rows are worked on in blocks that fit the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

BLOCK_HITS = 1 << 18
PROBABILITY_BITS = 30
ONE_BELOW_TWO = (1 << PROBABILITY_BITS) - 1


def log_weights(above: np.ndarray, nearest: np.ndarray, knn_temp: float) -> np.ndarray:
    """The kernel: the logarithm of each hit's weight, p ∝ exp(-distance / knn_temp) (Khandelwal et al. 2020, eq. 2).

    A constant of a row does not change its distribution, so this one leaves out the nearest hit's distance: nothing
    underflows. Another kernel, or a temperature that follows the distance, is a change of this function alone.

    Args:
        above: (n, k) float32, squared L2 distance of each hit less that of the row's nearest; infinity where there is
            no hit, which must get a weight of 0.
        nearest: (n, 1) float32, squared distance of the row's nearest hit, 0 for a row without hits.
        knn_temp: temperature, above 0.

    Returns:
        (n, k) float32.
    """
    return above * np.float32(-1 / knn_temp)


class Distributions(NamedTuple):
    """Sparse distributions of n rows, laid end to end.

    Attributes:
        id_cnt: (n,) int32, entries of each row.
        token_id: (sum of id_cnt,) int32, each row's tokens by falling probability (ties: by token).
        prob: (sum of id_cnt,) float16, their probabilities.
        distance: (n,) float32, squared distance of the nearest hit; infinity for a row without hits.
    """

    id_cnt: np.ndarray
    token_id: np.ndarray
    prob: np.ndarray
    distance: np.ndarray


def float32_from_float16(values: np.ndarray) -> np.ndarray:
    """`values` as float32, exactly; read-only input is fine. (NumPy's own conversion takes 60 times as long.)"""
    if values.dtype != np.float16:
        return np.ascontiguousarray(values, np.float32)
    return torch.from_numpy(np.array(values)).float().numpy()  # a copy, since torch wants memory that it may write


def drop_own_row(ids: np.ndarray, own_rows: np.ndarray) -> None:
    """Discard each query itself among its hits, in place: datastore rows that search their own datastore.

    The own row number is dropped wherever it stands (ties and quantised distances move it from the first
    place). Where it is not among k hits the farthest is dropped instead, so that k-1 remain in each row.

    Args:
        ids: (n, k) int64 row numbers by rising distance, -1 for none; dropped hits become -1.
        own_rows: (n,) int64 row number of each query.
    """
    first = ids[:, 0] == own_rows
    ids[first, 0] = -1
    elsewhere = np.flatnonzero(~first)
    rest = ids[elsewhere]  # (m, k)
    own = rest == own_rows[elsewhere, None]
    own[~own.any(axis=1), -1] = True
    rest[own] = -1
    ids[elsewhere] = rest


def hit_tokens(ids: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Tokens of the hits: (n, k) int32 from row numbers `ids` and the indexed rows' `values`; -1 stays -1."""
    if not ids.size or ids.min() >= 0:
        return np.take(values, ids)
    tokens = np.take(values, np.maximum(ids, 0))
    tokens[ids < 0] = -1
    return tokens


def aggregate(distances: np.ndarray, tokens: np.ndarray, *, knn_temp: float, threshold: float) -> Distributions:
    """kNN distribution of each row: p(token) ∝ sum of the kernel's weights over the hits that carry the token.

    This is the retriever's distribution that the memory learns (paper, section 3). Entries of `threshold` or less are
    dropped, and the rest is not normalised again.

    Args:
        distances: (n, k) float32 squared L2 distances.
        tokens: (n, k) int32 value of each hit; -1 where there is no hit.
        knn_temp: temperature, above 0.
        threshold: entries with a probability up to this are left out (0 or more), judged in float32.
    """
    n, k = tokens.shape
    token_bits = max(int(tokens.max(initial=0)).bit_length(), 1)
    rows = max(min(BLOCK_HITS // max(k, 1), 1 << (63 - PROBABILITY_BITS - token_bits)), 1)
    blocks = [
        _aggregate_block(distances[start : start + rows], tokens[start : start + rows], knn_temp, threshold, token_bits)
        for start in range(0, max(n, 1), rows)
    ]
    return Distributions(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))


def _aggregate_block(
    distances: np.ndarray, tokens: np.ndarray, knn_temp: float, threshold: float, token_bits: int
) -> Distributions:
    n, k = tokens.shape
    above, nearest = _above_nearest(distances, tokens)
    weights = np.exp(log_weights(above, _finite(nearest), knn_temp))  # (n, k)
    totals = weights.sum(axis=1)
    totals[totals == 0] = 1

    # The sum by token is one sort of `token << 32 | bits of the weight`, several times as fast as np.argsort: a weight
    # is not negative, so its bits order as an integer does, and it is read back from the sorted keys.
    keys = np.empty((n, k), dtype="<i8")
    halves = keys.view("<i4").reshape(n, k, 2)
    halves[..., 0] = weights.view(np.int32)
    halves[..., 1] = tokens
    keys.sort(axis=1)
    sorted_tokens = halves[..., 1]
    begins = np.empty((n, k), dtype=bool)
    begins[:, :1] = True
    np.not_equal(sorted_tokens[:, 1:], sorted_tokens[:, :-1], out=begins[:, 1:])
    starts = np.flatnonzero(begins)  # (entries,) flat position of each token's first hit

    np.copyto(weights.view(np.int32), halves[..., 0])
    row = starts // max(k, 1)
    prob = np.add.reduceat(weights.ravel(), starts) / totals[row] if len(starts) else np.empty(0, np.float32)
    token = halves.reshape(-1)[2 * starts + 1]

    kept = prob > threshold
    kept &= token >= 0
    return Distributions(*by_falling_probability(row[kept], token[kept], prob[kept], n, token_bits), nearest[:, 0])


def by_falling_probability(
    row: np.ndarray, token: np.ndarray, prob: np.ndarray, rows: int, token_bits: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Entries (m,) of `rows` distributions, in any order, as `id_cnt`, `token_id` and `prob` of `Distributions`.

    `row` int64, `token` int32 below 2 ** token_bits, `prob` float32 from 0 to below 2.
    """
    id_cnt = np.bincount(row, minlength=rows).astype(np.int32)
    # One sort by (row, falling probability, token): all three fit in 63 bits, and are read back from the key.
    order = (row << PROBABILITY_BITS) | (ONE_BELOW_TWO - prob.view(np.int32))
    order <<= token_bits
    order |= token
    order.sort()
    token = (order & ((1 << token_bits) - 1)).astype(np.int32)
    order >>= token_bits
    prob = (ONE_BELOW_TWO - (order & ONE_BELOW_TWO)).astype(np.int32).view(np.float32)
    return id_cnt, token, torch.from_numpy(prob).half().numpy()


def _above_nearest(distances: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances above each row's nearest hit (n, k), infinity for missing hits; and the nearest's (n, 1)."""
    if tokens.size and tokens.min() < 0:
        distances = np.where(tokens < 0, np.float32(np.inf), distances)
    nearest = distances.min(axis=1, initial=np.float32(np.inf), keepdims=True)
    return distances - _finite(nearest), nearest


def _finite(nearest: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(nearest), nearest, np.float32(0))


def label_probability(
    distances: np.ndarray, ids: np.ndarray, values: np.ndarray, labels: np.ndarray, temperatures: Sequence[float]
) -> np.ndarray:
    """kNN probability of each row's label at several temperatures, from one search.

    Args:
        distances: (n, k) float32 squared L2 distances.
        ids: (n, k) int64 row numbers of the hits, -1 for none.
        values: value (next token) of each indexed row, int32.
        labels: (n,) int32 the token whose probability is asked.
        temperatures: kNN temperatures, above 0.

    Returns:
        (n, len(temperatures)) float64; 0 for a label that no hit carries and for rows without hits.
    """
    n, k = ids.shape
    result = np.zeros((n, len(temperatures)), dtype=np.float64)
    rows = max(BLOCK_HITS // max(k, 1), 1)
    for start in range(0, n, rows):
        block = slice(start, min(start + rows, n))
        tokens = hit_tokens(ids[block], values)  # (b, k)
        above, nearest = _above_nearest(distances[block], tokens)
        nearest = _finite(nearest)
        match = (tokens == np.asarray(labels)[block, None]).astype(np.float32)
        for column, temperature in enumerate(temperatures):
            weights = log_weights(above, nearest, temperature)
            np.exp(weights, out=weights)
            total = weights.sum(axis=1, dtype=np.float64)
            np.multiply(weights, match, out=weights)
            hit = weights.sum(axis=1, dtype=np.float64)
            np.divide(hit, total, out=result[block, column], where=total > 0)
    return result


def dense_probability(distances: np.ndarray, tokens: np.ndarray, vocabulary: int, knn_temp: float) -> np.ndarray:
    """The kNN distribution over the whole vocabulary, for mixing into logits: (n, vocabulary) float64.

    `distances` (n, k) float32, `tokens` (n, k) int32 with -1 where there is no hit. A row without hits is all 0.
    """
    n = len(tokens)
    above, nearest = _above_nearest(distances, tokens)
    weights = np.exp(log_weights(above, _finite(nearest), knn_temp)).astype(np.float64)  # (n, k)
    weights /= np.maximum(weights.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    place = np.arange(n)[:, None] * vocabulary + np.maximum(tokens, 0)  # (n, k) in the flattened result
    return np.bincount(place.ravel(), weights.ravel(), minlength=n * vocabulary).reshape(n, vocabulary)
