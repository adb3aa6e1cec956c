"""The memory stacks, the joint model and hidden-state capture.

Importing it registers the joint model with transformers, so that `AutoModelForCausalLM.from_pretrained` and
`pipeline("text-generation", …)` open a folder of `MLPMemory.save_pretrained`. The stacks are imported when asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from .families import load_memory, memory_class
from .joint_config import MLPMemoryConfig
from .mlpMemory import MLPMemory
from .stack import memory_config

AutoConfig.register(MLPMemoryConfig.model_type, MLPMemoryConfig, exist_ok=True)
AutoModelForCausalLM.register(MLPMemoryConfig, MLPMemory, exist_ok=True)

_STACKS = {"GPT2MLPModel": ".mlpGPT2", "LlamaMLPModel": ".mlpLlama", "MistralMLPModel": ".mlpMistral"}

__all__ = [*_STACKS, "MLPMemory", "MLPMemoryConfig", "load_memory", "memory_class", "memory_config"]


def __getattr__(name: str) -> Any:
    if name in _STACKS:
        return getattr(importlib.import_module(_STACKS[name], __name__), name)
    raise AttributeError(f"module 'models' has no attribute {name!r}")
