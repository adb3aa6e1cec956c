"""Training rows whose hidden states the frozen base computes during training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knn_utils.scored_rows import Scorer, check_finite
from models.capture import hidden_states
from training.arguments import TrainerArguments
from training.rows import Rows, Validation, WindowRows
from utils.cli import say
from utils.evaluation import predicted_positions
from utils.loading import load_windows


class OnlineRows(WindowRows):
    """Rows with hidden states from the frozen `base`, which reads `batch_size` windows at a time.

    `round_to_half` rounds them to float16, as a datastore does.
    """

    def __init__(
        self, windows: Any, config: Any, arguments: TrainerArguments, base: Any, batch_size: int, round_to_half: bool
    ) -> None:
        super().__init__(windows, config, arguments)
        self.base, self.batch_size, self.round_to_half = base, batch_size, round_to_half
        self.device, self.origin = base.get_input_embeddings().weight.device, f"base {arguments.model_name_or_path}"
        self.settings = {"torch_dtype": str(arguments.dtype()), "round_hidden_states": round_to_half}

    def read(self, windows: np.ndarray) -> list[Tensor]:
        """Token ids (windows, time), the numbers of their predicting positions (rows,), and the targets."""
        rows = self.windows[np.asarray(windows)]
        ids, labels = (torch.from_numpy(np.asarray(rows[name]).astype(np.int64)) for name in ("input_ids", "labels"))
        positions, _ = predicted_positions(labels)
        targets = self.read_targets(windows)
        return [ids, torch.nn.functional.pad(positions, (0, len(targets[0]) - len(positions))), *targets]

    def rows(self, input_ids: Tensor, positions: Tensor, *targets: Tensor) -> Rows:
        """Run the base: `Rows` from what `read` returned."""
        batches = (ids.to(self.device, non_blocking=True) for ids in input_ids.split(self.batch_size))
        hidden = torch.cat([hidden_states(self.base, ids, layer_position=self.layer_position) for ids in batches])
        hidden = hidden.flatten(0, 1)[positions.to(hidden.device, non_blocking=True)]  # (rows, hidden)
        return Rows(hidden.half() if self.round_to_half else hidden, *targets)

    def open_validation(self, arguments: TrainerArguments, dim: int, processes: int) -> Validation | None:
        """The rows of --validation_dstore_path, else --validation_split_name scored by the base and kept in float16."""
        split, batch_size = arguments.validation_split_name, arguments.per_device_eval_batch_size
        if arguments.validation_dstore_path or split == "none":
            return super().open_validation(arguments, dim, processes)
        if not (Path(str(arguments.dataset_name)) / split).is_dir():
            say(f"--validation_split_name {split}: the windows have no such split; no validation during training")
            return None
        windows = load_windows(arguments.dataset_name, split, arguments.max_eval_samples)
        batches = Scorer(self.base, self.layer_position).batches(windows, batch_size)
        scored = [(hidden.half().cpu(), log_probs.cpu(), labels) for hidden, log_probs, labels in batches]
        check_finite(self.base, *(log_probs for _, log_probs, _ in scored))
        return Validation(lambda: scored, math.ceil(math.ceil(len(windows) / batch_size) / processes), dim)
