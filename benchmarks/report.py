"""Table, bar chart and page of a run of the benchmarks. Knows only their rows."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Row
from utils.errors import InputError
from utils.files import atomic_file

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def machine(device: str) -> dict[str, Any]:
    """What a figure depends on beside the code."""
    import torch

    from utils.evaluation import versions

    name = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    found = {"cpu": name, "threads": torch.get_num_threads(), "versions": versions()}
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def figure(value: float | None, unit: str) -> str:
    """A figure with its unit, to three digits."""
    if value is None:
        return "–"
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{text} {unit}".removesuffix(" x")


def target(row: Row) -> str:
    return f"{'≤' if row.sign == '<=' else '≥'} {figure(row.target, row.unit)}"


def table(rows: Sequence[Row]) -> str:
    """Plain text: stage, what, reached, target, verdict, and below it the detail."""
    lines = [f"{'stage':17s} {'figure':50s} {'reached':>16s} {'target':>18s}", "-" * 105]
    for row in rows:
        lines.append(
            f"{row.stage:17s} {row.name:50s} {figure(row.reached, row.unit):>16s} {target(row):>18s}  {row.verdict()}"
        )
        lines.append(f"{'':17s}   {row.detail}")
    return "\n".join(lines)


def markdown(results: dict[str, Any]) -> str:
    """The page's table, with its setting and machine."""
    rows = read_rows(results)
    setting, here = results["setting"], results["machine"]
    lines = [
        f"Measured on {here['cpu']}, {here['threads']} threads, device {setting['device']}, "
        f"torch {here['versions'].get('torch')}: {setting['model']}, {setting['rows']:,} rows "
        f"(windows of {setting['block_size']:,}, stride {setting['stride']}), {setting['memory_layers']} memory layers, "
        f"{setting['ncentroids']} lists, {setting['probe']} probed, {setting['code_size']}-byte codes, "
        f"k = {setting['k']:,}; medians of {setting['repeats']}.",
        "",
        "| stage | figure | reached | target | | of what |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = (row.stage, row.name, figure(row.reached, row.unit), target(row), row.verdict(), row.detail)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    for stage, problem in results["failed"].items():
        lines.append(f"| {stage} | did not run | – | – | | {problem.replace('|', '/')} |")
    return "\n".join(lines)


def read_rows(results: dict[str, Any]) -> list[Row]:
    return [Row(**values) for values in results["rows"]]


def put_in_page(page: Path, text: Callable[[], str]) -> None:
    """Put `text()` between the marks of `page`, in place of what stood there. Raises InputError where there are none."""
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    if BEGIN not in old or END not in old.split(BEGIN, 1)[1]:
        raise InputError(f"--page {page}: expected a page with the lines {BEGIN} and {END}")
    before, rest = old.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    with atomic_file(page) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n{text()}\n{END}{after}", encoding="utf-8")


def bar_chart(rows: Sequence[Row], path: Path) -> None:
    """How much of each target is used: a bar up to the line reaches it, whichever way the target points."""
    from matplotlib.ticker import NullFormatter

    from utils.plots import figure_of, save_figure

    shown = [row for row in rows if row.share() is not None][::-1]
    chart, (axes,) = figure_of(1)
    chart.set_size_inches(9, 1.2 + 0.3 * max(len(shown), 1))
    colours = ["tab:blue" if row.met() else "tab:red" if row.applies else "tab:grey" for row in shown]
    shares = [row.share() for row in shown]
    # A log scale shows the far and the near; nothing is drawn below a hundredth of a target.
    axes.barh(range(len(shown)), [max(share, 0.011) for share in shares], color=colours)
    axes.set_yticks(range(len(shown)), [f"{row.stage}: {row.name}" for row in shown], fontsize=7)
    for place, (row, share) in enumerate(zip(shown, shares, strict=True)):
        axes.text(max(share, 0.011) * 1.05, place, figure(row.reached, row.unit), va="center", fontsize=7)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(0.01, max([2.0, *(3 * share for share in shares)]))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("share of the target used: up to 1 it is reached")
    save_figure(chart, path)
