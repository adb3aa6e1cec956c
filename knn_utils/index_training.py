"""Which FAISS index a number of keys supports, and the keys that it is trained on."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from knn_utils.faiss_files import faiss_reason
from utils.errors import InputError

SAMPLE_ROWS, SAMPLE_RUNS = 1_000_000, 1_000
# float32 keys in memory at once, besides the index and the training sample.
BLOCK_BYTES = 64 << 20
# FAISS asks for at least 39 points per centroid, and beyond 256 would draw a sample of its own.
LEAST_POINTS, MOST_POINTS = 39, 256
# Of a sub-quantiser, in any use; what asks for more is left to FAISS to refuse.
MOST_CENTROIDS = 1 << 16


def ivfpq(ncentroids: int, code_size: int, dim: int) -> str:
    """The factory string of the original's index. Raises InputError when the code size does not divide the width."""
    if dim % code_size:
        sizes = ", ".join(str(size) for size in range(1, min(dim, 256) + 1) if dim % size == 0)
        raise InputError(f"--code_size {code_size}: does not divide the keys' width {dim}; give one of {sizes}")
    return f"IVF{ncentroids},PQ{code_size}"


def supported(factory: str, rows: int) -> tuple[str, list[str]]:
    """The factory string lowered to what `rows` keys support, and what there is to say about it."""
    remarks: list[str] = []
    # Centroids of each sub-quantiser: 2 to the bits in PQ64x4, 256 for PQ64.
    match = re.search(r"\bPQ[0-9]+(?:x([0-9]{1,2}))?", factory)
    needed = 1 << int(match[1] or 8) if match else 0
    if rows < needed <= MOST_CENTROIDS:
        remarks.append(
            f"{rows} keys are too few for product quantisation, which needs {needed}: "
            f"exact index (Flat) instead of {factory}"
        )
        return "Flat", remarks
    most = max(rows // LEAST_POINTS, 1)

    def lowered(match: re.Match[str]) -> str:
        wanted = int(match[1])
        if wanted <= most:
            return match[0]
        remarks.append(
            f"centroids lowered from {wanted} to {most}: {rows} keys, and each centroid needs {LEAST_POINTS}"
        )
        return f"IVF{most}"

    factory = re.sub(r"\bIVF([0-9]+)", lowered, factory)
    if rows < needed * LEAST_POINTS:
        remarks.append(
            f"{rows} keys train the product quantiser, {needed * LEAST_POINTS} would do it well; "
            "at this size --index_factory Flat is exact and fast"
        )
    return factory, remarks


def make_index(factory: str, dim: int, seed: int) -> Any:
    """An empty FAISS index. Raises InputError when FAISS cannot build it for this width."""
    import faiss

    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_L2)
    except Exception as error:
        raise InputError(
            f"--index_factory {factory}: FAISS cannot build it for keys of width {dim} ({faiss_reason(error)})"
        ) from None
    ivf = faiss.try_extract_index_ivf(index)
    inner = faiss.downcast_index(ivf if ivf is not None else index)
    for trained in (ivf, getattr(inner, "pq", None)):
        if hasattr(trained, "cp"):
            trained.cp.seed = seed
            trained.cp.min_points_per_centroid = 1
    if hasattr(inner, "do_polysemous_training"):
        # It only renumbers the codebooks, for a kind of search not used here, and takes ten times the training.
        inner.do_polysemous_training = False
    return index


def sample_size(index: Any) -> int:
    """Keys worth training `index` on: as many as FAISS uses, at most a million."""
    import faiss

    ivf = faiss.try_extract_index_ivf(index)
    inner = faiss.downcast_index(ivf if ivf is not None else index)
    centroids = max(getattr(ivf, "nlist", 0), getattr(getattr(inner, "pq", None), "ksub", 0), 256)
    return min(SAMPLE_ROWS, MOST_POINTS * centroids)


def block_rows(dim: int) -> int:
    """Keys of width `dim` to convert at once."""
    return max(BLOCK_BYTES // (4 * dim), 1)


def float_keys(datastore: Any, start: int, stop: int) -> np.ndarray:
    """Keys of rows [start, stop), (n, dim) float32. Raises InputError for one that is not finite."""
    from knn_utils.distribution import float32_from_float16
    from knn_utils.search import check_finite

    keys = float32_from_float16(datastore.keys(start, stop))
    check_finite(keys, start, datastore.path)
    return keys


def training_sample(datastore: Any, wanted: int, seed: int) -> np.ndarray:
    """Keys to train on, (n, dim) float32: all rows if they are at most `wanted`, else 1,000 contiguous runs.

    The runs lie at seeded random places and do not overlap.
    """
    if datastore.rows <= wanted:
        length, size = block_rows(datastore.dim), datastore.rows
        starts = np.arange(0, size, length)
    else:
        length = wanted // SAMPLE_RUNS
        places = np.random.default_rng(seed).choice(datastore.rows // length, SAMPLE_RUNS, replace=False)
        starts, size = np.sort(places) * length, SAMPLE_RUNS * length
    sample = np.empty((size, datastore.dim), dtype=np.float32)
    for number, start in enumerate(starts.tolist()):
        keys = float_keys(datastore, start, min(start + length, datastore.rows))
        sample[number * length : number * length + len(keys)] = keys
    return sample
