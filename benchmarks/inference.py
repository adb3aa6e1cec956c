"""Stages that use a trained memory: joint_evaluation, first_token, decoding, gate; and making tokens for the clock."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

from benchmarks import plain
from benchmarks.setting import Setting
from benchmarks.timing import Row, rounds, timed, wait

LAMBDAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
TEMPERATURES = (0.7, 0.85, 1.0, 1.2, 1.5)
# Joint evaluation: windows, and how many at a time.
WINDOWS, BATCH = 4, 4
# Decoding: tokens after a prompt of each length.
TOKENS = 64
SHORT, LONG = 64, 1024


def joint_evaluation(setting: Setting) -> list[Row]:
    """A grid of lambdas and temperatures against one pair, base run once; and one pair against the textbook way."""
    import torch

    windows = setting.windows("test")
    windows = windows.select(range(min(WINDOWS, len(windows))))
    base, memory = setting.base(), setting.memory()
    ids, labels = (torch.as_tensor(windows[-1:][name]).long().to(setting.device) for name in ("input_ids", "labels"))
    runs = {
        "one pair": lambda: evaluate(base, memory, windows, (0.25,), (1.0,)),
        "grid": lambda: evaluate(base, memory, windows, LAMBDAS, TEMPERATURES),
        "plain": lambda: plain.joint_loss(base, memory, ids, labels, 0.25, 1.0),
    }
    seconds = rounds(runs, setting.repeats, setting.device)
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    handle = base.register_forward_pre_hook(count)
    runs["grid"]()
    handle.remove()
    tokens = len(windows) * setting.block_size
    detail = (
        f"{tokens / seconds.median('grid'):.0f} against {tokens / seconds.median('one pair'):.0f} tokens/s; "
        f"textbook {ids.numel() / seconds.median('plain'):.0f} tokens/s for each pair"
    )
    share = seconds.ratio("grid", "one pair")
    return [
        Row("6 lambdas x 5 temperatures, of one pair", share, "<=", 1.15, "x", detail),
        Row("passes of the base for the grid", passes / -(-len(windows) // BATCH), "<=", 1, "x", "counted by a hook"),
    ]


def evaluate(base: Any, memory: Any, windows: Any, lmbda: Sequence[float], knn_temp: Sequence[float]) -> Any:
    """What evaluate_joint does between opening its files and writing its results."""
    import torch

    from utils.evaluation import MixtureScore, Scorer, label_log_probabilities

    score = MixtureScore(lmbda, knn_temp)
    with torch.inference_mode():
        for hidden, base_logprob, labels in Scorer(base).batches(windows, BATCH):
            other = label_log_probabilities(memory.hidden(hidden), memory.lm_head.weight, labels, knn_temp)
            score.add(base_logprob, other)
    return score.grid()


def first_token(setting: Setting, *, gated: bool = False) -> list[Row]:
    """Reading a prompt of 1,024 tokens and making the first token, with the memory and without."""
    base = setting.base()
    joint = joint_model(setting, base, gated=gated)
    ids = prompt(setting, min(1024, context_of(base) - 8))
    runs = {"base": lambda: generate(base, ids, 1), "joint": lambda: generate(joint, ids, 1)}
    seconds = rounds(runs, 3 * setting.repeats, setting.device)
    detail = f"{seconds.median('joint'):.3f} s against {seconds.median('base'):.3f} s, prompt of {ids.shape[1]} tokens"
    share = seconds.ratio("joint", "base")
    return [Row("time to the first token, of the base alone", share, "<=", 1.03, "x", detail)]


def decoding(setting: Setting, *, gated: bool = False) -> list[Row]:
    """Time that the memory adds to each generated token, against its bare products, after a short and a long prompt.

    What is added is a small difference of two times, so the base alone and the base with its memory make their tokens
    in turn, and the differences are of neighbours. Timed alone the products find part of their weights in the cache,
    where the last repetition left them; between two steps of the base they do not, and the base then finds less of its
    own. The row's note has both times.
    """
    base = setting.base()
    joint = joint_model(setting, base, gated=gated)
    room = context_of(base) - TOKENS - 2
    lengths = {"short": min(SHORT, max(room // 4, 1)), "long": min(LONG, room)}
    prompts = {name: prompt(setting, length) for name, length in lengths.items()}
    models = {
        (name, kind): (model, ids)
        for name, ids in prompts.items()
        for kind, model in (("base", base), ("joint", joint))
    }
    products = bare_products(joint.knn_generator, setting.device)
    found: dict[str, list[float]] = {name: [] for name in ("short", "long", "alone", "together", "bare", "between")}
    for _ in range(setting.repeats):
        seconds = in_turn(models, TOKENS, setting.device)
        for name in prompts:
            pairs = zip(seconds[name, "joint"], seconds[name, "base"], strict=True)
            found[name].append(median(one - other for one, other in pairs))
        found["alone"].append(median(seconds["short", "base"]))
        found["together"].append(median(seconds["short", "joint"]))
        found["bare"].append(median(timed(products, setting.device) for _ in range(TOKENS)))
        found["between"].append(median(between_steps(base, prompts["short"], products, setting.device)))
    short, long, alone, together, bare, between = (median(values) for values in found.values())
    detail = (
        f"{1000 * short:.1f} ms more than the base's {1000 * alone:.1f} ms a token; "
        f"bare products {1000 * bare:.1f} ms, {1000 * between:.1f} ms between two steps of the base; "
        f"{alone / together:.2f} of the base's rate"
    )
    longer = f"{1000 * long:.1f} ms after {lengths['long']} tokens, {1000 * short:.1f} ms after {lengths['short']}"
    return [
        Row("time added to a token, of the bare products", short / bare, "<=", 1.2, "x", detail),
        Row("time added after a long prompt, of a short one", long / short, "<=", 1.1, "x", longer),
    ]


def gate(setting: Setting) -> list[Row]:
    """What lambda by token costs beside the memory's own time, and the two stages before with it switched on."""
    rows = [gate_share(setting, *of) for of in (("token", 1, 20), ("scored position", 64, 6))]
    rows += first_token(setting, gated=True) + decoding(setting, gated=True)
    return [*rows[:2], *(replace(each, name=f"{each.name}, with the gate") for each in rows[2:])]


def gate_share(setting: Setting, name: str, count: int, times: int) -> Row:
    """What the gate adds to `count` positions at once, of the memory's own: its logits and their mixture at one lambda.

    What comes after the memory's logits is timed by itself, since their own time wanders by more than the gate takes;
    they are made anew before each, as they leave little of anything else in the cache.
    """
    import torch

    from models.gate import mix

    memory = setting.memory()
    gate, size = open_gate(setting, memory.config), memory.config.vocab_size
    hidden = torch.randn(count, memory.config.hidden_size, device=setting.device)
    base = torch.randn(count, size, device=setting.device)  # logits

    def one_lambda(base: torch.Tensor, learned: torch.Tensor) -> None:
        mix(base.log_softmax(-1), learned.log_softmax(-1), math.log(0.75), math.log(0.25))

    mixtures = {"one lambda": one_lambda, "gate": lambda base, learned: gate.mix(base, learned, hidden)}
    seconds: dict[str, list[float]] = {each: [] for each in ("memory", *mixtures)}
    with torch.inference_mode():
        for number in range(-2, times * setting.repeats):
            for which, mixture in mixtures.items():
                used = base.clone()
                wait(setting.device)
                start = time.perf_counter()
                learned = memory(hidden).logits  # (count, vocabulary)
                wait(setting.device)
                made = time.perf_counter()
                taken = timed(partial(mixture, used, learned), setting.device)
                if number >= 0:
                    seconds["memory"].append(made - start)
                    seconds[which].append(taken)
    found = {each: median(values) / count for each, values in seconds.items()}
    more, own = found["gate"] - found["one lambda"], found["memory"] + found["one lambda"]
    detail = f"{1000 * more:.2f} ms more than {1000 * own:.2f} ms of memory and mixture"
    return Row(f"time that the gate adds to a {name}, of the memory's own", more / own, "<=", 0.03, "x", detail)


def open_gate(setting: Setting, config: Any) -> Any:
    """A gate as it starts, for a base of this config."""
    from models.gate import LambdaGate

    return LambdaGate(config.hidden_size).eval().requires_grad_(False).to(setting.device)


def bare_products(memory: Any, device: str) -> Callable[[], None]:
    """A function that runs the products of stack and head for one token."""
    import torch
    import torch.nn.functional as F

    from benchmarks.training_step import matrices

    weights = [weight.contiguous() for weight in matrices(memory)]
    inputs = [torch.randn(1, weight.shape[1], device=device, dtype=weight.dtype) for weight in weights]

    @torch.inference_mode()
    def run() -> None:
        for x, weight in zip(inputs, weights, strict=True):
            F.linear(x, weight)

    return run


def between_steps(base: Any, ids: Any, products: Callable[[], None], device: str) -> list[float]:
    """Seconds of the products after each of TOKENS steps of the base alone."""
    import torch

    with torch.inference_mode():
        cache = base(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        found = []
        for _ in range(TOKENS):
            base(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True, logits_to_keep=1)
            found.append(timed(products, device))
    return found


# -- making tokens --------------------------------------------------------------------------------------


def joint_model(setting: Setting, base: Any, *, gated: bool = False) -> Any:
    """`base` with a memory of random weights, mixed at one lambda or, `gated`, at one by token."""
    from models import MLPMemory

    memory = setting.memory()
    mixture = {"lmbda": "adaptive", "gate": open_gate(setting, memory.config)} if gated else {}
    return MLPMemory(base, memory, **mixture).eval()


def prompt(setting: Setting, length: int) -> Any:
    """(1, length) token ids of the text."""
    import numpy as np
    import torch

    windows = setting.windows()
    ids = np.concatenate([np.asarray(windows[number]["input_ids"]) for number in range(1, len(windows))])
    return torch.as_tensor(np.resize(ids, length).astype("int64"))[None].to(setting.device)


def context_of(base: Any) -> int:
    """Positions that the base has."""
    return int(getattr(base.config, "max_position_embeddings", None) or 1 << 20)


def in_turn(models: dict[Any, tuple[Any, Any]], count: int, device: str) -> dict[Any, list[float]]:
    """Seconds of each of `count` greedy tokens after the first two, one of each (model, prompt) in turn."""
    import torch

    seconds: dict[Any, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        states = {}
        for name, (model, ids) in models.items():
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
            states[name] = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
        for number in range(-1, count):
            for name, (model, _) in models.items():
                token, cache = states[name]
                wait(device)
                start = time.perf_counter()
                out = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
                token = out.logits[:, -1].argmax(-1, keepdim=True)  # (1, 1)
                wait(device)
                if number >= 0:
                    seconds[name].append(time.perf_counter() - start)
                states[name] = token, out.past_key_values
    return seconds


class Clock:
    """A streamer that notes when each token comes."""

    def __init__(self, device: str) -> None:
        self.device, self.times = device, []

    def put(self, _: Any) -> None:
        wait(self.device)
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate(model: Any, ids: Any, count: int, **more: Any) -> Any:
    """Exactly `count` tokens, greedily."""
    import torch

    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        **more,
    )
