"""Opens a trained memory: alone, or joined with its base."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from utils.artefact import read_made, require
from utils.errors import InputError, one_line
from utils.files import read_json
from utils.loading import BaseArguments, default_device, from_pretrained

if TYPE_CHECKING:
    import torch


def captured_by(arguments: BaseArguments, base: Any) -> Any:
    """The module of `base` that --layer_position names. Raises InputError where there is none."""
    from models.capture import captured_module

    try:
        return captured_module(base, arguments.layer_position)
    except ValueError as error:
        raise InputError(f"--layer_position {arguments.layer_position}: {error}") from None


def open_memory_of(
    arguments: BaseArguments, path: str | os.PathLike, base: Any = None, *, dtype: torch.dtype | None = None
) -> Any:
    """The memory at `path` (any published layout) in evaluation mode, in `dtype` (default: that of the flags), on the
    device of the captured block of `base`, or this process's. A tied one without `base` gets the head from the base's file.

    Raises InputError where there is no such block, no memory, or one of another base or block than the flags name.
    """
    from models.stack import load_memory

    device = default_device()
    if base is not None:
        device = next(captured_by(arguments, base).parameters()).device
        # Weights that accelerate offloads are on "meta" between uses.
        device = base.device if device.type == "meta" else device
    dtype = arguments.dtype() if dtype is None else dtype
    memory = from_pretrained(load_memory, path, "--knn_generator_path", dtype=dtype, device=device)
    base_id = arguments.base_id() if arguments.model_name_or_path else None
    require(path, read_made(memory.name_or_path), base=base_id, layer_position=arguments.layer_position)
    if memory.tied and base is None:
        head = head_of_base(arguments, memory.config, lambda: arguments.open_base(arguments.open_tokenizer()))
        memory.use_head(head.to(device, dtype))
    return memory


def head_of_base(arguments: BaseArguments, config: Any, open_base: Callable[[], Any]) -> torch.Tensor:
    """The base's head (config.vocab_size, hidden), float32 on the CPU, for a tied memory with this config.

    Only this tensor is read from the base's safetensors files. `open_base` opens the base where it has another name there
    or fewer rows than the tokenizer has tokens. Raises InputError for a head with a bias.
    """
    import torch
    from safetensors import SafetensorError, safe_open
    from transformers import AutoModelForCausalLM
    from transformers.utils import cached_file

    from models.stack import memory_config

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(memory_config(config, 1))
    head = base.get_output_embeddings().weight
    if getattr(base.get_output_embeddings(), "bias", None) is not None:
        raise InputError(f"--tie_head: the head of {config.model_type} models has a bias; train without it")
    # Several names where the head is the base's input embedding; GPT-2's own files leave the prefix out.
    names = [name for name, weight in base.named_parameters(remove_duplicate=False) if weight is head]
    names += [name.removeprefix(f"{base.base_model_prefix}.") for name in names]

    def find(file: str) -> str | None:
        hub = {name: value for name, value in arguments.hub().items() if name != "trust_remote_code"}
        return cached_file(arguments.require_base(), file, _raise_exceptions_for_missing_entries=False, **hub)

    with contextlib.suppress(OSError, SafetensorError):
        index = find("model.safetensors.index.json")
        files = read_json(index)["weight_map"] if index else dict.fromkeys(names, "model.safetensors")
        for name in filter(files.get, names):
            with safe_open(find(files[name]), "pt") as file:
                if name in set(file.keys()) and len(weight := file.get_tensor(name)) >= config.vocab_size:
                    return weight[: config.vocab_size].float()
    return open_base().get_output_embeddings().weight.detach().float().cpu()


def open_joint(
    arguments: BaseArguments,
    paths: str | os.PathLike | Sequence[str],
    base: Any,
    lmbda: float | Sequence[float] | str = 0.0,
    memory_temp: float = 1.0,
    *,
    dtype: torch.dtype | None = None,
) -> Any:
    """Base and memory, or several memories, as one model (`models.MLPMemory`) in evaluation mode.

    Raises InputError as `open_memory_of`, and where a memory does not fit the base or has no gate for "adaptive".
    """
    from models import MLPMemory

    paths = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    memories = [open_memory_of(arguments, path, base, dtype=dtype) for path in paths]
    try:
        return MLPMemory(base, memories, lmbda, memory_temp, arguments.layer_position).eval()
    except ValueError as error:
        raise InputError(f"--knn_generator_path {' '.join(map(str, paths))}: {one_line(error, 300)}") from None
