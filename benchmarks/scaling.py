"""Time and memory of every stage by the number of tokens, and generation speed by the size of the corpus: two plots.

    python -m benchmarks.scaling --sizes 10000 30000 100000

Each stage is the project's command in its own process; training is one epoch. Generation: the base alone, with a memory,
and with a kNN-LM, one token each in turn. Sizes that were measured before with the same setting are skipped.
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.setting import STEPS, BenchmarkArguments, Setting
from utils.cli import command, flag, parse
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


def main() -> None:
    (arguments,) = parse(ScalingArguments, description="Time and memory of every stage by the number of tokens.")
    output = ensure_folder(arguments.output_dir)
    path, chosen = output / "scaling.json", []
    results = read_json(path) if path.exists() else {}
    for size in sorted(arguments.sizes):
        setting = Setting.of(dataclasses.replace(arguments, rows=size))
        result = results.get(str(setting.rows))
        if result is None or result["setting"] != setting.record():
            result = {"setting": setting.record(), "rows": setting.rows, "stages": measure_stages(setting)}
            result["milliseconds_per_token"] = generation(setting)
            results[str(setting.rows)] = result
            write_json(path, results)
        chosen.append(result)
        figures = [
            f"{NAMES[step]} {each['seconds']:.1f} s {each['peak_bytes'] / 1e9:.2f} GB"
            for step, each in result["stages"].items()
        ]
        figures += [f"{name} {value:.1f} ms per token" for name, value in result["milliseconds_per_token"].items()]
        print(f"{result['rows']:,} rows: {', '.join(figures)}", flush=True)
    plot(chosen, output / "scaling.png")
    print(f"{path}, {output / 'scaling.png'}")


def measure_stages(setting: Setting) -> dict[str, dict[str, float]]:
    """Seconds and peak anonymous memory of each stage."""
    setting.windows()
    folder = setting.chain_folder()
    shutil.rmtree(folder, ignore_errors=True)
    changes = {"train": {"num_train_epochs": 1}, "joint": {"knn_generator_path": folder / "memory" / "epoch_1"}}
    return {step: setting.watched(*setting.step(step, **changes.get(step, {}))) for step in STEPS}


def generation(setting: Setting) -> dict[str, float]:
    """Milliseconds per token of the base alone, with memory and with kNN-LM."""
    from benchmarks.inference import in_turn, joint_model, prompt
    from knn_utils.knn_lm import KNNLM

    base, ids = setting.base(), prompt(setting, 32)
    options = {"k": min(setting.k, setting.rows), "probe": setting.probe, "lmbda": 0.25, "knn_temp": 16.0}
    near = KNNLM(setting.chain_folder() / "train.index", setting.datastore(), **options)

    def with_neighbors(**given: Any) -> Any:
        with near.on(base):
            return base(**given)

    models = {"base": (base, ids), "memory": (joint_model(setting, base), ids), "kNN-LM": (with_neighbors, ids)}
    rounds = [in_turn(models, TOKENS, setting.device) for _ in range(setting.repeats)]
    return {name: 1000 * median(median(seconds[name]) for seconds in rounds) for name in models}


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Time, memory and generation against datastore rows."""
    from utils.plots import figure_of, save_figure

    figure, (time_axes, memory_axes, token_axes) = figure_of(3)
    rows = [result["rows"] for result in results]
    for step, name in NAMES.items():
        stages = [result["stages"][step] for result in results]
        time_axes.plot(rows, [stage["seconds"] for stage in stages], "o-", label=name)
        memory_axes.plot(rows, [stage["peak_bytes"] / 1e9 for stage in stages], "o-", label=name)
    for name in results[0]["milliseconds_per_token"]:
        token_axes.plot(rows, [result["milliseconds_per_token"][name] for result in results], "o-", label=name)
    for axes, title, label in (
        (time_axes, "time of each stage", "seconds, imports included"),
        (memory_axes, "memory of each stage", "peak anonymous memory, GB"),
        (token_axes, "generation", "milliseconds per token"),
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
    command(main)()
