"""The evaluation harness on a saved folder; local tasks. Skipped without lm-eval."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from harness import ROOT
from tiny_models import plain_greedy, plain_log_probs, save_models

pytest.importorskip("lm_eval", reason="the package lm-eval is not installed")

OWN = ROOT / "downstream" / "general_tasks"
TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "Q: {{{{question}}}}\\nA:"
"""
CHOICE = """
task: local_choice
output_type: multiple_choice
doc_to_target: label
doc_to_choice: choices
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
TEXT = """
task: local_text
output_type: generate_until
doc_to_target: text
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
ROWS = [
    {"question": "who wrote it?", "choices": ["James", "the first", "no one of all"]},
    {"question": "where is the moon, is it here?", "choices": ["there", "here, of course", "Yes"]},
    {"question": "is it?", "choices": ["No", "Yes", "the answer"]},
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    save_models(folder, context=128)
    return folder


def exported(world, lmbda) -> Path:
    from models import MLPMemory

    folder = world / f"exported-{lmbda}"
    MLPMemory.from_pretrained(world / "base", world / "memory", lmbda).save_pretrained(folder)
    return folder


def scored(tasks: Path, names: list[str], batch_size: int = 2, **model) -> dict:
    """The harness's own results by task, of a model on tasks of a folder."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    settings = {"model": "hf", "model_args": model, "device": "cpu", "batch_size": batch_size, "bootstrap_iters": 0}
    return lm_eval.simple_evaluate(**settings, tasks=names, task_manager=manager)["results"]


def write_tasks(folder: Path, rows) -> Path:
    folder.mkdir()
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choice.yaml").write_text(TASK.format(data=data) + CHOICE)
    (folder / "text.yaml").write_text(TASK.format(data=data) + TEXT)
    return folder


@pytest.mark.parametrize("lmbda", [0.0, 0.9])
def test_a_folder_is_scored_as_single_texts_are(world, tmp_path, lmbda):
    from transformers import AutoTokenizer

    from models import MLPMemory

    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    model = MLPMemory.from_pretrained(world / "base", world / "memory", lmbda)
    wanted = []
    for row in ROWS:
        prompt = f"Q: {row['question']}\nA:"
        scores = [plain_log_probs(model, tokenizer, prompt, f" {choice}").sum() for choice in row["choices"]]
        wanted.append((int(np.argmax(scores)), plain_greedy(model, tokenizer, prompt, 6).split("\n")[0]))
    # Two rows want what the model says, the last something else.
    wanted[2] = (wanted[2][0] + 1) % 3, "something else"
    rows = [{**row, "label": label, "text": text} for row, (label, text) in zip(ROWS, wanted, strict=True)]
    tasks = write_tasks(tmp_path / "tasks", rows)
    folder = {"pretrained": str(exported(world, 0.9)), "trust_remote_code": True, "lmbda": lmbda}
    found = scored(tasks, ["local_choice", "local_text"], **folder)
    assert found["local_choice"]["acc,none"] == found["local_text"]["exact_match,none"] == pytest.approx(2 / 3)


# The columns of each benchmark's dataset, for a row or two of each label.
OWN_ROWS = {
    "mr": [{"text": "a fine film", "label": 1}, {"text": "dull", "label": 0}],
    "cr": [{"text": "it works", "label": 1}, {"text": "it broke", "label": 0}],
    "rotten_tomatoes": [{"text": "a fine film", "label": 1}, {"text": "dull", "label": 0}],
    "hyperpartisan": [{"text": "they lie!", "label": "true"}, {"text": "it rained", "label": "mainstream"}],
    "ag_news": [{"text": "shares fell", "label": 2}, {"text": "they won", "label": 1}],
    "yahoo_answers": [{"question_title": "why?", "question_content": "is it so", "topic": 9}],
}


def test_every_general_task_runs_on_rows_of_its_datasets_columns(world, tmp_path):
    assert {path.stem for path in OWN.glob("*.yaml")} == {*OWN_ROWS, "mlpmem_general"}
    for name, rows in OWN_ROWS.items():
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / f"{name}.yaml").write_text(
            f"include: {OWN / name}.yaml\ntask: local_{name}\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{train: {data}, validation: {data}, test: {data}}}}}\n"
        )
    found = scored(tmp_path, [f"local_{name}" for name in OWN_ROWS], pretrained=str(world / "base"))
    assert len(found) == len(OWN_ROWS) and all(0 <= result["acc,none"] <= 1 for result in found.values())


def test_the_group_holds_the_nine_tasks_of_the_paper():
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(OWN))
    members = yaml.safe_load((OWN / "mlpmem_general.yaml").read_text())["task"]
    assert len(members) == 9
    assert all(manager.match_tasks([name]) == [name] for name in members)
