"""Adaptive lambda: a small network that gives each token its own weight of the memory.

For a position with captured state x, base distribution b and memory distribution m, the gate sees these features:
entropy and largest log-probability of b and of m, KL(m ‖ b), whether their top-1 tokens agree, each one's
log-probability of the other's top-1 token, and the log Mahalanobis distance of x to the training corpus (Lee et al.
2018), which detects out-of-domain text. A gate that was trained with other text also sees the distance to that text: what
is far from the corpus, but farther from everything else, may be about it in other words (Ren et al. 2021):

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

FEATURES, DISTANCES = 10, 2  # the last ones are distances: to the corpus, and to the other text (0 without it)
LARGEST = 60.0  # features are clamped to this size: a log-probability may be minus infinity
WEIGHTS = "gate.safetensors"


class LambdaGate(nn.Module):
    """The gate of one memory: `forward` gives the logit of lambda.

    `memory_temp`: the temperature of the memory's softmax that the gate was trained with; `other`: whether there is other
    text.
    """

    def __init__(self, hidden_size: int, width: int = 128, memory_temp: float = 1.0, other: bool = False) -> None:
        super().__init__()
        self.memory_temp, self.other = memory_temp, other
        self.register_buffer("corpus_mean", torch.zeros(hidden_size))
        # (hidden, hidden): the corpus's states, less their mean, times this have the identity as covariance.
        self.register_buffer("whitening", torch.eye(hidden_size))
        if other:
            self.register_buffer("other_mean", torch.zeros(hidden_size))
            self.register_buffer("other_whitening", torch.eye(hidden_size))
        count = FEATURES if other else FEATURES - 1
        self.register_buffer("feature_mean", torch.zeros(count))
        self.register_buffer("feature_scale", torch.ones(count))
        self.inner, self.outer = nn.Linear(count, width), nn.Linear(width, 1)

    def features(
        self,
        base: torch.Tensor,
        memory: torch.Tensor,
        hidden: torch.Tensor,
        of_base: Sequence[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The features of each position, and the normalizers of both logits.

        Args:
            base: logits (…, vocabulary) float32 (log-probabilities are logits too).
            memory: the same of the memory, already divided by its temperature.
            hidden: captured states (…, hidden).
            of_base: `expectations(base, base)`, which several gates share.

        Returns:
            Features (…, FEATURES), and the log-sum-exp of `base` and of `memory` (…, 1): logits minus these are
            log-probabilities.
        """
        if base.device != self.corpus_mean.device:  # a base spread over devices may give its logits anywhere
            self.to(base.device)
        base_top, base_total, base_mean = expectations(base, base) if of_base is None else of_base
        memory_top, memory_total, memory_mean, cross_mean = expectations(memory, memory, base)
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
            self.distances(hidden.to(base.device)),
        ]
        return torch.cat(features, -1).nan_to_num(LARGEST).clamp(-LARGEST, LARGEST), base_total, memory_total

    def distances(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logs of the squared Mahalanobis distances of states (…, hidden) to the corpus and to the other text (or 0), over
        their width: (…, 2)."""
        states, texts = hidden.to(self.corpus_mean.dtype), [(self.corpus_mean, self.whitening)]
        if self.other:
            texts.append((self.other_mean, self.other_whitening))
        found = [((states - mean) @ whitening).square().mean(-1, keepdim=True) for mean, whitening in texts]
        found = [each.clamp(min=1e-6).log() for each in found]
        return torch.cat(found if self.other else [*found, torch.zeros_like(found[0])], -1)

    def logit(self, features: torch.Tensor) -> torch.Tensor:
        """log(lambda / (1 - lambda)) of features (…, FEATURES): (…, 1)."""
        features = features[..., : len(self.feature_mean)]
        scaled = ((features - self.feature_mean) / self.feature_scale).to(self.inner.weight.dtype)
        return self.outer(nn.functional.silu(self.inner(scaled))).to(features.dtype)

    def forward(self, base: torch.Tensor, memory: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """log(lambda / (1 - lambda)) (…, 1) of each position; arguments as in `features`."""
        return self.logit(self.features(base, memory, hidden)[0])

    @torch.no_grad()
    def fit_distances(self, corpus: torch.Tensor, other: torch.Tensor | None = None) -> None:
        """Set means and covariances from samples of the states (n, hidden) of the corpus, and of the other text."""
        texts = [(corpus, self.corpus_mean, self.whitening)]
        if other is not None:
            texts.append((other, self.other_mean, self.other_whitening))
        for states, mean, whitening in texts:
            states = states.double()
            mean.copy_(states.mean(0))
            covariance = torch.cov(states.t())
            # Shrinkage: directions with almost no variance in the sample must not dominate the distance.
            least = 0.01 * covariance.diagonal().mean().clamp(min=1e-12)
            covariance += least * torch.eye(len(covariance)).to(covariance)
            whitening.copy_(torch.linalg.cholesky(torch.linalg.inv(covariance)))

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
            gate = cls(len(state["corpus_mean"]), len(state["inner.weight"]), memory_temp, "other_mean" in state)
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
    logits, totals, of_base = [], [], expectations(base, base)
    for gate, memory in zip(gates, memories, strict=True):
        features, base_total, memory_total = gate.features(base, memory, hidden, of_base)
        logits.append(gate.logit(features))
        totals.append(memory_total)
    weights = gate_log_weights(*logits)
    normalized = [weight - total for weight, total in zip(weights, (base_total, *totals), strict=True)]
    return log_mixture((base, *memories), normalized)


def expectations(logits: torch.Tensor, *values: torch.Tensor) -> list[torch.Tensor]:
    """The top-1 token of logits (…, vocabulary), their log-sum-exp, and the expectation of each of `values`
    (…, vocabulary) under their softmax; each (…, 1)."""
    probabilities = logits.softmax(-1)
    if logits.device.type == "cpu":  # NumPy's argmax takes a tenth of torch's time there
        top = torch.from_numpy(logits.detach().numpy().argmax(-1, keepdims=True))
    else:
        top = logits.argmax(-1, keepdim=True)
    total = logits.gather(-1, top) - probabilities.gather(-1, top).log()
    return [top, total, *((probabilities * each).sum(-1, keepdim=True) for each in values)]
