"""The MLP memory of any other decoder: a stack made from the base family's own MLP and norm, found by structure.

A one-block base is made on torch's meta device (no memory, no weights) to see which MLP and norm the family uses; the
stack copies them. Weight names: `layers.{i}.input_layernorm`, `layers.{i}.mlp.*`, `norm`, `lm_head.weight`.
"""

from __future__ import annotations

import copy
import functools

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from .capture import decoder_blocks, final_norm
from .stack import MLPBlock, MLPStack, memory_config


class GenericMLPModel(MLPStack):
    """MLP memory for a decoder family without a class of its own; `generic_class` joins it to the family's base class.

    Its blocks are x + MLP(norm(x)), whatever the base's own blocks do around their MLP.
    """

    _no_split_modules = ["MLPBlock"]  # noqa: RUF012

    @classmethod
    def make_parts(cls, config: PretrainedConfig) -> tuple[list[MLPBlock], nn.Module]:
        norm, mlp = family_parts(config)
        blocks = [cls.block_class(_real(norm), _real(mlp)) for _ in range(config.num_hidden_layers)]
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
    """One norm and one MLP of the config's family, on the meta device. Raises ValueError as `generic_class` does."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"model family '{config.model_type}': is no plain causal language model of transformers, so there is no "
            "memory stack for it"
        )
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(memory_config(config, 1))
        hidden = torch.empty(1, 1, config.hidden_size)
    norm, mlp = final_norm(base), decoder_blocks(base)[-1].mlp
    try:
        output = mlp(norm(hidden))
    except (TypeError, ValueError, RuntimeError):
        output = None
    buffers = [*norm.buffers(), *mlp.buffers()]
    if buffers or not isinstance(output, torch.Tensor) or output.shape != hidden.shape:
        raise ValueError(
            f"model family '{config.model_type}': its .mlp is no plain function of one hidden state (experts, further "
            "arguments or buffers), so there is no memory stack for it"
        )
    return norm, mlp


def _real(part: nn.Module) -> nn.Module:
    """A copy of `part` on torch's default device, its weights still to be initialised."""
    part = copy.deepcopy(part).to_empty(device=torch.get_default_device())
    for module in part.modules():
        # transformers marks what it has initialised; the copy is not.
        module.__dict__.pop("_is_hf_initialized", None)
    return part
