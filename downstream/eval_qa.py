"""Question answering with a base model, or with a base and its MLP memory.

    python -m downstream.eval_qa --do_eval --task nq --model_name_or_path BASE --dataset_name nq_open_dev.jsonl \\
        --use_neural_knn --knn_generator_path MEMORY --lmbda 0.5 --output_dir results/nq

Writes `predictions.jsonl` (one line per row) and `results.json` (scores from 0 to 1). The same command continues an
interrupted run after the last complete line.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
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
from utils.cli import command, flag, parse, required
from utils.errors import InputError
from utils.results import lambda_text
from utils.unused_flags import EVAL_QA


@dataclass
class QAArguments:
    """The questions, and the output folder."""

    output_dir: str = required("folder for predictions.jsonl and results.json")
    task: str = flag("nq", "; ".join(f"{name}: {task.about}" for name, task in TASKS.items()))
    dataset_name: str | None = flag(
        None, "file (.jsonl, .json, .csv, .tsv, .parquet), folder or hub name; default: the task's dataset on the hub"
    )
    dataset_config_name: str | None = flag(None, "configuration of a hub dataset; default: the task's")
    eval_subset: str | None = flag(None, "split of a folder or hub dataset; default: the task's")
    prompt_file: str | None = flag(None, "the benchmark's own prompt text, for truthfulqa, halueval, halueval_judge")
    start: int = flag(0, "skip this many rows at the beginning")
    max_eval_samples: int | None = flag(None, "maximum number of rows")
    per_device_eval_batch_size: int = flag(8, "sequences per forward pass; changes the speed, not the results")
    num_beams: int = flag(1, "beams of generation; 1: greedy")
    do_eval: bool = flag(False, "accepted for compatibility; evaluation is all that this command does")
    overwrite: bool = flag(False, "discard the output folder's predictions and answer again")


class Row(NamedTuple):
    """A row of the benchmark, and its prompts."""

    number: int
    content: Mapping[str, Any]
    prompts: Sequence[Prompt]


def main() -> None:
    qa, model = parse(QAArguments, ModelArguments, description=__doc__.split("\n")[0], unused=EVAL_QA)
    model.check()
    if qa.task not in TASKS:
        raise InputError(f"--task {qa.task}: expected one of {', '.join(TASKS)}")
    task, started = TASKS[qa.task], time.time()
    from utils.artefact import Made, begin
    from utils.files import read_json, write_json
    from utils.loading import quiet_libraries
    from utils.results import versions

    quiet_libraries()
    name = qa.dataset_name or task.hub[0]
    rows, dropped = read_rows(qa, task, name)
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()[:16]  # of questions, answers and prompts
    settings = {"task": qa.task, "dataset": name, "questions": digest, "num_beams": qa.num_beams, **model.settings()}
    made = Made("predictions", settings, len(rows), model.made_from())
    folder = Path(qa.output_dir)
    with contextlib.closing(begin(folder, made, overwrite=qa.overwrite)) as making:
        if making.done:
            print(f"{folder}: complete; use --overwrite to answer again")
            print(summary(read_json(folder / "results.json")))
            return
        lines = read_lines(folder / "predictions.jsonl")
        counts = {"rows": len(rows) + dropped, "scored": len(rows), "dropped": dropped}
        counts["from_an_earlier_run"] = len(lines)
        if len(lines) < len(rows):
            answer(task, rows, qa, model, lines)
        about = {"task": qa.task, **model.described(), "dataset": name}
        results = {**about, **score(task, lines), "counts": counts, "settings": settings}
        results |= {"seconds": round(time.time() - started, 2), "versions": versions()}
        write_json(folder / "results.json", results)
        making.finish()
    print(summary(results))


def read_rows(qa: QAArguments, task: Task, name: str) -> tuple[list[Row], int]:
    """The chosen rows that the task keeps, and the number of rows that it drops."""
    from downstream.data import questions, read_table

    hub_name, hub_config, hub_split = task.hub
    config = qa.dataset_config_name or (hub_config if name == hub_name else None)
    table = read_table(name, config, qa.eval_subset or hub_split)
    prompt_text, rows, dropped = read_prompt_file(qa.prompt_file, task), [], 0
    for number, content in questions(table, task.columns, qa.start, qa.max_eval_samples):
        if task.keep(content):
            rows.append(Row(number, content, task.prompts(content, prompt_text)))
        else:
            dropped += 1
    if not rows:
        raise InputError(f"--dataset_name {name}: no row is left to score; check --start and --max_eval_samples")
    return rows, dropped


def read_prompt_file(path: str | None, task: Task) -> str:
    """The text of `--prompt_file` without outer empty lines; "" for a task that needs none."""
    if task.prompt_file is None:
        return ""
    if path is None:
        raise InputError(f"--prompt_file: this task needs a text file with {task.prompt_file}")
    return Path(path).read_text(encoding="utf-8-sig").strip("\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of an earlier run's predictions. A line that was cut off is removed from the file."""
    content = path.read_bytes() if path.exists() else b""
    complete = content[: content.rfind(b"\n") + 1]
    if len(complete) < len(content):
        os.truncate(path, len(complete))
    return [json.loads(line) for line in complete.split(b"\n")[:-1]]


def answer(
    task: Task, rows: Sequence[Row], qa: QAArguments, model: ModelArguments, lines: list[dict[str, Any]]
) -> None:
    """Answer the rows that have no line yet; append their lines to `lines` and to predictions.jsonl, batch by batch."""
    from tqdm import tqdm

    from downstream.model import open_model
    from downstream.scoring import Evaluator
    from utils.files import finite, naming_full_disk

    evaluator = Evaluator(*open_model(model), qa.per_device_eval_batch_size, model.add_bos, qa.num_beams)
    encoded = []
    for row in rows:
        try:
            encoded.append([evaluator.sequences(prompt, task.max_new_tokens) for prompt in row.prompts])
        except ValueError as error:
            raise InputError(f"--dataset_name: row {row.number}: {error}; skip it with --start") from None
    size, path = qa.per_device_eval_batch_size, Path(qa.output_dir) / "predictions.jsonl"
    with (
        naming_full_disk(path),
        open(path, "a", encoding="utf-8") as file,
        tqdm(total=len(rows), initial=len(lines), desc=qa.task, unit="row", disable=None) as bar,
    ):
        for first in range(len(lines), len(rows), size):
            groups = [group for row in encoded[first : first + size] for group in row]  # sequences of each prompt
            if task.max_new_tokens:
                prompts = [group[0].ids for group in groups]
                outputs = iter(evaluator.continuations(prompts, task.max_new_tokens, task.stop))
            else:
                likelihoods = iter(evaluator.likelihoods([sequence for group in groups for sequence in group]))
                outputs = iter([[next(likelihoods) for _ in group] for group in groups])
            for row in rows[first : first + size]:
                lines.append(prediction(task, row, [next(outputs) for _ in row.prompts]))
                file.write(json.dumps(finite(lines[-1]), ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(rows[first : first + size]))


def prediction(task: Task, row: Row, outputs: Sequence[Any]) -> dict[str, Any]:
    """The line of `predictions.jsonl` for a row. Raises InputError where the model returns NaN."""
    if any(each.total != each.total for output in outputs if not isinstance(output, str) for each in output):
        raise InputError(f"row {row.number}: log-probability is NaN; use --torch_dtype float32 or bfloat16")
    scores, shown = task.measure(row.content, outputs)
    return {"row": row.number, "question": row.content["question"], **shown, "scores": scores}


def score(task: Task, lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean of each metric over the rows (from 0 to 1), and its standard error."""
    import numpy as np

    values = {name: np.array([line["scores"][name] for line in lines], dtype=np.float64) for name in task.metrics}
    errors = {name: each.std(ddof=1) / len(each) ** 0.5 if len(each) > 1 else 0.0 for name, each in values.items()}
    return {
        "metrics": {name: float(each.mean()) for name, each in values.items()},
        "standard_errors": {name: float(error) for name, error in errors.items()},
    }


def summary(results: Mapping[str, Any]) -> str:
    """The scores in one line, in percent."""
    which = "base" if results["memory"] is None else f"base + memory (lambda {lambda_text(results['lmbda'])})"
    scores = ", ".join(f"{name} {100 * value:.2f}%" for name, value in results["metrics"].items())
    return f"{results['task']}, {which}: {scores} ({results['counts']['scored']} rows, {results['seconds']:.1f} s)"


if __name__ == "__main__":
    command(main)()
