"""Time that the memory adds to each generated token, against its bare products, after a short and a long prompt.

What is added is a small difference of two times, so the base alone and the base with its memory make their tokens in
turn, and the differences are of neighbours. Timed alone the products find part of their weights in the cache, where the
last repetition left them; between two steps of the base they do not, and the base then finds less of its own. The row's
note has both times.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks.generating import context_of, in_turn, joint_model, prompt
from benchmarks.measure import Row, median, wait
from benchmarks.setting import Setting
from benchmarks.training_step import is_matrix, matrix_shape

STAGE = "decoding"
TOKENS = 64
SHORT, LONG = 64, 1024


def measure(setting: Setting) -> list[Row]:
    base = setting.base()
    joint = joint_model(setting, base)
    room = context_of(base) - TOKENS - 2
    lengths = {"short": min(SHORT, max(room // 4, 1)), "long": min(LONG, room)}
    prompts = {name: prompt(setting, length) for name, length in lengths.items()}
    models = {(name, kind): (model, ids) for name, ids in prompts.items() for kind, model in _kinds(base, joint)}
    products = bare_products(joint.knn_generator, setting.device)
    added: dict[str, list[float]] = {name: [] for name in prompts}
    alone: list[float] = []
    together: list[float] = []
    bare: list[float] = []
    between: list[float] = []
    for _ in range(setting.repeats):
        seconds = in_turn(models, TOKENS, setting.device)
        for name in prompts:
            pairs = zip(seconds[name, "joint"], seconds[name, "base"], strict=True)
            added[name].append(median([one - other for one, other in pairs]))
        alone.append(median(seconds["short", "base"]))
        together.append(median(seconds["short", "joint"]))
        bare.append(median([products() for _ in range(TOKENS)]))
        between.append(median(between_steps(base, prompts["short"], products)))
    short, long = median(added["short"]), median(added["long"])
    detail = (
        f"{1000 * short:.1f} ms more than the base's {1000 * median(alone):.1f} ms a token; "
        f"bare products {1000 * median(bare):.1f} ms, {1000 * median(between):.1f} ms between two steps of the base; "
        f"{median(alone) / median(together):.2f} of the base's rate"
    )
    longer = f"{1000 * long:.1f} ms after {lengths['long']} tokens, {1000 * short:.1f} ms after {lengths['short']}"
    return [
        Row(STAGE, "time added to a token, of the bare products", short / median(bare), "<=", 1.2, "x", detail),
        Row(STAGE, "time added after a long prompt, of a short one", long / short, "<=", 1.1, "x", longer),
    ]


def _kinds(base: Any, joint: Any) -> tuple[tuple[str, Any], ...]:
    return (("base", base), ("joint", joint))


def between_steps(base: Any, ids: Any, products: Any) -> list[float]:
    """Seconds of the products after each of TOKENS steps of the base alone."""
    import torch

    with torch.inference_mode():
        cache = base(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        found = []
        for _ in range(TOKENS):
            base(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True, logits_to_keep=1)
            found.append(products())
    return found


def bare_products(memory: Any, device: str) -> Any:
    """A function that runs the products of stack and head for one token and returns its seconds."""
    import torch
    import torch.nn.functional as F

    weights = []
    for module in memory.modules():
        if is_matrix(module):
            weight = module.weight.detach()
            weights.append(weight if matrix_shape(module) == tuple(weight.shape) else weight.t().contiguous())
    inputs = [torch.randn(1, weight.shape[1], device=device, dtype=weight.dtype) for weight in weights]

    @torch.inference_mode()
    def run() -> float:
        wait(device)
        start = time.perf_counter()
        for x, weight in zip(inputs, weights, strict=True):
            F.linear(x, weight)
        wait(device)
        return time.perf_counter() - start

    return run
