"""Curves: training loss, perplexity over training, perplexity against lambda. Imports matplotlib when called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.files import atomic_file


def figure_of(columns: int) -> tuple[Any, Any]:
    """A figure with `columns` axes in a row, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(5.2 * columns, 3.6), squeeze=False, constrained_layout=True)
    return figure, axes[0]


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG, atomically, and close it."""
    import matplotlib.pyplot as plt

    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)


def draw_training(axes: Any, log: Sequence[dict[str, Any]]) -> None:
    """Total loss, KL and cross-entropy by step, from a trainer's log."""
    steps = [entry for entry in log if "loss" in entry]
    for name, label in (("loss", "loss"), ("kl", "KL(kNN ‖ memory)"), ("ce", "cross-entropy")):
        axes.plot([entry["step"] for entry in steps], [entry[name] for entry in steps], label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("nats a token")
    axes.set_title("training")
    axes.legend()


def draw_validation(axes: Any, log: Sequence[dict[str, Any]]) -> None:
    """Perplexity of base, memory and both by step, from a trainer's log."""
    points = [(entry["step"], entry["validation"]) for entry in log if "validation" in entry]
    for name in ("base", "memory", "joint"):
        axes.plot([step for step, _ in points], [row[f"{name}_perplexity"] for _, row in points], "o-", label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("perplexity")
    axes.set_title("validation")
    axes.legend()


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


def plot_training(log: Sequence[dict[str, Any]], path: str | Path) -> None:
    """The loss curve, and beside it the validation perplexity where there is one."""
    validated = any("validation" in entry for entry in log)
    figure, axes = figure_of(2 if validated else 1)
    draw_training(axes[0], log)
    if validated:
        draw_validation(axes[1], log)
    save_figure(figure, Path(path))
