"""Which base and which memory a demo shows, and opening them: the quickstart's, a preset's, or those of the flags.

Knows where the quickstart leaves its files; nothing of generating or drawing. Imports no torch at its top, so that
`--help` answers at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.cli import flag
from utils.errors import InputError, check_fraction, check_positive

DEFAULT_PROMPT = "The capital of France is"
DEFAULT_LAMBDA, DEFAULT_TEMPERATURE = 0.25, 1.0
QUICKSTART, MISTRAL = "quickstart", "mistral"


@dataclass
class Pair:
    """A base and its memory (folders or hub names), the mixture, a prompt that suits them, and what there is to look
    passages up in: datastore, index, windows folder (None where there is none)."""

    base: str
    memory: str
    lmbda: float = DEFAULT_LAMBDA
    knn_temp: float = DEFAULT_TEMPERATURE
    prompt: str = DEFAULT_PROMPT
    dstore_path: str | None = None
    index_path: str | None = None
    dataset_name: str | None = None


# The seed's example: a question that the base gets wrong and its published memory right.
MISTRAL_PAIR = Pair(
    base="mistralai/Mistral-7B-v0.3",
    memory="Rubin-Wei/MLPMemory-Mistral-wikipedia",
    lmbda=0.75,
    prompt="Answer the questions:\n\nQuestion: who sings i can't take my eyes off of you?? The answer is:",
)


@dataclass
class PairArguments:
    """Which base and memory, how they are mixed and held."""

    preset: str = flag(
        QUICKSTART,
        "quickstart: what scripts/quickstart.sh trained; mistral: Mistral-7B-v0.3 with its published Wikipedia memory",
    )
    quickstart: str = flag("results/quickstart", "the quickstart's output folder")
    model_name_or_path: str | None = flag(None, "base model: a folder or a hub name; default: the preset's")
    knn_generator_path: str | None = flag(None, "the MLP memory: a folder or a hub name; default: the preset's")
    prompt: str | None = flag(None, "text to continue; default: one of the preset's")
    lmbda: float | None = flag(None, "weight of the memory, from 0 to 1; default: the preset's best")
    knn_temp: float | None = flag(None, "temperature of the memory's softmax; default: the preset's best")
    layer_position: int = flag(-1, "decoder block whose MLP input is the memory's input (0 = first, -1 = last)")
    torch_dtype: str = flag("auto", "float32, bfloat16, float16, or auto: the fastest here")
    device_map: str | None = flag(None, "accelerate's placement of the base over several devices, such as auto")
    load_in_4bit: bool = flag(False, "hold the base in 4 bits (needs bitsandbytes)")
    load_in_8bit: bool = flag(False, "hold the base in 8 bits (needs bitsandbytes)")
    trust_remote_code: bool = flag(False, "run model code that comes with the base")


def choose_pair(arguments: PairArguments) -> Pair:
    """The preset's pair with what the flags say in its place, checked. Raises InputError; loads nothing."""
    if arguments.preset not in (QUICKSTART, MISTRAL):
        raise InputError(f"--preset {arguments.preset}: expected {QUICKSTART} or {MISTRAL}")
    if arguments.model_name_or_path and arguments.knn_generator_path:
        pair = Pair(arguments.model_name_or_path, arguments.knn_generator_path)
    elif arguments.preset == MISTRAL:
        pair = Pair(**vars(MISTRAL_PAIR))
    else:
        pair = quickstart_pair(Path(arguments.quickstart))
    pair.base = arguments.model_name_or_path or pair.base
    pair.memory = arguments.knn_generator_path or pair.memory
    for name in ("lmbda", "knn_temp", "prompt"):
        if getattr(arguments, name) is not None:
            setattr(pair, name, getattr(arguments, name))
    check_fraction("--lmbda", pair.lmbda)
    check_positive("--knn_temp", pair.knn_temp)
    check_prompt(pair.prompt)
    return pair


def check_prompt(prompt: str) -> str:
    """`prompt`, unless there is nothing in it. Raises InputError."""
    if not prompt.strip():
        raise InputError("--prompt: is empty, expected some text to continue")
    return prompt


def quickstart_pair(folder: Path) -> Pair:
    """What a quickstart left in `folder`, at its best lambda and temperature. Raises InputError when there is none."""
    work = folder / "work"
    memory = last_epoch(work / "memory")
    if memory is None:
        raise InputError(
            f"{folder}: holds no trained memory; make one with: bash scripts/quickstart.sh (minutes, without a GPU), "
            "or name your own with --model_name_or_path and --knn_generator_path"
        )
    results = _values(folder / "results.json")
    pair = Pair(
        base=_quickstart_base(work),
        memory=str(memory),
        lmbda=_number(results.get("lambda"), DEFAULT_LAMBDA),
        knn_temp=_number(results.get("knn_temp"), DEFAULT_TEMPERATURE),
    )
    examples = results.get("examples")
    if isinstance(examples, list) and examples and isinstance(examples[0], dict):
        pair.prompt = str(examples[0].get("prompt") or DEFAULT_PROMPT)
    dstores = sorted((work / "dstore").glob("dstore_*_train_*.arrow"))
    index, windows = work / "dstore" / "train.index", work / "windows"
    if dstores and index.exists() and windows.is_dir():
        pair.dstore_path, pair.index_path, pair.dataset_name = str(dstores[0]), str(index), str(windows)
    return pair


def last_epoch(folder: Path) -> Path | None:
    """The folder `epoch_N` of the highest N that holds a model, or None."""
    epochs = [
        (int(match[1]), path)
        for path in folder.glob("epoch_*")
        if (match := re.fullmatch(r"epoch_(\d{1,9})", path.name)) and any(path.rglob("config.json"))
    ]
    return max(epochs)[1] if epochs else None


def _quickstart_base(work: Path) -> str:
    """The base that the quickstart's memory belongs to: what the evaluation used, else the embedded one."""
    embedded = work / "embedded" / "model"
    model = _values(work / "joint_test" / "results.json").get("model")
    if not isinstance(model, str) or (embedded.is_dir() and not Path(model).exists()):
        return str(embedded)
    return model


def _values(path: Path) -> dict[str, Any]:
    """A JSON object from `path`; empty where there is no file. Raises InputError for a damaged one."""
    from utils.files import read_json

    values = read_json(path) if path.is_file() else {}
    return values if isinstance(values, dict) else {}


def _number(value: Any, default: float) -> float:
    return float(value) if isinstance(value, (int, float)) else default


def open_pair(pair: Pair, arguments: PairArguments) -> tuple[Any, Any]:
    """(joint model in evaluation mode, tokenizer).

    Raises:
        InputError: no model, tokenizer or memory where `pair` says, or a memory of another base.
    """
    from utils.base_model import load_base, load_tokenizer
    from utils.loading import open_memory_of, quiet_libraries, resolve_dtype

    quiet_libraries()
    dtype = resolve_dtype(arguments.torch_dtype)
    tokenizer = load_tokenizer(pair.base, required=True, trust_remote_code=arguments.trust_remote_code)
    base = load_base(
        pair.base,
        tokenizer=tokenizer,
        dtype=dtype,
        device_map=arguments.device_map,
        load_in_4bit=arguments.load_in_4bit,
        load_in_8bit=arguments.load_in_8bit,
        trust_remote_code=arguments.trust_remote_code,
    )
    from models import MLPMemory

    memory = open_memory_of(base, pair.memory, layer_position=arguments.layer_position, dtype=dtype)
    joint = MLPMemory(base, memory, pair.lmbda, pair.knn_temp, arguments.layer_position)
    return joint.eval(), tokenizer


def short_name(path: str) -> str:
    """A name for people: the last part of a hub name, the last two of a folder's path."""
    parts = Path(path).resolve().parts if Path(path).exists() else (path.rsplit("/", 1)[-1],)
    return "/".join(parts[-2:]) if len(parts) > 1 else parts[0]
