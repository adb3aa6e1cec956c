"""Stages that are whole commands, imports included: whole_chain, training_memory, start."""

from __future__ import annotations

import shutil
from statistics import fmean, median

from benchmarks import plain
from benchmarks.setting import PRECISIONS, ROOT, STEPS, Setting
from benchmarks.timing import Row, timed
from utils.errors import InputError

CHAIN_TARGETS = {"no": 260.0, "bf16": 150.0}
# The seconds that the original took where the targets were set.
ORIGINAL_SECONDS = 403.0
PACKAGES = (".", "models", "utils", "knn_utils", "training", "downstream", "demo", "benchmarks")
IMPORTS = (
    "import torch, datasets, transformers.modeling_utils; from transformers import AutoModelForCausalLM, AutoTokenizer"
)


def whole_chain(setting: Setting) -> list[Row]:
    """Embedding to joint evaluation with the project's commands; and the textbook way.

    The textbook times, all in float32, are measured on a slice of each stage and scaled to its size: they say how fast
    the machine is today. The seconds to reach were set where the original took 403 s, so each row has a second one: the
    share of the textbook way's seconds, targets left out on both sides, where a loop over rows says little of the
    machine. bf16 is run where `--torch_dtype auto` chooses it.
    """
    import torch

    from utils.loading import fastest_dtype

    setting.windows()
    rows, textbooks = [], []
    for precision, target in CHAIN_TARGETS.items():
        reached, share = None, None
        detail = relation = "not run: products in bfloat16 are no faster than in float32 here"
        if precision == "no" or fastest_dtype(torch.device(setting.device)) is torch.bfloat16:
            seconds = run_chain(setting, precision)
            textbooks.append(plain_seconds(setting))
            reached, detail = sum(seconds.values()), listed(seconds)
            # What was measured just before the chain, and just after it.
            textbook = {step: fmean(found[step] for found in textbooks[-2:]) for step in textbooks[0]}
            ours, theirs = (sum(found.values()) - found["targets"] for found in (seconds, textbook))
            share = ours / theirs
            relation = f"{ours:.0f} of {theirs:.0f} s; the textbook way in float32, scaled up: {listed(textbook)}"
        applies, dtype = reached is not None, PRECISIONS[precision]
        name = f"embedding to joint evaluation, two epochs, {dtype}"
        rows.append(Row(name, reached, "<=", target, "s", detail, applies))
        name = f"share of the textbook way's seconds, targets left out, {dtype}"
        rows.append(Row(name, share, "<=", target / ORIGINAL_SECONDS, "x", relation, applies))
    return rows


def listed(seconds: dict[str, float]) -> str:
    return ", ".join(f"{step} {value:.1f} s" for step, value in seconds.items())


def run_chain(setting: Setting, precision: str) -> dict[str, float]:
    """Seconds of each stage from nothing; its files stay for the other benchmarks."""
    folder = setting.chain_folder(precision)
    shutil.rmtree(folder, ignore_errors=True)
    seconds = {}
    for step in STEPS:
        seconds[step] = setting.run_step(step, precision)
        (folder / f"{step}.done").touch()
    return seconds


def plain_seconds(setting: Setting) -> dict[str, float]:
    """The textbook way's seconds for the same work, each from a slice."""
    import torch

    from benchmarks.data import open_search, plain_search_seconds
    from benchmarks.training_step import offline_rows, plain_rate

    train, test = setting.windows("train"), setting.windows("test")
    base, memory = setting.base(), setting.memory()
    ids, labels = (torch.as_tensor(train[-1:][name]).long().to(setting.device) for name in ("input_ids", "labels"))
    embed = timed(lambda: plain.embed(base, ids, labels), setting.device)
    dstore, index = open_search(setting)
    targets = plain_search_seconds(index, dstore, min(setting.k, dstore.rows), memory.config.vocab_size)
    training = 2 * dstore.rows / plain_rate(setting, offline_rows(setting))
    joint = timed(lambda: plain.joint_loss(base, memory, ids, labels, 0.25, 1.0), setting.device)
    return {"embed": embed * len(train), "targets": targets, "train": training, "joint": joint * len(test)}


def training_memory(setting: Setting) -> list[Row]:
    """Peak anonymous memory of the offline trainer, the whole process: imports, optimiser, two steps, a checkpoint."""
    setting.prepare("targets")
    peaks = {rows: training_peak(setting, rows) for rows in (2048, 8192)}
    detail = f"{peaks[8192]:.2f} GB against {peaks[2048]:.2f} GB"
    return [
        Row("RssAnon, steps of 2,048 rows", peaks[2048], "<=", 1.6, "GB", "whole process, no base loaded"),
        Row("RssAnon, steps of 8,192 rows: more", peaks[8192] - peaks[2048], "<=", 0.4, "GB", detail),
    ]


def training_peak(setting: Setting, rows: int) -> float:
    """Peak in GB (10^9 bytes) with steps of `rows`."""
    output = setting.folder / "memory_benchmark_training"
    shutil.rmtree(output, ignore_errors=True)
    changes = {
        "output_dir": output,
        "max_train_steps": 2,
        "per_device_train_batch_size": max(rows // setting.stride, 1),
    }
    found = setting.watched(*setting.step("train", **changes))
    shutil.rmtree(output, ignore_errors=True)
    return found["peak_bytes"] / 1e9


def start(setting: Setting) -> list[Row]:
    """What is paid before any work: `--help` of every command, and each stage of the chain with nothing left to do."""
    seconds, silent = {}, []
    for name in commands():
        try:
            seconds[name] = setting.run("-m", name, "--help")
        except InputError:
            # For example the demo where the package it stands on is not installed.
            silent.append(name)
    slowest = max(seconds, key=lambda name: seconds[name])
    again = [seconds[slowest], *(setting.run("-m", slowest, "--help") for _ in range(setting.repeats - 1))]
    detail = f"the slowest of {len(seconds)} commands, {slowest}; their median {median(seconds.values()):.2f} s"
    detail += f"; no help from {', '.join(silent)}" if silent else ""
    rows = [Row("--help of any command", median(again), "<=", 3.0, "s", detail)]

    setting.prepare("targets")
    repeats = min(setting.repeats, 2)
    fixed = {step: median(setting.run_step(step) for _ in range(repeats)) for step in ("embed", "index", "targets")}
    fixed |= fixed_cost_of_memory(setting)
    bare = median(setting.run("-c", IMPORTS) for _ in range(setting.repeats))
    detail = f"{listed(fixed)}; the imports of torch, transformers' models and datasets alone {bare:.1f} s"
    rows.append(Row("fixed cost of a stage", max(fixed.values()), "<=", 5.0, "s", detail))
    return rows


def commands() -> list[str]:
    """Modules with a `main` that take flags."""
    return [
        path.stem if package == "." else f"{package}.{path.stem}"
        for package in PACKAGES
        for path in sorted((ROOT / package).glob("*.py"))
        if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8").splitlines()
    ]


def fixed_cost_of_memory(setting: Setting) -> dict[str, float]:
    """Fixed cost of training (a finished run of one step) and of joint evaluation (two windows less the second)."""
    output = setting.folder / "one_step"
    one_step = {"max_train_steps": 1, "output_dir": output}
    setting.run_step("train", **one_step)
    joint = {}
    for count in (1, 2):
        changes = {"max_eval_samples": count, "knn_generator_path": output / "epoch_1"}
        joint[count] = median(setting.run_step("joint", **changes) for _ in range(setting.repeats))
    trained = median(setting.run_step("train", **one_step) for _ in range(min(setting.repeats, 2)))
    return {"train": trained, "joint": 2 * joint[1] - joint[2]}
