"""What is paid before any work: `--help` of every command, and each stage of the chain with nothing left to do."""

from __future__ import annotations

from benchmarks.measure import Row, median
from benchmarks.setting import ROOT, STEPS, Setting
from utils.errors import InputError

STAGE = "start"
PACKAGES = (".", "utils", "knn_utils", "downstream", "demo", "benchmarks")
# Not commands for people: they run what another command hands them.
INNER = ("benchmarks.one", "benchmarks.memory")
IMPORTS = (
    "import torch, datasets, transformers.modeling_utils; from transformers import AutoModelForCausalLM, AutoTokenizer"
)


def measure(setting: Setting) -> list[Row]:
    seconds, silent = {}, []
    for name in commands():
        try:
            seconds[name] = setting.run("-m", name, "--help")
        except InputError:
            # For example the demo where the package it stands on is not installed.
            silent.append(name)
    slowest = max(seconds, key=lambda name: seconds[name])
    again = [seconds[slowest], *(setting.run("-m", slowest, "--help") for _ in range(setting.repeats - 1))]
    detail = f"the slowest of {len(seconds)} commands, {slowest}; their median {median(list(seconds.values())):.2f} s"
    detail += f"; no help from {', '.join(silent)}" if silent else ""
    rows = [Row(STAGE, "--help of any command", median(again), "<=", 3.0, "s", detail)]

    setting.prepare("targets")
    fixed = {step: fixed_cost(setting, step) for step in STEPS[:3]} | trained_cost(setting)
    bare = median([setting.run("-c", IMPORTS) for _ in range(setting.repeats)])
    detail = ", ".join(f"{name} {value:.1f} s" for name, value in fixed.items())
    detail += f"; the imports of torch, transformers' models and datasets alone {bare:.1f} s"
    rows.append(Row(STAGE, "fixed cost of a stage", max(fixed.values()), "<=", 5.0, "s", detail))
    return rows


def commands() -> list[str]:
    """Modules with a `main` that take flags."""
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).glob("*.py")):
            lines = path.read_text(encoding="utf-8").splitlines()
            name = path.stem if package == "." else f"{package}.{path.stem}"
            if 'if __name__ == "__main__":' in lines and name not in INNER:
                found.append(name)
    return found


def fixed_cost(setting: Setting, step: str) -> float:
    """Seconds of a stage whose output is complete: imports, opening and checking files."""
    return median([setting.run_step(step) for _ in range(min(setting.repeats, 2))])


def trained_cost(setting: Setting) -> dict[str, float]:
    """The same of training (a finished run of one step) and of joint evaluation (two windows less the second)."""
    output = setting.folder / "one_step"
    train = [*setting.step_command("train"), "--max_train_steps", "1"]
    train[train.index("--output_dir") + 1] = str(output)
    setting.run("-m", *train)
    joint = [*setting.step_command("joint"), "--max_eval_samples", "1"]
    joint[joint.index("--knn_generator_path") + 1] = str(output / "epoch_1")
    seconds = {}
    for count in (1, 2):
        joint[joint.index("--max_eval_samples") + 1] = str(count)
        seconds[count] = median([setting.run("-m", *joint) for _ in range(setting.repeats)])
    trained = median([setting.run("-m", *train) for _ in range(min(setting.repeats, 2))])
    return {"train": trained, "joint": 2 * seconds[1] - seconds[2]}
