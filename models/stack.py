"""The memory: a stack of MLP blocks from captured hidden states to next-token logits, and its files.

A stack is `layers × (x + MLP(norm(x)))`, a final norm and a head of its own (paper section 3.2), built from the base
family's MLP and norm modules. It is attention-free: each position is computed by itself, without mask or cache.
A tied memory (`tie_head` in its config, the base's name) has no head of its own; `use_head` gives it the base's.

Files: `config.json` (the base's, with the layer count changed) beside `model.safetensors`, sharded safetensors, or a
`.bin` of tensors. They may lie in the original trainers' `epoch_n/` and `epoch_n/knn_generator/` (also as a joint state
with keys `base_lm.*` and `knn_generator.*`) or in a folder of `MLPMemory.save_pretrained`.
"""

from __future__ import annotations

import copy
import functools
import glob
import hashlib
import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.activations import NewGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutput

from .capture import decoder_blocks, final_norm, logit_scale

NO_ADAPTER = {"subfolder": "no-adapter"}  # makes transformers look for an adapter where there is none
# Weight names of published memories: of the blocks, of the norm in a block, of the final norm.
NAMES = {"gpt2": ("h", "ln_1", "ln_f")}
OTHER_NAMES = ("layers", "input_layernorm", "norm")
BASE_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
VOLATILE = ("_name_or_path", "transformers_version")  # entries of a config.json that do not describe the model
MEMORY_PREFIX, BASE_PREFIX = "knn_generator.", "base_lm."
WEIGHT_FILES = [f"{name}{end}" for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")]


class MLPBlock(GradientCheckpointingLayer):
    """x + MLP(norm(x)), (…, hidden) → (…, hidden). `norm_name` is the norm's weight name in published memories."""

    norm_name = "input_layernorm"

    def __init__(self, norm: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        setattr(self, self.norm_name, norm)
        self.mlp = mlp

    @property
    def norm(self) -> nn.Module:
        return getattr(self, self.norm_name)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.mlp(self.norm(hidden))


class TiedHead(nn.Module):
    """A head with the weight (vocabulary, hidden) of another model: not a parameter here, and in no state dict."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        # A base may be spread over devices, and have another dtype than the memory.
        return nn.functional.linear(hidden.to(self.weight.device, self.weight.dtype), self.weight)


class MLPStack:
    """Mixin over a family's `PreTrainedModel` (for its weight initialization); `families.family_class` joins the two.

    `blocks_name` and `norm_name` are the weight names of published memories. All sizes come from the config;
    `config.num_hidden_layers` is the memory's own.
    """

    block_class = MLPBlock
    blocks_name = "layers"
    norm_name = "norm"
    _tied_weights_keys = None  # the head is not tied to input embeddings, whatever the base's config says
    main_input_name = "inputs_embeds"

    def __init__(self, config: PretrainedConfig, input_dim: int | None = None, output_dim: int | None = None) -> None:
        """`input_dim`: width of the captured hidden states; `output_dim`: width of the stack, the config's hidden size.

        Both default to the config's hidden size; where they differ, an `embedding_transform` Linear comes first.
        Raises ValueError as `family_parts` does.
        """
        width = config.hidden_size
        if input_dim not in (None, width):
            config.input_dim = input_dim
        super().__init__(config)
        self.input_dim = getattr(config, "input_dim", width)
        self.embedding_transform = nn.Linear(self.input_dim, width) if self.input_dim != width else None
        norm, mlp = family_parts(config)
        blocks = [self.block_class(_materialized(norm), _materialized(mlp)) for _ in range(config.num_hidden_layers)]
        setattr(self, self.blocks_name, nn.ModuleList(blocks))
        setattr(self, self.norm_name, _materialized(norm))
        self.lm_head = None if self.tied else nn.Linear(width, config.vocab_size, bias=False)
        fuse_gelu(self)
        self.post_init()

    @property
    def tied(self) -> bool:
        """Whether the head is the base's."""
        return bool(getattr(self.config, "tie_head", None))

    def use_head(self, weight: torch.Tensor) -> None:
        """Give a tied memory its base's head, `weight` (vocabulary, hidden), which is shared, not copied."""
        self.lm_head = TiedHead(weight)

    @property
    def blocks(self) -> nn.ModuleList:
        return getattr(self, self.blocks_name)

    @property
    def final_norm(self) -> nn.Module:
        return getattr(self, self.norm_name)

    def hidden(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Everything before the head: (…, input_dim) → (…, hidden), in the dtype of the weights (or of autocast).

        In a tied memory this includes the constant by which the base's family multiplies its logits (`head_scale`).
        """
        hidden = inputs_embeds
        if self.embedding_transform is not None:
            hidden = self.embedding_transform(hidden)  # (…, input_dim) → (…, hidden)
        for block in self.blocks:
            hidden = block(hidden)
        scale = getattr(self.config, "head_scale", 1.0)
        return self.final_norm(hidden) if scale == 1.0 else self.final_norm(hidden) * scale

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutput:
        """Next-token logits (…, vocabulary) of captured hidden states (…, input_dim).

        `position_ids` is ignored. With `labels` (…, time), token ids or -100, `.loss` is the mean negative
        log-likelihood of the shifted labels (position t predicts label t+1). Raises ValueError without a head.
        """
        if self.lm_head is None:
            raise ValueError(
                f"{self.name_or_path}: has no head of its own; open it with its base, {self.config.tie_head}: "
                "MLPMemory.from_pretrained(base, memory)"
            )
        logits = self.lm_head(self.hidden(inputs_embeds))
        loss = None if labels is None else shifted_nll(logits.log_softmax(-1, dtype=torch.float32), labels)
        return CausalLMOutput(loss=loss, logits=logits)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        config: PretrainedConfig | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **dimensions: int,
    ) -> MLPStack:
        """Load a memory of this class from a folder or the hub, in eval mode.

        `config`: in place of the stored one. `dtype` None keeps the stored one. `dimensions`: the constructor's. Raises
        ValueError when there is no memory, several, one of another family, or weights are missing, unexpected or of other
        shapes.
        """
        folder = find_memory(path)
        config = AutoConfig.from_pretrained(folder) if config is None else config
        if config.model_type != cls.config_class.model_type:
            raise ValueError(f"{path}: holds a memory of the {config.model_type} family, expected a {cls.__name__}")
        names = {f"^{re.escape(MEMORY_PREFIX)}": ""}  # in a joint state
        options = {"config": config, "dtype": dtype or "auto", "key_mapping": names, **dimensions}
        try:
            memory, info = super().from_pretrained(folder, output_loading_info=True, **options)
        except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
            raise ValueError(f"{folder}: cannot be loaded ({' '.join(str(error).split())[:200]})") from None
        unexpected = {name for name in info["unexpected_keys"] if not name.startswith(BASE_PREFIX)}
        if wrong := sorted(info["missing_keys"] | unexpected):
            raise ValueError(f"{folder}: its weights do not fit its config.json as a {cls.__name__} ({wrong[0]}, …)")
        memory.name_or_path = memory.config.name_or_path = os.path.abspath(folder)
        return memory.to(device) if device is not None else memory


def family_parts(config: PretrainedConfig) -> tuple[nn.Module, nn.Module]:
    """One norm and one MLP of the config's family, on the meta device: those of a base with one block.

    Raises ValueError when transformers has no causal language model for the family, or its blocks have no plain `.mlp`.
    """
    family = f"model family '{config.model_type}'"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{family}: is no causal language model of transformers, so there is no memory stack for it")
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
        raise ValueError(f"{family}: its .mlp is not a plain function of one hidden state (mixture of experts?)")
    return norm, mlp


def _materialized(part: nn.Module) -> nn.Module:
    """A copy of a module from the meta device on torch's default device."""
    part = copy.deepcopy(part).to_empty(device=torch.get_default_device())
    for module in part.modules():
        module.__dict__.pop("_is_hf_initialized", None)  # the copy still has to be initialized
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return part


def shifted_nll(log_probs: torch.Tensor, labels: torch.Tensor, items: torch.Tensor | int | None = None) -> torch.Tensor:
    """Mean (or sum / `items`) of -log_probs[…, :-1, :] (…, time, vocabulary) at labels[…, 1:], ignoring -100."""
    targets = labels[..., 1:].to(log_probs.device)  # (…, time - 1)
    counted = targets != -100
    chosen = log_probs[..., :-1, :].gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return -chosen.where(counted, 0.0).sum() / (counted.sum().clamp(min=1) if items is None else items)


def memory_config(base_config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The config of a memory with `layers` blocks for a base: the base's own with the layer count changed."""
    config = copy.deepcopy(base_config)
    for name, value in vars(config).items():  # lists such as layer_types: a config checks their length
        if "layer" in name and isinstance(value, list) and value:
            setattr(config, name, (value + [value[-1]] * layers)[:layers])
    config.num_hidden_layers = layers
    config._experts_implementation = None  # of a loaded base with mixtures of experts, which a memory has not
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    config.architectures = None
    return config


def load_base(path: str | os.PathLike, **options: Any) -> PreTrainedModel:
    """The base at `path` (a folder, or a hub name) with its weights as they are: without an adapter beside them, which
    transformers would add once more if it had been merged. `options`: those of `from_pretrained`.

    Raises ValueError when its files are damaged, weights are missing, or it is an adapter alone; else as `from_pretrained`.
    """
    refuse_adapter(path)
    options = {"adapter_kwargs": NO_ADAPTER, "output_loading_info": True} | options
    try:
        base, info = AutoModelForCausalLM.from_pretrained(path, **options)
    except (RuntimeError, SafetensorError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(str(error)) from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"its checkpoint lacks {len(missing)} weights of the model: {missing[0]} …")
    return fuse_gelu(base)


def fuse_gelu(model: nn.Module) -> nn.Module:
    """`model` with GPT-2's tanh GELU as torch's one kernel, in place.

    transformers' module has eight kernels, and CUDA's autocast runs its power in float32.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
    return model


def refuse_adapter(path: str | os.PathLike) -> None:
    """Raises ValueError when the folder `path` holds a PEFT adapter and no model."""
    if Path(path, "adapter_config.json").is_file() and not Path(path, "config.json").is_file():
        raise ValueError("it is a PEFT adapter: merge it into its base (merge_and_unload) and name the merged model")


def context_size(config: PretrainedConfig) -> int | None:
    """The longest sequence that a base takes; None where its config names no bound or scales rotary positions."""
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}  # some families: one for each kind of layer
    kinds = {each.get("rope_type") for each in (rope, *rope.values()) if isinstance(each, dict)}
    return getattr(config, "max_position_embeddings", None) if kinds <= {None, "default"} else None


def head_scale(config: PretrainedConfig) -> float:
    """`logit_scale` of a base with this config, measured on a random one of one block and few tokens."""
    config = memory_config(config, 1)
    config.vocab_size, config.pad_token_id = 8, None
    return round(logit_scale(AutoModelForCausalLM.from_config(config, dtype=torch.float32)), 6)


def vocabulary_size(tokenizer: Any) -> int:
    """How many rows a tokenizer's ids need: its length, or its highest id + 1 where ids are left out."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


@torch.no_grad()
def resize_vocabulary(base: nn.Module, size: int) -> None:
    """Resize a base's embeddings and head to `size` rows; new rows are the mean of the old ones, thus deterministic."""
    old = base.get_input_embeddings().weight.shape[0]
    base.resize_token_embeddings(size, mean_resizing=False)
    if size > old:
        for layer in (base.get_input_embeddings(), base.get_output_embeddings()):
            for weight in layer.parameters():
                # In float64 the order of the sum, which differs between machines, does not matter.
                weight[old:] = weight[:old].mean(0, dtype=torch.float64)


def find_memory(path: str | os.PathLike) -> Path:
    """The folder in or below `path` (a folder, or a hub name) that holds a memory's config and weights.

    Raises ValueError when there is none, or several, whose names are listed.
    """
    folder = Path(path) if Path(path).is_dir() else download(str(path))
    for pattern in (".", "knn_generator", "memory*", "*", "*/knn_generator"):
        places = [folder / name for name in glob.glob(pattern, root_dir=folder)]  # without hidden folders
        found = [
            place
            for place in places
            if (place / "config.json").is_file() and any((place / name).is_file() for name in WEIGHT_FILES)
        ]
        if len(found) > 1:
            names = sorted((str(each.relative_to(folder)) for each in found), key=lambda name: (len(name), name))
            raise ValueError(f"{path}: holds several memories ({', '.join(names)}); name one of them")
        if found:
            return found[0]
    raise ValueError(f"{path}: holds no memory; expected config.json beside model.safetensors or pytorch_model.bin")


def download(name: str, **hub: Any) -> Path:
    """The local copy of a hub repository's config and weights. Raises OSError or ValueError if there is none."""
    return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.bin"], **hub))


def memory_class(config: PretrainedConfig) -> type[MLPStack]:
    """The memory's class for a base's (or a memory's) config: `GPT2MLPModel`, `LlamaMLPModel`, `Qwen2MLPModel`, …

    Raises ValueError when there is no memory stack for the family: its decoder blocks have no plain `.mlp`.
    """
    family_parts(config)
    return family_class(type(config))


@functools.cache
def family_class(config_class: type[PretrainedConfig]) -> type[MLPStack]:
    """The memory's class for a family, by the class of its configs."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    pretrained = next(each for each in model_class.__mro__ if PreTrainedModel in each.__bases__)
    family = config_class.__name__.removesuffix("Config")
    blocks_name, block_norm_name, norm_name = NAMES.get(config_class.model_type, OTHER_NAMES)
    block_class = type(f"{family}MLPBlock", (MLPBlock,), {"norm_name": block_norm_name, "__module__": __name__})
    attributes = {
        "config_class": config_class,
        "block_class": block_class,
        "blocks_name": blocks_name,
        "norm_name": norm_name,
        "_no_split_modules": [block_class.__name__],
        "__module__": __name__,
        "__doc__": f"The MLP memory of {family} bases.",
    }
    return type(f"{family}MLPModel", (MLPStack, pretrained), attributes)


def load_memory(
    path: str | os.PathLike, *, dtype: torch.dtype | None = torch.float32, device: torch.device | str | None = None
) -> MLPStack:
    """Load the memory at `path` (a folder, or a hub name), in eval mode. `dtype` None keeps the stored one.

    Raises ValueError as `memory_class` and `MLPStack.from_pretrained` do.
    """
    folder = find_memory(path)
    config = AutoConfig.from_pretrained(folder)
    return memory_class(config).from_pretrained(folder, config=config, dtype=dtype, device=device)


def base_id(path: str | os.PathLike, **hub: Any) -> str:
    """The id of a base: SHA-256 of its config with the names and sizes of its weight files (hub names, looked up with the
    options `hub`: the commit).

    Raises OSError or ValueError where there is no readable config.
    """
    folder = Path(path)
    if folder.is_dir():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights: Any = sorted((file.name, file.stat().st_size) for kind in BASE_WEIGHTS for file in folder.glob(kind))
    else:
        loaded = AutoConfig.from_pretrained(str(path), **hub)
        config, weights = loaded.to_dict(), loaded._commit_hash
    config = {name: value for name, value in config.items() if name not in VOLATILE}
    return hashlib.sha256(json.dumps([config, weights], sort_keys=True, default=str).encode()).hexdigest()
