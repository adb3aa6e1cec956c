"""The base model of a command, said once: its flags, and opening it.

Every command that needs a base has a dataclass that inherits `BaseArguments`. Imports no torch, so that `--help`
answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from utils.cli import flag
from utils.errors import InputError


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
        from utils.loading import load_tokenizer

        path = self.tokenizer_name or self.require_base()
        return load_tokenizer(path, required=required, trust_remote_code=self.trust_remote_code)

    def open_base(self, tokenizer: Any = None, *, dtype: Any = None, device: Any = None, **options: Any) -> Any:
        """The base in evaluation mode, its embeddings resized to `tokenizer`; `options` are `load_base`'s others."""
        from utils.loading import load_base

        return load_base(
            self.require_base(),
            tokenizer=tokenizer,
            dtype=self.dtype() if dtype is None else dtype,
            device=device,
            device_map=self.device_map,
            load_in_4bit=self.load_in_4bit,
            load_in_8bit=self.load_in_8bit,
            trust_remote_code=self.trust_remote_code,
            **options,
        )

    def open_memory_of(self, base: Any, path: str, *, dtype: Any = None) -> Any:
        """The memory in `path`, which must fit `base`, on the device of the block that it reads from."""
        from utils.loading import open_memory_of

        return open_memory_of(
            base, path, layer_position=self.layer_position, dtype=self.dtype() if dtype is None else dtype
        )
