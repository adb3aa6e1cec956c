"""The rows of training and of validation.

A training row is a kNN target from disk with a hidden state from a datastore (offline) or from the frozen base (online).
A validation row is a hidden state that the base scored once, before training.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knn_utils.datastore import SCORED_ROWS, Datastore, KNNTargets, check_rows, open_scored_datastore, stored_rows
from training.arguments import TrainerArguments
from utils.artefact import require
from utils.errors import InputError
from utils.evaluation import MixtureScore, count_rows, predicted_positions, rounded
from utils.loading import made_id

CHECKED_WINDOWS = 2048  # whose labels are compared at a time
LAMBDAS = tuple(round(0.05 * step, 2) for step in range(1, 20))  # of the validation


@dataclass
class Rows:
    """A batch of n training rows.

    hidden (n, dim) float16 or float32, label (n,) int32, id_cnt (n,) int32; token_id (entries,) int32 and prob
    (entries,) float16 are the targets of all rows, laid end to end. All but `hidden` are on the CPU.
    """

    hidden: Tensor
    label: Tensor
    id_cnt: Tensor
    token_id: Tensor
    prob: Tensor

    @classmethod
    def zeros(cls, count: int, dim: int) -> Rows:
        """`count` rows of zeros with no target entries."""
        return cls.without_target(torch.zeros(count, dim), torch.zeros(count, dtype=torch.int64))

    @classmethod
    def without_target(cls, hidden: Tensor, label: Tensor) -> Rows:
        """Rows with no target entries."""
        empty = torch.zeros(0, dtype=torch.int32)
        return cls(hidden, label, torch.zeros_like(label), empty, empty.half())

    def slices(self, size: int) -> Iterator[Rows]:
        """Consecutive batches of at most `size` rows."""
        ends = torch.cumsum(self.id_cnt, 0, dtype=torch.int64)
        for start in range(0, len(self.label), size):
            stop = min(start + size, len(self.label))
            entries = slice(int(ends[start - 1]) if start else 0, int(ends[stop - 1]))
            by_row = (tensor[start:stop] for tensor in (self.hidden, self.label, self.id_cnt))
            yield Rows(*by_row, self.token_id[entries], self.prob[entries])


@functools.lru_cache(maxsize=2)
def epoch_order(windows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the windows in an epoch: a permutation that depends on the seed and the epoch alone."""
    return np.random.default_rng((seed, epoch)).permutation(windows)


class WindowRows:
    """The training rows of each window. A subclass adds the hidden states.

    `read(windows)` reads what windows (their numbers, in order) need from disk, as tensors, in a background thread; `rows`
    turns these into `Rows` in the main thread; `settings` holds what a subclass adds to the memory's record; `origin` says
    where the hidden states come from. Rows without label and target fill up their number to one of a few (`rounded`).

    Args:
        windows: a split as `load_windows` returns it.
        config: the memory's.

    Raises:
        InputError: the targets belong to other windows or to another block.
    """

    rows: Callable[..., Rows] = Rows
    origin: str

    def __init__(self, windows: Any, config: Any, arguments: TrainerArguments) -> None:
        self.settings: dict[str, Any] = {}
        self.windows, self.vocabulary, self.layer_position = windows, config.vocab_size, arguments.layer_position
        self.counts = count_rows(windows)  # (windows,)
        self.ends = np.cumsum(self.counts)
        self.targets = KNNTargets.open(arguments.knn_save_path)
        check_rows(self.targets, int(self.ends[-1]))
        record, windows_id = self.targets.made, made_id(arguments.dataset_name)
        require(self.targets.path, record, windows=windows_id, layer_position=self.layer_position)
        self.check_labels(self.targets.path, self.targets.labels)

    def check_labels(self, path: object, read: Callable[[int, int], np.ndarray]) -> None:
        """Compare the windows' labels with `read(start, stop)`. Raises InputError naming the first row that differs."""
        for first in range(0, len(self.counts), CHECKED_WINDOWS):
            last = min(first + CHECKED_WINDOWS, len(self.counts))
            start, stop = self.range_of(first)[0], self.range_of(last - 1)[1]
            labels = torch.from_numpy(np.asarray(self.windows[first:last]["labels"]))  # (windows, time)
            expected, found = predicted_positions(labels)[1].numpy(), read(start, stop)  # (rows,) each
            if len(different := np.flatnonzero(expected != found)):
                row = different[0]
                raise InputError(
                    f"{path}: row {start + row} has label {found[row]}, the windows have {expected[row]}; it was made from "
                    "other windows"
                )

    def range_of(self, window: int) -> tuple[int, int]:
        """First and past-last row of a window."""
        return int(self.ends[window] - self.counts[window]), int(self.ends[window])

    def read_targets(self, windows: np.ndarray) -> list[Tensor]:
        """label, id_cnt, token_id and prob of `windows`, as in `Rows`. Raises InputError for token ids beyond the vocabulary."""
        found = [self.targets.read(*self.range_of(window)) for window in windows]
        names = ("label", "id_cnt", "token_id", "prob")
        label, id_cnt, ids, prob = (np.concatenate([getattr(each, name) for each in found]) for name in names)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocabulary:
            raise InputError(
                f"--knn_save_path {self.targets.path}: holds token id {ids.max()}, but the memory's vocabulary has "
                f"{self.vocabulary} tokens; teacher and student need the same tokenizer"
            )
        added = rounded(len(label)) - len(label)
        label, id_cnt = np.pad(label, (0, added), constant_values=-100), np.pad(id_cnt, (0, added))
        return [torch.from_numpy(array) for array in (label, id_cnt, ids, prob)]

    def open_validation(self, arguments: TrainerArguments, dim: int, processes: int) -> Validation | None:
        """The scored rows of --validation_dstore_path; None without it."""
        if not (path := arguments.validation_dstore_path):
            return None
        store = open_scored_datastore(path, **arguments.made_from(), dim=dim, layer_position=self.layer_position)
        passes = math.ceil(math.ceil(store.rows / SCORED_ROWS) / processes)
        return Validation(lambda: stored_rows(store), passes, dim)


class OfflineRows(WindowRows):
    """Rows with hidden states from the student's own datastore."""

    def __init__(self, windows: Any, config: Any, arguments: TrainerArguments, dstore_path: str) -> None:
        super().__init__(windows, config, arguments)
        self.datastore, self.origin = Datastore.open(dstore_path), dstore_path
        check_rows(self.datastore, int(self.ends[-1]))
        expected = {**arguments.made_from(), "dim": config.hidden_size, "layer_position": self.layer_position}
        require(dstore_path, self.datastore.made, **expected)
        self.check_labels(dstore_path, self.datastore.vals)

    def read(self, windows: np.ndarray) -> list[Tensor]:
        """Hidden states (rows, dim) and targets of `windows`."""
        keys = np.concatenate([self.datastore.keys(*self.range_of(window)) for window in windows])
        keys = np.pad(keys, ((0, rounded(len(keys)) - len(keys)), (0, 0)))
        return [torch.from_numpy(keys), *self.read_targets(windows)]


@dataclass
class Validation:
    """This rank's scored rows: batches of hidden states (rows, dim), base log-probabilities and labels (rows,).

    `forward_passes`: batches of the rank with the most; all make as many, since each pass gathers sharded weights.
    """

    batches: Callable[[], Iterable[tuple[Tensor, Tensor, Tensor]]]
    forward_passes: int
    dim: int

    def figures(self, label_log_probs: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Any]:
        """Perplexity of base, memory and both, at the best lambda of a grid (memory temperature 1).

        Args:
            label_log_probs: the memory's log-probabilities (rows, 1) of labels (rows,) from hidden states (rows, dim).
        """
        score, done = MixtureScore((*LAMBDAS, 1.0), [1.0]), 0
        for done, (hidden, base, labels) in enumerate(self.batches(), 1):  # noqa: B007
            score.add(base, label_log_probs(hidden, labels))
        for _ in range(done, self.forward_passes):
            label_log_probs(torch.zeros(1, self.dim), torch.zeros(1, dtype=torch.int64))
        score.reduce()
        *mixed, alone = score.grid()
        best = min(mixed, key=lambda row: row["perplexity"])
        return {
            "base_perplexity": round(score.base_perplexity(), 4),
            "memory_perplexity": round(alone["perplexity"], 4),
            "joint_perplexity": round(best["perplexity"], 4),
            "lmbda": best["lmbda"],
            "tokens": int(score.tokens.item()),
        }
