"""The evaluation harness on a saved folder, and base and joint in one run; local tasks. Skipped without lm-eval."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from harness import ROOT, command, refused_here, run
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


def open_models(world, lmbda):
    """(model, tokenizer) as the adapter should see them."""
    from downstream.model import ModelArguments, open_model

    memory = {"use_neural_knn": True, "knn_generator_path": str(world / "memory"), "lmbda": lmbda} if lmbda else {}
    return open_model(ModelArguments(model_name_or_path=str(world / "base"), **memory))


def write_tasks(folder: Path, rows) -> Path:
    folder.mkdir()
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choice.yaml").write_text(TASK.format(data=data) + CHOICE)
    (folder / "text.yaml").write_text(TASK.format(data=data) + TEXT)
    return folder


def flags(world, output, lmbda=0.0):
    memory = ("--use_neural_knn", "--knn_generator_path", world / "memory", "--lmbda", lmbda) if lmbda else ()
    return ("--model_name_or_path", world / "base", "--output_dir", output, *memory)


def test_base_and_joint_are_scored_as_single_texts_are(world, tmp_path):
    made = {}
    for name, lmbda in (("base", 0.0), ("joint", 0.9)):
        model, tokenizer = open_models(world, lmbda)
        made[name] = []
        for row in ROWS:
            prompt = f"Q: {row['question']}\nA:"
            scores = [plain_log_probs(model, tokenizer, prompt, f" {choice}").sum() for choice in row["choices"]]
            made[name].append((np.argmax(scores), plain_greedy(model, tokenizer, prompt, 6).split("\n")[0]))
    assert made["base"] != made["joint"]
    # Two rows want what the joint model says, the last something else.
    wanted = [*made["joint"][:2], ((made["joint"][2][0] + 1) % 3, "something else")]
    rows = [{**row, "label": int(label), "text": text} for row, (label, text) in zip(ROWS, wanted, strict=True)]
    tasks = write_tasks(tmp_path / "tasks", rows)
    command(
        "downstream.lm_eval_mlpmem",
        *(*flags(world, tmp_path / "out", 0.9), "--with_base", "--per_device_eval_batch_size", 2),
        *("--tasks", "local_choice,local_text", "--include_path", tasks),
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for name, tasks in (("base", results["base"]["tasks"]), ("joint", results["tasks"])):
        right = [(said[0] == label, said[1] == text) for said, (label, text) in zip(made[name], wanted, strict=True)]
        found = tasks["local_choice"]["acc,none"], tasks["local_text"]["exact_match,none"]
        assert found == pytest.approx(np.mean(right, axis=0).tolist())
    assert found == pytest.approx((2 / 3, 2 / 3))


def exported(world, **settings) -> Path:
    from models import MLPMemory

    folder = world / f"exported-{settings.get('lmbda')}"
    MLPMemory.from_pretrained(world / "base", world / "memory", **settings).save_pretrained(folder)
    return folder


def test_the_harness_itself_gives_the_adapters_figures(world, tmp_path):
    import lm_eval
    from lm_eval.tasks import TaskManager

    tasks = write_tasks(tmp_path / "tasks", [{**row, "label": 1, "text": "x"} for row in ROWS])
    names = ("--tasks", "local_choice,local_text", "--include_path", tasks)
    command("downstream.lm_eval_mlpmem", *flags(world, tmp_path / "out", 0.9), *names)
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={exported(world, lmbda=0.9)},trust_remote_code=True",
        device="cpu",
        batch_size=8,
        tasks=["local_choice", "local_text"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]
    for name, metric in (("local_choice", "acc,none"), ("local_text", "exact_match,none")):
        assert found["results"][name][metric] == results[name][metric]


LONG = "who wrote it, is the moon here? " * 20
PAIRS = [
    ("Q: who wrote it?\nA:", " James"),
    (LONG, " the first"),
    ("", " The moon"),
    ("Answer: ", "No \n"),
    ("A \n ", "b"),
]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_at_lambda_0_the_harness_scores_the_folder_as_it_scores_the_base(world, batch_size):
    """Contexts longer than the model's, empty ones, trailing white space."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    def scores(**arguments):
        language_model = HFLM(device="cpu", batch_size=batch_size, **arguments)
        assert language_model.max_length == 128 < len(language_model.tok_encode(LONG))
        pairs = [Instance("loglikelihood", {}, pair, 0) for pair in PAIRS]
        texts = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in (LONG, "Yes.")]
        return [each[0] for each in language_model.loglikelihood(pairs)] + language_model.loglikelihood_rolling(texts)

    base = scores(pretrained=str(world / "base"))
    folder = str(exported(world, lmbda=0.5))
    alone = scores(pretrained=folder, trust_remote_code=True, lmbda=0.0)
    assert alone == pytest.approx(base, abs=1e-4)
    assert scores(pretrained=folder, trust_remote_code=True) != pytest.approx(base, abs=1e-2)


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
    names = [f"local_{name}" for name in OWN_ROWS]
    command("downstream.lm_eval_mlpmem", *flags(world, tmp_path / "out"), "--include_path", tmp_path, "--tasks", *names)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["tasks"]) == set(names) and results["memory"] is None
    assert all(0 <= results["tasks"][name]["acc,none"] <= 1 for name in names)


def test_the_group_holds_the_nine_tasks_of_the_paper():
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(OWN))
    members = yaml.safe_load((OWN / "mlpmem_general.yaml").read_text())["task"]
    assert len(members) == 9
    assert all(manager.match_tasks([name]) == [name] for name in members)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--tasks", "no_such_task"), ["no_such_task", "mlpmem_general"]),
        (("--tasks", "mlpmem_mr", "--limit", 0), ["--limit 0"]),
        (("--tasks", "mlpmem_mr", "--seed", -1), ["--seed -1"]),
        (("--tasks", "mlpmem_mr", "--num_fewshot", -1), ["--num_fewshot -1"]),
        (("--tasks", "mlpmem_mr", "--include_path", "nowhere"), ["--include_path nowhere"]),
        (("--tasks", "mlpmem_mr", "--use_neural_knn"), ["--knn_generator_path"]),
        (("--tasks", "mlpmem_mr", "--with_base"), ["--with_base", "--use_neural_knn"]),
        (("--tasks", "mlpmem_mr"), ["mlpmem_mr", "dataset cannot be loaded"]),
    ],
)
def test_bad_input_is_told_in_one_line(world, tmp_path, more, expected):
    line = refused_here("downstream.lm_eval_mlpmem", *flags(world, tmp_path / "out"), *more)
    assert all(part in line for part in expected), line


def test_without_the_harness_the_command_says_how_to_get_it(world, tmp_path):
    (tmp_path / "lm_eval.py").write_text("raise ImportError")
    done = run(
        *("-m", "downstream.lm_eval_mlpmem", *flags(world, tmp_path / "out")), check=False, PYTHONPATH=str(tmp_path)
    )
    assert done.returncode == 2 and "pip install lm-eval" in done.stderr and "Traceback" not in done.stderr
