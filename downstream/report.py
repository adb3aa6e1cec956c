"""The quickstart's last page: one table, one plot, results.json, from the results of the stages before.

    python -m downstream.report --work DIR --output_dir DIR

Reads what the stages wrote, measures nothing itself.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.cli import command, flag, parse, required
from utils.results import ADAPTIVE, lambda_text


@dataclass
class ReportArguments:
    """Where the stages' results are, and where the report goes."""

    work: str = required("folder with a results folder of each stage")
    output_dir: str = flag("results/quickstart", "folder of results.json, report.md and report.png")
    seconds: float = flag(0.0, "seconds that the whole run took so far")


def main() -> None:
    (arguments,) = parse(ReportArguments, description=__doc__.split("\n")[0])
    from utils.files import atomic, ensure_folder, read_json, write_json
    from utils.plots import draw_training, figure_of, save_figure
    from utils.results import versions

    work, output = Path(arguments.work), ensure_folder(arguments.output_dir)
    stages = ("knnlm_validation", "knnlm_test", "joint_validation", "joint_test", "recall")
    knn_validation, knn, joint_validation, joint, recall = (read_json(work / name / "results.json") for name in stages)
    training = read_json(work / "memory" / "training.json")
    summary = read_json(work / "windows" / "dstore_summary.json")
    untuned = work / "untuned" / "results.json"  # there where the base was fine-tuned first
    results = {
        **perplexities(joint, knn),
        **({"untuned_ppl": read_json(untuned)["perplexity"]} if untuned.exists() else {}),
        **memory_setting(joint),
        "knnlm_lambda": knn["lmbda"],
        "knnlm_temp": knn["knn_temp"],
        "validation": perplexities(joint_validation, knn_validation),
        "test_tokens": joint["tokens"],
        "train_tokens": summary["train"]["dstore_size"],
        "recall_base": recall["recall_base"],
        "recall_memory": recall["recall_memory"],
        "recall_first_base": recall.get("recall_first_base"),  # not in the results of an older run
        "recall_first_memory": recall.get("recall_first_memory"),
        **{name: recall[name] for name in ("recall_one_lambda", "recall_first_one_lambda") if name in recall},
        **known_text(work),
        "recall_cases": recall["cases"],
        "recall_standard_error": recall["standard_error_difference"],
        "recall_rule": recall["rule"],
        "examples": recall["examples"],
        "training": {**training["settings"], "seconds": training["training_seconds"]},
        "seconds": round(arguments.seconds, 1),
        "machine": machine(),
        "versions": versions(),
    }
    text = table(results)
    print(text)
    with atomic(output / "report.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    figure, axes = figure_of(2)
    draw_training(axes[0], training["log"])
    grids = {"base + memory": joint_validation["grid"], "kNN-LM": knn_validation["grid"]}
    draw_lambda(axes[1], grids, joint_validation["base_perplexity"], joint_validation["lmbda"])
    save_figure(figure, output / "report.png")
    write_json(output / "results.json", results)
    print(f"\n{output / 'results.json'}, {output / 'report.md'}, {output / 'report.png'}")


def perplexities(joint: dict[str, Any], knn: dict[str, Any]) -> dict[str, float]:
    """Those of base, kNN-LM and base + memory in the results.json of a split's two evaluations.

    Where lambda differed from token to token, the kNN-LM's is `knnlm_adaptive_ppl`; the memory's is `memory_ppl`, and
    `memory_one_lambda_ppl` what the best number came to.
    """
    found = {"base_ppl": joint["base_perplexity"], "knnlm_ppl": knn["perplexity"], "memory_ppl": joint["perplexity"]}
    if "adaptive" in knn:
        found["knnlm_adaptive_ppl"] = knn["adaptive"]["perplexity"]
    if "adaptive" in joint:
        found |= {"memory_ppl": joint["adaptive"]["perplexity"], "memory_one_lambda_ppl": joint["perplexity"]}
    return found


def memory_setting(joint: dict[str, Any]) -> dict[str, Any]:
    """Lambda and temperature of `memory_ppl`, and the number beside an adaptive lambda."""
    if "adaptive" not in joint:
        return {"lambda": joint["lmbda"], "knn_temp": joint["knn_temp"]}
    one = {"one_lambda": joint["lmbda"], "one_lambda_temp": joint["knn_temp"]}
    return {"lambda": ADAPTIVE, "knn_temp": joint["adaptive"]["knn_temp"], **one}


def known_text(work: Path) -> dict[str, float]:
    """Perplexity of base and mixture on trained text in other windows, as the gate's training measured it, if there."""
    from models.gate import SETTINGS
    from utils.files import read_json

    gates = sorted((work / "memory").glob(f"epoch_*/{SETTINGS}"), key=lambda path: path.stat().st_mtime)
    known = read_json(gates[-1])["perplexity"]["known"] if gates else {}
    return {f"known_{name}_ppl": known[key] for name, key in (("base", "base"), ("memory", "mixture")) if known}


def machine() -> str:
    """What the figures were measured on, without names of hosts."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), "CPU")
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{os.cpu_count()} cores of {model}{gpu}"


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    untuned = results.get("untuned_ppl")
    base, name = results["base_ppl"], "base" if untuned is None else "fine-tuned"
    knn = f"lambda {lambda_text(results['knnlm_lambda'])}, temperature {results['knnlm_temp']:g}"
    rows = [
        ("base", untuned, ""),
        (name, base, ""),
        (f"{name} + kNN-LM", results["knnlm_ppl"], knn),
        (f"{name} + kNN-LM, adaptive", results.get("knnlm_adaptive_ppl"), "lambda by the nearest neighbour's distance"),
        *memory_rows(f"{name} + MLP memory", results),
    ]
    lines = [
        f"| {model} | {value:.2f} | {'' if model == name else f'{100 * (value / base - 1):+.1f}%'} | {chosen} |"
        for model, value, chosen in rows
        if value is not None
    ]
    return f"""
Perplexity on {results["test_tokens"]} tokens of test articles that nothing was trained on; lambda and temperature were \
chosen on the validation articles.

| model | perplexity | against {"the base" if untuned is None else "fine-tuned"} | chosen |
| --- | --- | --- | --- |
{chr(10).join(lines)}

{recall_line(results)}
Rule: {results["recall_rule"]}.

Trained on {results["train_tokens"]} tokens; {results["seconds"]:.0f} s in all on {results["machine"]}."""


def memory_rows(name: str, results: dict[str, Any]) -> list[tuple[str, float, str]]:
    """The table's rows of the memory: with one lambda, and by token where it has a gate."""

    def one(lmbda: str, knn_temp: str) -> str:
        return f"lambda {lambda_text(results[lmbda])}, temperature {results[knn_temp]:g}"

    if results["lambda"] != ADAPTIVE:
        return [(name, results["memory_ppl"], one("lambda", "knn_temp"))]
    return [
        (name, results["memory_one_lambda_ppl"], one("one_lambda", "one_lambda_temp")),
        (f"{name}, adaptive", results["memory_ppl"], "lambda by token"),
    ]


def recall_line(results: dict[str, Any]) -> str:
    """What was remembered, in a sentence."""
    if not results["recall_cases"]:
        return "No trained article fits the rule for facts to complete."
    gain = (results["recall_memory"] - results["recall_base"]) / max(results["recall_standard_error"], 1e-9)
    first = results["recall_first_base"], results["recall_first_memory"]
    return (
        f"Facts of the trained articles completed ({results['recall_cases']} cases): base "
        f"{results['recall_base']:.1%}, base + memory {results['recall_memory']:.1%} ({gain:.1f} standard errors apart)"
        + ("." if None in first else f"; by the first token {first[0]:.1%} and {first[1]:.1%}.")
        + (f" With one lambda {results['recall_one_lambda']:.1%}." if "recall_one_lambda" in results else "")
        + known_line(results)
    )


def known_line(results: dict[str, Any]) -> str:
    """Perplexity of trained text in other windows, in a sentence."""
    if "known_memory_ppl" not in results:
        return ""
    return (
        f"\nThe trained articles' text in other windows: base {results['known_base_ppl']:.2f}, "
        f"base + memory {results['known_memory_ppl']:.2f}."
    )


def draw_lambda(axes: Any, grids: dict[str, list[dict[str, float]]], base: float, chosen: float) -> None:
    """Perplexity against lambda, each mixture at its best temperature for each lambda, and the base alone.

    What is much worse than the base leaves the picture, so that the gains fill it.
    """
    lowest = base
    for name, grid in grids.items():
        values = sorted({row["lmbda"] for row in grid})
        best = [min(row["perplexity"] for row in grid if row["lmbda"] == value) for value in values]
        axes.plot(values, best, "o-", label=name)
        lowest = min(lowest, *best)
    axes.axhline(base, color="black", linewidth=1, label="base")
    axes.axvline(chosen, color="grey", linestyle=":", label="chosen")
    axes.set_ylim(lowest - 0.3 * (base - lowest), base + 0.8 * max(base - lowest, 0.05 * base))
    axes.set_xlabel("lambda")
    axes.set_ylabel("perplexity")
    axes.set_title("validation articles")
    axes.legend()


if __name__ == "__main__":
    command(main)()
