"""The quickstart: what its stages hand to each other, with the base as it is and fine-tuned, and its table."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from harness import calls, command, flags, shell, stub_python

pytestmark = pytest.mark.unit


def quickstart(folder: Path, **settings: object) -> tuple[str, list[list[str]]]:
    """A run with stubbed stages: (what it printed, the calls of its commands, those before it too)."""
    program = stub_python(folder / "stub")
    answers = f'case "$*" in "-c import sys; print"*) echo {folder / "stub"} ;; esac\n'
    program.write_text(program.read_text() + answers)
    link = folder / "stub" / "python"
    link.unlink(missing_ok=True)
    link.symlink_to(program)
    environment = {"PATH": f"{folder / 'stub'}{os.pathsep}{os.environ['PATH']}", "OUTPUT": folder / "out"}
    for work in ("work", "work/finetuned"):
        for split in ("train", "validation", "test"):
            (folder / "out" / work / "dstore" / f"dstore_llama_{split}_8.arrow").mkdir(parents=True, exist_ok=True)
    done = shell("bash", "scripts/quickstart.sh", **environment, **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout, [call for call in calls(program) if call[:1] != ["-c"] and "pip" not in call]


def names(found: list[list[str]]) -> list[str]:
    return [call[1] if call[0] == "-m" else Path(call[0]).stem for call in found]


CHAIN = [
    *("train_base", "train_base", "train_base", "knn_utils.build_index", "train_base", "knn_utils.saveKNNMulti"),
    *("train_mlpmem_offline", "evaluate_joint", "training.gate", "evaluate_joint", "train_base", "downstream.recall"),
    "downstream.report",
]
BEFORE = ["utils.embedded_default", "preprocess_dataset"]


def test_each_stage_takes_what_the_one_before_it_made_and_a_second_run_reports_only(tmp_path):
    _, found = quickstart(tmp_path)
    assert names(found) == BEFORE + CHAIN
    work = tmp_path / "out" / "work"
    knnlm = [flags(call) for call in found if "--knn" in call]
    assert "adaptive" in knnlm[0]["--lmbda"].split() and "--lmbda" not in knnlm[1]
    assert knnlm[1]["--choose_on"] == str(work / "knnlm_validation" / "results.json")
    assert {flags(call).get("--model_name_or_path") for call in found[2:5]} == {str(work / "embedded" / "model")}
    _, found = quickstart(tmp_path)
    assert names(found)[len(BEFORE + CHAIN) :] == ["downstream.report"]


def test_the_gate_is_trained_after_the_one_lambda_is_chosen_and_test_and_recall_use_both(tmp_path):
    _, found = quickstart(tmp_path)
    gate = next(flags(call) for call in found if "training.gate" in call)
    later = [flags(call) for call in found if {"downstream.recall", "evaluate_joint"} & set(call)]
    assert gate["--knn_generator_path"] == later[1]["--knn_generator_path"] == later[2]["--knn_generator_path"]
    chosen = str(tmp_path / "out" / "work" / "joint_validation" / "results.json")
    assert [each.get("--lmbda") for each in later[1:]] == ["adaptive", "adaptive"]
    assert [each.get("--choose_on") for each in later[1:]] == [chosen, chosen]


def test_articles_of_the_default_text_begin_windows_and_another_text_is_cut_through(tmp_path):
    for name, settings, cut in (
        ("own", {}, "--by_document"),
        ("other", {"TEXT": "a.txt", "MODEL": "m"}, "--group_rows"),
        ("documents", {"TEXT": "a.jsonl", "MODEL": "m", "BY_DOCUMENT": 1}, "--by_document"),
    ):
        _, found = quickstart(tmp_path / name, **settings)
        windows = next(call for call in found if call[0].endswith("preprocess_dataset.py"))
        assert [word for word in windows if word in ("--by_document", "--group_rows")] == [cut]


def test_with_a_fine_tuned_base_the_whole_chain_is_made_with_it_in_a_folder_of_its_own(tmp_path):
    quickstart(tmp_path)
    text, found = quickstart(tmp_path, FINETUNE=1)
    found = found[len(BEFORE + CHAIN) :]
    assert text.count("done before") == 1  # model and text
    assert names(found) == [*BEFORE[-1:], "train_base", "train_base", *CHAIN]
    windows, untuned, tuned = map(flags, found[:3])
    work = tmp_path / "out" / "work"
    assert untuned["--model_name_or_path"] == tuned["--model_name_or_path"] == str(work / "embedded" / "model")
    assert untuned["--eval_subset"] == "test" and "--do_train" in tuned
    wanted = {"--num_train_epochs": "1", "--learning_rate": "1e-4", "--per_device_train_batch_size": "2"}
    assert wanted.items() <= tuned.items()
    using = {flags(call)["--model_name_or_path"] for call in found[3:] if "--model_name_or_path" in flags(call)}
    assert using == {tuned["--output_dir"]} == {str(work / "finetuned" / "model")}
    written = {flags(call)[name] for call in found for name in ("--output_dir", "--dstore_dir") if name in flags(call)}
    assert all(str(tmp_path / "out" / "finetuned") == path or f"{work}/finetuned" in path for path in written)
    read = {flags(call)["--dataset_name"] for call in found[1:] if "--dataset_name" in flags(call)}
    assert read == {windows["--output_dir"]} and windows["--max_documents"] == "480"
    _, again = quickstart(tmp_path, FINETUNE=1)
    assert names(again)[len(BEFORE + CHAIN) + len(found) :] == ["downstream.report"]
    _, again = quickstart(tmp_path, FINETUNE=1, FINETUNE_EPOCHS=2)
    assert names(again)[len(BEFORE + CHAIN) + len(found) + 1 :] == ["train_base", *CHAIN]


def results_of_stages(work: Path) -> None:
    """What the stages leave for the report."""
    grid = [{"lmbda": 0.1, "knn_temp": 2.0, "perplexity": 14.8}]
    knn = {"perplexity": 14.8, "base_perplexity": 15.0, "lmbda": 0.1, "knn_temp": 2.0, "grid": grid, "tokens": 100}
    joint = knn | {"perplexity": 14.4, "lmbda": 0.3, "knn_temp": 1.0}
    recall = {"recall_base": 0.1, "recall_memory": 0.3, "cases": 50, "standard_error_difference": 0.05}
    recall |= {"recall_first_base": 0.4, "recall_first_memory": 0.8}
    stages = {
        **{f"knnlm_{split}": knn | {"adaptive": {"perplexity": 14.5}} for split in ("validation", "test")},
        **{f"joint_{split}": joint for split in ("validation", "test")},
        "recall": recall | {"rule": "a rule", "examples": []},
    }
    for name, content in stages.items():
        (work / name).mkdir(parents=True)
        (work / name / "results.json").write_text(json.dumps(content))
    (work / "memory").mkdir()
    log = [{"step": 1, "loss": 3.0, "kl": 2.0, "ce": 3.0}]
    training = {"log": log, "settings": {"alpha": 0.5}, "training_seconds": 9}
    (work / "memory" / "training.json").write_text(json.dumps(training))
    (work / "windows").mkdir()
    (work / "windows" / "dstore_summary.json").write_text(json.dumps({"train": {"dstore_size": 1000}}))


def test_the_table_has_a_row_for_each_mixture_and_for_the_base_before_fine_tuning(tmp_path):
    results_of_stages(tmp_path)
    report = ("--work", tmp_path, "--output_dir", tmp_path / "out")
    command("downstream.report", "quickstart", *report)
    plain = (tmp_path / "out" / "report.md").read_text()
    assert "| base | 15.00 |  |  |\n| base + kNN-LM | 14.80 | -1.3% | lambda 0.1, temperature 2 |" in plain
    assert "| base + kNN-LM, adaptive | 14.50 | -3.3% |" in plain and "| base + MLP memory | 14.40 | -4.0% |" in plain
    assert "base 10.0%, base + memory 30.0% (4.0 standard errors apart); by the first token 40.0% and 80.0%." in plain
    (tmp_path / "untuned").mkdir()
    (tmp_path / "untuned" / "results.json").write_text(json.dumps({"perplexity": 18.0}))
    command("downstream.report", "quickstart", *report)
    rows = [line.split("|")[1:4] for line in (tmp_path / "out" / "report.md").read_text().splitlines() if "| " in line]
    assert [[cell.strip() for cell in row] for row in rows if row[1].strip()[:1].isdigit()] == [
        ["base", "18.00", "+20.0%"],
        ["fine-tuned", "15.00", ""],
        ["fine-tuned + kNN-LM", "14.80", "-1.3%"],
        ["fine-tuned + kNN-LM, adaptive", "14.50", "-3.3%"],
        ["fine-tuned + MLP memory", "14.40", "-4.0%"],
    ]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["untuned_ppl"], results["base_ppl"], results["knnlm_adaptive_ppl"]) == (18.0, 15.0, 14.5)
    assert {"knnlm_ppl", "memory_ppl", "lambda", "knn_temp", "recall_base", "recall_memory"} <= results.keys()
    assert (results["recall_first_base"], results["recall_first_memory"]) == (0.4, 0.8)


def test_with_a_gate_the_memory_s_figures_are_those_of_lambda_by_token_and_the_best_number_stands_beside(tmp_path):
    results_of_stages(tmp_path)
    joint = json.loads((tmp_path / "joint_test" / "results.json").read_text())
    joint["adaptive"] = {"perplexity": 14.0, "knn_temp": 1.0}
    (tmp_path / "joint_test" / "results.json").write_text(json.dumps(joint))
    recall = json.loads((tmp_path / "recall" / "results.json").read_text())
    recall |= {"recall_one_lambda": 0.2, "recall_first_one_lambda": 0.5}
    (tmp_path / "recall" / "results.json").write_text(json.dumps(recall))
    gate = tmp_path / "memory" / "epoch_2" / "gate.json"
    gate.parent.mkdir()
    gate.write_text(json.dumps({"perplexity": {"known": {"base": 20.0, "memory": 1.5, "mixture": 2.0}}}))
    command("downstream.report", "quickstart", "--work", tmp_path, "--output_dir", tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["lambda"], results["memory_ppl"]) == ("adaptive", 14.0)
    assert (results["one_lambda"], results["memory_one_lambda_ppl"], results["recall_one_lambda"]) == (0.3, 14.4, 0.2)
    assert (results["known_base_ppl"], results["known_memory_ppl"]) == (20.0, 2.0)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| base + MLP memory, adaptive | 14.00 | -6.7% | lambda by token |" in text
    assert "With one lambda 20.0%." in text and "in other windows: base 20.00, base + memory 2.00." in text
