"""Base or base + MLP memory as a model of EleutherAI's evaluation harness. Importing it registers it as `mlpmem`.

Knows nothing of tasks. It needs the package `lm-eval`. The harness's own model class does the batching and the
arithmetic: the joint model offers the same `forward` and `generate` as any model of transformers, and its
log-probabilities are unchanged by the log-softmax that the harness takes of them.
"""

from __future__ import annotations

import os
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from downstream.model import ModelArguments, open_model
from downstream.scoring import context_length
from utils.errors import InputError


@register_model("mlpmem")
class MLPMemoryLM(HFLM):
    """A base, or with `memory` a joint model.

    Args:
        pretrained: folder or hub name of the base.
        memory: folder or hub name of the memory; None evaluates the base alone.
        lmbda, knn_temp, layer_position: as in `models.MLPMemory`.
        batch_size: sequences in one forward pass, or "auto".
        max_length: tokens of context; default: the base's own.
        model_options: the other fields of `downstream.model.ModelArguments` (torch_dtype, device_map, …).

    Raises:
        InputError: nothing to load there, a memory of another base, or several processes.
    """

    def __init__(
        self,
        pretrained: str,
        memory: str | None = None,
        lmbda: float = 0.25,
        knn_temp: float = 1.0,
        layer_position: int = -1,
        batch_size: int | str = 8,
        max_length: int | None = None,
        device: str | None = None,
        max_batch_size: int | None = 64,
        **model_options: Any,
    ) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError("the harness runs as one process here; start it with python -m, not accelerate launch")
        arguments = ModelArguments(
            model_name_or_path=pretrained,
            use_neural_knn=memory is not None,
            knn_generator_path=memory,
            lmbda=float(lmbda),
            knn_temp=float(knn_temp),
            layer_position=int(layer_position),
            **model_options,
        )
        arguments.check()
        model, tokenizer = open_model(arguments)
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_batch_size=max_batch_size,
            max_length=max_length or context_length(model.config),
        )
