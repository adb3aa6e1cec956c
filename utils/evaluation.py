"""Perplexity of mixtures: base alone, base + memory, base + kNN, for grids of lambda and temperature in one pass.

Every token counts once, on any number of processes.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from utils.errors import InputError
from utils.files import ensure_folder, read_json, write_json

PRODUCT_BYTES = 64 << 20  # logits of one product on a CPU
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


def base_label_log_probabilities(base: Any, final: Tensor, labels: Tensor) -> Tensor:
    """The base's log-probabilities (rows,) of `labels` from the input of its head (rows, hidden)."""
    from models.capture import base_logits

    labels = labels.to(final.device)
    return _by_blocks(lambda rows: base_logits(base, final[rows]), base.config.vocab_size, labels, (1.0,))[:, 0]


def _by_blocks(
    logits_of: Callable[[slice], Tensor], vocabulary: int, labels: Tensor, temperatures: Sequence[float]
) -> Tensor:
    """(rows, T) float32 as `temperature_grid` has it, never holding more than a block of logits."""
    out = torch.empty(len(labels), len(temperatures), dtype=torch.float32, device=labels.device)
    on_cpu = labels.device.type == "cpu"
    block = max(1, PRODUCT_BYTES // (4 * vocabulary)) if on_cpu else 4096
    piece = max(1, CACHED_BYTES // (4 * vocabulary)) if on_cpu else block
    for start in range(0, len(labels), block):
        logits = logits_of(slice(start, start + block))  # (block, V)
        for begin in range(0, len(logits), piece):
            rows = slice(start + begin, start + min(begin + piece, len(logits)))
            out[rows] = temperature_grid(logits[begin : begin + piece], labels[rows], temperatures)
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


def mixture_log_likelihood(
    base: Tensor, other: Tensor, lmbda: Sequence[float], *, other_is_probability: bool = False
) -> Tensor:
    """Sum over rows of log((1-lambda)·p_base + lambda·p_other), for each lambda and each column of `other`.

    Args:
        base: (rows,) log-probabilities of the labels under the base.
        other: (rows, T) log-probabilities (or probabilities) of the labels under the memory or the kNN.

    Returns:
        (len(lmbda), T) float64.
    """
    base, other = base.double()[:, None], other.double()
    if other_is_probability:
        other = other.log()
    sums = []
    for value in lmbda:
        keep = base + math.log1p(-value) if value < 1 else torch.full_like(base, -math.inf)
        add = other + math.log(value) if value > 0 else torch.full_like(other, -math.inf)
        sums.append(torch.logaddexp(keep, add).sum(0))
    return torch.stack(sums)


class MixtureScore:
    """Running sums of one mixture's log-likelihood over a grid of lambda and temperature."""

    def __init__(self, lmbda: Sequence[float], knn_temp: Sequence[float]) -> None:
        self.lmbda, self.knn_temp = list(lmbda), list(knn_temp)
        self.sums = torch.zeros(len(self.lmbda), len(self.knn_temp), dtype=torch.float64)
        self.base = torch.zeros(1, dtype=torch.float64)
        self.tokens = torch.zeros(1, dtype=torch.float64)

    def add(self, base: Tensor, other: Tensor | None, *, other_is_probability: bool = False) -> None:
        """Add rows: `base` (rows,) log-probabilities, `other` (rows, T) or None where only the base is scored."""
        if other is not None:
            self.sums += mixture_log_likelihood(
                base, other, self.lmbda, other_is_probability=other_is_probability
            ).cpu()
        self.base += base.double().sum().cpu()
        self.tokens += base.numel()

    def reduce(self) -> None:
        """Add up the sums of all processes."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
            for name in ("sums", "base", "tokens"):
                total = getattr(self, name).to(device)
                torch.distributed.all_reduce(total)
                setattr(self, name, total.cpu())

    def base_perplexity(self) -> float:
        return perplexity(-self.base.item() / self.tokens.item())

    def grid(self) -> list[dict[str, float]]:
        """One row for each combination: lmbda, knn_temp, perplexity."""
        mean = -(self.sums / self.tokens)
        return [
            {"lmbda": value, "knn_temp": temperature, "perplexity": perplexity(mean[i, j].item())}
            for i, value in enumerate(self.lmbda)
            for j, temperature in enumerate(self.knn_temp)
        ]

    def best(self) -> dict[str, float]:
        return min(self.grid(), key=lambda row: row["perplexity"])


def perplexity(mean_nll: float) -> float:
    """exp of a mean negative log-likelihood in nats; infinite where it overflows."""
    return math.exp(mean_nll) if mean_nll < 700 else math.inf


def window_batches(
    windows: Any, batch_size: int, *, process_index: int = 0, num_processes: int = 1
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Batches of windows in order, each on one process: batch b goes to process b mod N.

    Yields (number of the first window, {"input_ids": (batch, time), "labels": (batch, time)}), int64.
    Batch boundaries follow the global window number, whatever the number of processes.
    """
    for start in range(0, len(windows), batch_size)[process_index::num_processes]:
        rows = windows[start : start + batch_size]
        yield start, {name: torch.from_numpy(rows[name].astype(np.int64)) for name in ("input_ids", "labels")}


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
    """One pass over windows: base log-probabilities of the labels, and what is mixed into them.

    Args:
        base: the base model.
        layer_position: the block whose MLP input is captured.
    """

    def __init__(self, base: Any, layer_position: int = -1) -> None:
        from models.capture import decoder_blocks

        self.base, self.layer_position = base, layer_position
        self.device = base.get_input_embeddings().weight.device
        decoder_blocks(base)

    def score(self, input_ids: Tensor, positions: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Captured hidden states (rows, hidden) and base log-probabilities (rows,) of `labels` (rows,)."""
        from models.capture import hidden_and_head_input

        captured, final = hidden_and_head_input(
            self.base, input_ids.to(self.device), positions.to(self.device), self.layer_position
        )
        return captured, base_label_log_probabilities(self.base, final, labels)

    @torch.inference_mode()
    def batches(
        self, windows: Any, batch_size: int, *, description: str = "evaluate"
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """This process's (captured hidden states (rows, hidden), base log-probabilities (rows,), labels (rows,))."""
        from accelerate import PartialState

        state = PartialState()
        share = {"process_index": state.process_index, "num_processes": state.num_processes}
        total = len(range(state.process_index * batch_size, len(windows), state.num_processes * batch_size))
        batches = window_batches(windows, batch_size, **share)
        silent = None if state.is_main_process else True
        for _, batch in tqdm(batches, total=total, desc=description, unit="batch", disable=silent):
            mask, labels = predicted_positions(batch["labels"])
            if labels.numel():
                labels = labels.to(self.device)
                captured, base = self.score(batch["input_ids"], mask, labels)
                yield captured, base, labels


def chosen(path: str) -> tuple[list[float], list[float]]:
    """Lambda and temperature that were best in another split's results.json. Raises InputError."""
    results = read_json(path)
    if not isinstance(results, dict) or not isinstance(results.get("knn_temp"), (int, float)):
        raise InputError(f"--choose_on {path}: is not the results.json of a mixture's evaluation")
    return [float(results["lmbda"])], [float(results["knn_temp"])]


def report_scores(
    score: MixtureScore, mixture: str | None, output_dir: str | Path, started: float, **about: Any
) -> None:
    """Add up the processes' scores, print what they come to, and write `results.json` into `output_dir`.

    It holds perplexity, lmbda and knn_temp (of the best mixture, or of the base), base_perplexity, tokens, grid (a row
    for each combination), and `about`.

    Args:
        score: this process's sums.
        mixture: what was mixed into the base, as "kNN-LM"; None where the base was scored alone.
        started: `time.time()` at the command's start.
        about: what was scored: `dataset` and `split`, and whatever else belongs into the results.

    Raises:
        InputError: no token was scored.
    """
    from accelerate import PartialState

    from utils.loading import say

    score.reduce()
    tokens = int(score.tokens.item())
    if tokens == 0:
        raise InputError(f"--dataset_name {about['dataset']}: split {about['split']} holds no token to predict")
    base = score.base_perplexity()
    say(f"base: perplexity {base:.4f} ({tokens} tokens, token-weighted)")
    best: dict[str, Any] = {"lmbda": 0.0, "knn_temp": None, "perplexity": base}
    if mixture is not None:
        best = score.best()
        say(
            f"{mixture}: perplexity {best['perplexity']:.4f} at lambda {best['lmbda']:g}, temperature "
            f"{best['knn_temp']:g} ({tokens} tokens, token-weighted)"
        )
    grid = [] if mixture is None else score.grid()
    if PartialState().is_main_process:
        results = {**best, "base_perplexity": base, "tokens": tokens, "grid": grid, **about}
        write_results(output_dir, results, started)


def versions() -> dict[str, str]:
    """Versions of what a figure depends on."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    faiss = ("faiss-cpu", "faiss-gpu-cu12")
    for package in ("torch", "transformers", "datasets", "accelerate", *faiss, "numpy", "pyarrow"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def write_results(output_dir: str | Path, results: dict[str, Any], started: float) -> dict[str, Any]:
    """Write `results.json` into `output_dir`, with the seconds since `started` and the versions."""
    complete = {**results, "seconds": round(time.time() - started, 2), "versions": versions()}
    folder = ensure_folder(output_dir)
    write_json(folder / "results.json", complete)
    return complete
