"""The rows of the online trainer: their hidden states come from the frozen base, in the loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from models.capture import hidden_states
from training.arguments import TrainerArguments
from training.rows import Rows, WindowRows
from utils.evaluation import predicted_positions
from utils.loading import model_fingerprint


class OnlineRows(WindowRows):
    """Rows whose hidden states the frozen `base` computes when they are needed, `batch_size` windows at a time.

    `round_to_half` rounds them to float16, as a datastore does.
    """

    def __init__(
        self, windows: Any, config: Any, arguments: TrainerArguments, base: Any, batch_size: int, round_to_half: bool
    ) -> None:
        super().__init__(windows, config, arguments)
        self.base, self.batch_size, self.round_to_half = base, batch_size, round_to_half
        self.device = base.get_input_embeddings().weight.device

    def read(self, windows: np.ndarray) -> Any:
        rows = self.windows[np.asarray(windows)]
        return (np.asarray(rows["input_ids"]), np.asarray(rows["labels"])), self.read_targets(windows)

    def rows(self, read: Any) -> Rows:
        (input_ids, labels), targets = read
        mask, _ = predicted_positions(torch.from_numpy(labels))
        pieces = []
        with torch.no_grad():
            for start in range(0, len(input_ids), self.batch_size):
                ids = torch.from_numpy(input_ids[start : start + self.batch_size]).to(self.device, torch.int64)
                hidden = hidden_states(self.base, ids, layer_position=self.layer_position)
                pieces.append(hidden[mask[start : start + self.batch_size].to(hidden.device)])  # (rows, hidden)
        hidden = torch.cat(pieces)
        return Rows.of(hidden.half() if self.round_to_half else hidden, targets)

    def origin(self) -> str:
        return str(self.base.config.name_or_path)

    def identity(self) -> dict[str, Any]:
        rounded = {"rounded": True} if self.round_to_half else {}
        return super().identity() | {"model": model_fingerprint(self.base)} | rounded
