"""A training step of 2,048 rows (forward, loss, backward, clipping, AdamW) against its bare matrix products."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

from benchmarks import plain
from benchmarks.setting import PRECISIONS, Setting
from benchmarks.timing import Row, rounds, timed

STEP_ROWS = 2048
ROUNDS = 7  # at least: a ratio of two long runs is as noisy as the machine


def training_step(setting: Setting) -> list[Row]:
    """`MemoryTrainer`'s step in float32 and bfloat16 beside the bare products of the same shapes."""
    import torch

    source = offline_rows(setting.prepare("targets"))
    load = [*step_windows(setting, source)[-1]]
    rows = int(source.counts[load].sum())
    runs: dict[str, Callable[[], Any]] = {}
    for precision, dtype in PRECISIONS.items():
        trainer = make_trainer(setting, source, precision)
        runs[f"step {dtype}"] = lambda trainer=trainer: step(trainer, load)
        runs[f"bare {dtype}"] = bare_products(trainer, rows, getattr(torch, dtype))
    seconds = rounds(runs, max(setting.repeats, ROUNDS), setting.device)
    found = []
    for dtype, target in (("float32", 0.9), ("bfloat16", 0.8)):
        rates = [rows / seconds.median(f"{kind} {dtype}") for kind in ("step", "bare")]
        detail = f"{rates[0]:.0f} of {rates[1]:.0f} tokens/s, optimiser included"
        if dtype == "float32":
            detail += f"; dense textbook step {plain_rate(setting, source):.0f} tokens/s"
        share = seconds.ratio(f"bare {dtype}", f"step {dtype}")
        found.append(Row(f"rate of the bare products, {dtype}", share, ">=", target, "x", detail))
    gain = seconds.ratio("step float32", "step bfloat16")
    bare_gain = seconds.ratio("bare float32", "bare bfloat16")
    detail = f"the bare products themselves give {bare_gain:.2f} here"
    found.append(Row("bf16 step, of float32", gain, ">=", 1.5, "x", detail, applies=bare_gain >= 1.5))
    return found


def step_windows(setting: Setting, source: Any) -> list[range]:
    """Windows, load by load, whose rows are about STEP_ROWS."""
    windows = len(source.counts)
    size = max(STEP_ROWS // setting.stride, 1)
    whole = windows - windows % size or windows
    return [range(start, min(start + size, windows)) for start in range(0, whole, size)]


def offline_rows(setting: Setting) -> Any:
    """The trainer's own source of rows."""
    from training.arguments import TrainerArguments
    from training.rows import OfflineRows

    arguments = TrainerArguments(knn_save_path=str(setting.chain_folder() / "targets"))
    return OfflineRows(setting.windows(), setting.memory().config, arguments, setting.datastore())


def make_trainer(setting: Setting, source: Any, precision: str) -> Any:
    """A `MemoryTrainer` in a precision; each has a state of its own, though they share the process."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from training.arguments import TrainerArguments
    from training.trainer import MemoryTrainer

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision=precision, cpu=setting.device == "cpu")
    windows = len(source.counts)  # any number of them is one load
    arguments = TrainerArguments(num_train_epochs=100_000, per_device_train_batch_size=windows, seed=0)
    return MemoryTrainer(setting.memory().train(), source, arguments, {}, accelerator)


def step(trainer: Any, load: list[int]) -> None:
    """One step as the trainer takes it; its reading runs in the background there, and is a row of its own."""
    import numpy as np

    windows = np.asarray(load)
    trainer.train_step(windows, iter([trainer.read(windows)]))


def bare_products(trainer: Any, rows: int, dtype: Any) -> Callable[[], None]:
    """Forward and backward products of stack and head, same shapes and pieces, into buffers made beforehand.

    The gradient of the first block's input is not among them: nobody needs it.
    """
    import torch

    from utils.cal_loss import CHUNK_BYTES

    memory = trainer.memory
    device = memory.lm_head.weight.device
    micro = min(trainer.micro_rows, rows)

    def random(*shape: int) -> Any:
        return torch.randn(shape, device=device).to(dtype)

    layers = []  # of each: weight, input, output, the gradients of weight and, unless it is the first, of input
    for number, block in enumerate(memory.blocks):
        weights = matrices(block)
        for place, (out, width) in enumerate(weight.shape for weight in weights):
            needs_input = number > 0 or place == len(weights) - 1
            weight, x = random(out, width), random(micro, width)
            grads = torch.empty_like(weight), torch.empty_like(x) if needs_input else None
            layers.append((weight, x, random(micro, out), random(micro, out), *grads))
    head = memory.lm_head.weight.detach().to(dtype)
    chunks = math.ceil(micro * head.shape[0] * head.element_size() / CHUNK_BYTES)
    size = math.ceil(micro / chunks)
    bounds = [*range(0, micro, size), micro]
    hidden, logits = random(micro, head.shape[1]), random(size, len(head))
    hidden_grad, head_grad = torch.empty_like(hidden), torch.empty_like(head)

    def run() -> None:
        for _ in range(max(round(rows / micro), 1)):
            for weight, x, _, output, _, _ in layers:
                torch.mm(x, weight.t(), out=output)
            for start, stop in itertools.pairwise(bounds):
                piece, z = hidden[start:stop], logits[: stop - start]
                torch.mm(piece, head.t(), out=z)
                torch.mm(z, head, out=hidden_grad[start:stop])
                torch.mm(z.t(), piece, out=head_grad)
            for weight, x, grad, _, weight_grad, input_grad in layers:
                if input_grad is not None:
                    torch.mm(grad, weight, out=input_grad)
                torch.mm(grad.t(), x, out=weight_grad)

    return run


def matrices(module: Any) -> list[Any]:
    """The weights (out, in) of a module's products: of each Linear, and of GPT-2's Conv1D, which stores (in, out)."""
    found = [each for each in module.modules() if getattr(getattr(each, "weight", None), "ndim", 0) == 2]
    return [each.weight.detach() if hasattr(each, "out_features") else each.weight.detach().t() for each in found]


def plain_rate(setting: Setting, source: Any) -> float:
    """Tokens/s of the dense textbook step on the last window, building its target included."""
    import numpy as np
    import torch

    memory = setting.memory().train()
    optimizer = torch.optim.AdamW(memory.parameters(), lr=1e-4)
    rows = source.rows(*source.read(np.array([len(source.counts) - 1])))
    lists = plain.as_lists(rows.id_cnt, rows.token_id, rows.prob)

    def run() -> None:
        target = plain.dense_target(lists, source.vocabulary).to(setting.device)
        hidden, labels = rows.hidden.float().to(setting.device), rows.label.long().to(setting.device)
        plain.training_step(memory, optimizer, hidden, labels, target)

    timed(run, setting.device)
    return len(lists) / timed(run, setting.device)
