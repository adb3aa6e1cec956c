"""Two continuations of one prompt, the base's and the mixture's, made token by token in turn.

Each has its own attention cache and random state. So a seed gives the same text whatever the other side does, and with
lambda 0 both sides are equal, sampled or not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from models import MLPMemory
from utils.errors import InputError

BASE, JOINT = "base", "joint"
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
ANCHOR_TOKENS = 8  # tokens before, decoded along: some tokenizers drop the blank in front of a text's first word


@dataclass
class Sampling:
    """How tokens are chosen. `temperature` 0 is greedy (or beam search, without sampling)."""

    max_new_tokens: int = 40
    temperature: float = 0.0
    top_p: float = 1.0
    num_beams: int = 1
    seed: int = 42

    def check(self) -> Sampling:
        """Return self. Raises InputError naming the flag, its value and what is expected."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"--temperature {self.temperature:g}: expected 0 (greedy) or a number above 0")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top_p {self.top_p}: expected a number above 0, at most 1")
        if not 0 <= self.seed < 1 << 63:
            raise InputError(f"--seed {self.seed}: expected a whole number from 0")
        for name in ("max_new_tokens", "num_beams"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: expected a whole number from 1")
        return self

    def options(self) -> dict[str, Any]:
        """The same as arguments of `generate`, in place of whatever the model's own settings say."""
        sampled = self.temperature > 0
        return {
            "do_sample": sampled,
            "temperature": self.temperature if sampled else 1.0,
            "top_p": self.top_p if sampled else 1.0,
            "top_k": 0 if sampled else 50,
            "num_beams": self.num_beams,
        }


def encode_prompt(joint: MLPMemory, tokenizer: Any, prompt: str, sampling: Sampling) -> tuple[torch.Tensor, str | None]:
    """Token ids (1, time) of a prompt, and a remark where `sampling.max_new_tokens` was lowered to fit the context.

    Raises InputError when the prompt is empty or longer than the base's context.
    """
    ids = tokenizer(prompt, return_tensors="pt").input_ids if prompt.strip() else torch.empty(1, 0)
    length, context = ids.shape[1], joint.config.max_position_embeddings
    if length == 0:
        raise InputError("--prompt: is empty, expected some text to continue")
    if context is not None and length > context:
        raise InputError(f"--prompt: {length} tokens, longer than the base's context of {context}; shorten it")
    room = math.inf if context is None else context - length + 1  # the last token is never fed back
    if sampling.max_new_tokens <= room:
        return ids, None
    sampling.max_new_tokens = room
    return ids, f"the context of {context} tokens leaves room for {room} new ones"


def side_by_side(
    joint: MLPMemory, input_ids: torch.Tensor, sampling: Sampling, pad_token_id: int, *, in_turn: bool = True
) -> Iterator[tuple[str, list[int]]]:
    """Yield (BASE or JOINT, its next token ids) until both have ended; beams come all at once at the end.

    `input_ids` (1, time). A token of each in turn, or, without `in_turn`, first all of the base's. The texts are the
    same. The joint model's lambda and temperature must not change meanwhile.
    """
    sides = {
        BASE: continuation(joint.base_lm, input_ids, sampling, pad_token_id),
        JOINT: continuation(joint, input_ids, sampling, pad_token_id),
    }
    while sides:
        for side in list(sides)[: None if in_turn else 1]:
            tokens = next(sides[side], None)
            if tokens is None:
                del sides[side]
            else:
                yield side, tokens


def continuation(model: Any, input_ids: torch.Tensor, sampling: Sampling, pad_token_id: int) -> Iterator[list[int]]:
    """Yield the token ids that `generate` makes after `input_ids` (1, time), one at a time; those of beams together."""
    ids = input_ids.to(model.get_input_embeddings().weight.device)
    options = sampling.options() | {"pad_token_id": pad_token_id}
    at_once = 1 if sampling.num_beams == 1 else sampling.max_new_tokens
    if at_once == 1:
        # The cache makes each call go on where the one before ended.
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        options |= {"past_key_values": cache, "cache_implementation": None}
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices):
        torch.manual_seed(sampling.seed)
        random = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]
    for _ in range(0, sampling.max_new_tokens, at_once):
        with torch.random.fork_rng(devices):
            torch.set_rng_state(random[0])
            for device, state in zip(devices, random[1], strict=True):
                torch.cuda.set_rng_state(state, device)
            whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=at_once, **options)
            random = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]
        tokens, ids = whole[0, ids.shape[1] :].tolist(), whole
        yield tokens
        if tokens[-1] in ends:
            return


def padding_token(tokenizer: Any) -> tuple[int, str | None]:
    """The id that stands for padding, and a remark where the tokenizer has none of its own."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id, None
    if tokenizer.eos_token_id is not None:
        return tokenizer.eos_token_id, f"the tokenizer has no padding token: {tokenizer.eos_token} stands for it"
    return 0, "the tokenizer has no padding and no end-of-sequence token: token 0 stands for padding"


def text_after(tokenizer: Any, before: list[int], tokens: list[int], *, special: bool = False) -> str:
    """What `tokens` add to a text that ends in the tokens `before`; with `special`, special tokens by name."""
    anchor = before[-ANCHOR_TOKENS:]
    start = tokenizer.decode(anchor, skip_special_tokens=not special)
    whole = tokenizer.decode(anchor + tokens, skip_special_tokens=not special)
    if whole.startswith(start):
        return whole[len(start) :]
    # The anchor ends within a character that the first token completes.
    return tokenizer.decode(tokens, skip_special_tokens=not special)


class RunningText:
    """The text of a continuation while its tokens come. A character that is not complete yet is held back."""

    def __init__(self, tokenizer: Any, prompt_ids: list[int]) -> None:
        self.tokens: list[int] = []
        self._tokenizer, self._prompt = tokenizer, prompt_ids

    def text(self, *, ended: bool = False) -> str:
        """All of it so far; with `ended`, incomplete characters included."""
        text = text_after(self._tokenizer, self._prompt, self.tokens)
        return text if ended else text.rstrip(INCOMPLETE)
