"""Validation while a memory trains: joint perplexity on rows that the base has scored once, before training.

They come from a datastore with log-probabilities, or from a run of the base over the validation split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import Tensor

from knn_utils.scored_rows import SCORED_ROWS, open_scored_datastore, stored_rows
from utils.cli import say
from utils.errors import InputError
from utils.evaluation import MixtureScore, Scorer, check_token_ids
from utils.loading import load_windows

LAMBDAS = tuple(round(0.05 * step, 2) for step in range(1, 20))


@dataclass
class Validation:
    """Scored rows of this process: batches of hidden states (rows, dim), base log-probabilities and labels (rows,).

    `passes`: batches of the process that has most; all make as many, since sharded weights are gathered in each.
    """

    batches: Callable[[], Iterable[tuple[Tensor, Tensor, Tensor]]]
    passes: int
    dim: int

    def figures(self, label_log_probs: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Any]:
        """Perplexity of base, memory and both, at the best lambda of a grid (memory temperature 1).

        Args:
            label_log_probs: the memory's log-probabilities (rows, 1) of labels (rows,) from hidden states (rows, dim).
        """
        score, done = MixtureScore((*LAMBDAS, 1.0), [1.0]), 0
        for done, (hidden, base, labels) in enumerate(self.batches(), 1):  # noqa: B007
            score.add(base, label_log_probs(hidden, labels))
        for _ in range(done, self.passes):
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


def open_validation(arguments: Any, dim: int, processes: int, open_base: Callable[[], Any]) -> Validation | None:
    """What the trainers validate on, by their flags; None where there is nothing.

    Without --validation_dstore_path the base scores the validation split; the hidden states are kept in memory, as
    float16, 2 · dim bytes for each token.

    Raises:
        InputError: no log-probabilities in the datastore, another width or layer; hidden states that are not finite.
    """
    path, split, windows = arguments.validation_dstore_path, arguments.validation_split_name, None
    splits = {} if split == "none" else datasets.load_from_disk(str(arguments.dataset_name))
    if isinstance(splits, datasets.DatasetDict) and split in splits:
        windows = load_windows(arguments.dataset_name, split, at_most=None if path else arguments.max_eval_samples)
    if path:
        datastore = open_scored_datastore(path, dim=dim, windows=windows, base=arguments)
        passes = math.ceil(math.ceil(datastore.rows / SCORED_ROWS) / processes)
        return Validation(lambda: stored_rows(datastore), passes, dim)
    if windows is None:
        if split != "none":
            say(f"--validation_split_name {split}: the windows have no such split, no validation while training")
        return None
    base, batch_size = open_base(), arguments.per_device_eval_batch_size
    check_token_ids(windows, base.config.vocab_size, arguments.dataset_name)
    scored, finite = [], True
    for hidden, log_probs, labels in Scorer(base, arguments.layer_position).batches(windows, batch_size):
        hidden = hidden.half()
        finite = torch.isfinite(hidden).all() & finite
        scored.append((hidden.cpu(), log_probs.cpu(), labels))
    if not finite:
        raise InputError(f"--validation_split_name {split}: hidden states of the base hold NaN or infinity")
    return Validation(lambda: scored, math.ceil(math.ceil(len(windows) / batch_size) / processes), dim)
