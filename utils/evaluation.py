"""Perplexity: batches of windows, log-probabilities of their labels, and the sums of the mixtures that are scored.

Every token counts once, on any number of processes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.mixture import fixed_log_weights, log_mixture

PRODUCT_BYTES, GPU_PRODUCT_BYTES = 64 << 20, 512 << 20  # logits of one matrix product on a CPU, on a GPU
CACHED_BYTES = 4 << 20  # the part of them that stays in a core's cache while it is read several times


def block_rows(device: torch.device, row_bytes: int) -> int:
    """How many rows of `row_bytes` each are computed at a time on `device`."""
    return max(1, (PRODUCT_BYTES if device.type == "cpu" else GPU_PRODUCT_BYTES) // row_bytes)


def label_log_probabilities(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperatures: Sequence[float] = (1.0,)
) -> Tensor:
    """Log-probabilities (rows, temperatures) float32 of labels (rows,) int64 under softmax(hidden @ weight.T / T).

    `hidden` (rows, hidden) of any float dtype, `weight` (V, hidden): the head, each T above 0.
    """
    hidden = hidden.to(weight)
    return by_blocks(lambda rows: hidden[rows] @ weight.t(), weight.shape[0], labels, temperatures)


def by_blocks(
    logits_of: Callable[[slice], Tensor], vocabulary: int, labels: Tensor, temperatures: Sequence[float]
) -> Tensor:
    """(rows, T) float32 as in `temperature_grid`, never holding more than a block of logits."""
    block = block_rows(labels.device, 4 * vocabulary)
    cached = max(1, CACHED_BYTES // (4 * vocabulary)) if labels.device.type == "cpu" else block
    scored = []
    for start in range(0, len(labels) or 1, block):  # no label: one empty block
        rows = slice(start, start + block)
        logits = logits_of(rows)  # (block, V)
        pairs = zip(logits.split(cached), labels[rows].to(logits.device).split(cached), strict=True)
        scored += [temperature_grid(*pair, temperatures) for pair in pairs]
    return torch.cat(scored)


def temperature_grid(logits: Tensor, labels: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Label log-probabilities (rows, T) of `logits` (rows, V) divided by each temperature; float32."""
    logits = logits.float()
    shifted = logits - logits.amax(-1, keepdim=True)
    chosen = shifted.gather(-1, labels[:, None]).squeeze(-1)  # (rows,)
    columns, buffer = [], torch.empty_like(shifted)
    for temperature in temperatures:
        total = torch.mul(shifted, 1.0 / temperature, out=buffer).exp_().sum(-1)
        columns.append(chosen / temperature - total.log())
    return torch.stack(columns, dim=-1)


class MixtureScore:
    """Summed log-likelihoods of the base, of a grid of fixed mixtures, and of one with adaptive lambda.

    `temperature_name`: the temperature's name in results, memory_temp or knn_temp.
    """

    def __init__(
        self,
        lmbda: Sequence[float | Sequence[float]],
        temperatures: Sequence[float],
        temperature_name: str = "memory_temp",
    ) -> None:
        self.lmbda, self.temperatures, self.temperature_name = list(lmbda), list(temperatures), temperature_name
        # Tokens, the base, the adaptive mixture, its lambdas; then the grid, lambda by lambda.
        self.sums = torch.zeros(4 + len(self.lmbda) * len(self.temperatures), dtype=torch.float64)

    def add(self, base: Tensor, *others: Tensor) -> None:
        """Add rows: the labels' log-probabilities under the base (rows,) and under each of what is mixed in
        (rows, temperatures)."""
        base = base.double()
        self.sums = self.sums.to(base.device, non_blocking=True)  # a GPU keeps them until the end
        self.sums[0] += len(base)
        self.sums[1] += base.sum()
        if others and self.lmbda:
            mixed = base[:, None], *(other.to(base.device, non_blocking=True).double() for other in others)
            weights = (fixed_log_weights(value, len(others)) for value in self.lmbda)
            self.sums[4:] += torch.cat([log_mixture(mixed, each).sum(0) for each in weights])

    def add_adaptive(self, log_likelihoods: Tensor, lmbda: Tensor) -> None:
        """Add rows of the adaptive mixture: the labels' log-probabilities under it (rows,), and the weights of what is
        mixed in (rows,) or (rows, memories)."""
        self.sums[2:4] += torch.stack([log_likelihoods.double().sum(), lmbda.double().sum()]).to(self.sums.device)

    def reduce(self) -> None:
        """Add up the sums of all processes (a collective call)."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            total = self.sums.to("cuda" if torch.distributed.get_backend() == "nccl" else "cpu")
            torch.distributed.all_reduce(total)
            self.sums = total
        self.sums = self.sums.cpu()

    @property
    def tokens(self) -> Tensor:
        return self.sums[0]

    def base_perplexity(self) -> float:
        return self._perplexity(self.sums[1])

    def adaptive(self) -> dict[str, float]:
        """Perplexity and mean lambda of the adaptive mixture."""
        return {"perplexity": self._perplexity(self.sums[2]), "mean_lambda": (self.sums[3] / self.tokens).item()}

    def grid(self) -> list[dict[str, float]]:
        """One row for each fixed mixture: lmbda, temperature, perplexity."""
        mixtures = itertools.product(self.lmbda, self.temperatures)
        return [
            {"lmbda": value, self.temperature_name: temperature, "perplexity": self._perplexity(total)}
            for (value, temperature), total in zip(mixtures, self.sums[4:], strict=True)
        ]

    def _perplexity(self, total: Tensor) -> float:
        return (total / self.tokens).neg().exp().item()  # infinite where it overflows


def rounded(count: int) -> int:
    """`count`, rounded up to one of a few sizes: a multiple of 128, or one of four below each smaller power of two.

    For each shape of a product in bfloat16, oneDNN compiles and keeps code, a megabyte or more.
    """
    step = min(max(8, 1 << count.bit_length() >> 3), 128)
    return -(-count // step) * step


def used_width(labels: np.ndarray | Tensor) -> int:
    """The `rounded` number of columns of labels (batch, time) up to the last one with a label."""
    used = np.flatnonzero((np.asarray(labels) != -100).any(0))
    return rounded(int(used[-1]) + 1 if len(used) else 1)


def window_batches(
    windows: Any, batch_size: int, *, process_index: int = 0, num_processes: int = 1
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Batches of windows without most of the padding at their end; batch b goes to process b mod N.

    Yields (first window's number, {"input_ids": (batch, time), "labels": (batch, time)}), int64.
    """
    for start in range(0, len(windows), batch_size)[process_index::num_processes]:
        rows = windows[start : start + batch_size]
        width = used_width(rows["labels"])
        names = ("input_ids", "labels")
        yield start, {name: torch.from_numpy(rows[name][:, :width].astype(np.int64)) for name in names}


def predicted_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The positions t whose label at t+1 counts, as numbers (rows,) in batch · time, and these labels (rows,), both int64.

    `labels`: (batch, time), -100 where there is none. Numbers, since a mask makes the host wait for a GPU to count it.
    """
    counted = labels[:, 1:] != -100
    return torch.nn.functional.pad(counted, (0, 1)).flatten().nonzero()[:, 0], labels[:, 1:][counted]


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a CPU tensor on `device`; the host does not wait for a GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def fetch(tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Start to copy tensors to the CPU; the function that is returned waits for the copies, and for nothing after them."""
    copies, events = [each.to("cpu", non_blocking=True) for each in tensors], []
    for device in {each.device for each in tensors if each.device.type == "cuda"}:
        events.append(torch.cuda.Event())
        events[-1].record(torch.cuda.current_stream(device))

    def arrived() -> list[Tensor]:
        for event in events:
            event.synchronize()
        return copies

    return arrived


def count_rows(windows: Any) -> np.ndarray:
    """(windows,) int64: datastore rows of each window, from its `dstore_range`."""
    ranges = np.asarray(windows["dstore_range"][:], dtype=np.int64).reshape(-1, 2)
    return ranges[:, 1] - ranges[:, 0]
