"""Opens what a stage reads: the base model by its flags, its tokenizer, windows; chooses devices and dtypes.

Every command with a base has a dataclass that inherits `BaseArguments`. Torch is imported only when something is opened,
so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.artefact import read_made
from utils.cli import flag, say
from utils.errors import InputError, one_line

if TYPE_CHECKING:
    import torch

TOKENIZER_FILES = ("tokenizer*.json", "vocab.json", "*.model", "vocab.txt")
RUN_RECORD = "training.json"  # of a memory's run, in its output folder
WINDOW_COLUMNS = {"input_ids", "labels", "attention_mask", "dstore_range"}
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class BaseArguments:
    """Which base model, and how it is loaded."""

    model_name_or_path: str | None = flag(None, "base model: a folder or a hub name")
    config_name: str | None = flag(None, "config to use instead of the base's own")
    tokenizer_name: str | None = flag(None, "tokenizer, if not the base's own")
    model_revision: str | None = flag(None, "revision of a base on the hub: a branch, tag or commit")
    cache_dir: str | None = flag(None, "folder for what is downloaded from the hub; default: that of huggingface_hub")
    layer_position: int = flag(-1, "decoder block whose MLP input is the hidden state (0 = first, -1 = last)")
    torch_dtype: str | None = flag(None, "the base's weights: float32 (default), bfloat16, float16, or auto")
    device_map: str | None = flag(None, "accelerate's placement of the base over several devices, such as auto")
    load_in_4bit: bool = flag(False, "quantize the frozen base to 4 bits (needs bitsandbytes)")
    load_in_8bit: bool = flag(False, "quantize the frozen base to 8 bits (needs bitsandbytes)")
    trust_remote_code: bool = flag(False, "run code that comes with the base")

    def __post_init__(self) -> None:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
        if self.device_map and processes > 1:
            raise InputError(
                f"--device_map {self.device_map}: gives each of {processes} processes all GPUs; leave it out"
            )

    def hub(self) -> dict[str, Any]:
        """What is said to `from_pretrained` about base and tokenizer, beside their names."""
        named = {"revision": self.model_revision, "cache_dir": self.cache_dir}
        given = {name: value for name, value in named.items() if value is not None}
        return {"trust_remote_code": self.trust_remote_code, **given}

    def require_base(self) -> str:
        """The base's folder or name. Raises InputError where none is given."""
        if not self.model_name_or_path:
            raise InputError("--model_name_or_path: is required; expected a model folder or hub name")
        from models.stack import refuse_adapter

        from_pretrained(refuse_adapter, self.model_name_or_path, "--model_name_or_path")
        return self.model_name_or_path

    def base_id(self) -> str:
        """The base's id (`models.stack.base_id`). Raises InputError where there is no readable config."""
        from models.stack import base_id

        return from_pretrained(base_id, self.require_base(), "--model_name_or_path", **self.hub())

    def dtype(self, *, bf16: bool = False, fp16: bool = False) -> torch.dtype:
        """The dtype of the base's weights: --torch_dtype, else by the flags --bf16 and --fp16 of a command that has them."""
        import torch

        name = self.torch_dtype or ("bfloat16" if bf16 else "float16" if fp16 else "float32")
        if name == "auto":
            return fastest_dtype(default_device())
        if name not in DTYPES:
            raise InputError(f"--torch_dtype {name}: expected one of auto, {', '.join(DTYPES)}")
        return getattr(torch, name)

    def open_tokenizer(self, *, required: bool = False) -> Any:
        """The tokenizer of the flags; None where the base has none and it is not `required`."""
        path, required = self.tokenizer_name or self.require_base(), required or bool(self.tokenizer_name)
        return load_tokenizer(path, required=required, **self.hub())

    def open_base(
        self,
        tokenizer: Any = None,
        *,
        dtype: Any = None,
        device: Any = None,
        from_scratch: bool = False,
    ) -> Any:
        """The base in evaluation mode: any decoder that `AutoModelForCausalLM` loads. Raises InputError.

        Args:
            tokenizer: the embeddings are resized to its vocabulary, as the original does everywhere.
            dtype: of the weights (of a quantized base: of its arithmetic), by default that of the flags.
            device: by default this process's; --device_map has precedence.
            from_scratch: random weights in place of the checkpoint's.
        """
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

        from models.stack import fuse_gelu, load_base, resize_vocabulary, vocabulary_size

        prepare_device()
        path, dtype = self.require_base(), self.dtype() if dtype is None else dtype
        device = torch.device(device or default_device())
        options: dict[str, Any] = {"dtype": dtype, **self.hub()}
        quantized = {name: True for name in ("load_in_4bit", "load_in_8bit") if getattr(self, name)}
        if quantized and find_spec("bitsandbytes") is None:
            raise InputError("--load_in_4bit, --load_in_8bit: need the package bitsandbytes; pip install bitsandbytes")
        if quantized:
            options["quantization_config"] = BitsAndBytesConfig(**quantized, bnb_4bit_compute_dtype=dtype)
        if self.device_map or quantized or device.type != "cpu":  # straight onto a GPU, not through the host's memory
            options["device_map"] = self.device_map or {"": device}
        if self.config_name or from_scratch:
            config = from_pretrained(
                AutoConfig.from_pretrained, self.config_name or path, "--config_name", **self.hub()
            )
            options["config"] = config
        if from_scratch:
            remote = {"trust_remote_code": self.trust_remote_code}
            model = fuse_gelu(AutoModelForCausalLM.from_config(config, dtype=dtype, **remote)).to(device)
        else:
            model = from_pretrained(load_base, path, "--model_name_or_path", **options)
        rows = model.get_input_embeddings().weight.shape[0]
        if tokenizer is not None and rows != (size := vocabulary_size(tokenizer)):
            say(f"{path}: vocabulary resized from {rows} to the tokenizer's {size} tokens")
            resize_vocabulary(model, size)
        return model.eval()


def load_tokenizer(path: str | os.PathLike, *, required: bool = False, **options: Any) -> Any:
    """The tokenizer in folder or hub repository `path`; None for a folder without one, if it is not `required`. `options`:
    those of `from_pretrained`."""
    from transformers import AutoTokenizer

    if Path(path).is_dir() and not any(any(Path(path).glob(name)) for name in TOKENIZER_FILES):
        if required:
            raise InputError(f"{path}: holds no tokenizer")
        return None
    return from_pretrained(AutoTokenizer.from_pretrained, path, "tokenizer", **options)


def from_pretrained(call: Callable[..., Any], path: str | os.PathLike, flag: str, **options: Any) -> Any:
    """Call a library's loader. What it raises about `path` becomes an InputError naming `flag`."""
    from safetensors import SafetensorError

    try:
        return call(str(path), **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, SafetensorError) as error:
        raise InputError(f"{flag} {path}: cannot be loaded ({one_line(error)})") from error


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and advice out of the output, except on a terminal."""
    import datasets
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # its errors come to us as exceptions
    if not sys.stderr.isatty() or int(os.environ.get("RANK", "0")) != 0:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def default_device() -> torch.device:
    """This process's device: its own GPU under `accelerate launch`, the first GPU alone, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies matrices in it (a GPU of compute capability 8.0 or more, a CPU with AVX512_BF16
    or AMX), else float32."""
    import torch

    if device.type == "cuda":
        # Not torch.cuda.is_bf16_supported(), which is true of older GPUs that only imitate it.
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    # Older versions of torch do not say what a CPU has.
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else torch.float32


def prepare_device() -> None:
    """Allow TF32 on a GPU, unless MLPMEM_NO_TF32 is set; on a CPU let glibc keep freed blocks (touching new ones makes a
    forward pass 6%, a training step 20% slower), and oneDNN code for 128 shapes of products, not 1,024 (a megabyte each)."""
    import torch

    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    m_trim_threshold, m_mmap_max, never = -1, -4, 2**31 - 1
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("highest" if os.environ.get("MLPMEM_NO_TF32") else "high")
    elif sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
        with contextlib.suppress(OSError, AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(m_mmap_max, 0)
            mallopt(m_trim_threshold, never)


def load_windows(path: str | os.PathLike, split: str, at_most: int | None = None) -> Any:
    """One split of a windows folder, or its first windows, as a `datasets.Dataset` in NumPy format.

    Raises InputError where there is no such folder or split, or no windows in it.
    """
    import datasets

    source, splits = f"--dataset_name {path}", from_pretrained(datasets.load_from_disk, path, "--dataset_name")
    splits = {split: splits} if isinstance(splits, datasets.Dataset) else splits
    if split not in splits:
        raise InputError(f"{source}: has no split {split}; it has {', '.join(splits)}")
    windows = splits[split]
    if not len(windows) or not set(windows.column_names) >= WINDOW_COLUMNS:
        raise InputError(f"{source}: split {split} holds no windows; make them with utils/preprocess_dataset.py")
    return windows.take(at_most or len(windows)).with_format("numpy")


def made_id(path: str | os.PathLike) -> str | None:
    """The id of the artefact at `path`; None where it has no record."""
    made = read_made(path)
    return made and made.id


def vocabulary_digest(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's tokens and their ids; added tokens, such as one for padding, do not count."""
    added = tokenizer.get_added_vocab()
    tokens = [(number, token) for token, number in tokenizer.get_vocab().items() if token not in added]
    return hashlib.sha256(repr(sorted(tokens)).encode()).hexdigest()


def check_windows(path: str | os.PathLike, windows: Any, config: Any, tokenizer: Any = None) -> None:
    """Refuse windows in `path` made with another tokenizer, or longer than the model's positions. Raises InputError.

    `config`, `tokenizer`: the model's; without a tokenizer only the length is checked.
    """
    from models.stack import context_size

    made = read_made(path)
    recorded = made and made.settings.get("vocabulary")
    if recorded and tokenizer is not None and recorded != vocabulary_digest(tokenizer):
        raise InputError(f"--dataset_name {path}: was made with another tokenizer than this model's")
    length = len(windows[0]["input_ids"])
    positions = context_size(config)
    if positions is not None and positions < length:
        raise InputError(f"--dataset_name {path}: windows of {length} tokens, but the model has {positions} positions")
