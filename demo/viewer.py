"""A run of the page: settings in, HTML out while the continuations grow, then each token inspected."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from demo import page
from demo.inspection import InspectedToken, inspect_tokens
from demo.pair import Sampling
from demo.passages import Passages
from demo.streams import BASE, JOINT, RunningText, encode_prompt, side_by_side, text_after
from models import MLPMemory
from utils.errors import InputError, check_positive, one_line
from utils.results import ADAPTIVE, check_lambda

HEADINGS = {BASE: "Base", JOINT: "Base + memory"}


class View(NamedTuple):
    """What the page shows, as HTML."""

    base: str
    joint: str
    inspector: str
    status: str


class Viewer:
    """Runs prompts, one at a time: the page's queue sees to that.

    Args:
        joint, tokenizer: the models.
        passages: where training passages are looked up, or None.
        passage_count, candidate_count: how many of each are shown for a token.
    """

    def __init__(
        self,
        joint: MLPMemory,
        tokenizer: Any,
        passages: Passages | None = None,
        *,
        passage_count: int = 3,
        candidate_count: int = 6,
    ) -> None:
        self.joint, self.tokenizer = joint, tokenizer
        self._passages, self._passage_count, self._candidate_count = passages, passage_count, candidate_count
        self._owner: object = None
        self._stopped = False

    def empty(self) -> View:
        """The view before the first run."""
        return self._view("", {}, "")

    def stop(self, owner: object = None) -> None:
        """End the run of `owner` at the next token; what was made is inspected."""
        self._stopped = self._stopped or self._owner == owner

    def has_gate(self) -> bool:
        """Whether lambda may be "adaptive": the memory has a gate for this base."""
        before = self.joint.lmbda, self.joint.knn_temp
        try:
            self.joint.lmbda = ADAPTIVE
        except ValueError:
            return False
        self.joint.lmbda, self.joint.knn_temp = before
        return True

    def run(
        self, prompt: str, lmbda: float | str, knn_temp: float, sampling: Sampling, owner: object = None
    ) -> Iterator[View]:
        """Yield the view while both continuations grow, at last with every token inspected.

        With lambda "adaptive" the memory's temperature is its gate's.
        Bad input and want of memory are told in the view's status.
        """
        self._owner, self._stopped = owner, False
        try:
            sampling.check()
            self.joint.knn_temp = check_positive("--memory temperature", knn_temp)
            self.joint.lmbda = check_lambda("--lambda", lmbda)
            input_ids, remark = encode_prompt(self.joint, self.tokenizer, prompt, sampling)
            prompt_ids = input_ids[0].tolist()
            texts = {side: RunningText(self.tokenizer, prompt_ids) for side in (BASE, JOINT)}
            started = time.monotonic()
            for side, tokens in side_by_side(self.joint, self.tokenizer, input_ids, sampling):
                texts[side].tokens += tokens
                if side == JOINT:  # one view for a token of each
                    yield self._view(prompt, texts, "generating …", running=True)
                if self._stopped:
                    break
            told = f"{sum(len(each.tokens) for each in texts.values())} tokens in {time.monotonic() - started:.1f} s"
            told = "; ".join(filter(None, ("stopped" if self._stopped else None, told, remark)))
            yield self._view(prompt, texts, "looking inside …")
            sides = {
                side: (f"{HEADINGS[side]}, token by token", self._inspected(prompt_ids, each.tokens))
                for side, each in texts.items()
            }
            yield self._view(prompt, texts, told, inspector=page.inspector(sides, adaptive=lmbda == ADAPTIVE))
        except (InputError, torch.OutOfMemoryError) as error:
            yield self._view(prompt, {}, one_line(error).removeprefix("--"), problem=True)
        finally:
            self._owner = None

    def _view(
        self,
        prompt: str,
        texts: dict[str, RunningText],
        status: str,
        *,
        inspector: str = "",
        running: bool = False,
        problem: bool = False,
    ) -> View:
        shown = {side: text.text(ended=not running) for side, text in texts.items()}
        panes = [
            page.running_text(side, heading, prompt if texts else "", shown.get(side, ""), running=running)
            for side, heading in HEADINGS.items()
        ]
        return View(*panes, inspector, page.status(status, problem=problem))

    def _inspected(self, prompt_ids: list[int], tokens: list[int]) -> list[InspectedToken]:
        """The tokens of a continuation with their numbers, texts and passages."""
        whole = prompt_ids + tokens
        inspected, hidden = inspect_tokens(self.joint, whole, len(prompt_ids), self._candidate_count)
        for token in inspected:
            named = {token.token_id, *(candidate for top in token.top.values() for candidate, _ in top)}
            before = whole[: token.position]
            token.texts = {each: text_after(self.tokenizer, before, [each], special=True) for each in named}
        if self._passages is not None and inspected:
            for token, nearest in zip(inspected, self._passages.nearest(hidden, self._passage_count), strict=True):
                token.passages = nearest
        return inspected
