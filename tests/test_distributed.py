"""One process and several give the same files and figures, and a failure of one ends them all."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT, command

from knn_utils.datastore import Datastore, KNNTargets

COUNTS = (1, 2, 3)
WINDOWS_PER_STEP = 6
# 37 windows: the last step of an epoch has one window, fewer than there are processes.
SPLITS = {"train": 37, "validation": 11, "test": 7}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def launcher(processes: int) -> list[str]:
    """The beginning of a command line that runs on so many processes of this machine's CPU."""
    start = [sys.executable, "-m", "accelerate.commands.launch"]
    if processes == 1:
        return [*start, "--cpu", "--num_processes", str(processes)]
    config = ROOT / "accelerate_config" / "cpu.yaml"
    return [*start, "--config_file", str(config), "--num_processes", str(processes), "--main_process_port", "0"]


class Stages:
    """Everything that one launch of `processes` processes writes into `folder`."""

    def __init__(self, world, small: Path, index: Path, root: Path, processes: int) -> None:
        self.processes = processes
        self.folder = root / str(processes)
        self.folder.mkdir()
        self.dstore = self.folder / "dstore"
        self.targets = self.folder / "targets"
        self.interrupted = self.folder / "interrupted"
        base = ("--model_name_or_path", world.base, "--dataset_name", small)

        def embed(split: str, *more: object) -> list[object]:
            return [
                *("train_base", *base, "--do_eval", "--eval_subset", split, "--save_knnlm_dstore"),
                *("--dstore_dir", self.dstore, "--per_device_eval_batch_size", 3, "--output_dir", self.folder / "tmp"),
                *("--report_to", "none", *more),
            ]

        def train(trainer: str, output: str, *more: object) -> list[object]:
            return [
                *(trainer, *base, "--knn_save_path", self.targets, "--output_dir", self.folder / output),
                *("--memory_layers", 2, "--num_train_epochs", 2, "--seed", 3, "--mixed_precision", "no"),
                *("--per_device_train_batch_size", WINDOWS_PER_STEP // processes, "--logging_steps", 1),
                *("--learning_rate", 5e-3, *more),
            ]

        offline = ("train_mlpmem_offline", "--knn_dstore_path", self.store("train"))
        stored = ("--validation_dstore_path", self.store("validation"))
        steps = [
            embed("train"),
            embed("validation", "--save_logprob"),
            [
                *("knn_utils.saveKNNMulti", "--dstore_path", self.store("train"), "--index_path", index),
                *("--output_path", self.targets, "--k", 12, "--knn_temp", 4, "--ignore_first", "True"),
                *("--part_rows", 256),
            ],
            train(offline[0], "offline", *offline[1:], *stored),
            train("train_mlpmem_online", "online", "--round_hidden_states"),
            ["stop_after", "step_3", *train(offline[0], "interrupted", *offline[1:], "--checkpointing_steps", 3)],
            train(offline[0], "interrupted", *offline[1:], "--checkpointing_steps", 3),
            ["train_base", *base, "--do_eval", "--eval_subset", "test", "--output_dir", self.folder / "base"],
            [
                *("evaluate_joint", *base, "--do_test", "--knn_generator_path", self.folder / "offline" / "epoch_2"),
                *("--per_device_eval_batch_size", 2, "--lmbda", 0.2, 0.6, "--knn_temp", 1, 2),
                *("--output_dir", self.folder / "joint"),
            ],
        ]
        if processes == 2:
            # What three processes continue: half an epoch of two.
            steps.append(
                ["stop_after", "step_3", *train(offline[0], "moved", *offline[1:], "--checkpointing_steps", 3)]
            )
            unseeded = train(offline[0], "unseeded", *offline[1:], "--max_train_steps", 1)
            del unseeded[unseeded.index("--seed") : unseeded.index("--seed") + 2]
            steps.append(unseeded)
            pieces = ("--micro_batch_rows", 50, "--checkpointing_steps", 3)
            whole = train(offline[0], "sharded", *offline[1:], *stored, *pieces)
            rounded = train(offline[0], "sharded_bf16", *offline[1:], "--max_train_steps", 3)
            rounded[rounded.index("--mixed_precision") + 1] = "bf16"
            steps += [["sharded", "stop_after", "step_3", *whole], ["sharded", *whole], ["sharded", *rounded]]
        if processes == 3:
            moved = train(offline[0], "moved", *offline[1:], "--checkpointing_steps", 3)
            moved[moved.index("--output_dir") + 1] = root / "2" / "moved"
            steps.append(moved)
        plan = self.folder / "plan.json"
        plan.write_text(json.dumps([[str(item) for item in step] for step in steps]))
        done = subprocess.run(
            [*launcher(processes), str(ROOT / "tests" / "distributed_stages.py"), str(plan)],
            cwd=ROOT,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        self.output = done.stdout + done.stderr
        assert done.returncode == 0, self.output[-6000:]

    def store(self, split: str) -> Path:
        return self.dstore / f"dstore_llama_{split}_32.arrow"

    def record(self, output: str) -> dict:
        return json.loads((self.folder / output / "training.json").read_text())

    def results(self, output: str) -> dict:
        return json.loads((self.folder / output / "results.json").read_text())


def logged(record: dict, name: str) -> list[float]:
    return [entry[name] for entry in record["log"] if name in entry]


@pytest.fixture(scope="module")
def small(llama_world, tmp_path_factory) -> tuple[Path, Path]:
    """The first windows of each split, and an index over the train split's rows."""
    import datasets

    folder = tmp_path_factory.mktemp("small")
    splits = datasets.load_from_disk(str(llama_world.windows))
    first = {name: splits[name].select(range(count)) for name, count in SPLITS.items()}
    datasets.DatasetDict(first).save_to_disk(str(folder / "windows"))
    command(
        "train_base",
        *("--model_name_or_path", llama_world.base, "--dataset_name", folder / "windows", "--do_eval"),
        *("--eval_subset", "train", "--save_knnlm_dstore", "--dstore_dir", folder, "--output_dir", folder / "tmp"),
    )
    command(
        "knn_utils.build_index",
        *("--dstore_path", folder / "dstore_llama_train_32.arrow", "--index_path", folder / "train.index"),
        *("--index_factory", "Flat"),
    )
    return folder / "windows", folder / "train.index"


@pytest.fixture(scope="module")
def launched(llama_world, small, tmp_path_factory) -> dict[int, Stages]:
    root = tmp_path_factory.mktemp("launched")
    return {count: Stages(llama_world, *small, root, count) for count in COUNTS}


def test_the_launches_ran_on_as_many_processes_as_asked(launched):
    for count, stages in launched.items():
        assert stages.record("offline")["settings"]["windows_per_step"] == WINDOWS_PER_STEP
        states = list((stages.folder / "offline" / "epoch_2" / "state").glob("random_states_*.pkl"))
        assert len(states) == count


@pytest.mark.parametrize("kind", ["train", "validation", "targets"])
def test_datastores_and_targets_are_the_same_files(launched, kind):
    digests = set()
    for stages in launched.values():
        folder = stages.targets if kind == "targets" else stages.store(kind)
        parts = sorted(folder.glob("part-*.arrow"))
        digests.add(tuple(hashlib.sha256(part.read_bytes()).hexdigest() for part in parts))
        found = (KNNTargets if kind == "targets" else Datastore).open(folder, verify=True)
        assert found.rows == Datastore.open(stages.store("train" if kind == "targets" else kind)).rows
    assert len(digests) == 1 and len(digests.pop()) > 3


@pytest.mark.parametrize("trainer", ["offline", "online"])
def test_losses_are_the_same_at_the_same_windows_per_step(launched, trainer):
    alone = launched[1].record(trainer)
    assert len(logged(alone, "loss")) == 2 * 7
    for count in COUNTS[1:]:
        record = launched[count].record(trainer)
        for name in ("loss", "kl", "ce", "grad_norm", "learning_rate"):
            assert logged(record, name) == pytest.approx(logged(alone, name), rel=1e-4), (count, name)
        assert logged(record, "rows") == logged(alone, "rows")


@pytest.mark.parametrize("trainer", ["offline", "online"])
def test_validation_counts_each_token_once(launched, trainer):
    alone = logged(launched[1].record(trainer), "validation")
    assert len(alone) == 2
    for count in COUNTS[1:]:
        for mine, other in zip(logged(launched[count].record(trainer), "validation"), alone, strict=True):
            assert mine["tokens"] == other["tokens"]
            for name in ("base_perplexity", "memory_perplexity", "joint_perplexity"):
                assert mine[name] == pytest.approx(other[name], rel=1e-4)


@pytest.mark.parametrize("evaluation", ["base", "joint"])
def test_perplexities_are_the_same(launched, evaluation):
    alone = launched[1].results(evaluation)
    for count in COUNTS[1:]:
        results = launched[count].results(evaluation)
        assert results["tokens"] == alone["tokens"]
        assert results["base_perplexity"] == pytest.approx(alone["base_perplexity"], rel=1e-4)
        assert [row["perplexity"] for row in results["grid"]] == pytest.approx(
            [row["perplexity"] for row in alone["grid"]], rel=1e-4
        )


@pytest.mark.parametrize("count", COUNTS)
def test_a_run_stopped_within_an_epoch_continues_to_the_same_losses_and_weights(launched, count):
    import torch
    from safetensors.torch import load_file

    stages = launched[count]
    assert "continuing from" in stages.output and "at step 3 of 14" in stages.output
    # Sums over more than two processes may be rounded in another order after a new start.
    rounding = 0.0 if count < 3 else 1e-5
    for name in ("loss", "learning_rate", "grad_norm"):
        expected = logged(stages.record("offline"), name)
        assert logged(stages.record("interrupted"), name) == pytest.approx(expected, rel=rounding, abs=0)
    mine, other = (
        load_file(stages.folder / run / "epoch_2" / "model.safetensors") for run in ("interrupted", "offline")
    )
    assert all(torch.allclose(mine[name], other[name], rtol=rounding, atol=rounding) for name in other)


def test_three_processes_continue_what_two_began(launched):
    moved = launched[2].record("moved")
    assert moved["complete"] and "at step 3 of 14" in launched[3].output
    for name in ("loss", "learning_rate"):
        assert logged(moved, name) == pytest.approx(logged(launched[2].record("offline"), name), rel=1e-4)


def test_without_a_seed_all_processes_take_one_that_is_recorded(launched):
    assert launched[2].record("unseeded")["settings"]["seed"] == 0


def test_a_run_with_a_sharded_memory_that_was_stopped_has_the_losses_and_weights_of_a_whole_one(launched):
    import torch
    from safetensors.torch import load_file

    mine, other = launched[2].record("sharded"), launched[2].record("offline")
    for name in ("loss", "grad_norm", "learning_rate"):
        assert logged(mine, name) == pytest.approx(logged(other, name), rel=1e-4)
    for here, there in zip(logged(mine, "validation"), logged(other, "validation"), strict=True):
        assert here["joint_perplexity"] == pytest.approx(there["joint_perplexity"], rel=1e-4)
    here, there = (
        load_file(launched[2].folder / run / "epoch_2" / "model.safetensors") for run in ("sharded", "offline")
    )
    assert all(torch.allclose(here[name], there[name], atol=1e-4) for name in there)


def test_a_sharded_memory_in_bfloat16_has_nearly_the_losses_of_float32(launched):
    mine, other = launched[2].record("sharded_bf16"), launched[2].record("offline")
    assert mine["precision"]["mixed_precision"] == "bf16"
    for name in ("loss", "grad_norm"):
        found, expected = logged(mine, name), logged(other, name)[:3]
        assert found == pytest.approx(expected, rel=2e-2) and found != pytest.approx(expected, rel=1e-5)
