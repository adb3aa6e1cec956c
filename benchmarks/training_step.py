"""A training step of 2,048 rows (forward, loss, backward, clipping, AdamW) compared with its bare matrix products."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

from benchmarks.setting import PRECISIONS, Setting
from benchmarks.timing import Row, rounds

STEP_ROWS = 2048
ROUNDS = 7  # at least: a ratio of two long runs is as noisy as the machine
TARGETS = {"float32": 0.9, "bfloat16": 0.8}


def training_step(setting: Setting) -> list[Row]:
    """A step of `MemoryTrainer` in float32 and bfloat16, compared with the bare products of the same shapes."""
    import numpy as np
    import torch

    from training.arguments import TrainerArguments
    from training.rows import OfflineRows

    setting.prepare("targets")
    size = max(STEP_ROWS // setting.stride, 1)  # windows
    arguments = TrainerArguments(
        model_name_or_path=setting.model,
        dataset_name=str(setting.folder / "windows"),
        knn_save_path=str(setting.chain_folder() / "targets"),
        num_train_epochs=100_000,
        per_device_train_batch_size=size,
        seed=0,
    )
    source = OfflineRows(setting.windows(), setting.memory().config, arguments, str(setting.datastore()))
    windows = np.arange(len(source.counts))[-size - 1 : -1]  # the last one is shorter
    rows = int(source.counts[windows].sum())
    runs: dict[str, Callable[[], Any]] = {}
    for precision, dtype in PRECISIONS.items():
        trainer = make_trainer(setting, source, arguments, precision)
        inputs = trainer.read(windows)  # in training a thread reads ahead
        runs[f"step {dtype}"] = lambda trainer=trainer, inputs=inputs: trainer.train_step(windows, iter([inputs]))
        runs[f"bare {dtype}"] = bare_products(trainer, rows, getattr(torch, dtype))
    seconds, found = rounds(runs, max(setting.repeats, ROUNDS), setting.device), []
    for dtype, target in TARGETS.items():
        rates = [rows / seconds.median(f"{kind} {dtype}") for kind in ("step", "bare")]
        share = seconds.ratio(f"bare {dtype}", f"step {dtype}")
        detail = f"{rates[0]:.0f} of {rates[1]:.0f} tokens/s, optimizer included"
        found.append(Row(f"rate of the bare products, {dtype}", share, ">=", target, "x", detail))
    return found


def sampled_vocabulary(setting: Setting) -> list[Row]:
    """Loss and gradient of the hidden states of 1,024 rows over a sampled vocabulary, of those over the whole one, for a
    frozen random head of SmolLM2's size and one of Gemma's; and how alike the gradients are."""
    import torch

    from utils.cal_loss import fused_linear_distillation_loss, sample_vocabulary

    found, rows, entries, others = [], 1024, 20, 4096
    for vocabulary, width in ((49_152, 576), (262_144, 640)):
        torch.manual_seed(0)
        head = torch.randn(vocabulary, width, device=setting.device) / width**0.5
        hidden = torch.randn(rows, width, device=setting.device, requires_grad=True)
        # Zipf-like ids, as in text: most rows share their tokens.
        ids = (vocabulary ** torch.rand(rows * entries)).long().clamp_max(vocabulary - 1)
        targets = torch.full((rows,), entries), ids.int(), torch.full((rows * entries,), 1 / entries)
        labels, gradients = ids[::entries].clone(), {}

        def step(sampled: bool, hidden=hidden, head=head, labels=labels, targets=targets, gradients=gradients) -> None:
            states, weight, label, token_id = hidden, head, labels, targets[1]
            if sampled:
                states, weight, label, token_id = sample_vocabulary(states, weight, label, token_id, others)
            loss, *_ = fused_linear_distillation_loss(states, weight, label, targets[0], token_id, targets[2], 0.2)
            (gradients[sampled],) = torch.autograd.grad(loss, hidden)

        seconds = rounds({"sampled": lambda: step(True), "whole": lambda: step(False)}, setting.repeats, setting.device)
        alike = torch.cosine_similarity(gradients[True], gradients[False]).mean().item()
        detail = (
            f"{seconds.median('sampled'):.3f} s of {seconds.median('whole'):.3f} s; gradients' mean cosine {alike:.4f}"
        )
        name = f"loss over {others} sampled tokens, of the whole {vocabulary:,}"
        found.append(Row(name, seconds.ratio("sampled", "whole"), "<=", 0.5, "x", detail))
    return found


def make_trainer(setting: Setting, source: Any, arguments: Any, precision: str) -> Any:
    """A `MemoryTrainer` in a precision, with an accelerate state of its own."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from training.trainer import MemoryTrainer
    from utils.artefact import Made

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision=precision, cpu=setting.device == "cpu")
    return MemoryTrainer(setting.memory().train(), source, arguments, Made("memory"), accelerator)


def bare_products(trainer: Any, rows: int, dtype: Any) -> Callable[[], None]:
    """Forward and backward products of stack and head, in the trainer's shapes and chunks, into preallocated buffers.

    The gradient of the first block's input is left out: it is never needed.
    """
    import torch

    from utils.cal_loss import chunk_bytes

    memory = trainer.memory
    device = memory.lm_head.weight.device
    micro = min(trainer.micro_rows, rows)

    def random(*shape: int) -> Any:
        return torch.randn(shape, device=device).to(dtype)

    layers = []  # of each: weight, input, output, output's gradient, gradients of weight and (not of the first) of input
    for number, block in enumerate(memory.blocks):
        weights = matrices(block)
        for place, (out, width) in enumerate(weight.shape for weight in weights):
            needs_input = number > 0 or place == len(weights) - 1
            weight, x = random(out, width), random(micro, width)
            grads = torch.empty_like(weight), torch.empty_like(x) if needs_input else None
            layers.append((weight, x, random(micro, out), random(micro, out), *grads))
    head = memory.lm_head.weight.detach().to(dtype)
    chunks = math.ceil(micro * head.shape[0] * head.element_size() / chunk_bytes(device))
    size = math.ceil(micro / chunks)
    bounds = [*range(0, micro, size), micro]
    hidden, logits = random(micro, head.shape[1]), random(size, len(head))
    hidden_grad, head_grad = torch.empty_like(hidden), torch.empty_like(head)

    def run() -> None:
        for _ in range(max(round(rows / micro), 1)):
            for weight, x, _, output, _, _ in layers:
                torch.mm(x, weight.t(), out=output)
            for start, stop in itertools.pairwise(bounds):
                chunk, z = hidden[start:stop], logits[: stop - start]
                torch.mm(chunk, head.t(), out=z)
                torch.mm(z, head, out=hidden_grad[start:stop])
                torch.mm(z.t(), chunk, out=head_grad)
            for weight, x, grad, _, weight_grad, input_grad in layers:
                if input_grad is not None:
                    torch.mm(grad, weight, out=input_grad)
                torch.mm(grad.t(), x, out=weight_grad)

    return run


def matrices(module: Any) -> list[Any]:
    """The weights (out, in) of a module's products: of each Linear, and of GPT-2's Conv1D, which stores (in, out)."""
    found = [each for each in module.modules() if getattr(getattr(each, "weight", None), "ndim", 0) == 2]
    return [each.weight.detach() if hasattr(each, "out_features") else each.weight.detach().t() for each in found]
