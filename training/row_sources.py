"""Where a trainer's rows come from: a stored datastore (offline), or the frozen base in the loop (online).

The kNN targets come from disk either way. Both check, before training, that targets, windows and datastore
belong together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from knn_utils.datastore import Datastore, KNNTargets, TargetRows, check_belongs
from training.rows import Rows
from utils.errors import InputError
from utils.evaluation import count_rows, predicted_positions, window_values
from utils.loading import model_fingerprint

CHECKED_ROWS = 1 << 22


def check_values(windows: Any, row_counts: np.ndarray, path: object, read: Any) -> None:
    """Compare the windows' values with what `read(start, stop)` gives for the same rows.

    Raises InputError naming the first row that differs.
    """
    ends = np.cumsum(row_counts)
    for first in range(0, len(row_counts), 2048):
        last = min(first + 2048, len(row_counts))
        start, stop = int(ends[first] - row_counts[first]), int(ends[last - 1])
        mine, theirs = window_values(windows, first, last), read(start, stop)
        if len(mine) != len(theirs):
            raise InputError(f"windows {first} to {last - 1}: labels do not agree with their dstore_range")
        if not np.array_equal(mine, theirs):
            differ = np.flatnonzero(mine != theirs)
            raise InputError(
                f"{path}: row {start + int(differ[0])} has label {int(theirs[differ[0]])}, but the windows have "
                f"{int(mine[differ[0]])} ({len(differ)} of rows {start} to {stop - 1} differ); "
                "they were made from other windows"
            )


class _Targets:
    """The part that both sources share: kNN targets of windows, by row ranges."""

    def __init__(self, windows: Any, targets_path: str | Path, vocabulary: int, layer_position: int) -> None:
        self.windows = windows
        self.targets = KNNTargets.open(targets_path)
        self.targets_path = targets_path
        self.vocabulary = vocabulary
        self.counts = count_rows(windows)
        self.ends = np.cumsum(self.counts)
        check_belongs(self.targets, rows=int(self.counts.sum()), layer_position=layer_position)
        check_values(windows, self.counts, targets_path, self.targets.labels)

    def window_rows(self) -> np.ndarray:
        return self.counts

    def range_of(self, window: int) -> tuple[int, int]:
        return int(self.ends[window] - self.counts[window]), int(self.ends[window])

    def read_targets(self, windows: np.ndarray) -> TargetRows:
        """Targets of `windows`, laid end to end. Raises InputError for token ids beyond the vocabulary."""
        pieces = [self.targets.read(*self.range_of(window)) for window in windows]
        joined = {
            name: np.concatenate([getattr(piece, name) for piece in pieces])
            for name in ("id_cnt", "token_id", "prob", "label")
        }
        if len(joined["token_id"]) and not (
            joined["token_id"].min() >= 0 and joined["token_id"].max() < self.vocabulary
        ):
            raise InputError(
                f"--knn_save_path {self.targets_path}: holds token id {joined['token_id'].max()}, but the memory's "
                f"vocabulary has {self.vocabulary} tokens; teacher and student need the same tokenizer"
            )
        return TargetRows(distance=None, **joined)

    def where(self, windows: np.ndarray) -> str:
        names = ", ".join(str(window) for window in windows[:4]) + (", …" if len(windows) > 4 else "")
        return f"windows {names} ({self.origin()} and {self.targets_path})"

    def origin(self) -> str:
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """What the rows are; a run can only be continued on the same."""
        return {"targets": self.targets.settings}


def make_rows(hidden: torch.Tensor, targets: TargetRows) -> Rows:
    """Rows from hidden states (n, dim) and their targets, sharing memory with the arrays."""
    return Rows(
        hidden,
        torch.from_numpy(targets.label),
        torch.from_numpy(targets.id_cnt),
        torch.from_numpy(targets.token_id),
        torch.from_numpy(targets.prob),
    )


class OfflineRows(_Targets):
    """Rows whose hidden states are read from the student's own datastore."""

    def __init__(
        self,
        windows: Any,
        targets_path: str | Path,
        dstore_path: str | Path,
        *,
        vocabulary: int,
        dim: int,
        layer_position: int,
    ) -> None:
        super().__init__(windows, targets_path, vocabulary, layer_position)
        self.datastore = Datastore.open(dstore_path)
        self.dstore_path = dstore_path
        check_belongs(self.datastore, rows=int(self.counts.sum()), dim=dim, layer_position=layer_position)
        check_values(windows, self.counts, dstore_path, self.datastore.vals)

    def read(self, windows: np.ndarray) -> Any:
        keys = [self.datastore.keys(*self.range_of(window)) for window in windows]
        return np.concatenate(keys), self.read_targets(windows)

    def rows(self, read: Any) -> Rows:
        keys, targets = read
        return make_rows(torch.from_numpy(keys), targets)

    def origin(self) -> str:
        return str(self.dstore_path)

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"model": self.datastore.settings.get("model", str(self.dstore_path))}


class OnlineRows(_Targets):
    """Rows whose hidden states the frozen base computes when they are needed.

    Args:
        round_to_half: round the states to float16, as a datastore does.
    """

    def __init__(
        self,
        windows: Any,
        targets_path: str | Path,
        base: Any,
        *,
        vocabulary: int,
        layer_position: int,
        batch_size: int,
        round_to_half: bool = False,
        source_name: str = "the base model",
    ) -> None:
        super().__init__(windows, targets_path, vocabulary, layer_position)
        self.base, self.layer_position = base, layer_position
        self.batch_size, self.round_to_half = batch_size, round_to_half
        self.source_name = source_name
        self.device = base.get_input_embeddings().weight.device

    def read(self, windows: np.ndarray) -> Any:
        rows = self.windows[np.asarray(windows)]
        return (np.asarray(rows["input_ids"]), np.asarray(rows["labels"])), self.read_targets(windows)

    def rows(self, read: Any) -> Rows:
        from models.capture import hidden_states

        (input_ids, labels), targets = read
        mask, _ = predicted_positions(torch.from_numpy(labels))
        pieces = []
        with torch.no_grad():
            for start in range(0, len(input_ids), self.batch_size):
                ids = torch.from_numpy(input_ids[start : start + self.batch_size]).to(self.device, torch.int64)
                hidden = hidden_states(self.base, ids, layer_position=self.layer_position)
                pieces.append(hidden[mask[start : start + self.batch_size].to(self.device)])  # (rows, hidden)
        hidden = torch.cat(pieces)
        return make_rows(hidden.half() if self.round_to_half else hidden, targets)

    def origin(self) -> str:
        return self.source_name

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"model": model_fingerprint(self.base)}
