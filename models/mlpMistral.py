"""The MLP memory of Mistral bases: RMSNorm blocks with the family's own SwiGLU. Weight names: `layers.{i}.input_layernorm`,
`layers.{i}.mlp.{gate,up,down}_proj`, `norm`, `lm_head.weight`. What all stacks share is in `stack.py`."""

from __future__ import annotations

import torch
from torch import nn
from transformers import MistralConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.mistral.modeling_mistral import MistralMLP, MistralPreTrainedModel, MistralRMSNorm

from .stack import MLPStack


class MistralMLPBlock(GradientCheckpointingLayer):
    """x + SwiGLU(RMSNorm(x)), (…, hidden) → (…, hidden)."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__()
        self.input_layernorm = MistralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MistralMLP(config)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.mlp(self.input_layernorm(hidden))


class MistralMLPModel(MLPStack, MistralPreTrainedModel):
    """MLP memory for Mistral."""

    _no_split_modules = ["MistralMLPBlock"]  # noqa: RUF012

    @staticmethod
    def make_parts(config: MistralConfig) -> tuple[list[nn.Module], nn.Module]:
        blocks = [MistralMLPBlock(config) for _ in range(config.num_hidden_layers)]
        return blocks, MistralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
