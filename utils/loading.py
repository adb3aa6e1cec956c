"""Opening what a stage reads: the base model, its tokenizer, the windows. Each failure is one clear line.

Knows nothing of datastores, FAISS or command lines.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from utils.allocator import keep_freed_memory
from utils.errors import InputError, one_line

WINDOW_COLUMNS = ("input_ids", "labels", "attention_mask", "dstore_range")
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def say(text: str) -> None:
    """Print a line on the main process only."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, flush=True)


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and advice out of the output, except on a terminal."""
    import datasets
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
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
    return DTYPES[name]


def default_device() -> torch.device:
    """This process's device: its own GPU under `accelerate launch`, the first GPU alone, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes matrix products faster in it than in float32, else float32.

    CPUs may list bf16 instructions and yet run them no faster than float32, so on a CPU a product of a
    decoder's size is timed in both (a tenth of a second).
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if not torch.cpu._is_avx512_bf16_supported():
        return torch.float32
    from utils.distributed import decided_by_main

    return decided_by_main(_timed_dtype)  # timed by itself, each process might come to another


def _timed_dtype() -> torch.dtype:
    """bfloat16 if a product takes clearly less time in it on this CPU, else float32."""
    import time

    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        rows, weight = torch.ones(512, 1024, dtype=dtype), torch.ones(2048, 1024, dtype=dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            rows @ weight.T
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return torch.bfloat16 if seconds[torch.bfloat16] * 1.2 < seconds[torch.float32] else torch.float32


def load_tokenizer(path: str | os.PathLike, *, required: bool = False, trust_remote_code: bool = False) -> Any:
    """The tokenizer in folder or hub repository `path`; None if there is none and it is not `required`."""
    from transformers import AutoTokenizer

    folder = Path(path)
    if folder.is_dir() and not any((folder / name).exists() for name in TOKENIZER_FILES):
        if required:
            raise InputError(f"{path}: holds no tokenizer (expected {' or '.join(TOKENIZER_FILES[:2])})")
        return None
    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except Exception as error:
        if required:
            raise InputError(f"{path}: no tokenizer could be loaded ({one_line(error, 200)})") from None
        return None


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.txt",
)


def from_pretrained(call: Callable[..., Any], path: str | os.PathLike, flag: str, **options: Any) -> Any:
    """Call a library's loader; anything it raises about `path` becomes one line naming `flag`."""
    if os.path.exists(path) and not os.path.isdir(path):
        raise InputError(f"{flag} {path}: is a file, expected a model folder or hub name")
    if os.path.isdir(path) and not (Path(path) / "config.json").exists():
        raise InputError(f"{flag} {path}: holds no config.json, expected a model folder or hub name")
    try:
        return call(str(path), **options)
    except torch.OutOfMemoryError as error:
        raise InputError(f"{flag} {path}: does not fit in memory ({one_line(error, 160)})") from None
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError) as error:
        if "trust_remote_code" in str(error) and not options.get("trust_remote_code"):
            raise InputError(
                f"{flag} {path}: comes with code of its own, which is not run; give --trust_remote_code if you trust it"
            ) from None
        # Libraries say of a file that may not be read that it is not there.
        closed = [file for file in Path(path).glob("*") if not os.access(file, os.R_OK)]
        if closed:
            raise InputError(f"{flag} {closed[0]}: cannot be read (permission denied); check its permissions") from None
        raise InputError(
            f"{flag} {path}: cannot be loaded as a causal language model ({one_line(error, 240)})"
        ) from None
    except Exception as error:
        if type(error).__module__.startswith(("safetensors", "huggingface_hub", "httpx", "requests")):
            raise InputError(f"{flag} {path}: cannot be loaded ({one_line(error, 240)})") from None
        raise


def load_base(
    path: str | os.PathLike,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    device_map: str | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    config_name: str | None = None,
    from_scratch: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """The base language model, in evaluation mode, embeddings resized to the tokenizer's length.

    Args:
        path: folder or hub name of any decoder that `AutoModelForCausalLM` loads.
        tokenizer: when given and its length differs from the embeddings, the base is resized and that is said.
        dtype: the weights' dtype. Quantised bases keep it as their compute dtype.
        device: where to put it; `device_map` (accelerate's placement over several devices) overrides it.
        from_scratch: random weights from the config instead of the checkpoint's.

    Raises:
        InputError: `path` is not a causal language model, or a quantisation library is missing.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if not torch.cuda.is_available():
        keep_freed_memory()
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if device_map:
        options["device_map"] = device_map
    if load_in_4bit or load_in_8bit:
        options["quantization_config"] = _quantization(load_in_4bit, load_in_8bit, dtype)
        options.setdefault("device_map", {"": default_device()})
    if config_name:
        options["config"] = from_pretrained(
            AutoConfig.from_pretrained, config_name, "--config_name", trust_remote_code=trust_remote_code
        )
    if from_scratch:
        config = options.get("config") or from_pretrained(
            AutoConfig.from_pretrained, path, "--model_name_or_path", trust_remote_code=trust_remote_code
        )
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    else:
        model = from_pretrained(
            AutoModelForCausalLM.from_pretrained,
            path,
            "--model_name_or_path",
            output_loading_info=True,
            **options,
        )
        model, info = model
        missing = sorted(info.get("missing_keys") or ())
        if missing:
            raise InputError(
                f"--model_name_or_path {path}: the checkpoint lacks {len(missing)} weights ({missing[0]}, …), "
                "expected a complete causal language model"
            )
    if tokenizer is not None:
        resize_to_tokenizer(model, tokenizer, path)
    if device_map is None and not (load_in_4bit or load_in_8bit):
        model.to(device if device is not None else default_device())
    return model.eval()


def resize_to_tokenizer(model: Any, tokenizer: Any, path: object) -> None:
    """Resize `model`'s embeddings to `len(tokenizer)` as the original does everywhere; says so when it does."""
    rows = model.get_input_embeddings().weight.shape[0]
    if rows != len(tokenizer):
        verb = "cut" if rows > len(tokenizer) else "grown"
        say(f"{path}: vocabulary of {rows} {verb} to the tokenizer's {len(tokenizer)} tokens")
        model.resize_token_embeddings(len(tokenizer))


def _quantization(four: bool, eight: bool, dtype: torch.dtype) -> Any:
    if four and eight:
        raise InputError("--load_in_4bit and --load_in_8bit: expected one of them")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise InputError(
            "--load_in_4bit/--load_in_8bit: need the package bitsandbytes; pip install bitsandbytes"
        ) from None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=four, load_in_8bit=eight, bnb_4bit_compute_dtype=dtype)


def load_windows(path: str | os.PathLike, split: str) -> Any:
    """One split of a windows folder, as a `datasets.Dataset` in NumPy format.

    Raises:
        InputError: no such folder, no such split, a column missing, or no window in it.
    """
    import datasets

    if not os.path.isdir(path):
        raise InputError(f"--dataset_name {path}: no such windows folder; make it with utils/preprocess_dataset.py")
    try:
        splits = datasets.load_from_disk(str(path))
    except Exception as error:
        raise InputError(
            f"--dataset_name {path}: is not a windows folder ({one_line(error, 200)}); "
            "make it with utils/preprocess_dataset.py"
        ) from None
    if isinstance(splits, datasets.Dataset):
        dataset = splits
    elif split in splits:
        dataset = splits[split]
    else:
        raise InputError(f"--dataset_name {path}: has no split {split}; it has {', '.join(splits)}")
    missing = [name for name in WINDOW_COLUMNS if name not in dataset.column_names]
    if missing:
        raise InputError(
            f"--dataset_name {path}: split {split} lacks the column {missing[0]}; "
            "make the windows with utils/preprocess_dataset.py"
        )
    if len(dataset) == 0:
        raise InputError(f"--dataset_name {path}: split {split} holds no window")
    check_window_columns(dataset, f"--dataset_name {path}: split {split}")
    return dataset.with_format("numpy")


def check_window_columns(dataset: Any, source: str) -> None:
    """Refuse columns that are no lists of whole numbers, and lists that reach beyond their file (which a library would
    follow out of the file's memory). Reads offsets alone, not token ids. Raises InputError naming `source`.
    """
    import pyarrow as pa

    for name in WINDOW_COLUMNS:
        column = dataset.data.column(name)
        kind = column.type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if not is_list or not pa.types.is_integer(kind.value_type):
            raise InputError(f"{source}: column {name} holds {kind}, expected lists of whole numbers")
        try:
            column.validate(full=True)
            holes = column.null_count or any(chunk.flatten().null_count for chunk in column.chunks)
        except pa.ArrowInvalid as error:
            raise InputError(
                f"{source}: column {name} is damaged ({one_line(error, 160)}); make the windows again"
            ) from None
        if holes:
            raise InputError(f"{source}: column {name} has empty places; make the windows again")


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
    from models import load_memory

    if os.path.exists(path) and not os.path.isdir(path):
        raise InputError(f"--knn_generator_path {path}: is a file, expected the memory's folder or hub name")
    try:
        return load_memory(path, dtype=dtype, device=device).eval()
    except InputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        told = one_line(error, 300).removeprefix(f"{path}: ")
        raise InputError(f"--knn_generator_path {path}: {told}") from None


def check_pair(base: Any, memory: Any, path: object) -> None:
    """Refuse a memory that does not fit its base: family, hidden size or vocabulary. Raises InputError."""
    from models.mlpMemory import check_fit

    try:
        check_fit(base.config, memory)
    except ValueError as error:
        raise InputError(f"--knn_generator_path {path}: {one_line(error, 300)}") from None


def open_memory_of(base: Any, path: str | os.PathLike, *, layer_position: int, dtype: torch.dtype) -> Any:
    """A memory that fits `base`, in evaluation mode, on the device whose hidden states it reads.

    Args:
        base: a loaded base, which accelerate may have spread over several devices.
        layer_position: decoder block whose MLP input the memory reads.

    Raises:
        InputError: no such block, no memory in `path`, or one of another base.
    """
    from models.capture import captured_module

    try:
        device = next(captured_module(base, layer_position).parameters()).device
    except ValueError as error:
        raise InputError(f"--layer_position {layer_position}: {error}") from None
    # Weights that accelerate keeps elsewhere until they are used are "meta" meanwhile.
    memory = open_memory(path, dtype=dtype, device=base.device if device.type == "meta" else device)
    check_pair(base, memory, path)
    return memory
