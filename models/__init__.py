"""The memory stacks, the joint model and hidden-state capture.

Importing it registers the joint model with transformers, so that `AutoModelForCausalLM.from_pretrained` and
`pipeline("text-generation", …)` open a folder of `MLPMemory.save_pretrained`. Each name is imported when asked for.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

_PLACES = {
    **{"GPT2MLPModel": ".mlpGPT2", "LlamaMLPModel": ".mlpLlama", "MistralMLPModel": ".mlpMistral"},
    **{"MLPMemory": ".mlpMemory", "MLPMemoryConfig": ".joint_config", "memory_config": ".stack"},
    **{"load_memory": ".families", "memory_class": ".families"},
}
__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name], __name__), name)
    raise AttributeError(f"module 'models' has no attribute {name!r}")


# Python's arguments begin with "-m" only while it looks for models.export, whose --help shall not wait for torch.
if sys.argv[:1] != ["-m"]:
    from transformers import AutoConfig, AutoModelForCausalLM

    from .joint_config import MLPMemoryConfig
    from .mlpMemory import MLPMemory

    AutoConfig.register(MLPMemoryConfig.model_type, MLPMemoryConfig, exist_ok=True)
    AutoModelForCausalLM.register(MLPMemoryConfig, MLPMemory, exist_ok=True)
