"""What both trainers share around the training core: flags, the memory's size and start, precision, trackers.

Knows nothing of datastores: the entry scripts hand over the rows and a validation function.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.cli import flag, note_unused
from utils.errors import InputError, check_fraction, check_positive, one_line


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


@dataclass
class TrainerArguments:
    """Flags of train_mlpmem_offline and train_mlpmem_online."""

    model_name_or_path: str | None = flag(None, "folder or hub name of the base model")
    tokenizer_name: str | None = flag(None, "tokenizer to use instead of the base model's own")
    dataset_name: str | None = flag(None, "windows folder made by utils/preprocess_dataset.py")
    dataset_split_name: str = flag("train", "split to train on")
    knn_save_path: str | None = flag(None, "kNN targets made by knn_utils.saveKNNMulti")
    base_model_name: str = flag(
        "small", f"preset of the memory's layer count ({', '.join(PRESETS)}); of use for its own family only"
    )
    memory_layers: int | None = flag(
        None, f"layers of the memory; default: the preset's where it fits the base's family, else {DEFAULT_LAYERS}"
    )
    layer_position: int = flag(-1, "decoder block whose MLP input is the memory's input (0 = first, -1 = last)")
    output_dir: str = flag("output", "folder of the checkpoints; an interrupted run there is continued")
    overwrite: bool = flag(False, "begin again where the folder holds another run")
    learning_rate: float = flag(5e-5, "peak learning rate of AdamW")
    weight_decay: float = flag(0.0, "weight decay of AdamW")
    lr_scheduler_type: str = flag("linear", "schedule: linear, cosine, constant, constant_with_warmup, …")
    num_warmup_steps: int = flag(0, "steps over which the learning rate rises from 0")
    num_train_epochs: int = flag(3, "passes over the data")
    max_train_steps: int | None = flag(None, "stop after this many steps")
    alpha: float = flag(0.5, "weight of KL(kNN || memory); the cross-entropy has 1 - alpha")
    gradient_accumulation_steps: int = flag(1, "loads of windows that make one step")
    per_device_train_batch_size: int = flag(8, "windows that a process takes at a time")
    per_device_eval_batch_size: int = flag(8, "windows that a process scores at a time")
    micro_batch_rows: int | None = flag(None, "rows that go through the memory at once; default by device")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm")
    mixed_precision: str | None = flag(
        None,
        "no, bf16 or fp16; default: the launcher's, else bf16 where this device computes faster in it; a continued run "
        "keeps the one it began with",
    )
    seed: int | None = flag(None, "seed of initialisation and data order; without it a run draws one and records it")
    checkpointing_steps: str | None = flag(
        None, "a checkpoint is written each `epoch`, and with a number also each N steps; default: epoch"
    )
    resume_from_checkpoint: str | None = flag(None, "checkpoint folder to continue from; default: the output's latest")
    logging_steps: int = flag(10, "steps between entries of the log")
    init_lm_head: bool = flag(False, "begin with the base's head and final norm")
    init_from_base: bool = flag(False, "begin as nearly the base model itself as a memory can be")
    validation_split_name: str = flag("validation", "split whose joint perplexity is measured each epoch, or none")
    validation_dstore_path: str | None = flag(None, "datastore of that split (saved with --save_logprob)")
    max_eval_samples: int | None = flag(None, "use this many validation windows at most")
    torch_dtype: str | None = flag(None, "frozen base: float32 (default), bfloat16, float16, or auto")
    device_map: str | None = flag(None, "frozen base: accelerate's placement over several devices")
    load_in_4bit: bool = flag(False, "frozen base: quantise to 4 bits (needs bitsandbytes)")
    load_in_8bit: bool = flag(False, "frozen base: quantise to 8 bits (needs bitsandbytes)")
    trust_remote_code: bool = flag(False, "frozen base: run the code in its repository")
    with_tracking: bool = flag(False, "report to the tracker of --report_to")
    report_to: str = flag("none", "tracker: none, tensorboard, wandb, … (only with --with_tracking)")
    run_name: str | None = flag(None, "the run's name at the tracker")
    project_name: str = flag("mlpmemory", "the project's name at the tracker")

    def check(self) -> None:
        """Refuse what cannot work before anything is loaded. Raises InputError."""
        for name in ("model_name_or_path", "dataset_name", "knn_save_path"):
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
        for name in ("num_train_epochs", "gradient_accumulation_steps", "per_device_train_batch_size", "logging_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: expected at least 1")
        if self.memory_layers is not None and self.memory_layers < 1:
            raise InputError(f"--memory_layers {self.memory_layers}: expected at least 1")
        if self.mixed_precision not in (None, "no", "bf16", "fp16"):
            raise InputError(f"--mixed_precision {self.mixed_precision}: expected no, bf16 or fp16")
        if self.init_lm_head and self.init_from_base:
            raise InputError("--init_lm_head and --init_from_base: expected one of them")
        if self.checkpointing_steps not in (None, "epoch") and not (
            self.checkpointing_steps.isdigit() and int(self.checkpointing_steps) > 0
        ):
            raise InputError(f"--checkpointing_steps {self.checkpointing_steps}: expected a number of steps, or epoch")
        if self.report_to != "none" and not self.with_tracking:
            from utils.loading import say

            say(f"--report_to {self.report_to}: nothing is reported without --with_tracking")
        if not self.with_tracking:
            note_unused(("run_name", "project_name"), "without --with_tracking")


def previous_run(arguments: TrainerArguments) -> dict[str, Any]:
    """What is recorded of the run that is to be continued: by --resume_from_checkpoint, else in the output folder."""
    from training.checkpoints import names_checkpoint, read_record, trainer_state
    from training.trainer import RECORD

    record = Path(arguments.output_dir) / RECORD
    if names_checkpoint(arguments.resume_from_checkpoint):
        record = trainer_state(Path(arguments.resume_from_checkpoint))
    elif arguments.overwrite:
        return {}
    return read_record(record)


def draw_seed(arguments: TrainerArguments) -> int:
    """The run's seed; without --seed one is drawn, and a continued run keeps the one it began with."""
    if arguments.seed is not None:
        return arguments.seed
    previous = previous_run(arguments).get("settings", {}).get("seed")
    if isinstance(previous, int):
        return previous
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return 0  # every process needs the same number
    return int.from_bytes(os.urandom(3), "little")


def keep_precision(arguments: TrainerArguments) -> None:
    """Where a run is continued, set the precisions that flags, launcher or a timing would choose to those it began with.

    A timing may come out otherwise at the second start, and a launcher may be another one; an explicit other
    --mixed_precision is refused with an InputError.
    """
    previous = previous_run(arguments).get("precision", {})
    began = previous.get("mixed_precision")
    if began is not None:
        asked = arguments.mixed_precision
        if asked not in (None, began):
            raise InputError(
                f"--mixed_precision {asked}: the run in {arguments.output_dir} began with {began}; give that, or "
                "--overwrite to begin again"
            )
        if asked is None:
            from utils.loading import say

            say(f"precision {began}, in which this run began")
        arguments.mixed_precision = began
    if arguments.torch_dtype == "auto":
        arguments.torch_dtype = previous.get("torch_dtype", "auto")


def make_accelerator(arguments: TrainerArguments) -> Any:
    """The run's `Accelerator`, in the precision that the flags, the launcher or the device ask for.

    A continued run keeps the precision it began with.
    """
    from accelerate import Accelerator

    from utils.loading import default_device, fastest_dtype, keep_freed_memory

    if default_device().type == "cpu":
        keep_freed_memory()
    keep_precision(arguments)
    precision = arguments.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
    if precision is None:
        import torch

        precision = "bf16" if fastest_dtype(default_device()) is torch.bfloat16 else "no"
    tracker = arguments.report_to if arguments.with_tracking and arguments.report_to != "none" else None
    try:
        accelerator = Accelerator(mixed_precision=precision, log_with=tracker, project_dir=arguments.output_dir)
        if tracker:
            options = {"wandb": {"name": arguments.run_name}} if tracker == "wandb" and arguments.run_name else {}
            accelerator.init_trackers(arguments.project_name, init_kwargs=options)
    except (ValueError, ImportError) as error:
        raise InputError(
            f"--report_to {arguments.report_to}, --mixed_precision {precision}: {one_line(error)}"
        ) from None
    return accelerator


def memory_config(arguments: TrainerArguments, base_config: Any, vocabulary: int) -> Any:
    """The memory's config: the base's with the layer count (and, for llama3, the MLP's width) changed."""
    from models.stack import memory_config as stack_config

    preset = PRESETS[arguments.base_model_name]
    fits = preset.family == base_config.model_type
    config = stack_config(base_config, arguments.memory_layers or (preset.layers if fits else DEFAULT_LAYERS))
    if fits:
        for name, value in preset.changes:
            setattr(config, name, value)
    config.vocab_size = vocabulary
    return config


def build_memory(arguments: TrainerArguments, config: Any, base: Any, scale: Callable[[], Any]) -> Any:
    """A new memory in float32 with the start that the flags ask for.

    Args:
        config: from `memory_config`.
        base: the base model; needed for --init_lm_head and --init_from_base only.
        scale: measures the typical sizes around the captured block (`models.starts.BaseScale`), for --init_from_base.
    """
    import torch

    from models import memory_class
    from models.starts import init_from_base, init_lm_head

    try:
        memory = memory_class(config)(config).to(torch.float32)
        if arguments.init_lm_head:
            init_lm_head(memory, base)
        if arguments.init_from_base:
            init_from_base(memory, base, scale(), arguments.layer_position)
    except ValueError as error:
        raise InputError(f"--model_name_or_path {arguments.model_name_or_path}: {one_line(error)}") from None
    return memory


def training_settings(arguments: TrainerArguments, seed: int, memory_subfolder: str = "") -> Any:
    """The training core's settings from the flags."""
    from training.trainer import TrainingSettings

    shared = {name for name in TrainingSettings.__dataclass_fields__ if hasattr(arguments, name)}
    values = {name: getattr(arguments, name) for name in shared} | {"seed": seed, "memory_subfolder": memory_subfolder}
    steps = arguments.checkpointing_steps
    return TrainingSettings(**values | {"checkpointing_steps": None if steps in (None, "epoch") else int(steps)})
