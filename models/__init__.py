"""The memory stacks, the joint model and hidden-state capture. Names are imported on first use.

Importing this package registers the joint model with transformers, so that `AutoModelForCausalLM.from_pretrained` and
`pipeline("text-generation", …)` open a folder of `MLPMemory.save_pretrained`.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

_MODULES = {
    "GPT2MLPModel": ".mlpGPT2",
    "LlamaMLPModel": ".mlpLlama",
    "MistralMLPModel": ".mlpMistral",
    "MLPMemory": ".mlpMemory",
    "MLPMemoryConfig": ".joint_config",
    "memory_config": ".stack",
    "load_memory": ".stack",
    "memory_class": ".stack",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module 'models' has no attribute {name!r}")


if sys.argv[:1] != ["-m"]:  # while `python -m models.export` is starting: its --help does not wait for torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from .joint_config import MLPMemoryConfig
    from .mlpMemory import MLPMemory

    AutoConfig.register(MLPMemoryConfig.model_type, MLPMemoryConfig, exist_ok=True)
    AutoModelForCausalLM.register(MLPMemoryConfig, MLPMemory, exist_ok=True)
