"""Every stage's speed and memory beside its limit, in one run: a table, results.json and a bar chart.

    python -m benchmarks.run                               all stages, about ten minutes on two quiet cores
    python -m benchmarks.run decoding start                some of them
    python -m benchmarks.run --page docs/performance.md    the page's table from the last run's results.json

Each figure and its limit are measured in one process, in turn, after a warm-up; ratios are medians over rounds. Each
stage has a process of its own: one that fails leaves the others their figures. Stages that were left out keep those
of the last run with the same setting.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from utils.cli import flag, parse
from utils.errors import InputError, check_positive, command, one_line

# The chain comes first: the other stages use its files.
STAGES = (
    "whole_chain",
    "embedding",
    "knn_targets",
    "target_batches",
    "training_step",
    "training_memory",
    "joint_evaluation",
    "first_token",
    "decoding",
    "start",
)


@dataclass
class BenchmarkArguments:
    """Where, how often, how large. The defaults are the setting of the targets."""

    output_dir: str = flag("results/benchmarks", "folder of results.json, targets.png and the stages' files (work/)")
    model: str | None = flag(None, "folder of the base model; default: SmolLM2-135M of utils.embedded_default")
    text: str | None = flag(None, "text file; default: the Wikipedia articles of utils.embedded_default")
    device: str = flag("cpu", "cpu or cuda")
    repeats: int = flag(3, "timed rounds, after one of warm-up")
    rows: int = flag(24575, "datastore rows; taken to a multiple of --block_size less one")
    block_size: int = flag(1024, "tokens of a window")
    stride: int = flag(512, "tokens from one window to the next")
    memory_layers: int = flag(8, "layers of the memory")
    k: int = flag(1024, "neighbours")
    ncentroids: int = flag(128, "inverted lists")
    probe: int = flag(16, "inverted lists searched")
    code_size: int = flag(64, "bytes of a compressed key")
    page: str | None = flag(None, "write the table of results.json into this page, and measure nothing")


@command
def main() -> None:
    """Entry point of `python -m benchmarks.run`."""
    chosen, flags = split_stages(sys.argv[1:])
    description = f"Measure stages beside their limits: [{' '.join(STAGES)}] (default: all)."
    (arguments,) = parse(BenchmarkArguments, description=description, arguments=flags)
    output = Path(arguments.output_dir)
    if arguments.page:
        from benchmarks.report import markdown, put_in_page
        from utils.files import read_json

        put_in_page(Path(arguments.page), lambda: markdown(read_json(output / "results.json")))
        return
    check(arguments)
    run(arguments, chosen, output)


def split_stages(words: list[str]) -> tuple[list[str], list[str]]:
    """(stages, flags) of a command line: the words before the first flag are stages."""
    count = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
    stages = words[:count]
    for name in stages:
        if name not in STAGES:
            raise InputError(f"{name}: no such stage; expected some of {', '.join(STAGES)}")
    return [name for name in STAGES if name in stages] or list(STAGES), words[count:]


def check(arguments: BenchmarkArguments) -> None:
    """Refuse what cannot be measured. Raises InputError."""
    for name in ("repeats", "rows", "block_size", "stride", "memory_layers", "k", "ncentroids", "probe", "code_size"):
        check_positive(f"--{name}", getattr(arguments, name))
    if arguments.device not in ("cpu", "cuda"):
        raise InputError(f"--device {arguments.device}: expected cpu or cuda")
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise InputError("--device cuda: torch sees no GPU here; leave the flag out")


def run(arguments: BenchmarkArguments, stages: list[str], output: Path) -> None:
    """Measure `stages` one by one, keeping results.json up to date."""
    from benchmarks.report import bar_chart, machine, read_rows, table
    from benchmarks.setting import make_setting, record
    from utils.files import ensure_folder, read_json, write_json

    ensure_folder(output)
    setting = make_setting(arguments, output)
    ensure_folder(setting.folder)
    setting_path = setting.folder / "setting.json"
    write_json(setting_path, asdict(setting))
    results_path = output / "results.json"
    results: dict[str, Any] = {"setting": record(setting), "rows": [], "failed": {}, "seconds": {}}
    before = read_json(results_path) if results_path.exists() else {}
    if before.get("setting") == results["setting"]:
        results |= {name: before[name] for name in ("rows", "failed", "seconds")}
    results["machine"] = machine(arguments.device)
    print(
        ", ".join(f"{name} {value}" for name, value in results["setting"].items())
        + f"\n{results['machine']['cpu']}, {results['machine']['threads']} threads\n",
        flush=True,
    )
    for stage in stages:
        started = time.perf_counter()
        found, problem = run_stage(setting, stage, setting_path)
        others = [row for row in results["rows"] if row["stage"] != stage]
        results["rows"] = sorted(others + found, key=lambda row: STAGES.index(row["stage"]))
        results["failed"] = {name: text for name, text in results["failed"].items() if name != stage}
        results["seconds"][stage] = round(time.perf_counter() - started, 1)
        if problem:
            results["failed"][stage] = problem
        write_json(results_path, results)
        print(f"{stage}: {'failed, ' + problem if problem else 'measured'}, {results['seconds'][stage]} s", flush=True)
    rows = read_rows(results)
    bar_chart(rows, output / "targets.png")
    print(f"\n{table(rows)}\n\n{results_path}, {output / 'targets.png'}", flush=True)
    failed = [stage for stage in stages if stage in results["failed"]]
    if failed:
        raise InputError(f"{', '.join(failed)}: could not be measured (the reason is in {results_path})")


def run_stage(setting: Any, stage: str, setting_path: Path) -> tuple[list[dict[str, Any]], str]:
    """(rows, problem) of one stage, measured in a process of its own; one of the two is empty."""
    from benchmarks.setting import ROOT

    rows_path = setting.folder / f"{stage}.rows.json"
    rows_path.unlink(missing_ok=True)
    words = [sys.executable, "-m", "benchmarks.one", stage, str(setting_path), str(rows_path.resolve())]
    done = subprocess.run(
        words, cwd=ROOT, env=setting.environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode or not rows_path.exists():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return [], one_line(lines[-1] if lines else f"exit status {done.returncode}", 400)
    return json.loads(rows_path.read_text()), ""


if __name__ == "__main__":
    main()
