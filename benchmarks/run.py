"""Speed and memory of every stage, compared with their targets: a table, results.json and a bar chart.

    python -m benchmarks.run                               all stages, about fifteen minutes on two idle cores
    python -m benchmarks.run decoding start                some of them
    python -m benchmarks.run --page docs/performance.md    write the table of the last run's results.json into a page
    python -m benchmarks.run --page docs/performance.md --before OLD/results.json    with an earlier run's figures

A stage and the operation that it is compared with run in turn in one process; ratios are medians over rounds. Each stage
has its own process. Stages that are not run keep their figures from the last run with the same setting.
"""

from __future__ import annotations

import importlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.setting import BenchmarkArguments, Setting
from utils.cli import command, flag, parse
from utils.errors import InputError
from utils.files import ensure_folder, read_json, write_json

# Each stage is a function in a module. The chain comes first: the other stages use its files.
STAGES = {
    "whole_chain": "commands",
    "embedding": "data",
    "knn_targets": "data",
    "training_step": "training_step",
    "sampled_vocabulary": "training_step",
    "training_memory": "commands",
    "joint_evaluation": "inference",
    "first_token": "inference",
    "decoding": "inference",
    "tied_decoding": "inference",
    "gate": "inference",
    "start": "commands",
}


@dataclass
class RunArguments(BenchmarkArguments):
    """The setting, or a page to write."""

    page: str | None = flag(None, "write the table of results.json into this page; measure nothing")
    before: str | None = flag(None, "with --page: results.json of an earlier run, shown for comparison")


def main() -> None:
    count = next((place for place, word in enumerate(sys.argv[1:]) if word.startswith("-")), len(sys.argv) - 1)
    chosen, flags = sys.argv[1 : 1 + count], sys.argv[1 + count :]
    for name in chosen:
        if name not in STAGES:
            raise InputError(f"{name}: no such stage; expected some of {', '.join(STAGES)}")
    description = f"Measure stages and compare them with their targets: [{' '.join(STAGES)}] (default: all)."
    (arguments,) = parse(RunArguments, description=description, arguments=flags)
    output = Path(arguments.output_dir)
    if arguments.page:
        from benchmarks.page import markdown, put_in_page

        before = read_json(arguments.before) if arguments.before else None
        put_in_page(Path(arguments.page), lambda: markdown(read_json(output / "results.json"), before))
        return
    run(Setting.of(arguments), [name for name in STAGES if name in chosen] or list(STAGES), ensure_folder(output))


def run(setting: Setting, stages: list[str], output: Path) -> None:
    """Measure `stages` one by one; results.json is written after each."""
    from benchmarks.page import bar_chart, machine, markdown, read_rows, setting_line

    setting_path = ensure_folder(setting.folder) / "setting.json"
    write_json(setting_path, vars(setting))
    results_path = output / "results.json"
    results: dict[str, Any] = {"setting": setting.record(), "rows": [], "failed": {}, "seconds": {}}
    last = read_json(results_path) if results_path.exists() else {}
    if last.get("setting") == results["setting"]:
        results = last
    results["machine"] = machine(setting.device)
    print(f"{setting_line(results)}\n", flush=True)
    for stage in stages:
        started, rows = time.perf_counter(), setting.folder / f"{stage}.rows.json"
        results["rows"] = [row for row in results["rows"] if row["stage"] != stage]
        results["failed"].pop(stage, None)
        try:
            setting.run("-c", "from benchmarks import run; run.measure_one()", stage, setting_path, rows)
            results["rows"] += read_json(rows)
        except InputError as error:
            results["failed"][stage] = str(error)
        results["rows"].sort(key=lambda row: [*STAGES].index(row["stage"]))
        results["seconds"][stage] = round(time.perf_counter() - started, 1)
        write_json(results_path, results)
        print(f"{stage}: {results['failed'].get(stage, 'measured')}, {results['seconds'][stage]} s", flush=True)
    bar_chart(read_rows(results), output / "targets.png")
    print(f"\n{markdown(results)}\n\n{results_path}, {output / 'targets.png'}", flush=True)
    if failed := [stage for stage in stages if stage in results["failed"]]:
        raise InputError(f"{', '.join(failed)}: could not be measured, see {results_path}")


@command
def measure_one() -> None:
    """Measure a stage in its own process and write its rows (arguments: STAGE SETTING.json ROWS.json)."""
    from utils.loading import prepare_device

    prepare_device()  # as every command does
    stage, setting, rows = sys.argv[1:]
    measure = getattr(importlib.import_module(f"benchmarks.{STAGES[stage]}"), stage)
    write_json(rows, [vars(row) | {"stage": stage} for row in measure(Setting(**read_json(setting)))])


if __name__ == "__main__":
    command(main)()
