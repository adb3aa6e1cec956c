"""The reports: quickstart, ablation, WikiText-103."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import command, run

from utils.artefact import Made

pytestmark = pytest.mark.unit


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def results_of_stages(work: Path) -> None:
    """The files of the quickstart's stages that the report reads."""
    grid = [{"lmbda": lmbda, "perplexity": found} for lmbda, found in ((0.1, 14.8), (0.3, 14.4), (1.0, "inf"))]
    shared = {"base_perplexity": 15.0, "grid": grid, "tokens": 100}
    knn = shared | {"perplexity": 14.8, "lmbda": 0.1, "knn_temp": 2.0}
    joint = shared | {"perplexity": 14.4, "lmbda": 0.3, "memory_temp": 1.0}
    recall = {"recall_base": 0.1, "recall_memory": 0.3, "cases": 50, "standard_error_difference": 0.05}
    recall |= {"recall_first_base": 0.4, "recall_first_memory": 0.8, "recall_one_lambda": 0.2}
    stages = {
        "knnlm_validation": knn,
        "knnlm_test": knn | {"adaptive": {"perplexity": 14.5, "knn_temp": 2.0}},
        "joint_validation": joint,
        "joint_test": joint | {"adaptive": {"perplexity": 14.0, "memory_temp": 1.5}},
        "recall": recall | {"rule": "a rule", "examples": []},
    }
    for name, content in stages.items():
        write(work / name / "results.json", content)
    log = [{"step": 1, "loss": 3.0, "kl": 2.0, "ce": 3.0}]
    training = {"log": log, "settings": {"alpha": 0.5}, "training_seconds": 9, "checkpoint": "epoch_2"}
    write(work / "memory" / "training.json", training)
    gate = Made("gate", {"perplexity": {"training": {"base": 20.0, "memory": 1.5, "mixture": 2.0}}})
    record = work / "memory" / "epoch_2" / "gate.safetensors.made.json"
    record.parent.mkdir()
    record.write_text(gate.text)
    write(work / "windows" / "dstore_summary.json", {"train": {"dstore_size": 1000}})


def rows(text: str) -> list[list[str]]:
    """Cells of the lines of a table."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]


def test_the_quickstarts_table_has_a_row_for_each_mixture(tmp_path):
    results_of_stages(tmp_path)
    flags = ("quickstart", "--work", tmp_path, "--output_dir", tmp_path / "out", "--seconds", 60)
    command("downstream.report", *flags)
    text = (tmp_path / "out" / "report.md").read_text()
    assert rows(text)[2:] == [
        ["base", "15.00", "", ""],
        ["base + kNN-LM", "14.80", "-1.3%", "lambda 0.1, temperature 2"],
        ["base + kNN-LM, adaptive", "14.50", "-3.3%", "lambda by the nearest neighbor's distance"],
        ["base + MLP memory", "14.40", "-4.0%", "lambda 0.3, temperature 1"],
        ["base + MLP memory, adaptive", "14.00", "-6.7%", "lambda by token"],
    ]
    assert "10.0%" in text and "4.0 standard errors" in text and "80.0%" in text
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    write(tmp_path / "untuned" / "results.json", {"perplexity": 18.0})
    command("downstream.report", *flags)
    assert rows((tmp_path / "out" / "report.md").read_text())[2][:3] == ["base", "18.00", "+20.0%"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["untuned_ppl"], results["base_ppl"], results["knnlm_ppl"]) == (18.0, 15.0, 14.8)
    assert (results["lambda"], results["memory_ppl"], results["memory_temp"]) == ("adaptive", 14.0, 1.5)
    assert (results["known_base_ppl"], results["known_memory_ppl"]) == (20.0, 2.0)
    assert (results["recall_base"], results["recall_first_memory"], results["train_tokens"]) == (0.1, 0.8, 1000)


def test_an_ablation_has_a_row_for_each_value(tmp_path):
    for value, perplexity in (("0", 17.5), ("0.5", 17.0)):
        test = {"perplexity": perplexity, "base_perplexity": 20.0, "lmbda": 0.4, "tokens": 900}
        log = [{"step": 2, "loss": 2, "kl": 1.25, "ce": 2.75}, {"step": 2, "validation": {"memory_perplexity": 40.0}}]
        write(tmp_path / value / "test" / "results.json", test)
        write(tmp_path / value / "memory" / "training.json", {"log": log, "training_seconds": 12.3})
    flags = ("--setting", "alpha", "--runs", tmp_path, "--output_dir", tmp_path / "out", "--values", "0", "0.5")
    command("downstream.report", "ablation", *flags)
    assert rows((tmp_path / "out" / "table.md").read_text())[2:] == [
        ["0", "17.50", "-12.5%", "0.4", "40.00", "1.25", "2.75", "12"],
        ["0.5", "17.00", "-15.0%", "0.4", "40.00", "1.25", "2.75", "12"],
    ]
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_papers_table_has_measured_and_published_perplexity(tmp_path):
    measured = {"large_vanilla": 30.0, "large_finetuned": 20.0, "xl_finetuned": 19.0, "large_memory": 17.5}
    for stage, value in measured.items():
        result = {"perplexity": value, "tokens": 100, "lmbda": 0.25, "memory_temp": 1.0}
        write(tmp_path / "work" / stage / "results.json", result)
    command("downstream.report", "wikitext103", "--output_dir", tmp_path)
    assert [cells[1:] for cells in rows((tmp_path / "table.md").read_text())[2:]] == [
        *(["15.80", "30.00"], ["10.42", "20.00"], ["10.16", "19.00"], ["9.58", "17.50"]),
    ]
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == 4


def test_an_unknown_report_is_refused():
    done = run("-m", "downstream.report", "speed", check=False)
    assert done.returncode == 2 and "wikitext103" in done.stderr


@pytest.mark.parametrize(
    ("one", "by_token", "other", "chosen"),
    [(2.0, 3.0, (200.0, 35.0), 0.9), (3.0, 2.0, (30.0, 35.0), "adaptive"), (2.0, 2.05, (200.0, 35.0), "adaptive")],
)
def test_held_out_documents_choose_the_lambda_and_other_text_where_they_are_nearly_equal(
    one, by_token, other, chosen, tmp_path
):
    for split, (fixed, adaptive) in {"validation": (one, by_token), "test": (5.0, 5.0), "other": other}.items():
        found = {"base_perplexity": 30.0, "perplexity": fixed, "lmbda": 0.9, "adaptive": {"perplexity": adaptive}}
        write(tmp_path / "work" / f"joint_{split}" / "results.json", found | {"model": "a/base"})
    write(tmp_path / "work" / "knnlm_validation" / "results.json", {"adaptive": {"perplexity": 4.0}})
    flags = ("--work", tmp_path / "work", "--memory", tmp_path / "memory", "--output_dir", tmp_path / "out")
    command("downstream.report", "remember", *flags)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["lambda"] == chosen
