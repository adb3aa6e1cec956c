"""Embedding to joint evaluation with the project's commands, whole processes, imports included; and the textbook way.

The textbook times, all in float32, are measured on a slice of each stage and scaled to its size: they say how fast the
machine is today. The seconds to reach were set where the original took 403 s, so each row has a second one: the share of
the textbook way's seconds, targets left out on both sides, where a loop over rows says little of the machine. bf16 is run
where this machine computes faster in it.
"""

from __future__ import annotations

import shutil
from statistics import fmean

from benchmarks import plain
from benchmarks.measure import Row, timed
from benchmarks.setting import STEPS, Setting
from benchmarks.training_step import offline_rows, plain_rate

STAGE = "whole_chain"
PRECISIONS = {"no": ("float32", 260.0), "bf16": ("bfloat16", 150.0)}
ORIGINAL_SECONDS = 403.0
PLAIN_ROWS = 64


def measure(setting: Setting) -> list[Row]:
    import torch

    from utils.loading import fastest_dtype

    setting.windows()
    quick = fastest_dtype(torch.device(setting.device)) is torch.bfloat16
    chains, textbooks = {}, []
    for precision in PRECISIONS:
        if precision == "no" or quick:
            chains[precision] = run_chain(setting, precision)
            textbooks.append(plain_seconds(setting))
    rows = []
    for number, (precision, (dtype, target)) in enumerate(PRECISIONS.items()):
        reached, share = None, None
        detail = relation = "not run: products in bfloat16 are no faster than in float32 here"
        if seconds := chains.get(precision):
            reached, detail = sum(seconds.values()), listed(seconds)
            # What was measured just before the chain, and just after it.
            around = textbooks[max(number - 1, 0) : number + 1]
            textbook = {step: fmean(found[step] for found in around) for step in around[0]}
            ours, theirs = (sum(found.values()) - found["targets"] for found in (seconds, textbook))
            share = ours / theirs
            relation = f"{ours:.0f} of {theirs:.0f} s; the textbook way in float32, scaled up: {listed(textbook)}"
        applies = reached is not None
        name = f"embedding to joint evaluation, two epochs, {dtype}"
        rows.append(Row(STAGE, name, reached, "<=", target, "s", detail, applies))
        name = f"share of the textbook way's seconds, targets left out, {dtype}"
        rows.append(Row(STAGE, name, share, "<=", target / ORIGINAL_SECONDS, "x", relation, applies))
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
    import numpy as np
    import torch

    from knn_utils.datastore import Datastore
    from knn_utils.faiss_files import read_faiss
    from knn_utils.search import set_probe

    train, test = setting.windows("train"), setting.windows("test")
    base, memory = setting.base(), setting.memory()
    window = {name: torch.as_tensor(train[-1:][name]).long().to(setting.device) for name in ("input_ids", "labels")}
    embed = timed(lambda: plain.embed(base, window["input_ids"], window["labels"]), setting.device) * len(train)
    dstore = Datastore.open(setting.dstore_path)
    index = read_faiss(setting.index_path, memory_map=False)
    set_probe(index, setting.probe)
    some = dstore.keys(0, min(PLAIN_ROWS, dstore.rows)).astype(np.float32)
    k = min(setting.k, dstore.rows)
    vocabulary = memory.config.vocab_size
    targets = (
        timed(lambda: plain.knn_targets(index, some, dstore.vals(), k, 16.0, vocabulary)) / len(some) * dstore.rows
    )
    training = 2 * dstore.rows / plain_rate(setting, offline_rows(setting), plain)
    joint = timed(
        lambda: plain.joint_loss(base, memory, window["input_ids"], window["labels"], 0.25, 1.0), setting.device
    )
    return {"embed": embed, "targets": targets, "train": training, "joint": joint * len(test)}
