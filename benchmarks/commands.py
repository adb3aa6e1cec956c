"""Benchmarks of whole commands, imports included: whole_chain, training_memory, start."""

from __future__ import annotations

import shutil

from benchmarks.setting import PRECISIONS, STEPS, Setting
from benchmarks.timing import Row

CHAIN_TARGETS = {"no": 260.0, "bf16": 150.0}  # seconds


def whole_chain(setting: Setting) -> list[Row]:
    """Embedding to joint evaluation with the project's commands; in bf16 only where `--torch_dtype auto` chooses it."""
    import torch

    from utils.loading import fastest_dtype

    setting.windows()
    rows = []
    for precision, target in CHAIN_TARGETS.items():
        name = f"embedding to joint evaluation, two epochs, {PRECISIONS[precision]}"
        if precision == "no" or fastest_dtype(torch.device(setting.device)) is torch.bfloat16:
            shutil.rmtree(setting.chain_folder(precision), ignore_errors=True)
            # Its files stay for the other benchmarks.
            seconds = {step: setting.run_step(step, precision) for step in STEPS}
            rows.append(Row(name, sum(seconds.values()), "<=", target, "s", listed(seconds)))
        else:
            rows.append(Row(name, None, "<=", target, "s", "not run: bfloat16 is no faster than float32 here", False))
    return rows


def listed(seconds: dict[str, float]) -> str:
    return ", ".join(f"{step} {value:.1f} s" for step, value in seconds.items())


def training_memory(setting: Setting) -> list[Row]:
    """Peak anonymous memory of the offline trainer: imports, optimizer, two steps, a checkpoint."""
    setting.prepare("targets")
    output = setting.folder / "memory_benchmark"
    changes = {
        "output_dir": output,
        "max_train_steps": 2,
        "per_device_train_batch_size": max(2048 // setting.stride, 1),
    }
    peak = setting.watched(*setting.step("train", **changes))["peak_bytes"] / 1e9
    shutil.rmtree(output)
    return [Row("RssAnon, steps of 2,048 rows", peak, "<=", 1.6, "GB", "whole process, no base loaded")]


def start(setting: Setting) -> list[Row]:
    """The fixed cost of each stage: a run with nothing left to do."""
    setting.prepare("train")
    seconds = {step: setting.run_step(step) for step in STEPS if step != "joint"}
    return [Row("fixed cost of a stage", max(seconds.values()), "<=", 5.0, "s", listed(seconds))]
