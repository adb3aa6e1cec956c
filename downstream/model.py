"""The flags that name a model to evaluate, and opening it: a base alone, or a base with its memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from utils.cli import flag
from utils.errors import InputError
from utils.loading import BaseArguments
from utils.results import ADAPTIVE, Lambda, check_lambda


@dataclass
class ModelArguments(BaseArguments):
    """Base, memory, and their precision."""

    torch_dtype: str | None = flag(None, "float32, bfloat16, float16 or auto; default: float16 on a GPU, else float32")
    use_neural_knn: bool = flag(False, "evaluate base + MLP memory; without it the base alone")
    knn_generator_path: list[str] = flag([], "the MLP memory, or several: folders or hub names")
    lmbda: Lambda = flag(0.25, "weight of the memory: 0 to 1, or adaptive (the memory's gate)")
    memory_temp: float = flag(1.0, "temperature of the memory's softmax")
    add_bos: bool = flag(False, "begin each prompt with the BOS token, for bases trained with windows of --window_bos")

    def check(self) -> None:
        """Check the values before anything is loaded. Raises InputError."""
        self.require_base()
        check_lambda("--lmbda", self.lmbda, len(self.knn_generator_path))
        if self.use_neural_knn and not self.knn_generator_path:
            raise InputError("--use_neural_knn: name the memory with --knn_generator_path")

    def dtype(self, **short: bool) -> Any:
        """The torch dtype of base and memory: by default float16 on a GPU, as in the original, and float32 on a CPU."""
        import torch

        from utils.loading import default_device

        if self.torch_dtype is None and default_device().type == "cuda":
            return torch.float16
        return super().dtype(**short)

    def described(self) -> dict[str, Any]:
        """The model's entries of results.json; no temperature with a gate, which has its own."""
        if not self.use_neural_knn:
            return {"model": self.model_name_or_path, "memory": None, "lmbda": None, "memory_temp": None}
        temperature = None if self.lmbda == ADAPTIVE else self.memory_temp
        names = {"model": self.model_name_or_path, "memory": " ".join(self.knn_generator_path)}
        return names | {"lmbda": self.lmbda, "memory_temp": temperature}

    def settings(self) -> dict[str, Any]:
        """The settings that change the answers."""
        names = ["tokenizer_name", "load_in_4bit", "load_in_8bit", "add_bos"]
        names += ["lmbda", "memory_temp", "layer_position"] if self.use_neural_knn else []
        found = {name: getattr(self, name) for name in names}
        return found | {"torch_dtype": str(self.dtype()).removeprefix("torch.")}

    def made_from(self) -> dict[str, str | None]:
        """The ids of base, memory and gate, as far as they are used."""
        from models.gate import WEIGHTS
        from models.stack import find_memory
        from utils.artefact import read_made

        found = {"base": self.base_id()}
        for number, path in enumerate(self.knn_generator_path if self.use_neural_knn else (), 1):
            memory, which = find_memory(path), "" if number == 1 else f"_{number}"
            made = read_made(memory)
            found[f"memory{which}"] = made.id if made else replace(self, model_name_or_path=str(memory)).base_id()
            if self.lmbda == ADAPTIVE and (gate := read_made(memory / WEIGHTS)):
                found[f"gate{which}"] = gate.id
        return found


def open_model(arguments: ModelArguments) -> tuple[Any, Any]:
    """(model, tokenizer): the base alone, or the joint model with `--use_neural_knn`; in evaluation mode.

    Raises InputError where a model or the tokenizer cannot be opened, or the memory belongs to another base.
    """
    from utils.memories import open_joint

    tokenizer = arguments.open_tokenizer(required=True)
    base = arguments.open_base(tokenizer)
    if not arguments.use_neural_knn:
        return base, tokenizer
    joint = open_joint(arguments, arguments.knn_generator_path, base, arguments.lmbda, arguments.memory_temp)
    return joint, tokenizer
