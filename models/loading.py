"""Reads a memory from a folder or the hub, in every layout it was ever published or saved in.

Layouts: `config.json` (the base's, with the layer count changed) beside `model.safetensors`, sharded safetensors with
an index, or a `.bin` of tensors; the original trainers' `epoch_n/` and `epoch_n/knn_generator/`, where a joint state
(keys `base_lm.*` and `knn_generator.*`) may stand beside the memory alone; a folder of `MLPMemory.save_pretrained`.
Weights are read strictly: what is missing, unexpected or of another shape is an error. Nothing is unpickled but
tensors. Knows nothing of the base's weights.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, PretrainedConfig

from models.stack import MLPStack, fit_layer_lists, layer_count_name

MEMORY_PREFIX = "knn_generator."
BASE_PREFIX = "base_lm."
SUBFOLDERS = ("knn_generator", "memory")
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def load_memory(
    path: str | os.PathLike,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str | None = None,
) -> MLPStack:
    """Load the memory at `path` (a folder, or a hub name), in eval mode.

    `dtype` None keeps the stored one. Raises ValueError, in one line, when there is no memory, several (their names
    are listed), a family without a memory stack, weights that do not fit the config, or a `.bin` with more than
    tensors in it.
    """
    from models import memory_class

    folder = find_memory(path)
    config = read_memory_config(folder)
    state = read_memory_state(folder)
    stack_class = memory_class(config)
    transform = state.get("embedding_transform.weight")  # (hidden, input_dim)
    input_dim = transform.shape[1] if transform is not None and transform.ndim == 2 else None
    check_layer_count(folder, config, state, stack_class.blocks_name)
    try:
        with torch.device("meta"):
            memory = stack_class(config, input_dim=input_dim)
    except (RuntimeError, TypeError, OverflowError, AttributeError, KeyError) as error:
        raise ValueError(f"{folder}: its config.json makes no memory ({' '.join(str(error).split())[:200]})") from None
    check_weights(folder, memory, state)
    target = torch.device(device) if device is not None else None
    for name, value in state.items():
        # A copy, also where nothing changes: the file may be written over while the memory lives.
        state[name] = value.to(device=target, dtype=dtype if value.is_floating_point() else None, copy=True)
    memory.load_state_dict(state, strict=True, assign=True)
    if dtype is not None:
        memory.config.dtype = dtype
    memory.name_or_path = memory.config.name_or_path = str(path)
    return memory.eval()


def check_layer_count(folder: Path, config: PretrainedConfig, state: dict[str, torch.Tensor], blocks_name: str) -> None:
    """Compare the config's layer count with the weights', before anything of that size is made. Raises ValueError."""
    pattern = re.compile(rf"{re.escape(blocks_name)}\.(\d{{1,9}})\.")
    stored = len({match[1] for name in state if (match := pattern.match(name))})
    if stored and config.num_hidden_layers != stored:
        raise ValueError(
            f"{folder}: config.json says {config.num_hidden_layers} layers, the weights have {stored}; expected a memory "
            "with the config it was saved with"
        )
    if not stored:
        raise ValueError(
            f"{folder}: its weights are none of an MLP memory ({_some(sorted(state))}); expected {blocks_name}.0.*, … "
        )


def check_weights(folder: Path, memory: MLPStack, state: dict[str, torch.Tensor]) -> None:
    """Compare stored weights with what the config asks for. Raises ValueError naming the first few that differ."""
    expected = memory.state_dict()
    complaints = []
    if missing := sorted(expected.keys() - state.keys()):
        complaints.append(f"missing {_some(missing)}")
    if unexpected := sorted(state.keys() - expected.keys()):
        complaints.append(f"not expected {_some(unexpected)}")
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    if shapes:
        complaints.append(f"of another shape {_some(shapes)}")
    if complaints:
        raise ValueError(
            f"{folder}: the weights do not fit its config.json as a {type(memory).__name__}: {'; '.join(complaints)}; "
            "expected an MLP memory (not the base model) with the config it was saved with"
        )


def _some(names: list[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def find_memory(path: str | os.PathLike) -> Path:
    """The folder in or below `path` that holds the memory's config and weights. Raises ValueError as `load_memory`."""
    folder = Path(path)
    if folder.is_file():
        raise ValueError(f"{path}: is a file, expected the folder that holds a memory's config.json and weights")
    if not folder.is_dir():
        folder = download(str(path))
    found = list(_memories(folder))
    if not found:
        raise ValueError(
            f"{path}: holds no MLP memory; expected config.json beside model.safetensors or pytorch_model.bin"
        )
    if len(found) > 1:
        names = ", ".join(sorted((str(each.relative_to(folder)) for each in found), key=_natural))
        raise ValueError(f"{path}: holds several memories ({names}); name one of them")
    return found[0]


def _memories(folder: Path) -> Iterator[Path]:
    """Memory folders at `folder`, in a known subfolder of it, or one level below."""
    if (here := _memory_at(folder)) is not None:
        yield here
        return
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.name.startswith(".") and (below := _memory_at(child)) is not None:
            yield below


def _memory_at(folder: Path) -> Path | None:
    if (folder / "config.json").is_file() and any((folder / name).is_file() for name in WEIGHT_FILES):
        return folder
    for name in SUBFOLDERS:
        inner = folder / name
        if (inner / "config.json").is_file() and any((inner / each).is_file() for each in WEIGHT_FILES):
            return inner
    return None


def _natural(name: str) -> tuple:
    """Sort key that puts epoch_2 before epoch_10."""
    digits = "".join(character for character in name if character.isdigit())
    return (int(digits) if digits else -1, name)


def download(name: str, revision: str | None = None) -> Path:
    """The local copy of a hub repository's config and weights. Raises ValueError when it cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    complaint = f"{name}: no such folder, and no model of that name could be fetched from the hub"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"{name}: no such folder")
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
        if not list(_memories(folder)):
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.bin"]))
        return folder
    except (HFValidationError, OSError) as error:
        raise ValueError(f"{complaint} ({type(error).__name__})") from None


def read_memory_config(folder: Path) -> PretrainedConfig:
    """The config of the memory in `folder`. Raises ValueError when it is not one of a known family."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: is not readable JSON ({error})") from None
    model_type = values.get("model_type") if isinstance(values, dict) else None
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(f"{path}: model_type {model_type!r} is no model family that transformers knows")
    config_class = CONFIG_MAPPING[model_type]
    name = layer_count_name(config_class)
    layers = values.get(name, values.get("num_hidden_layers"))
    if isinstance(layers, int) and layers > 0:
        fit_layer_lists(values, layers)
    try:
        return config_class.from_dict(values)
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: is no usable {model_type} config ({' '.join(str(error).split())})") from None


def read_memory_state(folder: Path) -> dict[str, torch.Tensor]:
    """The memory's weights by name; those of a joint state come without their prefix and without the base's."""
    sources = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    for source in sources:
        state = _read_index(source) if source.name.endswith(".index.json") else _read_file(source)
        if state:
            return state
    raise ValueError(f"{folder}: its weight files hold no weights of a memory, only a base model's ({BASE_PREFIX}*)")


def _read_index(path: Path) -> dict[str, torch.Tensor]:
    """Weights of a sharded checkpoint. Raises ValueError when the index names what is not there."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: is no index of weight files ({type(error).__name__})") from None
    state: dict[str, torch.Tensor] = {}
    for name in files:
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix not in (".safetensors", ".bin"):
            raise ValueError(f"{path}: names {name!r}, expected a weight file of the same folder")
        if not (path.parent / name).is_file():
            raise ValueError(f"{path}: names {name}, which is not there; fetch the checkpoint again")
        state.update(_read_file(path.parent / name))
    return state


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    """Weights of one file, mapped from disk where the format allows it; the base's part of a joint state is not read."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                return {target: file.get_tensor(name) for name, target in _wanted(names)}
        except SafetensorError as error:
            raise ValueError(f"{path}: is no whole safetensors file ({error}); fetch it again") from None
    state = _read_tensors(path)
    return {target: state[name] for name, target in _wanted(list(state))}


def _wanted(names: list[str]) -> Iterator[tuple[str, str]]:
    """(stored name, weight name) of the memory's weights among `names`."""
    joint = any(name.startswith((MEMORY_PREFIX, BASE_PREFIX)) for name in names)
    for name in names:
        if not joint:
            yield name, name
        elif name.startswith(MEMORY_PREFIX):
            yield name, name.removeprefix(MEMORY_PREFIX)


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """A `.bin` checkpoint that is a dict of tensors and nothing else; ValueError otherwise, before any of it runs."""
    refusal = f"{path}: holds more than tensors; it is not read, convert it to safetensors where you trust it"
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError:
        raise ValueError(refusal) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: is no whole checkpoint ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise ValueError(refusal)
    return state


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK"
