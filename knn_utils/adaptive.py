"""The kNN-LM with a lambda for each distance (Drozdov et al. 2022, "You can't pick your neighbors, or can you?").

    p(w) = (1 - lambda_b) p_base(w) + lambda_b p_kNN(w),    b: the bucket of the nearest neighbour's squared distance

Each bucket holds equally many rows of a validation split, and gets the lambda that maximizes their likelihood.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.errors import InputError
from utils.files import read_json
from utils.results import ADAPTIVE

if TYPE_CHECKING:
    import torch

    from utils.evaluation import MixtureScore

BUCKETS = 32
LEAST_ROWS = 100  # of a bucket: fewer determine its lambda poorly
LARGEST_LAMBDA = 0.99  # the base keeps the rest, so that no token becomes impossible
HALVINGS = 50


@dataclass(frozen=True)
class Buckets:
    """Lambda by distance: `lmbda` (buckets,), for squared distances above edges[i - 1] and up to edges[i], where `edges`
    (buckets - 1,) rise; `knn_temp`: the kNN temperature that they were chosen with."""

    edges: np.ndarray
    lmbda: np.ndarray
    knn_temp: float

    def lambdas(self, nearest: np.ndarray) -> np.ndarray:
        """Lambda of each row, by the squared distance of its nearest neighbour; 0 where it is infinite (no hit)."""
        return np.where(np.isfinite(nearest), self.lmbda[np.searchsorted(self.edges, nearest)], 0.0)

    @classmethod
    def read(cls, path: str | os.PathLike) -> Buckets:
        """The buckets that `train_base --knn --lmbda adaptive` wrote into a results.json. Raises InputError."""
        found = read_json(path).get("adaptive", {})
        if "edges" not in found:
            raise InputError(f"--choose_on {path}: was not made with train_base --knn --lmbda {ADAPTIVE}")
        return cls(np.array(found["edges"], np.float64), np.array(found["lmbda"], np.float64), found["knn_temp"])


def choose_buckets(base: np.ndarray, knn: np.ndarray, nearest: np.ndarray, knn_temp: Sequence[float]) -> Buckets:
    """The buckets and temperature that make these rows most likely.

    Args:
        base: (rows,) log-probability of each row's label under the base.
        knn: (rows, temperatures) its probability under the kNN.
        nearest: (rows,) squared distance of the nearest neighbour, infinity where there is none.
    """
    found = np.isfinite(nearest)  # the other rows are left to the base
    base, knn, nearest = base[found], knn[found], nearest[found]
    edges = equal_edges(nearest)
    bucket = np.searchsorted(edges, nearest)
    lmbda = best_lambdas(base, knn, bucket, len(edges) + 1)  # (buckets, temperatures)
    column = int(mixed(base[:, None], knn, lmbda[bucket]).sum(0).argmax())
    return Buckets(edges, lmbda[:, column], knn_temp[column])


def equal_edges(nearest: np.ndarray) -> np.ndarray:
    """Distances that divide `nearest` (rows,) into `BUCKETS` of equally many rows, or fewer buckets where there are few
    rows or equal distances."""
    ordered = np.sort(nearest).astype(np.float64)
    buckets = max(min(BUCKETS, len(ordered) // LEAST_ROWS), 1)
    counts = np.arange(1, buckets) * len(ordered) // buckets  # rows up to each edge
    edges = np.unique(ordered[counts - 1])
    return edges[edges < ordered[-1]] if len(ordered) else edges


def best_lambdas(base: np.ndarray, knn: np.ndarray, bucket: np.ndarray, buckets: int) -> np.ndarray:
    """Each bucket's most likely lambda from 0 to `LARGEST_LAMBDA`, (buckets, temperatures), by bisection on the slope of the
    log-likelihood, which is concave in lambda."""
    alone = np.maximum(np.exp(base), np.finfo(np.float64).tiny)[:, None]  # (rows, 1)
    gain = knn - alone  # (rows, temperatures)

    def slope(lmbda: np.ndarray) -> np.ndarray:
        each = gain / (alone + lmbda[bucket] * gain)
        return np.stack([np.bincount(bucket, column, minlength=buckets) for column in each.T], axis=1)

    low = np.zeros((buckets, knn.shape[1]))
    high = np.full_like(low, LARGEST_LAMBDA)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        rises = slope(middle) > 0
        low, high = np.where(rises, middle, low), np.where(rises, high, middle)
    return (low + high) / 2


def mixed(base: np.ndarray, knn: np.ndarray, lmbda: np.ndarray) -> torch.Tensor:
    """log((1 - lambda) exp(base) + lambda knn), elementwise, float64."""
    import torch

    from models.mixture import log_mixture

    base, knn, lmbda = (torch.from_numpy(np.asarray(each, np.float64)) for each in (base, knn, lmbda))
    return log_mixture((base, knn.log()), (torch.log1p(-lmbda), lmbda.log()))


class AdaptiveScore:
    """Scores a split with the given `buckets`, or with those that fit its own rows best.

    `knn_temp`: the temperatures whose probabilities `add` takes. `index`: the id of the index, for the results.
    """

    def __init__(self, knn_temp: Sequence[float], buckets: Buckets | None, index: str | None) -> None:
        self.knn_temp = [buckets.knn_temp] if buckets else list(knn_temp)
        self.buckets, self.index, self.rows = buckets, index, []

    def add(self, base: torch.Tensor, knn: torch.Tensor, nearest: np.ndarray) -> None:
        """Add rows: tensors base (rows,) and knn (rows, temperatures), and `nearest`, as in `choose_buckets`."""
        self.rows.append((base.cpu().double().numpy(), knn.numpy(), nearest))

    def finish(self, score: MixtureScore) -> dict[str, Any]:
        """Add this process's rows to `score`, after the buckets are chosen on the rows of all processes if none were given
        (a collective call). Returns what results.json says of the buckets."""
        import torch
        from accelerate.utils import gather_object

        if self.buckets is None:
            columns = zip(*gather_object(self.rows), strict=True)
            self.buckets = choose_buckets(*map(np.concatenate, columns), self.knn_temp)
        edges, values, knn_temp = self.buckets.edges, self.buckets.lmbda, self.buckets.knn_temp
        for base, knn, nearest in self.rows:
            lmbda = self.buckets.lambdas(nearest)
            likelihood = mixed(base, knn[:, self.knn_temp.index(knn_temp)], lmbda)
            score.add_adaptive(likelihood, torch.from_numpy(lmbda))
        return {"knn_temp": knn_temp, "edges": edges.tolist(), "lmbda": values.tolist(), "index": self.index}


def adaptive_score(arguments: Any, windows: Any, neighbours: Any) -> AdaptiveScore | None:
    """The adaptive lambda that `--lmbda` asks for, chosen on the scored split, or that of `--choose_on`; None if neither.

    Raises InputError where the choice would be made on tested or indexed text, or was made with another index.
    """
    from utils.windows import check_held_out

    split, path, made, buckets = arguments.eval_subset, arguments.choose_on, neighbours.searcher.made, None
    if ADAPTIVE not in arguments.lmbda and not (path and "adaptive" in read_json(path)):
        return None
    index = made and made.id
    if path:
        buckets = Buckets.read(path)
        if index and read_json(path)["adaptive"]["index"] != index:
            raise InputError(f"--choose_on {path}: was chosen with another index than {arguments.index_file}")
    elif split == "test":
        raise InputError(f"--lmbda {ADAPTIVE}: choose it with --eval_subset validation, then test with --choose_on")
    else:
        checked = f"--lmbda {ADAPTIVE}: split {split} of {arguments.dataset_name}"
        check_held_out(windows, neighbours.values, checked, "indexed")
    return AdaptiveScore(arguments.knn_temp, buckets, index)
