"""The ablations: what each trains, what they share, and the page at the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import ROOT, command, flags, ran, refused_here

SETTINGS = {
    "alpha": {"ALPHAS": "0 0.5"},
    "temperature": {"TEMPERATURES": "2 16"},
    "layers": {"LAYER_COUNTS": "1 4"},
    "layer_position": {"LAYER_POSITIONS": "-1 -6"},
    "offline_online": {},
}
# What is made for two values, where nothing of it was there: datastores, indexes, targets, memories.
MADE = {
    **dict.fromkeys(("alpha", "layers", "offline_online"), (3, 1, 1, 2)),
    **{"temperature": (3, 1, 2, 2), "layer_position": (6, 2, 2, 2)},
}
DIFFERS = {"alpha": "--alpha", "temperature": "--knn_save_path", "layers": "--memory_layers"} | {
    "layer_position": "--layer_position"
}

pytestmark = pytest.mark.unit


def ablation(name: str, folder: Path, **settings: object) -> tuple[str, list[list[str]]]:
    """(what it printed, the calls of its commands) of an ablation with stubbed stages, continued in `folder`."""
    for block in (-1, -6):
        for split in ("train", "validation", "test"):
            path = folder / "out" / "work" / f"block{block}" / f"dstore_llama_{split}_8.arrow"
            path.mkdir(parents=True, exist_ok=True)
    where = {"OUTPUT": folder / "out", "MODEL": "base", "TEXT": "text"}
    before = len((folder / "calls").read_text().split("----\n")) - 1 if (folder / "calls").exists() else 0
    text, found = ran(folder, f"scripts/ablations/{name}.sh", **where, **settings)
    return text, found[before:]


def count(found: list[list[str]], module: str) -> int:
    return sum(module in call for call in found)


def made(found: list[list[str]]) -> tuple[int, ...]:
    trained = count(found, "train_mlpmem_offline") + count(found, "train_mlpmem_online")
    return (
        *(count(found, each) for each in ("train_base", "knn_utils.build_index", "knn_utils.saveKNNMulti")),
        trained,
    )


def test_there_is_a_script_for_each_setting():
    assert {path.stem for path in (ROOT / "scripts" / "ablations").glob("*.sh")} == {*SETTINGS, "common"}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_memory_is_trained_for_each_value_and_scored_at_the_lambda_that_validation_chose(name, tmp_path):
    text, found = ablation(name, tmp_path, **SETTINGS[name])
    assert made(found) == MADE[name]
    trained = [flags(call) for call in found if any(word.startswith("train_mlpmem") for word in call)]
    if name in DIFFERS:
        first, second = trained
        differs = {flag for flag in first if first[flag] != second[flag]}
        follows = {"--output_dir"}
        if name == "layer_position":
            follows |= {"--knn_dstore_path", "--knn_save_path", "--validation_dstore_path"}
        assert differs == {DIFFERS[name]} | follows
    else:
        assert ["--knn_dstore_path" in each for each in trained] == [True, False]
    joint = [flags(call) for call in found if "evaluate_joint" in call]
    assert [each["--dataset_split_name"] for each in joint] == ["validation", "test"] * 2
    assert joint[1]["--choose_on"] == f"{joint[0]['--output_dir']}/results.json" and "--lmbda" not in joint[1]
    report = flags(found[-1])
    assert found[-1][1] == "downstream.ablation" and len(report["--values"].split()) == 2
    assert [Path(each["--output_dir"]).parent.name for each in trained] == report["--values"].split()
    assert (name == "offline_online") == ("online training needs none" in text)


def test_ablations_share_what_their_settings_do_not_change_and_continue(tmp_path):
    ablation("alpha", tmp_path, **SETTINGS["alpha"])
    _, found = ablation("alpha", tmp_path, ALPHAS="0 0.5 1")
    assert made(found) == (0, 0, 0, 1)
    _, found = ablation("temperature", tmp_path, **SETTINGS["temperature"])
    assert made(found) == (0, 0, 1, 2)
    _, found = ablation("alpha", tmp_path, ALPHAS="0 0.5 1")
    assert [call[1] for call in found] == ["downstream.ablation"]


def test_the_sizes_of_the_paper_come_from_the_environment(tmp_path):
    settings = {"K": 1024, "LAYERS": 54, "EPOCHS": 50, "LEARNING_RATE": "5e-4", "INIT": "", "WINDOWS": "windows"}
    _, found = ablation("alpha", tmp_path, ALPHAS="0.5", **settings)
    train = flags(next(call for call in found if "train_mlpmem_offline" in call))
    wanted = {"--memory_layers": "54", "--num_train_epochs": "50", "--learning_rate": "5e-4"}
    assert wanted.items() <= train.items() and "--init_from_base" not in train
    assert train["--dataset_name"] == "windows" and count(found, "utils/preprocess_dataset.py") == 0
    assert flags(next(call for call in found if "knn_utils.saveKNNMulti" in call))["--k"] == "1024"


def test_the_page_has_a_row_for_each_value(tmp_path):
    for value, perplexity in (("0", 17.5), ("0.5", 17.0)):
        test = {"perplexity": perplexity, "base_perplexity": 20.0, "lmbda": 0.4, "tokens": 900}
        validation = {"step": 2, "validation": {"memory_perplexity": 40.0}}
        log = [
            {"step": 1, "loss": 3.0, "kl": 2.5, "ce": 3.5},
            {"step": 2, "loss": 2, "kl": 1.25, "ce": 2.75},
            validation,
        ]
        files = {"test/results.json": test, "memory/training.json": {"log": log, "training_seconds": 12.3}}
        for name, content in files.items():
            (tmp_path / value / name).parent.mkdir(parents=True)
            (tmp_path / value / name).write_text(json.dumps(content))
    given = ("--setting", "alpha", "--runs", tmp_path, "--output_dir", tmp_path / "out", "--values", "0", "0.5")
    command("downstream.ablation", *given)
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert lines[-2:] == [
        "| 0 | 17.50 | -12.5% | 0.4 | 40.00 | 1.25 | 2.75 | 12 |",
        "| 0.5 | 17.00 | -15.0% | 0.4 | 40.00 | 1.25 | 2.75 | 12 |",
    ]
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [row["value"] for row in json.loads((tmp_path / "out" / "results.json").read_text())["rows"]] == ["0", "0.5"]
    assert str(tmp_path / "1") in refused_here("downstream.ablation", *given, "1")
    (tmp_path / "0" / "memory" / "training.json").write_text(json.dumps({"log": log[:2], "training_seconds": 1}))
    assert "was not validated" in refused_here("downstream.ablation", *given)
