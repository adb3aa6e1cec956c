"""Flags of both trainers, and the settings that a continued run keeps."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from utils.artefact import BEGUN, read_made
from utils.cli import flag, note_unused, say, started_together
from utils.errors import InputError, check_at_least, check_fraction
from utils.files import read_json
from utils.loading import BaseArguments, default_device, fastest_dtype, made_id, prepare_device

STATE = "state"  # subfolder of a checkpoint with what resuming needs
STATE_RECORD = f"{STATE}/trainer_state.json"


@dataclass
class TrainerArguments(BaseArguments):
    """Flags of train_mlpmem_offline and train_mlpmem_online."""

    dataset_name: str | None = flag(None, "windows folder made by utils/preprocess_dataset.py")
    dataset_split_name: str = flag("train", "split to train on")
    knn_save_path: str | None = flag(None, "kNN targets made by knn_utils.saveKNNMulti")
    base_model_name: Literal["small", "med", "large", "llama2", "llama3", "mistral"] = flag(
        "small", "preset for the memory's number of layers, where it fits the base's family"
    )
    memory_layers: int | None = flag(None, "layers of the memory; default: the preset's, or 8 for other families")
    memory_dropout: float = flag(0.0, "dropout in the memory's MLPs")
    tie_head: bool = flag(False, "the memory uses the base's head and is saved without one")
    output_dir: str = flag("output", "folder of the checkpoints; an interrupted run there is continued")
    overwrite: bool = flag(False, "start again where the folder holds another run")
    learning_rate: float = flag(5e-5, "peak learning rate of AdamW")
    weight_decay: float = flag(0.0, "weight decay of AdamW; biases have none")
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = flag("linear", "learning-rate schedule")
    num_warmup_steps: int = flag(0, "steps over which the learning rate rises from 0")
    num_train_epochs: int = flag(3, "number of epochs")
    max_train_steps: int | None = flag(None, "number of optimizer steps; overrides --num_train_epochs")
    alpha: float = flag(0.5, "weight of KL(kNN || memory); the cross-entropy has 1 - alpha")
    loss: Literal["plain", "fused"] = flag("fused", "fused: computed in chunks of rows; plain: easy to change")
    compile: bool = flag(False, "compile the memory's blocks with torch.compile: faster steps on a GPU, a slower start")
    sampled_vocabulary: int = flag(
        0, "loss over the token ids of a micro-batch and so many sampled others; 0: over the whole vocabulary"
    )
    gradient_accumulation_steps: int = flag(1, "micro-batches per optimizer step")
    per_device_train_batch_size: int = flag(8, "windows per micro-batch and process")
    per_device_eval_batch_size: int = flag(8, "windows per validation batch and process")
    micro_batch_rows: int | None = flag(None, "rows per forward pass of the memory; default: what fits on the device")
    max_grad_norm: float = flag(1.0, "clip gradients to this norm")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = flag(
        None, "default: that of the run that is continued, else the launcher's, else bf16 where the device supports it"
    )
    seed: int | None = flag(None, "seed of initialization and data order; drawn and recorded where none is given")
    checkpointing_steps: str | None = flag(None, "a number: save a checkpoint every so many steps, too; default: epoch")
    save_dtype: Literal["float32", "bfloat16"] = flag("float32", "dtype of the memory's weights in checkpoints")
    resume_from_checkpoint: str | None = flag(None, "checkpoint to start from where --output_dir has none of its own")
    logging_steps: int = flag(1, "log every so many steps")
    init_lm_head: bool = flag(False, "initialize the head and the final norm from the base")
    init_from_base: bool = flag(False, "initialize from the base's MLP, final norm and head")
    validation_split_name: str = flag("validation", "online: split for the joint perplexity after each epoch, or none")
    validation_dstore_path: str | None = flag(None, "datastore to validate on, saved with --save_logprob")
    max_eval_samples: int | None = flag(None, "use at most this many validation windows")
    with_tracking: bool = flag(False, "report to the tracker of --report_to")
    report_to: str = flag("none", "tracker (tensorboard, wandb, …) for --with_tracking")
    run_name: str | None = flag(None, "the run's name at the tracker")
    project_name: str = flag("mlpmemory", "the project's name at the tracker")

    def check(self) -> None:
        """Raise InputError for missing flags and for values that would train nothing, or something else."""
        self.require_base()
        for name in ("dataset_name", "knn_save_path"):
            if not getattr(self, name):
                raise InputError(f"--{name}: is required")
        check_fraction("--alpha", self.alpha)
        check_at_least(0, self, "sampled_vocabulary")
        counts = ("num_train_epochs", "max_train_steps", "gradient_accumulation_steps", "logging_steps")
        check_at_least(1, self, *counts, "memory_layers", "per_device_train_batch_size", "per_device_eval_batch_size")
        if (self.memory_layers or 0) > 1000:
            raise InputError(f"--memory_layers {self.memory_layers}: expected at most 1000")
        if self.report_to != "none" and not self.with_tracking:
            note_unused(("report_to", "run_name", "project_name"), "without --with_tracking")

    def made_from(self) -> dict[str, str | None]:
        """The ids of base and windows; None for windows of the original."""
        return {"base": self.base_id(), "windows": made_id(self.dataset_name)}

    def named_checkpoint(self) -> Path | None:
        """The folder that --resume_from_checkpoint names, if any."""
        return Path(self.resume_from_checkpoint) if self.resume_from_checkpoint else None

    def settings_before(self) -> dict[str, Any]:
        """The settings of the run that is continued; {} for a new one."""
        if folder := self.named_checkpoint():
            return read_json(folder / STATE_RECORD)["made"]["settings"]
        made = None if self.overwrite else read_made(self.output_dir) or read_made(self.output_dir, BEGUN)
        return made.settings if made else {}

    def draw_seed(self) -> int:
        """--seed, else that of the run that is continued, else a new one: 0 with several processes, which must agree."""
        if self.seed is not None:
            return self.seed
        drawn = 0 if started_together() else int.from_bytes(os.urandom(3), "little")
        return self.settings_before().get("seed", drawn)

    def make_accelerator(self) -> Any:
        """The run's `Accelerator`, in the precision that flag, continued run, launcher or device ask for."""
        import torch
        from accelerate import Accelerator, DistributedDataParallelKwargs

        prepare_device()
        has_bf16 = fastest_dtype(default_device()) is torch.bfloat16
        given = self.mixed_precision or self.settings_before().get("mixed_precision")
        mixed = given or os.environ.get("ACCELERATE_MIXED_PRECISION") or ("bf16" if has_bf16 else "no")
        if mixed == "bf16" and not given and not has_bf16 and default_device().type == "cuda":
            mixed = "no" if os.environ.get("ACCELERATE_USE_FSDP") == "true" else "fp16"
            say(f"precision {mixed}: this GPU does not support the launcher's bf16")
        tracker = self.report_to if self.with_tracking and self.report_to != "none" else None
        handlers = [DistributedDataParallelKwargs(broadcast_buffers=False)]  # a tied head, which stays as it is
        accelerator = Accelerator(
            mixed_precision=mixed, log_with=tracker, project_dir=self.output_dir, kwargs_handlers=handlers
        )
        sharding = getattr(accelerator.state, "fsdp_plugin", None)
        if sharding and sharding.fsdp_version == 2 and (policy := sharding.mixed_precision_policy):
            # By default accelerate sums gradients and returns losses in half precision.
            sharding.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)
        return accelerator
