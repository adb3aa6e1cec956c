"""The ablations: what each trains, and what they share."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import flags, ran

SETTINGS = {
    "alpha": {"ALPHAS": "0 0.5"},
    "temperature": {"TEMPERATURES": "2 16"},
    "layers": {"LAYER_COUNTS": "1 4"},
    "layer_position": {"LAYER_POSITIONS": "-1 -6"},
    "offline_online": {},
}
# The number of datastores, indexes, targets and memories that are made for two values.
MADE = {
    **dict.fromkeys(("alpha", "layers", "offline_online"), (3, 1, 1, 2)),
    **{"temperature": (3, 1, 2, 2), "layer_position": (6, 2, 2, 2)},
}
pytestmark = pytest.mark.unit


def ablation(name: str, folder: Path, **settings: object) -> list[list[str]]:
    """The calls of an ablation's commands, with stubs as commands; it is continued in `folder`."""
    for block in (-1, -6):
        for split in ("train", "validation", "test"):
            path = folder / "out" / "work" / f"block{block}" / f"dstore_llama_{split}_8.arrow"
            path.mkdir(parents=True, exist_ok=True)
    before = len((folder / "calls").read_text().split("----\n")) - 1 if (folder / "calls").exists() else 0
    where = {"OUTPUT": folder / "out", "MODEL": "base", "TEXT": "text"}
    _, found = ran(folder, f"scripts/ablations/{name}.sh", **where, **settings)
    return found[before:]


def made(found: list[list[str]]) -> tuple[int, ...]:
    calls = [word for call in found for word in call]
    trained = calls.count("train_mlpmem_offline") + calls.count("train_mlpmem_online")
    return *(calls.count(each) for each in ("train_base", "knn_utils.build_index", "knn_utils.saveKNNMulti")), trained


@pytest.mark.parametrize("name", SETTINGS)
def test_a_memory_is_trained_and_scored_for_each_value(name, tmp_path):
    found = ablation(name, tmp_path, **SETTINGS[name])
    assert made(found) == MADE[name]
    trained = [flags(call) for call in found if any(word.startswith("train_mlpmem") for word in call)]
    joint = [flags(call) for call in found if "evaluate_joint" in call]
    assert [each["--dataset_split_name"] for each in joint] == ["validation", "test"] * 2
    assert joint[1]["--choose_on"] == f"{joint[0]['--output_dir']}/results.json" and "--lmbda" not in joint[1]
    assert found[-1][1:3] == ["downstream.report", "ablation"]
    assert [Path(each["--output_dir"]).parent.name for each in trained] == flags(found[-1])["--values"].split()


def test_ablations_share_what_their_settings_do_not_change(tmp_path):
    ablation("alpha", tmp_path, **SETTINGS["alpha"])
    assert made(ablation("alpha", tmp_path, ALPHAS="0 0.5 1")) == (0, 0, 0, 1)
    assert made(ablation("temperature", tmp_path, **SETTINGS["temperature"])) == (0, 0, 1, 2)
