"""Time and memory of every stage against the number of tokens, and generation speed against the corpus: two plots.

    python -m benchmarks.scaling --sizes 10000 30000 100000

Each stage is the project's command in a process of its own, imports included; the training is one epoch. Generation:
milliseconds a token of the base with a memory, and of the base with a kNN-LM over the datastore of that size, a token of
each in turn. Stages of sizes that were measured before with the same setting are not measured again.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.setting import STEPS, BenchmarkArguments, Setting
from utils.cli import command, flag, parse
from utils.errors import InputError
from utils.files import ensure_folder, read_json, write_json

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
    arguments.check()
    if not arguments.sizes or min(arguments.sizes) < 1:
        raise InputError("--sizes: expected one or several numbers above 0")
    output = ensure_folder(arguments.output_dir)
    path, plot_path = output / "scaling.json", output / "scaling.png"
    results = read_json(path) if path.exists() else {}
    settings = [Setting.of(dataclasses.replace(arguments, rows=size)) for size in sorted(set(arguments.sizes))]
    chosen = []
    for setting in settings:
        identity = {name: value for name, value in setting.record().items() if name != "repeats"}
        result = results.get(str(setting.rows), {})
        if result.get("setting") != identity:
            result = {"setting": identity, "rows": setting.rows, "stages": measure_stages(setting)}
            results[str(setting.rows)] = result
            write_json(path, results)
        chosen.append(result)
        stages = result["stages"].items()
        tell(
            result,
            [f"{NAMES[step]} {each['seconds']:.1f} s {each['peak_bytes'] / 1e9:.2f} GB" for step, each in stages],
        )
    for result, found in zip(chosen, generation(settings), strict=True):
        result["milliseconds_a_token"] = found
        tell(result, [f"{name} {value:.1f} ms a token" for name, value in found.items()])
    write_json(path, results)
    plot(chosen, plot_path)
    print(f"{path}, {plot_path}")


def tell(result: dict[str, Any], figures: list[str]) -> None:
    print(f"{result['rows']:,} rows: {', '.join(figures)}", flush=True)


def measure_stages(setting: Setting) -> dict[str, dict[str, float]]:
    """Seconds and peak anonymous memory of each stage."""
    setting.windows()
    folder = setting.chain_folder()
    shutil.rmtree(folder, ignore_errors=True)
    changes = {"train": {"num_train_epochs": 1}, "joint": {"knn_generator_path": folder / "memory" / "epoch_1"}}
    return {step: setting.watched(*setting.step(step, **changes.get(step, {}))) for step in STEPS}


def generation(settings: list[Setting]) -> list[dict[str, float]]:
    """Milliseconds a token for each size: base alone, with memory, with kNN-LM; one token of each in turn."""
    from benchmarks.inference import in_turn, joint_model, prompt
    from knn_utils.knn_lm import KNNLM

    base = settings[0].base()
    ids = prompt(settings[0], 32)
    models = {"base": (base, ids), "memory": (joint_model(settings[0], base), ids)}

    def with_neighbours(near: Any, **given: Any) -> Any:
        with near.on(base):
            return base(**given)

    for setting in settings:
        options = {"k": min(setting.k, setting.rows), "probe": setting.probe, "lmbda": 0.25, "knn_temp": 16.0}
        near = KNNLM(setting.chain_folder() / "train.index", setting.datastore(), **options)
        models[setting.rows] = (functools.partial(with_neighbours, near), ids)
    rounds = [in_turn(models, TOKENS, settings[0].device) for _ in range(settings[0].repeats)]
    found = {name: 1000 * median(median(seconds[name]) for seconds in rounds) for name in models}
    return [{"base": found["base"], "memory": found["memory"], "kNN-LM": found[setting.rows]} for setting in settings]


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
        axes.set(title=title, xlabel="datastore rows", ylabel=label, xscale="log")
        axes.set_xticks(rows, [f"{count:,}" for count in rows])
        axes.minorticks_off()
        if axes is time_axes:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.legend(fontsize=7)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
