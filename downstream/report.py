"""Tables and plots from the results of earlier stages:

    python -m downstream.report quickstart --work DIR --output_dir DIR
    python -m downstream.report remember --work DIR --memory DIR --output_dir DIR
    python -m downstream.report ablation --setting alpha --runs DIR --values 0 0.5 1 --output_dir DIR
    python -m downstream.report wikitext103 --output_dir DIR

Nothing is measured here.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.artefact import read_made
from utils.cli import command, flag, parse, required
from utils.files import atomic, ensure_folder, read_json, write_json
from utils.plots import draw_training, figure_of, save_figure
from utils.results import ADAPTIVE, lambda_text, versions

# The paper's WikiText-103 table: flag of the model, folder of its results, name, published perplexity.
WIKITEXT103 = (
    ("small_vanilla", "small_vanilla", "GPT2-small-vanilla", None),
    ("small", "small_finetuned", "GPT2-small-finetuned", None),
    ("vanilla", "large_vanilla", "GPT2-large-vanilla", 15.80),
    ("large", "large_finetuned", "GPT2-large-finetuned", 10.42),
    ("xl", "xl_finetuned", "GPT2-xl-finetuned", 10.16),
    ("memory", "large_memory", "GPT2-large-finetuned + MLPMem", 9.58),
)
NEARLY_EQUAL = 1.05  # perplexities of the held-out documents, between which other text decides
ABLATION_COLUMNS = ("base + memory", "change from base", "lambda", "memory alone", "KL", "cross-entropy", "training, s")


@dataclass
class QuickstartArguments:
    """Results of the quickstart's stages."""

    work: str = required("folder with one results folder per stage")
    output_dir: str = flag("results/quickstart", "folder for results.json, report.md and report.png")
    seconds: float = flag(0.0, "seconds the whole run has taken so far")


@dataclass
class RememberArguments:
    """Results of scripts/remember.sh."""

    work: str = required("folder of the memory that was measured, with one results folder per stage")
    memory: str = required("folder of the memory of all documents")
    output_dir: str = required("folder for results.json and report.md")
    seconds: float = flag(0.0, "seconds the whole run has taken so far")


@dataclass
class AblationArguments:
    """Results of one memory per value of a setting."""

    setting: str = required("name of the setting")
    runs: str = required("folder with one folder per value, each with memory/, validation/ and test/")
    values: list[str] = required("values of the setting, in the order of the table")
    output_dir: str = flag("results/ablation", "folder for table.md, plot.png and results.json")


@dataclass
class WikiText103Arguments:
    """Models of the paper's WikiText-103 table."""

    vanilla: str = flag("openai-community/gpt2-large", "GPT-2 large")
    large: str = flag("Rubin-Wei/gpt2-large-finetuned-wikitext103", "fine-tuned GPT-2 large")
    xl: str = flag("Clover-Hill/gpt2-xl-finetuned-wikitext103", "fine-tuned GPT-2 XL, the teacher")
    small_vanilla: str = flag("", "a smaller GPT-2, for an additional row")
    small: str = flag("", "the smaller GPT-2 after fine-tuning, for an additional row")
    memory: str = flag("Rubin-Wei/MLPMemory-gpt2-large", "the memory")
    train: int = flag(0, "1 if the memory was trained here")
    output_dir: str = flag("results/wikitext103", "folder of work/, for results.json and table.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", choices=REPORTS, help="its own flags follow; REPORT --help lists them")
    arguments_type, report = REPORTS[parser.parse_args(sys.argv[1:2]).report]
    (arguments,) = parse(arguments_type, description=report.__doc__, arguments=sys.argv[2:])
    report(arguments)


def write(output: Path, name: str, text: str, results: dict[str, Any]) -> None:
    """Print a report, and write it and its figures."""
    print(text)
    with atomic(output / name) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    write_json(output / "results.json", results | {"versions": versions()})
    print(f"\n{output / name}, {output / 'results.json'}")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def change(perplexity: float, base: float) -> str:
    return f"{100 * (perplexity / base - 1):+.1f}%"


def quickstart(arguments: QuickstartArguments) -> None:
    """Base, kNN-LM and memory after the quickstart: a table, the training curve, and perplexity by lambda."""
    from models.gate import WEIGHTS

    work, output = Path(arguments.work), ensure_folder(arguments.output_dir)
    stages = ("knnlm_validation", "knnlm_test", "joint_validation", "joint_test", "recall")
    knn_validation, knn, joint_validation, joint, recall = (read_json(work / name / "results.json") for name in stages)
    training = read_json(work / "memory" / "training.json")
    gate = read_made(work / "memory" / training["checkpoint"] / WEIGHTS)
    known = gate.settings["perplexity"]["training"]
    results = {
        **perplexities(joint, knn),
        "knnlm_adaptive_ppl": knn["adaptive"]["perplexity"],
        "memory_one_lambda_ppl": joint["perplexity"],
        "memory_ppl": joint["adaptive"]["perplexity"],
        "known_base_ppl": known["base"],
        "known_memory_ppl": known["mixture"],
        "lambda": ADAPTIVE,
        "memory_temp": joint["adaptive"]["memory_temp"],
        "one_lambda": joint["lmbda"],
        "one_lambda_temp": joint["memory_temp"],
        "knnlm_lambda": knn["lmbda"],
        "knnlm_temp": knn["knn_temp"],
        "validation": perplexities(joint_validation, knn_validation),
        "test_tokens": joint["tokens"],
        "train_tokens": read_json(work / "windows" / "dstore_summary.json")["train"]["dstore_size"],
        **{name: value for name, value in recall.items() if name.startswith("recall_")},
        "recall_cases": recall["cases"],
        "recall_standard_error": recall["standard_error_difference"],
        "recall_rule": recall["rule"],
        "examples": recall["examples"],
        "training": {**training["settings"], "seconds": training["training_seconds"]},
        "seconds": round(arguments.seconds, 1),
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
    }
    untuned = work / "untuned" / "results.json"  # exists if the base was fine-tuned first
    if untuned.exists():
        results["untuned_ppl"] = read_json(untuned)["perplexity"]
    figure, axes = figure_of(2)
    draw_training(axes[0], training["log"])
    grids = {"base + memory": joint_validation["grid"], "kNN-LM": knn_validation["grid"]}
    draw_lambda(axes[1], grids, joint_validation["base_perplexity"], joint_validation["lmbda"])
    save_figure(figure, output / "report.png")
    write(output, "report.md", quickstart_text(results), results)


def perplexities(joint: dict[str, Any], knn: dict[str, Any]) -> dict[str, float]:
    return {"base_ppl": joint["base_perplexity"], "knnlm_ppl": knn["perplexity"], "memory_ppl": joint["perplexity"]}


def quickstart_text(results: dict[str, Any]) -> str:
    """The quickstart's report in Markdown."""
    base, untuned = results["base_ppl"], results.get("untuned_ppl")
    name = "base" if untuned is None else "fine-tuned"
    knn = f"lambda {lambda_text(results['knnlm_lambda'])}, temperature {results['knnlm_temp']:g}"
    memory = f"lambda {lambda_text(results['one_lambda'])}, temperature {results['one_lambda_temp']:g}"
    rows = [
        (name, base, ""),
        (f"{name} + kNN-LM", results["knnlm_ppl"], knn),
        (f"{name} + kNN-LM, adaptive", results["knnlm_adaptive_ppl"], "lambda by the nearest neighbor's distance"),
        (f"{name} + MLP memory", results["memory_one_lambda_ppl"], memory),
        (f"{name} + MLP memory, adaptive", results["memory_ppl"], "lambda by token"),
    ]
    if untuned is not None:
        rows.insert(0, ("base", untuned, ""))
    cells = [(row, f"{value:.2f}", "" if row == name else change(value, base), how) for row, value, how in rows]
    return f"""
Perplexity on {results["test_tokens"]} tokens of held-out test articles. Lambda and temperature were chosen on the \
validation articles.

{table(("model", "perplexity", f"change from {name}", "chosen"), cells)}

{recall_text(results)}
Training text in other windows: base {results["known_base_ppl"]:.2f}, base + memory {results["known_memory_ppl"]:.2f}.

Trained on {results["train_tokens"]} tokens; {results["seconds"]:.0f} s in total on {results["machine"]}."""


def recall_text(results: dict[str, Any]) -> str:
    """How often training articles are continued correctly, in a few sentences."""
    if not results["recall_cases"]:
        return "No beginning of a training article fits the rule of downstream.recall."
    gain = results["recall_memory"] - results["recall_base"]
    return f"""\
Beginnings of training articles continued ({results["recall_cases"]} cases): base {results["recall_base"]:.1%}, base + \
memory {results["recall_memory"]:.1%} ({gain / max(results["recall_standard_error"], 1e-9):.1f} standard errors apart); \
first token only {results["recall_first_base"]:.1%} and {results["recall_first_memory"]:.1%}. With one lambda \
{results["recall_one_lambda"]:.1%}.
Rule: {results["recall_rule"]}."""


def draw_lambda(axes: Any, grids: dict[str, list[dict[str, float]]], base: float, chosen: float) -> None:
    """Perplexity by lambda, each mixture at its best temperature, and the base alone; far above the base is cut off."""
    lowest = base
    for name, grid in grids.items():
        values = sorted({row["lmbda"] for row in grid})
        best = [min(row["perplexity"] for row in grid if row["lmbda"] == value) for value in values]
        axes.plot(values, best, "o-", label=name)
        lowest = min(lowest, *best)
    axes.axhline(base, color="black", linewidth=1, label="base")
    axes.axvline(chosen, color="grey", linestyle=":", label="chosen")
    axes.set_ylim(lowest - 0.3 * (base - lowest), base + 0.8 * max(base - lowest, 0.05 * base))
    axes.set(xlabel="lambda", ylabel="perplexity", title="validation articles")
    axes.legend()


def remember(arguments: RememberArguments) -> None:
    """The lambda for a memory of the user's documents: one or the gate's, by held-out documents (where they are nearly equal,
    by other text), and what both cost."""
    work, rows = Path(arguments.work), {}
    scored = {split: read_json(work / f"joint_{split}" / "results.json") for split in ("validation", "test", "other")}
    knn = read_json(work / "knnlm_validation" / "results.json")
    for split, found in scored.items():
        by_token = found["adaptive"]["perplexity"]
        rows[split] = {"base": found["base_perplexity"], "one_lambda": found["perplexity"], ADAPTIVE: by_token}
    one, options = scored["validation"]["lmbda"], ("one_lambda", ADAPTIVE)
    held_out = [rows["validation"][name] for name in options]
    nearly_equal = max(held_out) < NEARLY_EQUAL * min(held_out)
    better = min(options, key=lambda name: rows["other" if nearly_equal else "validation"][name])
    chosen = ADAPTIVE if better == ADAPTIVE else one
    titles = {"base": "base", "one_lambda": f"one lambda, {lambda_text(one)}", ADAPTIVE: "the gate's, by token"}
    cells = [(title, *(f"{rows[split][name]:.2f}" for split in rows)) for name, title in titles.items()]
    cells.append(("kNN-LM by distance", f"{knn['adaptive']['perplexity']:.2f}", "", ""))
    text = f"""
Perplexity with a tenth of the documents held out for choosing lambda, and another tenth:

{table(("lambda", "held out, to choose", "held out", "other text"), cells)}

The memory of all documents is {arguments.memory}; {arguments.seconds:.0f} s in total.
It continues its documents and their sentences, and answers questions in words that --also has taught it; for questions
in any other words, put the document into the prompt (RAG).

lambda: {lambda_text(chosen)}"""
    model = scored["validation"]["model"]
    model = str(Path(model).resolve()) if Path(model).is_dir() else model
    results = {
        "model": model,
        "memory": str(Path(arguments.memory).resolve()),
        "lambda": chosen,
        "one_lambda": one,
        "perplexity": rows,
    }
    write(ensure_folder(arguments.output_dir), "report.md", text, results | {"seconds": arguments.seconds})


def ablation(arguments: AblationArguments) -> None:
    """The perplexity for each value of one setting: a table and a plot."""
    output, setting, rows = ensure_folder(arguments.output_dir), arguments.setting, []
    for value in arguments.values:
        run = Path(arguments.runs) / value
        test, training = read_json(run / "test" / "results.json"), read_json(run / "memory" / "training.json")
        last = {name: entry for entry in training["log"] for name in ("loss", "validation") if name in entry}
        row = {name: test[name] for name in ("perplexity", "base_perplexity", "lmbda", "tokens")}
        row |= {"memory_perplexity": last["validation"]["validation"]["memory_perplexity"]}
        row |= {"kl": last["loss"]["kl"], "ce": last["loss"]["ce"], "training_seconds": training["training_seconds"]}
        rows.append({"value": value, **row})
    cells = []
    for row in rows:
        figures = [f"{row[name]:.2f}" for name in ("memory_perplexity", "kl", "ce")]
        joint = f"{row['perplexity']:.2f}", change(row["perplexity"], row["base_perplexity"]), lambda_text(row["lmbda"])
        cells.append((row["value"], *joint, *figures, f"{row['training_seconds']:.0f}"))
    text = f"""
Perplexity on {rows[0]["tokens"]} test tokens; base alone {rows[0]["base_perplexity"]:.2f}. Lambda was chosen on the \
validation split, where the memory alone is measured too. KL and cross-entropy are those of the last step.

{table((setting, *ABLATION_COLUMNS), cells)}"""
    figure, (joint, alone) = figure_of(2)
    for axes, name, label in (
        (joint, "base_perplexity", "base"),
        (joint, "perplexity", "base + memory"),
        (alone, "memory_perplexity", "memory alone, validation"),
    ):
        axes.plot(arguments.values, [row[name] for row in rows], "o-", label=label)
        axes.set(xlabel=setting, ylabel="perplexity")
        axes.legend()
    save_figure(figure, output / "plot.png")
    write(output, "table.md", text, {"setting": setting, "rows": rows})


def wikitext103(arguments: WikiText103Arguments) -> None:
    """The paper's WikiText-103 table: measured and published perplexity."""
    output, rows, cells = Path(arguments.output_dir), [], []
    for name, folder, title, published in WIKITEXT103:
        if not (model := getattr(arguments, name)):
            continue
        result = read_json(output / "work" / folder / "results.json")
        row = {"model": title, "published": published, "measured": result["perplexity"], "path": model}
        rows.append(row | {key: result.get(key) for key in ("tokens", "lmbda", "memory_temp")})
        cells.append((title, f"{published:.2f}" if published else "–", f"{result['perplexity']:.2f}"))
    last = rows[-1]
    text = f"""
{table(("Model", "PPL published", "PPL measured"), cells)}

Subword perplexity over {last["tokens"]} test tokens; memory at lambda {lambda_text(last["lmbda"])}, temperature \
{last["memory_temp"]:g}, {"trained here" if arguments.train else "as published"}."""
    write(output, "table.md", text, {"rows": rows, "trained_here": bool(arguments.train)})


REPORTS = {
    "quickstart": (QuickstartArguments, quickstart),
    "remember": (RememberArguments, remember),
    "ablation": (AblationArguments, ablation),
    "wikitext103": (WikiText103Arguments, wikitext103),
}

if __name__ == "__main__":
    command(main)()
