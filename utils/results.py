"""What the evaluations share: their flags, the lines they print and their `results.json`."""

from __future__ import annotations

import math
import platform
import shutil
import subprocess
import time
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from utils.artefact import Made, record_path
from utils.cli import flag, required, say
from utils.errors import InputError, check_at_least, check_fraction, check_positive
from utils.files import atomic, ensure_folder, read_json, remove, write_json
from utils.loading import BaseArguments

if TYPE_CHECKING:
    from utils.evaluation import MixtureScore

ADAPTIVE = "adaptive"
FAISS = "faiss", "faiss-cpu", "faiss-gpu"
PACKAGES = "torch", "transformers", "datasets", "accelerate", *FAISS, "numpy", "pyarrow"


class Lambda(float):
    """The type of a flag for the weight of what is mixed into the base: gives a float, a list of them from "0.2,0.1" (one
    for each memory), or `ADAPTIVE` for weights that differ from token to token. `check_lambda` checks the range."""

    def __new__(cls, text: str | float) -> Any:
        if text == ADAPTIVE:
            return ADAPTIVE
        return [float(each) for each in text.split(",")] if isinstance(text, str) and "," in text else float(text)


def check_lambda(flag: str, value: float | list[float] | str, memories: int = 1) -> None:
    """Raises InputError naming `flag` unless `value` is `ADAPTIVE` or fits so many memories (`models.mixture`)."""
    if value != ADAPTIVE:
        parts = value if isinstance(value, list) else [value]
        check_fraction(flag, math.fsum(map(float, parts)))
        if min(parts) < 0 or (isinstance(value, list) and len(parts) != memories):
            raise InputError(
                f"{flag} {lambda_text(value)}: expected a weight from 0 to 1 for each of {memories} memories"
            )


def lambda_text(value: float | list[float] | str) -> str:
    """A lambda as a table shows it, and as a command takes it."""
    return (
        value
        if isinstance(value, str)
        else ",".join(f"{each:g}" for each in (value if isinstance(value, list) else [value]))
    )


@dataclass(kw_only=True)
class ScoreArguments(BaseArguments):
    """Which windows are scored, and with which mixtures. Subclasses add the flag of the temperature."""

    temperature_name: ClassVar[str]  # memory_temp or knn_temp: the flag, and the key in results.json

    dataset_name: str = required("windows folder made by utils/preprocess_dataset.py")
    max_eval_samples: int | None = flag(None, "score at most this many windows")
    dstore_path: str | None = flag(None, "score the rows of this datastore (made with --save_logprob); no base is run")
    lmbda: list[Lambda] = flag([0.25], "weight of what is mixed into the base: numbers from 0 to 1, adaptive, or both")
    choose_on: str | None = flag(None, "results.json of another split: use its best lambda and temperature")

    def check_scored(self, memories: int = 1) -> None:
        """Take lambda and temperature from `choose_on`, and check what is scored. Raises InputError."""
        name = self.temperature_name
        if self.choose_on:
            lmbda, temperatures = chosen(self.choose_on, knn=name == "knn_temp")
            asked = [ADAPTIVE] if ADAPTIVE in self.lmbda and ADAPTIVE not in lmbda else []
            self.lmbda = [*lmbda, *asked]
            setattr(self, name, temperatures)
        for value in self.lmbda:
            check_lambda("--lmbda", value, memories)
        for value in getattr(self, name):
            check_positive(f"--{name}", value)
        check_at_least(1, self, "max_eval_samples")


def chosen(path: str, *, knn: bool) -> tuple[list[float | str], list[float]]:
    """Best lambda (or `ADAPTIVE`) and temperature in a results.json of the kNN-LM (`knn`) or of a memory, as lists of one.

    Raises InputError.
    """
    results, temperature = read_json(path), "knn_temp" if knn else "memory_temp"
    if results.get(temperature) is None:
        command = "train_base --knn" if knn else "evaluate_joint"
        raise InputError(f"--choose_on {path}: has no {temperature}; expected the results.json of {command}")
    return [results["lmbda"]], [results[temperature]]


def report_scores(
    score: MixtureScore,
    output_dir: str | Path,
    about: dict[str, Any],
    made_from: dict[str, str | None],
    *,
    mixture: str | None = None,
    adaptive: dict[str, Any] | None = None,
    started: float,
) -> None:
    """Add up the processes' scores, print the perplexities, and write `results.json` into `output_dir`.

    The results hold perplexity, lmbda and temperature (of the best fixed mixture, else of the adaptive one, else of the
    base), base_perplexity, tokens, grid (a row for each fixed mixture), adaptive, and `about`.

    Args:
        about: what was scored: model, dataset, split and so on; made_from: the ids of base, windows and so on.
        mixture: what was mixed into the base, as "kNN-LM"; None where the base was scored alone.
        adaptive: settings of the adaptive lambda, with its temperature, if there is one.

    Raises:
        InputError: no token to score, log-probabilities of the base that are not finite, or of a mixture that are NaN.
    """
    from accelerate import PartialState

    score.reduce()
    tokens, base, name = int(score.tokens), score.base_perplexity(), score.temperature_name
    if tokens == 0:
        raise InputError(f"--dataset_name {about['dataset']}: split {about['split']} holds no token to predict")
    if not math.isfinite(base):
        raise InputError(f"base {about['model']}: its log-probabilities are not finite; try --torch_dtype float32")
    say(f"base: perplexity {base:.4f} ({tokens} tokens, token-weighted)")
    grid = score.grid() if mixture else []
    if any(math.isnan(row["perplexity"]) for row in grid):
        raise InputError(f"{mixture} {about['memory'] or ''}: gives NaN; try --torch_dtype float32")
    best = [min(grid, key=lambda row: row["perplexity"])] if grid else []
    if adaptive:
        about = {**about, "adaptive": {**score.adaptive(), **adaptive}}
        best.append({"lmbda": ADAPTIVE, **{key: about["adaptive"][key] for key in (name, "perplexity")}})
    for row in best:
        setting = f"lambda {lambda_text(row['lmbda'])}, temperature {row[name]:g}"
        say(f"{mixture}: perplexity {row['perplexity']:.4f} at {setting} ({tokens} tokens, token-weighted)")
    best.append({"lmbda": 0.0, name: None, "perplexity": base})
    if PartialState().is_main_process:
        results = {**best[0], "base_perplexity": base, "tokens": tokens, "grid": grid, **about}
        write_results(output_dir, results, started, Made("results", about, tokens, made_from))


def write_results(
    output_dir: str | Path, results: dict[str, Any], started: float, made: Made | None = None
) -> dict[str, Any]:
    """Write results.json into `output_dir`, with the seconds since `started` and the versions; then its record `made`."""
    complete = {**results, "seconds": round(time.time() - started, 2), "versions": versions()}
    path = ensure_folder(output_dir) / "results.json"
    remove(record_path(path))
    write_json(path, complete)
    if made:
        with atomic(record_path(path)) as temporary:
            temporary.write_text(made.text)
    return complete


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on, and the commit of a git checkout."""
    found = {package.name: package.version for package in distributions() if package.name in PACKAGES}
    root = Path(__file__).parent.parent
    if (root / ".git").exists() and shutil.which("git"):
        git = ("git", "-C", root, "describe", "--always", "--dirty", "--exclude", "*")
        found["commit"] = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {"python": platform.python_version(), **found}
