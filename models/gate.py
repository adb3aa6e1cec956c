"""Lambda for each token: a small network that looks at how sure base and memory are, whether they agree, and how unlike
the memory's corpus the state is.

One lambda cannot be high where the memory knows and low where it does not. Of a position with the captured state x, the
base's distribution b and the memory's m, the gate sees nine figures: entropy and largest log-probability of b and of m,
KL(m ‖ b), whether their favourite tokens agree, each one's log-probability of the other's favourite, and the logarithm
of x's squared Mahalanobis distance to the corpus (Lee et al. 2018), which tells text of another kind:

    lambda = σ(w₂ · SiLU(W₁ figures + c₁) + c₂),     p = (1 - lambda) · b + lambda · m.

It is trained to raise the mixture's likelihood (`training/gate.py`) and lies beside the memory that it was trained for.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

FIGURES = 9
LARGEST = 60.0  # of a figure: a log-probability may be minus infinity
WEIGHTS, SETTINGS = "gate.safetensors", "gate.json"


class LambdaGate(nn.Module):
    """The gate of one memory: `forward` gives the logit of lambda.

    `knn_temp`: the temperature of the memory's softmax that it was trained with. `about`: what else is recorded.
    """

    def __init__(self, hidden_size: int, width: int = 128, knn_temp: float = 1.0, **about: Any) -> None:
        super().__init__()
        self.knn_temp, self.about = knn_temp, about
        self.register_buffer("corpus_mean", torch.zeros(hidden_size))
        # (hidden, hidden): a state's distance to the mean times this has the identity as its covariance.
        self.register_buffer("whitening", torch.eye(hidden_size))
        self.register_buffer("figure_mean", torch.zeros(FIGURES))
        self.register_buffer("figure_scale", torch.ones(FIGURES))
        self.inner, self.outer = nn.Linear(FIGURES, width), nn.Linear(width, 1)

    def figures(
        self, base: torch.Tensor, memory: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the gate sees of logits base, memory (…, vocabulary) float32 and captured states (…, hidden).

        The memory's logits are over its temperature already; log-probabilities are logits too. Returns the nine figures
        (…, FIGURES), and the logarithms of the sums of exponentials of base and memory (…, 1): logits less these are
        log-probabilities. A decoding step pays more for each kind of operation, hence so few, than for its work.
        """
        if base.device != self.corpus_mean.device:  # a base spread over devices gives its logits where it likes
            self.to(base.device)
        first, total, own = _expected(base, base)
        second, memory_total, memory_own, cross = _expected(memory, memory, base)
        both = torch.cat((first, second), -1)
        here = base.gather(-1, both) - total  # (…, 2): log-probabilities of both favourites
        there = memory.gather(-1, both) - memory_total
        entropy, memory_entropy = total - own, memory_total - memory_own
        each = (
            *(entropy, here[..., :1], memory_entropy, there[..., 1:], total - cross - memory_entropy, first == second),
            *(here[..., 1:], there[..., :1], self.strangeness(hidden.to(base.device))),
        )
        return torch.cat(each, -1).nan_to_num(LARGEST).clamp(-LARGEST, LARGEST), total, memory_total

    def strangeness(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logarithm of the squared Mahalanobis distance of states (…, hidden) to the corpus, over their width: (…, 1)."""
        centred = hidden.to(self.corpus_mean.dtype) - self.corpus_mean
        whitened = centred @ self.whitening
        return ((whitened * whitened).sum(-1, keepdim=True) / whitened.shape[-1]).clamp(min=1e-6).log()

    def logit(self, figures: torch.Tensor) -> torch.Tensor:
        """log(lambda / (1 - lambda)) of figures (…, FIGURES): (…, 1)."""
        scaled = ((figures - self.figure_mean) / self.figure_scale).to(self.inner.weight.dtype)
        return self.outer(nn.functional.silu(self.inner(scaled))).to(figures.dtype)

    def forward(self, base: torch.Tensor, memory: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """log(lambda / (1 - lambda)) (…, 1) for each position; arguments as in `figures`."""
        return self.logit(self.figures(base, memory, hidden)[0])

    def mix(self, base: torch.Tensor, memory: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The mixture's log-probabilities (…, vocabulary); arguments as in `figures`, used up where no gradient flows."""
        figures, total, memory_total = self.figures(base, memory, hidden)
        logit = self.logit(figures)
        keep, add = nn.functional.logsigmoid(-logit), nn.functional.logsigmoid(logit)
        return mix(base, memory, keep - total, add - memory_total)

    @torch.no_grad()
    def fit_corpus(self, states: torch.Tensor) -> None:
        """Take mean and covariance of the corpus from a sample of its states (n, hidden)."""
        states = states.double()
        self.corpus_mean.copy_(states.mean(0))
        covariance = torch.cov(states.t())
        # A hundredth of the mean variance keeps directions in which the sample hardly varies from counting for all.
        covariance += 0.01 * covariance.diagonal().mean().clamp(min=1e-12) * torch.eye(len(covariance)).to(covariance)
        self.whitening.copy_(torch.linalg.cholesky(torch.linalg.inv(covariance)))

    # -- on disk ----------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike) -> None:
        """Write `gate.safetensors` and `gate.json` into a memory's folder, each whole or not at all."""
        folder = Path(folder)
        settings = {"width": self.inner.out_features, "knn_temp": self.knn_temp, **self.about}
        weights, told = folder / f".tmp-{WEIGHTS}", folder / f".tmp-{SETTINGS}"
        save_file({name: value.contiguous().cpu() for name, value in self.state_dict().items()}, weights)
        told.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        (folder / SETTINGS).unlink(missing_ok=True)  # the old settings must not stand beside the new weights
        os.replace(weights, folder / WEIGHTS)
        os.replace(told, folder / SETTINGS)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> LambdaGate | None:
        """The gate in a memory's folder, None where there is none. Raises ValueError where it cannot be read."""
        folder = Path(folder)
        if not (folder / SETTINGS).is_file():
            return None
        try:
            settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            state = load_file(folder / WEIGHTS)
            gate = cls(len(state["corpus_mean"]), **settings)
            gate.load_state_dict(state)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{folder / SETTINGS}: is no usable gate ({' '.join(str(error).split())[:200]})") from None
        return gate.eval().requires_grad_(False)

    @classmethod
    def beside(cls, memory: nn.Module) -> LambdaGate | None:
        """The gate in the folder that a memory was opened from, or None. Raises ValueError as `load`."""
        place = getattr(memory, "name_or_path", None)
        return cls.load(place) if place else None

    def check_made_for(self, base: nn.Module, memory: nn.Module) -> None:
        """Raises ValueError where the gate was trained for another base or memory."""
        for what, model in (("base", base), ("memory", memory)):
            recorded, found = self.about.get(f"{what}_probe"), probe(model)
            same_size = recorded is not None and len(recorded) == len(found)
            # Another precision rounds; a quantised or spread base has fewer weights to look at.
            if same_size and not torch.allclose(torch.tensor(found), torch.tensor(recorded), rtol=0.02, atol=1e-5):
                raise ValueError(
                    f"the gate was trained for another {what}; train one for this pair: python -m training.gate"
                )


def mix(
    base: torch.Tensor, memory: torch.Tensor, keep: float | torch.Tensor, add: float | torch.Tensor
) -> torch.Tensor:
    """log((1-lambda)·exp(base) + lambda·exp(memory)); `keep` and `add` are the logarithms of 1-lambda and of lambda, less
    the logarithm of the sum of exponentials where base and memory are logits and not log-probabilities.

    Without gradient both are used up.
    """
    if torch.is_grad_enabled() and _tracked(base, memory, keep, add):
        return torch.logaddexp(base + keep, memory + add)
    return torch.logaddexp(base.add_(keep), memory.add_(add), out=base)


def _expected(logits: torch.Tensor, *values: torch.Tensor) -> list[torch.Tensor]:
    """Of logits (…, vocabulary): the favourite token, the logarithm of the sum of exponentials, and the expectations of
    values (…, vocabulary) under their softmax; (…, 1) each."""
    probabilities = logits.softmax(-1)
    if logits.device.type == "cpu":  # NumPy's takes a tenth of the time
        favourite = torch.from_numpy(logits.detach().numpy().argmax(-1, keepdims=True))
    else:
        favourite = logits.argmax(-1, keepdim=True)
    total = logits.gather(-1, favourite) - probabilities.gather(-1, favourite).log()
    return [favourite, total, *((probabilities * each).sum(-1, keepdim=True) for each in values)]


@torch.no_grad()
def probe(model: nn.Module) -> list[float]:
    """The middle value of each of a model's weights, by which it is known again in any precision."""
    weights = (each.detach() for each in model.parameters() if each.is_floating_point() and not each.is_meta)
    values = [weight.reshape(-1)[weight.numel() // 2].float().cpu() for weight in weights]
    return torch.stack(values).tolist() if values else []


def _tracked(*values: Any) -> bool:
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)
