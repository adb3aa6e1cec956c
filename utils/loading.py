"""Opening what a stage reads besides the base: windows and memories; devices and dtypes; what a command says."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import sys
from typing import Any

import pyarrow as pa
import torch

from utils.errors import InputError, one_line

WINDOW_COLUMNS = ("input_ids", "labels", "attention_mask", "dstore_range")
DTYPES = ("float32", "bfloat16", "float16")


def say(text: str) -> None:
    """Print a line on the main process only."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, flush=True)


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and advice out of the output, except on a terminal."""
    import datasets
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # its errors come to us as exceptions
    if not sys.stderr.isatty() or int(os.environ.get("RANK", "0")) != 0:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def resolve_dtype(name: str | None, *, bf16: bool = False, fp16: bool = False) -> torch.dtype:
    """The torch dtype that `--torch_dtype` (or `--bf16`, `--fp16`) names; float32 by default; `auto` picks by machine."""
    if bf16 and fp16:
        raise InputError("--bf16 and --fp16: expected one of them")
    if name is None:
        return torch.bfloat16 if bf16 else torch.float16 if fp16 else torch.float32
    if name == "auto":
        return fastest_dtype(default_device())
    if name not in DTYPES:
        raise InputError(f"--torch_dtype {name}: expected one of auto, {', '.join(DTYPES)}")
    return getattr(torch, name)


def default_device() -> torch.device:
    """This process's device: its own GPU under `accelerate launch`, the first GPU alone, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has matrix products in it: a GPU of compute capability 8.0 or more, a CPU with
    AVX512_BF16 or AMX; else float32."""
    if device.type == "cuda":
        # Not torch.cuda.is_bf16_supported(), which is true of older GPUs that only imitate it.
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    # Older versions of torch do not say what a CPU has.
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else torch.float32


def keep_freed_memory() -> None:
    """Ask glibc to keep freed blocks: touching new ones made a CPU's forward pass 6% slower, a training step 20%."""
    m_trim_threshold, m_mmap_max, never = -1, -4, 2**31 - 1
    if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
        with contextlib.suppress(OSError, AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(m_mmap_max, 0)
            mallopt(m_trim_threshold, never)


def load_windows(path: str | os.PathLike, split: str, at_most: int | None = None) -> Any:
    """One split of a windows folder, as a `datasets.Dataset` in NumPy format: all of it, or its first windows.

    Raises:
        InputError: no such folder, no such split, a column missing or of another kind, or no window in it.
    """
    import datasets

    source, remedy = f"--dataset_name {path}", "make the windows with utils/preprocess_dataset.py"
    if not os.path.isdir(path):
        raise InputError(f"{source}: no such windows folder; {remedy}")
    try:
        splits = datasets.load_from_disk(str(path))
    except Exception as error:
        raise InputError(f"{source}: is not a windows folder ({one_line(error, 200)}); {remedy}") from None
    windows = splits
    if not isinstance(splits, datasets.Dataset):
        if split not in splits:
            raise InputError(f"{source}: has no split {split}; it has {', '.join(splits)}")
        windows = splits[split]
    source = f"{source}: split {split}"
    for name in WINDOW_COLUMNS:
        if name not in windows.column_names:
            raise InputError(f"{source} lacks the column {name}; {remedy}")
        kind = windows.data.schema.field(name).type
        if not hasattr(kind, "value_type") or not pa.types.is_integer(kind.value_type):
            raise InputError(f"{source}: column {name} holds {kind}, expected lists of whole numbers; {remedy}")
    if len(windows) == 0:
        raise InputError(f"{source} holds no window")
    if at_most is not None:
        windows = windows.select(range(min(at_most, len(windows))))
    return windows.with_format("numpy")


def windows_fingerprint(windows: Any) -> str:
    """A checksum of what datastore rows come from: token ids and labels of every window."""
    digest = hashlib.sha256()
    table = windows.with_format("arrow")
    for start in range(0, len(windows), 1000):
        rows = table[start : start + 1000]
        for name in ("input_ids", "labels"):
            for chunk in rows.column(name).chunks:
                digest.update(chunk.flatten().to_numpy(zero_copy_only=False).astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def model_fingerprint(model: Any) -> str:
    """A checksum of a model: its parameters' names and shapes, and a sample of each one's numbers."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)]
        digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def open_memory(path: str | os.PathLike, *, dtype: torch.dtype, device: torch.device | str | None = None) -> Any:
    """A trained memory, in evaluation mode, from any published layout. Raises InputError in one line."""
    from models.families import load_memory

    if os.path.exists(path) and not os.path.isdir(path):
        raise InputError(f"--knn_generator_path {path}: is a file, expected the memory's folder or hub name")
    try:
        return load_memory(path, dtype=dtype, device=device).eval()
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        told = one_line(error, 300).removeprefix(f"{path}: ")
        raise InputError(f"--knn_generator_path {path}: {told}") from None


def open_memory_of(base: Any, path: str | os.PathLike, *, layer_position: int, dtype: torch.dtype) -> Any:
    """A memory that fits `base`, in evaluation mode, on the device whose hidden states it reads.

    Args:
        base: a loaded base, which accelerate may have spread over several devices.
        layer_position: decoder block whose MLP input the memory reads.

    Raises:
        InputError: no such block, no memory in `path`, or one of another base.
    """
    from models.capture import captured_module
    from models.stack import check_fit

    try:
        device = next(captured_module(base, layer_position).parameters()).device
    except ValueError as error:
        raise InputError(f"--layer_position {layer_position}: {error}") from None
    # Weights that accelerate keeps elsewhere until they are used are "meta" meanwhile.
    memory = open_memory(path, dtype=dtype, device=base.device if device.type == "meta" else device)
    try:
        check_fit(base.config, memory)
    except ValueError as error:
        raise InputError(f"--knn_generator_path {path}: {one_line(error, 300)}") from None
    return memory
