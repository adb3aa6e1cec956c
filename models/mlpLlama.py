"""The MLP memory of Llama bases: RMSNorm blocks with the family's own SwiGLU. Weight names: `layers.{i}.input_layernorm`,
`layers.{i}.mlp.{gate,up,down}_proj`, `norm`, `lm_head.weight`. What all stacks share is in `stack.py`."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaPreTrainedModel, LlamaRMSNorm

from .stack import MLPStack


class LlamaMLPBlock(GradientCheckpointingLayer):
    """x + SwiGLU(RMSNorm(x)), (…, hidden) → (…, hidden)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.mlp(self.input_layernorm(hidden))


class LlamaMLPModel(MLPStack, LlamaPreTrainedModel):
    """MLP memory for Llama."""

    _no_split_modules = ["LlamaMLPBlock"]  # noqa: RUF012

    @staticmethod
    def make_parts(config: LlamaConfig) -> tuple[list[nn.Module], nn.Module]:
        blocks = [LlamaMLPBlock(config) for _ in range(config.num_hidden_layers)]
        return blocks, LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
