"""The folder of a joint model, opened and saved.

Layout: `config.json` (which base, lambda, temperature, layer), `memory/` (the memory in the published layout), the
tokenizer, `README.md` (the card), the code (transformers' `auto_map` names it) and, where asked for or needed, the base
itself in `base/`. `config.json` is written last, so a folder that has one is whole.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from .joint_base import ANOTHER_BASE, INSIDE, absolute, fingerprint, not_found_again, tokenizer_of
from .joint_card import measured_rows, model_card
from .joint_config import MLPMemoryConfig, read_joint_config
from .stack import BASE_PREFIX, MEMORY_PREFIX, WEIGHT_FILES, download

logger = logging.getLogger(__name__)

MEMORY = "memory"
# Arguments of a hub look-up that concern the joint folder's own repository, not the base's.
OWN_HUB_ARGUMENTS = ("revision", "subfolder", "code_revision", "adapter_kwargs", "_from_auto", "_commit_hash")
HUB_ARGUMENTS = ("token", "cache_dir", "local_files_only", "force_download")


def joint_parts(
    path: str | os.PathLike, config: MLPMemoryConfig | None, base_arguments: dict[str, Any]
) -> tuple[Path, str, MLPMemoryConfig]:
    """Memory, base and config of the joint model saved at `path` (a folder, or a hub name).

    Arguments of the hub look-up that are the joint folder's own leave `base_arguments`. Raises ValueError when `path`
    is no joint model, or its base is not there.
    """
    if isinstance(path, nn.Module):
        raise ValueError("a loaded base needs a memory: pass memory=")
    own = {name: base_arguments.pop(name, None) for name in OWN_HUB_ARGUMENTS}
    hub = {name: base_arguments[name] for name in HUB_ARGUMENTS if name in base_arguments}
    folder = Path(path) if Path(path).is_dir() else download(str(path), revision=own["revision"], **hub)
    recorded = read_joint_config(folder)
    if recorded is None:
        raise ValueError(
            f"{path}: is no folder of a joint model (config.json with model_type {MLPMemoryConfig.model_type}); "
            "pass memory= with the memory's folder"
        )
    # By its type's name: the class is another one where transformers loaded the config's file by itself.
    config = config if getattr(config, "model_type", None) == MLPMemoryConfig.model_type else recorded
    base = base_arguments.pop("base_model_name_or_path", None) or config.base_model_name_or_path
    if base == recorded.base_model_name_or_path and (folder / INSIDE / "config.json").is_file():
        base = str(folder / INSIDE)
    elif not base:
        raise ValueError(f"{folder}: does not say which base it belongs to; {ANOTHER_BASE}")
    elif os.path.isabs(base) and not os.path.isdir(base):
        raise ValueError(f"{folder}: belongs to the base {base}, which is not there; {ANOTHER_BASE}")
    return folder / MEMORY, base, config


def save_joint(
    joint: PreTrainedModel,
    folder: str | os.PathLike,
    state_dict: dict[str, torch.Tensor] | None,
    include_base: bool | None,
    base_reference: str | None,
    tokenizer: Any,
    results: dict[str, Any] | list[dict[str, Any]] | None,
    max_shard_size: int | str,
) -> None:
    """Write a joint model's folder; `MLPMemory.save_pretrained` documents the arguments."""
    folder = Path(folder)
    if told := taken(folder):
        raise ValueError(told)
    named = joint.config.base_model_name_or_path
    if base_reference is None and not include_base and (why := not_found_again(joint, named, state_dict)):
        if include_base is False:
            raise ValueError(f"{why}: pass base_reference= or include_base=True")
        logger.warning("%s: saved along in %s", why, folder / INSIDE)
        include_base = True
    reference = absolute(base_reference) or named
    if tokenizer is None:
        places = ((_opened_from(joint), joint), (reference, joint.base_lm))
        tokenizer = next(filter(None, (tokenizer_of(place, model) for place, model in places if place)), None)
    config = copy.deepcopy(joint.config)
    config.base_model_name_or_path = None if include_base and reference and os.path.isabs(reference) else reference
    config.base_fingerprint = fingerprint(reference) if reference and not include_base else None
    if results is not None:
        config.results = measured_rows(results)
    # What opens it: transformers' server looks this class up in transformers itself, which has no MLPMemory.
    config.architectures = ["AutoModelForCausalLM"]
    config.text_config = copy.deepcopy(joint.base_lm.config)
    config.text_config.name_or_path = ""

    if tokenizer is not None and tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token  # so that the saved folder generates in batches
        logger.info("the tokenizer has no padding token: %s takes its place", tokenizer.eos_token)

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder) as temporary:
        new = Path(temporary, "new")
        parts = [(MEMORY, joint.knn_generator, MEMORY_PREFIX), (INSIDE, joint.base_lm, BASE_PREFIX)]
        for name, part, prefix in parts if include_base else parts[:1]:
            own = {key.removeprefix(prefix): state_dict[key] for key in state_dict or () if key.startswith(prefix)}
            if hasattr(part, "merge_and_unload"):  # peft's: saved as the plain model that it makes
                part = copy.deepcopy(part)
                part.load_state_dict(own, strict=False)
                part, own = part.merge_and_unload(), {}
            part.save_pretrained(new / name, state_dict=own or None, max_shard_size=max_shard_size)
            if not (new / name / "config.json").is_file() or any(".base_layer." in key for key in part.state_dict()):
                raise ValueError(f"the {name} has adapters that are not merged: merge them before it is saved")
        for other in _beside(joint.knn_generator):
            (shutil.copytree if other.is_dir() else shutil.copy)(other, new / MEMORY / other.name)
        if joint.gate is not None:
            joint.gate.save(new / MEMORY)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
            if include_base:
                tokenizer.save_pretrained(new / INSIDE)
        joint.generation_config.save_pretrained(new)
        (new / "README.md").write_text(model_card(joint, config, bool(include_base)), encoding="utf-8")
        custom_object_save(joint, new, config)
        config.save_pretrained(new)
        _move_in(new, folder, Path(temporary, "old"))


def _beside(memory: PreTrainedModel) -> list[Path]:
    """What lies beside the memory's own files where it was loaded and goes with it: other networks and their settings."""
    if not os.path.isdir(memory.name_or_path):
        return []
    there = list(Path(memory.name_or_path).iterdir())
    others = [path.stem for path in there if path.suffix == ".safetensors" and not path.name.startswith("model")]
    files = [path for path in there if path.is_file() and path.name.split(".")[0].startswith(tuple(others))]
    return files + [path for path in there if (path / "config.json").is_file() and (path / WEIGHT_FILES[0]).is_file()]


def has_local_base(folder: str | os.PathLike) -> bool:
    """Whether the joint model saved in `folder` needs a base that lies elsewhere on this machine."""
    named = read_joint_config(folder).base_model_name_or_path
    return bool(named) and os.path.isabs(named)


def taken(folder: Path) -> str | None:
    """Why no joint model can be saved in `folder`: something else lies there and would be overwritten; else None."""
    there = [name for name in ("config.json", MEMORY, INSIDE) if (folder / name).exists()]
    if not there or read_joint_config(folder) is not None:
        return None
    return f"{folder}: its {there[0]} belongs to no joint model and would be overwritten; save to another folder"


def _opened_from(joint: PreTrainedModel) -> str | None:
    """The joint folder that `joint` was opened from."""
    return joint.name_or_path if read_joint_config(joint.name_or_path) is not None else None


def _move_in(new: Path, folder: Path, old: Path) -> None:
    """Move what was written to `new` into `folder`, its config.json last: without one a folder is no joint model.

    What it replaces goes to `old`, to be deleted only when the new is in place.
    """
    old.mkdir()
    for name in ("config.json", INSIDE):
        if (folder / name).exists():
            os.replace(folder / name, old / name)
    for source in sorted(new.iterdir(), key=lambda path: path.name == "config.json"):
        target = folder / source.name
        if target.is_dir():
            os.replace(target, old / source.name)
        os.replace(source, target)
