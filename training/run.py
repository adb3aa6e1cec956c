"""From a trainer's flags to a trained memory: what the offline and the online trainer share.

The trainers differ in where rows come from, and hand that in as a function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from training.arguments import (
    TrainerArguments,
    build_memory,
    draw_seed,
    make_accelerator,
    memory_config,
    training_settings,
)
from utils.base_model import from_pretrained, load_base, load_tokenizer
from utils.errors import InputError, one_line
from utils.loading import load_windows, quiet_libraries, resolve_dtype, say, windows_fingerprint


@dataclass
class Run:
    """What a trainer has opened: windows, the memory's config, and the base where something needs it."""

    arguments: TrainerArguments
    windows: Any
    config: Any
    tokenizer: Any
    device: Any
    dtype: Any
    _base: list[Any] = field(default_factory=list)

    def base(self) -> Any:
        """The frozen base, loaded at the first call."""
        if not self._base:
            arguments = self.arguments
            base = load_base(
                arguments.model_name_or_path,
                tokenizer=self.tokenizer,
                dtype=self.dtype,
                device=self.device,
                device_map=arguments.device_map,
                load_in_4bit=arguments.load_in_4bit,
                load_in_8bit=arguments.load_in_8bit,
                trust_remote_code=arguments.trust_remote_code,
            )
            self._base.append(base.requires_grad_(False))
        return self._base[0]

    def drop_base(self) -> None:
        """Free the base's memory where only the start or the validation needed it."""
        self._base.clear()


def base_vocabulary(arguments: TrainerArguments, config: Any, tokenizer: Any) -> int:
    """The base's vocabulary after it is resized to the tokenizer."""
    return len(tokenizer) if tokenizer is not None else config.vocab_size


def train_memory(
    arguments: TrainerArguments, make_source: Callable[[Run], Any], memory_subfolder: str = ""
) -> dict[str, Any]:
    """Open everything, check that it belongs together, build the memory, train it. Returns the run's record."""
    from transformers import AutoConfig, set_seed

    from models import memory_class
    from training.trainer import MemoryTrainer
    from training.validation import make_validation

    quiet_libraries()
    windows = load_windows(arguments.dataset_name, arguments.dataset_split_name)
    remote = {"trust_remote_code": arguments.trust_remote_code}
    base_config = from_pretrained(
        AutoConfig.from_pretrained, arguments.model_name_or_path, "--model_name_or_path", **remote
    )
    tokenizer = load_tokenizer(arguments.tokenizer_name or arguments.model_name_or_path, **remote)
    config = memory_config(arguments, base_config, base_vocabulary(arguments, base_config, tokenizer))
    try:
        memory_class(config)
    except ValueError as error:
        raise InputError(f"--model_name_or_path {arguments.model_name_or_path}: {one_line(error)}") from None
    seed = draw_seed(arguments)
    accelerator = make_accelerator(arguments)
    run = Run(arguments, windows, config, tokenizer, accelerator.device, resolve_dtype(arguments.torch_dtype))
    source = make_source(run)
    validate = make_validation(arguments, config.hidden_size, run.base)
    set_seed(seed)
    needs_base = arguments.init_lm_head or arguments.init_from_base
    memory = build_memory(arguments, config, run.base() if needs_base else None, lambda: sample_scale(run))
    if not hasattr(source, "base"):
        run.drop_base()
    parameters = sum(weight.numel() for weight in memory.parameters())
    say(
        f"memory: {config.num_hidden_layers} layers of {config.hidden_size}, vocabulary {config.vocab_size}, "
        f"{parameters / 1e6:.1f}M parameters; precision {accelerator.mixed_precision}, seed {seed}"
    )
    data = {
        "rows": int(source.window_rows().sum()),
        "windows": windows_fingerprint(windows),
        **source.identity(),
        "layers": config.num_hidden_layers,
        "start": "base" if arguments.init_from_base else "head" if arguments.init_lm_head else "random",
        "layer_position": arguments.layer_position,
    }
    trainer = MemoryTrainer(
        memory,
        source,
        training_settings(arguments, seed, memory_subfolder),
        data,
        validate=validate,
        on_log=lambda entry: accelerator.log(_numbers(entry), step=entry["step"]) if arguments.with_tracking else None,
        accelerator=accelerator,
        precision={
            "mixed_precision": accelerator.mixed_precision,
            "torch_dtype": str(run.dtype).removeprefix("torch."),
        },
    )
    record = trainer.train()
    accelerator.end_training()
    say(f"memory: {trainer.output / record['checkpoint']}")
    return record


def sample_scale(run: Run) -> Any:
    """Typical sizes around the captured block, from a few windows spread over the data."""
    import torch

    from models.starts import measure_scale

    numbers = np.linspace(0, len(run.windows) - 1, min(4, len(run.windows))).astype(int)
    ids = torch.from_numpy(np.asarray(run.windows[numbers]["input_ids"]).astype(np.int64))
    return measure_scale(run.base(), ids.to(run.device), layer_position=run.arguments.layer_position)


def _numbers(entry: dict[str, Any]) -> dict[str, float]:
    flat = {**entry, **{f"validation_{key}": value for key, value in entry.get("validation", {}).items()}}
    return {key: value for key, value in flat.items() if isinstance(value, (int, float))}
