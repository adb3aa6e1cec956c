"""The rows of the online trainer: their hidden states come from the frozen base, in the loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

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

    def read(self, windows: np.ndarray) -> list[Tensor]:
        rows = self.windows[np.asarray(windows)]
        ids, labels = (torch.from_numpy(np.asarray(rows[name]).astype(np.int64)) for name in ("input_ids", "labels"))
        # Positions by number, since a mask would make the host wait for how many a GPU finds in it.
        chosen = predicted_positions(labels)[0].flatten().nonzero()[:, 0]  # (rows,)
        return [ids, chosen, *self.read_targets(windows)]

    def rows(self, input_ids: Tensor, chosen: Tensor, *targets: Tensor) -> Rows:
        batches = (ids.to(self.device, non_blocking=True) for ids in input_ids.split(self.batch_size))
        hidden = torch.cat([hidden_states(self.base, ids, layer_position=self.layer_position) for ids in batches])
        hidden = hidden.flatten(0, 1)[chosen.to(hidden.device, non_blocking=True)]  # (rows, hidden)
        return Rows(hidden.half() if self.round_to_half else hidden, *targets)

    def origin(self) -> str:
        return str(self.base.config.name_or_path)

    def identity(self) -> dict[str, Any]:
        rounded = {"rounded": True} if self.round_to_half else {}
        return super().identity() | {"model": model_fingerprint(self.base)} | rounded
