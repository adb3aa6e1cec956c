"""The MLP memory of GPT-2 bases: LayerNorm blocks with the family's own MLP. Weight names: `h.{i}.ln_1`,
`h.{i}.mlp.{c_fc,c_proj}`, `ln_f`, `lm_head.weight`. What all stacks share is in `stack.py`."""

from __future__ import annotations

from torch import nn
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2PreTrainedModel

from .stack import MLPBlock, MLPStack


class GPT2MLPBlock(MLPBlock):
    """x + MLP(LayerNorm(x)), (…, hidden) → (…, hidden)."""

    norm_name = "ln_1"


class GPT2MLPModel(MLPStack, GPT2PreTrainedModel):
    """MLP memory for GPT-2."""

    block_class = GPT2MLPBlock
    _no_split_modules = ["GPT2MLPBlock"]  # noqa: RUF012
    blocks_name = "h"
    norm_name = "ln_f"

    @staticmethod
    def make_norm(config: GPT2Config) -> nn.Module:
        return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    @staticmethod
    def make_mlp(config: GPT2Config) -> nn.Module:
        return GPT2MLP(config.n_inner if config.n_inner is not None else 4 * config.hidden_size, config)
