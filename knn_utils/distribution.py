"""From neighbours to distributions: hits of a search become kNN probabilities, row by row, without a loop over rows.

Knows nothing of files, FAISS or datastores: it is handed distances, row numbers and the values (next tokens)
of the indexed rows. No array here grows with the vocabulary, and rows are worked on in blocks that fit the
cache, so that memory does not grow with the number of rows either.

How the sum by token is made was chosen by measurement (8,192 rows of k = 1,024, one thread, seconds):
sorting `token << 32 | bits of the weight` with np.sort, whose int64 kernel is vectorised, 0.06 (the weights
come out of the sorted keys, nothing is gathered); np.sort on `token << bits | position` and a gather 0.19;
np.argsort 0.26; np.unique + bincount 0.35; torch.sort 0.42; torch.unique + index_add 0.54; pyarrow group_by 1.1.
The same trick orders each row by probability. float32 to float16 goes through torch: NumPy takes 60 times as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

BLOCK_HITS = 1 << 18
PROBABILITY_BITS = 30
ONE_BELOW_TWO = (1 << PROBABILITY_BITS) - 1
TORCH_SERIAL = 32767


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


def float16_from_float32(values: np.ndarray) -> np.ndarray:
    """`values` rounded to float16 (to nearest, ties to even)."""
    return _converted(values, np.float16)


def float32_from_float16(values: np.ndarray) -> np.ndarray:
    """`values` as float32, exactly; read-only input is fine."""
    return np.ascontiguousarray(values, np.float32) if values.dtype != np.float16 else _converted(values, np.float32)


def _converted(values: np.ndarray, dtype: type) -> np.ndarray:
    result = np.empty(values.shape, dtype)
    source = np.ascontiguousarray(values)
    if not source.flags.writeable:
        # torch warns about read-only memory, which mapped files are; a copy of the half-size input is cheap.
        source = source.copy()
    source, target = torch.from_numpy(source.reshape(-1)), torch.from_numpy(result.reshape(-1))
    # Pieces that torch does not divide among threads of its own: the callers are threads already.
    for start in range(0, len(source), TORCH_SERIAL):
        target[start : start + TORCH_SERIAL].copy_(source[start : start + TORCH_SERIAL])
    return result


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
    if not len(elsewhere):
        return
    rest = ids[elsewhere]  # (m, k)
    own = rest == own_rows[elsewhere, None]
    own[~own.any(axis=1), -1] = True
    rest[own] = -1
    ids[elsewhere] = rest


def hit_tokens(ids: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Tokens of the hits: (n, k) int32 from row numbers `ids` and the indexed rows' `values`; -1 stays -1."""
    if ids.size and ids.min() >= 0:
        return np.take(values, ids)
    tokens = np.take(values, np.maximum(ids, 0))
    tokens[ids < 0] = -1
    return tokens


def aggregate(distances: np.ndarray, tokens: np.ndarray, *, knn_temp: float, threshold: float) -> Distributions:
    """kNN distribution of each row: p(token) ∝ Σ over its hits of exp(-distance / knn_temp).

    This is the retriever's distribution that the memory learns (paper, section 3; Khandelwal et al. 2020,
    equation 2). Entries of `threshold` or less are dropped, and the rest is not normalised again.

    Args:
        distances: (n, k) float32 squared L2 distances.
        tokens: (n, k) int32 value of each hit; -1 where there is no hit.
        knn_temp: temperature, above 0.
        threshold: entries with a probability up to this are left out (0 or more), judged in float32.
    """
    n, k = tokens.shape
    widest = max(int(tokens.max(initial=0)).bit_length(), 1)
    rows = max(min(BLOCK_HITS // max(k, 1), 1 << (63 - PROBABILITY_BITS - widest)), 1)
    blocks = [
        _aggregate_block(distances[start : start + rows], tokens[start : start + rows], knn_temp, threshold, widest)
        for start in range(0, n, rows)
    ]
    if len(blocks) == 1:
        return blocks[0]
    if not blocks:
        return Distributions(
            np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float16), np.empty(0, np.float32)
        )
    return Distributions(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))


def _aggregate_block(
    distances: np.ndarray, tokens: np.ndarray, knn_temp: float, threshold: float, token_bits: int
) -> Distributions:
    n, k = tokens.shape
    weights, nearest = _weights(distances, tokens, knn_temp)  # (n, k), (n,)
    totals = weights.sum(axis=1)
    totals[totals == 0] = 1

    # A weight is not negative, so its bits order as an integer and fit under the token in one int64.
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
    return Distributions(*by_falling_probability(row[kept], token[kept], prob[kept], n, token_bits), nearest)


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
    return id_cnt, token, float16_from_float32(prob)


def _weights(distances: np.ndarray, tokens: np.ndarray, knn_temp: float) -> tuple[np.ndarray, np.ndarray]:
    """exp(-(d - nearest) / T), 0 for missing hits, (n, k) float32; and the nearest distance, (n,) float32."""
    shifted, nearest = _shifted(distances, tokens)
    shifted *= np.float32(-1 / knn_temp)
    return np.exp(shifted, out=shifted), nearest


def _shifted(distances: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances above each row's nearest, infinity for missing hits: the softmax is unchanged and cannot underflow."""
    if tokens.size and tokens.min() < 0:
        distances = np.where(tokens < 0, np.float32(np.inf), distances)
    nearest = distances.min(axis=1, initial=np.float32(np.inf))
    base = np.where(np.isfinite(nearest), nearest, np.float32(0))
    return distances - base[:, None], nearest


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
        shifted, _ = _shifted(distances[block], tokens)
        match = (tokens == np.asarray(labels)[block, None]).astype(np.float32)
        weights = np.empty_like(shifted)
        for column, temperature in enumerate(temperatures):
            np.multiply(shifted, np.float32(-1 / temperature), out=weights)
            np.exp(weights, out=weights)
            total = weights.sum(axis=1, dtype=np.float64)
            np.multiply(weights, match, out=weights)
            hit = weights.sum(axis=1, dtype=np.float64)
            np.divide(hit, total, out=result[block, column], where=total > 0)
    return result
