"""What the memory does to each token of a text: probabilities of base, memory and mixture, and their top candidates."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from demo.passages import Passage
from models import MLPMemory
from models.capture import base_logits, hidden_and_head_input
from models.joint_config import ADAPTIVE
from models.mlpMemory import joint_log_probs

SOURCES = ("base", "memory", "mixture")


@dataclass
class InspectedToken:
    """A token of a text and what was said of it before it came.

    `base`, `memory`, `mixture`: its log-probability in nats under each. `lmbda`: the memory's weight in the mixture. `top`:
    for each of SOURCES the most probable tokens there, [(token id, probability)], falling. Whoever shows it adds `texts`,
    of it and of these by token id, and `passages`, the nearest of the training texts (None where no datastore is at hand).
    """

    position: int
    token_id: int
    base: float
    memory: float
    mixture: float
    lmbda: float
    top: dict[str, list[tuple[int, float]]]
    texts: dict[int, str] = field(default_factory=dict)
    passages: list[Passage] | None = None

    @property
    def text(self) -> str:
        return self.texts[self.token_id]

    @property
    def moved(self) -> float:
        """How much the memory moved it: log p_mixture - log p_base, in nats; at least log(1 - lambda)."""
        return self.mixture - self.base


@torch.inference_mode()
def inspect_tokens(
    joint: MLPMemory, token_ids: list[int], first: int, top: int = 6
) -> tuple[list[InspectedToken], torch.Tensor]:
    """Look at the tokens of a text from number `first` on (at least 1: the first token has nothing before it).

    The probabilities are those of the model itself, at the joint model's lambda and memory temperature, whatever
    sampling settings the text was made with.

    Returns:
        The inspected tokens, and the captured hidden states (n, hidden) that each was predicted from: the queries with
        which a datastore is searched.
    """
    if first >= len(token_ids):
        return [], torch.empty(0, joint.config.hidden_size)
    ids = torch.tensor([token_ids[:-1]], device=joint.get_input_embeddings().weight.device)  # (1, time)
    positions = torch.zeros_like(ids, dtype=torch.bool)
    positions[:, first - 1 :] = True
    hidden, head_input = hidden_and_head_input(joint.base_lm, ids, positions, joint.layer_position)  # (n, hidden) each
    logits = base_logits(joint.base_lm, head_input)  # (n, V)
    memory_logits = joint.memory_logits(hidden).to(logits.device)  # (n, V)
    wanted = torch.tensor(token_ids[first:], device=logits.device)[:, None]  # (n, 1)
    scores = {  # (n, V) each
        "base": joint_log_probs(logits, memory_logits, 0.0, 1.0),
        "memory": joint_log_probs(logits, memory_logits, 1.0, joint.knn_temp),
    }
    if joint.lmbda == ADAPTIVE:
        lmbda = joint.gate(scores["base"], scores["memory"], hidden).sigmoid()  # (n, 1)
    else:
        lmbda = torch.full_like(wanted, joint.lmbda, dtype=torch.float32)
    scores["mixture"] = torch.logaddexp(scores["base"] + (-lmbda).log1p(), scores["memory"] + lmbda.log())
    own, best = {}, {}
    for name, each in scores.items():
        own[name] = each.gather(-1, wanted)[:, 0].tolist()
        values, tokens = each.topk(min(top, each.shape[-1]))  # (n, top) each
        best[name] = [list(zip(*row, strict=True)) for row in zip(tokens.tolist(), values.exp().tolist(), strict=True)]
    inspected = []
    for row, token in enumerate(token_ids[first:]):
        here, top_here = ({name: each[name][row] for name in SOURCES} for each in (own, best))
        inspected.append(InspectedToken(first + row, token, **here, lmbda=lmbda[row].item(), top=top_here))
    return inspected, hidden
