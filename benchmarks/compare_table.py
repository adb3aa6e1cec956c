"""Table and plot of a comparison, from the records of the methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.page import line
from downstream.ask import rates_table

MARKERS = "osD^vPX*<>d"
COLUMNS = (
    *("method", "perplexity, held-out articles", "beginnings continued", "their first token", "perplexity, web text"),
    *("next-token accuracy, web text", "time to first token", "tokens/s", "added on disk"),
)


def add_differences(methods: dict[str, dict[str, Any]]) -> None:
    """Add to each figure its paired difference from the base's, with standard error: for perplexity nats per token over
    windows, for beginnings shares over cases."""
    base = methods.get("base")
    for record in methods.values() if base else ():
        for part in ("held_out", "web"):
            pairs = list(zip(record[part]["log_likelihood"], base[part]["log_likelihood"], strict=True))
            each = [(own - bare) / count for (own, count), (bare, _) in pairs if count]
            total = sum(own - bare for (own, _), (bare, _) in pairs) / sum(count for (_, count), _ in pairs)
            record[part]["nats_below_base"] = {"mean": total, "standard_error": standard_error(each)}
        for name, difference in (("right", "above_base"), ("first_right", "first_above_base")):
            each = [int(a) - int(b) for a, b in zip(record["facts"][name], base["facts"][name], strict=True)]
            record["facts"][difference] = {"mean": mean(each), "standard_error": standard_error(each)}


def standard_error(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def markdown(results: dict[str, Any]) -> str:
    """The table with explanations."""
    methods, description, machine = results["methods"], results["description"], results["machine"]
    first = next(iter(methods.values()))
    lines = [
        f"Base {description['model']} ({description['dtype']}), {description['train_tokens']:,} training tokens; "
        f"{machine['cpu']}, {machine['threads']} threads.",
        "",
        *(line(*COLUMNS), line(*["---"] * len(COLUMNS)), *(row(record) for record in methods.values()), ""),
        f"- Held-out articles: {first['held_out']['tokens']:,} tokens; web text: {first['web']['tokens']:,} tokens of another "
        "kind of text (what was forgotten). Nothing was trained on either, and all methods are scored on the same tokens. ± "
        "is the standard error of the difference from the base, over windows or cases.",
        f"- Beginnings continued: {first['facts']['cases']} beginnings of training articles, correct if greedy decoding gives "
        f"the whole answer, in the next column at least its first token. Rule: {description['rule']}.",
        f"- Speed: medians over {first['speed']['prompts']} of these prompts, one at a time, "
        f"{first['speed']['new_tokens']} tokens generated, retrieval included. × is the ratio to the base alone, measured in turn.",
    ]
    if first.get("answered"):
        lines += ["", rates_table({record["title"]: record["answered"] for record in methods.values()})]
    lines += [f"- {record['title']}: {record['note']}" for record in methods.values() if record["note"]]
    return "\n".join(lines)


def row(record: dict[str, Any]) -> str:
    """A method's line of the table."""
    speed, facts, web = record["speed"], record["facts"], record["web"]
    other, size, shares = record["name"] != "base", record["bytes"] / 1e6, []
    for name, difference in (("accuracy", "above_base"), ("first_token", "first_above_base")):
        error = f" ± {100 * facts[difference]['standard_error']:.1f}" if other and difference in facts else ""
        shares.append(f"{facts[name]:.1%}{error}")
    return line(
        record["title"],
        f"{record['held_out']['perplexity']:.2f}" + against_base(record["held_out"]) * other,
        *shares,
        f"{web['perplexity']:.2f}" + against_base(web) * other,
        f"{web['accuracy']:.1%}",
        f"{1000 * speed['first_token_seconds']:.0f} ms" + f" ({speed['first_token_seconds_ratio']:.2f}×)" * other,
        f"{speed['tokens_per_second']:.1f}" + f" ({speed['tokens_per_second_ratio']:.2f}×)" * other,
        f"{size:,.0f} MB" if size >= 10 else f"{size:.1f} MB" if size else "–",
    )


def against_base(part: dict[str, Any]) -> str:
    """The change of perplexity in percent, if the base was measured."""
    if "nats_below_base" not in part:
        return ""
    change, error = math.expm1(-part["nats_below_base"]["mean"]), part["nats_below_base"]["standard_error"]
    return f" ({100 * change:+.1f}% ± {100 * error * (1 + change):.1f})"


def plot(methods: dict[str, dict[str, Any]], path: Path) -> None:
    """Quality by speed: perplexity and tokens per second, beginnings continued and time to first token."""
    from utils.plots import figure_of, save_figure

    figure, (left, right) = figure_of(2)
    for marker, record in zip(MARKERS, methods.values(), strict=False):
        speed, facts = record["speed"], record["facts"]
        left.plot(speed["tokens_per_second"], record["held_out"]["perplexity"], marker, ms=8, label=record["title"])
        point = 1000 * speed["first_token_seconds"], 100 * facts["accuracy"]
        right.errorbar(*point, yerr=100 * facts["standard_error"], fmt=marker, ms=8, linewidth=1)
    left.set(xlabel="tokens per second (right is faster)", ylabel="perplexity, held-out articles\n(lower is better)")
    right.set(
        xlabel="milliseconds to the first token (left is faster)",
        ylabel="% of beginnings continued\n(higher is better)",
    )
    for axes in (left, right):
        axes.set_xlim(0, 1.08 * axes.dataLim.x1)
        axes.grid(alpha=0.3)
    handles = left.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=min(len(methods), 5), fontsize=8)
    save_figure(figure, path)
