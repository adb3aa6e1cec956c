"""Every stage's speed and memory beside its limit, in one run: a table, results.json and a bar chart.

    python -m benchmarks.run                               all stages, about fifteen minutes on two quiet cores
    python -m benchmarks.run decoding start                some of them
    python -m benchmarks.run --page docs/performance.md    the page's table from the last run's results.json
    python -m benchmarks.run --page docs/performance.md --before OLD/results.json    beside an earlier run's figures

Each figure and its limit are measured in one process, in turn, after a warm-up; ratios are medians over rounds. Each
stage has a process of its own: one that fails leaves the others their figures. Stages that were left out keep those
of the last run with the same setting.
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

# Each stage is a function of its name in this module. The chain comes first: the other stages use its files.
STAGES = {
    "whole_chain": "commands",
    "embedding": "data",
    "knn_targets": "data",
    "target_batches": "data",
    "training_step": "training_step",
    "training_memory": "commands",
    "joint_evaluation": "inference",
    "first_token": "inference",
    "decoding": "inference",
    "gate": "inference",
    "start": "commands",
}


@dataclass
class RunArguments(BenchmarkArguments):
    """The setting, or a page to write."""

    page: str | None = flag(None, "write the table of results.json into this page, and measure nothing")
    before: str | None = flag(
        None, "with --page: results.json of an earlier run, whose figures stand beside the last one's"
    )


@command
def main() -> None:
    """Entry point of `python -m benchmarks.run`."""
    chosen, flags = split_stages(sys.argv[1:])
    description = f"Measure stages beside their limits: [{' '.join(STAGES)}] (default: all)."
    (arguments,) = parse(RunArguments, description=description, arguments=flags)
    output = Path(arguments.output_dir)
    if arguments.page:
        from benchmarks.page import markdown, put_in_page

        before = read_json(arguments.before) if arguments.before else None
        put_in_page(Path(arguments.page), lambda: markdown(read_json(output / "results.json"), before))
        return
    arguments.check()
    run(Setting.of(arguments), chosen, ensure_folder(output))


def split_stages(words: list[str]) -> tuple[list[str], list[str]]:
    """(stages, flags) of a command line: the words before the first flag are stages."""
    count = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
    stages = words[:count]
    for name in stages:
        if name not in STAGES:
            raise InputError(f"{name}: no such stage; expected some of {', '.join(STAGES)}")
    return [name for name in STAGES if name in stages] or list(STAGES), words[count:]


def run(setting: Setting, stages: list[str], output: Path) -> None:
    """Measure `stages` one by one, keeping results.json up to date."""
    from benchmarks.page import bar_chart, machine, markdown, read_rows, setting_line

    setting_path = ensure_folder(setting.folder) / "setting.json"
    write_json(setting_path, vars(setting))
    results_path = output / "results.json"
    results: dict[str, Any] = {"setting": setting.record(), "rows": [], "failed": {}, "seconds": {}}
    last = read_json(results_path) if results_path.exists() else {}
    if last.get("setting") == results["setting"]:
        results |= {name: last[name] for name in ("rows", "failed", "seconds")}
    results["machine"] = machine(setting.device)
    print(f"{setting_line(results)}\n", flush=True)
    for stage in stages:
        started, found, problem = time.perf_counter(), [], ""
        rows = setting.folder / f"{stage}.rows.json"
        try:
            setting.run("-c", "from benchmarks import run; run.measure_one()", stage, setting_path, rows)
            found = read_json(rows)
        except InputError as error:
            problem = str(error)
        others = [row for row in results["rows"] if row["stage"] != stage]
        results["rows"] = sorted(others + found, key=lambda row: [*STAGES].index(row["stage"]))
        results["failed"].pop(stage, None)
        results["failed"] |= {stage: problem} if problem else {}
        results["seconds"][stage] = round(time.perf_counter() - started, 1)
        write_json(results_path, results)
        print(f"{stage}: {'failed, ' + problem if problem else 'measured'}, {results['seconds'][stage]} s", flush=True)
    bar_chart(read_rows(results), output / "targets.png")
    print(f"\n{markdown(results)}\n\n{results_path}, {output / 'targets.png'}", flush=True)
    failed = [stage for stage in stages if stage in results["failed"]]
    if failed:
        raise InputError(f"{', '.join(failed)}: could not be measured (the reason is in {results_path})")


@command
def measure_one() -> None:
    """A stage in a process of its own (STAGE SETTING.json ROWS.json): write its rows, at the setting in a file."""
    from utils.loading import prepare_device

    # As every command does: the stage and the bare operation it is compared with gain alike.
    prepare_device()
    stage, setting, rows = sys.argv[1:]
    measure = getattr(importlib.import_module(f"benchmarks.{STAGES[stage]}"), stage)
    write_json(rows, [vars(row) | {"stage": stage} for row in measure(Setting(**read_json(setting)))])


if __name__ == "__main__":
    main()
