"""Which stack a family's memory is, and opening a memory whose family only its folder knows."""

from __future__ import annotations

import os

import torch
from transformers import PretrainedConfig

from .stack import MLPStack, find_memory, read_memory_config


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
