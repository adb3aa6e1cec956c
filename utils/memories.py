"""Opens a trained memory: alone, or joined with its base."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from utils.artefact import read_made, require
from utils.errors import InputError, one_line
from utils.loading import BaseArguments, default_device

if TYPE_CHECKING:
    import torch


def open_memory_of(
    arguments: BaseArguments, path: str | os.PathLike, base: Any = None, *, dtype: torch.dtype | None = None
) -> Any:
    """The memory at `path` (any published layout) in evaluation mode, in `dtype` (default: that of the flags).

    It goes to the device of the block of `base` that it reads from, without an open base to this process's device.

    Raises:
        InputError: no such block, no memory at `path`, or one of another base or block than the flags name.
    """
    from models.families import load_memory

    device = default_device()
    if base is not None:
        device = next(arguments.captured(base).parameters()).device
        # Weights that accelerate offloads are on "meta" between uses.
        device = base.device if device.type == "meta" else device
    try:
        memory = load_memory(path, dtype=arguments.dtype() if dtype is None else dtype, device=device)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise InputError(f"--knn_generator_path {path}: {one_line(error, 300)}") from None
    base_id = arguments.base_id() if arguments.model_name_or_path else None
    require(path, read_made(memory.name_or_path), base=base_id, layer_position=arguments.layer_position)
    return memory


def open_joint(
    arguments: BaseArguments,
    path: str | os.PathLike,
    base: Any,
    lmbda: float | str = 0.0,
    memory_temp: float = 1.0,
    *,
    dtype: torch.dtype | None = None,
) -> Any:
    """Base and memory as one model (`models.MLPMemory`) in evaluation mode.

    Raises InputError as `open_memory_of`, and where the memory does not fit the base or has no gate for "adaptive".
    """
    from models import MLPMemory

    memory = open_memory_of(arguments, path, base, dtype=dtype)
    try:
        return MLPMemory(base, memory, lmbda, memory_temp, arguments.layer_position).eval()
    except ValueError as error:
        raise InputError(f"--knn_generator_path {path}: {one_line(error, 300)}") from None
