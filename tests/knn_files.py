"""Small datastores with known neighbours, for the tests of index, search and kNN targets."""

from __future__ import annotations

import hashlib
import itertools
import os
from pathlib import Path

import numpy as np

from knn_utils.datastore import datastore_schema
from knn_utils.parts import datastore_batch, write_stream
from utils.artefact import Made, begin

DIM = 16
VOCABULARY = 50


def random_rows(rows: int, seed: int = 0, dim: int = DIM) -> tuple[np.ndarray, np.ndarray]:
    """Keys (rows, dim) float16 in a few clusters, and values (rows,) int32."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((8, dim)) * 2
    cluster = random.integers(0, len(centres), rows)
    keys = centres[cluster] + random.standard_normal((rows, dim))
    values = np.where(random.random(rows) < 0.5, cluster, random.integers(0, VOCABULARY, rows))
    return keys.astype(np.float16), values.astype(np.int32)


def write_datastore(
    path: Path,
    keys: np.ndarray,
    values: np.ndarray,
    *,
    part_rows: int = 100,
    layer_position: int = -1,
    base: str | None = "base",
    overwrite: bool = False,
) -> Path:
    """Write the rows as a datastore folder of parts; the id of its windows is a digest of the rows."""
    rows, dim = keys.shape
    parts = [slice(first, min(first + part_rows, rows)) for first in range(0, rows, part_rows)]
    settings = {"dim": dim, "layer_position": layer_position, "part_rows": [part.stop - part.start for part in parts]}
    windows = hashlib.sha256(keys.tobytes() + values.tobytes()).hexdigest()
    making = begin(path, Made("datastore", settings, rows, {"base": base, "windows": windows}), overwrite=overwrite)
    for number in making.own_parts(len(parts)):
        batch = datastore_batch(keys[parts[number]], values[parts[number]])
        write_stream(making.part(number), datastore_schema(dim), [batch])
    making.finish()
    return path


def exact_neighbours(queries: np.ndarray, keys: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Squared distances and row numbers of the k nearest keys, ties by row number, in double precision."""
    difference = queries[:, None].astype(np.float64) - keys[None].astype(np.float64)
    distances = (difference**2).sum(axis=2)
    order = np.lexsort((np.broadcast_to(np.arange(len(keys)), distances.shape), distances), axis=1)[:, :k]
    return np.take_along_axis(distances, order, axis=1), order


def plain_distribution(
    distances: np.ndarray, tokens: np.ndarray, knn_temp: float, threshold: float = 0.0
) -> list[dict[int, float]]:
    """What aggregation must give, row by row the textbook way: {token: probability}; tokens below 0 are no hits."""
    rows = []
    for row_distances, row_tokens in zip(distances.astype(np.float64), tokens, strict=True):
        hits = row_tokens >= 0
        if not hits.any():
            rows.append({})
            continue
        weights = np.exp(-(row_distances[hits] - row_distances[hits].min()) / knn_temp)
        weights /= weights.sum()
        total: dict[int, float] = {}
        for token, weight in zip(row_tokens[hits].tolist(), weights, strict=True):
            total[token] = total.get(token, 0.0) + weight
        rows.append({token: weight for token, weight in total.items() if weight > threshold})
    return rows


def as_dicts(targets) -> list[dict[int, float]]:
    """Rows of sparse distributions as {token: probability}."""
    bounds = np.concatenate([[0], np.cumsum(targets.id_cnt)])
    return [
        dict(zip(targets.token_id[a:b].tolist(), targets.prob[a:b].astype(float).tolist(), strict=True))
        for a, b in itertools.pairwise(bounds)
    ]


def assert_same_distributions(found: list[dict[int, float]], expected: list[dict[int, float]]) -> None:
    """Equal within what float16 holds: relative 2e-3 plus 1e-6."""
    assert len(found) == len(expected)
    for row, (here, there) in enumerate(zip(found, expected, strict=True)):
        assert here.keys() == there.keys(), row
        for token, value in there.items():
            assert abs(here[token] - value) <= 2e-3 * value + 1e-6, (row, token)


class Stopped(BaseException):
    """Stands for a kill: nothing that handles errors catches it."""


def stops_at_rename(monkeypatch, work, number: int) -> bool:
    """Run `work`, stopped at its rename `number` (counted from 0); whether it came so far."""
    rename, count = os.replace, itertools.count()

    def stopping(*arguments, **named):
        if next(count) == number:
            raise Stopped
        return rename(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopping)
        try:
            work()
        except Stopped:
            return True
    return False
