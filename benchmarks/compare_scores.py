"""The figures of a compared method: perplexity and next-token accuracy, beginnings continued, speed.

All methods predict the same tokens; they differ in the model and in the passages in front of the text.
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
from downstream.ask import Question, answers, rates
from downstream.recall import Case
from downstream.scoring import Evaluator, context_length


@dataclass
class Method:
    """A compared method.

    Attributes:
        base: the language model that runs.
        model: what answers, if not the base alone.
        passages: a text → token ids to put in front of it; None without retrieval.
        around: a context in which the model answers.
        bytes: what the method adds on disk.
        note: explanation below the table.
        settings: recorded with the figures.
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
        """`ids` (time,) with the passages for `text` in front, without the oldest of `ids` if `more` new tokens would not
        fit the context.

        Returns the input ids, and how far the tokens of `ids` have moved to the right (negative: to the left).
        """
        passages = self.passages(text) if self.passages and text.strip() else []
        context = context_length(self.base.config)
        cut = max(len(passages) + len(ids) + more - context, 0) if context else 0
        return torch.cat([torch.tensor(passages, dtype=ids.dtype), ids[cut:]]), len(passages) - cut


@torch.inference_mode()
def score(model: Any, ids: Tensor, begin: int) -> tuple[float, list[bool]]:
    """The log-likelihood of the tokens of `ids` (time,) from `begin` on, and which of them are top-1."""
    labels = ids[begin:].to(model.device)  # (rows,)
    inputs = ids[None, :-1].to(model.device)
    logits = model(input_ids=inputs, use_cache=False, logits_to_keep=len(labels)).logits[0].float()  # (rows, V)
    likelihoods = logits.gather(-1, labels[:, None])[:, 0] - logits.logsumexp(-1)
    return likelihoods.double().sum().item(), (logits.argmax(-1) == labels).tolist()


def score_windows(method: Method, windows: Any, tokenizer: Any, chunk: int, query: int) -> dict[str, Any]:
    """perplexity, accuracy and tokens of windows, and log_likelihood: [sum, tokens] of each window."""
    likelihoods, right = [], 0
    with method.around():
        for window in windows:
            total = count = 0
            for ids, begin in chunks(method, window, tokenizer, chunk, query):
                likelihood, hits = score(method.model, ids, begin)
                total, count, right = total + likelihood, count + len(ids) - begin, right + sum(hits)
            likelihoods.append([total, count])
    tokens = sum(count for _, count in likelihoods)
    perplexity = math.exp(-sum(total for total, _ in likelihoods) / tokens)
    return {"perplexity": perplexity, "accuracy": right / tokens, "tokens": tokens, "log_likelihood": likelihoods}


def chunks(
    method: Method, window: dict[str, Any], tokenizer: Any, chunk: int, query: int
) -> Iterator[tuple[Tensor, int]]:
    """The inputs for one window: (input ids (n,), where the scored tokens begin).

    With retrieval a window is read in chunks of `chunk` tokens: the passages found for the `query` tokens before the
    chunk, then the window up to the chunk, whose tokens alone are scored. The first chunk has no query.
    """
    ids = torch.from_numpy(np.asarray(window["input_ids"], dtype=np.int64))
    # The labels are the tokens from one position on, up to the padding; the first token is never predicted.
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
    """Beginnings whose whole answer (and whose first token) greedy decoding gives, by the rule of `downstream.recall`.

    Returns accuracy, standard_error, first_token (all shares), cases; right, first_right: "1" or "0" for each case.
    """
    right, first = [], []
    with method.around():
        for case in cases:
            prompt, whole = (tokenizer(text)["input_ids"] for text in (case.prompt, case.prompt + case.answer))
            # As in `downstream.recall`: a tokenizer may merge across the boundary, then the answer begins earlier.
            begin = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
            ids, moved = method.before(case.prompt, torch.tensor(whole))
            hits = score(method.model, ids, max(begin + moved, 1))[1]
            right.append(all(hits))
            first.append(hits[0])
    share = mean(right)
    return {
        "accuracy": share,
        "standard_error": math.sqrt(share * (1 - share) / len(cases)),
        "first_token": mean(first),
        "cases": len(cases),
        "right": "".join("01"[hit] for hit in right),
        "first_right": "".join("01"[hit] for hit in first),
    }


def score_questions(method: Method, questions: Sequence[Question], tokenizer: Any) -> dict[str, dict[str, float]]:
    """The shares of each kind of question that are answered right, and with another question's answer."""
    with method.around():
        return rates(questions, answers(Evaluator(method.model, tokenizer, 16), questions, method.passages))


def speed_prompts(cases: Sequence[Case], count: int) -> list[str]:
    """`count` prompts of cases, evenly spread."""
    step = max(len(cases) / count, 1.0)
    return [cases[int(number * step)].prompt for number in range(min(count, len(cases)))]


def measure_speed(method: Method, prompts: Sequence[str], tokenizer: Any, new_tokens: int) -> dict[str, Any]:
    """Time to first token and tokens per second, one prompt at a time, with the base alone in turn.

    The time to the first token includes retrieval and tokenization.

    Returns first_token_seconds and tokens_per_second of the method; base_… of the base alone; …_ratio: the median over
    prompts of method / base.
    """
    rounds = []
    for prompt in [prompts[0], *prompts]:
        pair = (method, Method(method.base))
        rounds.append([generate_once(each, prompt, tokenizer, new_tokens) for each in pair])
    rounds = rounds[1:]  # the first is a warm-up
    found: dict[str, Any] = {"prompts": len(prompts), "new_tokens": new_tokens}
    for place, name in enumerate(("first_token_seconds", "tokens_per_second")):
        found[name] = median(own[place] for own, _ in rounds)
        found[f"base_{name}"] = median(bare[place] for _, bare in rounds)
        found[f"{name}_ratio"] = median(own[place] / bare[place] for own, bare in rounds)
    return found


def generate_once(method: Method, prompt: str, tokenizer: Any, new_tokens: int) -> tuple[float, float]:
    """(seconds to the first token, tokens per second after it) of one greedy generation."""
    device = method.base.get_input_embeddings().weight.device
    clock = Clock(device.type)
    with method.around():
        start = time.perf_counter()
        ids, _ = method.before(prompt, torch.tensor(tokenizer(prompt)["input_ids"]), new_tokens)
        generate(method.model, ids[None].to(device), new_tokens + 1, streamer=clock)
    # The streamer gets the prompt first, then each token.
    return clock.times[1] - start, new_tokens / (clock.times[-1] - clock.times[1])
