"""Whole commands that are killed, starved of disk or run twice: a clear line, nothing lost."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from harness import ROOT, Command, kill_before, note_steps, pause_before, together

from knn_utils.datastore import Datastore
from knn_utils.parts import datastore_batch, write_stream
from utils.files import lock_folder

SEED = int(os.environ.get("FAULT_SEED", "5"))


def files(folder: Path, pattern: str) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob(pattern))
        if path.is_file()
    }


class Stage:
    """A command that fills a folder, and what in the folder must be the same after any interruption."""

    def __init__(self, module: str, pattern: str, arguments, processes: tuple[int, ...] = (1, 2)) -> None:
        self.module, self.pattern, self.arguments, self.processes = module, pattern, arguments, processes

    def start(self, world, folder: Path, log: Path, **more) -> Command:
        return Command(log, self.module, *self.arguments(world, folder), **more)

    def together(self, world, folder: Path, log: Path, **more) -> list[Command]:
        return together(log, 2, self.module, *self.arguments(world, folder), **more)

    def result(self, folder: Path) -> object:
        if self.pattern == "training.json":
            record = json.loads((folder / "out" / self.pattern).read_text())
            losses = [round(entry["loss"], 5) for entry in record["log"] if "loss" in entry]
            return record["complete"], losses, [entry["step"] for entry in record["log"] if "loss" in entry]
        if self.pattern == "results.json":
            return json.loads((folder / "out" / self.pattern).read_text())["grid"]
        assert not list(folder.rglob(".tmp-*")), "left over: temporary files"
        return files(folder, self.pattern)


def embed(world, folder):
    return (
        *("--model_name_or_path", world.base, "--dataset_name", world.windows, "--do_eval", "--save_knnlm_dstore"),
        *("--eval_subset", "train", "--max_eval_samples", 48, "--per_device_eval_batch_size", 3),
        *("--dstore_dir", folder / "out", "--output_dir", folder / "tmp", "--report_to", "none"),
    )


def search(world, folder):
    return (
        *("--dstore_path", world.dstore("train"), "--index_path", world.index, "--output_path", folder / "out"),
        *("--k", 8, "--knn_temp", 4, "--ignore_first", "True"),
    )


def train(world, folder):
    return (
        *world.trainer(folder / "out", "--knn_dstore_path", world.dstore("train"), "--checkpointing_steps", 2),
        *("--validation_split_name", "none", "--per_device_train_batch_size", 16 // world.processes),
    )


def preprocess(world, folder):
    return (
        *("--dataset_name", world.folder / "text", "--tokenizer_path", world.base),
        *("--output_dir", folder / "out", "--block_size", 64, "--stride", 32),
    )


def index(world, folder):
    return (
        *("--dstore_path", world.dstore("train"), "--index_path", folder / "train.index"),
        *("--index_factory", "IVF8,Flat", "--num_keys_to_add_at_a_time", 1000),
    )


def evaluate(world, folder):
    return (
        *("--model_name_or_path", world.base, "--dataset_name", world.windows, "--do_eval", "--knn"),
        *("--eval_subset", "test", "--dstore_path", world.dstore("test"), "--val_file", world.dstore("train")),
        *("--index_file", world.index, "--k", 8, "--output_dir", folder / "out", "--report_to", "none"),
    )


STAGES = {
    "windows": Stage("utils.preprocess_dataset", "*.arrow", preprocess, (1,)),
    "datastore": Stage("train_base", "part-*.arrow", embed),
    "index": Stage("knn_utils.build_index", "train*", index),
    "targets": Stage("knn_utils.saveKNNMulti", "part-*.arrow", search),
    "training": Stage("train_mlpmem_offline", "training.json", train),
    "perplexity": Stage("train_base", "results.json", evaluate, (1,)),
}


@pytest.fixture(scope="module")
def undisturbed(llama_world, tmp_path_factory):
    """For each stage what an undisturbed run leaves, its steps on disk (their names), and the seconds it takes."""
    llama_world.processes = 1
    found = {}
    for name, stage in STAGES.items():
        folder = tmp_path_factory.mktemp(name)
        started = time.monotonic()
        stage.start(llama_world, folder, folder / "log", hook=(note_steps, str(folder / "steps"))).done()
        seconds = time.monotonic() - started
        found[name] = stage.result(folder), (folder / "steps").read_text().split(), seconds
    return found


@pytest.mark.parametrize("name", STAGES)
def test_a_killed_stage_is_finished_by_the_same_command(llama_world, undisturbed, name, tmp_path):
    expected, steps, seconds = undisturbed[name]
    stage, chance = STAGES[name], random.Random(f"{SEED} {name}")
    llama_world.processes = 1
    renames = [number for number, step in enumerate(steps) if step in ("replace", "rename")]
    # One kill between write and rename, one anywhere. The second may come later than what there is left to do.
    kills = (chance.choice(renames), signal.SIGKILL), (chance.randrange(len(steps)), signal.SIGTERM)
    for step, kind in kills:
        print(f"seed {SEED}: {name}: signal {kind} before step {step} of {len(steps)}, {steps[step]}")
        killed = stage.start(llama_world, tmp_path, tmp_path / "killed", hook=(kill_before, step, kind)).wait()
        assert killed == -kind or (kind == signal.SIGTERM and killed == 0)
    delay = chance.uniform(0, seconds)
    print(f"seed {SEED}: {name}: SIGKILL after {delay:.2f} s")
    running = stage.start(llama_world, tmp_path, tmp_path / "killed")
    time.sleep(delay)
    running.process.kill()
    running.wait()
    stage.start(llama_world, tmp_path, tmp_path / "log").done()
    assert stage.result(tmp_path) == expected


@pytest.mark.parametrize("name", [name for name, stage in STAGES.items() if 2 in stage.processes])
def test_one_of_two_processes_killed_ends_the_other(llama_world, undisturbed, name, tmp_path):
    expected, steps, _ = undisturbed[name]
    stage, chance = STAGES[name], random.Random(f"{SEED} two {name}")
    llama_world.processes = 2
    victim, step = chance.randrange(2), chance.randrange(2, max(len(steps) // 3, 3))
    if name == "training":
        victim = 0  # which alone writes
    print(f"seed {SEED}: {name}: SIGKILL of process {victim} before its step {step}")
    hooks = {victim: (kill_before, step, signal.SIGKILL)}
    running = stage.together(llama_world, tmp_path, tmp_path / "killed", hooks=hooks)
    assert running[victim].wait() == -signal.SIGKILL
    other = running[1 - victim]
    assert other.wait() != 0, other.text()
    for process in stage.together(llama_world, tmp_path, tmp_path / "log"):
        process.done()
    found = stage.result(tmp_path)
    if name == "training":
        assert found[1] == pytest.approx(expected[1], rel=1e-4)
        found, expected = (found[0], found[2]), (expected[0], expected[2])
    assert found == expected


def with_nan(store: Datastore, row: int, path: Path) -> Path:
    """A copy of a datastore, as one Arrow stream, with a NaN in `row`'s hidden state."""
    keys = np.array(store.keys())
    keys[row, 0] = np.nan
    batch = datastore_batch(keys, np.array(store.vals()))
    write_stream(path, batch.schema, [batch])
    return path


class TestFailureOfOneProcess:
    def test_what_only_the_main_process_finds_ends_all(self, llama_world, tmp_path):
        """Another run holds the folder."""
        stage = STAGES["datastore"]
        store = tmp_path / "out" / "dstore_llama_train_32.arrow"
        store.mkdir(parents=True)
        with lock_folder(store):
            main, other = stage.together(llama_world, tmp_path, tmp_path / "log")
            assert str(store) in main.refused()
            assert other.wait() != 0

    def test_what_one_process_reads_ends_all(self, llama_world, tmp_path):
        """NaN in rows that process 1 reads: the step's loss tells every process, and each finds the window."""
        from training.rows import epoch_order

        stage = STAGES["training"]
        llama_world.processes = 2
        store = Datastore.open(llama_world.dstore("train"))
        second = int(epoch_order(store.rows // 32, 3, 0)[1])
        arguments = [*stage.arguments(llama_world, tmp_path)]
        damaged = with_nan(store, 32 * second + 3, tmp_path / "nan.arrow")
        arguments[arguments.index("--knn_dstore_path") + 1] = damaged
        main, other = together(tmp_path / "log", 2, stage.module, *arguments)
        assert f"{second}" in main.refused()
        assert other.wait() == 2

    def test_under_a_launcher_the_error_is_one_line(self, llama_world, tmp_path):
        config = ROOT / "accelerate_config" / "cpu.yaml"
        launch = ("-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", 0)
        flags = [*STAGES["datastore"].arguments(llama_world, tmp_path)]
        flags[flags.index("--dataset_name") + 1] = tmp_path / "nowhere"
        done = subprocess.run(
            [sys.executable, *map(str, launch), "-m", "train_base", *map(str, flags)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        lines = [line for line in done.stderr.splitlines() if "error: --dataset_name" in line]
        assert lines and all("nowhere" in line for line in lines) and done.returncode != 0, done.stderr


@pytest.mark.parametrize("name", ["datastore", "training"])
def test_a_second_run_is_refused_while_the_first_writes(llama_world, undisturbed, name, tmp_path):
    expected, steps, _ = undisturbed[name]
    stage, mark = STAGES[name], tmp_path / "mark"
    llama_world.processes = 1
    first = stage.start(llama_world, tmp_path, tmp_path / "first", hook=(pause_before, len(steps) // 2, str(mark)))
    while not mark.exists():
        assert first.process.is_alive(), first.text()
        time.sleep(0.02)
    assert str(tmp_path / "out") in stage.start(llama_world, tmp_path, tmp_path / "second").refused()
    first.kill()
    assert first.wait() == -signal.SIGKILL
    stage.start(llama_world, tmp_path, tmp_path / "third").done()
    assert stage.result(tmp_path) == expected


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 80 kB, and a function that makes it larger."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=80k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting is refused here")
    try:
        yield disk, lambda: subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def finetune(world, folder):
    return (
        *("--model_name_or_path", world.base, "--dataset_name", world.windows, "--do_train", "--report_to", "none"),
        *("--max_steps", 1, "--output_dir", folder / "out", "--save_strategy", "no"),
    )


@pytest.mark.parametrize("module, arguments", [("utils.preprocess_dataset", preprocess), ("train_base", finetune)])
def test_a_full_disk_is_named(llama_world, small_disk, tmp_path, module, arguments):
    disk, enlarge = small_disk
    assert str(disk) in Command(tmp_path / "log", module, *arguments(llama_world, disk)).refused()
    enlarge()
    Command(tmp_path / "log", module, *arguments(llama_world, disk)).done()


@pytest.mark.parametrize("name", ["datastore", "targets", "training"])
def test_a_full_disk_keeps_finished_work(llama_world, undisturbed, name, small_disk, tmp_path):
    expected, stage = undisturbed[name][0], STAGES[name]
    llama_world.processes = 1
    disk, enlarge = small_disk
    assert str(disk) in stage.start(llama_world, disk, tmp_path / "log").refused()
    kept = {name: (disk / name).stat().st_ino for name in files(disk, "part-*.arrow")}
    assert kept or name == "training"
    enlarge()
    stage.start(llama_world, disk, tmp_path / "log").done()
    assert stage.result(disk) == expected
    assert all((disk / name).stat().st_ino == inode for name, inode in kept.items())
