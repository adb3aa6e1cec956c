"""Which stack a family's memory is, and opening a memory whose family only its folder knows."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from .stack import MLPStack, find_memory, read_memory_config

BASE_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
VOLATILE = ("_name_or_path", "transformers_version")  # entries of a config.json that do not describe the model


def memory_class(config: PretrainedConfig) -> type[MLPStack]:
    """The stack class for a base's (or a memory's) config: the family's own, else the generic one for its family.

    Raises ValueError when the family's blocks have no `.mlp`.
    """
    if config.model_type == "gpt2":
        from .mlpGPT2 import GPT2MLPModel

        return GPT2MLPModel
    if config.model_type == "llama":
        from .mlpLlama import LlamaMLPModel

        return LlamaMLPModel
    if config.model_type == "mistral":
        from .mlpMistral import MistralMLPModel

        return MistralMLPModel
    from .mlpGeneric import generic_class

    return generic_class(config)


def load_memory(
    path: str | os.PathLike, *, dtype: torch.dtype | None = torch.float32, device: torch.device | str | None = None
) -> MLPStack:
    """Load the memory at `path` (a folder, or a hub name), in eval mode.

    `dtype` None keeps the stored one. Raises ValueError, in one line, when there is no memory, several (their names
    are listed), a family without a memory stack, weights that do not fit the config, or a `.bin` with more than
    tensors in it.
    """
    folder = find_memory(path)
    return memory_class(read_memory_config(folder)).from_pretrained(folder, dtype=dtype, device=device)


def base_id(path: str | os.PathLike, *, trust_remote_code: bool = False) -> str:
    """The id of a base model: SHA-256 of its config with the names and sizes of its weight files (on the hub: the commit).

    Raises OSError or ValueError where there is no readable config.
    """
    folder = Path(path)
    if folder.is_dir():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights: Any = sorted((file.name, file.stat().st_size) for kind in BASE_WEIGHTS for file in folder.glob(kind))
    else:
        from transformers import AutoConfig

        loaded = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
        config, weights = loaded.to_dict(), loaded._commit_hash
    config = {name: value for name, value in config.items() if name not in VOLATILE}
    return hashlib.sha256(json.dumps([config, weights], sort_keys=True, default=str).encode()).hexdigest()
