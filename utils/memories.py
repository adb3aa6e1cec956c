"""Opening a trained memory: alone, or for the base whose hidden states it is to read."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from utils.errors import InputError, one_line
from utils.files import read_json
from utils.legacy import check_made
from utils.loading import RUN_RECORD, BaseArguments, default_device

if TYPE_CHECKING:
    import torch


def open_memory_of(
    arguments: BaseArguments, path: str | os.PathLike, base: Any = None, *, dtype: torch.dtype | None = None
) -> Any:
    """The memory in `path` (any published layout), in evaluation mode, in `dtype` (default: that of the flags).

    It goes to the device of the block of `base` that it reads from. Without an open base it is compared with the one
    that the flags name, and goes to this process's device.

    Raises:
        InputError: no such block, no memory in `path`, or one of another base or block.
    """
    from models.families import load_memory
    from models.joint_base import check_fit
    from models.stack import find_memory

    device = default_device()
    if base is not None:
        device = next(arguments.captured(base).parameters()).device
        # Weights that accelerate keeps elsewhere until they are used are "meta" meanwhile.
        device = base.device if device.type == "meta" else device
    try:
        memory = load_memory(path, dtype=arguments.dtype() if dtype is None else dtype, device=device).eval()
        if base is not None:
            check_fit(base.config, memory)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        told = one_line(error, 300).removeprefix(f"{path}: ")
        raise InputError(f"--knn_generator_path {path}: {told}") from None
    for above in find_memory(path).resolve().parents[:2]:
        if (above / RUN_RECORD).is_file():
            made = read_json(above / RUN_RECORD)["settings"]["data"]
            now = {"model": arguments.fingerprint(made, base), "layer_position": arguments.layer_position}
            check_made(f"--knn_generator_path {path}", made, **now)
            break
    return memory


def open_joint(
    arguments: BaseArguments,
    path: str | os.PathLike,
    base: Any,
    lmbda: float | str = 0.0,
    knn_temp: float = 1.0,
    *,
    dtype: torch.dtype | None = None,
) -> Any:
    """Base and memory as one model (`models.MLPMemory`), in evaluation mode; raises InputError as `open_memory_of`, and
    where lambda is "adaptive" and the memory has no gate for this base."""
    from models import MLPMemory

    memory = open_memory_of(arguments, path, base, dtype=dtype)
    try:
        return MLPMemory(base, memory, lmbda, knn_temp, arguments.layer_position).eval()
    except ValueError as error:
        raise InputError(f"--lmbda {lmbda}: {one_line(error, 300)}") from None
