"""Curves of a training run. Imports matplotlib when called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.files import atomic


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

    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)


def draw_training(axes: Any, log: Sequence[dict[str, Any]]) -> None:
    """Total loss, KL and cross-entropy by step, from a trainer's log."""
    entries = [entry for entry in log if "loss" in entry]
    _draw(axes, entries, {"loss": "loss", "kl": "KL(kNN ‖ memory)", "ce": "cross-entropy"}, "nats a token", "training")


def plot_training(log: Sequence[dict[str, Any]], path: str | Path) -> None:
    """The loss curve, and beside it the perplexity of base, memory and both where the run was validated."""
    validated = [entry["validation"] | {"step": entry["step"]} for entry in log if "validation" in entry]
    figure, axes = figure_of(2 if validated else 1)
    draw_training(axes[0], log)
    if validated:
        names = {f"{name}_perplexity": name for name in ("base", "memory", "joint")}
        _draw(axes[1], validated, names, "perplexity", "validation")
    save_figure(figure, Path(path))


def _draw(axes: Any, entries: Sequence[dict[str, Any]], names: dict[str, str], unit: str, title: str) -> None:
    for name, label in names.items():
        axes.plot([entry["step"] for entry in entries], [entry[name] for entry in entries], ".-", label=label)
    axes.set(xlabel="step", ylabel=unit, title=title)
    axes.legend()
