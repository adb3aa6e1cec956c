"""The base model of a command: its flags, and opening it and its tokenizer.

Every command that needs a base has a dataclass that inherits `BaseArguments`. Torch is imported only when something is
opened, so that `--help` answers at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from utils.cli import flag
from utils.errors import InputError, one_line

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json"),
    *("tokenizer.model", "spiece.model", "vocab.txt"),
)


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

    def require_base(self) -> str:
        """The base's folder or name. Raises InputError where none is given."""
        if not self.model_name_or_path:
            raise InputError("--model_name_or_path: is required; expected a model folder or hub name")
        return self.model_name_or_path

    def dtype(self, **short: bool) -> Any:
        """The torch dtype of the base; `short`: the flags bf16 and fp16 where a command has them."""
        from utils.loading import resolve_dtype

        return resolve_dtype(self.torch_dtype, **short)

    def open_tokenizer(self, *, required: bool = False) -> Any:
        """The base's tokenizer; None where it has none and it is not `required`."""
        path = self.tokenizer_name or self.require_base()
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
            tokenizer: where its length differs from the embeddings, these are resized, as the original does everywhere.
            dtype: of the weights, by default what the flags say. Quantised bases keep it as their compute dtype.
            device: where to put it, by default this process's; --device_map and quantised bases go their own way.
            config_name: config to use in place of the base's own.
            from_scratch: random weights from the config instead of the checkpoint's.

        Raises:
            InputError: no causal language model there, or a quantisation library is missing.
        """
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from utils.loading import default_device, keep_freed_memory, say

        if not torch.cuda.is_available():
            keep_freed_memory()
        path, remote = self.require_base(), {"trust_remote_code": self.trust_remote_code}
        dtype = self.dtype() if dtype is None else dtype
        options: dict[str, Any] = {"dtype": dtype, **remote}
        if self.device_map:
            options["device_map"] = self.device_map
        if self.load_in_4bit or self.load_in_8bit:
            options["quantization_config"] = self._quantization(dtype)
            options.setdefault("device_map", {"": default_device()})
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
        if tokenizer is not None and rows != len(tokenizer):
            verb = "cut" if rows > len(tokenizer) else "grown"
            say(f"{path}: vocabulary of {rows} {verb} to the tokenizer's {len(tokenizer)} tokens")
            model.resize_token_embeddings(len(tokenizer))
        if "device_map" not in options:
            model.to(default_device() if device is None else device)
        return model.eval()

    def _quantization(self, dtype: Any) -> Any:
        if self.load_in_4bit and self.load_in_8bit:
            raise InputError("--load_in_4bit and --load_in_8bit: expected one of them")
        if find_spec("bitsandbytes") is None:
            raise InputError("--load_in_4bit/--load_in_8bit: need the package bitsandbytes; pip install bitsandbytes")
        from transformers import BitsAndBytesConfig

        four, eight = self.load_in_4bit, self.load_in_8bit
        return BitsAndBytesConfig(load_in_4bit=four, load_in_8bit=eight, bnb_4bit_compute_dtype=dtype)

    def open_memory_of(self, base: Any, path: str, *, dtype: Any = None) -> Any:
        """The memory in `path`, which must fit `base`, on the device of the block that it reads from."""
        from utils.loading import open_memory_of

        dtype = self.dtype() if dtype is None else dtype
        return open_memory_of(base, path, layer_position=self.layer_position, dtype=dtype)


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
        raise InputError(
            f"{flag} {path}: cannot be loaded as a causal language model ({one_line(error, 240)})"
        ) from None
