"""The folder of a joint model, and opening one from a base and a memory.

Layout: `config.json` (which base, lambda, temperature, layer), `memory/` (the memory in the published layout), the
tokenizer, `README.md` (a model card) and, if asked for, the base itself in `base/`. `config.json` is written last, so a
folder that has one is whole. Knows how to open models; nothing of mixing or training.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from models.capture import captured_module
from models.joint_config import MLPMemoryConfig
from models.loading import load_memory
from models.model_card import model_card

if TYPE_CHECKING:
    from models.mlpMemory import MLPMemory

logger = logging.getLogger(__name__)

INSIDE = "base"
# Arguments of a hub look-up that concern the joint folder's own repository, not the base's.
OWN_HUB_ARGUMENTS = ("revision", "subfolder", "code_revision", "adapter_kwargs", "_from_auto", "_commit_hash")


def open_joint(
    cls: type[MLPMemory],
    base: str | os.PathLike | PreTrainedModel,
    memory: str | os.PathLike | nn.Module | None,
    settings: dict[str, Any],
    *,
    config: MLPMemoryConfig | None,
    device: torch.device | str | None,
    memory_dtype: torch.dtype | None,
    memory_device: torch.device | str | None,
    base_arguments: dict[str, Any],
) -> MLPMemory:
    """Open base and memory and join them, in eval mode; `MLPMemory.from_pretrained` documents the arguments."""
    revision = base_arguments.get("revision")
    if memory is None:
        base_arguments = {name: value for name, value in base_arguments.items() if name not in OWN_HUB_ARGUMENTS}
        folder, config = _joint_folder(base, config, revision)
        memory, base = folder / "memory", _base_of(folder, config)
        reference = config.base_model_name_or_path or base
    else:
        reference = base.name_or_path if isinstance(base, nn.Module) else str(base)
        config = None if isinstance(memory, nn.Module) else _read_config(Path(memory))
    saved = {} if config is None else {name: getattr(config, name) for name in ("lmbda", "knn_temp", "layer_position")}
    chosen = saved | {name: value for name, value in settings.items() if value is not None}
    if not isinstance(base, nn.Module):
        base = AutoModelForCausalLM.from_pretrained(str(base), **base_arguments)
        if device is not None:
            base.to(device)
    if not isinstance(memory, nn.Module):
        weight = next(captured_module(base, chosen.get("layer_position", -1)).parameters())
        place = base.device if weight.is_meta else weight.device  # meta: accelerate keeps the block elsewhere
        memory = load_memory(memory, dtype=memory_dtype or base.dtype, device=memory_device or place)
    _resize_to_memory(base, memory, reference)
    joint = cls(base, memory, **chosen)
    joint.config.base_model_name_or_path = reference
    return joint.eval()


def _joint_folder(path: object, config: MLPMemoryConfig | None, revision: str | None) -> tuple[Path, MLPMemoryConfig]:
    """The local folder and config of a saved joint model. Raises ValueError when `path` is none."""
    if isinstance(path, nn.Module):
        raise ValueError("a loaded base needs a memory: pass memory=")
    folder = Path(path)
    if not folder.is_dir():
        from models.loading import download

        folder = download(str(path), revision)
    config = config if isinstance(config, MLPMemoryConfig) else _read_config(folder)
    if config is None:
        raise ValueError(
            f"{path}: is no folder of a joint model (config.json with model_type {MLPMemoryConfig.model_type}); "
            "pass memory= with the memory's folder"
        )
    return folder, config


def _read_config(folder: Path) -> MLPMemoryConfig | None:
    """The joint config in `folder`, or None when its config.json is of another kind."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        return None
    if not isinstance(values, dict) or values.get("model_type") != MLPMemoryConfig.model_type:
        return None
    try:
        return MLPMemoryConfig.from_dict(values)
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: is no usable config of a joint model ({' '.join(str(error).split())})") from None


def _base_of(folder: Path, config: MLPMemoryConfig) -> str:
    """The base that a saved joint model names: the one inside, else its reference. ValueError when it is not there."""
    if (folder / INSIDE / "config.json").is_file():
        return str(folder / INSIDE)
    reference = config.base_model_name_or_path
    hint = "pass the base's folder: MLPMemory.from_pretrained(base, memory)"
    if not reference:
        raise ValueError(f"{folder}: does not say which base it belongs to; {hint}")
    if os.path.isabs(reference) and not os.path.isdir(reference):
        raise ValueError(f"{folder}: belongs to the base {reference}, which is not there; {hint}")
    return reference


def _resize_to_memory(base: PreTrainedModel, memory: nn.Module, reference: str | None) -> None:
    """Resize a base with a padded vocabulary to its tokenizer's length, where that is the memory's vocabulary."""
    vocabulary = memory.lm_head.weight.shape[0]
    if base.config.get_text_config().vocab_size == vocabulary or not reference:
        return
    tokenizer = _tokenizer(reference)
    if tokenizer is not None and len(tokenizer) == vocabulary:
        logger.warning("%s: embeddings resized to the tokenizer's %d tokens", reference, vocabulary)
        base.resize_token_embeddings(vocabulary)


def _tokenizer(path: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # a base without a tokenizer is no fault: ids go in, ids come out
        logger.info("%s: no tokenizer (%s)", path, error)
        return None


def save_joint(
    joint: MLPMemory,
    folder: str | os.PathLike,
    *,
    include_base: bool,
    base_reference: str | None,
    tokenizer: Any,
    results: dict[str, Any] | list[dict[str, Any]] | None,
    max_shard_size: int | str,
) -> None:
    """Write a joint model's folder; `MLPMemory.save_pretrained` documents the arguments."""
    reference = base_reference or joint.config.base_model_name_or_path or joint.base_lm.name_or_path
    if not reference and not include_base:
        raise ValueError(
            "the base was not loaded from anywhere, so there is nothing to refer to: pass base_reference= or "
            "include_base=True"
        )
    if reference and os.path.isdir(reference):
        reference = os.path.abspath(reference)
    if tokenizer is None and reference:
        tokenizer = _tokenizer(reference)
    config = copy.deepcopy(joint.config)
    config.base_model_name_or_path = reference or None
    config.architectures = [type(joint).__name__]
    config.text_config = copy.deepcopy(joint.base_lm.config)

    folder = Path(folder)
    temporary = folder / f".tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        joint.knn_generator.save_pretrained(temporary / "memory", max_shard_size=max_shard_size)
        if include_base:
            joint.base_lm.save_pretrained(temporary / INSIDE, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer = _padding(tokenizer)
            tokenizer.save_pretrained(temporary)
            if include_base:
                tokenizer.save_pretrained(temporary / INSIDE)
        joint.generation_config.save_pretrained(temporary)
        (temporary / "README.md").write_text(model_card(joint, reference, results), encoding="utf-8")
        config.save_pretrained(temporary)
        _move_in(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _padding(tokenizer: Any) -> Any:
    """The tokenizer with a padding token, so that the saved folder generates in batches: the end of sequence if none."""
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
        logger.info("the tokenizer has no padding token: %s takes its place", tokenizer.eos_token)
    return tokenizer


def _move_in(temporary: Path, folder: Path) -> None:
    """Move what was written into `folder`, its config.json last: without one a folder is no joint model."""
    (folder / "config.json").unlink(missing_ok=True)
    if (folder / INSIDE).is_dir() and not (temporary / INSIDE).is_dir():
        shutil.rmtree(folder / INSIDE)
    for source in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
        target = folder / source.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(source, target)
