"""The MLP memory of Llama bases: RMSNorm blocks with the family's own SwiGLU. Weight names: `layers.{i}.input_layernorm`,
`layers.{i}.mlp.{gate,up,down}_proj`, `norm`, `lm_head.weight`. What all stacks share is in `stack.py`."""

from __future__ import annotations

from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaPreTrainedModel, LlamaRMSNorm

from .stack import MLPBlock, MLPStack


class LlamaMLPBlock(MLPBlock):
    """x + SwiGLU(RMSNorm(x)), (…, hidden) → (…, hidden)."""


class LlamaMLPModel(MLPStack, LlamaPreTrainedModel):
    """MLP memory for Llama."""

    block_class = LlamaMLPBlock
    _no_split_modules = ["LlamaMLPBlock"]  # noqa: RUF012

    @staticmethod
    def make_norm(config: LlamaConfig) -> nn.Module:
        return LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    @staticmethod
    def make_mlp(config: LlamaConfig) -> nn.Module:
        return LlamaMLP(config)
