"""The textbook way, as a baseline: logits of every position, dense targets, a Python loop over rows, one mixture at
a time. It stands for what the stages cost without any of their ideas; nothing of the project imports it.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def embed(base: Any, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys (rows, hidden) float16, values (rows,) and the loss, from a forward pass with logits.

    `input_ids`, `labels`: (batch, time), -100 where nothing is predicted.
    """
    from models.capture import HiddenCapture, captured_module

    with HiddenCapture(captured_module(base)) as capture:
        loss = base(input_ids=input_ids, labels=labels, use_cache=False).loss
        hidden = capture.take()  # (batch, time, hidden)
    counted = labels[:, 1:] != -100
    return hidden[:, :-1][counted].half(), labels[:, 1:][counted], loss


def knn_targets(
    index: Any, queries: np.ndarray, values: np.ndarray, k: int, temperature: float, vocabulary: int
) -> Any:
    """For each query a dense distribution over the vocabulary, made into lists of (token, probability).

    `queries`: (n, dim) float32. Searches and aggregates row by row.
    """
    found = []
    for query in queries:
        distances, ids = index.search(query[None], k)
        weights = torch.softmax(-torch.from_numpy(distances[0, 1:]) / temperature, 0)
        dense = torch.zeros(vocabulary)
        for row, weight in zip(ids[0, 1:].tolist(), weights.tolist(), strict=True):
            if row >= 0:
                dense[values[row]] += weight
        tokens = dense.nonzero().squeeze(1)
        found.append((tokens.tolist(), dense[tokens].tolist()))
    return found


def as_lists(counts: Any, tokens: Any, probabilities: Any) -> list[tuple[list[int], list[float]]]:
    """Sparse rows, end to end in arrays or tensors, as lists of tokens and probabilities."""
    ends = [0, *counts.cumsum(0).tolist()]
    return [(tokens[a:b].tolist(), probabilities[a:b].tolist()) for a, b in itertools.pairwise(ends)]


def dense_target(lists: list[tuple[list[int], list[float]]], vocabulary: int) -> Tensor:
    """(rows, vocabulary) float32 from lists of tokens and probabilities, in a loop over rows."""
    target = torch.zeros(len(lists), vocabulary)
    for row, (tokens, probabilities) in enumerate(lists):
        target[row, torch.tensor(tokens, dtype=torch.int64)] = torch.tensor(probabilities)
    return target


def training_step(
    memory: Any, optimizer: Any, hidden: Tensor, labels: Tensor, target: Tensor, alpha: float = 0.5
) -> None:
    """One step with a dense target: hidden (rows, dim), labels (rows,), target (rows, vocabulary)."""
    logits = memory(hidden).logits  # (rows, vocabulary)
    divergence = F.kl_div(F.log_softmax(logits, dim=-1), target, reduction="batchmean")
    loss = alpha * divergence + (1 - alpha) * F.cross_entropy(logits, labels)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(memory.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def joint_loss(base: Any, memory: Any, input_ids: Tensor, labels: Tensor, lmbda: float, temperature: float) -> float:
    """Mean negative log-likelihood of one mixture: base and memory with logits of every position."""
    from models.capture import HiddenCapture, captured_module

    with HiddenCapture(captured_module(base)) as capture:
        base_logits = base(input_ids=input_ids, use_cache=False).logits  # (batch, time, vocabulary)
        memory_logits = memory(capture.take()).logits
    p = (1 - lmbda) * torch.softmax(base_logits, -1) + lmbda * torch.softmax(memory_logits / temperature, -1)
    return F.nll_loss(p.log()[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100).item()
