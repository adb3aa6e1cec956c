"""Fine-tuning of a base model on windows, with the Hugging Face `Trainer`.

The labels in the windows say what is predicted, so overlapping windows count no token twice. The same command continues an
interrupted run in its output folder.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments, default_data_collator
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from utils.artefact import Made, begin
from utils.cli import say
from utils.errors import InputError
from utils.evaluation import by_blocks, count_rows, predicted_positions, used_width
from utils.files import naming_full_disk
from utils.loading import check_windows, load_windows, made_id

# Flags that decide the model. The rest (logging, saving, loaders) may change between two starts.
SETTINGS = (
    *("learning_rate", "weight_decay", "num_train_epochs", "max_steps", "warmup_steps", "seed", "data_seed"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16", "lr_scheduler_type", "optim"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "label_smoothing_factor", "neftune_noise_alpha"),
)
DATA_SETTINGS = ("config_name", "from_scratch", "tokenizer_name", "max_train_samples", "patience")


class FinetuneArguments(TrainingArguments):
    """The Trainer's arguments without DataParallel, which multiplies the batch size: one process uses one GPU."""

    @property
    def n_gpu(self) -> int:
        return min(1, super().n_gpu)


def finetune(base: Any, tokenizer: Any, data: Any, training: Any, *, overwrite: bool = False) -> Path:
    """Train `base` on the train split of `data.dataset_name`; returns the folder of the model.

    Args:
        base: a causal language model in float32; `--bf16` and `--fp16` compute in half precision over these weights.
        tokenizer: saved beside the model; None saves none.
        data: flags `dataset_name`, `eval_subset`, `max_eval_samples`, those in DATA_SETTINGS, and `base_id()`.
        training: `FinetuneArguments`; without `resume_from_checkpoint` the output's latest checkpoint is continued.

    Raises InputError for windows that do not fit the model, an output folder of another run, a loss that is not finite.
    """
    windows = load_windows(data.dataset_name, "train", data.max_train_samples)
    check_windows(data.dataset_name, windows, base.config, tokenizer)
    windows = windows.select(np.flatnonzero(count_rows(windows)))  # a last window of one token predicts nothing
    held_out, state = None, PartialState()
    if data.patience is not None or training.eval_strategy != "no":
        held_out = load_windows(data.dataset_name, data.eval_subset, data.max_eval_samples)
    training.prediction_loss_only = True  # the logits of a whole split would not fit in memory
    training.logging_nan_inf_filter = False
    callbacks = []
    if data.patience is not None:  # what early stopping needs
        strategy = "epoch" if training.eval_strategy == "no" else training.eval_strategy.value
        training.eval_strategy, training.save_strategy = IntervalStrategy(strategy), SaveStrategy(strategy)
        training.save_steps = training.eval_steps or training.save_steps
        training.load_best_model_at_end, training.greater_is_better = True, False
        training.metric_for_best_model = "eval_loss"
        callbacks.append(EarlyStoppingCallback(data.patience))

    settings = {name: value for name, value in training.to_dict().items() if name in SETTINGS}
    settings |= {name: getattr(data, name, None) for name in DATA_SETTINGS} | {"processes": state.num_processes}
    made_from = {"base": data.base_id(), "windows": made_id(data.dataset_name)}
    output, made = Path(training.output_dir), Made("model", settings, len(windows), made_from)
    with contextlib.closing(begin(output, made, overwrite=overwrite, state=state)) as making:
        if making.done:
            say(f"fine-tuning: {output} is complete, nothing to do")
            return output
        resume = training.resume_from_checkpoint
        if resume is None:
            # Not `get_last_checkpoint`: the Trainer writes its state last, so a kill may leave a folder without it.
            found = [path.parent for path in output.glob(f"checkpoint-*/{TRAINER_STATE_NAME}")]
            resume = max(found, key=lambda path: int(path.name.partition("-")[2]), default=None)
        if resume:
            say(f"fine-tuning: continuing from {resume}")
        columns = {"type": "torch", "columns": ["input_ids", "labels"]}
        data_of = {"train_dataset": windows.with_format(**columns), "data_collator": collate}
        if held_out:
            data_of["eval_dataset"] = held_out.with_format(**columns)
        trainer = TokenWeightedTrainer(
            base.train(), training, **data_of, processing_class=tokenizer, callbacks=callbacks
        )
        trainer.held_out_tokens = int(count_rows(held_out).sum()) if held_out else 0
        with naming_full_disk(output):
            trainer.train(resume_from_checkpoint=resume and str(resume))
            trainer.save_model()
            trainer.save_state()
        if state.is_main_process:
            (output / "training_args.bin").unlink(missing_ok=True)  # a pickle that no reader of the model needs
        making.finish()
    say(f"fine-tuning: {trainer.state.global_step} steps, model in {output}")
    return output


def collate(windows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch of windows without most of the padding at their end, which needs no mask there: (windows, time) each."""
    batch = default_data_collator(windows)
    width = used_width(batch["labels"])
    return {name: tensor[:, :width] for name, tensor in batch.items()}


class TokenWeightedTrainer(Trainer):
    """Its `eval_loss` is the mean over all `held_out_tokens` predicted tokens; the Trainer's depends on the batches."""

    held_out_tokens: int

    def log(self, logs, start_time=None):
        """Raise InputError for a loss that is not finite."""
        if not math.isfinite(float(logs.get("loss", 0))):
            remedy = "lower --learning_rate, or use --bf16 instead of --fp16"
            raise InputError(f"step {self.state.global_step}: the loss is not finite; {remedy}")
        super().log(logs, start_time)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """A batch's loss, scaled so that the Trainer's mean over windows is the mean over tokens."""
        # The last batches are filled up with repeated windows, which the Trainer drops from its mean.
        state, windows = self.accelerator.gradient_state, len(inputs["labels"])
        if state.end_of_dataloader and state.remainder > 0:
            before = self.accelerator.process_index * self.args.eval_batch_size
            windows = min(max(state.remainder - before, 0), windows)
        positions, labels = predicted_positions(inputs["labels"][:windows])
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(input_ids=inputs["input_ids"]).logits.flatten(0, 1)  # (batch · time, vocabulary)
            total = -by_blocks(lambda rows: logits[positions[rows]], logits.shape[-1], labels, (1.0,)).sum()
        return total * len(self.eval_dataset) / (max(windows, 1) * self.held_out_tokens), None, None
