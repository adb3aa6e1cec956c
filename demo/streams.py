"""Two continuations of one prompt, the base's and the mixture's, made token by token in turn.

`generate` runs to its end, so each of the two calls has a thread of its own; only one of them runs at any time, and
each has its own random state. So a seed gives the same text whatever the other side does, and with lambda 0 both sides
are equal, sampled or not. Knows token ids; nothing of pages or terminals.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from models import MLPMemory
from models.generation_checks import check_settings
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
        if not 0 <= self.seed < 1 << 63:
            raise InputError(f"--seed {self.seed}: expected a whole number from 0")
        try:
            check_settings({name: getattr(self, name) for name in ("max_new_tokens", "top_p", "num_beams")})
        except ValueError as error:
            raise InputError(f"--{error}") from None
        return self

    def options(self) -> dict[str, Any]:
        """The same as arguments of `generate`, in place of whatever the model's own settings say."""
        sampled = self.temperature > 0
        return {
            "max_new_tokens": self.max_new_tokens,
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
    if context is None:
        return ids, None
    if length > context:
        raise InputError(f"--prompt: {length} tokens, longer than the base's context of {context}; shorten it")
    room = context - length + 1  # the last token is never fed back
    if sampling.max_new_tokens <= room:
        return ids, None
    sampling.max_new_tokens = room
    return ids, f"the context of {context} tokens leaves room for {room} new ones"


def side_by_side(
    joint: MLPMemory, input_ids: torch.Tensor, sampling: Sampling, pad_token_id: int, *, in_turn: bool = True
) -> Iterator[tuple[str, list[int]]]:
    """Yield (BASE or JOINT, its next token ids) until both have ended; beams come all at once at the end.

    `input_ids` (1, time). A token of each in turn, or, without `in_turn`, first all of the base's. The texts are the
    same. The joint model's lambda and temperature must not change meanwhile. Closing the iterator stops both.
    """
    options = sampling.options() | {"pad_token_id": pad_token_id}
    with (
        Continuation(joint.base_lm, input_ids, options, sampling.seed) as base,
        Continuation(joint, input_ids, options, sampling.seed) as mixed,
    ):
        sides = {BASE: base, JOINT: mixed}
        for together in [sides] if in_turn else [{side: sides[side]} for side in sides]:
            while not all(continuation.ended for continuation in together.values()):
                for side, continuation in together.items():
                    if not continuation.ended and (tokens := continuation.step()):
                        yield side, tokens


class _ClosedError(Exception):
    """Ends a `generate` call that nobody waits for. Never leaves this module."""


class Continuation(BaseStreamer):
    """One `generate` call that advances by a token at each `step`. Use it as a context manager, or call `close`."""

    def __init__(self, model: Any, input_ids: torch.Tensor, options: dict[str, Any], seed: int) -> None:
        self.ended = False
        self._model, self._options = model, options
        self._input_ids = input_ids.to(model.get_input_embeddings().weight.device)
        self._random = _seeded(seed)
        self._go, self._came = threading.Semaphore(0), threading.Semaphore(0)
        self._tokens: list[int] = []
        self._prompt_seen = self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def step(self) -> list[int]:
        """The next token ids; none when the continuation ends (`ended`). Raises what `generate` raised."""
        if self.ended:
            return []
        outside = _random_state()
        _set_random_state(self._random)
        try:
            self._go.release()
            self._came.acquire()
        finally:
            self._random = _random_state()
            _set_random_state(outside)
        if self._error is not None:
            raise self._error
        tokens, self._tokens = self._tokens, []
        return tokens

    def close(self) -> None:
        """Stop, at the next token if one is being made."""
        self._closed = True
        self._go.release()
        self._thread.join()

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate` with the prompt, then with each token; returns when `step` asks for the next."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._tokens.extend(value.flatten().tolist())
        self._hand_over()

    def end(self) -> None:
        """Called by `generate` after the last token; `_run` ends the thread."""

    def _hand_over(self) -> None:
        self._came.release()
        self._go.acquire()
        if self._closed:
            raise _ClosedError

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._closed:
                self._generate()
        except _ClosedError:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.ended = True
            self._came.release()

    def _generate(self) -> None:
        beams = self._options["num_beams"] > 1
        output = self._model.generate(
            self._input_ids,
            attention_mask=torch.ones_like(self._input_ids),
            streamer=None if beams else self,
            **self._options,
        )
        if beams:
            self._tokens.extend(output[0, self._input_ids.shape[1] :].tolist())

    def __enter__(self) -> Continuation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _random_state() -> tuple[torch.Tensor, list[torch.Tensor]]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), cuda


def _set_random_state(state: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


def _seeded(seed: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The random state that `seed` gives, without changing the one there is."""
    outside = _random_state()
    torch.manual_seed(seed)
    state = _random_state()
    _set_random_state(outside)
    return state


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

    def add(self, tokens: list[int]) -> None:
        self.tokens.extend(tokens)

    def text(self, *, ended: bool = False) -> str:
        """All of it so far; with `ended`, incomplete characters included."""
        text = text_after(self._tokenizer, self._prompt, self.tokens)
        return text if ended else text.rstrip(INCOMPLETE)
