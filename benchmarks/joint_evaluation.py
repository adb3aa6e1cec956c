"""A grid of lambdas and temperatures against one pair, base run once; and one pair against the textbook way."""

from __future__ import annotations

from typing import Any

from benchmarks import plain
from benchmarks.measure import Row, median, ratio, rounds
from benchmarks.setting import Setting

STAGE = "joint_evaluation"
LAMBDAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
TEMPERATURES = (0.7, 0.85, 1.0, 1.2, 1.5)
WINDOWS, BATCH = 4, 4


def measure(setting: Setting) -> list[Row]:
    import torch

    windows = setting.windows("test")
    windows = windows.select(range(min(WINDOWS, len(windows))))
    base, memory = setting.base(), setting.memory()
    some = {name: torch.as_tensor(windows[-1:][name]).long().to(setting.device) for name in ("input_ids", "labels")}
    calls = []
    handle = base.register_forward_pre_hook(lambda *_: calls.append(1))
    runs = {
        "one pair": lambda: evaluate(base, memory, windows, (0.25,), (1.0,)),
        "grid": lambda: evaluate(base, memory, windows, LAMBDAS, TEMPERATURES),
        "plain": lambda: plain.joint_loss(base, memory, some["input_ids"], some["labels"], 0.25, 1.0),
    }
    seconds = rounds(runs, setting.repeats, device=setting.device)
    calls.clear()
    evaluate(base, memory, windows, LAMBDAS, TEMPERATURES)
    handle.remove()
    passes = len(calls) / -(-len(windows) // BATCH)
    tokens = len(windows) * setting.block_size
    slow = some["input_ids"].numel() / median(seconds["plain"])
    detail = (
        f"{tokens / median(seconds['grid']):.0f} against {tokens / median(seconds['one pair']):.0f} tokens/s; "
        f"textbook {slow:.0f} tokens/s for each pair"
    )
    return [
        Row(
            STAGE,
            "6 lambdas x 5 temperatures, of one pair",
            ratio(seconds, "grid", "one pair"),
            "<=",
            1.15,
            "x",
            detail,
        ),
        Row(STAGE, "passes of the base for the grid", passes, "<=", 1, "x", "counted by a hook"),
    ]


def evaluate(base: Any, memory: Any, windows: Any, lmbda: Any, knn_temp: Any) -> list[dict[str, float]]:
    """What evaluate_joint does between opening its files and writing its results."""
    import torch

    from utils.evaluation import MixtureScore, Scorer, label_log_probabilities

    score = MixtureScore(lmbda, knn_temp)
    with torch.inference_mode():
        for hidden, base_logprob, labels in Scorer(base).batches(windows, BATCH):
            other = label_log_probabilities(memory.hidden(hidden), memory.lm_head.weight, labels, knn_temp)
            score.add(base_logprob, other)
    return score.grid()
