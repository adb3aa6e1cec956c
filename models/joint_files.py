"""The folder of a joint model: opening its parts and saving it.

Layout: `config.json` (base, lambda, temperature, layer), `memory/` (in the published layout; further ones in `memory_2/`
and so on, each with its gate), the tokenizer,
`README.md` (the model card), the code that `auto_map` names and, if it is included, the base in `base/`. `config.json`
is written last, so a folder that has one is complete.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from .gate import WEIGHTS, LambdaGate
from .joint_config import ADAPTIVE, OLDEST_MAJOR, MLPMemoryConfig, read_joint_config
from .stack import BASE_PREFIX, MEMORY_PREFIX, base_id, download, load_base, resize_vocabulary, vocabulary_size

logger = logging.getLogger(__name__)

INSIDE, MEMORY = "base", "memory"
# Arguments of a hub look-up: those of the joint folder's own repository, and those that its base's needs too.
OWN_HUB_ARGUMENTS = ("revision", "subfolder", "code_revision", "adapter_kwargs", "_from_auto", "_commit_hash")
BASE_OPTIONS = ("trust_remote_code", "revision", "token", "cache_dir", "local_files_only")
HUB_ARGUMENTS = ("token", "cache_dir", "local_files_only", "force_download")

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [mlp-memory, knn-lm]
{front}---

# MLP Memory

An MLP that was pretrained to imitate a kNN retriever over its training corpus (arXiv 2508.01832). It reads a
hidden state of the base model and its next-token distribution is mixed with the base's.

| base model | {base} |
| --- | --- |
| memory | {memory} |
| hidden state | input of the `.mlp` of block {layer_position} |
| lambda (weight of the memory) | {lmbda} |
| temperature of the memory | {knn_temp} |

{results}
Needs transformers {oldest} or newer. `trust_remote_code=True` runs the code in this folder: read it first.

```python
tokenizer = AutoTokenizer.from_pretrained("this folder", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("this folder", trust_remote_code=True)
model.lmbda = 0.5  # may be changed at any time, as may model.knn_temp
```

`from_pretrained(…, base_model_name_or_path="another copy")` takes the base from elsewhere.
"""


# Opening


def absolute(name: str | os.PathLike | None) -> str | None:
    """A base's name that is valid in every working directory: a folder's absolute path, or the hub name itself."""
    return os.path.abspath(name) if name and os.path.isdir(name) else name and str(name)


def joint_parts(
    path: str | os.PathLike, config: MLPMemoryConfig | None, base_arguments: dict[str, Any]
) -> tuple[list[Path], str, MLPMemoryConfig]:
    """Memories, base and config of the joint model saved at `path` (a folder, or a hub name).

    Removes from `base_arguments` those of the joint folder's own hub look-up. Raises ValueError when `path` is not a
    joint model.
    """
    own = {name: base_arguments.pop(name, None) for name in OWN_HUB_ARGUMENTS}
    hub = {name: base_arguments[name] for name in HUB_ARGUMENTS if name in base_arguments}
    folder = Path(path) if Path(path).is_dir() else download(str(path), revision=own["revision"], **hub)
    recorded = read_joint_config(folder)
    if recorded is None:
        raise ValueError(f"{path}: is not a joint model (config.json with model_type mlp_memory); pass memory= as well")
    # Compared by name: a config opened with trust_remote_code has a class of its own.
    config = config if getattr(config, "model_type", None) == recorded.model_type else recorded
    base = base_arguments.pop("base_model_name_or_path", None) or config.base_model_name_or_path
    if base == recorded.base_model_name_or_path and (folder / INSIDE / "config.json").is_file():
        base = str(folder / INSIDE)
    return [folder / place for place in memory_folders(config.memories)], base, config


def memory_folders(memories: int) -> list[str]:
    """The names of the memories' folders in a joint folder: memory, memory_2, …"""
    return [MEMORY, *(f"{MEMORY}_{number}" for number in range(2, memories + 1))]


def open_base(name: str, arguments: dict[str, Any], joint_folder: Path | None = None) -> PreTrainedModel:
    """The base `name` (a folder, or a hub name), frozen. `joint_folder`: the joint model that it is opened for.

    Raises ValueError as `load_base` does, and when it cannot be loaded.
    """
    try:
        return load_base(name, **arguments).requires_grad_(False)
    except (OSError, ValueError) as error:
        message = f"base {name}: cannot be loaded ({' '.join(str(error).split())[:200]})"
        hint = "; to use another base: from_pretrained(folder, base_model_name_or_path=…)" if joint_folder else ""
        raise ValueError(message + hint) from None


def id_of(base: str, arguments: dict[str, Any]) -> str | None:
    """`base_id` of a base; None where it has no readable config."""
    try:
        return base_id(base, **{name: arguments[name] for name in BASE_OPTIONS if name in arguments})
    except (OSError, ValueError):
        return None


def revision_of(base: nn.Module) -> dict[str, str]:
    """The commit that a base was downloaded from, as an argument of a further download; none for a folder."""
    commit = getattr(base.config, "_commit_hash", None)
    return {"revision": commit} if commit else {}


def made_for(memory: Path, config: MLPMemoryConfig | None) -> dict[str, Any]:
    """`base` (its id) and `layer_position` that the memory in a folder was trained for, where `made.json` or its joint
    config records them."""
    record = memory / "made.json"
    if record.is_file():
        made = json.loads(record.read_text(encoding="utf-8"))
        return {"base": made["made_from"].get("base"), "layer_position": made["settings"].get("layer_position", -1)}
    return {"base": config.base_id, "layer_position": config.layer_position} if config is not None else {}


def open_gate(memory: nn.Module, base: nn.Module) -> LambdaGate:
    """The gate in a memory's folder. Raises ValueError where there is none, or one of another base."""
    folder = memory.name_or_path
    gate = LambdaGate.load(folder)
    if gate is None:
        raise ValueError(f"lambda {ADAPTIVE}: the memory {folder} has no gate; train one: python -m training.gate")
    record = Path(folder, f"{WEIGHTS}.made.json")
    recorded = json.loads(record.read_text(encoding="utf-8"))["made_from"].get("base") if record.is_file() else None
    if recorded not in (None, found := id_of(base.name_or_path, revision_of(base))) and found:
        raise ValueError(
            f"lambda {ADAPTIVE}: the gate of {folder} was trained for another base; run training.gate again"
        )
    return gate


def check_fit(base_config: PretrainedConfig, memory: nn.Module) -> None:
    """Raises ValueError when family, hidden size or vocabulary of base and memory differ."""
    base = base_config.get_text_config()
    for what, own, expected in (
        ("model family", memory.config.model_type, base.model_type),
        ("hidden size", memory.input_dim, base.hidden_size),
        ("vocabulary size", memory.config.vocab_size, base.vocab_size),
    ):
        if own != expected:
            raise ValueError(
                f"{what} is {own} in the memory, {expected} in the base; use the memory trained for this base"
            )


def resize_to_memory(base: PreTrainedModel, memory: nn.Module, reference: str | None) -> None:
    """Resize a base with a padded vocabulary to its tokenizer, if the memory was made for that."""
    size = memory.config.vocab_size
    if reference and base.config.get_text_config().vocab_size != size:
        tokenizer = tokenizer_of(reference, base)
        if tokenizer is not None and vocabulary_size(tokenizer) == size:
            logger.warning("%s: embeddings resized to the tokenizer's %d tokens", reference, size)
            resize_vocabulary(base, size)


def tokenizer_of(path: str | None, model: PreTrainedModel) -> Any:
    """The tokenizer at `path`, or None. Code that lies there is run only if the model's was."""
    try:
        remote_code = type(model).__module__.startswith("transformers_modules.")
        return AutoTokenizer.from_pretrained(path, trust_remote_code=remote_code) if path else None
    except Exception as error:  # a base need not have a tokenizer
        logger.info("%s: no tokenizer (%s)", path, error)
        return None


# Saving


def save_joint(
    joint: PreTrainedModel,
    folder: str | os.PathLike,
    state_dict: dict[str, torch.Tensor] | None = None,
    *,
    include_base: bool | None = None,
    tokenizer: Any = None,
    results: dict[str, Any] | list[dict[str, Any]] | None = None,
    max_shard_size: int | str = "5GB",
    **_: Any,
) -> None:
    """Write a joint model's folder: memory, settings, tokenizer, model card, code, and base or its name.

    Args:
        state_dict: weights to save in place of the model's own, under its names.
        include_base: save the base in `base/`. None: if it has no name, has parameters that require gradients, or is a
            part of another joint folder.
        tokenizer: default: the base's.
        results: rows of results.json for the model card.

    Raises ValueError where the folder holds something else, or `include_base` is False and the base could not be loaded
    again.
    """
    folder = Path(folder)
    places = ("config.json", INSIDE, *memory_folders(len(joint.memories)))
    present = [name for name in places if (folder / name).exists()]
    if present and read_joint_config(folder) is None:
        raise ValueError(
            f"{folder}: its {present[0]} is not a joint model's and would be overwritten; use another folder"
        )
    reference = joint.config.base_model_name_or_path
    if not include_base and (reason := _why_included(joint, reference)):
        if include_base is False:
            raise ValueError(f"{reason}: pass include_base=True")
        logger.warning("%s: it is saved in %s", reason, folder / INSIDE)
        include_base = True
    opened = joint.name_or_path if joint.name_or_path and read_joint_config(joint.name_or_path) else None
    tokenizer = tokenizer or tokenizer_of(opened, joint) or tokenizer_of(reference, joint.base_lm)
    if tokenizer is not None and tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token  # so that the folder generates in batches

    config, folders = copy.deepcopy(joint.config), memory_folders(len(joint.memories))
    config.memories = len(folders)
    config.base_model_name_or_path = None if include_base and reference and os.path.isabs(reference) else reference
    config.base_id = None if include_base or not reference else id_of(reference, revision_of(joint.base_lm))
    if results is not None:
        config.results = measured_rows(results)
    config.architectures = ["AutoModelForCausalLM"]  # transformers' server looks the class up by this name
    config.text_config = copy.deepcopy(joint.base_lm.config)
    config.text_config.name_or_path = ""

    with _replacing(folder) as new:
        prefixes = [MEMORY_PREFIX, *(f"more_memories.{number}." for number in range(len(joint.more_memories)))]
        gates = list(joint.gates) or [LambdaGate.load(memory.name_or_path) for memory in joint.memories]
        for place, memory, prefix, gate in zip(folders, joint.memories, prefixes, gates, strict=True):
            _save_part(memory, new / place, state_dict, prefix, max_shard_size)
            if gate is not None:
                gate.save(new / place)
        if include_base:
            _save_part(joint.base_lm, new / INSIDE, state_dict, BASE_PREFIX, max_shard_size)
        if tokenizer is not None:
            for each in (new, new / INSIDE) if include_base else (new,):
                tokenizer.save_pretrained(each)
        joint.generation_config.save_pretrained(new)
        (new / "README.md").write_text(model_card(joint, config, bool(include_base)), encoding="utf-8")
        custom_object_save(joint, new, config)
        config.save_pretrained(new)
        for file in filter(Path.is_file, new.rglob("*")):  # safetensors ignores the umask
            file.chmod((new / "README.md").stat().st_mode)


def _why_included(joint: PreTrainedModel, named: str | None) -> str | None:
    """Why the base must be saved inside: `named`, its folder or hub name, may not hold it as it is. None: it does."""
    if not named:
        return "the base has no name to load it from"
    if any(parameter.requires_grad for parameter in joint.base_lm.parameters()):
        return "the base is trainable"
    inside = next((place for place in (joint.base_lm.name_or_path, named) if os.path.basename(place) == INSIDE), None)
    if inside and read_joint_config(os.path.dirname(inside)) is not None:
        return f"the base is a part of the folder {os.path.dirname(inside)}"
    return None


def _save_part(
    part: PreTrainedModel,
    folder: Path,
    state_dict: dict[str, torch.Tensor] | None,
    prefix: str,
    max_shard_size: int | str,
) -> None:
    """Save base or memory, with the weights of `state_dict` under `prefix` if it has any."""
    state = {name.removeprefix(prefix): state_dict[name] for name in state_dict or () if name.startswith(prefix)}
    if hasattr(part, "merge_and_unload"):  # peft's model: saved with its adapter merged
        part = copy.deepcopy(part)
        part.load_state_dict(state, strict=False)
        part, state = part.merge_and_unload(), {}
    if any(".base_layer." in name for name in part.state_dict()):
        raise ValueError(f"the {folder.name} has an adapter: merge it first (peft: merge_and_unload)")
    part.save_pretrained(folder, state_dict=state or None, max_shard_size=max_shard_size)


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Yield a folder whose files then go into `folder`. On failure nothing of it is left, and `folder` is unchanged."""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder) as temporary:
            yield Path(temporary, "new")
            _replace(Path(temporary, "new"), folder)
    except BaseException as error:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, SafetensorError) or type(error) is Exception:  # a full disk, by tokenizers
            raise OSError(f"{folder}: cannot be written ({error})") from error
        raise


def _replace(new: Path, folder: Path) -> None:
    """Move the files in `new` into `folder`, config.json last, in place of those of the same names."""
    own = read_joint_config(folder)  # of the joint model that is replaced, if there is one
    (folder / "config.json").unlink(missing_ok=True)
    for stale in (INSIDE, *memory_folders(own.memories)) if own else ():
        shutil.rmtree(folder / stale, ignore_errors=True)
    for source in sorted(new.iterdir(), key=lambda path: path.name == "config.json"):
        if source.is_dir():
            shutil.rmtree(folder / source.name, ignore_errors=True)
        os.replace(source, folder / source.name)


# The model card


def model_card(joint: PreTrainedModel, config: MLPMemoryConfig, included: bool) -> str:
    """Markdown with YAML front matter; `config` is the one that is saved. It names no local path."""
    reference = config.base_model_name_or_path
    hub_name = reference if reference and not os.path.isabs(reference) else None
    return CARD.format(
        front=f"base_model: {json.dumps(hub_name)}\n" if hub_name else "",
        base=(hub_name or _described(joint.base_lm)) + (", in `base/`" if included else ""),
        memory="; ".join(map(_described, joint.memories)),
        results="".join(
            f"- {', '.join(f'{name} {value}' for name, value in row.items())}\n" for row in config.results or ()
        ),
        layer_position=config.layer_position,
        lmbda=config.lmbda,
        knn_temp=config.knn_temp,
        oldest=OLDEST_MAJOR,
    )


def _described(model: nn.Module) -> str:
    layers = model.config.get_text_config().num_hidden_layers
    return f"{type(model).__name__}, {layers} layers, {model.num_parameters():,} parameters"


def measured_rows(results: dict[str, Any] | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The numbers and names of one `results.json` or several, without local paths; floats with four digits."""
    rows = [results] if isinstance(results, dict) else results
    return [
        {
            name: float(f"{value:.4g}") if isinstance(value, float) else value
            for name, value in row.items()
            if isinstance(value, (int, float)) or (isinstance(value, str) and not os.path.isabs(value))
        }
        for row in rows
    ]
