"""The training core of both trainers: which windows make a step, the step itself, checkpoints, resuming.

It is handed a source of rows (from a datastore on disk, or from the frozen base) and knows nothing of where
they come from. One `accelerate` loop serves CPU, one GPU, DDP and FSDP.

A step takes the same windows, in the same order, on any number of processes; its loss is the mean over all its
rows (paper, training objective: alpha·KL(kNN ‖ memory) + (1-alpha)·cross-entropy). The state of a run is a pure
function of its settings and the step number, so a resumed run equals an undisturbed one.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from training.checkpoints import (
    STATE_FOLDER,
    Publisher,
    checkpoint_name,
    checkpoints,
    full_disk,
    latest_checkpoint,
    names_checkpoint,
    read_record,
    read_state,
    trainer_state,
)
from training.rows import Rows, RowSource, epoch_order
from utils.cal_loss import fused_linear_distillation_loss
from utils.distributed import is_sharded, whole_weights
from utils.errors import InputError
from utils.files import FolderLock, ensure_folder, remove_temporary, write_json
from utils.loading import say

RECORD = "training.json"


@dataclass
class TrainingSettings:
    """What determines a run, beside its data and its memory's start."""

    output_dir: str
    learning_rate: float
    weight_decay: float
    lr_scheduler_type: str
    num_warmup_steps: int
    num_train_epochs: int
    max_train_steps: int | None
    alpha: float
    gradient_accumulation_steps: int
    per_device_train_batch_size: int
    seed: int
    checkpointing_steps: int | None
    logging_steps: int
    mixed_precision: str | None
    micro_batch_rows: int | None
    max_grad_norm: float
    resume_from_checkpoint: str | None
    overwrite: bool
    memory_subfolder: str = ""

    def identity(self, num_processes: int) -> dict[str, Any]:
        """The settings that two runs must share for one to continue the other."""
        windows = self.per_device_train_batch_size * self.gradient_accumulation_steps * num_processes
        names = ("learning_rate", "weight_decay", "lr_scheduler_type", "num_warmup_steps", "num_train_epochs")
        names += ("max_train_steps", "alpha", "seed", "max_grad_norm")
        return {name: getattr(self, name) for name in names} | {"windows_per_step": windows}


class MemoryWithLoss(nn.Module):
    """Memory, head and loss as one module, so that wrappers (DDP, FSDP, autocast) see a single forward."""

    def __init__(self, memory: nn.Module, alpha: float) -> None:
        super().__init__()
        self.memory = memory
        self.alpha = alpha

    def forward(self, rows: Rows, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """(total, kl, ce) of `rows`, each a sum over these rows divided by `num_rows`."""
        weight = self.memory.lm_head.weight
        hidden = self.memory.hidden(rows.hidden.to(weight.dtype))  # (n, hidden)
        return fused_linear_distillation_loss(
            hidden, weight, rows.label.long(), rows.id_cnt, rows.token_id, rows.prob, self.alpha, num_rows=num_rows
        )


def step_rows_limit(device: torch.device, precision: str) -> int:
    """Rows that go through the stack at once: what keeps activations small on a CPU (half as wide in bf16), a GPU busy."""
    if device.type != "cpu":
        return 16384
    return 2048 if precision == "bf16" else 1024


class MemoryTrainer:
    """Trains a memory on a `RowSource`.

    Args:
        memory: a memory stack, float32 weights.
        source: where rows come from.
        settings: flags.
        data_identity: what the data are (row counts, fingerprints); a resumed run must have the same.
        validate: called with the memory at the end of each epoch, returns figures for the log.
        on_log: called with each log entry on the main process.
        accelerator: the `accelerate.Accelerator` of this run.
        precision: what a continued run keeps though it may be chosen by timing; recorded, not compared.
    """

    def __init__(
        self,
        memory: nn.Module,
        source: RowSource,
        settings: TrainingSettings,
        data_identity: dict[str, Any],
        validate: Callable[[nn.Module], dict[str, Any]] | None = None,
        on_log: Callable[[dict[str, Any]], None] | None = None,
        accelerator: Any = None,
        precision: dict[str, str] | None = None,
    ) -> None:
        from transformers import get_scheduler

        self.source, self.settings, self.validate, self.on_log = source, settings, validate, on_log
        self.accelerator, self.precision = accelerator, precision or {}
        self.row_counts = source.window_rows()
        windows = len(self.row_counts)
        per_step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
        self.windows_per_step = per_step * accelerator.num_processes
        self.steps_per_epoch = math.ceil(windows / self.windows_per_step)
        self.total_steps = self.steps_per_epoch * settings.num_train_epochs
        if settings.max_train_steps is not None:
            self.total_steps = min(self.total_steps, settings.max_train_steps)
        self.micro_rows = settings.micro_batch_rows or step_rows_limit(accelerator.device, accelerator.mixed_precision)
        self.identity = settings.identity(accelerator.num_processes) | {"data": data_identity}
        self.output = Path(settings.output_dir)
        self.log: list[dict[str, Any]] = []
        self.step = 0
        self.training_seconds = 0.0
        parameters = sum(weight.numel() for weight in memory.parameters())

        module = MemoryWithLoss(memory, settings.alpha)
        optimizer = torch.optim.AdamW(
            module.parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=accelerator.device.type in ("cpu", "cuda"),
        )
        self.memory = memory
        self.model, self.optimizer = accelerator.prepare(module, optimizer)
        self.sharded = is_sharded(self.model)
        # Weights and two moments; sharded states hold the weights once more.
        self.checkpoint_bytes = (16 if self.sharded else 12) * parameters
        self.publisher = Publisher(self.checkpoint_bytes)
        if not self.sharded:
            # The weights stand in the checkpoint as the memory itself; its state need not hold them again.
            accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
            accelerator.register_load_state_pre_hook(self._load_weights)
        # The schedule counts optimizer steps of the whole run, so it stays outside `prepare`, which would
        # advance it once for each process.
        self.scheduler = get_scheduler(
            settings.lr_scheduler_type, optimizer, settings.num_warmup_steps, max(self.total_steps, 1)
        )

    # -- one step ---------------------------------------------------------------------------------------

    def _windows_of_step(self, step: int) -> np.ndarray:
        epoch, number = divmod(step, self.steps_per_epoch)
        order = epoch_order(len(self.row_counts), self.settings.seed, epoch)
        return order[number * self.windows_per_step : (number + 1) * self.windows_per_step]

    def _loads(self, windows: np.ndarray, process: int) -> list[np.ndarray]:
        """Windows of a step that `process` reads at once, load by load, so that gradient accumulation bounds memory.

        Loads without a row are left out; a process without any, as where a short last step has fewer windows than
        there are processes, still has one, empty load.
        """
        share, size = windows[process :: self.accelerator.num_processes], self.settings.per_device_train_batch_size
        loads = [share[start : start + size] for start in range(0, len(share), size)]
        return [load for load in loads if self.row_counts[load].any()] or [np.zeros(0, dtype=np.int64)]

    def _passes(self, loads: list[np.ndarray]) -> int:
        """Forward passes that loads take."""
        return sum(max(math.ceil(self.row_counts[load].sum() / self.micro_rows), 1) for load in loads)

    def _plan(self) -> Iterator[tuple[int, np.ndarray, bool]]:
        """(step, windows to read, whether they are the step's last) from the current step on.

        Where weights are sharded each pass gathers them from all processes: those with fewer passes get empty loads.
        """
        for step in range(self.step, self.total_steps):
            windows = self._windows_of_step(step)
            loads = self._loads(windows, self.accelerator.process_index)
            if self.sharded:
                most = max(self._passes(self._loads(windows, other)) for other in range(self.accelerator.num_processes))
                loads += [np.zeros(0, dtype=np.int64)] * (most - self._passes(loads))
            for number, load in enumerate(loads):
                yield step, load, number == len(loads) - 1

    def _prefetched(self) -> Iterator[tuple[int, np.ndarray, bool, Any]]:
        """The plan with what each load read; the next load is read in the background."""
        with ThreadPoolExecutor(1) as pool:
            waiting = None
            for step, load, last in self._plan():
                future = pool.submit(self._read, load)
                if waiting is not None:
                    yield (*waiting[:3], waiting[3].result())
                waiting = (step, load, last, future)
            if waiting is not None:
                yield (*waiting[:3], waiting[3].result())

    def _read(self, load: np.ndarray) -> Any:
        # A process without rows still takes part in the exchange of weights and gradients: it runs some window
        # with weight zero.
        return self.source.read(load if len(load) else np.array([int(np.argmax(self.row_counts))]))

    def _backward(self, step: int, load: np.ndarray, last: bool, read: Any, num_rows: int) -> np.ndarray:
        """Forward and backward of one load by micro-batches; returns the sums (total, kl, ce) of its rows."""
        rows = self.source.rows(read)
        idle = len(load) == 0
        if not bool(torch.isfinite(rows.hidden).all()):
            raise InputError(f"step {step + 1}: hidden states of {self.source.where(load)} hold NaN or infinity")
        sums = np.zeros(3)
        pieces = list(rows.slices(self.micro_rows))[: 1 if idle else None]
        for number, piece in enumerate(pieces):
            exchange = last and number == len(pieces) - 1
            context = contextlib.nullcontext() if exchange else self.accelerator.no_sync(self.model)
            with context:
                total, kl, ce = self.model(piece.to(self.accelerator.device), num_rows)
                # The exchange averages gradients over processes; the loss is a sum of their shares.
                weight = 0.0 if idle else float(self.accelerator.num_processes)
                self.accelerator.backward(total * weight)
            if not idle:
                sums += np.array([float(total.detach()), float(kl), float(ce)])
        return sums

    def _finish_step(self, sums: np.ndarray, windows: np.ndarray, num_rows: int) -> dict[str, Any]:
        device = self.accelerator.device
        totals = self.accelerator.reduce(torch.tensor(sums, dtype=torch.float32, device=device), "sum")
        total, kl, ce = totals.tolist()
        if not math.isfinite(total):
            self.optimizer.zero_grad()
            raise InputError(
                f"step {self.step + 1}: the loss is {total} on {self.source.where(windows)}; training stops and the "
                f"last good checkpoint in {self.output} is kept; try a lower --learning_rate"
            )
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        norm = float(norm) if norm is not None else float("nan")
        if not math.isfinite(norm) and self.accelerator.mixed_precision != "fp16":
            raise InputError(
                f"step {self.step + 1}: the gradient's norm is {norm} on {self.source.where(windows)}; training stops "
                f"and the last good checkpoint in {self.output} is kept; try a lower --learning_rate"
            )
        rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return {"loss": total, "kl": kl, "ce": ce, "grad_norm": norm, "learning_rate": rate, "rows": num_rows}

    # -- the run ----------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Train to the end, or continue a run that was interrupted. Returns the run's record.

        Raises:
            InputError: the folder holds a run with other settings, or a loss or hidden state is not finite.
        """
        lock = self._open_output()
        try:
            record = self._record()
            if record.get("complete"):
                say(f"{self.output}: training is complete ({record['step']} steps), nothing to do")
                return record
            self._resume()
            self._loop()
            return self._finish()
        finally:
            self.publisher.close()
            if lock is not None:
                lock.release()

    def _open_output(self) -> FolderLock | None:
        lock = None
        problem = ""
        if self.accelerator.is_main_process:
            try:
                ensure_folder(self.output)
                lock = FolderLock(self.output).acquire()
                remove_temporary(self.output)
                self._check_previous()
            except InputError as error:
                problem = str(error)
        problem = self._agree(problem)
        if problem:
            if lock is not None:
                lock.release()
            raise InputError(problem)
        return lock

    def _agree(self, problem: str) -> str:
        """The main process's text on every process."""
        if self.accelerator.num_processes == 1:
            return problem
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([problem], from_process=0)[0]

    def _record(self) -> dict[str, Any]:
        return read_record(self.output / RECORD)

    def _described(self, **facts: Any) -> dict[str, Any]:
        return {**facts, "settings": self.identity, "precision": self.precision}

    def _check_previous(self) -> None:
        if self.settings.overwrite:
            for path in [self.output / RECORD, *checkpoints(self.output)]:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        record = self._record()
        if not record:
            write_json(self.output / RECORD, self._described(complete=False, step=0))
            return
        before, now = _flatten(record.get("settings", {})), _flatten(json.loads(json.dumps(self.identity)))
        changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        if changed:
            key = changed[0]
            raise InputError(
                f"--output_dir {self.output}: holds a run with another {key} ({before.get(key)}, now {now.get(key)}); "
                "choose another folder, or --overwrite to begin again"
            )

    def _resume(self) -> None:
        wanted = self.settings.resume_from_checkpoint
        folder = Path(wanted) if names_checkpoint(wanted) else latest_checkpoint(self.output)
        if folder is None:
            return
        state = folder / STATE_FOLDER
        if not trainer_state(folder).exists():
            raise InputError(
                f"--resume_from_checkpoint {folder}: holds no training state ({STATE_FOLDER}/trainer_state.json); "
                "name an epoch_N or step_N folder of a run that was interrupted"
            )
        saved = read_state(folder)
        if saved["steps_per_epoch"] != self.steps_per_epoch or saved["step"] > self.total_steps:
            raise InputError(f"--resume_from_checkpoint {folder}: was made with another number of windows per step")
        try:
            self.accelerator.load_state(str(state))
            self.scheduler.load_state_dict(torch.load(state / "schedule.bin", weights_only=True))
        except Exception as error:
            raise InputError(
                f"--resume_from_checkpoint {folder}: cannot be read ({' '.join(str(error).split())[:200]})"
            ) from None
        self.step, self.log = saved["step"], saved["log"]
        self.training_seconds = float(saved["training_seconds"])
        say(f"continuing from {folder} at step {self.step} of {self.total_steps}")
        if self.step == self.total_steps and folder.parent.resolve() != self.output.resolve():
            self._save(checkpoint_name(self.step, self.steps_per_epoch))  # the end of a run in another folder

    def _load_weights(self, models: list[nn.Module], state: str) -> None:
        """Hook of `accelerator.load_state`: the weights beside `state`, where it does not hold them itself."""
        from models.stack import find_memory, read_memory_state

        if not list(Path(state).glob("*.safetensors")):
            models.clear()
            self.memory.load_state_dict(read_memory_state(find_memory(Path(state).parent)))

    def _loop(self) -> None:
        settings, bar = self.settings, None
        rows_done = 0
        show = None if self.accelerator.is_main_process else True
        bar = tqdm(total=self.total_steps, initial=self.step, desc="train", unit="step", disable=show)
        started = time.perf_counter()
        sums = np.zeros(3)
        self.model.train()
        self._seed()
        for step, load, last, read in self._prefetched():
            windows = self._windows_of_step(step)
            num_rows = int(self.row_counts[windows].sum())
            if num_rows == 0:
                raise InputError(f"step {step + 1}: {self.source.where(windows)} hold no row")
            sums += self._backward(step, load, last, read, num_rows)
            if not last:
                continue
            figures = self._finish_step(sums, windows, num_rows)
            sums = np.zeros(3)
            self.step = step + 1
            rows_done += num_rows
            bar.update()
            bar.set_postfix_str(f"loss {figures['loss']:.3f}, {rows_done / (time.perf_counter() - started):.0f} rows/s")
            epoch_end = self.step % self.steps_per_epoch == 0 or self.step == self.total_steps
            if self.step % settings.logging_steps == 0 or epoch_end:
                self._note({"step": self.step, "epoch": self.step / self.steps_per_epoch, **figures})
            if epoch_end and self.validate is not None:
                self.model.eval()
                with whole_weights(self.model):
                    self._note({"step": self.step, "validation": self.validate(self.memory_for_reading())})
                self.model.train()
            every = settings.checkpointing_steps
            if epoch_end or (every and self.step % every == 0):
                self.training_seconds += time.perf_counter() - started
                self._save(f"epoch_{math.ceil(self.step / self.steps_per_epoch)}" if epoch_end else f"step_{self.step}")
                started, rows_done = time.perf_counter(), 0
            self._seed()
        bar.close()

    def _seed(self) -> None:
        """Dropout depends on the seed, the step and the process, so a resumed run draws what it would have drawn."""
        torch.manual_seed((self.settings.seed * 1_000_003 + self.step) * 4096 + self.accelerator.process_index)

    def _note(self, entry: dict[str, Any]) -> None:
        self.log.append(entry)
        if self.accelerator.is_main_process:
            if self.on_log is not None:
                self.on_log(entry)
            if "validation" in entry:
                say(f"step {entry['step']}: {json.dumps(entry['validation'])}")

    # -- checkpoints ------------------------------------------------------------------------------------

    def memory_for_reading(self) -> nn.Module:
        """The trained memory outside its wrappers."""
        return self.accelerator.unwrap_model(self.model).memory

    def _save(self, name: str) -> None:
        """Write checkpoint `name`: the memory, and under `state/` what resuming needs; older states go.

        Raises InputError where the disk has no space for it.
        """
        temporary = self.output / f".tmp-{name}"
        self.publisher.wait()
        try:
            self._write_checkpoint(name, temporary)
        except Exception as error:
            raise (full_disk(error, temporary, name, self.checkpoint_bytes) or error) from None

    def _write_checkpoint(self, name: str, temporary: Path) -> None:
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / STATE_FOLDER).mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary / STATE_FOLDER), safe_serialization=True)
        weights = self.accelerator.get_state_dict(self.model)
        if self.accelerator.is_main_process:
            prefix = "memory."
            weights = {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}
            self.memory_for_reading().save_pretrained(temporary / self.settings.memory_subfolder, state_dict=weights)
            torch.save(self.scheduler.state_dict(), temporary / STATE_FOLDER / "schedule.bin")
            write_json(
                trainer_state(temporary),
                self._described(
                    step=self.step,
                    steps_per_epoch=self.steps_per_epoch,
                    training_seconds=self.training_seconds,
                    log=self.log,
                ),
            )
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.publisher.start(temporary, self.output / name)

    def _finish(self) -> dict[str, Any]:
        record = self._described(
            complete=True,
            step=self.step,
            steps_per_epoch=self.steps_per_epoch,
            checkpoint=str(Path(checkpoint_name(self.step, self.steps_per_epoch)) / self.settings.memory_subfolder),
            training_seconds=round(self.training_seconds, 2),
            log=self.log,
        )
        if self.accelerator.is_main_process:
            from utils.plots import plot_training

            plot_training(self.log, self.output / "loss.png")
            self.publisher.wait()
            write_json(self.output / RECORD, record)
        self.accelerator.wait_for_everyone()
        return record


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flatten(item, f"{prefix}{key}.")
    return flat
