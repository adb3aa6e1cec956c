"""Peak anonymous memory of the offline trainer, the whole process: imports, optimiser, two steps, a checkpoint."""

from __future__ import annotations

import shutil

from benchmarks.measure import Row
from benchmarks.setting import Setting

STAGE = "training_memory"
GIB = 1e9
STEPS = 2


def measure(setting: Setting) -> list[Row]:
    setting.prepare("targets")
    peaks = {rows: peak(setting, rows) for rows in (2048, 8192)}
    more = peaks[8192] - peaks[2048]
    detail = f"{peaks[8192]:.2f} GB against {peaks[2048]:.2f} GB"
    return [
        Row(STAGE, "RssAnon, steps of 2,048 rows", peaks[2048], "<=", 1.6, "GB", "whole process, no base loaded"),
        Row(STAGE, "RssAnon, steps of 8,192 rows: more", more, "<=", 0.4, "GB", detail),
    ]


def peak(setting: Setting, rows: int) -> float:
    """Peak in GB (10^9 bytes) with steps of `rows`."""
    output = setting.folder / "memory_benchmark_training"
    shutil.rmtree(output, ignore_errors=True)
    module, *flags = setting.step_command("train")
    values = dict(zip(flags[::2], flags[1::2], strict=True))
    values |= {"--output_dir": str(output), "--max_train_steps": str(STEPS)}
    values["--per_device_train_batch_size"] = str(max(rows // setting.stride, 1))
    found = setting.watched(module, *(word for pair in values.items() for word in pair))
    shutil.rmtree(output, ignore_errors=True)
    return found["peak_bytes"] / GIB
