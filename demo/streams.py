"""Two continuations of one prompt, the base's and the mixture's, made token by token in turn.

Each has its own attention cache and random state. So a seed gives the same text whatever the other side does, and with
lambda 0 both sides are equal, sampled or not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from transformers import DynamicCache

from demo.pair import Sampling
from models import MLPMemory
from utils.errors import InputError

BASE, JOINT = "base", "joint"
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
ANCHOR_TOKENS = 8  # tokens before, decoded along: some tokenizers drop the blank in front of a text's first word


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
    joint: MLPMemory, tokenizer: Any, input_ids: torch.Tensor, sampling: Sampling, *, in_turn: bool = True
) -> Iterator[tuple[str, list[int]]]:
    """Yield (BASE or JOINT, its next token ids) until both have ended; beams come all at once at the end.

    `input_ids` (1, time). A token of each in turn, or, without `in_turn`, first all of the base's. The texts are the
    same. The joint model's lambda and temperature must not change meanwhile.
    """
    sides = {
        BASE: continuation(joint.base_lm, tokenizer, input_ids, sampling),
        JOINT: continuation(joint, tokenizer, input_ids, sampling),
    }
    while sides:
        for side in list(sides)[: None if in_turn else 1]:
            tokens = next(sides[side], None)
            if tokens is None:
                del sides[side]
            else:
                yield side, tokens


def continuation(model: Any, tokenizer: Any, input_ids: torch.Tensor, sampling: Sampling) -> Iterator[list[int]]:
    """Yield the token ids that `generate` makes after `input_ids` (1, time), one at a time; those of beams together."""
    ids = input_ids.to(model.get_input_embeddings().weight.device)
    # Only a beam that has ended is padded, and its padding is not shown.
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    options = sampling.options() | {"pad_token_id": next(token for token in pads if token is not None)}
    at_once = sampling.max_new_tokens
    if sampling.num_beams == 1:
        at_once = 1
        # The cache makes each call go on where the one before ended.
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        options |= {"past_key_values": cache, "cache_implementation": None}
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    states = None
    for _ in range(0, sampling.max_new_tokens, at_once):
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            if states is None:
                torch.manual_seed(sampling.seed)
            else:
                torch.set_rng_state(states[0])
                torch.cuda.set_rng_state_all(states[1])
            whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=at_once, **options)
            states = torch.get_rng_state(), torch.cuda.get_rng_state_all()
        tokens, ids = whole[0, ids.shape[1] :].tolist(), whole
        yield tokens
        if tokens[-1] in ends:
            return


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
