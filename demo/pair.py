"""What a demo is asked for: which base and memory (the quickstart's, a preset's, the flags'), how tokens are chosen."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.cli import command, flag
from utils.errors import InputError, check_positive
from utils.loading import BaseArguments
from utils.results import Lambda, check_lambda

QUICKSTART, MISTRAL = "quickstart", "mistral"


@dataclass
class Pair:
    """A base and its memory (folders or hub names), the mixture (lambda may be "adaptive"), a prompt that suits them, and
    what there is to look passages up in: datastore, index, windows folder (None where there is none)."""

    base: str
    memory: str
    lmbda: float | str = 0.25
    knn_temp: float = 1.0
    prompt: str = "The capital of France is"
    dstore_path: str | None = None
    index_path: str | None = None
    dataset_name: str | None = None


@dataclass
class PairArguments(BaseArguments):
    """Which base and memory, how they are mixed and held."""

    preset: str = flag(
        QUICKSTART,
        "quickstart: what scripts/quickstart.sh trained; mistral: Mistral-7B-v0.3 with its published Wikipedia memory",
    )
    quickstart: str = flag("results/quickstart", "the quickstart's output folder")
    model_name_or_path: str | None = flag(None, "base model: a folder or a hub name; default: the preset's")
    knn_generator_path: str | None = flag(None, "the MLP memory: a folder or a hub name; default: the preset's")
    prompt: str | None = flag(None, "text to continue; default: one of the preset's")
    lmbda: Lambda | None = flag(
        None, "weight of the memory: 0 to 1, or adaptive (by the memory's gate); default: the preset's best"
    )
    knn_temp: float | None = flag(None, "temperature of the memory's softmax; default: the preset's best")
    torch_dtype: str = flag("auto", "float32, bfloat16, float16, or auto: the fastest here")


@dataclass
class Sampling:
    """How tokens are chosen."""

    max_new_tokens: int = flag(40, "new tokens at most")
    temperature: float = flag(0.0, "sampling temperature; 0 takes the most probable token each time")
    top_p: float = flag(1.0, "sample from the most probable tokens that reach this probability together")
    num_beams: int = flag(1, "beams of a beam search; above 1 nothing is shown before it ends")
    seed: int = flag(42, "random seed of both continuations")

    def check(self) -> None:
        """Raises InputError naming the flag, its value and what is expected."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"--temperature {self.temperature:g}: expected 0 (greedy) or a number above 0")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top_p {self.top_p}: expected a number above 0, at most 1")
        if not 0 <= self.seed < 1 << 63:
            raise InputError(f"--seed {self.seed}: expected a whole number from 0")
        check_positive("--max_new_tokens", self.max_new_tokens)
        check_positive("--num_beams", self.num_beams)

    def options(self) -> dict[str, Any]:
        """The same as arguments of `generate`, in place of whatever the model's own settings say."""
        sampled = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        greedy = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
        return {**(sampled if self.temperature > 0 else greedy), "num_beams": self.num_beams}


def choose_pair(arguments: PairArguments) -> Pair:
    """The preset's pair with what the flags say in its place, checked. Raises InputError; loads nothing."""
    if arguments.preset not in (QUICKSTART, MISTRAL):
        raise InputError(f"--preset {arguments.preset}: expected {QUICKSTART} or {MISTRAL}")
    if arguments.model_name_or_path and arguments.knn_generator_path:
        pair = Pair(arguments.model_name_or_path, arguments.knn_generator_path)
    elif arguments.preset == MISTRAL:
        # The original's example: a question that the base gets wrong and its published memory right.
        question = "who sings i can't take my eyes off of you?"
        pair = Pair("mistralai/Mistral-7B-v0.3", "Rubin-Wei/MLPMemory-Mistral-wikipedia", lmbda=0.75)
        pair.prompt = f"Answer the questions:\n\nQuestion: {question}? The answer is:"
    else:
        pair = quickstart_pair(Path(arguments.quickstart))
    pair.base = arguments.model_name_or_path or pair.base
    pair.memory = arguments.knn_generator_path or pair.memory
    for name in ("lmbda", "knn_temp", "prompt"):
        if getattr(arguments, name) is not None:
            setattr(pair, name, getattr(arguments, name))
    check_lambda("--lmbda", pair.lmbda)
    check_positive("--knn_temp", pair.knn_temp)
    if not pair.prompt.strip():
        raise InputError("--prompt: is empty, expected some text to continue")
    return pair


def quickstart_pair(folder: Path) -> Pair:
    """What a quickstart left in `folder`, at its best lambda and temperature. Raises InputError when there is none."""
    from utils.files import read_json

    work = folder / "work"
    # An epoch's folder without a config was never finished.
    epochs = [path for path in (work / "memory").glob("epoch_*") if any(path.rglob("config.json"))]
    if not epochs:
        told = "make one with: bash scripts/quickstart.sh, or give --model_name_or_path and --knn_generator_path"
        raise InputError(f"{folder}: holds no trained memory; {told}")
    # The base is what the evaluation used, else (or where the folder has been moved) the embedded one.
    embedded, joint_test = work / "embedded" / "model", work / "joint_test" / "results.json"
    base = read_json(joint_test)["model"] if joint_test.exists() else str(embedded)
    if embedded.is_dir() and not Path(base).exists():
        base = str(embedded)
    memory = max(epochs, key=lambda path: int(path.name.removeprefix("epoch_")))
    pair = Pair(base, str(memory))
    if (folder / "results.json").exists():
        results = read_json(folder / "results.json")
        pair.lmbda, pair.knn_temp = results["lambda"], results["knn_temp"]
        pair.prompt = next((example["prompt"] for example in results["examples"]), pair.prompt)
    dstore = next((work / "dstore").glob("dstore_*_train_*.arrow"), None)
    index, windows = work / "dstore" / "train.index", work / "windows"
    if dstore is not None and index.exists() and windows.is_dir():
        pair.dstore_path, pair.index_path, pair.dataset_name = str(dstore), str(index), str(windows)
    return pair


def open_pair(pair: Pair, arguments: PairArguments) -> tuple[Any, Any]:
    """(joint model in evaluation mode, tokenizer); the pair takes the temperature that the model has: a gate brings its own.

    Raises:
        InputError: no model, tokenizer or memory where `pair` says, a memory of another base, or "adaptive" without a gate.
    """
    from utils.loading import quiet_libraries
    from utils.memories import open_joint

    quiet_libraries()
    arguments.model_name_or_path = pair.base
    tokenizer = arguments.open_tokenizer(required=True)
    base = arguments.open_base(tokenizer)
    joint = open_joint(arguments, pair.memory, base, pair.lmbda, pair.knn_temp)
    pair.knn_temp = joint.knn_temp
    return joint, tokenizer


def short_name(path: str) -> str:
    """A name for people: the last part of a hub name, the last two of a folder's path."""
    parts = Path(path).resolve().parts if Path(path).exists() else (path.rsplit("/", 1)[-1],)
    return "/".join(parts[-2:])


def main() -> None:
    """Print the quickstart's base, memory, lambda and temperature, a line each: for scripts."""
    if len(sys.argv) != 2:
        raise InputError("demo.pair: expected one argument, a quickstart's folder (results/quickstart)")
    pair = quickstart_pair(Path(sys.argv[1]))
    print(pair.base, pair.memory, pair.lmbda, pair.knn_temp, sep="\n")


if __name__ == "__main__":
    command(main)()
