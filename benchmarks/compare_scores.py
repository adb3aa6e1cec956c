"""What every compared method is measured by: perplexity and next-token accuracy on windows, facts completed, speed.

All methods go through the same passes over the same tokens; they differ in what stands before the text (`passages`)
and in what is made of the base's logits (`mix`).
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
from models.capture import base_logits, hidden_and_head_input
from utils.evaluation import perplexity, predicted_positions, temperature_grid

ROWS = 256  # positions whose distributions over the vocabulary are held at once
FACTS_AT_ONCE = 16
SAMPLE_TOKENS = 48  # prompt for timing where there are no facts


@dataclass
class Method:
    """One way to answer.

    Attributes:
        base: the language model that runs.
        mix: (captured hidden states (rows, hidden), logits (rows, V)) -> scores (rows, V) whose softmax is the
            method's distribution; None where the logits are.
        passages: a text -> token ids to put before it; None where nothing is.
        generator: a context that gives the model to generate with; the base where there is none.
        bytes: what the method adds on disk.
        note: what the table's reader has to know.
        settings: what is kept beside the figures.
        layer_position: the block whose MLP input is captured.
    """

    base: Any
    mix: Callable[[Tensor, Tensor], Tensor] | None = None
    passages: Callable[[str], list[int]] | None = None
    generator: Callable[[], Any] | None = None
    bytes: int = 0
    note: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    layer_position: int = -1

    def generating(self) -> Any:
        """A context manager that gives the model to call `generate` on."""
        return self.generator() if self.generator else contextlib.nullcontext(self.base)

    def before(self, text: str, ids: Tensor, room: int | None) -> tuple[Tensor, int]:
        """`ids` (time,) with the passages for `text` before them, within `room` tokens: the oldest of `ids` give way.

        Returns the input ids, and how far each token of `ids` has moved to the right (negative: to the left).
        """
        passages = self.passages(text) if self.passages and text.strip() else []
        cut = max(len(passages) + len(ids) - room, 0) if room else 0
        return torch.cat([torch.tensor(passages, dtype=ids.dtype), ids[cut:]]), len(passages) - cut


@torch.inference_mode()
def score_rows(method: Method, ids: Tensor, positions: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (rows,) of `wanted` (rows,), and whether each has the highest probability (rows,).

    `ids` (batch, time) may be padded on the right; `positions` (batch, time) marks where `wanted` are predicted.
    """
    device = method.base.get_input_embeddings().weight.device
    hidden, head_input = hidden_and_head_input(
        method.base, ids.to(device), positions.to(device), method.layer_position
    )  # (rows, hidden) each
    found, hits = [], []
    for start in range(0, len(wanted), ROWS):
        rows = slice(start, start + ROWS)
        logits = base_logits(method.base, head_input[rows])  # (rows, V)
        scores = logits if method.mix is None else method.mix(hidden[rows], logits)  # (rows, V)
        labels = wanted[rows].to(scores.device)
        found.append(temperature_grid(scores, labels, (1.0,))[:, 0].cpu())
        hits.append((scores.argmax(-1) == labels).cpu())
    return torch.cat(found), torch.cat(hits)


def score_windows(method: Method, windows: Any, tokenizer: Any, chunk: int, query: int) -> dict[str, Any]:
    """Perplexity and next-token accuracy on windows; every method is asked for the same tokens.

    A method with passages reads a window in chunks of `chunk` tokens: the passages found for the `query` tokens before
    the chunk, then the window up to the chunk, whose tokens alone are scored. The first chunk has nothing before it,
    so nothing is looked for.

    Returns:
        perplexity, accuracy, tokens, and log_likelihood: a [sum, tokens] of each window.
    """
    likelihoods, right = [], 0
    for window in windows:
        ids = torch.from_numpy(np.asarray(window["input_ids"], dtype=np.int64))
        mask, wanted = predicted_positions(torch.from_numpy(np.asarray(window["labels"], dtype=np.int64))[None])
        total = 0.0
        for inputs, positions, labels in pieces(method, ids, mask[0], wanted, tokenizer, chunk, query):
            scores, hits = score_rows(method, inputs[None], positions[None], labels)
            total += scores.double().sum().item()
            right += int(hits.sum())
        likelihoods.append([total, len(wanted)])
    tokens = sum(count for _, count in likelihoods)
    return {
        "perplexity": perplexity(-sum(total for total, _ in likelihoods) / tokens),
        "accuracy": right / tokens,
        "tokens": tokens,
        "log_likelihood": likelihoods,
    }


def pieces(
    method: Method, ids: Tensor, mask: Tensor, wanted: Tensor, tokenizer: Any, chunk: int, query: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What is run for one window (time,): (input ids (n,), predicting positions (n,), labels (rows,))."""
    if method.passages is None:
        yield ids, mask, wanted
        return
    taken = 0
    for begin in range(0, len(ids), chunk):
        # The tokens begin … begin + chunk − 1 are predicted from the positions one before theirs.
        first, last = max(begin - 1, 0), min(begin + chunk - 1, len(ids))
        here = mask[first:last]
        count = int(here.sum())
        if not count:
            continue
        text = tokenizer.decode(ids[max(begin - query, 0) : begin], skip_special_tokens=True)
        inputs, moved = method.before(text, ids[:last], context_length(method.base.config))
        positions = torch.zeros(len(inputs), dtype=torch.bool)
        positions[first + moved : last + moved] = here
        yield inputs, positions, wanted[taken : taken + count]
        taken += count


def encode_case(method: Method, case: Case, tokenizer: Any) -> tuple[Tensor, int]:
    """Token ids of passages, prompt and answer, and where the answer's begin (as in `downstream.recall`)."""
    prompt = tokenizer(case.prompt)["input_ids"]
    whole = tokenizer(case.prompt + case.answer)["input_ids"]
    begin = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
    ids, moved = method.before(case.prompt, torch.tensor(whole), context_length(method.base.config))
    return ids, max(begin + moved, 1)


def score_facts(method: Method, cases: Sequence[Case], tokenizer: Any) -> dict[str, Any]:
    """Share of cases whose whole answer greedy decoding gives, by the rule of `downstream.recall`.

    Returns:
        accuracy and standard_error (None without cases), cases, and right: "1" or "0" for each case.
    """
    encoded = [encode_case(method, case, tokenizer) for case in cases]
    order = sorted(range(len(cases)), key=lambda number: len(encoded[number][0]))
    right = [0] * len(cases)
    for start in range(0, len(order), FACTS_AT_ONCE):
        numbers = order[start : start + FACTS_AT_ONCE]
        inputs = torch.nn.utils.rnn.pad_sequence([encoded[number][0] for number in numbers], batch_first=True)
        positions = torch.zeros(inputs.shape, dtype=torch.bool)
        for row, number in enumerate(numbers):
            ids, begin = encoded[number]
            positions[row, begin - 1 : len(ids) - 1] = True
        _, hits = score_rows(method, inputs, positions, torch.roll(inputs, -1, dims=1)[positions])
        for number, own in zip(numbers, hits.split(positions.sum(1).tolist()), strict=True):
            right[number] = int(own.all())
    share = sum(right) / len(cases) if cases else None
    error = math.sqrt(share * (1 - share) / len(cases)) if cases else None
    return {"accuracy": share, "standard_error": error, "cases": len(cases), "right": "".join(map(str, right))}


def speed_prompts(cases: Sequence[Case], windows: Any, tokenizer: Any, count: int) -> list[str]:
    """`count` prompts for timing: of facts, evenly chosen; without any, beginnings of windows."""
    if cases:
        step = max(len(cases) / count, 1.0)
        return [cases[int(number * step)].prompt for number in range(min(count, len(cases)))]
    chosen = [windows[number % len(windows)]["input_ids"][:SAMPLE_TOKENS] for number in range(count)]
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in chosen]


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
    context = context_length(method.base.config)
    with method.generating() as model:
        start = time.perf_counter()
        ids = torch.tensor(tokenizer(prompt)["input_ids"])
        ids, _ = method.before(prompt, ids, context - new_tokens if context else None)
        generate(model, ids[None].to(device), new_tokens + 1, streamer=clock)
    # The prompt is put first, then each token.
    return clock.times[1] - start, new_tokens / (clock.times[-1] - clock.times[1]), len(ids)
