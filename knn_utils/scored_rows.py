"""Rows to score: from a run of the base over windows (with a gate, of base and memory), or from a datastore that holds
the base's log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from knn_utils.datastore import check_rows, open_scored_datastore, stored_rows
from models.capture import base_logits, hidden_and_head_input
from models.gate import expectations
from models.mixture import gate_log_weights, log_mixture
from utils.artefact import read_made
from utils.errors import InputError
from utils.evaluation import (
    block_rows,
    by_blocks,
    count_rows,
    predicted_positions,
    rounded,
    send,
    window_batches,
)


def scored_rows(
    base: Any, windows: Any, arguments: Any, split: str, batch_size: int, dim: int | None = None
) -> Iterator[tuple[Any, Any, Any]]:
    """(hidden states, base log-probabilities, labels) by batch: from the base, or from `--dstore_path`'s datastore.

    `windows` is the split; `arguments` a command's flags with `BaseArguments`; `dim` the memory's input width. Raises
    InputError where the stored rows are not those of base, block and windows, or not `dim` wide.
    """
    if not arguments.dstore_path:
        check_token_ids(windows, base.get_input_embeddings().weight.shape[0], arguments.dataset_name)
        return Scorer(base, arguments.layer_position).batches(windows, batch_size, description=f"score {split}")
    made = read_made(arguments.dataset_name)
    store = open_scored_datastore(
        arguments.dstore_path,
        base=arguments.base_id() if arguments.model_name_or_path else None,
        windows=made and made.id,
        layer_position=arguments.layer_position,
        dim=dim,
    )
    check_rows(store, int(count_rows(windows).sum()))  # the original's windows have no id
    return stored_rows(store)


def own_batches(windows: Any, batch_size: int, description: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """This process's batches, with a progress bar: token ids (batch, time), and positions and labels as in
    `predicted_positions`."""
    from accelerate import PartialState

    state = PartialState()
    share = {"process_index": state.process_index, "num_processes": state.num_processes}
    total = math.ceil(len(windows) / batch_size / state.num_processes)
    silent = None if state.is_main_process else True
    for _, batch in tqdm(window_batches(windows, batch_size, **share), description, total, disable=silent):
        positions, labels = predicted_positions(batch["labels"])
        if labels.numel():
            yield batch["input_ids"], positions, labels


class Scorer:
    """One pass of a base over windows: the labels' log-probabilities, and the states captured at `layer_position`."""

    def __init__(self, base: Any, layer_position: int = -1) -> None:
        self.base, self.layer_position = base, layer_position
        self.device = base.get_input_embeddings().weight.device

    def score(self, input_ids: Tensor, positions: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Captured hidden states (rows, hidden) and base log-probabilities (rows,) of `labels` (rows,)."""
        base, ids, positions = self.base, send(input_ids, self.device), send(positions, self.device)
        captured, final = hidden_and_head_input(base, ids, positions, self.layer_position)  # (rows, hidden) each
        final, filled_labels = filled(final), send(filled(labels), final.device)
        scored = by_blocks(lambda rows: base_logits(base, final[rows]), base.config.vocab_size, filled_labels, (1.0,))
        return captured, scored[: len(labels), 0]

    @torch.inference_mode()
    def batches(self, windows: Any, batch_size: int, description: str = "evaluate") -> Iterator[tuple[Tensor, ...]]:
        """This process's (captured hidden states (rows, hidden), base log-probabilities (rows,), labels (rows,))."""
        for ids, positions, labels in own_batches(windows, batch_size, description):
            yield *self.score(ids, positions, labels), labels


class GateRows(NamedTuple):
    """The features (rows, memories, FEATURES) of the gates, and the labels' log-probabilities under base (rows,) and
    memories (rows, memories); float32."""

    features: Tensor
    base: Tensor
    memory: Tensor

    @classmethod
    def concatenate(cls, rows: list[GateRows]) -> GateRows:
        return cls(*map(torch.cat, zip(*rows, strict=True)))

    def mixture(self, gates: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Log-probabilities (rows,) of the labels under the mixture by `gates`, and the memories' weights
        (rows, memories)."""
        logits = (gate.logit(features)[:, 0] for gate, features in zip(gates, self.features.unbind(1), strict=True))
        weights = gate_log_weights(*logits)
        return log_mixture((self.base, *self.memory.unbind(1)), weights), torch.stack(weights[1:], 1).exp()


@torch.inference_mode()
def gate_rows(
    joint: Any, gates: Sequence[Any], windows: Any, batch_size: int, description: str
) -> Iterator[tuple[Tensor, GateRows, Tensor]]:
    """This process's batches of windows: captured states (rows, hidden), their `GateRows`, and labels (rows,)."""
    device = joint.get_input_embeddings().weight.device
    copies = 3 + len(joint.memories)  # float32 ones of the logits at a time
    block = block_rows(device, 4 * copies * joint.config.vocab_size)
    for ids, positions, labels in own_batches(windows, batch_size, description):
        inputs = joint.base_lm, send(ids, device), send(positions, device), joint.layer_position
        states, final = map(filled, hidden_and_head_input(*inputs))  # (rows, hidden) each
        filled_labels, scored = send(filled(labels), final.device), []
        for start in range(0, len(states), block):
            rows = slice(start, start + block)
            base = base_logits(joint.base_lm, final[rows]).float()  # (block, V)
            label = filled_labels[rows, None].to(base.device)
            features, learned, of_base = [], [], expectations(base, base)
            for gate, logits in zip(gates, joint.memory_logits(states[rows]), strict=True):
                logits = logits.to(base.device).float() / gate.memory_temp
                found, base_total, memory_total = gate.features(base, logits, states[rows], of_base)
                features.append(found)
                learned.append(logits.gather(-1, label) - memory_total)
            base = base.gather(-1, label) - base_total
            scored.append(GateRows(torch.stack(features, 1), base[:, 0], torch.cat(learned, 1)))
        yield states[: len(labels)], GateRows(*(each[: len(labels)] for each in GateRows.concatenate(scored))), labels


def check_token_ids(windows: Any, vocabulary: int, path: object) -> None:
    """Refuse windows with a token id that a model of `vocabulary` tokens does not have. Raises InputError."""
    largest = max((rows["input_ids"].max() for rows in windows.with_format("numpy").iter(1000)), default=0)
    if largest >= vocabulary:
        raise InputError(
            f"--dataset_name {path}: has token id {largest}, but the model's vocabulary is {vocabulary} tokens"
        )


def filled(rows: Tensor) -> Tensor:
    """`rows` (n, …) with zeros after them, `rounded(n)` in all."""
    return torch.nn.functional.pad(rows, (0, 0) * (rows.dim() - 1) + (0, rounded(len(rows)) - len(rows)))


def check_finite(base: Any, *outputs: Tensor) -> None:
    """Raise InputError naming `base` where tensors that it computed hold NaN or infinity."""
    if not all(each.isfinite().all() for each in outputs):
        remedy = "check its weights, or use --torch_dtype float32"
        raise InputError(f"base {base.name_or_path}: gives NaN or infinity in {base.dtype}; {remedy}")
