"""LoRA (Hu et al., 2021) on the text that the memory was trained on: one of the alternatives that are compared.

Low-rank matrices on every linear layer but the head, trained by `utils.finetune` on the same windows, for the same
number of epochs and windows a step as the memory. The validation loss is measured four times along the way, and
the adapter with the lowest one is kept. Knows nothing of how the methods are scored.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from utils.errors import InputError
from utils.files import read_json

EVALUATIONS = 4


def adapter(base: Any, windows: Path, output: Path, flags: Any, training: dict[str, Any], bf16: bool) -> dict[str, Any]:
    """Train the adapter of `base` in `output`, or continue, or take it as it is; returns its record.

    Args:
        base: a causal language model in float32, which is changed.
        windows: a windows folder with the splits train and validation.
        flags: `lora_rank`, `lora_learning_rate`, `lora_epochs` (None: the memory's).
        training: the settings of the memory's training.
        bf16: compute in bfloat16.

    Raises:
        InputError: peft is not installed, or what `utils.finetune.finetune` refuses.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise InputError("--methods lora: needs the package peft; pip install 'peft>=0.14'") from None
    import torch
    from transformers import TrainingArguments

    from utils.finetune import RECORD, finetune
    from utils.loading import load_windows

    torch.manual_seed(training["seed"])
    config = LoraConfig(
        r=flags.lora_rank, lora_alpha=2 * flags.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the libraries' about each other
        model = get_peft_model(base, config)
    at_once = training["windows_per_step"]
    epochs = flags.lora_epochs or training["num_train_epochs"]
    steps = math.ceil(len(load_windows(windows, "train")) / at_once) * epochs
    every = max(math.ceil(steps / EVALUATIONS), 1)  # and once more at the end
    arguments = TrainingArguments(
        output_dir=str(output),
        learning_rate=flags.lora_learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=min(training["num_warmup_steps"], steps // 2),
        num_train_epochs=epochs,
        per_device_train_batch_size=at_once,
        per_device_eval_batch_size=at_once,
        weight_decay=0.0,
        seed=training["seed"],
        bf16=bf16,
        eval_strategy="steps",
        eval_steps=every,
        save_steps=every,
        save_total_limit=2,
        logging_steps=every,
        report_to="none",
        disable_tqdm=True,
    )
    data = SimpleNamespace(
        dataset_name=str(windows),
        eval_subset="validation",
        max_train_samples=None,
        max_eval_samples=None,
        patience=EVALUATIONS + 2,  # more than there are: none ends the training early
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # as above
        finetune(model, None, data, arguments)
    record = read_json(output / RECORD)
    return {
        "rank": flags.lora_rank,
        "alpha": 2 * flags.lora_rank,
        "learning_rate": flags.lora_learning_rate,
        "epochs": epochs,
        "windows_per_step": at_once,
        "steps": record["steps"],
        "kept": record["best"],
        "validation": [[entry["step"], entry["eval_loss"]] for entry in record["log"] if "eval_loss" in entry],
        "seconds_of_last_start": next((e["train_runtime"] for e in record["log"] if "train_runtime" in e), None),
        "trained_parameters": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
    }


def merged(base: Any, folder: Path) -> Any:
    """`base` with the adapter in `folder` added to its weights, in evaluation mode."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(folder)).merge_and_unload().eval()


def adapter_bytes(folder: Path) -> int:
    """Bytes of the adapter's weights and config."""
    return sum(path.stat().st_size for path in folder.glob("adapter_*") if path.is_file())
