"""Figures as PNG files. Imports matplotlib when called."""

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
    """Total loss, KL and cross-entropy by step, from the log in training.json."""
    entries = [entry for entry in log if "loss" in entry]
    steps = [entry["step"] for entry in entries]
    for name, label in {"loss": "loss", "kl": "KL(kNN ‖ memory)", "ce": "cross-entropy"}.items():
        axes.plot(steps, [entry[name] for entry in entries], ".-", label=label)
    axes.set(xlabel="step", ylabel="nats per token", title="training")
    axes.legend()
