"""The folder of a joint model: its config, its model card, and which base it belongs to.

Layout: `config.json` (which base, lambda, temperature, layer), `memory/` (the memory in the published layout), the
tokenizer, `README.md` (the card) and, if asked for, the base itself in `base/`. `config.json` is written last, so a
folder that has one is whole.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from .stack import download, resize_vocabulary, vocabulary_size

logger = logging.getLogger(__name__)

INSIDE, MEMORY = "base", "memory"
# Arguments of a hub look-up that concern the joint folder's own repository, not the base's.
OWN_HUB_ARGUMENTS = ("revision", "subfolder", "code_revision", "adapter_kwargs", "_from_auto", "_commit_hash")


class MLPMemoryConfig(PretrainedConfig):
    """Config of `MLPMemory`. `text_config` is the base's own, so that generation finds its cache and context sizes.

    `base_model_name_or_path` says which base the folder belongs to ("." : it is inside, in `base/`).
    Raises ValueError for a lambda outside [0, 1] or a temperature that is not positive.
    """

    model_type = "mlp_memory"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        text_config: PretrainedConfig | dict | None = None,
        lmbda: float = 0.25,
        knn_temp: float = 1.0,
        layer_position: int = -1,
        base_model_name_or_path: str | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config
        self.lmbda = check_lambda(lmbda)
        self.knn_temp = check_temperature(knn_temp)
        self.layer_position = layer_position
        self.base_model_name_or_path = base_model_name_or_path
        super().__init__(**kwargs)

    # What tools that were written for plain decoders look for.

    @property
    def vocab_size(self) -> int:
        return self.text_config.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.text_config.hidden_size

    @property
    def max_position_embeddings(self) -> int | None:
        """The base's context in tokens; None where the family knows no limit."""
        return getattr(self.text_config, "max_position_embeddings", None)


def check_lambda(value: float) -> float:
    """`value` as a float. Raises ValueError unless it is in [0, 1]."""
    if not (math.isfinite(value) and 0.0 <= value <= 1.0):
        raise ValueError(f"lambda {value:g}: expected a number from 0 to 1")
    return float(value)


def check_temperature(value: float) -> float:
    """`value` as a float. Raises ValueError unless it is finite and above 0."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"memory temperature {value:g}: expected a number above 0")
    return float(value)


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
    folder = Path(path) if Path(path).is_dir() else download(str(path), own["revision"])
    if not isinstance(config, MLPMemoryConfig):
        config = read_joint_config(folder)
    if config is None:
        raise ValueError(
            f"{path}: is no folder of a joint model (config.json with model_type {MLPMemoryConfig.model_type}); "
            "pass memory= with the memory's folder"
        )
    hint = "pass the base's folder: MLPMemory.from_pretrained(base, memory)"
    base = config.base_model_name_or_path
    if (folder / INSIDE / "config.json").is_file():
        base = str(folder / INSIDE)
    elif not base:
        raise ValueError(f"{folder}: does not say which base it belongs to; {hint}")
    elif os.path.isabs(base) and not os.path.isdir(base):
        raise ValueError(f"{folder}: belongs to the base {base}, which is not there; {hint}")
    return folder / MEMORY, base, config


def read_joint_config(folder: str | os.PathLike) -> MLPMemoryConfig | None:
    """The joint config in `folder`, or None when its config.json is of another kind."""
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if values.get("model_type") != MLPMemoryConfig.model_type:
        return None
    try:
        return MLPMemoryConfig.from_dict(values)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: is no usable config of a joint model ({' '.join(str(error).split())[:200]})"
        ) from None


def resize_to_memory(base: PreTrainedModel, memory: nn.Module, reference: str | None) -> None:
    """Resize a base's vocabulary to its tokenizer's, where that is the memory's."""
    vocabulary = memory.lm_head.weight.shape[0]
    if base.config.get_text_config().vocab_size == vocabulary or not reference:
        return
    tokenizer = _tokenizer(reference)
    if tokenizer is not None and vocabulary_size(tokenizer) == vocabulary:
        logger.warning("%s: embeddings resized to the tokenizer's %d tokens", reference, vocabulary)
        resize_vocabulary(base, vocabulary)


def _tokenizer(path: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # a base without a tokenizer is no fault: ids go in, ids come out
        logger.info("%s: no tokenizer (%s)", path, error)
        return None


def save_joint(
    joint: PreTrainedModel,
    folder: str | os.PathLike,
    include_base: bool | None,
    base_reference: str | None,
    tokenizer: Any,
    results: dict[str, Any] | list[dict[str, Any]] | None,
    max_shard_size: int | str,
) -> None:
    """Write a joint model's folder; `MLPMemory.save_pretrained` documents the arguments."""
    folder = Path(folder)
    _check_target(folder)
    named = joint.config.base_model_name_or_path
    if base_reference is None and not include_base and (why := _not_found_again(joint, named)):
        if include_base is False:
            raise ValueError(f"{why}: pass base_reference= or include_base=True")
        logger.warning("%s: saved along in %s", why, folder / INSIDE)
        include_base = True
    reference = absolute(base_reference) or named
    if tokenizer is None:
        tokenizer = next(filter(None, map(_tokenizer, filter(None, (_opened_from(joint), reference)))), None)
    config = copy.deepcopy(joint.config)
    config.base_model_name_or_path = reference or None
    config.architectures = [type(joint).__name__]
    config.text_config = copy.deepcopy(joint.base_lm.config)

    if tokenizer is not None and tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token  # so that the saved folder generates in batches
        logger.info("the tokenizer has no padding token: %s takes its place", tokenizer.eos_token)

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder) as temporary:
        new = Path(temporary, "new")
        joint.knn_generator.save_pretrained(new / MEMORY, max_shard_size=max_shard_size)
        if include_base:
            joint.base_lm.save_pretrained(new / INSIDE, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
            if include_base:
                tokenizer.save_pretrained(new / INSIDE)
        joint.generation_config.save_pretrained(new)
        (new / "README.md").write_text(model_card(joint, reference, results), encoding="utf-8")
        config.save_pretrained(new)
        _move_in(new, folder, Path(temporary, "old"))


def absolute(name: str | os.PathLike | None) -> str | None:
    """A base's name as it stays true in every working directory: a folder's whole path, else (a hub name) itself."""
    return os.path.abspath(name) if name and os.path.isdir(name) else name and str(name)


def _check_target(folder: Path) -> None:
    """Raises ValueError when a joint model saved in `folder` would overwrite something else."""
    if read_joint_config(folder) is None:
        for name in ("config.json", MEMORY, INSIDE):
            if (folder / name).exists():
                raise ValueError(
                    f"{folder}: its {name} belongs to no joint model and would be overwritten; save to another folder"
                )


def _not_found_again(joint: PreTrainedModel, named: str | None) -> str | None:
    """Why loading from `named`, the folder or hub name of the base, would not give the joint model's base; None: it would."""
    base = joint.base_lm
    if not named:
        return "the base was not loaded from anywhere, so there is nothing to refer to"
    for place in (base.name_or_path, named):
        if os.path.basename(place) == INSIDE and read_joint_config(os.path.dirname(place)) is not None:
            return f"the base is a part of the folder {os.path.dirname(place)}"
    own_code = type(base).__module__.startswith("transformers_modules.")
    try:
        source = AutoModelForCausalLM.from_pretrained(named, dtype=base.dtype, trust_remote_code=own_code)
        resize_to_memory(source, joint.knn_generator, named)
    except Exception as error:
        return f"the base cannot be loaded from {named} ({type(error).__name__})"
    there = dict(source.named_parameters())
    for name, weight in base.named_parameters():
        if weight.is_meta or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            continue  # offloaded and quantised weights are not trained
        if name not in there or not torch.equal(weight.detach().cpu(), there[name].detach()):
            return f"the base's weights are not those of {named} ({name} differs)"
    return None


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


CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [mlp-memory, knn-lm]
{front}---

# MLP Memory

An MLP that was pretrained to imitate a kNN retriever over its training corpus (arXiv 2508.01832). It reads a
hidden state of the base model and its next-token distribution is mixed with the base's.

| | |
| --- | --- |
| base model | {base} |
| memory | {memory} |
| hidden state | input of the `.mlp` of block {layer_position} |
| lambda (weight of the memory) | {lmbda:g} |
| temperature of the memory | {knn_temp:g} |

## Measured

{measured}

## Use

With the project's code on the Python path:

```python
import models  # registers the model type
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this folder")
model.lmbda = 0.5  # may be changed at any time, as may model.knn_temp
```
"""


def model_card(joint: PreTrainedModel, base: str | None, results: dict[str, Any] | list[dict[str, Any]] | None) -> str:
    """Markdown with YAML front matter. `results`: one `results.json` or several; None says that nothing was measured."""
    memory = joint.knn_generator
    parameters = sum(parameter.numel() for parameter in memory.parameters())
    return CARD.format(
        front=f"base_model: {json.dumps(base)}\n" if base else "",
        base=base or "included in `base/`",
        memory=f"{type(memory).__name__}, {len(memory.blocks)} layers, {parameters:,} parameters",
        measured=_table([results] if isinstance(results, dict) else list(results or ())),
        layer_position=joint.layer_position,
        lmbda=joint.lmbda,
        knn_temp=joint.knn_temp,
    )


def _table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of the numbers and names in measured rows."""
    plain = (name for row in rows for name, value in row.items() if isinstance(value, (int, float, str)))
    columns = list(dict.fromkeys(plain))
    if not columns:
        return "Nothing was measured when this folder was written."
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(name, "")) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")
