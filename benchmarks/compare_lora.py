"""LoRA as a compared method: at its best on validation, after all epochs, and as the base of a memory."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.compare_methods import Method, Quickstart, memory
from benchmarks.setting import ROOT
from downstream.retrieval import bytes_of, library
from utils.errors import InputError
from utils.files import atomic, read_json

EVALUATIONS = 4


def lora(work: Quickstart, name: str) -> Method:
    """LoRA (Hu et al., 2021): low-rank matrices on all linear layers but the head, merged into the base's weights.

    `name`: "lora", the state with the lowest validation loss; "lora_last", the one after all epochs; "lora_memory", the
    first with a memory that was trained for it.
    """
    folder, flags, training = train(work), work.flags, work.training
    state = read_json(folder / "trainer_state.json")
    steps = state["global_step"]
    kept = steps if name == "lora_last" else state["best_global_step"]
    adapter = folder / f"checkpoint-{steps}" if name == "lora_last" else folder
    losses = [[entry["step"], entry["eval_loss"]] for entry in state["log_history"] if "eval_loss" in entry]
    base = library("peft").PeftModel.from_pretrained(work.models.open_base(work.tokenizer), str(adapter))
    merged, on_disk = base.merge_and_unload().eval(), bytes_of(adapter.glob("adapter_*"))
    settings = {"kept": kept, "validation": losses}
    if name == "lora_memory":
        method = memory(quickstart_of(work, merged, folder.with_name(f"{folder.name}-memory")), adaptive=True)
        note = f"the base is LoRA's, merged; the quickstart was run again for it: {method.note}"
        return replace(method, bytes=method.bytes + on_disk, note=note, settings=settings)
    note = (
        f"rank {flags.lora_rank}, alpha {2 * flags.lora_rank}, on all linear layers but the head, learning rate "
        f"{flags.lora_learning_rate:g} (not tuned), linear decay, {epochs_of(work)} epochs, "
        f"{training['windows_per_step']} windows per step; the state after step {kept} of {steps}"
        + ("" if name == "lora_last" else f", the best of {len(losses)} by validation loss")
        + "; merged into the base's weights."
    )
    return Method(merged, bytes=on_disk, note=note, settings=settings)


def epochs_of(work: Quickstart) -> int:
    return work.flags.lora_epochs or work.training["num_train_epochs"]


def train(work: Quickstart, validation_windows: int | None = None) -> Path:
    """The folder of the adapter, trained with the windows, epochs, windows per step and precision of the memory.

    The folder holds the adapter with the lowest of four validation losses, and all four as checkpoints. An interrupted
    training continues.
    """
    from training.finetune import FinetuneArguments, finetune

    flags, training, peft = work.flags, work.training, library("peft")
    epochs, at_once = epochs_of(work), training["windows_per_step"]
    chosen = [work.made.made_from, training, flags.lora_rank, flags.lora_learning_rate, flags.lora_epochs]
    identity = json.dumps(chosen, sort_keys=True)
    folder = work.output / "work" / f"lora-{hashlib.sha256(identity.encode()).hexdigest()[:10]}"
    steps = math.ceil(len(work.windows("train")) / at_once) * epochs
    every = max(math.ceil(steps / EVALUATIONS), 1)  # and once more at the end
    arguments = FinetuneArguments(
        output_dir=str(folder),
        learning_rate=flags.lora_learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=min(training["num_warmup_steps"], steps // 2),
        num_train_epochs=epochs,
        per_device_train_batch_size=at_once,
        per_device_eval_batch_size=at_once,
        weight_decay=0.0,
        seed=training["seed"],
        bf16=training["mixed_precision"] == "bf16",
        fp16=training["mixed_precision"] == "fp16",
        use_cpu=not torch.cuda.is_available(),
        **{"eval_strategy": "steps", "eval_steps": every, "save_steps": every, "logging_steps": every},
        **{"report_to": "none", "disable_tqdm": True},
    )
    data = SimpleNamespace(
        dataset_name=str(work.folder / "windows"),
        eval_subset="validation",
        max_train_samples=None,
        max_eval_samples=validation_windows,
        patience=EVALUATIONS + 2,  # more than there are evaluations: no early stopping
        base_id=work.models.base_id,
    )
    base = work.models.open_base(work.tokenizer, dtype=torch.float32)
    torch.manual_seed(training["seed"])
    config = peft.LoraConfig(
        r=flags.lora_rank, lora_alpha=2 * flags.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the libraries about each other
        finetune(peft.get_peft_model(base, config), None, data, arguments)
    return folder


def quickstart_of(work: Quickstart, base: Any, folder: Path) -> Quickstart:
    """The quickstart for another base, in `folder`; it takes the settings in the environment, as the first one did."""
    model, embedded = folder / "model", folder / "work" / "embedded"
    if not model.is_dir():
        embedded.parent.mkdir(parents=True)
        if (work.folder / "embedded").is_dir():
            embedded.symlink_to((work.folder / "embedded").resolve())
        with atomic(model) as temporary:
            base.save_pretrained(temporary)
            work.tokenizer.save_pretrained(temporary)
    settings = {"MODEL": str(model.resolve()), "OUTPUT": str(folder.resolve()), "DTYPE": work.dtype, "FINETUNE": "0"}
    script = ["bash", "scripts/quickstart.sh"]
    if subprocess.run(script, cwd=ROOT, env=os.environ | settings, stdin=subprocess.DEVNULL).returncode:
        raise InputError("--methods lora_memory: scripts/quickstart.sh failed; see its error above")
    return Quickstart(replace(work.flags, work=str(folder / "work"), web_text=str(work.web_path)))
