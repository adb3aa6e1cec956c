"""Which base and memory a demo shows: the quickstart's, those of a preset, or those of the flags."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from utils.cli import command, flag
from utils.errors import InputError
from utils.files import read_json
from utils.loading import BaseArguments, quiet_libraries
from utils.results import Lambda


@dataclass
class Pair:
    """A base and its memories (folders or hub names), their mixture, and a prompt.

    `lmbda` is a number, one for each memory, or "adaptive". `passages`: paths of datastore, index and windows for passages, or None.
    """

    model_name_or_path: str
    knn_generator_path: list[str]
    lmbda: float | list[float] | str = 0.25
    memory_temp: float = 1.0
    prompt: str = "The capital of France is"
    max_new_tokens: int = 40
    passages: tuple[str, str, str] | None = None


@dataclass
class PairArguments(BaseArguments):
    """Base, memory, their mixture, and the prompt; what is not given comes from the preset."""

    preset: Literal["quickstart", "mistral"] = flag(
        "quickstart",
        "quickstart: the memory trained by scripts/quickstart.sh; mistral: Mistral-7B-v0.3, Wikipedia memory",
    )
    quickstart: str = flag("results/quickstart", "output folder of scripts/quickstart.sh")
    model_name_or_path: str | None = flag(None, "base model: a folder or a hub name; if not given, the preset's")
    knn_generator_path: list[str] | None = flag(
        None, "MLP memory, or several: folders or hub names; if not given, the preset's"
    )
    prompt: str | None = flag(None, "text to continue; if not given, the preset's")
    lmbda: Lambda | None = flag(None, "weight of the memory, 0 to 1, or adaptive; if not given, the preset's")
    memory_temp: float | None = field(
        default=None,
        metadata={"help": "softmax temperature of the memory; if not given, the preset's", "aliases": ["--knn_temp"]},
    )
    max_new_tokens: int | None = flag(None, "maximum number of new tokens; if not given, the preset's")
    torch_dtype: str = flag("auto", "float32, bfloat16, float16, or auto (the fastest on this machine)")


@dataclass
class Sampling:
    """How tokens are sampled."""

    temperature: float = flag(0.0, "sampling temperature; 0 for greedy decoding")
    top_p: float = flag(1.0, "sample from the most probable tokens that together reach this probability")
    seed: int = flag(42, "random seed; both continuations use the same random numbers")


def choose_pair(arguments: PairArguments) -> Pair:
    """The preset's pair, overridden by the flags; loads no model. Raises InputError without a quickstart's memory."""
    if arguments.model_name_or_path and arguments.knn_generator_path:
        pair = Pair(arguments.model_name_or_path, arguments.knn_generator_path)
    elif arguments.preset == "mistral":
        prompt = "Answer the questions:\n\nQuestion: who sings i can't take my eyes off of you?? The answer is:"
        pair = Pair("mistralai/Mistral-7B-v0.3", ["Rubin-Wei/MLPMemory-Mistral-wikipedia"], 0.75, 1.0, prompt, 20)
    else:
        pair = quickstart_pair(Path(arguments.quickstart))
    for name in vars(pair):
        if getattr(arguments, name, None) is not None:
            setattr(pair, name, getattr(arguments, name))
    return pair


def quickstart_pair(folder: Path) -> Pair:
    """The last memory of a quickstart at its best lambda and temperature. Raises InputError if there is none."""
    work = folder / "work"
    # The folder of an unfinished epoch has no config yet.
    epochs = [path for path in (work / "memory").glob("epoch_*") if any(path.rglob("config.json"))]
    if not epochs:
        remedy = "run scripts/quickstart.sh, or give --model_name_or_path and --knn_generator_path"
        raise InputError(f"{folder}: contains no trained memory; {remedy}")
    memory = max(epochs, key=lambda path: int(path.name.removeprefix("epoch_")))
    pair = Pair(str(work / "embedded" / "model"), [str(memory)])
    if (evaluated := work / "joint_test" / "results.json").exists():
        pair.model_name_or_path = read_json(evaluated)["model"]  # another one if MODEL was set
    if (folder / "results.json").exists():
        results = read_json(folder / "results.json")
        pair.lmbda, pair.memory_temp = results["lambda"], results["memory_temp"]
        pair.prompt = next((example["prompt"] for example in results["examples"]), pair.prompt)
    files = [*work.glob("dstore/dstore_*_train_*.arrow"), work / "dstore" / "train.index", work / "windows"]
    if len(files) == 3 and all(path.exists() for path in files):
        pair.passages = tuple(map(str, files))
    return pair


def open_pair(pair: Pair, arguments: PairArguments) -> tuple[Any, Any]:
    """(`models.MLPMemory` in evaluation mode, tokenizer). With a gate, `pair.memory_temp` becomes the gate's.

    Raises InputError if there is no base, tokenizer, memory or gate, or the memory is for another base.
    """
    from utils.memories import open_joint

    quiet_libraries()
    arguments.model_name_or_path = pair.model_name_or_path
    tokenizer = arguments.open_tokenizer(required=True)
    joint = open_joint(arguments, pair.knn_generator_path, arguments.open_base(tokenizer), pair.lmbda, pair.memory_temp)
    pair.memory_temp = joint.knn_temp
    return joint, tokenizer


def short_name(*paths: str) -> str:
    """Hub names, or the last two parts of folders' paths."""
    return ", ".join("/".join(Path(path).parts[-2:]) for path in paths)


def main() -> None:
    """Print base, memory, lambda and memory temperature of a quickstart's folder, one per line, for scripts."""
    pair = quickstart_pair(Path(sys.argv[1]))
    print(pair.model_name_or_path, *pair.knn_generator_path, pair.lmbda, pair.memory_temp, sep="\n")


if __name__ == "__main__":
    command(main)()
