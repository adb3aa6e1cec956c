"""Validation during training: joint perplexity on rows that the base scored once, before training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knn_utils.scored_rows import SCORED_ROWS, open_scored_datastore, stored_rows
from training.arguments import TrainerArguments
from utils.cli import say
from utils.evaluation import MixtureScore, Scorer
from utils.loading import load_windows, made_id

LAMBDAS = tuple(round(0.05 * step, 2) for step in range(1, 20))


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


def open_validation(
    arguments: TrainerArguments, dim: int, processes: int, open_base: Callable[[], Any]
) -> Validation | None:
    """The rows to validate on: those of --validation_dstore_path, else the split scored by the base; None for no split.

    Rows scored by the base are kept in memory in float16, 2 · dim bytes per token.
    """
    path, split = arguments.validation_dstore_path, arguments.validation_split_name
    if path:
        expected = {"base": arguments.base_id(), "windows": made_id(arguments.dataset_name), "dim": dim}
        datastore = open_scored_datastore(path, **expected, layer_position=arguments.layer_position)
        passes = math.ceil(math.ceil(datastore.rows / SCORED_ROWS) / processes)
        return Validation(lambda: stored_rows(datastore), passes, dim)
    if split == "none":
        return None
    if not (Path(str(arguments.dataset_name)) / split).is_dir():
        say(f"--validation_split_name {split}: the windows have no such split; no validation during training")
        return None
    windows = load_windows(arguments.dataset_name, split, arguments.max_eval_samples)
    batch_size = arguments.per_device_eval_batch_size
    batches = Scorer(open_base(), arguments.layer_position).batches(windows, batch_size)
    scored = [(hidden.half().cpu(), log_probs.cpu(), labels) for hidden, log_probs, labels in batches]
    return Validation(lambda: scored, math.ceil(math.ceil(len(windows) / batch_size) / processes), dim)
