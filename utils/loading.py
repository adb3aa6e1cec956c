"""Opening what a stage reads: the base model by its flags, its tokenizer, windows; devices and dtypes.

Every command that needs a base has a dataclass that inherits `BaseArguments`. Torch is imported only when something is
opened, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import flag, say
from utils.errors import InputError, one_line
from utils.files import read_json

if TYPE_CHECKING:
    import torch

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json"),
    *("tokenizer.model", "spiece.model", "vocab.txt"),
)
WINDOWS_RECORD = "preprocess.json"  # what made the windows, in their folder
RUN_RECORD = "training.json"  # of a memory's run, in its output folder
WINDOW_COLUMNS = ("input_ids", "labels", "attention_mask", "dstore_range")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class BaseArguments:
    """Which base model, and how it is held in memory."""

    model_name_or_path: str | None = flag(None, "base model: a folder or a hub name")
    tokenizer_name: str | None = flag(None, "tokenizer to use instead of the base's own")
    layer_position: int = flag(-1, "decoder block whose MLP input is the hidden state (0 = first, -1 = last)")
    torch_dtype: str | None = flag(None, "the base's weights: float32 (default), bfloat16, float16, or auto")
    device_map: str | None = flag(None, "accelerate's placement of the base over several devices, such as auto")
    load_in_4bit: bool = flag(False, "hold the frozen base in 4 bits (needs bitsandbytes)")
    load_in_8bit: bool = flag(False, "hold the frozen base in 8 bits (needs bitsandbytes)")
    trust_remote_code: bool = flag(False, "run code that comes with the base")

    def __post_init__(self) -> None:
        """Refuse --device_map in several processes of a machine, each of which would take all cards. Raises InputError."""
        beside = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
        if self.device_map and beside > 1:
            raise InputError(
                f"--device_map {self.device_map}: each of the {beside} processes here would place the base on all cards; "
                "start one process a machine, or leave the flag out: each then has a card of its own"
            )

    def require_base(self) -> str:
        """The base's folder or name. Raises InputError where none is given."""
        if not self.model_name_or_path:
            raise InputError("--model_name_or_path: is required; expected a model folder or hub name")
        return self.model_name_or_path

    def dtype(self, **short: bool) -> Any:
        """The torch dtype of the base; `short`: the flags bf16 and fp16 where a command has them."""
        return resolve_dtype(self.torch_dtype, **short)

    def open_tokenizer(self, *, required: bool = False) -> Any:
        """The base's tokenizer, or the one that is named; None where the base has none and it is not `required`."""
        path, required = self.tokenizer_name or self.require_base(), required or bool(self.tokenizer_name)
        return load_tokenizer(path, required=required, trust_remote_code=self.trust_remote_code)

    def open_base(
        self,
        tokenizer: Any = None,
        *,
        dtype: Any = None,
        device: Any = None,
        config_name: str | None = None,
        from_scratch: bool = False,
    ) -> Any:
        """The base in evaluation mode: any decoder that `AutoModelForCausalLM` loads.

        Args:
            tokenizer: the embeddings are cut or grown to its ids, as the original does everywhere.
            dtype: of the weights, by default what the flags say. Quantised bases keep it as their compute dtype.
            device: where to put it, by default this process's; --device_map goes its own way.
            config_name: config to use in place of the base's own.
            from_scratch: random weights from the config instead of the checkpoint's.

        Raises:
            InputError: no causal language model there, or a quantisation library is missing.
        """
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from models.stack import resize_vocabulary, vocabulary_size

        prepare_device()
        path, remote = self.require_base(), {"trust_remote_code": self.trust_remote_code}
        dtype = self.dtype() if dtype is None else dtype
        options: dict[str, Any] = {"dtype": dtype, **remote}
        device = torch.device(default_device() if device is None else device)
        if self.device_map or device.type != "cpu":  # weights go straight onto a GPU, not through the host's memory
            options["device_map"] = self.device_map or {"": device}
        if self.load_in_4bit or self.load_in_8bit:
            options["quantization_config"] = self._quantization(dtype)
            options.setdefault("device_map", {"": device})
        if config_name:
            options["config"] = from_pretrained(AutoConfig.from_pretrained, config_name, "--config_name", **remote)
        if from_scratch:
            config = options.get("config")
            config = config or from_pretrained(AutoConfig.from_pretrained, path, "--model_name_or_path", **remote)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, **remote)
        else:
            load = AutoModelForCausalLM.from_pretrained
            model, info = from_pretrained(load, path, "--model_name_or_path", output_loading_info=True, **options)
            if missing := sorted(info.get("missing_keys") or ()):
                raise InputError(
                    f"--model_name_or_path {path}: the checkpoint lacks {len(missing)} weights ({missing[0]}, …), "
                    "expected a complete causal language model"
                )
        rows = model.get_input_embeddings().weight.shape[0]
        if tokenizer is not None and rows != (size := vocabulary_size(tokenizer)):
            say(f"{path}: vocabulary of {rows} {'cut' if rows > size else 'grown'} to the tokenizer's {size} tokens")
            resize_vocabulary(model, size)
        if from_scratch or "device_map" not in options:
            model.to(device)
        return model.eval()

    def fingerprint(self, made: Mapping[str, Any], base: Any = None) -> str | None:
        """`model_fingerprint` of this base as a file of the settings `made` would record it, for `files.check_made`.

        `base`: as it is open, tried first. None where none is named or `made` records none, a path or quantised weights.
        """
        import torch

        recorded, found = str(made.get("model")), base and model_fingerprint(base)
        if found == recorded or not self.model_name_or_path or len(recorded) != 16:
            return found if found == recorded else None
        whole, tokenizer = replace(self, device_map=None, load_in_4bit=False, load_in_8bit=False), self.open_tokenizer()
        dtypes = [getattr(torch, each) for each in ([made["dtype"]] if made.get("dtype") in DTYPES else DTYPES)]
        # First as the checkpoint has it, which is mapped and not read; that says nothing of rows that were made for it.
        for held, dtype in [*(("auto", dtype) for dtype in dtypes), *zip(dtypes, dtypes, strict=True)]:
            opened = whole.open_base(tokenizer, dtype=held, device="cpu")
            if (found := model_fingerprint(opened, dtype)) == recorded:
                break
        return found

    def _quantization(self, dtype: Any) -> Any:
        if self.load_in_4bit and self.load_in_8bit:
            raise InputError("--load_in_4bit and --load_in_8bit: expected one of them")
        if find_spec("bitsandbytes") is None:
            raise InputError("--load_in_4bit/--load_in_8bit: need the package bitsandbytes; pip install bitsandbytes")
        from transformers import BitsAndBytesConfig

        four, eight = self.load_in_4bit, self.load_in_8bit
        return BitsAndBytesConfig(load_in_4bit=four, load_in_8bit=eight, bnb_4bit_compute_dtype=dtype)

    def captured(self, base: Any) -> Any:
        """The module of `base` that --layer_position names. Raises InputError where there is none."""
        from models.capture import captured_module

        try:
            return captured_module(base, self.layer_position)
        except ValueError as error:
            raise InputError(f"--layer_position {self.layer_position}: {error}") from None


def load_tokenizer(path: str | os.PathLike, *, required: bool = False, trust_remote_code: bool = False) -> Any:
    """The tokenizer in folder or hub repository `path`; None if there is none and it is not `required`."""
    from transformers import AutoTokenizer

    folder = Path(path)
    problem = f"holds no tokenizer (expected {' or '.join(TOKENIZER_FILES[:2])})"
    if not folder.is_dir() or any((folder / name).exists() for name in TOKENIZER_FILES):
        try:
            return AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
        except Exception as error:
            problem = f"no tokenizer could be loaded ({one_line(error, 200)})"
            required = required or folder.is_dir()  # files that cannot be read are not taken for none
    if required:
        raise InputError(f"{path}: {problem}")
    return None


def from_pretrained(call: Callable[..., Any], path: str | os.PathLike, flag: str, **options: Any) -> Any:
    """Call a library's loader; anything it raises about `path` becomes one line naming `flag`."""
    import torch

    if os.path.exists(path) and not os.path.isdir(path):
        raise InputError(f"{flag} {path}: is a file, expected a model folder or hub name")
    if os.path.isdir(path) and not (Path(path) / "config.json").exists():
        raise InputError(f"{flag} {path}: holds no config.json, expected a model folder or hub name")
    try:
        return call(str(path), **options)
    except torch.OutOfMemoryError as error:
        raise InputError(f"{flag} {path}: does not fit in memory ({one_line(error, 160)})") from None
    except Exception as error:
        known = isinstance(error, (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError))
        if not known and not type(error).__module__.startswith(("safetensors", "huggingface_hub", "httpx", "requests")):
            raise
        if "trust_remote_code" in str(error) and not options.get("trust_remote_code"):
            raise InputError(
                f"{flag} {path}: comes with code of its own, which is not run; give --trust_remote_code if you trust it"
            ) from None
        # Libraries say of a file that may not be read that it is not there.
        closed = [file for file in Path(path).glob("*") if not os.access(file, os.R_OK)]
        if closed:
            raise InputError(f"{flag} {closed[0]}: cannot be read (permission denied); check its permissions") from None
        told = f"cannot be loaded as a causal language model ({one_line(error, 240)})"
        raise InputError(f"{flag} {path}: {told}") from None


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
    import torch

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
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has matrix products in it: a GPU of compute capability 8.0 or more, a CPU with
    AVX512_BF16 or AMX; else float32."""
    import torch

    if device.type == "cuda":
        # Not torch.cuda.is_bf16_supported(), which is true of older GPUs that only imitate it.
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    # Older versions of torch do not say what a CPU has.
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else torch.float32


def prepare_device() -> None:
    """What every command sets first: on a GPU TF32 unless MLPMEM_NO_TF32 refuses it; on a CPU glibc keeps freed blocks,
    since touching new ones made a forward pass 6% slower, a training step 20%."""
    import torch

    m_trim_threshold, m_mmap_max, never = -1, -4, 2**31 - 1
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("highest" if os.environ.get("MLPMEM_NO_TF32") else "high")
    elif sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
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
    import pyarrow as pa

    source, remedy = f"--dataset_name {path}", "make the windows with utils/preprocess_dataset.py"
    if not os.path.isdir(path):
        raise InputError(f"{source}: no such windows folder; {remedy}")
    try:
        splits = datasets.load_from_disk(str(path))
    except Exception as error:
        raise InputError(f"{source}: is not a windows folder ({one_line(error, 200)}); {remedy}") from None
    if isinstance(splits, datasets.Dataset):
        splits = {split: splits}
    if (windows := splits.get(split)) is None:
        raise InputError(f"{source}: has no split {split}; it has {', '.join(splits)}")
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


def model_fingerprint(model: Any, dtype: torch.dtype | None = None) -> str:
    """A checksum of a model (in `dtype`): its parameters' names and shapes, and a sample of each one's numbers.
    That of quantised weights, which cannot be compared, says so."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)].to(dtype or flat.dtype)
        digest.update(sample.float().cpu().numpy().tobytes())
    return "quantised " * bool(getattr(model, "is_quantized", False)) + digest.hexdigest()[:16]


def vocabulary_digest(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's tokens and their ids; added tokens, such as one for padding, do not count."""
    added = tokenizer.get_added_vocab()
    tokens = [(number, token) for token, number in tokenizer.get_vocab().items() if token not in added]
    return hashlib.sha256(repr(sorted(tokens)).encode()).hexdigest()


def check_windows(path: str | os.PathLike, windows: Any, config: Any, tokenizer: Any = None) -> None:
    """Refuse windows in `path` that a base (its config, its tokenizer) cannot read. Raises InputError.

    They are recorded to be of another tokenizer, or longer than the model has positions.
    """
    record = Path(path) / WINDOWS_RECORD
    recorded = read_json(record) if tokenizer is not None and record.exists() else {}
    if recorded.get("vocabulary_sha256") not in (None, tokenizer and vocabulary_digest(tokenizer)):
        made_with = recorded["tokenizer"]
        raise InputError(f"--dataset_name {path}: was made with another tokenizer ({made_with}) than this model's")
    length = len(windows[0]["input_ids"])
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and 0 < positions < length:
        raise InputError(
            f"--dataset_name {path}: windows of {length} tokens, but the model has {positions} positions; "
            f"make the windows with --block_size {positions} or less"
        )
