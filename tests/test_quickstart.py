"""The quickstart: what its stages hand to each other, with the base as it is and fine-tuned, and its table."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from harness import calls, flags, shell, stub_python

from utils.embedded_default import write_other

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
    *("train_base", "knn_utils.build_index", "train_base", "knn_utils.saveKNNMulti"),
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
    embed = flags(found[2])
    assert embed["--model_name_or_path"] == str(work / "embedded" / "model")
    assert embed["--eval_subset"].split() == ["train", "validation", "test"] and "--save_logprob" in embed
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


def test_documents_begin_windows_and_nothing_of_another_text_is_left_out(tmp_path):
    for name, settings, limits in (
        ("own", {}, ["320", "1200", "500"]),
        ("full", {"SIZE": "full"}, [None, "1200", "500"]),
        ("other", {"TEXT": "a.jsonl", "MODEL": "m"}, [None, None, None]),
        ("limited", {"TEXT": "a.jsonl", "MODEL": "m", "MAX_DOCUMENTS": 7}, ["7", None, None]),
    ):
        _, found = quickstart(tmp_path / name, **settings)
        windows = next(call for call in found if call[0].endswith("preprocess_dataset.py"))
        assert "--by_document" in windows
        words = "--max_documents", "--max_document_characters", "--min_document_characters"
        assert [flags(windows).get(word) for word in words] == limits


def test_the_memory_is_tied_unless_asked_for_a_head_of_its_own(tmp_path):
    for name, settings, tied in (("tied", {}, True), ("own", {"OWN_HEAD": 1}, False)):
        _, found = quickstart(tmp_path / name, **settings)
        trained = next(call for call in found if "train_mlpmem_offline" in call)
        assert ("--tie_head" in trained) == tied


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


def test_the_other_text_of_gates_has_web_text_and_articles_that_the_quickstart_does_not_read(tmp_path):
    articles = [f"Article {number} " + "is long. " * 80 for number in range(2000)]
    (tmp_path / "wiki.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in articles))
    (tmp_path / "web.txt").write_text("".join(f"Line {number} of the web.\n" for number in range(20)))
    write_other(tmp_path, tmp_path / "other")
    train, test = (
        {json.loads(row)["text"] for row in (tmp_path / "other" / f"{split}.jsonl").read_text().splitlines()}
        for split in ("train", "test")
    )
    assert len(train) == len(test) == 20 and not train & test
    assert sum(text.startswith("Line") for text in train) == 10 and not (train | test) & set(articles[:1000])
