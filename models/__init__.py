"""The memory stacks, the joint model and hidden-state capture. Knows nothing of datasets, FAISS or command lines.

Importing it registers the joint model with transformers, so that `AutoModelForCausalLM.from_pretrained` and
`pipeline("text-generation", …)` open a folder of `MLPMemory.save_pretrained`. The stacks are imported when asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModelForCausalLM

from models.mlpMemory import MLPMemory, MLPMemoryConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

AutoConfig.register(MLPMemoryConfig.model_type, MLPMemoryConfig, exist_ok=True)
AutoModelForCausalLM.register(MLPMemoryConfig, MLPMemory, exist_ok=True)

# The families with a class of their own (the seed's); any other gets the generic stack.
FAMILY_CLASSES = {"gpt2": "GPT2MLPModel", "llama": "LlamaMLPModel", "mistral": "MistralMLPModel"}

_HOMES = {
    "GPT2MLPModel": "models.mlpGPT2",
    "LlamaMLPModel": "models.mlpLlama",
    "MistralMLPModel": "models.mlpMistral",
    "MLPMemory": "models.mlpMemory",
    "MLPMemoryConfig": "models.mlpMemory",
    "load_memory": "models.loading",
    "memory_config": "models.stack",
}

__all__ = [*_HOMES, "memory_class"]


def memory_class(config: PretrainedConfig) -> type:
    """The stack class for a base's (or a memory's) config: the family's own, else the generic one for its family.

    Raises ValueError when the family's blocks have no `.mlp`.
    """
    name = FAMILY_CLASSES.get(config.model_type)
    if name is not None:
        return getattr(importlib.import_module(_HOMES[name]), name)
    from models.mlpGeneric import generic_class

    return generic_class(config)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'models' has no attribute {name!r}")
