"""What every compared method is measured by: perplexity and next-token accuracy on windows, facts completed, speed.

All methods are asked for the same tokens; they differ in what stands before the text (`passages`) and in the model that
answers.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.inference import Clock, generate
from downstream.recall import Case
from downstream.scoring import context_length
from utils.evaluation import temperature_grid


@dataclass
class Method:
    """One way to answer.

    Attributes:
        base: the language model that runs.
        model: what answers, where it is not the base itself.
        passages: a text -> token ids to put before it; None where nothing is.
        around: a context in which the model answers.
        bytes: what the method adds on disk.
        note: what the table's reader has to know.
        settings: what is kept beside the figures.
    """

    base: Any
    model: Any = None
    passages: Callable[[str], list[int]] | None = None
    around: Callable[[], Any] = contextlib.nullcontext
    bytes: int = 0
    note: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = self.base if self.model is None else self.model

    def before(self, text: str, ids: Tensor, more: int = 0) -> tuple[Tensor, int]:
        """`ids` (time,) with the passages for `text` before them; so that `more` tokens fit the context, the oldest of
        `ids` give way.

        Returns the input ids, and how far each token of `ids` has moved to the right (negative: to the left).
        """
        passages = self.passages(text) if self.passages and text.strip() else []
        context = context_length(self.base.config)
        cut = max(len(passages) + len(ids) + more - context, 0) if context else 0
        return torch.cat([torch.tensor(passages, dtype=ids.dtype), ids[cut:]]), len(passages) - cut


@torch.inference_mode()
def score(model: Any, ids: Tensor, begin: int) -> tuple[float, list[bool]]:
    """The tokens of `ids` (time,) from `begin` on: their log-likelihood, and which have the highest probability."""
    labels = ids[begin:].to(model.device)  # (rows,)
    inputs = ids[None, :-1].to(model.device)
    logits = model(input_ids=inputs, use_cache=False, logits_to_keep=len(labels)).logits[0]  # (rows, V)
    return temperature_grid(logits, labels, (1.0,)).double().sum().item(), (logits.argmax(-1) == labels).tolist()


def score_windows(method: Method, windows: Any, tokenizer: Any, chunk: int, query: int) -> dict[str, Any]:
    """Perplexity and next-token accuracy on windows; every method is asked for the same tokens.

    Returns:
        perplexity, accuracy, tokens, and log_likelihood: a [sum, tokens] of each window.
    """
    likelihoods, right = [], 0
    with method.around():
        for window in windows:
            total = count = 0
            for ids, begin in pieces(method, window, tokenizer, chunk, query):
                likelihood, hits = score(method.model, ids, begin)
                total, count, right = total + likelihood, count + len(ids) - begin, right + sum(hits)
            likelihoods.append([total, count])
    tokens = sum(count for _, count in likelihoods)
    return {
        "perplexity": math.exp(-sum(total for total, _ in likelihoods) / tokens),
        "accuracy": right / tokens,
        "tokens": tokens,
        "log_likelihood": likelihoods,
    }


def pieces(
    method: Method, window: dict[str, Any], tokenizer: Any, chunk: int, query: int
) -> Iterator[tuple[Tensor, int]]:
    """What is run for one window: (input ids (n,), where those that are scored begin).

    A method with passages reads a window in chunks of `chunk` tokens: the passages found for the `query` tokens before
    the chunk, then the window up to the chunk, whose tokens alone are scored. The first chunk has nothing before it,
    so nothing is looked for.
    """
    ids = torch.from_numpy(np.asarray(window["input_ids"], dtype=np.int64))
    # The labels of a window are its tokens from one place on, up to the padding; the first token is never predicted.
    counted = np.flatnonzero(np.asarray(window["labels"]) != -100)
    first, last = max(int(counted[0]), 1), int(counted[-1]) + 1
    size = chunk if method.passages else len(ids)
    for start in range(0, last, size):
        begin, end = max(start, first), min(start + size, last)
        if begin < end:
            text = tokenizer.decode(ids[max(start - query, 0) : start], skip_special_tokens=True)
            inputs, moved = method.before(text, ids[:end])
            yield inputs, begin + moved


def score_facts(method: Method, cases: Sequence[Case], tokenizer: Any) -> dict[str, Any]:
    """Share of cases whose whole answer greedy decoding gives, by the rule of `downstream.recall`.

    Returns:
        accuracy and standard_error (None without cases), cases, and right: "1" or "0" for each case; and first_token,
        first_right: of its first token the same.
    """
    right, first = [], []
    with method.around():
        for case in cases:
            prompt, whole = (tokenizer(text)["input_ids"] for text in (case.prompt, case.prompt + case.answer))
            # As in `downstream.recall`: a tokenizer may merge over the boundary, then the answer starts earlier.
            begin = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
            ids, moved = method.before(case.prompt, torch.tensor(whole))
            begin = max(begin + moved, 1)
            hits = score(method.model, ids, begin)[1]
            right.append(all(hits))
            first.append(hits[0])
    share, first_share = (sum(each) / len(cases) if cases else None for each in (right, first))
    error = math.sqrt(share * (1 - share) / len(cases)) if cases else None
    found = {"accuracy": share, "standard_error": error, "cases": len(cases), "first_token": first_share}
    return found | {
        name: "".join("01"[hit] for hit in each) for name, each in (("right", right), ("first_right", first))
    }


def speed_prompts(cases: Sequence[Case], windows: Any, tokenizer: Any, count: int) -> list[str]:
    """`count` prompts for timing: of facts, evenly chosen; without any, the first 48 tokens of windows."""
    if cases:
        step = max(len(cases) / count, 1.0)
        return [cases[int(number * step)].prompt for number in range(min(count, len(cases)))]
    return [tokenizer.decode(window["input_ids"][:48], skip_special_tokens=True) for window in windows[:count]]


def measure_speed(method: Method, prompts: Sequence[str], tokenizer: Any, new_tokens: int) -> dict[str, Any]:
    """Time to first token and tokens a second, one prompt at a time, the bare base in turn with the method.

    The time to the first token begins with the prompt's text: retrieval and tokenization are in it.

    Returns:
        first_token_seconds and tokens_per_second of the method, base_… of the bare base in the same minutes,
        …_ratio: median over prompts of method / base; prompt_tokens: mean, with the passages.
    """
    rounds = []
    for prompt in [prompts[0], *prompts]:
        ways = (method, Method(method.base))
        rounds.append([generate_once(way, prompt, tokenizer, new_tokens) for way in ways])
    rounds = rounds[1:]  # the first warms up
    found: dict[str, Any] = {"prompts": len(prompts), "new_tokens": new_tokens}
    found["prompt_tokens"] = mean(own[2] for own, _ in rounds)
    for place, name in enumerate(("first_token_seconds", "tokens_per_second")):
        found[name] = median(own[place] for own, _ in rounds)
        found[f"base_{name}"] = median(bare[place] for _, bare in rounds)
        found[f"{name}_ratio"] = median(own[place] / bare[place] for own, bare in rounds)
    return found


def generate_once(method: Method, prompt: str, tokenizer: Any, new_tokens: int) -> tuple[float, float, int]:
    """(seconds to the first token, tokens a second after it, prompt tokens) of one greedy generation."""
    device = method.base.get_input_embeddings().weight.device
    clock = Clock(device.type)
    with method.around():
        start = time.perf_counter()
        ids, _ = method.before(prompt, torch.tensor(tokenizer(prompt)["input_ids"]), new_tokens)
        generate(method.model, ids[None].to(device), new_tokens + 1, streamer=clock)
    # The prompt is put first, then each token.
    return clock.times[1] - start, new_tokens / (clock.times[-1] - clock.times[1]), len(ids)
