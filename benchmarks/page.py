"""What a run of the benchmarks leaves to look at: table, bar chart, and the tables of a page."""

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
    """What a figure depends on beside the code."""
    import torch

    from utils.results import versions

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
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
    return (
        f"Measured on {here.get('gpu', here['cpu'])}, {here['threads']} threads, device {setting['device']}, "
        f"torch {here['versions'].get('torch')}: {setting['model']}, {setting['rows']:,} rows "
        f"(windows of {setting['block_size']:,}, stride {setting['stride']}), {setting['memory_layers']} memory layers, "
        f"{setting['ncentroids']} lists, {setting['probe']} probed, {setting['code_size']}-byte codes, "
        f"k = {setting['k']:,}; medians of {setting['repeats']}."
    )


def markdown(results: dict[str, Any], before: dict[str, Any] | None = None) -> str:
    """The table with its setting and machine; beside each figure that of the earlier run `before`, where there is one."""
    earlier = {(row.stage, row.name): row for row in read_rows(before)} if before else None
    header = ["stage", "figure", "reached", "target", "", "of what"]
    if earlier is not None:
        header[2:3] = ["before", "now"]
    lines = [setting_line(results), "", line(*header), line(*["---"] * len(header))]
    for row in read_rows(results):
        old = earlier.get((row.stage, row.name)) if earlier else None
        then = [figure(old.reached if old else None, row.unit)] if earlier is not None else []
        now, target = figure(row.reached, row.unit), figure(row.target, row.unit)
        target = f"{'≤' if row.sign == '<=' else '≥'} {target}"
        lines.append(line(row.stage, row.name, *then, now, target, row.verdict(), row.detail))
    lines += [line(stage, f"did not run: {problem}") for stage, problem in results["failed"].items()]
    return "\n".join(lines)


def put_in_page(page: Path, text: Callable[[], str]) -> None:
    """Put `text()` between the marks of `page`, in place of what stood there. Raises InputError where there are none."""
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    if BEGIN not in old or END not in old.split(BEGIN, 1)[1]:
        raise InputError(f"--page {page}: expected a page with the lines {BEGIN} and {END}")
    head, rest = old.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    with atomic(page) as temporary:
        temporary.write_text(f"{head}{BEGIN}\n{text()}\n{END}{tail}", encoding="utf-8")


def bar_chart(rows: Sequence[Row], path: Path) -> None:
    """How much of each target is used: a bar up to the line reaches it, whichever way the target points."""
    from matplotlib.ticker import NullFormatter

    from utils.plots import figure_of, save_figure

    shown = [row for row in rows if row.share() is not None][::-1]
    chart, (axes,) = figure_of(1)
    chart.set_size_inches(9, 1.2 + 0.3 * max(len(shown), 1))
    colours = [COLOURS[row.verdict()] for row in shown]
    # A log scale shows the far and the near; nothing is drawn below a hundredth of a target.
    shares = [min(max(row.share(), 0.011), 100) for row in shown]
    axes.barh(range(len(shown)), shares, color=colours)
    axes.set_yticks(range(len(shown)), [f"{row.stage}: {row.name}" for row in shown], fontsize=7)
    for place, (row, share) in enumerate(zip(shown, shares, strict=True)):
        axes.text(share * 1.05, place, figure(row.reached, row.unit), va="center", fontsize=7)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(0.01, max([2.0, *(3 * share for share in shares)]))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("share of the target used: up to 1 it is reached")
    save_figure(chart, path)
