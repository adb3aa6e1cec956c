"""What a gate sees of text, and what its mixture comes to there: one pass of base and memory over windows."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from utils.evaluation import GPU_PRODUCT_BYTES, PRODUCT_BYTES, own_batches


class GateRows(NamedTuple):
    """Rows of text: the gate's figures (rows, FIGURES), and the labels' log-probabilities (rows,) under base and memory,
    the memory's at the gate's temperature; all float32 on the CPU."""

    figures: Tensor
    base: Tensor
    memory: Tensor

    @classmethod
    def together(cls, pieces: list[GateRows]) -> GateRows:
        return cls(*map(torch.cat, zip(*pieces, strict=True)))

    def log_likelihoods(self, gate: Any) -> Tensor:
        """Log-probabilities (rows,) of the labels under the gate's mixture."""
        logit = gate.logit(self.figures)[:, 0]
        keep, add = (torch.nn.functional.logsigmoid(each) for each in (-logit, logit))
        return torch.logaddexp(self.base + keep, self.memory + add)


@torch.inference_mode()
def gate_rows(
    joint: Any, gate: Any, windows: Any, batch_size: int, description: str
) -> Iterator[tuple[Tensor, Tensor, GateRows]]:
    """Batch by batch of this process's windows: captured states (rows, hidden), labels (rows,) and their `GateRows`.

    Never more than a block of logits is held.
    """
    from models.capture import base_logits, hidden_and_head_input

    device = joint.get_input_embeddings().weight.device
    bytes_at_once = PRODUCT_BYTES if device.type == "cpu" else GPU_PRODUCT_BYTES
    block = max(1, bytes_at_once // (16 * joint.config.vocab_size))  # four float32 copies at a time
    for ids, positions, labels in own_batches(windows, batch_size, description):
        hidden, final = hidden_and_head_input(joint.base_lm, ids.to(device), positions.to(device), joint.layer_position)
        pieces = []
        for start in range(0, len(labels), block):
            rows = slice(start, start + block)
            base = base_logits(joint.base_lm, final[rows]).float()
            memory = joint.memory_logits(hidden[rows]).to(base.device).float() / gate.knn_temp
            figures, *totals = gate.figures(base, memory, hidden[rows])  # of (block, vocabulary) each
            chosen = labels[rows, None].to(base.device)
            scores = zip((base, memory), totals, strict=True)
            found = (figures, *((each.gather(-1, chosen) - total)[:, 0] for each, total in scores))
            pieces.append(GateRows(*(each.cpu() for each in found)))
        yield hidden, labels, GateRows.together(pieces)


class GateScore:
    """A joint model with a gate over windows: the mixture's summed log-likelihood, and the lambdas that it took."""

    def __init__(self, joint: Any) -> None:
        self.joint = joint
        self.sums = torch.zeros(3, dtype=torch.float64)  # log-likelihoods, lambdas, tokens

    def batches(self, windows: Any, batch_size: int, description: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """This process's (captured states (rows, hidden), base log-probabilities (rows,), labels (rows,)), as scored."""
        gate = self.joint.gate
        on_cpu = copy.deepcopy(gate).cpu()
        for hidden, labels, rows in gate_rows(self.joint, gate, windows, batch_size, description):
            lmbda = on_cpu.logit(rows.figures).sigmoid()
            each = (rows.log_likelihoods(on_cpu), lmbda, torch.ones_like(rows.base))
            self.sums += torch.stack([values.double().sum() for values in each])
            yield hidden, rows.base, labels

    def result(self) -> dict[str, Any]:
        """Of all processes: perplexity, knn_temp, mean_lambda, and the gate's known_weight."""
        from accelerate.utils import gather_object

        likelihood, lmbda, tokens = torch.stack(gather_object([self.sums])).sum(0).tolist()
        gate = self.joint.gate
        return {
            "perplexity": math.exp(-likelihood / max(tokens, 1)),
            "knn_temp": gate.knn_temp,
            "mean_lambda": lmbda / max(tokens, 1),
            "known_weight": gate.about.get("known_weight"),
        }
