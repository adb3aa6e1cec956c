"""Hits become distributions: the textbook form, and the edges."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from knn_files import as_dicts, plain_distribution

from knn_utils import distribution as module
from knn_utils.distribution import aggregate, dense_probability, drop_own_row, label_probability

pytestmark = pytest.mark.unit


def random_hits(rows: int, k: int, tokens: int, missing: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    distances = np.sort(random.random((rows, k)) * 40, axis=1).astype(np.float32)
    found = random.integers(0, tokens, (rows, k)).astype(np.int32)
    found[random.random((rows, k)) < missing] = -1
    return distances, found


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 7),
    k=st.integers(1, 30),
    tokens=st.sampled_from([1, 3, 50, 49152, 2**31 - 1]),
    missing=st.sampled_from([0.0, 0.3, 1.0]),
    knn_temp=st.sampled_from([0.05, 1.0, 16.0, 1e6]),
    threshold=st.sampled_from([0.0, 1e-8, 1e-2]),
    seed=st.integers(0, 1000),
)
def test_rows_are_the_textbook_distribution(rows, k, tokens, missing, knn_temp, threshold, seed) -> None:
    distances, found = random_hits(rows, k, tokens, missing, seed)
    result = aggregate(distances, found, knn_temp=knn_temp, threshold=threshold)
    assert [array.dtype for array in result] == [np.int32, np.int32, np.float16, np.float32]
    expected = plain_distribution(distances, found, knn_temp)
    here = as_dicts(result)
    for row, there in zip(here, expected, strict=True):
        # An entry within rounding of the threshold may fall on either side.
        kept = {token for token, value in there.items() if value > threshold * (1 + 1e-5) + 1e-38}
        assert kept <= row.keys() <= {token for token, value in there.items() if value > threshold * (1 - 1e-5)}
        for token, value in row.items():
            assert abs(value - there[token]) <= 2e-3 * there[token] + 1e-6
    bounds = np.concatenate([[0], np.cumsum(result.id_cnt)])
    for start, stop in itertools.pairwise(bounds):
        assert (np.diff(result.prob[start:stop].astype(np.float32)) <= 0).all()
    nearest = np.where(found >= 0, distances, np.inf).min(axis=1, initial=np.inf)
    np.testing.assert_array_equal(result.distance, nearest.astype(np.float32))


def test_the_threshold_is_compared_in_float32() -> None:
    # 2e-8 is 0 in float16 and stays, as in the original; 0.25 is exactly the threshold of the second call.
    distances = np.array([[0.0, -np.log(2e-8)]], dtype=np.float32)
    small = aggregate(distances, np.array([[1, 2]], dtype=np.int32), knn_temp=1.0, threshold=1e-8)
    assert small.token_id.tolist() == [1, 2] and small.prob[1] == 0
    tokens = np.array([[1, 2, 3, 3]], dtype=np.int32)
    quarters = aggregate(np.zeros((1, 4), np.float32), tokens, knn_temp=1.0, threshold=0.25)
    assert quarters.token_id.tolist() == [3]


def test_the_own_row_is_dropped_at_any_rank_and_else_the_farthest_hit() -> None:
    ids = np.array([[7, 1, 2], [1, 8, 2], [1, 2, 9], [3, 1, 2], [3, 1, -1], [-1, -1, -1]])
    drop_own_row(ids, np.array([7, 8, 9, 7, 8, 9]))
    # Where the probed lists held fewer than k rows, k-1 or fewer remain already.
    assert ids.tolist() == [[-1, 1, 2], [1, -1, 2], [1, 2, -1], [3, 1, -1], [3, 1, -1], [-1, -1, -1]]


def test_labels_and_the_dense_form_have_the_textbook_probabilities() -> None:
    distances, ids = random_hits(50, 12, 6, 0.4, 3)
    ids[7] = -1
    values = np.arange(6, dtype=np.int32) * 7
    labels = (np.arange(50) % 8 * 7).astype(np.int32)
    temperatures = [0.5, 4.0, 100.0]
    found = label_probability(distances, ids.astype(np.int64), values, labels, temperatures)
    assert found.shape == (50, 3) and found.dtype == np.float64
    tokens = np.where(ids < 0, -1, ids * 7)
    for column, temperature in enumerate(temperatures):
        dense = dense_probability(distances, tokens, 50, temperature)
        assert dense.shape == (50, 50) and dense.dtype == np.float64
        rows = plain_distribution(distances, tokens, temperature)
        expected = [[row.get(token, 0.0) for token in range(50)] for row in rows]
        np.testing.assert_allclose(dense, expected, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(found[:, column], dense[np.arange(50), labels], rtol=1e-5, atol=1e-7)


def test_another_kernel_changes_targets_labels_and_generation_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    distances, tokens = np.array([[1.0, 4.0, 0.0]], np.float32), np.array([[7, 9, -1]], np.int32)
    inverse_distance = lambda above, nearest, knn_temp: -np.log(above + nearest)  # noqa: E731
    monkeypatch.setattr(module, "log_weights", inverse_distance)
    sparse = aggregate(distances, tokens, knn_temp=1.0, threshold=0.0)
    assert sparse.token_id.tolist() == [7, 9] and sparse.prob.tolist() == pytest.approx([0.8, 0.2], rel=1e-3)
    values = np.arange(10, dtype=np.int32)
    labels = label_probability(distances, tokens.astype(np.int64), values, np.array([9]), [1.0])
    assert labels.tolist() == [[pytest.approx(0.2)]]
    assert dense_probability(distances, tokens, 10, 1.0)[0, [7, 9]] == pytest.approx([0.8, 0.2])
