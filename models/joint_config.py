"""The config of a joint model: lambda, temperature, captured layer, and its base.

transformers runs this file first of a saved folder's code, so it refuses versions that would misread the rest.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig

OLDEST_MAJOR = 5  # transformers 4 ignores the rotary base in a config written by 5: silently wrong numbers
ADAPTIVE = "adaptive"  # lambda by token, from the memory's gate
# What tools for plain decoders look for.
PLAIN = ("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size", "hidden_size", "max_position_embeddings")
if int(transformers.__version__.split(".")[0]) < OLDEST_MAJOR:
    raise ImportError(
        f"this model needs transformers {OLDEST_MAJOR} or newer, {transformers.__version__} would give wrong numbers: "
        f"pip install -U 'transformers>={OLDEST_MAJOR}'"
    )


class MLPMemoryConfig(PretrainedConfig):
    """Config of `MLPMemory`. `text_config` is the base's own, so that generation finds its cache and context sizes.

    `base_model_name_or_path` names the base, unless it lies in the folder itself, in `base/`; `base_id` is that base's
    id (`stack.base_id`); `results` are measured rows for the model card; `memories` counts the memories.
    """

    model_type = "mlp_memory"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        text_config: PretrainedConfig | dict | None = None,
        lmbda: float | list[float] | str = 0.25,
        knn_temp: float = 1.0,
        layer_position: int = -1,
        base_model_name_or_path: str | None = None,
        base_id: str | None = None,
        results: list[dict[str, Any]] | None = None,
        memories: int = 1,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config
        self.lmbda = lmbda
        self.knn_temp = knn_temp
        self.layer_position = layer_position
        self.base_model_name_or_path = base_model_name_or_path
        self.base_id = base_id
        self.results = results
        self.memories = memories
        for name in PLAIN:
            kwargs.setdefault(name, getattr(text_config, name, None))
        super().__init__(**kwargs)


MLPMemoryConfig.register_for_auto_class()


def read_joint_config(folder: str | os.PathLike) -> MLPMemoryConfig | None:
    """The joint config in `folder`, or None when there is none or config.json is of another kind."""
    path = Path(folder, "config.json")
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return MLPMemoryConfig.from_dict(values) if values.get("model_type") == MLPMemoryConfig.model_type else None
