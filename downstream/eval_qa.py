"""Question answering with a base model, or a base with its MLP memory: one task, its predictions and its scores.

    python -m downstream.eval_qa --do_eval --task nq --model_name_or_path BASE --dataset_name nq_open_dev.jsonl \\
        --use_neural_knn --knn_generator_path MEMORY --lmbda 0.5 --output_dir results/nq

Writes `predictions.jsonl` (a line for each row, as they come) and `results.json` (scores from 0 to 1). The same
command again goes on after the last complete line.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from downstream.model import ModelArguments
from downstream.tasks import TASKS, Prompt, Task
from utils.cli import command, flag, note_unused, parse, required
from utils.errors import InputError, check_positive
from utils.results import lambda_text


@dataclass
class QAArguments:
    """Which questions, and where the answers go."""

    output_dir: str = required("folder of predictions.jsonl and results.json")
    task: str = flag("nq", "; ".join(f"{name}: {task.about}" for name, task in TASKS.items()))
    dataset_name: str | None = flag(
        None, "file (.jsonl, .json, .csv, .tsv, .parquet), folder or hub name; default: the task's dataset on the hub"
    )
    dataset_config_name: str | None = flag(None, "configuration of a hub dataset; default: the task's")
    eval_subset: str | None = flag(None, "split of a folder or hub dataset; default: the task's")
    prompt_file: str | None = flag(None, "the benchmark's own prompt text, for truthfulqa, halueval, halueval_judge")
    start: int = flag(0, "leave out so many rows at the beginning")
    max_eval_samples: int | None = flag(None, "take so many rows at most")
    per_device_eval_batch_size: int = flag(8, "sequences in one forward pass; changes the speed, not the results")
    do_eval: bool = flag(False, "evaluate (the command's only job, so it is done without the flag too)")
    overwrite: bool = flag(False, "answer again what the output folder holds, whatever its settings")

    def check(self) -> None:
        """Check the values by themselves. Raises InputError."""
        if self.task not in TASKS:
            raise InputError(f"--task {self.task}: unknown, expected one of {', '.join(TASKS)}")
        if self.start < 0:
            raise InputError(f"--start {self.start}: expected a row number from 0")
        for name in ("max_eval_samples", "per_device_eval_batch_size"):
            if getattr(self, name) is not None:
                check_positive(f"--{name}", getattr(self, name))


class Row(NamedTuple):
    """A row of the benchmark that is to be answered."""

    number: int
    content: Mapping[str, Any]
    prompts: Sequence[Prompt]


def main() -> None:
    qa, model = parse(QAArguments, ModelArguments, description=__doc__.split("\n")[0])
    qa.check()
    model.check()
    task = TASKS[qa.task]
    started = time.time()
    from downstream.predictions import Predictions
    from utils.files import ensure_folder, read_json
    from utils.legacy import FolderLock
    from utils.results import write_results

    rows, dropped, data_settings = read_rows(qa, task)
    folder = ensure_folder(qa.output_dir)
    with FolderLock(folder):
        predictions = Predictions(folder, {**data_settings, **model.settings()}, overwrite=qa.overwrite)
        answered_before = len(predictions.lines)
        if answered_before == len(rows) and (folder / "results.json").exists():
            print(f"{folder}: complete already; --overwrite does it again")
            print(summary(read_json(folder / "results.json")))
            return
        if answered_before < len(rows):
            answer(task, rows, qa, model, predictions)
        counts = {"rows": len(rows) + dropped, "scored": len(rows), "dropped": dropped}
        results = {
            "task": qa.task,
            **model.stated(),
            "dataset": data_settings["dataset"],
            **score(task, predictions.lines),
            "counts": {**counts, "from_an_earlier_run": answered_before},
            "settings": predictions.settings,
        }
        print(summary(write_results(folder, results, started)))


def read_rows(qa: QAArguments, task: Task) -> tuple[list[Row], int, dict[str, Any]]:
    """The chosen rows that the task keeps, the number of those it drops, and the settings that say which they are."""
    from downstream.data import Questions, read_prompt_file

    prompt_text = read_prompt_file(qa.prompt_file, qa.task, task.prompt_file)
    hub_name, hub_config, hub_split = task.hub
    name = qa.dataset_name or hub_name
    if Path(name).is_file():
        note_unused(("dataset_config_name", "eval_subset"), f"here: {name} is a file")
    config = qa.dataset_config_name or (hub_config if name == hub_name else None)
    split = qa.eval_subset or hub_split
    questions = Questions(name, task.columns, config=config, split=split)
    if qa.start >= len(questions):
        raise InputError(f"--start {qa.start}: {name} has {len(questions)} rows, expected a smaller number")
    rows, dropped = [], 0
    for number, content in questions.select(qa.start, qa.max_eval_samples):
        if task.keep(content):
            rows.append(Row(number, content, task.prompts(content, prompt_text)))
        else:
            dropped += 1
    if not rows:
        raise InputError(f"--dataset_name {name}: none of the chosen rows can be scored by --task {qa.task}")
    settings = {
        "task": qa.task,
        "dataset": name,
        "dataset_content": questions.identity,
        "prompt_text": hashlib.sha256(prompt_text.encode()).hexdigest() if prompt_text else None,
        "start": qa.start,
        "max_eval_samples": qa.max_eval_samples,
    }
    return rows, dropped, settings


def answer(task: Task, rows: Sequence[Row], qa: QAArguments, model: ModelArguments, predictions: Any) -> None:
    """Answer the rows that have no line yet and append their lines, `--per_device_eval_batch_size` rows at a time."""
    from tqdm import tqdm

    from downstream.model import open_model
    from downstream.scoring import Evaluator

    evaluator = Evaluator(*open_model(model), qa.per_device_eval_batch_size, model.add_bos)
    name = predictions.settings["dataset"]
    encoded = []
    for row in rows:
        try:
            encoded.append([evaluator.sequences(prompt, task.max_new_tokens) for prompt in row.prompts])
        except ValueError as error:
            raise InputError(f"{name}: row {row.number}: {error}; leave it out with --start") from None
    # Every row counts here, also the answered ones: a continued run computes exactly what an undisturbed one does.
    evaluator.share_start([sequence.ids[: sequence.begin] for row in encoded for group in row for sequence in group])
    predictions.begin()
    with tqdm(total=len(rows), initial=len(predictions.lines), desc=qa.task, unit="row", disable=None) as bar:
        for first in range(len(predictions.lines), len(rows), qa.per_device_eval_batch_size):
            chunk = slice(first, first + qa.per_device_eval_batch_size)
            groups = [group for row in encoded[chunk] for group in row]  # a prompt's sequences
            if task.max_new_tokens:
                prompts = [group[0].ids for group in groups]
                outputs = iter(evaluator.continuations(prompts, task.max_new_tokens, task.stop))
            else:
                scored = iter(evaluator.likelihoods([sequence for group in groups for sequence in group]))
                outputs = iter([[next(scored) for _ in group] for group in groups])
            predictions.append([line(task, row, [next(outputs) for _ in row.prompts]) for row in rows[chunk]])
            bar.update(len(rows[chunk]))


def line(task: Task, row: Row, outputs: Sequence[Any]) -> dict[str, Any]:
    """The line of `predictions.jsonl` for a row. Raises InputError where the model gave no numbers."""
    if any(each.total != each.total for output in outputs if not isinstance(output, str) for each in output):
        raise InputError(
            f"row {row.number}: the model's log-probability is not a number; try --torch_dtype float32 or bfloat16"
        )
    scores, shown = task.measure(row.content, outputs)
    return {"row": row.number, "question": row.content["question"], **shown, "scores": scores}


def score(task: Task, lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean of each metric over the rows (from 0 to 1), and its standard error."""
    import numpy as np

    values = {name: np.array([line["scores"][name] for line in lines], dtype=np.float64) for name in task.metrics}
    return {
        "metrics": {name: float(each.mean()) for name, each in values.items()},
        "standard_errors": {
            name: float(each.std(ddof=1) / len(each) ** 0.5) if len(each) > 1 else 0.0 for name, each in values.items()
        },
    }


def summary(results: Mapping[str, Any]) -> str:
    """The scores in one line, in percent."""
    which = "base" if results["memory"] is None else f"base + memory (lambda {lambda_text(results['lmbda'])})"
    scores = ", ".join(f"{name} {100 * value:.2f}%" for name, value in results["metrics"].items())
    return f"{results['task']}, {which}: {scores} ({results['counts']['scored']} rows, {results['seconds']:.1f} s)"


if __name__ == "__main__":
    command(main)()
