"""Fine-tuning of a base model on windows, with the Hugging Face `Trainer`.

Windows go in as they are: the labels in them say what is predicted, so overlapping windows count no token twice.

The output folder holds the Trainer's checkpoints, `finetune.json` (what the run is, and whether it is complete), and
at the end the model and tokenizer. The same command again continues from the last complete checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainingArguments, default_data_collator

from utils.cli import say, started_together
from utils.errors import InputError, one_line
from utils.evaluation import check_token_ids, count_rows, predicted_positions
from utils.files import TEMPORARY_PREFIX, ensure_folder, read_json, write_json
from utils.legacy import require_same, sync_file, sync_folder
from utils.loading import check_windows, load_windows, model_fingerprint, windows_fingerprint

RECORD = "finetune.json"
CHECKPOINT_PREFIX = "checkpoint-"
TRAINER_STATE = "trainer_state.json"
# Settings that make a run another one; the rest (logging, saving, loaders) may change between two starts.
IDENTITY = (
    *("learning_rate", "weight_decay", "num_train_epochs", "max_steps", "warmup_steps", "seed", "data_seed"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16", "lr_scheduler_type", "optim"),
    *("per_device_train_batch_size", "gradient_accumulation_steps"),
)
# More of them, recorded where they are not at their defaults.
UNUSUAL = (
    *("lr_scheduler_kwargs", "optim_args", "optim_target_modules", "label_smoothing_factor", "neftune_noise_alpha"),
    *("dataloader_drop_last", "train_sampling_strategy", "average_tokens_across_devices"),
)
LENGTH = ("num_train_epochs", "max_steps")  # which another folder's run may be continued beyond


class FinetuneArguments(TrainingArguments):
    """The Trainer's arguments without its DataParallel, which multiplies the batch: one process works on one GPU."""

    @property
    def n_gpu(self) -> int:
        return min(1, super().n_gpu)


def finetune(base: Any, tokenizer: Any, data: Any, training: Any, *, overwrite: bool = False) -> Path:
    """Train `base` on the train split of `data.dataset_name`; returns the folder that holds the result.

    Args:
        base: a causal language model in float32; `--bf16` and `--fp16` compute in half precision over these weights.
        tokenizer: saved beside the model; None saves none.
        data: flags `dataset_name`, `eval_subset`, `max_train_samples`, `max_eval_samples`, `patience`.
        training: `FinetuneArguments`. `resume_from_checkpoint` names a checkpoint; without it the
            output folder's last complete one is continued.
        overwrite: begin again where the folder holds another run.

    Raises:
        InputError: windows that do not fit the model, an output folder with another run, a loss that is not finite.
    """
    output = ensure_folder(training.output_dir)
    # Padding is on the right, so the model needs no mask of it.
    needed = {"type": "torch", "columns": ["input_ids", "labels"]}
    windows = load_windows(data.dataset_name, "train", data.max_train_samples)
    counts = count_rows(windows)
    if not counts.all():  # a last window of one token predicts nothing, and is skipped
        windows = windows.select(np.flatnonzero(counts))
    windows = windows.with_format(**needed)
    check_token_ids(windows, base.get_input_embeddings().weight.shape[0], data.dataset_name)
    check_windows(data.dataset_name, windows, base.config, tokenizer)
    held_out, held_out_tokens = None, 0
    if data.patience is not None or training.eval_strategy != "no":
        held_out = load_windows(data.dataset_name, data.eval_subset, data.max_eval_samples)
        held_out_tokens, held_out = int(count_rows(held_out).sum()), held_out.with_format(**needed)
    settle(training, data.patience)
    values = training.to_dict()
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    unusual = {name: values[name] for name in UNUSUAL if name in values and values[name] != defaults[name]}
    settings = {name: values[name] for name in IDENTITY} | unusual
    settings |= {
        "world_size": training.world_size,
        "patience": data.patience,
        "model": model_fingerprint(base),
        "windows": windows_fingerprint(windows),
    }
    resume = open_run(output, settings, training, overwrite)
    if resume == "complete":
        say(f"fine-tuning: {output} is complete, nothing to do")
        return output
    if resume:
        say(f"fine-tuning: continuing from {resume}")
    gpus = torch.cuda.device_count()
    spread = len(set(getattr(base, "hf_device_map", {}).values())) > 1  # by --device_map
    if training.n_gpu and gpus > 1 and not started_together() and not spread:
        say(f"fine-tuning: on one GPU of {gpus}; on all of them with accelerate launch -m train_base")
    if training.gradient_checkpointing:
        base.config.use_cache = False
    with told_by_flags(training, "report_to"):
        trainer = TokenWeightedTrainer(
            model=base.train(),
            args=training,
            train_dataset=windows,
            eval_dataset=held_out,
            data_collator=default_data_collator,
            processing_class=tokenizer,
            callbacks=callbacks(data.patience),
        )
    trainer.held_out_tokens = held_out_tokens
    try:
        trainer.train(resume_from_checkpoint=resume)
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"--per_device_train_batch_size {training.per_device_train_batch_size}: out of memory "
            f"({one_line(error, 160)}); lower it and raise --gradient_accumulation_steps"
        ) from None
    save_result(trainer, output, settings)
    return output


class TokenWeightedTrainer(Trainer):
    """Its `eval_loss` is the mean over all `held_out_tokens` predicted tokens; the Trainer's changes with the batches."""

    held_out_tokens: int

    def prediction_step(
        self, model: Any, inputs: dict[str, torch.Tensor], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        """A batch's share, for the mean that the Trainer takes over all windows.

        Several processes fill the last batches up with windows that were counted before: their shares the Trainer
        leaves out, so they must not be in those of the others.
        """
        state, windows = self.accelerator.gradient_state, len(inputs["labels"])
        if state.end_of_dataloader and state.remainder > 0:
            before = self.accelerator.process_index * self.args.eval_batch_size
            windows = min(max(state.remainder - before, 0), windows)
        mask, labels = predicted_positions(inputs["labels"][:windows])
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(input_ids=inputs["input_ids"]).logits[:windows][mask]  # (rows, V)
        total = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
        return total * len(self.eval_dataset) / (max(windows, 1) * self.held_out_tokens), None, None

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """All held-out windows, also where --dataloader_drop_last leaves training windows out."""
        drop, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop

    def create_optimizer(self, *given: Any, **named: Any) -> Any:
        with told_by_flags(self.args, "optim", "optim_args"):
            return super().create_optimizer(*given, **named)

    def create_scheduler(self, *given: Any, **named: Any) -> Any:
        with told_by_flags(self.args, "lr_scheduler_type", "lr_scheduler_kwargs"):
            return super().create_scheduler(*given, **named)


@contextlib.contextmanager
def told_by_flags(training: Any, *names: str) -> Iterator[None]:
    """Turn what transformers says about the values of the flags `names`, or a package they need, into InputError."""
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        values = {name: value for name, value in training.to_dict().items() if name in names and value}
        given = (f"--{name} {' '.join(value) if isinstance(value, list) else value}" for name, value in values.items())
        raise InputError(f"{' '.join(given) or '--do_train'}: {one_line(error, 200)}") from None


def settle(training: Any, patience: int | None) -> None:
    """Complete the Trainer's arguments with what windows, and early stopping, need."""
    training.prediction_loss_only = True  # the logits of a whole split would not fit in memory
    training.logging_nan_inf_filter = False
    training.dataloader_pin_memory = training.dataloader_pin_memory and torch.cuda.is_available()
    if patience is None:
        return
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy

    if patience < 1:
        raise InputError(f"--patience {patience}: expected 1 or more")
    if training.eval_strategy == "no":
        training.eval_strategy = IntervalStrategy.EPOCH
    if training.eval_strategy == "steps":
        training.save_steps = training.eval_steps
    training.save_strategy = SaveStrategy(training.eval_strategy.value)
    training.load_best_model_at_end = True
    training.metric_for_best_model = training.metric_for_best_model or "eval_loss"
    training.greater_is_better = bool(training.greater_is_better)


def callbacks(patience: int | None) -> list[Any]:
    """A loss that is not a number ends the run; with --patience, so do evaluations that bring nothing."""
    from transformers import EarlyStoppingCallback, TrainerCallback

    class FiniteLoss(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            loss = (logs or {}).get("loss")
            if loss is not None and not math.isfinite(float(loss)):
                raise InputError(
                    f"step {state.global_step}: the loss is not a finite number; lower --learning_rate, or use --bf16 "
                    "in place of --fp16. Earlier checkpoints are kept"
                )

    stopping = [] if patience is None else [EarlyStoppingCallback(early_stopping_patience=patience)]
    return [FiniteLoss(), *stopping]


def open_run(output: Path, settings: dict[str, Any], training: Any, overwrite: bool) -> str | None:
    """What there is to continue in `output`: a checkpoint's path, "complete", or None for a new run.

    Raises:
        InputError: the folder holds another run, or --resume_from_checkpoint is no checkpoint.
    """
    record = output / RECORD
    given = training.resume_from_checkpoint
    if str(given).lower() in ("true", "1"):
        given = None  # "continue from the last", which is what happens anyway
    if given is not None and not is_complete(Path(given)):
        raise InputError(
            f"--resume_from_checkpoint {given}: is not a checkpoint of the Trainer ({TRAINER_STATE} is missing)"
        )
    if given is not None:
        # The Trainer takes the optimizer's settings from the checkpoint, whatever the flags say.
        made, remedy = settings_of(Path(given)), "give those settings, or leave the flag out to begin anew"
        now = settings if "model" in made else {name: settings[name] for name in made}
        require_same(f"--resume_from_checkpoint {given}", made, now, remedy, LENGTH)
    previous = read_json(record) if record.exists() and not overwrite else None
    if previous is not None and given is None:
        remedy = "choose another folder, or add --overwrite"
        require_same(f"--output_dir {output}", previous["settings"], settings, remedy)
        if previous["complete"]:
            return "complete"
    if training.process_index == 0:
        for checkpoint in output.glob(f"{CHECKPOINT_PREFIX}*") if previous is None else ():
            if given is None or checkpoint.resolve() != Path(given).resolve():
                shutil.rmtree(checkpoint, ignore_errors=True)
        write_json(record, {"settings": settings, "complete": False})
    if given is not None:
        return str(given)
    return None if previous is None else last_checkpoint(output)


def settings_of(checkpoint: Path) -> dict[str, Any]:
    """Settings of the run that wrote a checkpoint: those recorded beside it, else what its optimizer knows."""
    record = checkpoint.parent / RECORD
    if record.is_file() or not (state := checkpoint / "optimizer.pt").is_file():
        return read_json(record)["settings"] if record.is_file() else {}
    try:
        (group, *_) = torch.load(state, weights_only=True, map_location="cpu")["param_groups"]
    except (OSError, KeyError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise InputError(f"--resume_from_checkpoint {checkpoint}: cannot be used ({one_line(error, 200)})") from None
    names = {"initial_lr": "learning_rate", "weight_decay": "weight_decay", "eps": "adam_epsilon"}
    found = {flag: group[name] for name, flag in names.items() if name in group}
    return found | dict(zip(("adam_beta1", "adam_beta2"), group.get("betas", ()), strict=False))


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: the Trainer writes its state last."""
    try:
        return isinstance(read_json(checkpoint / TRAINER_STATE), dict)
    except (InputError, OSError):
        return False


def last_checkpoint(output: Path) -> str | None:
    """The path of the last complete checkpoint in `output`, or None."""
    found = [path for path in output.glob(f"{CHECKPOINT_PREFIX}*") if is_complete(path)]
    return str(max(found, key=lambda path: int(path.name.removeprefix(CHECKPOINT_PREFIX)))) if found else None


def save_result(trainer: Any, output: Path, settings: dict[str, Any]) -> None:
    """Write model and tokenizer into `output`, each file under a temporary name first, and mark the run complete."""
    temporary, state = output / f"{TEMPORARY_PREFIX}result", trainer.state
    trainer.save_model(str(temporary))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        for path in sorted(temporary.iterdir()):
            if path.name != "training_args.bin":  # a pickle, of no use to a reader of the model
                sync_file(path)
                os.replace(path, output / path.name)
        shutil.rmtree(temporary)
        sync_folder(output)
        best = None  # the evaluation that early stopping kept
        if state.best_metric is not None:
            best = {"step": state.best_global_step, "eval_loss": float(state.best_metric)}
        log = [
            {name: value for name, value in entry.items() if isinstance(value, (int, float)) and math.isfinite(value)}
            for entry in state.log_history
        ]
        done = {"settings": settings, "complete": True, "steps": state.global_step, "best": best, "log": log}
        write_json(output / RECORD, done)
        say(f"fine-tuning: {state.global_step} steps, model in {output}")
    trainer.accelerator.wait_for_everyone()
