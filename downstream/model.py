"""The flags that name a model to evaluate, and opening it: a base alone, or a base with its memory."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.cli import flag
from utils.errors import InputError
from utils.loading import BaseArguments
from utils.results import ADAPTIVE, Lambda, check_mixture


@dataclass
class ModelArguments(BaseArguments):
    """Base, memory and how they are held."""

    torch_dtype: str | None = flag(None, "float32, bfloat16, float16 or auto; default: float16 on a GPU, else float32")
    use_neural_knn: bool = flag(False, "evaluate base + MLP memory; without it the base alone")
    knn_generator_path: str | None = flag(None, "the MLP memory: a folder or a hub name")
    lmbda: Lambda = flag(0.25, "weight of the memory: 0 to 1, or adaptive (by the memory's gate)")
    knn_temp: float = flag(1.0, "temperature of the memory's softmax, above 0")
    add_bos: bool = flag(
        False, "begin each prompt with the BOS token where the tokenizer does not, as the windows of --window_bos do"
    )

    def check(self) -> None:
        """Check the values by themselves, before anything is loaded. Raises InputError."""
        self.require_base()
        check_mixture(self.lmbda, self.knn_temp)
        if self.use_neural_knn and not self.knn_generator_path:
            raise InputError("--use_neural_knn: needs the memory; name its folder with --knn_generator_path")

    def dtype(self, **short: bool) -> Any:
        """The torch dtype of base and memory: float16 on a GPU and float32 on a CPU where none is named."""
        import torch

        from utils.loading import default_device

        if self.torch_dtype is None and default_device().type == "cuda":
            return torch.float16
        return super().dtype(**short)

    def stated(self) -> dict[str, Any]:
        """What a results.json says of the model; no temperature where it is the gate's."""
        found: dict[str, Any] = {"model": self.model_name_or_path, "memory": None, "lmbda": None, "knn_temp": None}
        if self.use_neural_knn:
            found |= {"memory": self.knn_generator_path, "lmbda": self.lmbda}
            found["knn_temp"] = None if self.lmbda == ADAPTIVE else self.knn_temp
        return found

    def settings(self) -> dict[str, Any]:
        """What a result depends on."""
        chosen: dict[str, Any] = {
            "model": self.model_name_or_path,
            "model_files": fingerprint(self.model_name_or_path),
            "tokenizer": self.tokenizer_name,
            "torch_dtype": str(self.dtype()).removeprefix("torch."),
        }
        chosen |= {name: True for name in ("load_in_4bit", "load_in_8bit", "add_bos") if getattr(self, name)}
        if self.use_neural_knn:
            chosen |= {"memory": self.knn_generator_path, "memory_files": fingerprint(self.knn_generator_path)}
            chosen |= {name: getattr(self, name) for name in ("lmbda", "knn_temp", "layer_position")}
        return chosen


def open_model(arguments: ModelArguments) -> tuple[Any, Any]:
    """(model, tokenizer): the base alone, or the joint model with `--use_neural_knn`; evaluation mode.

    Raises:
        InputError: no model, no tokenizer or no memory there, or a memory of another base.
    """
    from utils.cli import say
    from utils.loading import quiet_libraries
    from utils.memories import open_joint

    quiet_libraries()
    tokenizer = arguments.open_tokenizer(required=True)
    base = arguments.open_base(tokenizer)
    if not arguments.use_neural_knn:
        if arguments.knn_generator_path:
            say("the base alone is evaluated: --knn_generator_path counts only together with --use_neural_knn")
        return base, tokenizer
    joint = open_joint(arguments, arguments.knn_generator_path, base, arguments.lmbda, arguments.knn_temp)
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
