"""docs/change.md: each diff on it applies to the tree as it is, and a memory trained with it is another one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from harness import ROOT, run
from safetensors import safe_open

DIFFS = re.findall(r"```diff\n(.*?)```", (ROOT / "docs" / "change.md").read_text(), re.DOTALL)
ROOMS = ("models", "utils", "knn_utils", "training")


def train(world, tree: Path, output: Path, targets: Path) -> tuple[list[dict], set[str]]:
    """The log of two steps with the code in `tree`, and the names of the memory's weights."""
    flags = world.trainer(output, "--knn_dstore_path", world.dstore("train"), "--max_train_steps", 2)
    flags += ["--loss", "plain", "--validation_split_name", "none", "--learning_rate", 0.1, "--knn_save_path", targets]
    run("-m", "train_mlpmem_offline", *flags, cwd=tree)
    with safe_open(output / "epoch_1" / "model.safetensors", "pt") as weights:
        return json.loads((output / "training.json").read_text())["log"], set(weights.keys())


@pytest.fixture(scope="module")
def unchanged(llama_world, tmp_path_factory):
    return train(llama_world, ROOT, tmp_path_factory.mktemp("unchanged"), llama_world.targets)


@pytest.fixture
def changed(request, tmp_path) -> Path:
    """A copy of the tree with one of the page's diffs."""
    for room in ROOMS:
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train_mlpmem_offline.py", tmp_path)
    subprocess.run(["git", "apply", "-"], cwd=tmp_path, input=DIFFS[request.param], text=True, check=True)
    return tmp_path


@pytest.mark.parametrize("changed", [0], indirect=True)
def test_a_loss_term_is_in_the_total_and_is_learned(llama_world, unchanged, changed):
    log, names = train(llama_world, changed, changed / "out", llama_world.targets)
    (first, second), (old_first, old_second) = log, unchanged[0]
    assert first["loss"] < old_first["loss"] - 0.1  # less the entropy
    assert (first["kl"], first["ce"]) == pytest.approx((old_first["kl"], old_first["ce"]), abs=1e-6)
    assert abs(second["ce"] - old_second["ce"]) > 1e-4 and names == unchanged[1]


@pytest.mark.parametrize("changed", [1], indirect=True)
def test_a_block_has_its_weights_in_the_checkpoint(llama_world, unchanged, changed):
    log, names = train(llama_world, changed, changed / "out", llama_world.targets)
    assert names == unchanged[1] | {f"layers.{number}.gain" for number in range(2)}
    assert log[0]["loss"] == pytest.approx(unchanged[0][0]["loss"], abs=1e-6)  # closed at first
    assert abs(log[1]["loss"] - unchanged[0][1]["loss"]) > 1e-4


@pytest.mark.parametrize("changed", [2], indirect=True)
def test_a_kernel_makes_other_targets_that_a_memory_learns(llama_world, unchanged, changed):
    world, targets = llama_world, changed / "targets"
    made = ("--dstore_path", world.dstore("train"), "--index_path", world.index, "--output_path", targets)
    run("-m", "knn_utils.saveKNNMulti", *made, "--k", 16, "--knn_temp", 4, "--ignore_first", "True", cwd=changed)
    log, _ = train(world, changed, changed / "out", targets)
    assert abs(log[0]["kl"] - unchanged[0][0]["kl"]) > 1e-3
    assert log[0]["ce"] == pytest.approx(unchanged[0][0]["ce"], abs=1e-6)
