"""LoRA among the compared methods: at its best on validation, at the end of all epochs, and as the base of a memory."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.compare_methods import Method, Quickstart, bytes_of, library, memory, memory_adaptive
from models.gate import SETTINGS
from utils.errors import InputError
from utils.files import read_json
from utils.legacy import atomic_folder

EVALUATIONS = 4
# Stages of a memory's training whose flags are named like the settings that a run records.
TRAINED_WITH = ("learning_rate", "weight_decay", "lr_scheduler_type", "num_warmup_steps", "num_train_epochs", "alpha")
STARTS = {"base": ("--init_from_base",), "head": ("--init_lm_head",), "random": ()}


def lora(work: Quickstart, name: str) -> Method:
    """LoRA (Hu et al., 2021): low-rank matrices on every linear layer but the head, merged into the base's weights.

    `name`: "lora", the state with the lowest validation loss; "lora_last", the one after all epochs; "lora_memory", the
    first with the memory that was trained for it.
    """
    folder = train(work)
    record = read_json(folder / "finetune.json")
    losses = [[entry["step"], entry["eval_loss"]] for entry in record["log"] if "eval_loss" in entry]
    kept, steps = (record["best"] or {}).get("step"), record["steps"]
    adapter = folder / f"checkpoint-{steps}" if name == "lora_last" else folder
    base = library("peft", name).PeftModel.from_pretrained(work.models.open_base(work.tokenizer), str(adapter))
    merged, on_disk = base.merge_and_unload().eval(), bytes_of(adapter.glob("adapter_*"))
    settings = {"kept": steps if name == "lora_last" else kept, "validation": losses}
    if name == "lora_memory":
        other = memory_for(work, merged, folder.with_name(f"{folder.name}-memory-{digest(work.training)}"))
        method = memory_adaptive(other) if other.adaptive["memory_adaptive"] else memory(other)
        note = f"the base is LoRA's, merged; datastore, index, targets and memory were made anew for it: {method.note}"
        return replace(method, bytes=method.bytes + on_disk, note=note, settings=settings)
    state = f"the state after all {steps} steps"
    if name == "lora":
        state = f"of {len(losses)} states the one with the lowest validation loss (step {kept} of {steps})"
    flags, training = work.flags, work.training
    epochs, at_once = flags.lora_epochs or training["num_train_epochs"], training["windows_per_step"]
    note = (
        f"rank {flags.lora_rank}, alpha {2 * flags.lora_rank}, on all linear layers but the head, learning rate "
        f"{flags.lora_learning_rate:g} (not tuned), linear decay, epochs of the memory's windows: {epochs}, {at_once} "
        f"windows a step; {state}; merged into the base's weights."
    )
    return Method(merged, bytes=on_disk, note=note, settings=settings)


def digest(settings: object) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


def train(work: Quickstart) -> Path:
    """The folder of the adapter, trained by `training.finetune` on the memory's windows, epochs and windows a step, in the
    precision of the memory's training.

    The validation loss is measured four times along the way; the folder holds the adapter with the lowest one, and the
    last one as a checkpoint. An interrupted training continues.
    """
    peft = library("peft", "lora")
    from training.finetune import FinetuneArguments, finetune

    flags, training = work.flags, work.training
    rank, at_once = flags.lora_rank, training["windows_per_step"]
    epochs = flags.lora_epochs or training["num_train_epochs"]
    identity = [work.identity_of("lora"), rank, flags.lora_learning_rate, flags.lora_epochs]
    folder = work.output / "work" / f"lora-{digest(identity)}"
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
        bf16=work.mixed_precision == "bf16",
        fp16=work.mixed_precision == "fp16",
        use_cpu=not torch.cuda.is_available(),
        **{"eval_strategy": "steps", "eval_steps": every, "save_steps": every, "logging_steps": every},
        **{"save_total_limit": 2, "report_to": "none", "disable_tqdm": True},
    )
    # More patience than there are evaluations: none ends the training early.
    data = SimpleNamespace(
        **{"dataset_name": str(work.folder / "windows"), "eval_subset": "validation", "max_train_samples": None},
        **{"max_eval_samples": None, "patience": EVALUATIONS + 2},
    )
    base = work.models.open_base(work.tokenizer, dtype=torch.float32)
    torch.manual_seed(training["seed"])
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the libraries' about each other
        finetune(peft.get_peft_model(base, config), None, data, arguments)
    return folder


def memory_for(work: Quickstart, base: Any, folder: Path) -> Quickstart:
    """The quickstart's stages for another base, in `folder`, with the settings of `work`'s; what is there stays."""
    model, windows, dstore = folder / "model", folder / "windows", folder / "dstore"
    if not model.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_folder(model) as temporary:
            base.save_pretrained(temporary)
            work.tokenizer.save_pretrained(temporary)
    if not windows.is_dir():
        windows.symlink_to((work.folder / "windows").resolve())
    training, data = work.training, work.training["data"]
    targets = data["targets"]
    reads = ("--model_name_or_path", model, "--dataset_name", windows, "--layer_position", work.layer_position)
    held = (*reads, "--torch_dtype", work.dtype, "--report_to", "none")
    stores = {}
    for split in ("train", "validation"):
        kept = () if split == "train" else ("--save_logprob",)
        save = ("--do_eval", "--eval_subset", split, "--save_knnlm_dstore", "--dstore_dir", dstore)
        stage("train_base", *held, *save, *kept, "--output_dir", folder / "embed")
        stores[split] = next(dstore.glob(f"dstore_*_{split}_*.arrow"))
    index = dstore / "train.index"
    made, near = (
        ("--dstore_path", stores["train"], "--index_path", index),
        ("--k", targets["k"], "--probe", targets["probe"]),
    )
    stage("knn_utils.build_index", *made, "--index_factory", targets["index"]["factory"])
    if not (done := folder / "knnlm_validation/results.json").exists():
        knn = ("--knn", "--dstore_path", stores["validation"], "--val_file", stores["train"], "--index_file", index)
        score = ("--do_eval", "--eval_subset", "validation", "--output_dir", done.parent)
        stage("train_base", *held, *score, *knn, *near, *grid_of(work, done.parent.name))
    search = ("--output_path", folder / "targets", "--ignore_first", targets["ignore_first"], "--choose_on", done)
    stage("knn_utils.saveKNNMulti", *made, *near, *search)
    settings = [word for name in (*TRAINED_WITH, "seed", "max_grad_norm") for word in (f"--{name}", training[name])]
    settings += ["--max_train_steps", training["max_train_steps"]] if training["max_train_steps"] else []
    settings += ["--per_device_train_batch_size", training["windows_per_step"], "--memory_layers", data["layers"]]
    settings += ["--memory_dropout", data.get("dropout", 0)]
    reading = (
        "--knn_save_path",
        folder / "targets",
        "--knn_dstore_path",
        stores["train"],
        "--output_dir",
        folder / "memory",
    )
    checked = ("--validation_dstore_path", stores["validation"], *STARTS[data["start"]])
    settings += ["--mixed_precision", work.mixed_precision]
    stage("train_mlpmem_offline", *reads, *reading, *checked, *settings)
    memory_path = folder / "memory" / read_json(folder / "memory/training.json")["checkpoint"]
    if work.adaptive["memory_adaptive"]:
        gate, own = read_json(work.memory / SETTINGS), memory_path / SETTINGS
        wanted = {name: gate[name] for name in ("known_weight", "caution", "knn_temp")}
        if not own.exists() or not wanted.items() <= read_json(own).items():
            settings = [word for name, value in wanted.items() for word in (f"--{name}", value)]
            settings += ["--torch_dtype", work.dtype, "--seed", training["seed"]]
            stage("training.gate", *reads, "--knn_generator_path", memory_path, *settings)
    if not (done := folder / "joint_validation/results.json").exists():
        score = ("--do_test", "--dataset_split_name", "validation", "--knn_generator_path", memory_path)
        read = ("--dstore_path", stores["validation"], "--output_dir", done.parent)
        stage("evaluate_joint", *held, *score, *read, *grid_of(work, done.parent.name))
    changes = {"work": str(folder), "model_name_or_path": str(model), "web_text": str(work.web_path)}
    return Quickstart(replace(work.flags, **changes))


def grid_of(work: Quickstart, name: str) -> list[object]:
    """The flags of the lambdas and temperatures that the quickstart's evaluation `name` tried."""
    rows = read_json(work.folder / name / "results.json")["grid"]
    return [word for flag in ("lmbda", "knn_temp") for word in (f"--{flag}", *sorted({row[flag] for row in rows}))]


def stage(module: str, *arguments: object) -> None:
    """Run a command of the project in a process of its own. Raises InputError where it fails."""
    done = subprocess.run([sys.executable, "-m", module, *map(str, arguments)], stdin=subprocess.DEVNULL)
    if done.returncode:
        raise InputError(
            f"--methods lora_memory: {module} failed (exit status {done.returncode}); its own line says why"
        )
