"""The config of a joint model: lambda, temperature, captured layer, and which base it belongs to.

This is the first file that transformers runs of a saved folder's code, so it refuses versions that would misread the rest.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig

# transformers 4 takes the rotary base of a config written by 5 for the default one: wrong numbers without a word.
OLDEST_MAJOR = 5
# The lambda of a memory with a gate: another one for each token.
ADAPTIVE = "adaptive"
if int(transformers.__version__.split(".")[0]) < OLDEST_MAJOR:
    raise ImportError(
        f"this model was written for transformers {OLDEST_MAJOR} or newer; {transformers.__version__}, which is installed, "
        f"would compute something else: pip install -U 'transformers>={OLDEST_MAJOR}'"
    )


class MLPMemoryConfig(PretrainedConfig):
    """Config of `MLPMemory`. `text_config` is the base's own, so that generation finds its cache and context sizes.

    `base_model_name_or_path` says which base the folder belongs to, where that is not inside it, in `base/`;
    `base_fingerprint` which weights that base had (`joint_base.fingerprint`); `results` are measured rows, for the card.
    Raises ValueError for a lambda outside [0, 1] or a temperature that is not positive.
    """

    model_type = "mlp_memory"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        text_config: PretrainedConfig | dict | None = None,
        lmbda: float | str = 0.25,
        knn_temp: float = 1.0,
        layer_position: int = -1,
        base_model_name_or_path: str | None = None,
        base_fingerprint: str | None = None,
        results: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config
        self.lmbda = check_lambda(lmbda)
        self.knn_temp = check_temperature(knn_temp)
        self.layer_position = layer_position
        self.base_model_name_or_path = base_model_name_or_path
        self.base_fingerprint = base_fingerprint
        self.results = results
        # What tools that were written for plain decoders look for; so are the properties.
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, getattr(text_config, name, None))
        super().__init__(**kwargs)

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


# A saved folder holds this code, for those who have only transformers.
MLPMemoryConfig.register_for_auto_class()


def check_lambda(value: float | str) -> float | str:
    """`value` as a float, or the word `ADAPTIVE`. Raises ValueError unless it is in [0, 1]."""
    if value == ADAPTIVE:
        return ADAPTIVE
    if not (math.isfinite(value) and 0.0 <= value <= 1.0):
        raise ValueError(f"lambda {value:g}: expected a number from 0 to 1")
    return float(value)


def check_temperature(value: float) -> float:
    """`value` as a float. Raises ValueError unless it is finite and above 0."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"memory temperature {value:g}: expected a number above 0")
    return float(value)


def read_joint_config(folder: str | os.PathLike) -> MLPMemoryConfig | None:
    """The joint config in `folder`, or None when its config.json is of another kind."""
    from huggingface_hub.errors import StrictDataclassError

    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if values.get("model_type") != MLPMemoryConfig.model_type:
        return None
    try:
        return MLPMemoryConfig.from_dict(values)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: is no usable config of a joint model ({' '.join(str(error).split())[:200]})"
        ) from None
