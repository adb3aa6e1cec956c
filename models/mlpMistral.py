"""The MLP memory of Mistral bases: RMSNorm blocks with the family's own SwiGLU. Weight names: `layers.{i}.input_layernorm`,
`layers.{i}.mlp.{gate,up,down}_proj`, `norm`, `lm_head.weight`. What all stacks share is in `stack.py`."""

from __future__ import annotations

from torch import nn
from transformers import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralMLP, MistralPreTrainedModel, MistralRMSNorm

from .stack import MLPBlock, MLPStack


class MistralMLPBlock(MLPBlock):
    """x + SwiGLU(RMSNorm(x)), (…, hidden) → (…, hidden)."""


class MistralMLPModel(MLPStack, MistralPreTrainedModel):
    """MLP memory for Mistral."""

    block_class = MistralMLPBlock
    _no_split_modules = ["MistralMLPBlock"]  # noqa: RUF012

    @staticmethod
    def make_norm(config: MistralConfig) -> nn.Module:
        return MistralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    @staticmethod
    def make_mlp(config: MistralConfig) -> nn.Module:
        return MistralMLP(config)
