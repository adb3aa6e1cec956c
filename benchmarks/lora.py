"""LoRA of several ranks and learning rates: beginnings continued against what is forgotten of web text.

    python -m benchmarks.memories --quickstart results/full --shares 0.2 --output_dir results/shares
    python -m benchmarks.lora --compared results/shares/share-0.2/compare       # results/lora: results.json, table.md, plot.png

Each setting is trained and scored as in `benchmarks.compare`, whose results.json gives text, sizes and the other methods. Of four states
of each training two are compared: the one with the lowest validation loss (dots), and the last one that leaves web text no worse than
the memory does (squares). An interrupted run continues.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.compare import CompareArguments
from benchmarks.page import line
from utils.cli import command, flag, parse, say
from utils.files import ensure_folder, read_json, write_json

VALIDATION_WINDOWS = 10
STATES = {"best": "lowest validation loss", "within": "last with the memory's web text"}
SHOWN = {"base": "black", "knnlm_adaptive": "grey", "memory_adaptive": "red"}


@dataclass
class LoraArguments:
    """Which comparison, and which settings."""

    compared: str = flag("results/compare", "folder of a finished benchmarks.compare")
    output_dir: str = flag("results/lora", "folder of results.json, table.md, plot.png and the adapters")
    ranks: list[int] = flag([4, 16, 30], "ranks; alpha is twice the rank")
    rates: list[float] = flag([5e-4, 2e-3], "peak learning rates")
    epochs: int = flag(2, "epochs of the memory's windows")
    limit: str = flag("memory_adaptive", "method whose perplexity of web text is the limit")


def main() -> None:
    (arguments,) = parse(LoraArguments, description=__doc__.split("\n")[0])
    output = ensure_folder(arguments.output_dir)
    compared = read_json(Path(arguments.compared) / "results.json")["methods"]
    others = {name: figures_of(record) for name, record in compared.items()}
    settings = {name: value for name, value in compared["base"]["compared"].items() if name in vars(CompareArguments())}
    settings |= {"lora_epochs": arguments.epochs, "output_dir": str(output)}
    runs = []
    for rank in arguments.ranks:
        for rate in arguments.rates:
            flags = CompareArguments(**settings | {"lora_rank": rank, "lora_learning_rate": rate})
            path = output / f"rank-{rank}-rate-{rate:g}.json"
            if not path.exists():
                write_json(path, {"rank": rank, "rate": rate, **states_of(flags, others[arguments.limit]["web"])})
            runs.append(read_json(path))
            write_json(output / "results.json", {"runs": runs, "others": others, "epochs": arguments.epochs})
    text = table(runs, others)
    (output / "table.md").write_text(text + "\n", encoding="utf-8")
    plot(runs, others, output / "plot.png")
    say(f"\n{text}\n\n{output / 'results.json'}, {output / 'plot.png'}")


def figures_of(record: dict[str, Any]) -> dict[str, Any]:
    figures = {part: record[part]["perplexity"] for part in ("held_out", "web")}
    return figures | {"recalled": record["facts"]["accuracy"], "bytes": record["bytes"], "title": record["title"]}


def states_of(flags: CompareArguments, limit: float) -> dict[str, Any]:
    """One training: the adapter's bytes, and the figures of the states with the lowest validation loss ("best") and of the last one
    that has web text at `limit` or below ("within", if there is one)."""
    from benchmarks.compare_lora import train
    from benchmarks.compare_methods import Quickstart
    from benchmarks.compare_scores import Method, score_facts, score_windows
    from downstream.retrieval import bytes_of, library

    work = Quickstart(flags)
    folder = train(work, VALIDATION_WINDOWS)
    log = read_json(folder / "trainer_state.json")["log_history"]
    states = [{"step": entry["step"], "validation": entry["eval_loss"]} for entry in log if "eval_loss" in entry]

    def tuned(state: dict[str, Any]) -> Method:
        base, adapter = work.models.open_base(work.tokenizer), folder / f"checkpoint-{state['step']}"
        return Method(library("peft").PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().eval())

    def perplexity(method: Method, windows: Any) -> float:
        return score_windows(method, windows, work.tokenizer, flags.rag_chunk, flags.rag_query)["perplexity"]

    for state in states:
        state["web"] = perplexity(tuned(state), work.web)
        say(f"rank {flags.lora_rank}, rate {flags.lora_learning_rate:g}: {state}")
    chosen = {"best": min(states, key=lambda state: state["validation"])}
    if within := [state for state in states if state["web"] <= limit]:
        chosen["within"] = within[-1]
    for state in chosen.values():
        if "recalled" not in state:  # the two may be the same
            method = tuned(state)
            state["held_out"] = perplexity(method, work.held_out)
            state["recalled"] = score_facts(method, work.cases, work.tokenizer)["accuracy"]
    return {"bytes": bytes_of(folder.glob("adapter_*")), "states": states, **chosen}


def table(runs: list[dict[str, Any]], others: dict[str, Any]) -> str:
    """Two rows for each setting, and one for each other method."""
    header = ("method", "on disk", "state", "held-out articles", "beginnings continued", "web text")
    rows = [line(*header), line(*["---"] * len(header))]

    def row(title: str, size: float, name: str, state: dict[str, Any]) -> str:
        figures = f"{state['held_out']:.2f}", f"{state['recalled']:.1%}", f"{state['web']:.2f}"
        return line(title, f"{size / 1e6:.1f} MB", name, *figures)

    for run in runs:
        title = f"LoRA, rank {run['rank']}, rate {run['rate']:g}"
        for name, state in ((name, run[name]) for name in STATES if name in run):
            rows.append(row(title, run["bytes"], f"{STATES[name]}, step {state['step']}", state))
    rows += [row(state["title"], state["bytes"], "", state) for state in others.values()]
    return "\n".join(rows)


def plot(runs: list[dict[str, Any]], others: dict[str, Any], path: Path) -> None:
    """Beginnings continued by the perplexity of web text: two points for each training, one for each other method."""
    from utils.plots import figure_of, save_figure

    figure, (axes,) = figure_of(1)
    for number, run in enumerate(runs):
        label = f"LoRA, rank {run['rank']}, rate {run['rate']:g}"
        for marker, state in (("o", run["best"]), ("s", run.get("within"))):
            if state:
                axes.plot(state["web"], 100 * state["recalled"], marker, color=f"C{number}", ms=5, label=label)
                label = None
    for name, color in SHOWN.items():
        if state := others.get(name):
            axes.plot(state["web"], 100 * state["recalled"], "*", ms=14, color=color, label=state["title"])
    axes.set(xlabel="perplexity, web text (left is better)", ylabel="% of beginnings continued")
    axes.legend(fontsize=7)
    save_figure(figure, path)


if __name__ == "__main__":
    command(main)()
