"""What the memory stacks of all families share: the way from captured hidden states to next-token logits.

A stack is `layers × (x + MLP(norm(x)))`, a final norm and a head of its own (paper section 3.2), built from the base
family's MLP and norm modules. It is attention-free: each position is computed by itself, so it needs no mask, no
positions and no cache. Knows nothing of the base model's weights, nor of files (`models.loading` reads them).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PretrainedConfig
from transformers.modeling_outputs import CausalLMOutput


class MLPStack:
    """Mixin over a family's `PreTrainedModel`: constructor, forward, loading.

    A family names its attributes (`blocks_name`, `norm_name`: they are the weight names of published memories) and
    makes its blocks and its norm. All sizes come from the config; `config.num_hidden_layers` is the memory's own.
    """

    blocks_name = "layers"
    norm_name = "norm"
    # The head is the memory's own, whatever `tie_word_embeddings` says of the base: there is no embedding to tie it to.
    _tied_weights_keys = None
    main_input_name = "inputs_embeds"

    def __init__(self, config: PretrainedConfig, input_dim: int | None = None, output_dim: int | None = None) -> None:
        """`input_dim`: width of the captured hidden states; `output_dim`: width of the stack, the config's hidden size.

        Both default to the config's hidden size; where they differ an `embedding_transform` Linear comes first.
        Raises ValueError when `output_dim` is not the config's hidden size.
        """
        super().__init__(config)
        width = config.hidden_size
        output_dim = width if output_dim is None else output_dim
        input_dim = output_dim if input_dim is None else input_dim
        if output_dim != width:
            raise ValueError(f"output_dim {output_dim}: expected the config's hidden size, {width}")
        self.input_dim = input_dim
        self.embedding_transform = nn.Linear(input_dim, width) if input_dim != width else None
        blocks, norm = self.make_parts(config)
        setattr(self, self.blocks_name, nn.ModuleList(blocks))
        setattr(self, self.norm_name, norm)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def make_parts(config: PretrainedConfig) -> tuple[list[nn.Module], nn.Module]:
        """`config.num_hidden_layers` pre-norm residual MLP blocks of the family, and the norm after them."""
        raise NotImplementedError

    @property
    def blocks(self) -> nn.ModuleList:
        return getattr(self, self.blocks_name)

    @property
    def final_norm(self) -> nn.Module:
        return getattr(self, self.norm_name)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def hidden(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Everything before the head: (…, input_dim) → (…, hidden), in the dtype of the weights (or of autocast)."""
        hidden = inputs_embeds
        if self.embedding_transform is not None:
            hidden = self.embedding_transform(hidden)  # (…, input_dim) → (…, hidden)
        for block in self.blocks:
            hidden = block(hidden)
        return self.final_norm(hidden)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutput:
        """Next-token logits (…, vocabulary) of captured hidden states (…, input_dim).

        `position_ids` is accepted as every decoder's forward accepts it; a stack without attention has no use for it.
        With `labels` (…, time), the token ids themselves, `.loss` is the mean negative log-likelihood of the shifted
        labels (position t predicts label t+1), -100 ignored.
        """
        logits = self.lm_head(self.hidden(inputs_embeds))
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(
                logits[..., :-1, :].flatten(0, -2).float(), labels[..., 1:].flatten().to(logits.device)
            )
        return CausalLMOutput(loss=loss, logits=logits)

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> MLPStack:
        """Load a memory as `models.load_memory` does: missing or unexpected weights are an error, not random numbers.

        `dtype` None keeps the stored one; `torch_dtype` is its older name. Raises ValueError when the memory is of
        another family than this class.
        """
        from models.loading import load_memory

        memory = load_memory(path, dtype=dtype or torch_dtype, device=device)
        if not isinstance(memory, cls):
            raise ValueError(f"{path}: holds a {type(memory).__name__}, expected a {cls.__name__}")
        return memory


def layer_count_name(config_class: type[PretrainedConfig]) -> str:
    """The name a family gives its layer count (`n_layer`, `num_layers`, …)."""
    return config_class.attribute_map.get("num_hidden_layers", "num_hidden_layers")


def fit_layer_lists(values: dict[str, Any], layers: int) -> dict[str, Any]:
    """Cut or lengthen per-layer lists of a config (such as `layer_types`) to `layers` entries.

    They describe the base's attention, which a memory does not have, but a config checks their length.
    """
    for name, value in values.items():
        if "layer" in name and isinstance(value, list) and value and len(value) != layers:
            values[name] = (value + [value[-1]] * layers)[:layers]
    return values


def memory_config(base_config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The config of a memory with `layers` blocks for a base: the base's own with the layer count changed.

    Raises ValueError when `layers` is not positive.
    """
    if layers < 1:
        raise ValueError(f"memory layers {layers}: expected a number above 0")
    config = copy.deepcopy(base_config)
    name = layer_count_name(type(config))
    for key, value in fit_layer_lists(dict(vars(config)), layers).items():
        if value is not getattr(config, key, None):
            setattr(config, key, value)
    setattr(config, name, layers)
    # A quantised base's memory is not quantised.
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    config.architectures = None
    return config
