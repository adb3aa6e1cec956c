"""Timing in rounds, and the row of figures that a benchmark reports."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass
class Row:
    """One figure and its target.

    Attributes:
        reached: the figure; None where it was not measured.
        sign: "<=" or ">=": the target is an upper or a lower bound.
        unit: of `reached` and `target`; "x" for a ratio.
        detail: the figures behind a ratio, or why there is none.
        applies: False where this machine cannot reach the target, whatever the code does.
    """

    name: str
    reached: float | None
    sign: str
    target: float
    unit: str
    detail: str = ""
    applies: bool = True
    stage: str = ""

    def share(self) -> float | None:
        """How much of the target is used: up to 1 it is reached, whatever the sign; None where nothing was measured."""
        if self.reached is None:
            return None
        if self.sign == "<=":
            return self.reached / self.target
        return self.target / self.reached if self.reached else math.inf

    def verdict(self) -> str:
        """One of "reached", "missed" and "not on this machine"."""
        share = self.share()
        if share is not None and share <= 1:
            return "reached"
        return "missed" if self.applies and share is not None else "not on this machine"


class Timings(dict[str, list[float]]):
    """Seconds of each run, by round."""

    def median(self, name: str) -> float:
        return median(self[name])

    def ratio(self, over: str, under: str) -> float:
        """Median over rounds of one run's seconds / another's: both runs of a round have the same load on the machine."""
        return median(a / b for a, b in zip(self[over], self[under], strict=True))


def rounds(runs: dict[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> Timings:
    """Time each run `repeats` times in turn, after one warm-up round."""
    seconds = Timings({name: [] for name in runs})
    for number in range(-1, repeats):
        for name, run in runs.items():
            taken = timed(run, device)
            if number >= 0:
                seconds[name].append(taken)
    return seconds


def timed(run: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds of one run."""
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def wait(device: str) -> None:
    """Wait until the device has finished its work."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()
