"""Table, plot, results.json and page of a comparison, from the records of the methods. Measures nothing itself."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.page import put_in_page
from utils.errors import InputError
from utils.files import atomic_file, read_json, write_json

MARKERS = "osD^vP"


def report(output: Path, order: Sequence[str], description: dict[str, Any], identity: dict[str, Any]) -> None:
    """Write results.json, compare.md and compare.png from the methods measured so far with the same `identity`."""
    from benchmarks.page import machine
    from utils.loading import say

    methods = {}
    for name in order:
        path = output / "methods" / f"{name}.json"
        record = read_json(path) if path.exists() else {}
        found = record.get("identity", {})
        if "web" in record and all(found.get(key) == value for key, value in identity.items()):
            methods[name] = {
                key: value for key, value in record.items() if key not in ("identity", "choice", "partial")
            }
    add_differences(methods)
    results = {"description": description, "machine": machine("cpu"), "methods": methods}
    write_json(output / "results.json", results)
    text = markdown(results)
    with atomic_file(output / "compare.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    plot(methods, output / "compare.png")
    say(f"\n{text}\n\n{output / 'results.json'}, {output / 'compare.md'}, {output / 'compare.png'}")


def add_differences(methods: dict[str, dict[str, Any]]) -> None:
    """Put beside each figure its difference from the base's and that difference's standard error, over the same cases.

    For perplexity: nats a token and, over windows, the paired standard error; for facts: shares, over cases.
    """
    base = methods.get("base")
    for record in methods.values() if base else ():
        for part in ("held_out", "web"):
            own, bare = record[part]["log_likelihood"], base[part]["log_likelihood"]
            each = [(a - b) / count for (a, count), (b, _) in zip(own, bare, strict=True) if count]
            weight = sum(count for _, count in own)
            mean = sum(a - b for (a, _), (b, _) in zip(own, bare, strict=True)) / weight
            record[part]["nats_below_base"] = {"mean": mean, "standard_error": standard_error(each)}
        pairs = zip(record["facts"]["right"], base["facts"]["right"], strict=True)
        each = [int(a) - int(b) for a, b in pairs]
        if each:
            record["facts"]["above_base"] = {"mean": sum(each) / len(each), "standard_error": standard_error(each)}


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of `values`; None of fewer than two."""
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def markdown(results: dict[str, Any]) -> str:
    """The table with what its figures are."""
    methods, description, machine = results["methods"], results["description"], results["machine"]
    if not methods:
        return "No method is measured to its end."
    first = next(iter(methods.values()))
    lines = [
        f"Base {description['model']} ({description['dtype']}), {description['train_tokens']:,} trained tokens; "
        f"{machine['cpu']}, {machine['threads']} threads.",
        "",
        "| method | perplexity, held-out articles | facts completed | perplexity, web text | next token right, web text "
        "| time to first token | tokens/s | added on disk |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(row(record) for record in methods.values()),
        "",
        f"- Held-out articles: {first['held_out']['tokens']:,} tokens that nothing was trained on; web text: "
        f"{first['web']['tokens']:,} tokens of another kind of text that nothing was trained on (what was forgotten). "
        "All methods are scored on the same tokens. ± is the standard error of the difference from the base, over "
        "windows or cases.",
        f"- Facts completed: {first['facts']['cases']} cases of the trained articles, right when greedy decoding gives the "
        f"whole answer. Rule: {description['rule']}.",
        f"- Speed: medians over {first['speed']['prompts']} of these prompts, one at a time, "
        f"{first['speed']['new_tokens']} tokens generated; retrieval counts. × is the ratio to the bare base, "
        "which ran in turn with each method.",
        *(f"- {record['title']}: {text}" for name, record in methods.items() if (text := told(name, record))),
    ]
    return "\n".join(lines)


def row(record: dict[str, Any]) -> str:
    """A method's line of the table."""
    speed, facts = record["speed"], record["facts"]
    own = record["name"] == "base"
    completed = "–" if facts["accuracy"] is None else f"{facts['accuracy']:.1%}"
    error = facts.get("above_base", {}).get("standard_error")
    if error is not None and not own:
        completed += f" ± {100 * error:.1f}"
    cells = (
        record["title"],
        f"{record['held_out']['perplexity']:.2f}" + ("" if own else against_base(record["held_out"])),
        completed,
        f"{record['web']['perplexity']:.2f}" + ("" if own else against_base(record["web"])),
        f"{record['web']['accuracy']:.1%}",
        f"{1000 * speed['first_token_seconds']:.0f} ms"
        + ("" if own else f" ({speed['first_token_seconds_ratio']:.2f}×)"),
        f"{speed['tokens_per_second']:.1f}" + ("" if own else f" ({speed['tokens_per_second_ratio']:.2f}×)"),
        megabytes(record["bytes"]),
    )
    return "| " + " | ".join(cells) + " |"


def against_base(part: dict[str, Any]) -> str:
    """The change of perplexity in percent, where the base is known."""
    difference = part.get("nats_below_base")
    if difference is None:
        return ""
    change = math.expm1(-difference["mean"])
    error = difference["standard_error"]
    return f" ({100 * change:+.1f}%" + (")" if error is None else f" ± {100 * error * (1 + change):.1f})")


def megabytes(count: int) -> str:
    if not count:
        return "–"
    return f"{count / 1e6:,.0f} MB" if count >= 1e7 else f"{count / 1e6:.1f} MB"


def told(name: str, record: dict[str, Any]) -> str:
    """What a reader has to know of how a method was set up."""
    settings = record["settings"]
    if name == "knnlm":
        return (
            f"k {settings['k']}, {settings['probe']} lists probed, lambda {settings['lmbda']:g} and temperature "
            f"{settings['knn_temp']:g} chosen on the validation articles; on disk the index and the values."
        )
    if name.startswith("rag"):
        tried = ", ".join(f"{count}: {value:.2f}" for count, value in settings["validation"].items())
        chosen = f", chosen on validation windows (perplexity with {tried})" if tried else ""
        return (
            f"{settings['passages']} of {settings['articles']} trained articles (at most {settings['passage_tokens']} tokens "
            f"each) before the text{chosen}. A window is scored in chunks of {settings['chunk']} tokens: the query is the "
            f"{settings['query']} tokens before the chunk, the input is the articles, then the window up to the chunk; the "
            "first chunk of a window has no query and no article. For facts and speed the query is the prompt. On disk "
            + ("the articles and the index." if name == "rag_bm25" else "the articles, their vectors and the encoder.")
        )
    if name == "lora":
        kept = settings["kept"] or {}
        return (
            f"rank {settings['rank']}, alpha {settings['alpha']}, on all linear layers but the head "
            f"({settings['trained_parameters'] / 1e6:.1f}M parameters), learning rate {settings['learning_rate']:g} (not "
            f"tuned), linear decay, epochs of the memory's windows: {settings['epochs']}, {settings['windows_per_step']} "
            f"windows a step; of {len(settings['validation'])} states the one with the lowest validation loss was kept "
            f"(step {kept.get('step')} of {settings['steps']}); merged into the base's weights."
        )
    if name == "memory":
        return (
            f"{settings['parameters'] / 1e6:.1f}M parameters, {settings['epochs']} epochs, lambda {settings['lmbda']:g} and "
            f"temperature {settings['knn_temp']:g} chosen on the validation articles."
        )
    return ""


def plot(methods: dict[str, dict[str, Any]], path: Path) -> None:
    """Quality against speed: perplexity over tokens a second, facts over time to the first token."""
    from utils.plots import figure_of, save_figure

    figure, (left, right) = figure_of(2)
    for number, record in enumerate(methods.values()):
        style = {"marker": MARKERS[number % len(MARKERS)], "s": 70, "label": record["title"]}
        left.scatter(record["speed"]["tokens_per_second"], record["held_out"]["perplexity"], **style)
        if record["facts"]["accuracy"] is not None:
            facts = record["facts"]
            dots = right.scatter(1000 * record["speed"]["first_token_seconds"], 100 * facts["accuracy"], **style)
            right.errorbar(
                1000 * record["speed"]["first_token_seconds"],
                100 * facts["accuracy"],
                yerr=100 * facts["standard_error"],
                color=dots.get_facecolor()[0],
                linewidth=1,
            )
    left.set_xlabel("tokens a second (right is faster)")
    left.set_ylabel("perplexity, held-out articles\n(lower is better)")
    right.set_xlabel("milliseconds to the first token (left is faster)")
    right.set_ylabel("% of facts of trained articles\n(higher is better)")
    for axes in (left, right):
        axes.set_xlim(0, 1.08 * axes.dataLim.x1 if methods else 1)
        axes.grid(alpha=0.3)
    if methods:
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(methods), fontsize=8)
    save_figure(figure, path)


def write_page(page: Path, output: Path) -> None:
    """Put the table of `output`/results.json between the marks of `page`, and the plot beside it.

    Raises InputError where there are no results or no marks.
    """
    results = read_json(output / "results.json")
    if "description" not in results:
        raise InputError(f"--output_dir {output}: results.json is not of a comparison")
    put_in_page(page, lambda: markdown(results))
    with atomic_file(page.with_suffix(".png")) as temporary:
        shutil.copyfile(output / "compare.png", temporary)
