"""The flags that name a model to evaluate, and opening it: a base alone, or a base with its memory.

Knows nothing of tasks. Imports no torch, so that `--help` answers at once.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.cli import flag, required
from utils.errors import InputError, check_fraction, check_positive


@dataclass
class ModelArguments:
    """Base, memory and how they are held."""

    model_name_or_path: str = required("base model: a folder or a hub name")
    tokenizer_name: str | None = flag(None, "tokenizer to use instead of the base's own")
    use_neural_knn: bool = flag(False, "evaluate base + MLP memory; without it the base alone")
    knn_generator_path: str | None = flag(None, "the MLP memory: a folder or a hub name")
    lmbda: float = flag(0.25, "weight of the memory, from 0 to 1")
    knn_temp: float = flag(1.0, "temperature of the memory's softmax, above 0")
    layer_position: int = flag(-1, "decoder block whose hidden states the memory reads; -1 is the last")
    torch_dtype: str | None = flag(None, "float32, bfloat16, float16 or auto; default: float16 on a GPU, else float32")
    device_map: str | None = flag(None, "accelerate's placement of the base over several devices, such as auto")
    load_in_4bit: bool = flag(False, "hold the base in 4 bits (needs bitsandbytes)")
    load_in_8bit: bool = flag(False, "hold the base in 8 bits (needs bitsandbytes)")
    trust_remote_code: bool = flag(False, "run model code that comes with the base")

    def check(self) -> None:
        """Check the values by themselves, before anything is loaded. Raises InputError."""
        check_fraction("--lmbda", self.lmbda)
        check_positive("--knn_temp", self.knn_temp)
        if self.use_neural_knn and not self.knn_generator_path:
            raise InputError("--use_neural_knn: needs the memory; name its folder with --knn_generator_path")

    def settings(self) -> dict[str, Any]:
        """What a result depends on."""
        chosen: dict[str, Any] = {
            "model": self.model_name_or_path,
            "model_files": fingerprint(self.model_name_or_path),
            "tokenizer": self.tokenizer_name,
            "torch_dtype": str(choose_dtype(self.torch_dtype)).removeprefix("torch."),
        }
        for name in ("load_in_4bit", "load_in_8bit"):
            if getattr(self, name):
                chosen[name] = True
        if self.use_neural_knn:
            chosen.update(
                memory=self.knn_generator_path,
                memory_files=fingerprint(self.knn_generator_path),
                lmbda=self.lmbda,
                knn_temp=self.knn_temp,
                layer_position=self.layer_position,
            )
        return chosen


def choose_dtype(name: str | None) -> Any:
    """The torch dtype of `--torch_dtype`: float16 on a GPU and float32 on a CPU where none is named."""
    import torch

    from utils.loading import default_device, resolve_dtype

    if name is None and default_device().type == "cuda":
        return torch.float16
    return resolve_dtype(name)


def open_model(arguments: ModelArguments) -> tuple[Any, Any]:
    """(model, tokenizer): the base alone, or the joint model with `--use_neural_knn`; evaluation mode.

    Raises:
        InputError: no model, no tokenizer or no memory there, or a memory of another base.
    """
    from utils.base_model import load_base, load_tokenizer
    from utils.loading import open_memory_of, quiet_libraries, say

    quiet_libraries()
    path = arguments.model_name_or_path
    dtype = choose_dtype(arguments.torch_dtype)
    tokenizer_path = arguments.tokenizer_name or path
    tokenizer = load_tokenizer(tokenizer_path, required=True, trust_remote_code=arguments.trust_remote_code)
    base = load_base(
        path,
        tokenizer=tokenizer,
        dtype=dtype,
        device_map=arguments.device_map,
        load_in_4bit=arguments.load_in_4bit,
        load_in_8bit=arguments.load_in_8bit,
        trust_remote_code=arguments.trust_remote_code,
    )
    if not arguments.use_neural_knn:
        if arguments.knn_generator_path:
            say("the base alone is evaluated: --knn_generator_path counts only together with --use_neural_knn")
        return base, tokenizer
    from models import MLPMemory

    path = arguments.knn_generator_path
    memory = open_memory_of(base, path, layer_position=arguments.layer_position, dtype=dtype)
    try:
        joint = MLPMemory(
            base, memory, lmbda=arguments.lmbda, knn_temp=arguments.knn_temp, layer_position=arguments.layer_position
        )
    except ValueError as error:
        raise InputError(f"--knn_generator_path {path}: {error}") from None
    return joint, tokenizer


def fingerprint(path: str | None) -> str | None:
    """What tells whether a local model folder changed: names, sizes and times of its files. None for hub names."""
    if path is None or not os.path.isdir(path):
        return None
    digest = hashlib.sha256()
    for file in sorted(Path(path).rglob("*")):
        if file.suffix in (".json", ".safetensors", ".bin", ".model") and file.is_file():
            state = file.stat()
            digest.update(f"{file.relative_to(path)} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
