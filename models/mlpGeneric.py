"""The MLP memory of any other decoder: a stack made from the base family's own MLP and norm, found by structure.

A one-block base is made on torch's meta device (no memory, no weights) to see which MLP and norm the family uses; the
stack copies them. Weight names: `layers.{i}.input_layernorm`, `layers.{i}.mlp.*`, `norm`, `lm_head.weight`.
Knows no family by name.
"""

from __future__ import annotations

import copy
import functools

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .capture import decoder_blocks, final_norm
from .stack import MLPStack, memory_config


class GenericMLPBlock(GradientCheckpointingLayer):
    """x + MLP(norm(x)), (…, hidden) → (…, hidden), whatever the base's own block does around its MLP."""

    def __init__(self, mlp: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = norm
        self.mlp = mlp

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.mlp(self.input_layernorm(hidden))


class GenericMLPModel(MLPStack):
    """MLP memory for a decoder family without a class of its own; `generic_class` joins it to the family's base class."""

    _no_split_modules = ["GenericMLPBlock"]  # noqa: RUF012

    @staticmethod
    def make_parts(config: PretrainedConfig) -> tuple[list[nn.Module], nn.Module]:
        mlp, norm = family_parts(config)
        blocks = [GenericMLPBlock(_real(mlp), _real(norm)) for _ in range(config.num_hidden_layers)]
        return blocks, _real(norm)


def generic_class(config: PretrainedConfig) -> type[GenericMLPModel]:
    """The generic stack as a class of the config's family (for its weight initialisation), `Qwen2MLPModel` and so on.

    Raises ValueError when transformers has no causal language model for the family, or its blocks have no `.mlp`.
    """
    family_parts(config)
    return _class_of_family(type(config))


@functools.cache
def _class_of_family(config_class: type[PretrainedConfig]) -> type[GenericMLPModel]:
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    family = next(each for each in model_class.__mro__ if PreTrainedModel in each.__bases__)
    name = f"{config_class.__name__.removesuffix('Config')}MLPModel"
    attributes = {"__module__": __name__, "__doc__": GenericMLPModel.__doc__, "config_class": config_class}
    return type(name, (GenericMLPModel, family), attributes)


def family_parts(config: PretrainedConfig) -> tuple[nn.Module, nn.Module]:
    """One MLP and one norm of the config's family, on the meta device. Raises ValueError as `generic_class` does."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"model family '{config.model_type}': is no plain causal language model of transformers, so there is no "
            "memory stack for it"
        )
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(memory_config(config, 1))
    mlp, norm = decoder_blocks(base)[-1].mlp, final_norm(base)
    if not _maps_hidden_to_hidden(mlp, norm, config.hidden_size):
        raise ValueError(
            f"model family '{config.model_type}': its .mlp is no plain function of one hidden state (experts, further "
            "arguments or buffers), so there is no memory stack for it"
        )
    return mlp, norm


def _maps_hidden_to_hidden(mlp: nn.Module, norm: nn.Module, width: int) -> bool:
    """Whether MLP(norm(x)) takes (…, hidden) to (…, hidden) by weights alone, tried on the meta device."""
    if any(True for part in (mlp, norm) for _ in part.buffers()):
        return False
    hidden = torch.empty(1, 1, width, device="meta")
    try:
        output = mlp(norm(hidden))
    except (TypeError, ValueError, RuntimeError, NotImplementedError):
        return False
    return isinstance(output, torch.Tensor) and output.shape == hidden.shape


def _real(part: nn.Module) -> nn.Module:
    """A copy of `part` on torch's default device, its weights still to be initialised."""
    part = copy.deepcopy(part).to_empty(device=torch.get_default_device())
    for module in part.modules():
        # transformers marks what it has initialised; the copy is not.
        module.__dict__.pop("_is_hf_initialized", None)
    return part
