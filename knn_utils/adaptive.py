"""The kNN-LM with a lambda for each distance (Drozdov et al. 2022, "You can't pick your neighbors, or can you?").

    p(w) = (1 - lambda_b) p_base(w) + lambda_b p_kNN(w),    b: the bucket of the nearest neighbour's squared distance

The buckets are equally filled with the rows of a validation split; each gets the lambda that makes its rows most likely.
That is high where the datastore knows the context, and low where it does not.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.errors import InputError, check_fraction, check_positive
from utils.files import read_json
from utils.legacy import require_same
from utils.results import ADAPTIVE

BUCKETS = 32
LEAST_ROWS = 100  # of a bucket: fewer say little about a lambda
# A bucket whose validation rows the neighbours all know leaves the base this much: no token becomes impossible.
LARGEST_LAMBDA = 0.99
HALVINGS = 50


@dataclass(frozen=True)
class Buckets:
    """Lambda by distance.

    Attributes:
        edges: (buckets - 1,) rising squared distances; bucket i goes from above edges[i - 1] up to edges[i].
        lmbda: (buckets,) each bucket's lambda.
        knn_temp: the kNN temperature that they were chosen with.
    """

    edges: np.ndarray
    lmbda: np.ndarray
    knn_temp: float

    def of(self, nearest: np.ndarray) -> np.ndarray:
        """Lambda of each row, by the squared distance of its nearest neighbour; 0 where it is infinite (no hit)."""
        return np.where(np.isfinite(nearest), self.lmbda[np.searchsorted(self.edges, nearest)], 0.0)

    @classmethod
    def read(cls, path: str | os.PathLike) -> Buckets:
        """Those that `train_base --knn --lmbda adaptive` wrote into a results.json. Raises InputError."""
        try:
            found = read_json(path)["adaptive"]
            edges, lmbda = (np.array(found[name], np.float64).reshape(-1) for name in ("edges", "lmbda"))
            for value in lmbda:
                check_fraction("lmbda", value)
            if len(lmbda) != len(edges) + 1 or not (np.diff(edges) > 0).all():
                raise ValueError("edges do not rise, or are not one fewer than the lambdas")
            return cls(edges, lmbda, check_positive("knn_temp", found["knn_temp"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"--choose_on {path}: holds no lambdas by distance ({error}); make it with train_base --knn "
                f"--lmbda {ADAPTIVE} on validation text"
            ) from None


def choose_buckets(base: np.ndarray, knn: np.ndarray, nearest: np.ndarray, knn_temp: Sequence[float]) -> Buckets:
    """The buckets and temperature that make these rows most likely.

    Args:
        base: (rows,) log-probability of each row's label under the base.
        knn: (rows, temperatures) its probability under the kNN.
        nearest: (rows,) squared distance of the nearest neighbour, infinity where there is none.
    """
    found = np.isfinite(nearest)  # the other rows are the base's, whatever lambda is
    base, knn, nearest = base[found], knn[found], nearest[found]
    edges = equal_edges(nearest)
    bucket = np.searchsorted(edges, nearest)
    lmbda = best_lambdas(base, knn, bucket, len(edges) + 1)  # (buckets, temperatures)
    column = int(np.argmax(mixed(base[:, None], knn, lmbda[bucket]).sum(0)))
    return Buckets(edges, lmbda[:, column], knn_temp[column])


def equal_edges(nearest: np.ndarray) -> np.ndarray:
    """Distances that divide `nearest` (rows,) into equally filled parts: `BUCKETS`, or fewer where there are few rows.

    Equal distances stay together.
    """
    ordered = np.sort(nearest).astype(np.float64)
    buckets = max(min(BUCKETS, len(ordered) // LEAST_ROWS), 1)
    counts = np.arange(1, buckets) * len(ordered) // buckets  # rows up to each edge
    edges = np.unique(ordered[counts - 1])
    return edges[edges < ordered[-1]] if len(ordered) else edges


def best_lambdas(base: np.ndarray, knn: np.ndarray, bucket: np.ndarray, buckets: int) -> np.ndarray:
    """Each bucket's most likely lambda from 0 to `LARGEST_LAMBDA`, (buckets, temperatures).

    The log-likelihood is concave in lambda, so its slope falls and is halved to 0.
    """
    alone = np.maximum(np.exp(base), np.finfo(np.float64).tiny)[:, None]  # (rows, 1)
    gain = knn - alone  # (rows, temperatures)

    def slope(lmbda: np.ndarray) -> np.ndarray:
        each = gain / (alone + lmbda[bucket] * gain)
        return np.stack([np.bincount(bucket, column, minlength=buckets) for column in each.T], axis=1)

    low = np.zeros((buckets, knn.shape[1]))
    high = np.where(slope(low) > 0, LARGEST_LAMBDA, 0.0)
    low = np.where(slope(high) > 0, high, low)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        rises = slope(middle) > 0
        low, high = np.where(rises, middle, low), np.where(rises, high, middle)
    return (low + high) / 2


def mixed(base: np.ndarray, knn: np.ndarray, lmbda: np.ndarray) -> np.ndarray:
    """log((1 - lambda) exp(base) + lambda knn), by element."""
    with np.errstate(divide="ignore"):
        return np.logaddexp(base + np.log1p(-lmbda), np.log(lmbda * knn))


class AdaptiveScore:
    """What a split comes to with lambda by distance: with `buckets`, or with those that fit its own rows best.

    `knn_temp`: the temperatures whose probabilities `add` takes. `about`: what else belongs into the result.
    """

    def __init__(self, knn_temp: Sequence[float], buckets: Buckets | None = None, **about: Any) -> None:
        self.knn_temp = list(knn_temp) if buckets is None else [buckets.knn_temp]
        self.buckets, self._about, self._rows = buckets, about, []

    def add(self, base: Any, knn: Any, nearest: np.ndarray) -> None:
        """Add rows: tensors base (rows,), knn (rows, temperatures), and `nearest`, as `choose_buckets` takes them."""
        self._rows.append((base.double().cpu().numpy(), knn.numpy(), nearest))

    def result(self) -> dict[str, Any]:
        """Of the rows of all processes: perplexity, knn_temp, edges, lmbda, and `about`; nothing where there is none."""
        from accelerate.utils import gather_object

        if not (rows := gather_object(self._rows)):
            return {}
        base, knn, nearest = (np.concatenate(column) for column in zip(*rows, strict=True))
        chosen = self.buckets or choose_buckets(base, knn, nearest, self.knn_temp)
        column = self.knn_temp.index(chosen.knn_temp)
        likelihood = mixed(base, knn[:, column], chosen.of(nearest)).mean()
        lists = {"edges": chosen.edges.tolist(), "lmbda": chosen.lmbda.tolist()}
        return {"perplexity": float(np.exp(-likelihood)), "knn_temp": chosen.knn_temp, **lists, **self._about}


def adaptive_score(arguments: Any, windows: Any, neighbours: Any) -> AdaptiveScore | None:
    """What `--lmbda` and `--choose_on` ask for; None where it is numbers only.

    With `--choose_on` the buckets in that results.json are used, else the scored split is the one to choose on. Raises
    InputError where the choice would be made on tested or indexed text, or was made with another index.
    """
    split, index = arguments.eval_subset, {"index": neighbours.searcher.fingerprint}
    made = {"dataset": str(arguments.dataset_name), "split": split}
    if arguments.choose_on:
        results = read_json(arguments.choose_on)
        if ADAPTIVE not in arguments.lmbda and "adaptive" not in results:
            return None
        buckets, there = Buckets.read(arguments.choose_on), results["adaptive"]
        if there.get("chosen_on") == made:
            raise InputError(
                f"--choose_on {arguments.choose_on}: was chosen on split {split}, the one that is scored; name the "
                "results.json of validation text"
            )
        require_same(
            f"--choose_on {arguments.choose_on}",
            {"index": there.get("index")},
            index,
            f"choose again with --lmbda {ADAPTIVE} on validation text",
        )
        return AdaptiveScore(arguments.knn_temp, buckets, **index, chosen_on=there.get("chosen_on"))
    if ADAPTIVE not in arguments.lmbda:
        return None
    if split == "test":
        raise InputError(
            f"--lmbda {ADAPTIVE}: is chosen on validation text: run this with --eval_subset validation first, then "
            "test with --choose_on and its results.json"
        )
    from utils.evaluation import check_held_out

    told = f"--lmbda {ADAPTIVE}: split {split} of {arguments.dataset_name}"
    check_held_out(windows, neighbours.values, told, "indexed")
    return AdaptiveScore(arguments.knn_temp, **index, chosen_on=made)
