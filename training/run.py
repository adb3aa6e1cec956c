"""What both trainers do around the loop: open everything, check that it belongs together, build the memory, train it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, set_seed

from models.families import memory_class
from models.stack import memory_config as stack_config
from models.starts import init_from_base, init_lm_head, measure_scale
from training.arguments import DEFAULT_LAYERS, PRESETS, TrainerArguments
from training.rows import WindowRows
from training.trainer import MemoryTrainer
from training.validation import open_validation
from utils.base_model import from_pretrained
from utils.errors import InputError, one_line
from utils.loading import load_windows, quiet_libraries, say, windows_fingerprint


def train_memory(
    arguments: TrainerArguments, make_rows: Callable[[Any, Any, Callable[[], Any]], WindowRows], subfolder: str = ""
) -> dict[str, Any]:
    """Open everything, check that it belongs together, build the memory, train it. Returns the run's record.

    Args:
        make_rows: called with the windows, the memory's config and a function that gives the frozen base.
        subfolder: where in a checkpoint the memory lies.
    """
    quiet_libraries()
    windows = load_windows(arguments.dataset_name, arguments.dataset_split_name)
    base_config = from_pretrained(
        AutoConfig.from_pretrained,
        arguments.require_base(),
        "--model_name_or_path",
        trust_remote_code=arguments.trust_remote_code,
    )
    tokenizer = arguments.open_tokenizer()
    vocabulary = base_config.vocab_size if tokenizer is None else len(tokenizer)
    config = memory_config(arguments, base_config, vocabulary)
    arguments.seed = arguments.draw_seed()
    accelerator = arguments.make_accelerator()

    @functools.cache
    def open_base() -> Any:
        return arguments.open_base(tokenizer, device=accelerator.device).requires_grad_(False)

    source = make_rows(windows, config, open_base)
    validation = None
    if not arguments.previous_run().get("complete"):
        validation = open_validation(arguments, config.hidden_size, accelerator.num_processes, open_base)
    set_seed(arguments.seed)
    memory = build_memory(arguments, config, open_base, windows)
    open_base.cache_clear()  # only the online rows still need it, and hold it
    parameters = sum(weight.numel() for weight in memory.parameters())
    say(
        f"memory: {config.num_hidden_layers} layers of {config.hidden_size}, vocabulary {config.vocab_size}, "
        f"{parameters / 1e6:.1f}M parameters; precision {accelerator.mixed_precision}, seed {arguments.seed}"
    )
    data = {
        "rows": int(source.counts.sum()),
        "windows": windows_fingerprint(windows),
        **source.identity(),
        "layers": config.num_hidden_layers,
        "start": "base" if arguments.init_from_base else "head" if arguments.init_lm_head else "random",
        "layer_position": arguments.layer_position,
    }
    trainer = MemoryTrainer(memory, source, arguments, data, accelerator, validation, subfolder)
    record = trainer.train()
    accelerator.end_training()
    say(f"memory: {trainer.output / record['checkpoint']}")
    return record


def memory_config(arguments: TrainerArguments, base_config: Any, vocabulary: int) -> Any:
    """The memory's config: the base's with the layer count (and, for llama3, the MLP's width) changed.

    Raises InputError for a base without such a memory, or without block `layer_position`.
    """
    blocks = base_config.get_text_config().num_hidden_layers
    if not -blocks <= arguments.layer_position < blocks:
        raise InputError(f"--layer_position {arguments.layer_position}: the base has {blocks} decoder blocks")
    preset = PRESETS[arguments.base_model_name]
    fits = preset.family == base_config.model_type
    try:
        config = stack_config(base_config, arguments.memory_layers or (preset.layers if fits else DEFAULT_LAYERS))
        memory_class(config)
    except ValueError as error:
        raise InputError(f"--model_name_or_path {arguments.model_name_or_path}: {one_line(error)}") from None
    for name, value in preset.changes if fits else ():
        setattr(config, name, value)
    config.vocab_size = vocabulary
    return config


def build_memory(arguments: TrainerArguments, config: Any, open_base: Callable[[], Any], windows: Any) -> Any:
    """A new memory in float32 with the start that the flags ask for.

    Args:
        config: from `memory_config`.
        open_base: gives the base; called for --init_lm_head and --init_from_base only.
        windows: a few of them, spread over the data, show the typical sizes around the captured block.
    """
    try:
        memory = memory_class(config)(config).to(torch.float32)
        if arguments.init_lm_head:
            init_lm_head(memory, open_base())
        if arguments.init_from_base:
            numbers = np.linspace(0, len(windows) - 1, min(4, len(windows))).astype(int)
            ids = torch.from_numpy(np.asarray(windows[numbers]["input_ids"]).astype(np.int64))
            ids = ids.to(open_base().get_input_embeddings().weight.device)
            scale = measure_scale(open_base(), ids, layer_position=arguments.layer_position)
            init_from_base(memory, open_base(), scale, arguments.layer_position)
    except ValueError as error:
        raise InputError(f"--model_name_or_path {arguments.model_name_or_path}: {one_line(error)}") from None
    return memory
