"""What the evaluations share: their flags, their lines on the screen and their `results.json`."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import flag, note_unused, say
from utils.errors import InputError, check_at_least, check_fraction, check_positive
from utils.files import ensure_folder, read_json, write_json
from utils.loading import BaseArguments

if TYPE_CHECKING:
    from utils.evaluation import MixtureScore

ADAPTIVE = "adaptive"


class Lambda(float):
    """The type of a flag that is the weight of what is mixed into the base: a plain float, or the word `ADAPTIVE` for
    one that differs from token to token. `check_lambda` checks the range."""

    def __new__(cls, text: str | float) -> Any:
        try:
            return ADAPTIVE if text == ADAPTIVE else float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 0 to 1, or {ADAPTIVE}") from None


@dataclass
class ScoreArguments(BaseArguments):
    """Which windows are scored, and with which mixtures."""

    dataset_name: str | None = flag(None, "windows folder made by utils/preprocess_dataset.py")
    max_eval_samples: int | None = flag(None, "use this many windows of the scored split at most")
    dstore_path: str | None = flag(None, "score this datastore (made with --save_logprob) in place of running the base")
    lmbda: list[Lambda] = flag(
        [0.25], "weight of what is mixed into the base: one or several numbers, or adaptive, or both"
    )
    knn_temp: list[float] = flag([1.0], "temperature of what is mixed into the base, one or several values")
    choose_on: str | None = flag(None, "results.json of another split: its best lambda and temperature are used")

    def check_scored(self, *, knn: bool) -> None:
        """Take lambda and temperature (`knn`: the kNN-LM's) from `choose_on`, and refuse what cannot be scored.

        Raises InputError.
        """
        if self.choose_on:
            lmbda, self.knn_temp = chosen(self.choose_on, knn=knn)
            adaptive = [ADAPTIVE] if ADAPTIVE in self.lmbda and ADAPTIVE not in lmbda else []
            self.lmbda = self.lmbda if knn and self.lmbda == [ADAPTIVE] else [*lmbda, *adaptive]
        check_grid(self.lmbda, self.knn_temp)
        check_at_least(1, self, "max_eval_samples")
        if not self.dstore_path:
            self.require_base()
        if self.dataset_name is None:
            raise InputError("--dataset_name: expected a windows folder made by utils/preprocess_dataset.py")


def check_lambda(flag: str, value: float | str) -> float | str:
    """Return `value` if it is in [0, 1] or `ADAPTIVE`; raises InputError naming `flag` otherwise."""
    return value if value == ADAPTIVE else check_fraction(flag, float(value))


def check_mixture(lmbda: float | str, knn_temp: float) -> None:
    """Check one `--lmbda` and one `--knn_temp`. Raises InputError; says where the temperature has no use."""
    check_lambda("--lmbda", lmbda)
    check_positive("--knn_temp", knn_temp)
    if lmbda == ADAPTIVE:
        note_unused(("knn_temp",), f"with --lmbda {ADAPTIVE}: the gate brings its own")


def lambda_text(value: float | str) -> str:
    """A lambda as a table shows it."""
    return value if isinstance(value, str) else f"{value:g}"


def check_grid(lmbda: Sequence[float | str], knn_temp: Sequence[float]) -> None:
    """Check the values of `--lmbda` (in [0, 1], or adaptive) and `--knn_temp` (above 0). Raises InputError."""
    for name, values, check in (("--lmbda", lmbda, check_lambda), ("--knn_temp", knn_temp, check_positive)):
        if not values:
            raise InputError(f"{name}: expected at least one value")
        for value in values:
            check(name, value)


def chosen(path: str, *, knn: bool) -> tuple[list[float | str], list[float]]:
    """Lambda (or `ADAPTIVE`) and temperature that were best in another split's results.json, of the kNN-LM (`knn`) or of
    a memory. Raises InputError."""
    results = read_json(path)
    if isinstance(results, dict) and "memory" in results and (results["memory"] is None) != knn:
        wanted = "train_base --knn" if knn else "evaluate_joint"
        raise InputError(f"--choose_on {path}: is of another mixture; name the results.json of {wanted}")
    if not isinstance(results, dict) or not isinstance(results.get("knn_temp"), (int, float)):
        raise InputError(f"--choose_on {path}: is not the results.json of a mixture's evaluation")
    return [Lambda(results["lmbda"])], [float(results["knn_temp"])]


def report_scores(
    score: MixtureScore,
    mixture: str | None,
    output_dir: str | Path,
    started: float,
    adaptive: dict[str, Any] | None = None,
    **about: Any,
) -> None:
    """Add up the processes' scores, print what they come to, and write `results.json` into `output_dir`.

    It holds perplexity, lmbda and knn_temp (of the best number, else of `adaptive`, else of the base), base_perplexity,
    tokens, grid (a row for each number and temperature), adaptive where it was scored, and `about`.

    Args:
        score: this process's sums.
        mixture: what was mixed into the base, as "kNN-LM"; None where the base was scored alone.
        started: `time.time()` at the command's start.
        adaptive: what came of a lambda that differs from token to token: perplexity, knn_temp, and how it was made.
        about: what was scored: `dataset` and `split`, and whatever else belongs into the results.

    Raises:
        InputError: no token was scored.
    """
    from accelerate import PartialState

    score.reduce()
    tokens = int(score.tokens.item())
    if tokens == 0:
        raise InputError(f"--dataset_name {about['dataset']}: split {about['split']} holds no token to predict")
    base = score.base_perplexity()
    say(f"base: perplexity {base:.4f} ({tokens} tokens, token-weighted)")
    mixtures: list[dict[str, Any]] = []
    if mixture is not None and score.lmbda:
        mixtures = [min(score.grid(), key=lambda row: row["perplexity"])]
    if adaptive:
        mixtures.append({"lmbda": ADAPTIVE, **{name: adaptive[name] for name in ("knn_temp", "perplexity")}})
    for row in mixtures:
        say(
            f"{mixture}: perplexity {row['perplexity']:.4f} at lambda {lambda_text(row['lmbda'])}, temperature "
            f"{row['knn_temp']:g} ({tokens} tokens, token-weighted)"
        )
    best = mixtures[0] if mixtures else {"lmbda": 0.0, "knn_temp": None, "perplexity": base}
    grid = [] if mixture is None else score.grid()
    if PartialState().is_main_process:
        about = {"adaptive": adaptive, **about} if adaptive else about
        results = {**best, "base_perplexity": base, "tokens": tokens, "grid": grid, **about}
        write_results(output_dir, results, started)


def versions() -> dict[str, str]:
    """Versions of what a figure depends on."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    faiss = ("faiss", "faiss-cpu", "faiss-gpu-cu12")
    for package in ("torch", "transformers", "datasets", "accelerate", *faiss, "numpy", "pyarrow"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def write_results(output_dir: str | Path, results: dict[str, Any], started: float) -> dict[str, Any]:
    """Write `results.json` into `output_dir`, with the seconds since `started` and the versions."""
    complete = {**results, "seconds": round(time.time() - started, 2), "versions": versions()}
    folder = ensure_folder(output_dir)
    write_json(folder / "results.json", complete)
    return complete
