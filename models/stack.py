"""What the memory stacks of all families share: the way from captured hidden states to next-token logits, and loading.

A stack is `layers × (x + MLP(norm(x)))`, a final norm and a head of its own (paper section 3.2), built from the base
family's MLP and norm modules. It is attention-free: each position is computed by itself, so it needs no mask, no
positions and no cache.

A memory is read in every layout it was ever published or saved in: `config.json` (the base's, with the layer count
changed) beside `model.safetensors`, sharded safetensors with an index, or a `.bin` of tensors; the original trainers'
`epoch_n/` and `epoch_n/knn_generator/`, where a joint state (keys `base_lm.*` and `knn_generator.*`) may stand beside
the memory alone; a folder of `MLPMemory.save_pretrained`.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutput

MEMORY_PREFIX = "knn_generator."
BASE_PREFIX = "base_lm."
SUBFOLDERS = ("knn_generator", "memory")
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


class MLPStack:
    """Mixin over a family's `PreTrainedModel`: constructor, forward, loading.

    A family names its attributes (`blocks_name`, `norm_name`: they are the weight names of published memories) and
    makes its norms and MLPs. All sizes come from the config; `config.num_hidden_layers` is the memory's own.
    """

    block_class = MLPBlock
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

    @classmethod
    def make_parts(cls, config: PretrainedConfig) -> tuple[list[MLPBlock], nn.Module]:
        """`config.num_hidden_layers` blocks of the family, and the norm after them."""
        blocks = [cls.block_class(cls.make_norm(config), cls.make_mlp(config)) for _ in range(config.num_hidden_layers)]
        return blocks, cls.make_norm(config)

    @property
    def blocks(self) -> nn.ModuleList:
        return getattr(self, self.blocks_name)

    @property
    def final_norm(self) -> nn.Module:
        return getattr(self, self.norm_name)

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
        loss = None if labels is None else shifted_nll(logits.log_softmax(-1, dtype=torch.float32), labels)
        return CausalLMOutput(loss=loss, logits=logits)

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> MLPStack:
        """Load a memory of this class from a folder or the hub, in eval mode.

        Weights are read strictly: missing or unexpected ones are an error, not random numbers. `dtype` None keeps the
        stored one. Raises ValueError as `load_memory` does, and when the memory is of another family than this class.
        """
        folder = find_memory(path)
        config = read_memory_config(folder)
        if config.model_type != cls.config_class.model_type:
            raise ValueError(f"{path}: holds a memory of the {config.model_type} family, expected a {cls.__name__}")
        state = read_memory_state(folder)
        transform = state.get("embedding_transform.weight")  # (hidden, input_dim)
        with torch.device("meta"):
            memory = cls(config, input_dim=None if transform is None else transform.shape[1])
        target = torch.device(device) if device is not None else None
        for name, value in state.items():
            # A copy, also where nothing changes: the file may be written over while the memory lives.
            state[name] = value.to(device=target, dtype=dtype if value.is_floating_point() else None, copy=True)
        try:
            memory.load_state_dict(state, strict=True, assign=True)
        except RuntimeError as error:
            told = " ".join(str(error).split()).partition(": ")[2]
            raise ValueError(
                f"{folder}: its weights do not fit its config.json as a {cls.__name__} (an MLP memory is expected, not "
                f"the base model): {told[:300]}"
            ) from None
        if dtype is not None:
            memory.config.dtype = dtype
        # What lies beside it is looked up there.
        memory.name_or_path = memory.config.name_or_path = os.path.abspath(folder)
        return memory.eval()


def shifted_nll(log_probs: torch.Tensor, labels: torch.Tensor, items: torch.Tensor | int | None = None) -> torch.Tensor:
    """Mean (or sum / `items`) of -log_probs[…, :-1, :] (…, time, vocabulary) at labels[…, 1:]; one of -100 adds nothing."""
    targets = labels[..., 1:].to(log_probs.device)  # (…, time - 1)
    counted = targets != -100
    chosen = log_probs[..., :-1, :].gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return -chosen.where(counted, 0.0).sum() / (counted.sum().clamp(min=1) if items is None else items)


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
    fit_layer_lists(vars(config), layers)
    setattr(config, name, layers)
    # A quantised base's memory is not quantised.
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    config.architectures = None
    return config


def vocabulary_size(tokenizer: Any) -> int:
    """How many rows a tokenizer's ids need: its length, or its highest id + 1 where its ids have holes."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


@torch.no_grad()
def resize_vocabulary(base: nn.Module, size: int) -> None:
    """Cut or grow a base's embeddings and head to `size` rows; new ones are the mean of the old, so always the same."""
    old = base.get_input_embeddings().weight.shape[0]
    base.resize_token_embeddings(size, mean_resizing=False)
    if size > old:
        for layer in (base.get_input_embeddings(), base.get_output_embeddings()):
            for weight in layer.parameters():
                # In float64 the order of the sum, another on each machine, makes no difference.
                weight[old:] = weight[:old].mean(0, dtype=torch.float64)


def find_memory(path: str | os.PathLike) -> Path:
    """The folder in or below `path` (a folder, or a hub name) that holds a memory's config and weights.

    Raises ValueError when there is none, or several, whose names are listed.
    """
    folder = Path(path)
    if folder.is_file():
        raise ValueError(f"{path}: is a file, expected the folder that holds a memory's config.json and weights")
    if not folder.is_dir():
        folder = download(str(path))
    found = _memories(folder)
    if not found:
        files = "config.json beside model.safetensors or pytorch_model.bin"
        raise ValueError(f"{path}: holds no MLP memory; expected {files}")
    if len(found) > 1:
        names = sorted((str(each.relative_to(folder)) for each in found), key=lambda name: (len(name), name))
        raise ValueError(f"{path}: holds several memories ({', '.join(names)}); name one of them")
    return found[0]


def _memories(folder: Path) -> list[Path]:
    """Memory folders: the one at `folder`, else those one level below."""
    if (here := _memory_at(folder)) is not None:
        return [here]
    below = [child for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".")]
    return [memory for child in below if (memory := _memory_at(child)) is not None]


def _memory_at(folder: Path) -> Path | None:
    """`folder` itself or a known subfolder of it, where config and weights are."""
    for place in (folder, *(folder / name for name in SUBFOLDERS)):
        if (place / "config.json").is_file() and any((place / name).is_file() for name in WEIGHT_FILES):
            return place
    return None


def download(name: str, **hub: Any) -> Path:
    """The local copy of a hub repository's config and weights. Raises ValueError when it cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"{name}: no such folder")
    try:
        folder = Path(snapshot_download(name, **hub, allow_patterns=["*.json", "*.safetensors"]))
        if not _memories(folder):
            folder = Path(snapshot_download(name, **hub, allow_patterns=["*.json", "*.bin"]))
        return folder
    except (HFValidationError, OSError) as error:
        told = f"no model of that name could be fetched from the hub ({type(error).__name__})"
        raise ValueError(f"{name}: no such folder, and {told}") from None


def read_memory_config(folder: Path) -> PretrainedConfig:
    """The config of the memory in `folder`. Raises ValueError when it is not one of a known family."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not readable JSON ({error})") from None
    model_type = values.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"{path}: model_type {model_type!r} is no model family that transformers knows")
    config_class = CONFIG_MAPPING[model_type]
    layers = values.get(layer_count_name(config_class), values.get("num_hidden_layers"))
    try:
        return config_class.from_dict(fit_layer_lists(values, layers) if layers else values)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: is no usable {model_type} config ({' '.join(str(error).split())})") from None


def read_memory_state(folder: Path) -> dict[str, torch.Tensor]:
    """The memory's weights by name; those of a joint state come without their prefix and without the base's."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            files = map(_read_file, weight_shards(folder / name))
            state = {key: value for file in files for key, value in file.items()}
            if any(key.startswith((MEMORY_PREFIX, BASE_PREFIX)) for key in state):
                own = [key for key in state if key.startswith(MEMORY_PREFIX)]
                state = {key.removeprefix(MEMORY_PREFIX): state[key] for key in own}
            if state:
                return state
    raise ValueError(f"{folder}: its weight files hold no weights of a memory, only a base model's ({BASE_PREFIX}*)")


def weight_shards(path: Path) -> list[Path]:
    """The weight files that an index names; any other file is one by itself."""
    if not path.name.endswith(".index.json"):
        return [path]
    try:
        files = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: is no index of weight files ({type(error).__name__})") from None
    for name in files:
        if not (path.parent / name).is_file():
            raise ValueError(f"{path}: names {name}, which is not there; fetch the checkpoint again")
    return [path.parent / name for name in files]


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    """Weights of one file; safetensors are mapped from disk, so what nobody uses is not read.

    A `.bin` must be a dict of tensors and nothing else: what would run code is refused before it does.
    """
    refusal = f"{path}: holds more than tensors; it is not read, convert it to safetensors where you trust it"
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(refusal) from None
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        told = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: is no whole weight file ({told}); fetch it again") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(refusal)
    return state
