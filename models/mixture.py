"""The mixture of base and memories, in log-probabilities: p = w_0 · base + Σ w_i · memory_i (paper section 3.4).

With one memory and one lambda, w = (1 - lambda, lambda); with a gate, lambda = sigmoid(g). The gates of n memories have a
mean of their odds against the base, and share it in proportion to their odds (`gate_log_weights`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MEAN = 3  # exponent of the power mean of the memories' odds


def log_mixture(log_probs: Sequence[Tensor], log_weights: Sequence[Tensor | float]) -> Tensor:
    """log Σ_i exp(log_weights[i] + log_probs[i]), elementwise; a weight of 0 (-inf) leaves the others unchanged.

    Args:
        log_probs: of base, memory 1, memory 2, …: tensors of one shape.
        log_weights: one for each, numbers or tensors that broadcast to that shape.
    """
    mixed = log_probs[0] + log_weights[0]
    for log_prob, log_weight in zip(log_probs[1:], log_weights[1:], strict=True):
        mixed = torch.logaddexp(mixed, log_prob + log_weight)
    return mixed


def memory_weights(lmbda: float | Sequence[float], memories: int = 1) -> list[float]:
    """The weight of each memory: `lmbda` has one for each, or is that of all together, in equal shares.

    Raises ValueError when there are not as many weights as memories, or they or their sum are not from 0 to 1.
    """
    weights = list(lmbda) if isinstance(lmbda, Sequence) else [lmbda / memories] * memories
    if len(weights) != memories:
        raise ValueError(f"lambda {lmbda}: {len(weights)} weights for {memories} memories")
    if not (all(weight >= 0 for weight in weights) and math.fsum(weights) <= 1 + 1e-9):
        raise ValueError(f"lambda {lmbda}: expected weights from 0 to 1 whose sum is at most 1")
    return weights


def fixed_log_weights(lmbda: float | Sequence[float], memories: int = 1) -> list[float]:
    """Log-weights of base and memories that are the same at every token; `lmbda` as in `memory_weights`."""
    weights = memory_weights(lmbda, memories)
    return [math.log(weight) if weight > 0 else -math.inf for weight in (1 - math.fsum(weights), *weights)]


def gate_log_weights(*logits: Tensor) -> Sequence[Tensor]:
    """Log-weights of base and n memories from the logits g_i of the memories' gates, each of a gate's shape.

    The odds of all memories against the base are the cubic mean of each one's, (Σ exp(3 g_i) / n)^(1/3), and they share
    their weight in proportion to their odds. So n memories that do not know the text weigh no more than one, and one that
    knows it is hardly held back by those that do not; docs/compare.md has the figures.
    """
    stacked = torch.stack(logits)  # (memories, …)
    total = ((MEAN * stacked).logsumexp(0) - math.log(len(logits))) / MEAN
    memories = torch.nn.functional.logsigmoid(total) + stacked.log_softmax(0)
    return (torch.nn.functional.logsigmoid(-total), *memories.unbind(0))
