"""The MLP memory of GPT-2 bases: LayerNorm blocks with the family's own MLP. Weight names: `h.{i}.ln_1`,
`h.{i}.mlp.{c_fc,c_proj}`, `ln_f`, `lm_head.weight`. What all stacks share is in `stack.py`."""

from __future__ import annotations

import torch
from torch import nn
from transformers import GPT2Config
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2PreTrainedModel

from .stack import MLPStack


class GPT2MLPBlock(GradientCheckpointingLayer):
    """x + MLP(LayerNorm(x)), (…, hidden) → (…, hidden)."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        inner = config.n_inner if config.n_inner is not None else 4 * config.hidden_size
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = GPT2MLP(inner, config)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.mlp(self.ln_1(hidden))


class GPT2MLPModel(MLPStack, GPT2PreTrainedModel):
    """MLP memory for GPT-2."""

    blocks_name = "h"
    norm_name = "ln_f"
    _no_split_modules = ["GPT2MLPBlock"]  # noqa: RUF012

    @staticmethod
    def make_parts(config: GPT2Config) -> tuple[list[nn.Module], nn.Module]:
        blocks = [GPT2MLPBlock(config) for _ in range(config.num_hidden_layers)]
        return blocks, nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
