"""Table and plot of a comparison, from the records of the methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.page import line

MARKERS = "osD^vPX*<>d"


def add_differences(methods: dict[str, dict[str, Any]]) -> None:
    """Put beside each figure its difference from the base's and that difference's standard error, over the same cases.

    For perplexity: nats a token and, over windows, the paired standard error; for facts: shares, over cases.
    """
    base = methods.get("base")
    for record in methods.values() if base else ():
        for part in ("held_out", "web"):
            pairs = list(zip(record[part]["log_likelihood"], base[part]["log_likelihood"], strict=True))
            each = [(own - bare) / count for (own, count), (bare, _) in pairs if count]
            total = sum(own - bare for (own, _), (bare, _) in pairs) / sum(count for (_, count), _ in pairs)
            record[part]["nats_below_base"] = {"mean": total, "standard_error": standard_error(each)}
        for name, beside in (("right", "above_base"), ("first_right", "first_above_base")):
            each = [int(a) - int(b) for a, b in zip(record["facts"][name], base["facts"][name], strict=True)]
            if each:
                record["facts"][beside] = {"mean": mean(each), "standard_error": standard_error(each)}


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of `values`; None of fewer than two."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def markdown(results: dict[str, Any]) -> str:
    """The table with what its figures are."""
    methods, description, machine = results["methods"], results["description"], results["machine"]
    if not methods:
        return "No method is measured to its end."
    first = next(iter(methods.values()))
    columns = (
        "method",
        "perplexity, held-out articles",
        "facts completed",
        "their first token",
        "perplexity, web text",
    )
    columns += ("next token right, web text", "time to first token", "tokens/s", "added on disk")
    lines = [
        f"Base {description['model']} ({description['dtype']}), {description['train_tokens']:,} trained tokens; "
        f"{machine['cpu']}, threads: {machine['threads']}.",
        "",
        *(line(*columns), line(*["---"] * len(columns)), *(row(record) for record in methods.values()), ""),
        f"- Held-out articles: {first['held_out']['tokens']:,} tokens that nothing was trained on; web text: "
        f"{first['web']['tokens']:,} tokens of another kind of text that nothing was trained on (what was forgotten). "
        "All methods are scored on the same tokens. ± is the standard error of the difference from the base, over "
        "windows or cases.",
        f"- Facts completed: {first['facts']['cases']} cases of the trained articles, right when greedy decoding gives "
        f"the whole answer, and, in the next column, at least its first token. Rule: {description['rule']}.",
        f"- Speed: medians over {first['speed']['prompts']} of these prompts, one at a time, "
        f"{first['speed']['new_tokens']} tokens generated; retrieval counts. × is the ratio to the bare base, "
        "which ran in turn with each method.",
    ]
    lines += [f"- {record['title']}: {record['note']}" for record in methods.values() if record["note"]]
    return "\n".join(lines)


def row(record: dict[str, Any]) -> str:
    """A method's line of the table."""
    speed, facts, web = record["speed"], record["facts"], record["web"]
    other = record["name"] != "base"
    shares = []
    for name, beside in (("accuracy", "above_base"), ("first_token", "first_above_base")):
        error = facts.get(beside, {}).get("standard_error") if other else None
        share = "–" if facts[name] is None else f"{facts[name]:.1%}"
        shares.append(share if error is None else f"{share} ± {100 * error:.1f}")
    first, rate = speed["first_token_seconds_ratio"], speed["tokens_per_second_ratio"]
    size = record["bytes"] / 1e6
    return line(
        record["title"],
        f"{record['held_out']['perplexity']:.2f}" + against_base(record["held_out"]) * other,
        *shares,
        f"{web['perplexity']:.2f}" + against_base(web) * other,
        f"{web['accuracy']:.1%}",
        f"{1000 * speed['first_token_seconds']:.0f} ms" + f" ({first:.2f}×)" * other,
        f"{speed['tokens_per_second']:.1f}" + f" ({rate:.2f}×)" * other,
        f"{size:,.0f} MB" if size >= 10 else f"{size:.1f} MB" if size else "–",
    )


def against_base(part: dict[str, Any]) -> str:
    """The change of perplexity in percent, where the base is known."""
    if "nats_below_base" not in part:
        return ""
    change, error = math.expm1(-part["nats_below_base"]["mean"]), part["nats_below_base"]["standard_error"]
    return f" ({100 * change:+.1f}%" + (")" if error is None else f" ± {100 * error * (1 + change):.1f})")


def plot(methods: dict[str, dict[str, Any]], path: Path) -> None:
    """Quality against speed: perplexity over tokens a second, facts over time to the first token."""
    from utils.plots import figure_of, save_figure

    figure, (left, right) = figure_of(2)
    for marker, record in zip(MARKERS, methods.values(), strict=False):
        speed, facts = record["speed"], record["facts"]
        left.plot(speed["tokens_per_second"], record["held_out"]["perplexity"], marker, ms=8, label=record["title"])
        if facts["accuracy"] is not None:
            point = 1000 * speed["first_token_seconds"], 100 * facts["accuracy"]
            right.errorbar(*point, yerr=100 * facts["standard_error"], fmt=marker, ms=8, linewidth=1)
    left.set(xlabel="tokens a second (right is faster)", ylabel="perplexity, held-out articles\n(lower is better)")
    right.set(
        xlabel="milliseconds to the first token (left is faster)",
        ylabel="% of facts of trained articles\n(higher is better)",
    )
    for axes in (left, right):
        axes.set_xlim(0, 1.08 * axes.dataLim.x1 if methods else 1)
        axes.grid(alpha=0.3)
    if methods:
        figure.legend(
            *left.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(methods), 5), fontsize=8
        )
    save_figure(figure, path)
