"""What a step trains on: rows with their kNN targets, which come from disk. Their hidden states come from a datastore
(offline) or from the frozen base in the loop (online). Before training all is compared with the windows' labels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knn_utils.datastore import Datastore, KNNTargets, check_belongs
from training.arguments import TrainerArguments
from utils.errors import InputError
from utils.evaluation import count_rows, predicted_positions

CHECKED_WINDOWS = 2048
# Rows that go through the stack at once: what keeps activations small on a CPU, a GPU busy where they fit its memory.
CPU_ROWS, GPU_ROWS = 1024, 16384
# What a pass keeps of a row, in units of what its products read and write: at most so much (GPT-2's GELU, in steps).
KEPT, HEAD_BYTES = 2.5, 1 << 30


@dataclass
class Rows:
    """Rows of one process's share of a step.

    hidden (n, dim) float16 or float32, label (n,) int32, id_cnt (n,) int32; token_id and prob hold the targets'
    entries of all rows end to end (int32 and float16). All but `hidden` lie on the CPU, where the loss checks them.
    """

    hidden: Tensor
    label: Tensor
    id_cnt: Tensor
    token_id: Tensor
    prob: Tensor

    @classmethod
    def without_target(cls, hidden: Tensor, label: Tensor) -> Rows:
        none = torch.zeros(0, dtype=torch.int32, device=label.device)
        return cls(hidden, label, torch.zeros_like(label), none, none.half())

    def slices(self, size: int) -> Iterator[Rows]:
        """Consecutive pieces of at most `size` rows."""
        ends = torch.cumsum(self.id_cnt, 0, dtype=torch.int64)
        for start in range(0, len(self.label), size):
            stop = min(start + size, len(self.label))
            entries = slice(int(ends[start - 1]) if start else 0, int(ends[stop - 1]))
            whole = (tensor[start:stop] for tensor in (self.hidden, self.label, self.id_cnt))
            yield Rows(*whole, self.token_id[entries], self.prob[entries])


def rows_at_once(memory: Any, accelerator: Any) -> int:
    """Rows to go through `memory` at once, the same on all processes: on a GPU GPU_ROWS, or as much of them, halved and
    halved again, as fits what is free beside gradients, AdamW's moments and the copies of weights in half precision."""
    if accelerator.device.type != "cuda":
        return CPU_ROWS
    processes, sharded = accelerator.num_processes, accelerator.distributed_type == "FSDP"
    size, copies = (4, 0) if accelerator.mixed_precision == "no" else (2, 2)  # bytes of a number
    head, weights = memory.lm_head.weight, [weight for weight in memory.parameters() if weight.ndim == 2]
    of_weight = copies + (12 / processes if sharded else 12 if processes == 1 else 16)  # DDP buffers gradients
    row = KEPT * size * sum(sum(weight.shape) for weight in weights if weight is not head) + 8 * head.shape[1]
    free = torch.cuda.mem_get_info(accelerator.device)[0] - sum(weight.numel() for weight in weights) * of_weight
    room = free - HEAD_BYTES - 6 * head.numel()  # the loss's chunk of logits, and its own gradient and copy of the head
    rows = next((GPU_ROWS >> half for half in range(4) if (GPU_ROWS >> half) * row <= room), CPU_ROWS)
    return int(accelerator.gather(torch.tensor([rows], device=accelerator.device)).min())


@functools.lru_cache(maxsize=2)
def epoch_order(windows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the windows in an epoch: a permutation that depends on the seed and the epoch alone."""
    return np.random.default_rng((seed, epoch)).permutation(windows)


class WindowRows:
    """The rows of windows, by window number: kNN targets, and hidden states from where a subclass takes them.

    Its `read(windows)` gives what windows (their numbers, in order) need from disk, as tensors, in a background thread;
    `rows` makes `Rows` of them in the main thread; `origin` names the file or model of the hidden states.

    Args:
        windows: a split as `load_windows` gives it.
        config: the memory's; targets may name no token beyond its vocabulary.

    Raises:
        InputError: targets of other windows or of another block.
    """

    rows: Callable[..., Rows] = Rows

    def __init__(self, windows: Any, config: Any, arguments: TrainerArguments) -> None:
        self.windows, self.vocabulary, self.layer_position = windows, config.vocab_size, arguments.layer_position
        self.targets = KNNTargets.open(arguments.knn_save_path)
        self.counts = count_rows(windows)  # (windows,)
        self.ends = np.cumsum(self.counts)
        check_belongs(self.targets, rows=int(self.ends[-1]), layer_position=self.layer_position)
        self.check_labels(self.targets.path, self.targets.labels)

    def check_labels(self, path: object, read: Callable[[int, int], np.ndarray]) -> None:
        """Compare the windows' labels with what `read(start, stop)` gives for the same rows.

        Raises InputError naming the first row that differs.
        """
        for first in range(0, len(self.counts), CHECKED_WINDOWS):
            last = min(first + CHECKED_WINDOWS, len(self.counts))
            start, stop = self.range_of(first)[0], self.range_of(last - 1)[1]
            labels = torch.from_numpy(np.asarray(self.windows[first:last]["labels"]))  # (windows, time)
            mine, theirs = predicted_positions(labels)[1].numpy(), read(start, stop)
            if len(mine) != len(theirs):
                raise InputError(f"windows {first} to {last - 1}: labels do not agree with their dstore_range")
            if len(differ := np.flatnonzero(mine != theirs)):
                raise InputError(
                    f"{path}: row {start + int(differ[0])} has label {int(theirs[differ[0]])}, but the windows have "
                    f"{int(mine[differ[0]])} ({len(differ)} of rows {start} to {stop - 1} differ); "
                    "they were made from other windows"
                )

    def range_of(self, window: int) -> tuple[int, int]:
        """First and past-last row of a window."""
        return int(self.ends[window] - self.counts[window]), int(self.ends[window])

    def read_targets(self, windows: np.ndarray) -> list[Tensor]:
        """label, id_cnt, token_id and prob of `windows`, laid end to end, as in `Rows`.

        Raises InputError for token ids beyond the vocabulary.
        """
        pieces = [self.targets.read(*self.range_of(window)) for window in windows]
        names = ("label", "id_cnt", "token_id", "prob")
        arrays = [np.concatenate([getattr(piece, name) for piece in pieces]) for name in names]
        ids = arrays[2]
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocabulary:
            raise InputError(
                f"--knn_save_path {self.targets.path}: holds token id {ids.max()}, but the memory's vocabulary has "
                f"{self.vocabulary} tokens; teacher and student need the same tokenizer"
            )
        return [torch.from_numpy(array) for array in arrays]

    def where(self, windows: np.ndarray) -> str:
        """Names files and windows, for messages about bad values."""
        names = ", ".join(str(window) for window in windows[:4]) + (", …" if len(windows) > 4 else "")
        return f"windows {names} ({self.origin()} and {self.targets.path})"

    def identity(self) -> dict[str, Any]:
        """What the rows are; a run can only be continued on the same."""
        return {"targets": self.targets.settings}


class OfflineRows(WindowRows):
    """Rows whose hidden states are read from the student's own datastore."""

    def __init__(self, windows: Any, config: Any, arguments: TrainerArguments, dstore_path: str) -> None:
        super().__init__(windows, config, arguments)
        self.datastore = Datastore.open(dstore_path)
        check_belongs(self.datastore, rows=int(self.ends[-1]), dim=config.hidden_size)
        self.check_labels(dstore_path, self.datastore.vals)
        check_belongs(self.datastore, base=arguments)

    def read(self, windows: np.ndarray) -> list[Tensor]:
        keys = [self.datastore.keys(*self.range_of(window)) for window in windows]
        return [torch.from_numpy(np.concatenate(keys)), *self.read_targets(windows)]

    def origin(self) -> str:
        return str(self.datastore.path)

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"model": self.datastore.settings.get("model", self.origin())}
