"""A run of the page: settings in, HTML out while the continuations grow, then each token inspected.

Joins models and HTML; knows nothing of Gradio, so it is tested without a browser.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from demo import page
from demo.inspection import SOURCES, InspectedToken, inspect_tokens
from demo.passages import Passages
from demo.streams import (
    BASE,
    JOINT,
    RunningText,
    Sampling,
    encode_prompt,
    padding_token,
    side_by_side,
    text_after,
)
from models import MLPMemory
from utils.errors import InputError, check_fraction, check_positive, one_line

HEADINGS = {BASE: "Base", JOINT: "Base + memory"}


class View(NamedTuple):
    """What the page shows, as HTML."""

    base: str
    joint: str
    inspector: str
    status: str


class Viewer:
    """Runs one prompt at a time, whatever the number of browsers.

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
        self._turn = threading.Lock()
        self._owner: object = None
        self._stopped = threading.Event()

    def empty(self) -> View:
        """The view before the first run."""
        return self._view("", {}, status=page.status(padding_token(self.tokenizer)[1] or ""))

    def stop(self, owner: object = None) -> None:
        """End the run of `owner` at the next token; what was made is inspected."""
        if self._owner == owner:
            self._stopped.set()

    def run(
        self, prompt: str, lmbda: float, knn_temp: float, sampling: Sampling, owner: object = None
    ) -> Iterator[View]:
        """Yield the view while both continuations grow, at last with every token inspected.

        Bad input and want of memory are told in the view's status.
        """
        with self._turn:
            self._owner = owner
            self._stopped.clear()
            try:
                yield from self._run(prompt, lmbda, knn_temp, sampling)
            except InputError as error:
                yield self._view(prompt, {}, status=page.status(str(error).removeprefix("--"), problem=True))
            except torch.OutOfMemoryError as error:
                told = f"out of memory ({one_line(error, 160)}); ask for fewer tokens"
                yield self._view(prompt, {}, status=page.status(told, problem=True))
            finally:
                self._owner = None

    def _run(self, prompt: str, lmbda: float, knn_temp: float, sampling: Sampling) -> Iterator[View]:
        sampling.check()
        self.joint.lmbda = check_fraction("--lambda", lmbda)
        self.joint.knn_temp = check_positive("--memory temperature", knn_temp)
        input_ids, remark = encode_prompt(self.joint, self.tokenizer, prompt, sampling)
        prompt_ids = input_ids[0].tolist()
        running = {side: RunningText(self.tokenizer, prompt_ids) for side in (BASE, JOINT)}
        started = time.monotonic()
        pad_token_id, _ = padding_token(self.tokenizer)
        pieces = side_by_side(self.joint, input_ids, sampling, pad_token_id)
        try:
            for side, tokens in pieces:
                running[side].add(tokens)
                if side == JOINT:  # one view for a token of each
                    yield self._view(prompt, running, running=True, status=page.status("generating …"))
                if self._stopped.is_set():
                    break
        finally:
            pieces.close()
        made = sum(len(each.tokens) for each in running.values())
        told = f"{made} tokens in {time.monotonic() - started:.1f} s"
        status = page.status("; ".join(filter(None, ("stopped" if self._stopped.is_set() else None, told, remark))))
        yield self._view(prompt, running, status=page.status("looking inside …"))
        yield self._view(prompt, running, inspector=self._inspector(prompt_ids, running), status=status)

    def _view(
        self,
        prompt: str,
        texts: dict[str, RunningText],
        *,
        status: str,
        inspector: str = "",
        running: bool = False,
    ) -> View:
        panes = [
            page.running_text(
                side,
                HEADINGS[side],
                prompt if texts else "",
                texts[side].text(ended=not running) if texts else "",
                running=running,
            )
            for side in (BASE, JOINT)
        ]
        return View(*panes, inspector, status)

    def _inspector(self, prompt_ids: list[int], running: dict[str, RunningText]) -> str:
        sides = {
            side: (f"{HEADINGS[side]}, token by token", self._shown(prompt_ids, each.tokens))
            for side, each in running.items()
        }
        return page.inspector(sides, self.joint.lmbda)

    def _shown(self, prompt_ids: list[int], tokens: list[int]) -> list[page.ShownToken]:
        """The tokens of a continuation, inspected, with the texts that the page shows."""
        whole = prompt_ids + tokens
        inspected, hidden = inspect_tokens(self.joint, whole, len(prompt_ids), self._candidate_count)
        found: list[list[page.ShownPassage] | None] = [None] * len(inspected)
        if self._passages is not None and inspected:
            found = [
                [
                    page.ShownPassage(
                        each.before, each.next, each.after, each.token_id == token.token_id, each.distance
                    )
                    for each in passages
                ]
                for token, passages in zip(inspected, self._passages.nearest(hidden, self._passage_count), strict=True)
            ]
        return [
            self._shown_token(whole[: token.position], token, passages)
            for token, passages in zip(inspected, found, strict=True)
        ]

    def _shown_token(
        self, before: list[int], token: InspectedToken, passages: list[page.ShownPassage] | None
    ) -> page.ShownToken:
        def text(token_id: int) -> str:
            return text_after(self.tokenizer, before, [token_id], special=True)

        candidates = {
            name: [(text(each), probability, each == token.token_id) for each, probability in token.top[name]]
            for name in SOURCES
        }
        return page.ShownToken(text(token.token_id), token, candidates, passages)
