"""Timing in rounds, medians, and the row of figures that a benchmark reports. Knows nothing of stages."""

from __future__ import annotations

import dataclasses
import math
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAMPLE_SECONDS = 0.005


@dataclass
class Row:
    """One figure beside its target.

    Attributes:
        stage, name: which benchmark, and what is measured.
        reached: the figure; None where it was not measured.
        sign: "<=" where the target is a ceiling, ">=" where it is a floor.
        target: the figure to reach.
        unit: of both; "x" for a ratio.
        detail: what the ratio is made of, or why there is none.
        applies: False where this machine cannot reach the target whatever the code does; `detail` says why.
    """

    stage: str
    name: str
    reached: float | None
    sign: str
    target: float
    unit: str
    detail: str = ""
    applies: bool = True

    def met(self) -> bool | None:
        """Whether the target is reached; None where nothing was measured."""
        if self.reached is None or math.isnan(self.reached):
            return None
        return self.reached <= self.target if self.sign == "<=" else self.reached >= self.target

    def verdict(self) -> str:
        met = self.met()
        if met:
            return "reached"
        return "missed" if self.applies and met is not None else "not on this machine"

    def share(self) -> float | None:
        """How much of the target is used: 1 or less is reached, whichever the sign."""
        if not self.reached:
            return None if self.reached is None else 0.0
        return self.reached / self.target if self.sign == "<=" else self.target / self.reached

    def record(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        if values["reached"] is not None and not math.isfinite(values["reached"]):
            values["reached"] = None
        return values


def rounds(
    runs: dict[str, Callable[[], Any]], repeats: int, *, device: str = "cpu", warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of each run, `repeats` times, in turn, so that a busy machine hits all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(-1 if warm_up else 0, repeats):
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


def median(values: list[float]) -> float:
    return statistics.median(values)


def ratio(seconds: dict[str, list[float]], over: str, under: str) -> float:
    """Median over rounds of seconds[over] / seconds[under]: the two of a round met the same machine."""
    return statistics.median(a / b for a, b in zip(seconds[over], seconds[under], strict=True))


class AnonymousMemory:
    """A thread that watches this process's anonymous resident memory (RssAnon: what is not mapped from files).

    with AnonymousMemory() as memory: ...
    memory.peak, memory.before      bytes
    """

    def __enter__(self) -> AnonymousMemory:
        self.before = self.peak = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_bytes())

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, anonymous_bytes())


def anonymous_bytes() -> int:
    """RssAnon of this process; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)
