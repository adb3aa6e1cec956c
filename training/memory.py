"""A new memory: its size, its initial weights, and the module of memory and loss that is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from models.stack import head_scale, memory_class
from models.stack import memory_config as config_of_layers
from models.starts import drop_neurons, init_from_base, init_lm_head, measure_scale
from training.arguments import TrainerArguments
from training.rows import Rows
from utils.cal_loss import fused_linear_distillation_loss, sample_vocabulary, sparse_distillation_loss
from utils.errors import InputError, one_line
from utils.evaluation import label_log_probabilities
from utils.memories import head_of_base

# The paper's memories: family, number of layers, and what else differs from the base's config.
PRESETS: dict[str, tuple[str, int, dict[str, int]]] = {
    "small": ("gpt2", 18, {}),
    "med": ("gpt2", 36, {}),
    "large": ("gpt2", 54, {}),
    "llama2": ("llama", 8, {}),
    "llama3": ("llama", 8, {"intermediate_size": 11008}),
    "mistral": ("mistral", 8, {}),
}
DEFAULT_LAYERS = 8
SAMPLE_WINDOWS = 4  # from which --init_from_base estimates the scale of the hidden states


def memory_config(arguments: TrainerArguments, base_config: Any, vocabulary: int) -> Any:
    """The memory's config: the base's with another number of layers (and, for llama3, another MLP width).

    Raises InputError for a family without a memory.
    """
    family, layers, changes = PRESETS[arguments.base_model_name]
    if family != base_config.model_type:
        layers, changes = DEFAULT_LAYERS, {}
    try:
        config = config_of_layers(base_config, arguments.memory_layers or layers)
        memory_class(config)
    except ValueError as error:
        raise InputError(f"--model_name_or_path {arguments.model_name_or_path}: {one_line(error)}") from None
    for name, value in changes.items():
        setattr(config, name, value)
    config.vocab_size = vocabulary
    if arguments.tie_head:
        base = Path(arguments.require_base())
        config.tie_head = base.resolve().name if base.is_dir() else str(arguments.model_name_or_path)
        config.head_scale = head_scale(base_config)
    return config


def build_memory(arguments: TrainerArguments, config: Any, open_base: Callable[[], Any], windows: Any) -> Any:
    """A new memory in float32, initialized as the flags ask for.

    Args:
        config: from `memory_config`.
        open_base: returns the base; called for --init_lm_head, --init_from_base, and as `head_of_base` says.
        windows: a few of them, evenly spaced, are read to estimate the scale around the captured block.

    Raises:
        ValueError: the base's weights do not have the memory's shapes.
    """
    memory = memory_class(config)(config).to(torch.float32)
    if memory.tied:
        memory.use_head(head_of_base(arguments, config, open_base))
    if arguments.init_lm_head:
        init_lm_head(memory, open_base())
    if arguments.init_from_base:
        base = open_base()
        numbers = np.linspace(0, len(windows) - 1, min(SAMPLE_WINDOWS, len(windows))).astype(int)
        ids = torch.from_numpy(np.asarray(windows[numbers]["input_ids"]).astype(np.int64))  # (windows, time)
        ids = ids.to(base.get_input_embeddings().weight.device)
        scale = measure_scale(base, ids, layer_position=arguments.layer_position)
        init_from_base(memory, base, scale, arguments.layer_position)
    if arguments.memory_dropout:
        drop_neurons(memory, arguments.memory_dropout)
    return memory


class MemoryWithLoss(nn.Module):
    """Memory, head and loss as one module, so that wrappers (DDP, FSDP, autocast) see a single forward."""

    def __init__(self, memory: nn.Module, alpha: float, loss: str = "fused", sampled_vocabulary: int = 0) -> None:
        super().__init__()
        self.memory, self.alpha, self.loss, self.sampled_vocabulary = memory, alpha, loss, sampled_vocabulary

    def forward(self, rows: Rows, num_rows: float | None = None) -> Any:
        """(total, kl, ce) of `rows`, each a sum over these rows divided by `num_rows`.

        Without `num_rows`, for validation: log-probabilities (n, 1) of the labels, in the weights' own precision.
        """
        weight = self.memory.lm_head.weight  # (vocabulary, hidden)
        inputs = rows.hidden.to(weight.device, non_blocking=True).to(weight.dtype)  # (n, dim)
        if num_rows is None:
            with torch.autocast(inputs.device.type, enabled=False):
                return label_log_probabilities(self.memory.hidden(inputs), weight, rows.label.to(weight.device))
        hidden = self.memory.hidden(inputs)  # (n, hidden)
        label, token_id = rows.label, rows.token_id
        if self.sampled_vocabulary:
            sampled = sample_vocabulary(hidden, weight, label, token_id, self.sampled_vocabulary)
            hidden, weight, label, token_id = sampled
        targets = label, rows.id_cnt, token_id, rows.prob, self.alpha
        if self.loss == "plain":
            return sparse_distillation_loss(nn.functional.linear(hidden, weight), *targets, num_rows=num_rows)
        return fused_linear_distillation_loss(hidden, weight, *targets, num_rows=num_rows)
