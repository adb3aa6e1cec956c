"""LoRA of several ranks and learning rates: beginnings continued against what is forgotten of web text.

    python -m benchmarks.memories --quickstart results/full --shares 0.2 --output_dir results/shares
    python -m benchmarks.lora --compared results/shares/share-0.2/compare       # results/lora: results.json, table.md, plot.png

Each setting is trained and scored as in `benchmarks.compare`, whose results.json gives text, sizes and the other methods. Four states
of each training are scored; the table has the one with the lowest validation loss, and the last one that leaves web text no worse
than the memory does. An interrupted run continues.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.compare import CompareArguments
from benchmarks.page import line
from utils.cli import command, flag, parse, say
from utils.files import ensure_folder, read_json, write_json

LIMIT = "memory_adaptive"  # the method whose web text is the limit
SHOWN = {"base": "k", "knnlm_adaptive": "tab:green", LIMIT: "tab:red"}


@dataclass
class LoraArguments:
    """Which comparison, and which settings."""

    compared: str = flag("results/compare", "folder of a finished benchmarks.compare")
    output_dir: str = flag("results/lora", "folder of results.json, table.md, plot.png and the adapters")
    ranks: list[int] = flag([4, 16, 30], "ranks; alpha is twice the rank")
    rates: list[float] = flag([5e-4, 2e-3], "peak learning rates")
    epochs: int = flag(2, "epochs of the memory's windows")


def main() -> None:
    (arguments,) = parse(LoraArguments, description=__doc__.split("\n")[0])
    output, compared = (
        ensure_folder(arguments.output_dir),
        read_json(Path(arguments.compared) / "results.json")["methods"],
    )
    others = {name: figures_of(record) for name, record in compared.items()}
    settings = {name: value for name, value in compared["base"]["compared"].items() if name in vars(CompareArguments())}
    settings |= {"lora_epochs": arguments.epochs, "output_dir": str(output)}
    runs = []
    for rank in arguments.ranks:
        for rate in arguments.rates:
            flags = CompareArguments(**settings | {"lora_rank": rank, "lora_learning_rate": rate})
            path = output / f"rank-{rank}-rate-{rate:g}.json"
            if not path.exists():
                write_json(path, {"rank": rank, "rate": rate, **states_of(flags)})
            runs.append(read_json(path))
            write_json(output / "results.json", {"runs": runs, "others": others, "epochs": arguments.epochs})
    text = table(runs, others)
    (output / "table.md").write_text(text + "\n", encoding="utf-8")
    plot(runs, others, output / "plot.png")
    say(f"\n{text}\n\n{output / 'results.json'}, {output / 'plot.png'}")


def figures_of(record: dict[str, Any]) -> dict[str, Any]:
    figures = {part: record[part]["perplexity"] for part in ("held_out", "web")}
    return figures | {"recalled": record["facts"]["accuracy"], "bytes": record["bytes"], "title": record["title"]}


def states_of(flags: CompareArguments) -> dict[str, Any]:
    """The figures of each saved state of one training, with its validation loss, and the adapter's bytes."""
    from benchmarks.compare_lora import train
    from benchmarks.compare_methods import Quickstart
    from benchmarks.compare_scores import Method, score_facts, score_windows
    from downstream.retrieval import bytes_of, library

    work = Quickstart(flags)
    folder = train(work)
    log = read_json(folder / "trainer_state.json")["log_history"]
    losses = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    states = []
    for step, loss in losses.items():
        base = work.models.open_base(work.tokenizer)
        tuned = library("peft").PeftModel.from_pretrained(base, str(folder / f"checkpoint-{step}"))
        method = Method(tuned.merge_and_unload().eval())
        held_out, web = (
            score_windows(method, windows, work.tokenizer, flags.rag_chunk, flags.rag_query)["perplexity"]
            for windows in (work.held_out, work.web)
        )
        recalled = score_facts(method, work.cases, work.tokenizer)["accuracy"]
        states.append({"step": step, "validation": loss, "held_out": held_out, "web": web, "recalled": recalled})
        say(f"rank {flags.lora_rank}, rate {flags.lora_learning_rate:g}: {states[-1]}")
    return {"states": states, "bytes": bytes_of(folder.glob("adapter_*"))}


def table(runs: list[dict[str, Any]], others: dict[str, Any]) -> str:
    """Two rows for each setting, and one for each other method."""
    header = ("method", "on disk", "state", "held-out articles", "beginnings continued", "web text")
    rows = [line(*header), line(*["---"] * len(header))]

    def row(title: str, size: float, name: str, state: dict[str, Any]) -> str:
        figures = f"{state['held_out']:.2f}", f"{state['recalled']:.1%}", f"{state['web']:.2f}"
        return line(title, f"{size / 1e6:.1f} MB", name, *figures)

    for run in runs:
        title = f"LoRA, rank {run['rank']}, rate {run['rate']:g}"
        best = min(run["states"], key=lambda state: state["validation"])
        within = [state for state in run["states"] if state["web"] <= others[LIMIT]["web"]]
        rows.append(row(title, run["bytes"], f"lowest validation loss, step {best['step']}", best))
        if within:
            name = f"last with the memory's web text, step {within[-1]['step']}"
            rows.append(row(title, run["bytes"], name, within[-1]))
    rows += [row(state["title"], state["bytes"], "", state) for state in others.values()]
    return "\n".join(rows)


def plot(runs: list[dict[str, Any]], others: dict[str, Any], path: Path) -> None:
    """Beginnings continued by the perplexity of web text: a line for each training, a point for each other method."""
    from utils.plots import figure_of, save_figure

    figure, (axes,) = figure_of(1)
    for run in runs:
        web, recalled = ([state[name] for state in run["states"]] for name in ("web", "recalled"))
        axes.plot(
            web, [100 * each for each in recalled], "o-", ms=4, label=f"LoRA, rank {run['rank']}, rate {run['rate']:g}"
        )
    for name, color in SHOWN.items():
        if state := others.get(name):
            axes.plot(state["web"], 100 * state["recalled"], "*", ms=14, color=color, label=state["title"])
    axes.set(xlabel="perplexity, web text (left is better)", ylabel="% of beginnings continued")
    axes.legend(fontsize=7)
    save_figure(figure, path)


if __name__ == "__main__":
    command(main)()
