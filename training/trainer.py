"""The run of both trainers: what it opens, which windows make a step, the step, validation, checkpoints, resuming.

One `accelerate` loop serves CPU, one GPU, DDP and FSDP. A step takes the same windows, in the same order, on any number
of processes; its loss is the mean over all its rows (paper, training objective: alpha·KL(kNN ‖ memory) +
(1-alpha)·cross-entropy). The state of a run is a pure function of its settings and the step number, so a resumed run
equals an undisturbed one.

A complete checkpoint is a folder `epoch_N` or `step_N`; the newest holds `state/`, from which a run continues.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, get_scheduler, set_seed

from models.stack import find_memory, read_memory_state, vocabulary_size
from training.arguments import (
    RECORD,
    STATE,
    STATE_RECORD,
    TrainerArguments,
    build_memory,
    checkpoints,
    latest_checkpoint,
    memory_config,
)
from training.rows import Rows, WindowRows, epoch_order, rows_at_once
from training.validation import Validation, open_validation
from utils import legacy as files
from utils.cal_loss import fused_linear_distillation_loss, sparse_distillation_loss
from utils.cli import say
from utils.errors import InputError, one_line
from utils.evaluation import label_log_probabilities
from utils.files import read_json, write_json
from utils.legacy import require_same
from utils.loading import from_pretrained, load_windows, quiet_libraries, windows_fingerprint
from utils.plots import plot_training

# What two runs must share for one to continue the other, beside the windows of a step and the data.
IDENTITY = (
    *("learning_rate", "weight_decay", "lr_scheduler_type", "num_warmup_steps", "num_train_epochs"),
    *("max_train_steps", "alpha", "seed", "max_grad_norm"),
)
LENGTH = ("num_train_epochs", "max_train_steps")  # which another folder's run may be continued beyond


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
    load, remote = AutoConfig.from_pretrained, {"trust_remote_code": arguments.trust_remote_code}
    base_config = from_pretrained(load, arguments.require_base(), "--model_name_or_path", **remote)
    tokenizer = arguments.open_tokenizer()
    vocabulary = base_config.vocab_size if tokenizer is None else vocabulary_size(tokenizer)
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
    if arguments.memory_dropout:
        data["dropout"] = arguments.memory_dropout
    trainer = MemoryTrainer(memory, source, arguments, data, accelerator, validation, subfolder)
    record = trainer.train()
    accelerator.end_training()
    say(f"memory: {trainer.output / record['checkpoint']}")
    return record


class MemoryWithLoss(nn.Module):
    """Memory, head and loss as one module, so that wrappers (DDP, FSDP, autocast) see a single forward."""

    def __init__(self, memory: nn.Module, alpha: float, loss: str = "fused") -> None:
        super().__init__()
        self.memory, self.alpha, self.loss = memory, alpha, loss

    def forward(self, rows: Rows, num_rows: float | None = None) -> Any:
        """(total, kl, ce) of `rows`, each a sum over these rows divided by `num_rows`.

        Without `num_rows`, for validation: log-probabilities (n, 1) of the labels, in the weights' own precision.
        """
        weight = self.memory.lm_head.weight  # (vocabulary, hidden)
        inputs = rows.hidden.to(weight.device, non_blocking=True).to(weight.dtype)  # (n, dim)
        if num_rows is None:
            with torch.autocast(inputs.device.type, enabled=False):
                return label_log_probabilities(self.memory.hidden(inputs), weight, rows.label.to(weight.device))
        hidden = self.memory.hidden(inputs)  # (n, hidden)
        targets = rows.label, rows.id_cnt, rows.token_id, rows.prob, self.alpha
        if self.loss == "plain":
            return sparse_distillation_loss(self.memory.lm_head(hidden), *targets, num_rows=num_rows)
        return fused_linear_distillation_loss(hidden, weight, *targets, num_rows=num_rows)


class MemoryTrainer:
    """Trains a memory (float32 weights) on the rows of windows, by the flags, which include a seed.

    `data` says what the data are (row counts, fingerprints): a resumed run must have the same. `validation` is scored
    at the end of each epoch; `subfolder` is where in a checkpoint the memory lies.
    """

    def __init__(
        self,
        memory: nn.Module,
        source: WindowRows,
        arguments: TrainerArguments,
        data: dict[str, Any],
        accelerator: Any,
        validation: Validation | None = None,
        subfolder: str = "",
    ) -> None:
        self.memory, self.source, self.arguments, self.validation = memory, source, arguments, validation
        self.accelerator, self.subfolder, self.output = accelerator, subfolder, Path(arguments.output_dir)
        self.load_size = arguments.per_device_train_batch_size
        self.windows_per_step = self.load_size * arguments.gradient_accumulation_steps * accelerator.num_processes
        self.filled = np.flatnonzero(source.counts)  # a last window of one token holds no row, and is skipped
        if not len(self.filled):
            raise InputError(f"--dataset_name {arguments.dataset_name}: its windows hold no row")
        self.steps_per_epoch = math.ceil(len(self.filled) / self.windows_per_step)
        self.total_steps = self.steps_per_epoch * arguments.num_train_epochs
        if arguments.max_train_steps is not None:
            self.total_steps = min(self.total_steps, arguments.max_train_steps)
        self.identity = {name: getattr(arguments, name) for name in IDENTITY}
        self.identity |= {"windows_per_step": self.windows_per_step, "data": data}
        self.log: list[dict[str, Any]] = []
        self.step, self.training_seconds = 0, 0.0

        module = MemoryWithLoss(memory, arguments.alpha, arguments.loss)
        fused = accelerator.device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(
            module.parameters(), lr=arguments.learning_rate, weight_decay=arguments.weight_decay, fused=fused
        )
        # Weights and two moments; sharded states hold the weights once more.
        sharded = accelerator.distributed_type == "FSDP"
        self.checkpoint_bytes = (16 if sharded else 12) * sum(weight.numel() for weight in memory.parameters())
        self.model, self.optimizer = accelerator.prepare(module, optimizer)
        self.micro_rows = arguments.micro_batch_rows or rows_at_once(memory, accelerator)
        if not sharded:
            # The weights stand in the checkpoint as the memory itself; its state need not hold them again.
            accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
            accelerator.register_load_state_pre_hook(self._load_weights)
        # The schedule counts optimizer steps of the whole run, so it stays outside `prepare`, which would
        # advance it once for each process.
        self.scheduler = get_scheduler(
            arguments.lr_scheduler_type, optimizer, arguments.num_warmup_steps, max(self.total_steps, 1)
        )

    def train(self) -> dict[str, Any]:
        """Train to the end, or continue a run that was interrupted. Returns the run's record.

        Raises:
            InputError: the folder holds a run with other settings, or a loss or hidden state is not finite.
        """
        with contextlib.ExitStack() as held:
            self._open_output(held)
            record = read_json(self.output / RECORD)
            if record.get("complete"):
                say(f"{self.output}: training is complete ({record['step']} steps), nothing to do")
                return record
            self._resume()
            self._loop()
            return self._finish()

    # -- which windows make a step ----------------------------------------------------------------------

    def windows_of_step(self, step: int) -> np.ndarray:
        epoch, number = divmod(step, self.steps_per_epoch)
        order = epoch_order(len(self.filled), self.arguments.seed, epoch)
        return self.filled[order[number * self.windows_per_step : (number + 1) * self.windows_per_step]]

    def loads(self, windows: np.ndarray, process: int) -> list[np.ndarray]:
        """Windows of a step that `process` reads at once, load by load, so that gradient accumulation bounds memory."""
        share = windows[process :: self.accelerator.num_processes]
        return [share[start : start + self.load_size] for start in range(0, len(share), self.load_size)]

    def passes(self, windows: np.ndarray) -> int:
        """Forward passes of a step: as many as the process with most needs, since in each all exchange weights."""
        return max(
            sum(math.ceil(self.source.counts[load].sum() / self.micro_rows) for load in self.loads(windows, process))
            for process in range(self.accelerator.num_processes)
        )

    def _reads(self) -> Iterator[Any]:
        """What this process's loads read, from the current step on; the next load is read in the background."""
        loads = (
            load
            for step in range(self.step, self.total_steps)
            for load in self.loads(self.windows_of_step(step), self.accelerator.process_index)
        )
        with ThreadPoolExecutor(1) as pool:
            futures = (pool.submit(self.read, load) for load in loads)
            for future, _ in itertools.pairwise(itertools.chain(futures, [None])):
                yield future.result()

    def read(self, load: np.ndarray) -> list[Tensor]:
        """What a load reads; pinned where a GPU is to copy it without waiting."""
        read = self.source.read(load)
        return [tensor.pin_memory() for tensor in read] if self.accelerator.device.type == "cuda" else read

    # -- one step ---------------------------------------------------------------------------------------

    def train_step(self, windows: np.ndarray, reads: Iterator[Any]) -> dict[str, Any]:
        """One step of the optimizer on `windows`, whose loads on this process are the next of `reads`."""
        num_rows, left = int(self.source.counts[windows].sum()), self.passes(windows)
        sums = torch.zeros(3, device=self.accelerator.device)
        for _ in self.loads(windows, self.accelerator.process_index):
            for piece in self.source.rows(*next(reads)).slices(self.micro_rows):
                left -= 1
                sums += self._pass(piece, num_rows, exchange=left == 0)
        for later in reversed(range(left)):
            # This process has no more rows, but takes part in the exchange of weights and gradients.
            nothing = torch.zeros(1, self.memory.input_dim), torch.zeros(1, dtype=torch.int64)
            self._pass(Rows.without_target(*nothing), num_rows, exchange=later == 0, weight=0.0)
        return self._update(sums, windows, num_rows)

    def _pass(self, rows: Rows, num_rows: int, exchange: bool, weight: float = 1.0) -> Tensor:
        """Forward and backward of some rows; returns their (total, kl, ce)."""
        with contextlib.nullcontext() if exchange else self.accelerator.no_sync(self.model):
            losses = self.model(rows, num_rows)
            # The exchange averages gradients over processes; the loss is a sum of their shares.
            self.accelerator.backward(losses[0] * (weight * self.accelerator.num_processes))
        return torch.stack(losses).detach()

    def _update(self, sums: Tensor, windows: np.ndarray, num_rows: int) -> dict[str, Any]:
        """Clip the gradients and take the optimizer's step; returns the step's figures."""
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.arguments.max_grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        # All that is read from a GPU in a step, so that it waits once.
        loss, kl, ce, norm = torch.cat([self.accelerator.reduce(sums, "sum"), norm.to(sums).view(1)]).tolist()
        if not math.isfinite(loss):
            self._check_hidden(windows)
        scaled = self.accelerator.mixed_precision == "fp16"  # whose scaler leaves out steps of infinite gradients
        for name, value in (("loss", loss), ("gradient's norm", 0.0 if scaled else norm)):
            if not math.isfinite(value):
                raise InputError(
                    f"step {self.step + 1}: the {name} is {value} on {self.source.where(windows)}; training stops and "
                    f"the last good checkpoint in {self.output} is kept; try a lower --learning_rate"
                )
        rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return {"loss": loss, "kl": kl, "ce": ce, "grad_norm": norm, "learning_rate": rate, "rows": num_rows}

    def _check_hidden(self, windows: np.ndarray) -> None:
        """Raise InputError for the first of `windows` whose hidden states are not finite: that makes a loss NaN."""
        for window in windows[:, None]:
            if not torch.isfinite(self.source.rows(*self.source.read(window)).hidden).all():
                where = self.source.where(window)
                raise InputError(f"step {self.step + 1}: hidden states of {where} hold NaN or infinity")

    def _loop(self) -> None:
        hidden = None if self.accelerator.is_main_process else True  # None: shown on a terminal
        bar = tqdm(total=self.total_steps, initial=self.step, desc="train", unit="step", disable=hidden)
        reads, started, rows_done = self._reads(), time.perf_counter(), 0
        self.model.train()
        while self.step < self.total_steps:
            # Dropout depends on the seed, the step and the process, so a resumed run draws what it would have drawn.
            torch.manual_seed((self.arguments.seed * 1_000_003 + self.step) * 4096 + self.accelerator.process_index)
            figures = self.train_step(self.windows_of_step(self.step), reads)
            self.step += 1
            rows_done += figures["rows"]
            bar.update()
            bar.set_postfix_str(f"loss {figures['loss']:.3f}, {rows_done / (time.perf_counter() - started):.0f} rows/s")
            epoch_end = self.step % self.steps_per_epoch == 0 or self.step == self.total_steps
            if epoch_end or self.step % self.arguments.logging_steps == 0:
                self._note({"step": self.step, "epoch": self.step / self.steps_per_epoch, **figures})
            if epoch_end and self.validation is not None:
                self._validate(self.validation)
            every = self.arguments.checkpointing_steps
            if epoch_end or (every not in (None, "epoch") and self.step % int(every) == 0):
                self.training_seconds += time.perf_counter() - started
                self._save(f"epoch_{math.ceil(self.step / self.steps_per_epoch)}" if epoch_end else f"step_{self.step}")
                started, rows_done = time.perf_counter(), 0
        bar.close()

    @torch.no_grad()
    def _validate(self, validation: Validation) -> None:
        self.model.eval()
        figures = validation.figures(lambda hidden, labels: self.model(Rows.without_target(hidden, labels)))
        self.model.train()
        self._note({"step": self.step, "validation": figures})
        say(f"step {self.step}: {json.dumps(figures)}")

    def _note(self, entry: dict[str, Any]) -> None:
        """Add to the log, and tell the tracker where there is one."""
        self.log.append(entry)
        flat = {**entry, **{f"validation_{key}": value for key, value in entry.get("validation", {}).items()}}
        flat.pop("validation", None)
        self.accelerator.log(flat, step=entry["step"])

    # -- checkpoints ------------------------------------------------------------------------------------

    def _described(self, **facts: Any) -> dict[str, Any]:
        """A record of the run so far; its precision is kept by a continued run, not compared."""
        precision = {
            "mixed_precision": self.accelerator.mixed_precision,
            "torch_dtype": str(self.arguments.dtype()).removeprefix("torch."),
        }
        position = {"step": self.step, "steps_per_epoch": self.steps_per_epoch, "log": self.log}
        return {**facts, **position, "settings": self.identity, "precision": precision}

    def _save(self, name: str) -> None:
        """Write checkpoint `name`: the memory, and under `state/` what resuming needs.

        It gets its name when it is on the disk, and what only older ones were resumed from is deleted after that, so
        that a kill loses nothing. Raises InputError where the disk has no space for it.
        """
        temporary, final = self.output / f"{files.TEMPORARY_PREFIX}{name}", self.output / name
        try:
            self._write(temporary)
            if self.accelerator.is_main_process:
                files.sync_tree(temporary)
                shutil.rmtree(final, ignore_errors=True)
                temporary.rename(final)
                files.sync_folder(self.output)
        except Exception as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise files.full_disk(error, self.output, name, self.checkpoint_bytes) or error from None
        if self.accelerator.is_main_process:
            for older in checkpoints(self.output):
                if older != final:
                    shutil.rmtree(older if older.name.startswith("step_") else older / STATE, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _write(self, folder: Path) -> None:
        if self.accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
            (folder / STATE).mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(folder / STATE), safe_serialization=True)
        weights = self.accelerator.get_state_dict(self.model)
        if self.accelerator.is_main_process:
            weights = {key.removeprefix("memory."): value for key, value in weights.items()}
            self.memory.save_pretrained(folder / self.subfolder, state_dict=weights)
            torch.save(self.scheduler.state_dict(), folder / STATE / "schedule.bin")
            write_json(folder / STATE_RECORD, self._described(training_seconds=self.training_seconds))
        self.accelerator.wait_for_everyone()

    def _open_output(self, held: contextlib.ExitStack) -> None:
        """Lock the output folder and refuse another run's; where the main process does, the others end with it."""
        record = self.output / RECORD
        if self.accelerator.is_main_process:
            held.enter_context(files.FolderLock(files.ensure_folder(self.output)))
            files.remove_temporary(self.output)
            self._check_named()
            if self.arguments.overwrite:
                record.unlink(missing_ok=True)
                for folder in checkpoints(self.output):
                    shutil.rmtree(folder)
            if record.exists():
                remedy = "choose another --output_dir, or --overwrite to begin again"
                require_same(self.output, read_json(record).get("settings", {}), self.identity, remedy)
            else:
                write_json(record, self._described(complete=False))
        self.accelerator.wait_for_everyone()

    def _check_named(self) -> None:
        """Refuse a named checkpoint of other settings than this run's, which its optimizer would bring along."""
        if (folder := self.arguments.named_checkpoint()) is None:
            return
        told = f"--resume_from_checkpoint {folder}"
        if not (folder / STATE_RECORD).exists():
            raise InputError(f"{told}: holds no training state ({STATE_RECORD}); name a run's epoch_N or step_N folder")
        made = read_json(folder / STATE_RECORD).get("settings", {})
        require_same(told, made, self.identity, "give those settings, or leave the flag out to begin anew", LENGTH)

    def _resume(self) -> None:
        """Continue from the checkpoint that --resume_from_checkpoint names, else from the output's latest."""
        folder = self.arguments.named_checkpoint() or latest_checkpoint(self.output)
        if folder is None:
            return
        try:
            saved = read_json(folder / STATE_RECORD)
            if saved["steps_per_epoch"] != self.steps_per_epoch or not 0 <= saved["step"] <= self.total_steps:
                raise InputError("it was made with another number of windows per step")
            self.accelerator.load_state(str(folder / STATE))
            self.scheduler.load_state_dict(torch.load(folder / STATE / "schedule.bin", weights_only=True))
            self.step, self.log, self.training_seconds = saved["step"], saved["log"], saved["training_seconds"]
        except Exception as error:
            raise InputError(f"--resume_from_checkpoint {folder}: cannot be used ({one_line(error, 200)})") from None
        say(f"continuing from {folder} at step {self.step} of {self.total_steps}")
        if self.step == self.total_steps and folder.parent.resolve() != self.output.resolve():
            self._save(f"epoch_{math.ceil(self.step / self.steps_per_epoch)}")  # the end of a run in another folder

    def _load_weights(self, models: list[nn.Module], state: str) -> None:
        """Hook of `accelerator.load_state`: the weights beside `state`, where it does not hold them itself."""
        if not list(Path(state).glob("*.safetensors")):
            models.clear()
            self.memory.load_state_dict(read_memory_state(find_memory(Path(state).parent)))

    def _finish(self) -> dict[str, Any]:
        record = self._described(
            complete=True,
            checkpoint=str(Path(f"epoch_{math.ceil(self.step / self.steps_per_epoch)}") / self.subfolder),
            training_seconds=round(self.training_seconds, 2),
        )
        if self.accelerator.is_main_process:
            plot_training(self.log, self.output / "loss.png")
            write_json(self.output / RECORD, record)
        self.accelerator.wait_for_everyone()
        return record
