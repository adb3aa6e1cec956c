"""Adaptive lambda: a small network that gives each token its own weight of the memory.

For a position with captured state x, base distribution b and memory distribution m, the gate sees nine features:
entropy and largest log-probability of b and of m, KL(m ‖ b), whether their top-1 tokens agree, each one's
log-probability of the other's top-1 token, and the log Mahalanobis distance of x to the training corpus (Lee et al.
2018), which detects out-of-domain text:

    lambda = σ(w₂ · SiLU(W₁ features + c₁) + c₂),     p = (1 - lambda) · b + lambda · m.

`training/gate.py` trains it to maximize the mixture's likelihood and writes it into the folder of its memory. Several
memories have a gate each; `models.mixture.gate_log_weights` makes the weights of base and memories from the gates' logits.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from .mixture import gate_log_weights, log_mixture

FEATURES = 9
LARGEST = 60.0  # features are clamped to this size: a log-probability may be minus infinity
WEIGHTS = "gate.safetensors"


class LambdaGate(nn.Module):
    """The gate of one memory: `forward` gives the logit of lambda.

    `memory_temp`: the temperature of the memory's softmax that the gate was trained with.
    """

    def __init__(self, hidden_size: int, width: int = 128, memory_temp: float = 1.0) -> None:
        super().__init__()
        self.memory_temp = memory_temp
        self.register_buffer("corpus_mean", torch.zeros(hidden_size))
        # (hidden, hidden): the corpus's states, less their mean, times this have the identity as covariance.
        self.register_buffer("whitening", torch.eye(hidden_size))
        self.register_buffer("feature_mean", torch.zeros(FEATURES))
        self.register_buffer("feature_scale", torch.ones(FEATURES))
        self.inner, self.outer = nn.Linear(FEATURES, width), nn.Linear(width, 1)

    def features(
        self, base: torch.Tensor, memory: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The nine features of each position, and the normalizers of both logits.

        Args:
            base: logits (…, vocabulary) float32 (log-probabilities are logits too).
            memory: the same of the memory, already divided by its temperature.
            hidden: captured states (…, hidden).

        Returns:
            Features (…, FEATURES), and the log-sum-exp of `base` and of `memory` (…, 1): logits minus these are
            log-probabilities.
        """
        if base.device != self.corpus_mean.device:  # a base spread over devices may give its logits anywhere
            self.to(base.device)
        base_top, base_total, base_mean = _expectations(base, base)
        memory_top, memory_total, memory_mean, cross_mean = _expectations(memory, memory, base)
        tops = torch.cat((base_top, memory_top), -1)
        base_at = base.gather(-1, tops) - base_total  # (…, 2): log-probabilities of both top-1 tokens
        memory_at = memory.gather(-1, tops) - memory_total
        entropy, memory_entropy = base_total - base_mean, memory_total - memory_mean
        features = [
            entropy,
            base_at[..., :1],
            memory_entropy,
            memory_at[..., 1:],
            base_total - cross_mean - memory_entropy,  # KL(m ‖ b)
            base_top == memory_top,
            base_at[..., 1:],
            memory_at[..., :1],
            self.distance(hidden.to(base.device)),
        ]
        return torch.cat(features, -1).nan_to_num(LARGEST).clamp(-LARGEST, LARGEST), base_total, memory_total

    def distance(self, hidden: torch.Tensor) -> torch.Tensor:
        """Log of the squared Mahalanobis distance of states (…, hidden) to the corpus, over their width: (…, 1)."""
        whitened = (hidden.to(self.corpus_mean.dtype) - self.corpus_mean) @ self.whitening
        return whitened.square().mean(-1, keepdim=True).clamp(min=1e-6).log()

    def logit(self, features: torch.Tensor) -> torch.Tensor:
        """log(lambda / (1 - lambda)) of features (…, FEATURES): (…, 1)."""
        scaled = ((features - self.feature_mean) / self.feature_scale).to(self.inner.weight.dtype)
        return self.outer(nn.functional.silu(self.inner(scaled))).to(features.dtype)

    def forward(self, base: torch.Tensor, memory: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """log(lambda / (1 - lambda)) (…, 1) of each position; arguments as in `features`."""
        return self.logit(self.features(base, memory, hidden)[0])

    @torch.no_grad()
    def fit_corpus(self, states: torch.Tensor) -> None:
        """Set mean and covariance of the corpus from a sample of its states (n, hidden)."""
        states = states.double()
        self.corpus_mean.copy_(states.mean(0))
        covariance = torch.cov(states.t())
        # Shrinkage: directions with almost no variance in the sample must not dominate the distance.
        covariance += 0.01 * covariance.diagonal().mean().clamp(min=1e-12) * torch.eye(len(covariance)).to(covariance)
        self.whitening.copy_(torch.linalg.cholesky(torch.linalg.inv(covariance)))

    def save(self, folder: str | os.PathLike) -> None:
        """Write `gate.safetensors` into a memory's folder, atomically."""
        path, temporary = Path(folder, WEIGHTS), Path(folder, f".tmp-{WEIGHTS}")
        state = {name: value.contiguous().cpu() for name, value in self.state_dict().items()}
        temporary.write_bytes(save(state, {"memory_temp": str(self.memory_temp)}))
        os.replace(temporary, path)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> LambdaGate | None:
        """The gate in a memory's folder, None where there is none. Raises ValueError if it cannot be read."""
        path = Path(folder, WEIGHTS)
        if not folder or not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                memory_temp = float(file.metadata()["memory_temp"])
            gate = cls(len(state["corpus_mean"]), len(state["inner.weight"]), memory_temp)
            gate.load_state_dict(state)
        except (KeyError, TypeError, RuntimeError, SafetensorError) as error:
            message = " ".join(str(error).split())[:200]
            raise ValueError(f"{path}: cannot be read ({message}); train it again: python -m training.gate") from None
        return gate.eval().requires_grad_(False)


def mix(
    gates: Sequence[LambdaGate], base: torch.Tensor, memories: Sequence[torch.Tensor], hidden: torch.Tensor
) -> torch.Tensor:
    """The log-probabilities (…, vocabulary) of a mixture of base and memories, each with its gate.

    `memories`: the logits of each; otherwise as in `LambdaGate.features`.
    """
    logits, totals = [], []
    for gate, memory in zip(gates, memories, strict=True):
        features, base_total, memory_total = gate.features(base, memory, hidden)
        logits.append(gate.logit(features))
        totals.append(memory_total)
    weights = gate_log_weights(*logits)
    normalized = [weight - total for weight, total in zip(weights, (base_total, *totals), strict=True)]
    return log_mixture((base, *memories), normalized)


def _expectations(logits: torch.Tensor, *values: torch.Tensor) -> list[torch.Tensor]:
    """The top-1 token of logits (…, vocabulary), their log-sum-exp, and the expectation of each of `values`
    (…, vocabulary) under their softmax; each (…, 1)."""
    probabilities = logits.softmax(-1)
    if logits.device.type == "cpu":  # NumPy's argmax takes a tenth of torch's time there
        top = torch.from_numpy(logits.detach().numpy().argmax(-1, keepdims=True))
    else:
        top = logits.argmax(-1, keepdim=True)
    total = logits.gather(-1, top) - probabilities.gather(-1, top).log()
    return [top, total, *((probabilities * each).sum(-1, keepdim=True) for each in values)]
