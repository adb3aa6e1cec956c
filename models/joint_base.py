"""Which base a joint model belongs to: how it is named, and whether loading gives the same one again."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from .joint_config import MLPMemoryConfig, read_joint_config
from .stack import BASE_PREFIX, WEIGHT_FILES, resize_vocabulary, vocabulary_size, weight_shards

logger = logging.getLogger(__name__)

# The folder of a base that lies inside its joint model's.
INSIDE = "base"
SAMPLES, SAMPLE_BYTES = 64, 4096
ANOTHER_BASE = "give another: from_pretrained(folder, base_model_name_or_path=…)"


def absolute(name: str | os.PathLike | None) -> str | None:
    """A base's name as it stays true in every working directory: a folder's whole path, else (a hub name) itself."""
    return os.path.abspath(name) if name and os.path.isdir(name) else name and str(name)


def open_base(name: str, folder: Path, config: MLPMemoryConfig, arguments: dict[str, Any]) -> PreTrainedModel:
    """The base of the joint model in `folder`. Raises ValueError where it cannot be had; warns of other weights."""
    try:
        base = AutoModelForCausalLM.from_pretrained(name, **arguments)
    except OSError as error:
        told = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{folder}: belongs to the base {name}, which cannot be loaded ({told}); {ANOTHER_BASE}"
        ) from None
    recorded, found = config.base_fingerprint, fingerprint(name)
    if recorded and found and recorded != found:
        logger.warning(
            "%s: was written for a base with the weights %s; those of %s are %s", folder, recorded, name, found
        )
    return base


def fingerprint(name: str) -> str | None:
    """What tells one revision of a base from another: a digest of its weight files' sizes and of samples of their bytes.

    `name` is a folder, or a hub name whose files are in the cache. None where no weight files are found.
    """
    for file in WEIGHT_FILES:
        path = Path(name, file) if os.path.isabs(name) or os.path.isdir(name) else try_to_load_from_cache(name, file)
        if isinstance(path, (str, Path)) and Path(path).is_file():
            break
    else:
        return None
    digest = hashlib.sha256()
    for shard in weight_shards(Path(path)):
        size = shard.stat().st_size
        digest.update(f"{shard.name} {size}\n".encode())
        with open(shard, "rb") as opened:
            for part in range(SAMPLES):
                opened.seek(size * part // SAMPLES)
                digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def check_fit(base_config: PretrainedConfig, memory: nn.Module) -> None:
    """Raises ValueError when a memory cannot belong to a base: family, hidden size or vocabulary differ."""
    base = base_config.get_text_config()
    vocabulary = memory.lm_head.weight.shape[0]
    hint = "use the memory that was trained for this base"
    if memory.config.model_type != base.model_type:
        raise ValueError(
            f"the memory is for the {memory.config.model_type} family, the base is {base.model_type}; {hint}"
        )
    if memory.input_dim != base.hidden_size:
        raise ValueError(
            f"the memory reads hidden states of size {memory.input_dim}, the base's hidden size is {base.hidden_size}; {hint}"
        )
    if vocabulary != base.vocab_size:
        raise ValueError(
            f"the memory's vocabulary has {vocabulary} tokens, the base's {base.vocab_size}; {hint}, with the base's "
            "embeddings resized to its tokenizer"
        )


def resize_to_memory(base: PreTrainedModel, memory: nn.Module, reference: str | None) -> None:
    """Resize a base's vocabulary to its tokenizer's, where that is the memory's."""
    vocabulary = memory.lm_head.weight.shape[0]
    if base.config.get_text_config().vocab_size == vocabulary or not reference:
        return
    tokenizer = tokenizer_of(reference, base)
    if tokenizer is not None and vocabulary_size(tokenizer) == vocabulary:
        logger.warning("%s: embeddings resized to the tokenizer's %d tokens", reference, vocabulary)
        resize_vocabulary(base, vocabulary)


def tokenizer_of(path: str, model: PreTrainedModel) -> Any:
    """The tokenizer that lies at `path`, or None; code that lies there is run only where that of `model` was."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=_has_own_code(model))
    except Exception as error:  # a base without a tokenizer is no fault: ids go in, ids come out
        logger.info("%s: no tokenizer (%s)", path, error)
        return None


def _has_own_code(model: PreTrainedModel) -> bool:
    return type(model).__module__.startswith("transformers_modules.")


def not_found_again(
    joint: PreTrainedModel, named: str | None, state_dict: dict[str, torch.Tensor] | None = None
) -> str | None:
    """Why loading from `named`, the folder or hub name of the base, would not give the joint model's base; None: it would.

    The weights are those in `state_dict` (of the joint model), where it has the base's.
    """
    base = joint.base_lm
    if not named:
        return "the base was not loaded from anywhere, so there is nothing to refer to"
    for place in (base.name_or_path, named):
        if os.path.basename(place) == INSIDE and read_joint_config(os.path.dirname(place)) is not None:
            return f"the base is a part of the folder {os.path.dirname(place)}"
    try:
        source = AutoModelForCausalLM.from_pretrained(named, dtype=base.dtype, trust_remote_code=_has_own_code(base))
        resize_to_memory(source, joint.knn_generator, named)
    except Exception as error:
        return f"the base cannot be loaded from {named} ({type(error).__name__})"
    there = source.state_dict()
    given = {
        name.removeprefix(BASE_PREFIX): weight
        for name, weight in (state_dict or {}).items()
        if name.startswith(BASE_PREFIX)
    }
    for name, weight in (given or dict(base.named_parameters())).items():
        if weight.is_meta or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            continue  # offloaded and quantised weights are not trained
        if name not in there or not torch.equal(weight.detach().cpu(), there[name].detach()):
            return f"the base's weights are not those of {named} ({name} differs)"
    return None
