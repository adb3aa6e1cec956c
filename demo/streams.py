"""Both continuations of a prompt, base and base + memory, made by one `generate` call of the base.

The prompt is a batch of two rows. A logits processor leaves the first row to the base, gives the second the mixture,
and records what base, memory and mixture say about each token. Both rows use the same random numbers, so continuations
differ only by the memory: with lambda 0 they are equal, even when sampled.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Queue
from typing import Any

import torch
from transformers import LogitsProcessor, TopPLogitsWarper
from transformers.generation import BaseStreamer

from demo.pair import Sampling
from models import MLPMemory
from models.capture import HiddenCapture, captured_module
from models.joint_config import ADAPTIVE
from models.mixture import fixed_log_weights, gate_log_weights, log_mixture
from models.mlpMemory import room_after
from models.stack import context_size

SIDES = BASE, JOINT = "base", "joint"
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
ANCHOR_TOKENS = 8  # decoded along, since some tokenizers drop the space at the start of a text


@dataclass
class Token:
    """A generated token and the distributions that it was chosen from.

    `log_probs`: its log-probability (nats) in each of `sources_of`. `top`: the most probable tokens of each, [(token id,
    probability)]. `weights`: those of the memories. `hidden`: the captured hidden state (hidden,). `demo.viewer` fills in
    `texts` (of it and its candidates, by token id) and `passages`.
    """

    token_id: int
    log_probs: dict[str, float]
    top: dict[str, list[tuple[int, float]]]
    weights: list[float]
    hidden: torch.Tensor
    texts: dict[int, str] = field(default_factory=dict)
    passages: list[Any] | None = None

    @property
    def lmbda(self) -> float:
        """The weight of all memories."""
        return sum(self.weights)

    @property
    def memory(self) -> int:
        """The number, from 0, of the memory with the largest share of this token's probability."""
        _, *memories, _ = self.log_probs.values()
        shares = [weight * math.exp(log_prob) for weight, log_prob in zip(self.weights, memories, strict=True)]
        return shares.index(max(shares))

    @property
    def moved(self) -> float:
        """log p_mixture - log p_base in nats; at least log(1 - lambda)."""
        return self.log_probs["mixture"] - self.log_probs["base"]


def sources_of(memories: int) -> list[str]:
    """The names of the distributions: base, memory (or memory 1, memory 2, …), mixture."""
    return ["base", *(["memory"] if memories == 1 else [f"memory {n}" for n in range(1, memories + 1)]), "mixture"]


class SideBySide(LogitsProcessor, BaseStreamer):
    """Logits processor and streamer of a `generate` call on two rows; `queue` gets the tokens so far at each step."""

    def __init__(self, joint: MLPMemory, sampling: Sampling, candidates: int) -> None:
        self.queue: Queue[dict[str, list[Token]] | None] = Queue()
        self.stopped = False
        self._joint, self._sampling, self._candidates = joint, sampling, candidates
        self._lmbda, self._temperatures = joint.lmbda, joint.temperatures
        self._random = torch.Generator().manual_seed(sampling.seed)
        self._steps: deque[tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]] = deque()
        self._made: dict[str, list[Token]] = {side: [] for side in SIDES}
        ends = joint.base_lm.generation_config.eos_token_id
        self._ends = ends if isinstance(ends, list) else [ends]

    def generate(self, input_ids: torch.Tensor, max_new_tokens: int) -> None:
        """Continue `input_ids` (1, time) up to the context; raises ValueError if the prompt is empty or too long."""
        base = self._joint.base_lm
        room = room_after(input_ids, None, context_size(self._joint.config))
        ids = input_ids.expand(2, -1).to(base.get_input_embeddings().weight.device)
        with HiddenCapture(captured_module(base, self._joint.layer_position)) as self._capture:
            base.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=min(max_new_tokens, room),
                do_sample=False,
                num_beams=1,
                disable_compile=True,  # the capture is a hook
                pad_token_id=self._ends[0] or 0,
                logits_processor=[self],
                stopping_criteria=[lambda ids, scores, **_: self.stopped],
                streamer=self,
            )

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The base's logits (2, vocabulary) → scores whose argmax are the next tokens."""
        hidden = self._capture.take()[:, -1]  # (2, hidden)
        base = scores.log_softmax(-1)
        learned = zip(self._joint.memory_logits(hidden), self._temperatures, strict=True)
        memories = [(logits.to(base.device).float() / temp).log_softmax(-1) for logits, temp in learned]
        if self._lmbda == ADAPTIVE:
            pairs = zip(self._joint.gates, memories, strict=True)
            weights = gate_log_weights(*(gate(base, memory, hidden) for gate, memory in pairs))  # (2, 1) each
        else:
            weights = fixed_log_weights(self._lmbda, len(memories))
        mixture = log_mixture([base, *memories], weights)
        scores_of = dict(zip(sources_of(len(memories)), (base, *memories, mixture), strict=True))
        shares = torch.cat([torch.as_tensor(weight).exp().expand(2, 1) for weight in weights[1:]], 1)
        self._steps.append((scores_of, shares, hidden))
        chosen = torch.stack([base[0], mixture[1]])
        if self._sampling.temperature <= 0:
            return chosen
        # The Gumbel-max trick: the argmax of log-probabilities plus Gumbel noise is a sample.
        chosen = TopPLogitsWarper(self._sampling.top_p)(input_ids, chosen / self._sampling.temperature)
        noise = torch.empty(chosen.shape[-1]).exponential_(generator=self._random)
        return chosen - noise.log().to(chosen.device)

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate` with the prompt (2, time), then with the two tokens of each step."""
        if value.ndim == 2:
            return
        scores, weights, hidden = self._steps.popleft()
        best = {name: each.exp().topk(min(self._candidates, each.shape[-1])) for name, each in scores.items()}
        for row, (token, tokens) in enumerate(zip(value.tolist(), self._made.values(), strict=True)):
            if tokens and tokens[-1].token_id in self._ends:
                continue  # this is padding
            log_probs = {name: each[row, token].item() for name, each in scores.items()}
            top = {
                name: list(zip(each.indices[row].tolist(), each.values[row].tolist(), strict=True))
                for name, each in best.items()
            }
            tokens.append(Token(token, log_probs, top, weights[row].tolist(), hidden[row]))
        self.queue.put({side: tokens.copy() for side, tokens in self._made.items()})

    def end(self) -> None:
        """Called by `generate` at its end, but not after an error: `side_by_side` ends the queue instead."""


def side_by_side(
    joint: MLPMemory, input_ids: torch.Tensor, sampling: Sampling, max_new_tokens: int, candidates: int = 6
) -> Iterator[dict[str, list[Token]]]:
    """Yield {BASE: its tokens so far, JOINT: its tokens so far} after each step, until both have ended.

    `input_ids` (1, time). Generation runs in its own thread, and stops at the next token if the iterator is closed.
    Raises ValueError for an empty prompt, one longer than the context, and top_p out of range.
    """
    both = SideBySide(joint, sampling, candidates)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(both.generate, input_ids, max_new_tokens)
        future.add_done_callback(lambda _: both.queue.put(None))
        try:
            yield from iter(both.queue.get, None)
        finally:
            both.stopped = True
        future.result()


def text_after(tokenizer: Any, before: list[int], tokens: list[int], *, special: bool = False) -> str:
    """What `tokens` add to a text that ends in the tokens `before`; `special` keeps special tokens."""
    anchor = before[-ANCHOR_TOKENS:]
    start, whole, alone = (
        tokenizer.decode(each, skip_special_tokens=not special) for each in (anchor, anchor + tokens, tokens)
    )
    # It does not start so where the anchor ends within a character.
    return whole.removeprefix(start) if whole.startswith(start) else alone


def running_text(tokenizer: Any, prompt_ids: list[int], tokens: list[Token]) -> str:
    """The text of a continuation so far, without a last character that is still incomplete."""
    return text_after(tokenizer, prompt_ids, [token.token_id for token in tokens]).rstrip(INCOMPLETE)
