"""Settings of both trainers: their flags, what a continued run keeps, the memory's size and start."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from utils.cli import flag, note_unused, say, started_together
from utils.errors import InputError, check_at_least, check_fraction, check_positive, check_seed, one_line
from utils.files import read_json
from utils.loading import RUN_RECORD as RECORD
from utils.loading import BaseArguments, default_device, fastest_dtype, prepare_device

STATE = "state"  # what a checkpoint holds for resuming
STATE_RECORD = f"{STATE}/trainer_state.json"


@dataclass(frozen=True)
class Preset:
    """A memory of the paper: its layer count, and what it changes in the base's config."""

    family: str
    layers: int
    changes: tuple[tuple[str, int], ...] = ()


PRESETS = {
    "small": Preset("gpt2", 18),
    "med": Preset("gpt2", 36),
    "large": Preset("gpt2", 54),
    "llama2": Preset("llama", 8),
    "llama3": Preset("llama", 8, (("intermediate_size", 11008),)),
    "mistral": Preset("mistral", 8),
}
DEFAULT_LAYERS = 8
CHOICES = {
    "mixed_precision": (None, "no", "bf16", "fp16"),
    "loss": ("plain", "fused"),
    "lr_scheduler_type": (  # of transformers' schedules those that need no settings of their own
        *("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"),
        "inverse_sqrt",
    ),
}


@dataclass
class TrainerArguments(BaseArguments):
    """Flags of train_mlpmem_offline and train_mlpmem_online."""

    dataset_name: str | None = flag(None, "windows folder made by utils/preprocess_dataset.py")
    dataset_split_name: str = flag("train", "split to train on")
    knn_save_path: str | None = flag(None, "kNN targets made by knn_utils.saveKNNMulti")
    base_model_name: str = flag("small", f"preset of the memory's layers, for its own family: {', '.join(PRESETS)}")
    memory_layers: int | None = flag(None, f"layers of the memory; default: its family's preset, else {DEFAULT_LAYERS}")
    memory_dropout: float = flag(0.0, "share of the neurons of the memory's MLPs that each training step drops")
    output_dir: str = flag("output", "folder of the checkpoints; an interrupted run there is continued")
    overwrite: bool = flag(False, "begin again where the folder holds another run")
    learning_rate: float = flag(5e-5, "peak learning rate of AdamW")
    weight_decay: float = flag(0.0, "weight decay of AdamW")
    lr_scheduler_type: str = flag("linear", f"schedule: {', '.join(CHOICES['lr_scheduler_type'])}")
    num_warmup_steps: int = flag(0, "steps over which the learning rate rises from 0")
    num_train_epochs: int = flag(3, "passes over the data")
    max_train_steps: int | None = flag(None, "stop after this many steps")
    alpha: float = flag(0.5, "weight of KL(kNN || memory); the cross-entropy has 1 - alpha")
    loss: str = flag("fused", "fused: loss and gradients by chunks of rows; plain: from all logits, easy to change")
    gradient_accumulation_steps: int = flag(1, "loads of windows that make one step")
    per_device_train_batch_size: int = flag(8, "windows that a process takes at a time")
    per_device_eval_batch_size: int = flag(8, "windows that a process scores at a time")
    micro_batch_rows: int | None = flag(None, "rows that go through the memory at once; default: what fits the device")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm")
    mixed_precision: str | None = flag(
        None,
        "no, bf16 or fp16; default: the launcher's (fp16 for bf16 on a GPU without it), else bf16 where this device "
        "computes in it; a continued run keeps the one it began with",
    )
    seed: int | None = flag(None, "seed of initialisation and data order; without it a run draws one and records it")
    checkpointing_steps: str | None = flag(None, "each epoch ends with a checkpoint; with a number each N steps too")
    resume_from_checkpoint: str | None = flag(None, "checkpoint folder to continue from; default: the output's latest")
    logging_steps: int = flag(10, "steps between entries of the log")
    init_lm_head: bool = flag(False, "begin with the base's head and final norm")
    init_from_base: bool = flag(False, "begin as nearly the base model itself as a memory can be")
    validation_split_name: str = flag("validation", "split whose joint perplexity is measured each epoch, or none")
    validation_dstore_path: str | None = flag(None, "datastore of that split (saved with --save_logprob)")
    max_eval_samples: int | None = flag(None, "use this many validation windows at most")
    with_tracking: bool = flag(False, "report to the tracker of --report_to")
    report_to: str = flag("none", "tracker: none, tensorboard, wandb, … (only with --with_tracking)")
    run_name: str | None = flag(None, "the run's name at the tracker")
    project_name: str = flag("mlpmemory", "the project's name at the tracker")

    def check(self) -> None:
        """Refuse what cannot work before anything is loaded. Raises InputError."""
        self.require_base()
        for name in ("dataset_name", "knn_save_path"):
            if not getattr(self, name):
                raise InputError(f"--{name}: is required")
        if self.base_model_name not in PRESETS:
            raise InputError(
                f"--base_model_name {self.base_model_name}: expected one of {', '.join(PRESETS)}; "
                "other sizes come from the base's config with --memory_layers"
            )
        check_fraction("--alpha", self.alpha)
        for name in ("learning_rate", "max_grad_norm"):
            check_positive(f"--{name}", getattr(self, name))
        counts = ("num_train_epochs", "gradient_accumulation_steps", "per_device_train_batch_size", "logging_steps")
        counts += ("per_device_eval_batch_size", "max_eval_samples", "memory_layers", "max_train_steps")
        check_at_least(1, self, *counts, "micro_batch_rows")
        check_at_least(0, self, "weight_decay", "num_warmup_steps")
        if not 0 <= self.memory_dropout < 1:
            raise InputError(f"--memory_dropout {self.memory_dropout:g}: expected 0 to less than 1")
        check_seed("--seed", self.seed)
        for name, values in CHOICES.items():
            if getattr(self, name) not in values:
                raise InputError(f"--{name} {getattr(self, name)}: expected {', '.join(filter(None, values))}")
        if self.lr_scheduler_type == "polynomial" and self.learning_rate <= 1e-7:
            raise InputError(f"--learning_rate {self.learning_rate:g}: expected more than 1e-07, where polynomial ends")
        if self.init_lm_head and self.init_from_base:
            raise InputError("--init_lm_head and --init_from_base: expected one of them")
        steps = self.checkpointing_steps
        if steps not in (None, "epoch") and not (steps.isdecimal() and int(steps) > 0):
            raise InputError(f"--checkpointing_steps {steps}: expected a number of steps, or epoch")
        if not self.with_tracking:
            told = () if self.report_to == "none" else ("report_to",)
            note_unused((*told, "run_name", "project_name"), "without --with_tracking")

    def named_checkpoint(self) -> Path | None:
        """The folder that --resume_from_checkpoint names; None where it asks for the output's latest one."""
        wanted = self.resume_from_checkpoint
        return None if wanted in (None, "", "latest", "auto", "True", "true") else Path(wanted)

    def previous_run(self) -> dict[str, Any]:
        """What is recorded of the run that is to be continued; {} where there is none."""
        named = self.named_checkpoint()
        record = named / STATE_RECORD if named else Path(self.output_dir) / RECORD
        return read_json(record) if record.exists() and (named or not self.overwrite) else {}

    def draw_seed(self) -> int:
        """The run's seed; without --seed one is drawn, and a continued run keeps the one it began with."""
        if self.seed is not None:
            return self.seed
        drawn = 0 if started_together() else int.from_bytes(os.urandom(3), "little")  # the same on every process
        return self.previous_run().get("settings", {}).get("seed", drawn)

    def keep_precision(self) -> None:
        """Set precisions that are left open to those that a continued run began with; refuse another with InputError."""
        began = self.previous_run().get("precision", {})
        if kept := began.get("mixed_precision"):
            if self.mixed_precision is None:
                say(f"precision {kept}, in which this run began")
            elif self.mixed_precision != kept:
                raise InputError(
                    f"--mixed_precision {self.mixed_precision}: the run in {self.output_dir} began with {kept}; "
                    "give that, or --overwrite to begin again"
                )
            self.mixed_precision = kept
        if self.torch_dtype == "auto":
            self.torch_dtype = began.get("torch_dtype", "auto")

    def make_accelerator(self) -> Any:
        """The run's `Accelerator`, in the precision that the flags, the launcher or the device ask for."""
        import torch
        from accelerate import Accelerator

        prepare_device()
        self.keep_precision()
        has_bf16 = fastest_dtype(default_device()) is torch.bfloat16
        mixed = self.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION") or ("bf16" if has_bf16 else "no")
        if mixed == "bf16" and not (self.mixed_precision or has_bf16 or default_device().type == "cpu"):
            mixed = "no" if os.environ.get("ACCELERATE_USE_FSDP") == "true" else "fp16"
            say(f"precision {mixed}: this GPU has no bf16, which the launcher asks for")
        tracker = self.report_to if self.with_tracking and self.report_to != "none" else None
        try:
            accelerator = Accelerator(mixed_precision=mixed, log_with=tracker, project_dir=self.output_dir)
            sharding = getattr(accelerator.state, "fsdp_plugin", None)
            if sharding and sharding.fsdp_version == 2 and (policy := sharding.mixed_precision_policy):
                # accelerate would add up gradients, and hand out the losses, in half precision.
                sharding.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)
            if tracker:
                options = {"wandb": {"name": self.run_name}} if tracker == "wandb" and self.run_name else {}
                accelerator.init_trackers(self.project_name, init_kwargs=options)
        except (ValueError, ImportError) as error:
            raise InputError(f"--report_to {self.report_to}, --mixed_precision {mixed}: {one_line(error)}") from None
        return accelerator


def memory_config(arguments: TrainerArguments, base_config: Any, vocabulary: int) -> Any:
    """The memory's config: the base's with the layer count (and, for llama3, the MLP's width) changed.

    Raises InputError for a base without such a memory, or without block `layer_position`.
    """
    from models.families import memory_class
    from models.stack import memory_config as config_of_layers

    blocks = base_config.get_text_config().num_hidden_layers
    if not -blocks <= arguments.layer_position < blocks:
        raise InputError(f"--layer_position {arguments.layer_position}: the base has {blocks} decoder blocks")
    preset = PRESETS[arguments.base_model_name]
    fits = preset.family == base_config.model_type
    try:
        config = config_of_layers(base_config, arguments.memory_layers or (preset.layers if fits else DEFAULT_LAYERS))
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
    import numpy as np
    import torch

    from models.families import memory_class
    from models.starts import drop_neurons, init_from_base, init_lm_head, measure_scale

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
        if arguments.memory_dropout:
            drop_neurons(memory, arguments.memory_dropout)
    except ValueError as error:
        raise InputError(f"--model_name_or_path {arguments.model_name_or_path}: {one_line(error)}") from None
    return memory


def checkpoints(output: Path) -> list[Path]:
    """Complete checkpoint folders of a run."""
    return [path for kind in ("epoch", "step") for path in output.glob(f"{kind}_[0-9]*") if path.is_dir()]


def latest_checkpoint(output: Path) -> Path | None:
    """The checkpoint with the highest step that can be resumed from."""
    found = [path for path in checkpoints(output) if (path / STATE_RECORD).exists()]
    return max(found, key=lambda path: read_json(path / STATE_RECORD)["step"], default=None)
