"""One process and three give the same files and figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import ROOT
from safetensors.torch import load_file

WINDOWS_PER_STEP = 15  # the last step of an epoch has fewer
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
LOGGED = ("loss", "kl", "ce", "grad_norm", "learning_rate")


def stored_steps(world, folder: Path) -> list[list[object]]:
    """What makes the files of the world's train split again."""
    dstore, index = folder / "dstore" / world.dstore("train").name, folder / world.index.name
    embed = ("--model_name_or_path", world.base, "--dataset_name", world.windows, "--output_dir", folder / "tmp")
    made = ("--dstore_path", dstore, "--index_path", index)
    search = ("--output_path", folder / world.targets.name, "--k", 16, "--knn_temp", 4, "--ignore_first")
    return [
        ["train_base", *embed, "--eval_subset", "train", "--save_knnlm_dstore", "--dstore_dir", dstore.parent],
        ["knn_utils.build_index", *made, "--index_factory", "Flat", "--num_keys_to_add_at_a_time", 400],
        ["knn_utils.saveKNNMulti", *made, *search],
    ]


def training_steps(world, root: Path, processes: int) -> list[list[object]]:
    """Training runs and an evaluation; one run that three processes continue; with three, a sharded memory."""
    folder = root / str(processes)

    def train(module: str, output: Path, *more: object) -> list[object]:
        same = ("--num_train_epochs", 2, "--per_device_train_batch_size", WINDOWS_PER_STEP // processes)
        return [module, *world.trainer(output, *same, "--learning_rate", 5e-3, *more)]

    def offline(output: Path, *more: object) -> list[object]:
        return train("train_mlpmem_offline", output, "--knn_dstore_path", world.dstore("train"), *more)

    stops, moved = ("--checkpointing_steps", 3), root / "moved"
    joint = ["evaluate_joint", "--model_name_or_path", world.base, "--dataset_name", world.windows, "--do_test"]
    joint += ["--knn_generator_path", folder / "offline" / "epoch_2", "--per_device_eval_batch_size", 2]
    steps = [
        offline(folder / "offline", "--validation_dstore_path", world.dstore("validation")),
        train("train_mlpmem_online", folder / "online", "--round_hidden_states", "--tie_head"),
        ["stop_after", "step_3", *offline(folder / "interrupted", *stops)],
        offline(folder / "interrupted", *stops),
        [*joint, "--lmbda", 0.2, 0.6, "--memory_temp", 1, 2, "--output_dir", folder / "joint"],
    ]
    if processes == 1:
        return [*steps, ["stop_after", "step_3", *offline(moved, *stops)]]
    sharded = ["sharded", *offline(folder / "sharded", *stops, "--micro_batch_rows", 50)]
    return [*steps, offline(moved, *stops), ["stop_after", "step_3", *sharded], sharded]


def launch(processes: int, folder: Path, steps: list[list[object]]) -> None:
    plan = folder / "plan.json"
    plan.write_text(json.dumps([[str(item) for item in step] for step in steps]))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    program = [*launcher, str(ROOT / "tests" / "distributed_stages.py"), str(plan)]
    done = subprocess.run(program, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    (folder / "output").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


@pytest.fixture(scope="module")
def launched(llama_world, tmp_path_factory) -> Path:
    """A folder whose folders `1` and `3` hold what so many processes wrote."""
    root = tmp_path_factory.mktemp("launched")
    for processes in (1, 3):
        folder = root / str(processes)
        folder.mkdir()
        stored = stored_steps(llama_world, folder) if processes > 1 else []
        launch(processes, folder, [*stored, *training_steps(llama_world, root, processes)])
    return root


def logged(run: Path, name: str) -> list:
    log = json.loads((run / "training.json").read_text())["log"]
    return [entry[name] for entry in log if name in entry]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "epoch_2" / "model.safetensors")


def test_datastore_index_and_targets_are_the_same_files(llama_world, launched) -> None:
    def files(dstore: Path, index: Path, targets: Path) -> dict[str, bytes]:
        paths = [*dstore.glob("[!.]*"), *targets.glob("[!.]*"), *index.parent.glob(f"{index.name}*")]
        return {str(path.relative_to(index.parent)): path.read_bytes() for path in paths}

    world, folder = llama_world, launched / "3"
    alone = files(world.dstore("train"), world.index, world.targets)
    together = files(folder / "dstore" / world.dstore("train").name, folder / world.index.name, folder / "targets")
    assert alone == together and len(alone) > 10


@pytest.mark.parametrize("trainer", ["offline", "online"])
def test_losses_and_validation_are_the_same(launched, trainer) -> None:
    alone, together = launched / "1" / trainer, launched / "3" / trainer
    assert len(logged(alone, "loss")) == 2 * 7
    for name in (*LOGGED, "rows"):
        assert logged(together, name) == pytest.approx(logged(alone, name), rel=1e-4), name
    validations = [logged(run, "validation") for run in (alone, together)]
    assert len(validations[0]) == 2
    for here, there in zip(*validations, strict=True):
        assert here == pytest.approx(there, rel=1e-4)


def test_perplexities_are_the_same(launched) -> None:
    alone, together = (json.loads((launched / count / "joint" / "results.json").read_text()) for count in "13")
    assert together["tokens"] == alone["tokens"]
    grids = [[row["perplexity"] for row in results["grid"]] for results in (alone, together)]
    assert grids[1] == pytest.approx(grids[0], rel=1e-4) and len(grids[0]) == 4


# Three processes may round sums in another order after a new start; shards in another order than replicas.
@pytest.mark.parametrize(
    ("run", "whole", "rounding"),
    [
        ("1/interrupted", "1/offline", 0.0),
        ("3/interrupted", "3/offline", 1e-5),
        ("moved", "1/offline", 1e-4),
        ("3/sharded", "3/offline", 1e-4),
    ],
)
def test_a_stopped_run_continues_to_the_same_losses_and_weights(launched, run, whole, rounding) -> None:
    assert "at step 3 of 14" in (launched / run[0].replace("m", "3") / "output").read_text()
    for name in LOGGED:
        expected = logged(launched / whole, name)
        assert logged(launched / run, name) == pytest.approx(expected, rel=rounding, abs=0), name
    found, expected = weights(launched / run), weights(launched / whole)
    assert all(torch.allclose(found[name], expected[name], rtol=rounding, atol=rounding) for name in expected)
