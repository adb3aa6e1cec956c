"""Does the kNN teacher matter? The quickstart's memory with other training targets, several seeds each.

    python -m benchmarks.teacher --seeds 1 2 3      # results/teacher: results.json, table.md

Each memory is trained, given its gate and measured by the quickstart's own commands: with the kNN targets at several alphas,
and with smoothed labels in their place, which have the entropy and the number of tokens of each row's kNN target, but
tokens drawn from the whole text. An interrupted run continues.
"""

from __future__ import annotations

import math
import shlex
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.memories import run, web_windows
from benchmarks.page import line
from utils.cli import command, flag, parse, say
from utils.errors import InputError
from utils.files import ensure_folder, read_json, write_json

FIGURES = {
    "one_lambda": ("held-out, one lambda", "{:.2f}"),
    "adaptive": ("held-out, by token", "{:.2f}"),
    "recalled": ("beginnings continued", "{:.1%}"),
    "web": ("web text, by token", "{:.2f}"),
}


@dataclass
class TeacherArguments:
    """Which quickstart, which targets, which seeds."""

    quickstart: str = flag("results/quickstart", "folder of a finished quickstart")
    output_dir: str = flag("results/teacher", "folder of results.json, table.md and the memories")
    alphas: list[float] = flag([0.0, 0.2, 0.5], "weights of KL(kNN || memory) in the loss")
    smoothed: list[float] = flag([0.5], "weights of the divergence from smoothed labels")
    seeds: list[int] = flag([1, 2, 3], "of training and gate")


def main() -> None:
    (arguments,) = parse(TeacherArguments, description=__doc__.split("\n")[0])
    work, output = Path(arguments.quickstart) / "work", ensure_folder(arguments.output_dir)
    if not (work / "done" / "recall").exists():
        raise InputError(f"--quickstart {arguments.quickstart}: is not finished; run scripts/quickstart.sh")
    smoothed = output / "smoothed.arrow"
    if arguments.smoothed and not smoothed.exists():
        write_smoothed(work / "targets", smoothed)
    variants = {f"kNN, alpha {alpha:g}": (alpha, work / "targets") for alpha in arguments.alphas}
    variants |= {f"smoothed labels, alpha {alpha:g}": (alpha, smoothed) for alpha in arguments.smoothed}
    web, found = web_windows(work, output), {}
    for seed in arguments.seeds:
        for name, (alpha, targets) in variants.items():
            folder = ensure_folder(output / f"{targets.stem}-{alpha:g}-{seed}")
            if not (folder / "figures.json").exists():
                write_json(folder / "figures.json", measured(work, folder, alpha, targets, seed, web))
            found.setdefault(name, {})[seed] = read_json(folder / "figures.json")
            write_json(output / "results.json", {"variants": found})
            text = table(found)
            (output / "table.md").write_text(text + "\n", encoding="utf-8")
            say(f"\n{text}\n")


def entropies(id_cnt: np.ndarray, prob: np.ndarray) -> np.ndarray:
    """Entropy (rows,) float64, in nats, of ragged distributions: `id_cnt` (rows,) entries each of `prob` (entries,)."""
    prob = prob.astype(np.float64)
    terms = -prob * np.log(np.maximum(prob, 1e-300))
    return np.add.reduceat(terms, np.concatenate([[0], np.cumsum(id_cnt)[:-1]]))


def spread_of(entropy: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The mass (rows,) that leaves the label and is shared equally by `others` (rows,) tokens, for each entropy (rows,)."""
    low, high = np.zeros(len(entropy)), others / (others + 1.0)
    for _ in range(60):
        mass = (low + high) / 2
        share = mass / np.maximum(others, 1)
        reached = -(1 - mass) * np.log1p(-mass) - mass * np.log(np.maximum(share, 1e-300))
        low, high = np.where(reached < entropy, mass, low), np.where(reached < entropy, high, mass)
    return low


def write_smoothed(targets: Path, path: Path, seed: int = 0) -> None:
    """Targets with the label in front and tokens of the text, drawn by frequency, in place of the neighbours'."""
    from knn_utils.datastore import KNNTargets, TargetRows, targets_schema
    from knn_utils.parts import targets_batch, write_stream

    store = KNNTargets.open(targets)
    rows, random = store.read(0), np.random.default_rng(seed)
    others = rows.id_cnt - 1
    mass = spread_of(entropies(rows.id_cnt, rows.prob), others)
    token_id = random.choice(rows.label, len(rows.token_id))
    prob = np.repeat(mass / np.maximum(others, 1), rows.id_cnt)
    first = np.concatenate([[0], np.cumsum(rows.id_cnt)[:-1]])
    token_id[first], prob[first] = rows.label, 1 - mass
    smoothed = TargetRows(rows.id_cnt, token_id.astype(np.int32), prob.astype(np.float16), rows.label)
    write_stream(path, targets_schema(distance=False), [targets_batch(smoothed)])


def measured(work: Path, folder: Path, alpha: float, targets: Path, seed: int, web: Path) -> dict[str, float]:
    """Train a memory and its gate; its figures."""

    def again(stage: str, **changed: object) -> None:
        words = shlex.split((work / "done" / stage).read_text())[1:]
        for name, value in changed.items():
            words[words.index(f"--{name}") + 1] = str(value)
        run(sys.executable, *words)

    again("train the memory", output_dir=folder / "memory", knn_save_path=targets, alpha=f"{alpha:g}", seed=f"{seed}")
    memory = folder / "memory" / read_json(folder / "memory" / "training.json")["checkpoint"]
    chosen = {"knn_generator_path": memory, "choose_on": folder / "joint_validation" / "results.json"}
    again("joint validation", knn_generator_path=memory, output_dir=folder / "joint_validation")
    again("gate", knn_generator_path=memory, seed=seed)
    again("joint test", **chosen, output_dir=folder / "joint_test")
    again("recall", **chosen, output_dir=folder / "recall")
    again("joint test", **chosen, output_dir=folder / "joint_web", dataset_name=web, dataset_split_name="train")
    test, recall = read_json(folder / "joint_test" / "results.json"), read_json(folder / "recall" / "results.json")
    return {
        "one_lambda": test["perplexity"],
        "adaptive": test["adaptive"]["perplexity"],
        "recalled": recall["recall_memory"],
        "web": read_json(folder / "joint_web" / "results.json")["adaptive"]["perplexity"],
    }


def table(found: dict[str, dict[int, dict[str, float]]]) -> str:
    """A row for each variant: the mean over seeds and its standard error."""
    header = ("targets", "seeds", *(title for title, _ in FIGURES.values()))
    rows = [line(*header), line(*["---"] * len(header))]
    for name, by_seed in found.items():
        cells: list[Any] = []
        for key, (_, style) in FIGURES.items():
            values = [figures[key] for figures in by_seed.values()]
            error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
            cells.append(f"{style.format(statistics.fmean(values))} ± {style.format(error)}")
        rows.append(line(name, str(len(by_seed)), *cells))
    return "\n".join(rows)


if __name__ == "__main__":
    command(main)()
