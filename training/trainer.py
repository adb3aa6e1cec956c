"""The training loop of both trainers, with validation, checkpoints and resuming.

An optimizer step takes the same windows, in the same order, on any number of processes; its loss is the mean over all its
rows. The state of a run depends on its settings and the step alone, so a resumed run equals an undisturbed one. A
checkpoint is a folder `epoch_N` or `step_N`; the newest holds `state/`, from which a run continues.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import find_executable_batch_size
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, get_scheduler, set_seed

from models.stack import vocabulary_size
from training.arguments import STATE, STATE_RECORD, TrainerArguments
from training.memory import MemoryWithLoss, build_memory, memory_config
from training.rows import Rows, Validation, WindowRows, epoch_order
from utils.artefact import COMPLETE, Made, begin, differences
from utils.cli import say
from utils.errors import InputError
from utils.evaluation import rounded
from utils.files import TEMPORARY_PREFIX, atomic, naming_full_disk, read_json, remove, write_json
from utils.loading import RUN_RECORD, check_windows, from_pretrained, load_windows, quiet_libraries

LENGTH = ("num_train_epochs", "max_train_steps")  # a run may be continued in another folder for longer
SETTINGS = (  # flags that decide the memory
    *("learning_rate", "weight_decay", "lr_scheduler_type", "num_warmup_steps", "max_grad_norm", "alpha", "seed"),
    *("memory_dropout", "init_lm_head", "init_from_base", "layer_position", "dataset_split_name", *LENGTH),
    *("tie_head", "sampled_vocabulary", "save_dtype"),
)
# Rows per forward pass of the memory: small activations on a CPU; on a GPU the most that is tried.
CPU_ROWS, GPU_ROWS = 1024, 16384
GPU_RESERVE = 1 << 30  # bytes of a GPU that the search for the number of rows leaves free


def train_memory(
    arguments: TrainerArguments, make_rows: Callable[[Any, Any, Callable[[], Any]], WindowRows], subfolder: str = ""
) -> dict[str, Any]:
    """Open everything, check that it belongs together, build the memory and train it. Returns the run's record.

    Args:
        make_rows: called with the windows, the memory's config and a function that returns the frozen base.
        subfolder: of a checkpoint, where the memory is saved.

    Raises:
        InputError: inputs that do not belong together, or an output folder or checkpoint of another run.
    """
    quiet_libraries()
    windows = load_windows(arguments.dataset_name, arguments.dataset_split_name)
    load, remote = AutoConfig.from_pretrained, {"trust_remote_code": arguments.trust_remote_code}
    base_config = from_pretrained(load, arguments.require_base(), "--model_name_or_path", **remote)
    tokenizer = arguments.open_tokenizer()
    check_windows(arguments.dataset_name, windows, base_config, tokenizer)
    vocabulary = base_config.vocab_size if tokenizer is None else vocabulary_size(tokenizer)
    config = memory_config(arguments, base_config, vocabulary)
    arguments.seed = arguments.draw_seed()
    accelerator = arguments.make_accelerator()

    @functools.cache
    def open_base() -> Any:
        return arguments.open_base(tokenizer, device=accelerator.device).requires_grad_(False)

    source = make_rows(windows, config, open_base)
    made = made_of(arguments, source, config, accelerator)
    if named := arguments.named_checkpoint():
        check_checkpoint(named, made)
    output = Path(arguments.output_dir)
    with contextlib.closing(begin(output, made, overwrite=arguments.overwrite, state=accelerator)) as making:
        if making.done:
            record = read_json(output / RUN_RECORD)
            say(f"{output}: training is complete ({record['step']} steps), nothing to do")
            return record
        if accelerator.log_with:
            options = {"wandb": {"name": arguments.run_name}} if arguments.run_name else {}
            accelerator.init_trackers(arguments.project_name, init_kwargs=options)
        validation = source.open_validation(arguments, config.hidden_size, accelerator.num_processes)
        set_seed(arguments.seed)
        memory = build_memory(arguments, config, open_base, windows)
        open_base.cache_clear()  # only online rows still use the base, and hold it
        parameters = sum(weight.numel() for weight in memory.parameters())
        say(
            f"memory: {config.num_hidden_layers} layers of {config.hidden_size}, vocabulary {config.vocab_size}, "
            f"{parameters / 1e6:.1f}M parameters; precision {accelerator.mixed_precision}, seed {arguments.seed}"
        )
        trainer = MemoryTrainer(memory, source, arguments, made, accelerator, validation, subfolder, tokenizer)
        record = trainer.train()
        making.finish()
    accelerator.end_training()
    say(f"memory: {output / record['checkpoint']}")
    return record


def made_of(arguments: TrainerArguments, source: WindowRows, config: Any, accelerator: Any) -> Made:
    """The record of the memory: all that decides it."""
    windows = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * accelerator.num_processes
    settings = {name: getattr(arguments, name) for name in SETTINGS} | source.settings
    settings |= {"layers": config.num_hidden_layers, "mixed_precision": accelerator.mixed_precision}
    settings["windows_per_step"] = windows
    made_from = arguments.made_from() | {"targets": source.targets.made and source.targets.made.id}
    return Made("memory", settings, int(source.counts.sum()), made_from)


def check_checkpoint(folder: Path, made: Made) -> None:
    """Raise InputError if the checkpoint is of a run with other settings than `made`; only its length may differ."""
    before = Made(**read_json(folder / STATE_RECORD)["made"])
    length = {name: made.settings[name] for name in LENGTH}
    if found := differences(replace(before, settings=before.settings | length), made):
        raise InputError(f"--resume_from_checkpoint {folder}: was made with other settings ({found})")


def checkpoints(output: Path) -> list[Path]:
    """The checkpoint folders of a run."""
    return [*output.glob("epoch_*"), *output.glob("step_*")]


def rows_that_fit(module: MemoryWithLoss, accelerator: Any) -> int:
    """Rows per forward pass, the same on all ranks: CPU_ROWS, on a GPU as many as fit beside AdamW's moments."""
    device = accelerator.device
    if device.type != "cuda":
        return CPU_ROWS
    ranks = accelerator.num_processes if accelerator.distributed_type == "FSDP" else 1  # that share the state
    weights = sum(weight.numel() for weight in module.to(device).parameters())
    # Held during the search: two moments, the buffers in which DDP reduces gradients, and some room.
    reserved = torch.empty(12 * weights // ranks + GPU_RESERVE, dtype=torch.uint8, device=device)

    @find_executable_batch_size(starting_batch_size=GPU_ROWS)
    def attempt(rows: int) -> int:
        with accelerator.autocast():
            total, _, _ = module(Rows.zeros(rows, module.memory.input_dim), rows)
        total.backward()
        return rows

    rows = torch.tensor([attempt()], device=device)
    module.zero_grad()
    del reserved
    return int(accelerator.gather(rows).min())


@dataclass(eq=False)
class MemoryTrainer:
    """Trains a memory on the rows of windows."""

    memory: nn.Module  # float32, on the CPU
    source: WindowRows
    arguments: TrainerArguments  # with a seed
    made: Made  # the memory's record, which a resumed run must share
    accelerator: Any
    validation: Validation | None = None  # scored at the end of each epoch
    subfolder: str = ""  # of a checkpoint, for the memory
    tokenizer: Any = None  # saved in each checkpoint

    def __post_init__(self) -> None:
        arguments, accelerator, self.output = self.arguments, self.accelerator, Path(self.arguments.output_dir)
        self.batch_size, every = arguments.per_device_train_batch_size, arguments.checkpointing_steps
        self.checkpoint_steps = None if every in (None, "epoch") else int(every)
        self.windows_per_step = self.batch_size * arguments.gradient_accumulation_steps * accelerator.num_processes
        self.filled = np.flatnonzero(self.source.counts)  # a last window of one token has no row
        self.steps_per_epoch = math.ceil(len(self.filled) / self.windows_per_step)
        self.total_steps = arguments.max_train_steps or self.steps_per_epoch * arguments.num_train_epochs
        self.log: list[dict[str, Any]] = []
        self.step, self.training_seconds = 0, 0.0

        for block in self.memory.blocks if arguments.compile else ():
            block.compile(dynamic=True)  # one graph for all of them and for all numbers of rows
        module = MemoryWithLoss(self.memory, arguments.alpha, arguments.loss, arguments.sampled_vocabulary)
        self.micro_rows = arguments.micro_batch_rows or rows_that_fit(module, accelerator)
        groups: list[dict[str, Any]] = [{"params": []}, {"params": [], "weight_decay": 0.0}]
        for name, weight in module.named_parameters():
            groups["bias" in name]["params"].append(weight)
        fused = accelerator.device.type in ("cpu", "cuda")
        decay = {"lr": arguments.learning_rate, "weight_decay": arguments.weight_decay}
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], **decay, fused=fused)
        self.model, self.optimizer = accelerator.prepare(module, optimizer)
        schedule = get_scheduler(arguments.lr_scheduler_type, optimizer, arguments.num_warmup_steps, self.total_steps)
        self.rate_factor: Callable[[int], float] = schedule.lr_lambdas[0]

    def train(self) -> dict[str, Any]:
        """Train to the end, continuing from a checkpoint where there is one. Returns the run's record.

        Raises InputError for a loss that is not finite.
        """
        self._resume()
        hidden = None if self.accelerator.is_main_process else True  # None: shown on a terminal only
        steps = range(self.step, self.total_steps)
        bar = tqdm(steps, "train", self.total_steps, initial=self.step, unit="step", disable=hidden)
        inputs, started = self._inputs(), time.perf_counter()
        self.model.train()
        for step in bar:
            # Dropout depends on seed, step and rank, so that a resumed run draws the same numbers.
            torch.manual_seed((self.arguments.seed * 1_000_003 + step) * 4096 + self.accelerator.process_index)
            figures = self.train_step(self.windows_of_step(step), inputs)
            self.step = step + 1
            bar.set_postfix_str(f"loss {figures['loss']:.3f}")
            epoch_end = self.step % self.steps_per_epoch == 0 or self.step == self.total_steps
            if epoch_end or self.step % self.arguments.logging_steps == 0:
                self._note(epoch=self.step / self.steps_per_epoch, **figures)
            if epoch_end and self.validation is not None:
                self._validate(self.validation)
            if epoch_end or (self.checkpoint_steps and self.step % self.checkpoint_steps == 0):
                self.training_seconds += time.perf_counter() - started
                self._save(self._epoch_name() if epoch_end else f"step_{self.step}")
                started = time.perf_counter()
        record = self._record() | {"complete": True, "checkpoint": str(Path(self._epoch_name()) / self.subfolder)}
        if self.accelerator.is_main_process:
            write_json(self.output / RUN_RECORD, record)
        return record

    # -- the micro-batches of a step --------------------------------------------------------------------

    def windows_of_step(self, step: int) -> np.ndarray:
        """The windows of an optimizer step, on all ranks together."""
        epoch, number = divmod(step, self.steps_per_epoch)
        order = epoch_order(len(self.filled), self.arguments.seed, epoch)
        return self.filled[order[number * self.windows_per_step : (number + 1) * self.windows_per_step]]

    def micro_batches(self, windows: np.ndarray, rank: int) -> list[np.ndarray]:
        """The windows of a step that `rank` takes, micro-batch by micro-batch."""
        own = windows[rank :: self.accelerator.num_processes]
        return [own[start : start + self.batch_size] for start in range(0, len(own), self.batch_size)]

    def forward_passes(self, windows: np.ndarray) -> int:
        """Forward passes of a step: those of the rank with the most rows, since each pass gathers sharded weights."""
        counts, size = self.source.counts, self.micro_rows
        return max(
            sum(math.ceil(rounded(int(counts[batch].sum())) / size) for batch in self.micro_batches(windows, rank))
            for rank in range(self.accelerator.num_processes)
        )

    def read(self, windows: np.ndarray) -> list[Tensor]:
        """What a micro-batch reads from disk, in pinned memory if it goes to a GPU."""
        tensors = self.source.read(windows)
        return [tensor.pin_memory() for tensor in tensors] if self.accelerator.device.type == "cuda" else tensors

    def _inputs(self) -> Iterator[list[Tensor]]:
        """What this rank's micro-batches read, from the current step on. The next one is read in the background."""
        steps, rank = range(self.step, self.total_steps), self.accelerator.process_index
        batches = (batch for step in steps for batch in self.micro_batches(self.windows_of_step(step), rank))
        with ThreadPoolExecutor(1) as pool:
            futures = (pool.submit(self.read, batch) for batch in batches)
            for future, _ in itertools.pairwise(itertools.chain(futures, [None])):
                yield future.result()

    # -- one step ---------------------------------------------------------------------------------------

    def train_step(self, windows: np.ndarray, inputs: Iterator[list[Tensor]]) -> dict[str, Any]:
        """One optimizer step on `windows`; this rank's micro-batches are the next of `inputs`. Returns its figures."""
        num_rows, left = int(self.source.counts[windows].sum()), self.forward_passes(windows)
        sums = torch.zeros(3, device=self.accelerator.device)
        for _ in self.micro_batches(windows, self.accelerator.process_index):
            for rows in self.source.rows(*next(inputs)).slices(self.micro_rows):
                left -= 1
                sums += self._forward_backward(rows, num_rows, last=left == 0)
        for later in reversed(range(left)):
            # No rows left, but the other ranks need this one to gather weights and reduce gradients.
            self._forward_backward(Rows.zeros(1, self.memory.input_dim), num_rows, last=later == 0, weight=0.0)
        return self._update(sums, windows, num_rows)

    def _forward_backward(self, rows: Rows, num_rows: int, last: bool, weight: float = 1.0) -> Tensor:
        """Forward and backward pass; ranks exchange gradients in the `last` of a step. Returns (total, kl, ce)."""
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
            losses = self.model(rows, num_rows)
            # Gradients are averaged over ranks, but the loss is a sum of the ranks' shares.
            self.accelerator.backward(losses[0] * (weight * self.accelerator.num_processes))
        return torch.stack(losses).detach()

    def _update(self, sums: Tensor, windows: np.ndarray, num_rows: int) -> dict[str, Any]:
        """Clip the gradients and update the weights; returns the step's figures."""
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.arguments.max_grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        # The only values of a step that are read from a GPU, all at once.
        loss, kl, ce, norm = torch.cat([self.accelerator.reduce(sums, "sum"), norm.to(sums).view(1)]).tolist()
        scaled = self.accelerator.mixed_precision == "fp16"  # its scaler skips steps with infinite gradients
        if not math.isfinite(loss if scaled else loss + norm):
            raise InputError(
                f"step {self.step + 1}: loss {loss}, gradient norm {norm} on windows {windows[:8].tolist()}…; the last good "
                f"checkpoint is kept. Lower --learning_rate, or look for NaN in the hidden states of {self.source.origin}"
            )
        rate = self.arguments.learning_rate * self.rate_factor(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"loss": loss, "kl": kl, "ce": ce, "grad_norm": norm, "learning_rate": rate, "rows": num_rows}

    @torch.no_grad()
    def _validate(self, validation: Validation) -> None:
        self.model.eval()
        figures = validation.figures(lambda hidden, labels: self.model(Rows.without_target(hidden, labels)))
        self.model.train()
        self._note(validation=figures)
        say(f"step {self.step}: {json.dumps(figures)}")

    def _note(self, **entry: Any) -> None:
        """Add `entry` to the log, and report its numbers to the tracker."""
        self.log.append({"step": self.step, **entry})
        self.accelerator.log(entry.get("validation", entry), step=self.step)

    # -- checkpoints ------------------------------------------------------------------------------------

    def _epoch_name(self) -> str:
        return f"epoch_{math.ceil(self.step / self.steps_per_epoch)}"

    def _record(self) -> dict[str, Any]:
        """The content of training.json and, with the memory's record, of a checkpoint's state."""
        position = {"step": self.step, "steps_per_epoch": self.steps_per_epoch, "log": self.log}
        return {"complete": False, "training_seconds": self.training_seconds, "settings": self.made.settings} | position

    def _save(self, name: str) -> None:
        """Write checkpoint `name`, then delete the state and the step_N folders of older ones."""
        final, is_main = self.output / name, self.accelerator.is_main_process
        same_path = contextlib.nullcontext(final.with_name(TEMPORARY_PREFIX + name))  # as `atomic` yields it
        with naming_full_disk(final), atomic(final) if is_main else same_path as folder:
            if is_main:
                (folder / STATE).mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(folder / STATE))
            weights = self.accelerator.get_state_dict(self.model)
            if is_main:
                self._save_memory(folder, weights)
            self.accelerator.wait_for_everyone()
        if is_main:
            for older in checkpoints(self.output):
                if older != final:
                    remove(older if older.name.startswith("step_") else older / STATE)
            write_json(self.output / RUN_RECORD, self._record())
        self.accelerator.wait_for_everyone()

    def _save_memory(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """The memory with its record, the tokenizer, and the run's position in the state."""
        memory, dtype = folder / self.subfolder, getattr(torch, self.arguments.save_dtype)
        saved = {name.removeprefix("memory."): weight.to(dtype) for name, weight in weights.items()}
        self.memory.save_pretrained(memory, state_dict=saved)
        self.memory.config.dtype = dtype  # in place of the one in training
        self.memory.config.save_pretrained(memory)
        made = replace(self.made, settings=self.made.settings | {"step": self.step})
        (memory / COMPLETE).write_text(made.text, encoding="utf-8")
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        write_json(folder / STATE_RECORD, self._record() | {"made": asdict(self.made)})

    def _resume(self) -> None:
        """Continue from the output's latest checkpoint, else from the one that --resume_from_checkpoint names."""
        whole = [path for path in checkpoints(self.output) if (path / STATE_RECORD).exists()]
        found = {read_json(path / STATE_RECORD)["step"]: path for path in whole}
        folder = found[max(found)] if found else self.arguments.named_checkpoint()
        if folder is None:
            return
        saved = read_json(folder / STATE_RECORD)
        self.accelerator.load_state(str(folder / STATE))
        self.step, self.log, self.training_seconds = saved["step"], saved["log"], saved["training_seconds"]
        say(f"continuing from {folder} at step {self.step} of {self.total_steps}")
        if self.step >= self.total_steps and not (self.output / self._epoch_name()).exists():
            self._save(self._epoch_name())  # the run in the other folder was complete
