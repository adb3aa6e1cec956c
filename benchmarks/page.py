"""The results of a benchmark run as a Markdown table and a bar chart."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.timing import Row
from utils.errors import InputError
from utils.files import atomic

COLOURS = {"reached": "tab:blue", "missed": "tab:red", "not on this machine": "tab:grey"}
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def machine(device: str) -> dict[str, Any]:
    """Processor, threads and library versions that the figures depend on."""
    import torch

    from utils.results import versions

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    found = {"cpu": next(names, platform.processor()), "threads": torch.get_num_threads(), "versions": versions()}
    return found | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


def read_rows(results: dict[str, Any]) -> list[Row]:
    return [Row(**values) for values in results["rows"]]


def figure(value: float | None, unit: str) -> str:
    """A figure with its unit, to three digits."""
    if value is None:
        return "–"
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{text} {unit}".removesuffix(" x")


def line(*cells: str) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def setting_line(results: dict[str, Any]) -> str:
    """What was measured, and where."""
    setting, here = results["setting"], results["machine"]
    torch = here["versions"]["torch"]
    sizes = ", ".join(f"{name} {value}" for name, value in setting.items() if name not in ("model", "text", "device"))
    return f"{here.get('gpu', here['cpu'])}, {here['threads']} threads, torch {torch}: {setting['model']}, {sizes}."


def markdown(results: dict[str, Any], before: dict[str, Any] | None = None) -> str:
    """The table with setting and machine; with `before`, next to each figure that of an earlier run."""
    earlier = {(row.stage, row.name): row.reached for row in read_rows(before)} if before else {}
    figures = ["before", "now"] if before else ["reached"]
    header = ["stage", "figure", *figures, "target", "", "detail"]
    lines = [setting_line(results), "", line(*header), line(*["---"] * len(header))]
    for row in read_rows(results):
        values = [figure(earlier.get((row.stage, row.name)), row.unit)] if before else []
        values += [figure(row.reached, row.unit), f"{'≤' if row.sign == '<=' else '≥'} {figure(row.target, row.unit)}"]
        lines.append(line(row.stage, row.name, *values, row.verdict(), row.detail))
    lines += [line(stage, f"did not run: {problem}") for stage, problem in results["failed"].items()]
    return "\n".join(lines)


def put_in_page(page: Path, text: Callable[[], str]) -> None:
    """Replace what stands between the marks of `page` by `text()`. Raises InputError if there are no marks."""
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    head, begin, rest = old.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise InputError(f"--page {page}: expected a page with the lines {BEGIN} and {END}")
    with atomic(page) as temporary:
        temporary.write_text(f"{head}{BEGIN}\n{text()}\n{END}{tail}", encoding="utf-8")


def bar_chart(rows: Sequence[Row], path: Path) -> None:
    """How much of each target is used, as bars: up to 1 it is reached."""
    from utils.plots import figure_of, save_figure

    shown = [row for row in rows if row.share() is not None][::-1]
    chart, (axes,) = figure_of(1)
    chart.set_size_inches(9, 1.2 + 0.3 * max(len(shown), 1))
    labels = [f"{row.stage}: {row.name}" for row in shown]
    bars = axes.barh(labels, [min(row.share(), 100) for row in shown], color=[COLOURS[row.verdict()] for row in shown])
    axes.bar_label(bars, [figure(row.reached, row.unit) for row in shown], padding=3, fontsize=7)
    axes.tick_params("y", labelsize=7)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(left=0.01)
    axes.set_xlabel("share of the target used: up to 1 it is reached")
    save_figure(chart, path)
