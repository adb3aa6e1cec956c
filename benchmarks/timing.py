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
    """One figure beside its target.

    Attributes:
        name: what is measured.
        reached: the figure; None where it was not measured.
        sign: "<=" where the target is a ceiling, ">=" where it is a floor.
        target: the figure to reach.
        unit: of both; "x" for a ratio.
        detail: what the ratio is made of, or why there is none.
        applies: False where this machine cannot reach the target whatever the code does; `detail` says why.
        stage: which benchmark; `benchmarks.run` fills it in.
    """

    name: str
    reached: float | None
    sign: str
    target: float
    unit: str
    detail: str = ""
    applies: bool = True
    stage: str = ""

    def __post_init__(self) -> None:
        if self.reached is not None and not math.isfinite(self.reached):
            self.reached = None

    def share(self) -> float | None:
        """How much of the target is used: 1 or less is reached, whichever the sign; None where nothing was measured."""
        if self.reached is None:
            return None
        if self.sign == "<=":
            return self.reached / self.target
        return self.target / self.reached if self.reached else math.inf

    def verdict(self) -> str:
        share = self.share()
        if share is not None and share <= 1:
            return "reached"
        return "missed" if self.applies and share is not None else "not on this machine"


class Timings(dict[str, list[float]]):
    """Seconds of each run, round by round."""

    def median(self, name: str) -> float:
        return median(self[name])

    def ratio(self, over: str, under: str) -> float:
        """Median over rounds of one run's seconds / another's: the two of a round met the same machine."""
        return median(a / b for a, b in zip(self[over], self[under], strict=True))


def rounds(runs: dict[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> Timings:
    """Time each run `repeats` times after one round of warm-up, in turn, so that a busy machine hits all alike."""
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
    """Until the device has done what it was asked."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()
