"""Benchmarks that use a memory: joint_evaluation, first_token, decoding, gate; and timed generation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

from benchmarks.setting import Setting
from benchmarks.timing import Row, rounds, timed, wait

LAMBDAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
TEMPERATURES = (0.7, 0.85, 1.0, 1.2, 1.5)
WINDOWS, BATCH = 4, 4  # of joint evaluation
SHORT, LONG, TOKENS = 64, 1024, 64  # prompts of decoding and of the first token; generated tokens


def joint_evaluation(setting: Setting) -> list[Row]:
    """A grid of lambdas and temperatures, compared with a single pair."""
    windows = setting.windows("test")
    windows = windows.select(range(min(WINDOWS, len(windows))))
    base, memory = setting.base(), setting.memory()
    runs = {
        "one pair": lambda: evaluate(base, memory, windows, (0.25,), (1.0,)),
        "grid": lambda: evaluate(base, memory, windows, LAMBDAS, TEMPERATURES),
    }
    seconds = rounds(runs, setting.repeats, setting.device)
    tokens = len(windows) * setting.block_size
    rates = [tokens / seconds.median(name) for name in ("grid", "one pair")]
    detail = f"{rates[0]:.0f} against {rates[1]:.0f} tokens/s"
    share = seconds.ratio("grid", "one pair")
    return [Row("6 lambdas x 5 temperatures, of one pair", share, "<=", 1.15, "x", detail)]


def evaluate(base: Any, memory: Any, windows: Any, lmbda: Sequence[float], memory_temp: Sequence[float]) -> Any:
    """The work of evaluate_joint without opening files and writing results."""
    import torch

    from knn_utils.scored_rows import Scorer
    from utils.evaluation import MixtureScore, label_log_probabilities

    score = MixtureScore(lmbda, memory_temp)
    with torch.inference_mode():
        for hidden, base_logprob, labels in Scorer(base).batches(windows, BATCH):
            other = label_log_probabilities(memory.hidden(hidden), memory.lm_head.weight, labels, memory_temp)
            score.add(base_logprob, other)
    return score.grid()


def first_token(setting: Setting, *, gated: bool = False) -> list[Row]:
    """Reading a prompt of 1,024 tokens and generating the first token, with the memory and without."""
    base = setting.base()
    joint = joint_model(setting, base, gated=gated)
    ids = prompt(setting, min(LONG, base.config.max_position_embeddings - 8))
    runs = {"base": lambda: generate(base, ids, 1), "joint": lambda: generate(joint, ids, 1)}
    seconds = rounds(runs, 3 * setting.repeats, setting.device)
    detail = f"{seconds.median('joint'):.3f} s against {seconds.median('base'):.3f} s, prompt of {ids.shape[1]} tokens"
    share = seconds.ratio("joint", "base")
    return [Row("time to the first token, of the base alone", share, "<=", 1.03, "x", detail)]


def decoding(setting: Setting, *, gated: bool = False) -> list[Row]:
    """Time that the memory adds to each generated token, compared with its bare matrix products.

    The added time is a small difference of two times: base and joint model generate their tokens in turn, and the
    differences are of neighbouring tokens.
    """
    base = setting.base()
    joint = joint_model(setting, base, gated=gated)
    ids = prompt(setting, SHORT)
    products = bare_products(joint.knn_generator, setting.device)
    found: dict[str, list[float]] = {name: [] for name in ("added", "alone", "bare")}
    for _ in range(setting.repeats):
        seconds = in_turn({"base": (base, ids), "joint": (joint, ids)}, TOKENS, setting.device)
        pairs = zip(seconds["joint"], seconds["base"], strict=True)
        found["added"].append(median(one - other for one, other in pairs))
        found["alone"].append(median(seconds["base"]))
        found["bare"].append(median(timed(products, setting.device) for _ in range(TOKENS)))
    added, alone, bare = (median(values) for values in found.values())
    detail = f"{1000 * added:.1f} ms more than the base's {1000 * alone:.1f} ms; bare products {1000 * bare:.1f} ms"
    return [Row("time added to a token, of the bare products", added / bare, "<=", 1.2, "x", detail)]


def tied_decoding(setting: Setting) -> list[Row]:
    """Tokens per second with a memory that is tied to the base's head, and its gate, of the base's alone."""
    from models import MLPMemory

    rows, ids = [], prompt(setting, SHORT)
    for dtype in ("float32", "bfloat16"):
        base = setting.base(dtype)
        memory = setting.memory(tied=True, dtype=dtype)
        joint = MLPMemory(base, memory, "adaptive", gates=[open_gate(setting, memory.config)]).eval()
        ratios, times = [], []
        for _ in range(setting.repeats):
            seconds = in_turn({"base": (base, ids), "joint": (joint, ids)}, TOKENS, setting.device)
            pairs = zip(seconds["base"], seconds["joint"], strict=True)
            ratios.append(median(one / other for one, other in pairs))
            times.append([1000 * median(seconds[name]) for name in ("joint", "base")])
        detail = "{:.1f} ms against {:.1f} ms".format(*(median(each) for each in zip(*times, strict=True)))
        rows.append(
            Row(f"rate of the base, head tied, with the gate, {dtype}", median(ratios), ">=", 0.88, "x", detail)
        )
    return rows


def gate(setting: Setting) -> list[Row]:
    """The cost of lambda by token compared with the memory's own time; and the two benchmarks above with a gate."""
    rows = [gate_share(setting, "token", 1, 20), gate_share(setting, "scored position", 64, 6)]
    generated = first_token(setting, gated=True) + decoding(setting, gated=True)
    return [*rows, *(replace(row, name=f"{row.name}, with the gate") for row in generated)]


def gate_share(setting: Setting, name: str, count: int, times: int) -> Row:
    """The time that the gate adds to `count` positions, compared with the memory's logits and their mixture at one lambda.

    The memory's logits are computed again before each mixture, as in generation, but timed separately: they are noisier
    than the gate is slow.
    """
    import torch

    from models.gate import mix
    from models.mixture import fixed_log_weights, log_mixture

    memory = setting.memory()
    hidden = torch.randn(count, memory.config.hidden_size, device=setting.device)
    base = torch.randn(count, memory.config.vocab_size, device=setting.device)  # logits
    gate, weights = open_gate(setting, memory.config), fixed_log_weights(0.25)
    mixtures = {
        "one lambda": lambda learned: log_mixture((base.log_softmax(-1), learned.log_softmax(-1)), weights),
        "gate": lambda learned: mix([gate], base, [learned], hidden),
    }
    seconds: dict[str, list[float]] = {each: [] for each in ("memory", *mixtures)}
    with torch.inference_mode():
        for number in range(-2, times * setting.repeats):
            for which, mixture in mixtures.items():
                wait(setting.device)
                start = time.perf_counter()
                learned = memory(hidden).logits  # (count, vocabulary)
                wait(setting.device)
                computed = time.perf_counter()
                taken = timed(partial(mixture, learned), setting.device)
                if number >= 0:
                    seconds["memory"].append(computed - start)
                    seconds[which].append(taken)
    found = {each: median(values) / count for each, values in seconds.items()}
    more, own = found["gate"] - found["one lambda"], found["memory"] + found["one lambda"]
    detail = f"{1000 * more:.2f} ms more than {1000 * own:.2f} ms of memory and mixture"
    return Row(f"time that the gate adds to a {name}, of the memory's own", more / own, "<=", 0.03, "x", detail)


def open_gate(setting: Setting, config: Any) -> Any:
    """An untrained gate for a base with this config."""
    from models.gate import LambdaGate

    return LambdaGate(config.hidden_size).eval().requires_grad_(False).to(setting.device)


def bare_products(memory: Any, device: str) -> Callable[[], None]:
    """A function that runs the matrix products of stack and head for one token."""
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


def joint_model(setting: Setting, base: Any, *, gated: bool = False) -> Any:
    """`base` with a memory of random weights, with one lambda or with a gate."""
    from models import MLPMemory

    memory = setting.memory()
    mixture = {"lmbda": "adaptive", "gates": [open_gate(setting, memory.config)]} if gated else {}
    return MLPMemory(base, memory, **mixture).eval()


def prompt(setting: Setting, length: int) -> Any:
    """(1, length) token ids of the text."""
    import numpy as np
    import torch

    ids = np.concatenate(setting.windows()["input_ids"][:])
    return torch.as_tensor(np.resize(ids, length).astype("int64"))[None].to(setting.device)


def in_turn(models: dict[Any, tuple[Any, Any]], count: int, device: str) -> dict[Any, list[float]]:
    """Seconds of each of `count` greedy tokens after the first two; the models generate one token each in turn.

    `models`: name → (model, prompt (1, length)).
    """
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
    """A streamer that records when each token comes."""

    def __init__(self, device: str) -> None:
        self.device, self.times = device, []

    def put(self, _: Any) -> None:
        wait(self.device)
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate(model: Any, ids: Any, count: int, **more: Any) -> Any:
    """Generate exactly `count` tokens, greedily."""
    import torch

    mask, length = torch.ones_like(ids), {"max_new_tokens": count, "min_new_tokens": count}
    return model.generate(input_ids=ids, attention_mask=mask, **length, do_sample=False, pad_token_id=0, **more)
