"""Perplexity of mixtures: base alone, base + memory, base + kNN, for grids of lambda and temperature in one pass.

Every token counts once, on any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from utils.errors import InputError

PRODUCT_BYTES, GPU_PRODUCT_BYTES = 64 << 20, 512 << 20  # logits of one product on a CPU, on a GPU
MOST_SHARED = 0.2  # so much of a validation text in the corpus is no chance
TABLE_TOKENS = 4 << 20  # tokens in one Arrow record batch of windows
CACHED_BYTES = 4 << 20  # of these, what stays in a core's cache while it is read several times


def label_log_probabilities(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperatures: Sequence[float] = (1.0,)
) -> Tensor:
    """Log-probability of each row's label under softmax(hidden @ weight.T / T), for several T at once.

    Args:
        hidden: (rows, hidden), any float dtype.
        weight: (V, hidden), the head.
        labels: (rows,), int64 in [0, V).
        temperatures: the T values, each above 0.

    Returns:
        (rows, len(temperatures)) float32. The arithmetic after the product is float32.
    """
    hidden = hidden.to(weight.dtype)
    return _by_blocks(lambda rows: hidden[rows] @ weight.t(), weight.shape[0], labels, temperatures)


def _by_blocks(
    logits_of: Callable[[slice], Tensor], vocabulary: int, labels: Tensor, temperatures: Sequence[float]
) -> Tensor:
    """(rows, T) float32 as `temperature_grid` has it, never holding more than a block of logits."""
    out = torch.empty(len(labels), len(temperatures), dtype=torch.float32, device=labels.device)
    on_cpu = labels.device.type == "cpu"
    block = max(1, (PRODUCT_BYTES if on_cpu else GPU_PRODUCT_BYTES) // (4 * vocabulary))
    piece = max(1, CACHED_BYTES // (4 * vocabulary)) if on_cpu else block
    for start in range(0, len(labels), block):
        logits = logits_of(slice(start, start + block))  # (block, V)
        for begin in range(0, len(logits), piece):
            rows = slice(start + begin, start + min(begin + piece, len(logits)))
            out[rows] = temperature_grid(logits[begin : begin + piece], labels[rows].to(logits.device), temperatures)
    return out


def temperature_grid(logits: Tensor, labels: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Label log-probabilities (rows, T) of `logits` (rows, V) divided by each temperature; float32."""
    logits = logits.float()
    top = logits.amax(-1, keepdim=True)  # (rows, 1)
    shifted = logits - top
    chosen = shifted.gather(-1, labels[:, None]).squeeze(-1)  # (rows,)
    columns = []
    buffer = torch.empty_like(shifted)
    for temperature in temperatures:
        if temperature == 1.0:
            torch.exp(shifted, out=buffer)
        else:
            torch.mul(shifted, 1.0 / temperature, out=buffer).exp_()
        columns.append(chosen / temperature - buffer.sum(-1).log())
    return torch.stack(columns, dim=-1)


class MixtureScore:
    """Running sums, over rows, of log((1-lambda)·p_base + lambda·p_other) for a grid of lambda and temperature.

    `sums` (lambdas, temperatures), `base` and `tokens` (1,) are float64.
    """

    def __init__(self, lmbda: Sequence[float], knn_temp: Sequence[float]) -> None:
        self.lmbda, self.knn_temp = list(lmbda), list(knn_temp)
        self.sums = torch.zeros(len(self.lmbda), len(self.knn_temp), dtype=torch.float64)
        self.base = torch.zeros(1, dtype=torch.float64)
        self.tokens = torch.zeros(1, dtype=torch.float64)

    def add(self, base: Tensor, other: Tensor | None, *, other_is_probability: bool = False) -> None:
        """Add rows: the labels' log-probabilities under the base, `base` (rows,), and under what is mixed in, `other`
        (rows, temperatures), log-probabilities or probabilities; None where only the base is scored."""
        base = base.double().cpu()
        self.base += base.sum()
        self.tokens += base.numel()
        if other is None:
            return
        other = other.double().cpu()
        other = other.log() if other_is_probability else other
        for number, value in enumerate(self.lmbda):
            keep, add = (math.log(share) if share else -math.inf for share in (1 - value, value))
            self.sums[number] += torch.logaddexp(base[:, None] + keep, other + add).sum(0)

    def reduce(self) -> None:
        """Add up the sums of all processes."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
            for name in ("sums", "base", "tokens"):
                total = getattr(self, name).to(device)
                torch.distributed.all_reduce(total)
                setattr(self, name, total.cpu())

    def base_perplexity(self) -> float:
        return _perplexity(self.base / self.tokens)

    def grid(self) -> list[dict[str, float]]:
        """One row for each combination: lmbda, knn_temp, perplexity."""
        return [
            {"lmbda": value, "knn_temp": temperature, "perplexity": _perplexity(self.sums[i, j] / self.tokens)}
            for i, value in enumerate(self.lmbda)
            for j, temperature in enumerate(self.knn_temp)
        ]


def _perplexity(mean_log_likelihood: Tensor) -> float:
    return mean_log_likelihood.neg().exp().item()  # infinite where it overflows


def window_batches(
    windows: Any, batch_size: int, *, process_index: int = 0, num_processes: int = 1
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Batches of windows in order, without the padding that ends all of a batch; batch b goes to process b mod N.

    Yields (number of the first window, {"input_ids": (batch, time), "labels": (batch, time)}), int64.
    Batch boundaries follow the global window number, whatever the number of processes.
    """
    for start in range(0, len(windows), batch_size)[process_index::num_processes]:
        rows = windows[start : start + batch_size]
        used = np.flatnonzero((rows["labels"] != -100).any(0))  # columns
        width = used[-1] + 1 if len(used) else 1
        yield (
            start,
            {name: torch.from_numpy(rows[name][:, :width].astype(np.int64)) for name in ("input_ids", "labels")},
        )


def predicted_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where a next token is to be predicted, and which.

    Args:
        labels: (batch, time), -100 where there is none.

    Returns:
        a boolean mask (batch, time) over positions t whose label at t+1 counts, and the values (rows,) int64.
    """
    shifted = labels[:, 1:]  # (batch, time - 1)
    counted = shifted != -100
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = counted
    return mask, shifted[counted]


def own_batches(windows: Any, batch_size: int, description: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """This process's `window_batches` that predict anything, behind a progress bar.

    Yields token ids (batch, time), and positions (batch, time) and labels (rows,) as `predicted_positions` has them.
    """
    from accelerate import PartialState

    state = PartialState()
    share = {"process_index": state.process_index, "num_processes": state.num_processes}
    total = len(range(state.process_index * batch_size, len(windows), state.num_processes * batch_size))
    silent = None if state.is_main_process else True
    batches = window_batches(windows, batch_size, **share)
    for _, batch in tqdm(batches, total=total, desc=description, unit="batch", disable=silent):
        positions, labels = predicted_positions(batch["labels"])
        if labels.numel():
            yield batch["input_ids"], positions, labels


def count_rows(windows: Any) -> np.ndarray:
    """(windows,) int64: datastore rows of each window, from its `dstore_range`. Raises InputError where one jumps."""
    ranges = np.asarray(windows["dstore_range"][:], dtype=np.int64).reshape(-1, 2)
    wrong = (ranges[:, 0] != np.concatenate([[0], ranges[:-1, 1]])) | (ranges[:, 1] < ranges[:, 0])
    if wrong.any():
        bad = int(np.argmax(wrong))
        raise InputError(
            f"--dataset_name: window {bad} has the dstore_range {ranges[bad].tolist()}, which does not follow the window "
            "before it; make the windows again"
        )
    return ranges[:, 1] - ranges[:, 0]


def check_token_ids(windows: Any, vocabulary: int, path: object) -> None:
    """Refuse windows whose token ids lie outside a model's vocabulary. Raises InputError naming the window."""
    import pyarrow.compute as pc

    for number, table in enumerate(windows.with_format("arrow").iter(1000)):
        ids = pc.list_flatten(table.column("input_ids"))
        bounds = pc.min_max(ids).as_py()
        if len(ids) and (bounds["min"] < 0 or bounds["max"] >= vocabulary):
            values = ids.to_numpy()
            bad = int(np.argmax((values < 0) | (values >= vocabulary)))
            raise InputError(
                f"--dataset_name {path}: window {1000 * number + bad * len(table) // len(values)} holds token id "
                f"{values[bad]}, but the model's vocabulary has {vocabulary} tokens; make the windows with this "
                "model's tokenizer"
            )


class Scorer:
    """One pass of a base over windows: the labels' log-probabilities, and the states captured at `layer_position`."""

    def __init__(self, base: Any, layer_position: int = -1) -> None:
        from models.capture import decoder_blocks

        self.base, self.layer_position = base, layer_position
        self.device = base.get_input_embeddings().weight.device
        decoder_blocks(base)

    def score(self, input_ids: Tensor, positions: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Captured hidden states (rows, hidden) and base log-probabilities (rows,) of `labels` (rows,)."""
        from models.capture import base_logits, hidden_and_head_input

        base, ids, positions = self.base, input_ids.to(self.device), positions.to(self.device)
        captured, final = hidden_and_head_input(base, ids, positions, self.layer_position)  # (rows, hidden) each
        labels = labels.to(final.device)
        scored = _by_blocks(lambda rows: base_logits(base, final[rows]), base.config.vocab_size, labels, (1.0,))
        return captured, scored[:, 0]

    @torch.inference_mode()
    def batches(self, windows: Any, batch_size: int, description: str = "evaluate") -> Iterator[tuple[Tensor, ...]]:
        """This process's (captured hidden states (rows, hidden), base log-probabilities (rows,), labels (rows,))."""
        for ids, positions, labels in own_batches(windows, batch_size, description):
            yield *self.score(ids, positions, labels), labels


def check_held_out(windows: Any, corpus: np.ndarray, told: str, kind: str) -> None:
    """Refuse windows whose text is part of the `kind` ("indexed", "trained") text with the tokens `corpus` (n,).

    Raises InputError that begins with `told`.
    """
    labels = np.concatenate(windows["labels"][:])
    if (shared := shared_runs(labels[labels >= 0], corpus)) > MOST_SHARED:
        raise InputError(
            f"{told}: is part of the {kind} text ({shared:.0%} of its runs of 16 tokens stand there); choose on "
            "validation text that is not in it"
        )


def shared_runs(tokens: np.ndarray, other: np.ndarray, length: int = 16, at_most: int = 4096) -> float:
    """Which share of the runs of `length` tokens of `tokens` (n,) stand in `other` (m,), too; 0 where there is no run.

    It tells a text that is part of another, whatever windows they are cut into, from one that is not. `at_most`: runs
    that are looked at, evenly spread.
    """
    if min(len(tokens), len(other)) < length:
        return 0.0
    starts = np.linspace(0, len(tokens) - length, min(at_most, len(tokens) - length + 1)).astype(np.int64)
    wanted, counts = np.unique(_run_hashes(tokens, length)[starts], return_counts=True)
    stands = np.zeros(len(wanted), bool)
    for start in range(0, len(other) - length + 1, TABLE_TOKENS):
        hashes = _run_hashes(other[start : start + TABLE_TOKENS + length - 1], length)
        place = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
        stands[place[wanted[place] == hashes]] = True
    return float(counts[stands].sum() / counts.sum())


def _run_hashes(tokens: np.ndarray, length: int) -> np.ndarray:
    """A number of 64 bits for each run of `length` tokens: (n,) -> (n - length + 1,) uint64."""
    tokens = np.asarray(tokens).astype(np.uint64)
    runs = len(tokens) - length + 1
    hashes = np.zeros(runs, np.uint64)
    for place in range(length):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + tokens[place : place + runs]
    return hashes
