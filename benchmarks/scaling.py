"""Time and memory of every stage against the number of tokens, and generation speed against the corpus: two plots.

    python -m benchmarks.scaling --sizes 10000 30000 100000

Each stage is the project's command in a process of its own, imports included; the training is one epoch. Generation:
milliseconds a token of the base with a memory, and of the base with a kNN-LM over the datastore of that size, a token of
each in turn. Stages of sizes that were measured before with the same setting are not measured again.
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.run import BenchmarkArguments
from benchmarks.run import check as check_setting
from utils.cli import flag, parse
from utils.errors import InputError, command

NAMES = {"embed": "embedding", "index": "index", "targets": "kNN targets", "train": "training", "joint": "evaluation"}
TOKENS = 32


@dataclass
class ScalingArguments(BenchmarkArguments):
    """The benchmarks' flags; --rows is taken from --sizes."""

    output_dir: str = flag("results/scaling", "folder of scaling.json, scaling.png and the stages' files (work/)")
    sizes: list[int] = flag([10_000, 30_000, 100_000], "datastore rows")
    stride: int = flag(1024, "tokens from one window to the next")
    repeats: int = flag(5, "timed rounds of generation")


@command
def main() -> None:
    """Entry point of `python -m benchmarks.scaling`."""
    (arguments,) = parse(ScalingArguments, description="Time and memory of every stage against tokens.")
    check_setting(arguments)
    if not arguments.sizes or min(arguments.sizes) < 1:
        raise InputError("--sizes: expected one or several numbers above 0")
    from utils.files import ensure_folder, read_json, write_json

    output = ensure_folder(arguments.output_dir)
    results_path = output / "scaling.json"
    results = read_json(results_path) if results_path.exists() else {}
    sizes = sorted(set(arguments.sizes))
    for size in sizes:
        identity = identity_of(arguments, size)
        if results.get(str(size), {}).get("setting") != identity:
            results[str(size)] = {"setting": identity, **measure_size(arguments, size, output)}
            write_json(results_path, results)
        print(line_of(results[str(size)]), flush=True)
    chosen = [results[str(size)] for size in sizes]
    tokens = generation([setting_of(arguments, size, output) for size in sizes])
    for result, found in zip(chosen, tokens, strict=True):
        result["milliseconds_a_token"] = found
        listed = ", ".join(f"{name} {value:.1f}" for name, value in found.items())
        print(f"{result['rows']:,} rows: milliseconds a token: {listed}", flush=True)
    write_json(results_path, results)
    plot(chosen, output / "scaling.png")
    print(f"{results_path}, {output / 'scaling.png'}")


def setting_of(arguments: ScalingArguments, size: int, output: Path) -> Any:
    from benchmarks.setting import make_setting

    return make_setting(dataclasses.replace(arguments, rows=size), output)


def identity_of(arguments: ScalingArguments, size: int) -> dict[str, Any]:
    """What a size's figures depend on, without paths."""
    left_out = ("output_dir", "sizes", "rows", "page", "model", "text", "repeats")
    values = {name: value for name, value in vars(arguments).items() if name not in left_out}
    return values | {"size": size, "model": Path(arguments.model).name if arguments.model else None}


def measure_size(arguments: ScalingArguments, size: int, output: Path) -> dict[str, Any]:
    """Seconds and peak anonymous memory of each stage at `size` rows."""
    from benchmarks.setting import STEPS
    from utils.files import ensure_folder

    setting = setting_of(arguments, size, output)
    ensure_folder(setting.folder)
    windows = setting.windows()
    shutil.rmtree(setting.chain_folder(), ignore_errors=True)
    stages = {}
    for step in STEPS:
        module, *flags = setting.step_command(step)
        flags = [word.replace("epoch_2", "epoch_1") for word in flags]
        if step == "train":
            flags[flags.index("--num_train_epochs") + 1] = "1"
        found = setting.watched(module, *flags)
        stages[step] = {"seconds": found["seconds"], "peak_bytes": found["peak_bytes"]}
        (setting.chain_folder() / f"{step}.done").touch()
    return {
        "rows": setting.rows,
        "tokens": len(windows) * setting.block_size,
        "stages": stages,
    }


def generation(settings: list[Any]) -> list[dict[str, float]]:
    """Milliseconds a token for each size: base alone, with memory, with kNN-LM; one token of each in turn."""
    from benchmarks.generating import in_turn, joint_model, prompt
    from benchmarks.measure import median
    from knn_utils.knn_lm import KNNLM

    base = settings[0].base()
    ids = prompt(settings[0], 32)
    models = {"base": (base, ids), "memory": (joint_model(settings[0], base), ids)}
    for setting in settings:
        options = {"k": min(setting.k, setting.rows), "probe": setting.probe, "lmbda": 0.25, "knn_temp": 16.0}
        near = KNNLM(setting.index_path, setting.dstore_path, **options)
        models[setting.rows] = (_with(near, base), ids)
    rounds = [in_turn(models, TOKENS, settings[0].device) for _ in range(settings[0].repeats)]
    found = {name: 1000 * median([median(seconds[name]) for seconds in rounds]) for name in models}
    return [{"base": found["base"], "memory": found["memory"], "kNN-LM": found[setting.rows]} for setting in settings]


def _with(neighbours: Any, base: Any) -> Any:
    """The base as a kNN-LM, for one call at a time."""

    def call(**given: Any) -> Any:
        with neighbours.on(base):
            return base(**given)

    return call


def line_of(result: dict[str, Any]) -> str:
    stages = ", ".join(
        f"{NAMES[step]} {figures['seconds']:.1f} s {figures['peak_bytes'] / 1e9:.2f} GB"
        for step, figures in result["stages"].items()
    )
    return f"{result['rows']:,} rows: {stages}"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Time, memory and generation against datastore rows."""
    from utils.plots import figure_of, save_figure

    figure, (time_axes, memory_axes, token_axes) = figure_of(3)
    rows = [result["rows"] for result in results]
    for step, name in NAMES.items():
        stages = [result["stages"][step] for result in results]
        time_axes.plot(rows, [stage["seconds"] for stage in stages], "o-", label=name)
        memory_axes.plot(rows, [stage["peak_bytes"] / 1e9 for stage in stages], "o-", label=name)
    for name in results[0]["milliseconds_a_token"]:
        token_axes.plot(rows, [result["milliseconds_a_token"][name] for result in results], "o-", label=name)
    for axes, title, label in (
        (time_axes, "time of each stage", "seconds, imports included"),
        (memory_axes, "memory of each stage", "peak anonymous memory, GB"),
        (token_axes, "generation", "milliseconds a token"),
    ):
        axes.set_xscale("log")
        axes.set_xticks(rows, [f"{count:,}" for count in rows])
        axes.minorticks_off()
        axes.set_xlabel("datastore rows")
        axes.set_ylabel(label)
        axes.set_title(title)
        if axes is time_axes:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.legend(fontsize=7)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
