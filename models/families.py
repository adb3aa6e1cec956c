"""The memory's class for each model family, and opening memories and bases by name."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel

from .stack import MLPBlock, MLPStack, family_parts, find_memory

# Weight names of published memories: of the blocks, of the norm in a block, of the final norm.
NAMES = {"gpt2": ("h", "ln_1", "ln_f")}
OTHER_NAMES = ("layers", "input_layernorm", "norm")
BASE_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
VOLATILE = ("_name_or_path", "transformers_version")  # entries of a config.json that do not describe the model


def memory_class(config: PretrainedConfig) -> type[MLPStack]:
    """The memory's class for a base's (or a memory's) config: `GPT2MLPModel`, `LlamaMLPModel`, `Qwen2MLPModel`, …

    Raises ValueError when there is no memory stack for the family: its decoder blocks have no plain `.mlp`.
    """
    family_parts(config)
    return family_class(type(config))


@functools.cache
def family_class(config_class: type[PretrainedConfig]) -> type[MLPStack]:
    """The memory's class for a family, by the class of its configs."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    pretrained = next(each for each in model_class.__mro__ if PreTrainedModel in each.__bases__)
    family = config_class.__name__.removesuffix("Config")
    blocks_name, block_norm_name, norm_name = NAMES.get(config_class.model_type, OTHER_NAMES)
    block_class = type(f"{family}MLPBlock", (MLPBlock,), {"norm_name": block_norm_name, "__module__": __name__})
    attributes = {
        "config_class": config_class,
        "block_class": block_class,
        "blocks_name": blocks_name,
        "norm_name": norm_name,
        "_no_split_modules": [block_class.__name__],
        "__module__": __name__,
        "__doc__": f"The MLP memory of {family} bases.",
    }
    return type(f"{family}MLPModel", (MLPStack, pretrained), attributes)


def load_memory(
    path: str | os.PathLike, *, dtype: torch.dtype | None = torch.float32, device: torch.device | str | None = None
) -> MLPStack:
    """Load the memory at `path` (a folder, or a hub name), in eval mode. `dtype` None keeps the stored one.

    Raises ValueError as `memory_class` and `MLPStack.from_pretrained` do.
    """
    folder = find_memory(path)
    config = AutoConfig.from_pretrained(folder)
    return memory_class(config).from_pretrained(folder, config=config, dtype=dtype, device=device)


def base_id(path: str | os.PathLike, *, trust_remote_code: bool = False) -> str:
    """The id of a base model: SHA-256 of its config with the names and sizes of its weight files (on the hub: the commit).

    Raises OSError or ValueError where there is no readable config.
    """
    folder = Path(path)
    if folder.is_dir():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights: Any = sorted((file.name, file.stat().st_size) for kind in BASE_WEIGHTS for file in folder.glob(kind))
    else:
        loaded = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
        config, weights = loaded.to_dict(), loaded._commit_hash
    config = {name: value for name, value in config.items() if name not in VOLATILE}
    return hashlib.sha256(json.dumps([config, weights], sort_keys=True, default=str).encode()).hexdigest()
