"""What a step trains on: rows with their kNN targets, where they come from, and the order of the windows.

Knows nothing of models, losses or optimizers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass
class Rows:
    """Rows of one process's share of a step.

    hidden (n, dim) float16 or float32, label (n,) int32, id_cnt (n,) int32; token_id and prob hold the targets'
    entries of all rows end to end (int32 and float16).
    """

    hidden: Tensor
    label: Tensor
    id_cnt: Tensor
    token_id: Tensor
    prob: Tensor

    def slices(self, size: int) -> Iterator[Rows]:
        """Consecutive pieces of at most `size` rows."""
        ends = torch.cumsum(self.id_cnt, 0, dtype=torch.int64)
        for start in range(0, len(self.label), size):
            stop = min(start + size, len(self.label))
            low = int(ends[start - 1]) if start else 0
            high = int(ends[stop - 1])
            yield Rows(
                self.hidden[start:stop],
                self.label[start:stop],
                self.id_cnt[start:stop],
                self.token_id[low:high],
                self.prob[low:high],
            )

    def to(self, device: torch.device) -> Rows:
        return Rows(*(getattr(self, name).to(device, non_blocking=True) for name in self.__dataclass_fields__))


class RowSource(Protocol):
    """Where a trainer's rows come from."""

    def window_rows(self) -> np.ndarray:
        """(windows,) int64: the number of rows of each window."""

    def read(self, windows: np.ndarray) -> Any:
        """Read what `windows` (their numbers, in order) need from disk; runs in a background thread."""

    def rows(self, read: Any) -> Rows:
        """Turn what `read` returned into rows on any device; runs in the main thread."""

    def where(self, windows: np.ndarray) -> str:
        """Names the files and windows, for messages about bad values."""


def epoch_order(windows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the windows in an epoch: a permutation that depends on the seed and the epoch alone."""
    return np.random.default_rng((seed, epoch)).permutation(windows)
