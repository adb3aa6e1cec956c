"""The joint model's config: the base's config inside, and the three numbers of the mixture. Knows no weights."""

from __future__ import annotations

import math
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig


class MLPMemoryConfig(PretrainedConfig):
    """Config of `MLPMemory`. `text_config` is the base's own, so that generation finds its cache and context sizes.

    `base_model_name_or_path` says which base the folder belongs to ("." : it is inside, in `base/`).
    Raises ValueError for a lambda outside [0, 1] or a temperature that is not positive.
    """

    model_type = "mlp_memory"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        text_config: PretrainedConfig | dict | None = None,
        lmbda: float = 0.25,
        knn_temp: float = 1.0,
        layer_position: int = -1,
        base_model_name_or_path: str | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            if text_config.get("model_type") not in CONFIG_MAPPING:
                raise ValueError(
                    f"base model_type {text_config.get('model_type')!r} is no family that transformers knows"
                )
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config
        self.lmbda = check_lambda(lmbda)
        self.knn_temp = check_temperature(knn_temp)
        self.layer_position = layer_position
        self.base_model_name_or_path = base_model_name_or_path
        super().__init__(**kwargs)

    # What tools that were written for plain decoders look for.

    @property
    def vocab_size(self) -> int:
        return self.text_config.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.text_config.hidden_size

    @property
    def max_position_embeddings(self) -> int | None:
        """The base's context in tokens; None where the family knows no limit."""
        return getattr(self.text_config, "max_position_embeddings", None)


def check_lambda(value: float) -> float:
    """`value` as a float. Raises ValueError unless it is in [0, 1]."""
    if not (math.isfinite(value) and 0.0 <= value <= 1.0):
        raise ValueError(f"lambda {value:g}: expected a number from 0 to 1")
    return float(value)


def check_temperature(value: float) -> float:
    """`value` as a float. Raises ValueError unless it is finite and above 0."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"memory temperature {value:g}: expected a number above 0")
    return float(value)
