"""A program for `accelerate launch`: runs the steps of a plan (JSON) one after another in the processes of one launch.

A step is [command's module, its arguments…] or [function of this file, its arguments…]. One launch for many steps, since
starting processes is what takes the time.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from utils.errors import command  # noqa: E402


class Stopped(Exception):
    """Raised in place of a kill, after a checkpoint."""


def run_command(module: str, *arguments: str) -> None:
    sys.argv = [module, *arguments]
    importlib.import_module(module).main()


def stop_after(checkpoint: str, module: str, *arguments: str) -> None:
    """Run a trainer until it has written `checkpoint`, and leave everything as it is then."""
    from training.trainer import MemoryTrainer

    save = MemoryTrainer._save

    def save_and_stop(trainer, name):
        save(trainer, name)
        if name == checkpoint:
            raise Stopped

    MemoryTrainer._save = save_and_stop
    try:
        run_command(module, *arguments)
        raise AssertionError(f"never came to {checkpoint}")
    except Stopped:
        pass
    finally:
        MemoryTrainer._save = save


def shard(output: str) -> None:
    """Losses, gradients and one step of a sharded memory beside those of the whole one, as JSON in `output`."""
    import torch
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from transformers import AutoConfig

    from models import memory_class
    from training.rows import Rows
    from training.trainer import MemoryWithLoss
    from utils.distributed import whole_weights

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    config = AutoConfig.from_pretrained(ROOT / "tests" / "golden" / "llama" / "memory")
    generator = torch.Generator().manual_seed(5)
    counts = torch.randint(1, 5, (21,), generator=generator, dtype=torch.int32)
    entries = int(counts.sum())
    rows = Rows(
        torch.randn(21, config.hidden_size, generator=generator),
        torch.randint(0, config.vocab_size, (21,), generator=generator, dtype=torch.int32),
        counts,
        torch.randint(0, config.vocab_size, (entries,), generator=generator, dtype=torch.int32),
        torch.rand(entries, generator=generator).half(),
    )

    def module() -> MemoryWithLoss:
        torch.manual_seed(7)
        return MemoryWithLoss(memory_class(config)(config), alpha=0.4)

    whole, sharded = module(), module()
    for block in sharded.memory.modules():
        if type(block).__name__.endswith("MLPBlock"):
            fully_shard(block)
    fully_shard(sharded)
    total = whole(rows, 21)[0]
    total.backward()
    # Process 0 takes 11 rows, process 1 takes 10: gradients are averaged, the loss is a sum of shares.
    share = sharded(list(rows.slices(11))[rank], 21)[0]
    (share * world).backward()
    part = share.detach().clone()
    torch.distributed.all_reduce(part)

    def full(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    with torch.no_grad(), whole_weights(sharded):
        # As in validation, where processes score different numbers of batches.
        apart = [sharded.memory.hidden(rows.hidden) @ sharded.memory.lm_head.weight.T for _ in range(1 + rank)]
        plain = whole.memory.hidden(rows.hidden) @ whole.memory.lm_head.weight.T
    assert all(isinstance(weight, DTensor) for weight in sharded.parameters())
    gradients = {name: full(weight.grad) for name, weight in sharded.named_parameters()}
    expected = {name: weight.grad for name, weight in whole.named_parameters()}
    kept = sum(weight.to_local().numel() for weight in sharded.parameters())
    for model in (whole, sharded):
        torch.optim.AdamW(model.parameters(), lr=1e-2).step()
    weights = {name: full(weight.detach()) for name, weight in sharded.named_parameters()}
    found = {
        "loss": [float(part), float(total.detach())],
        "gradient": max(float((gradients[name] - value).abs().max()) for name, value in expected.items()),
        "largest": max(float(value.abs().max()) for value in expected.values()),
        "weight": max(float((weights[name] - value.detach()).abs().max()) for name, value in whole.named_parameters()),
        "logits": float((apart[0] - plain).abs().max()),
        "names": sorted(expected) == sorted(gradients),
        "kept": kept / sum(weight.numel() for weight in whole.parameters()),
    }
    if rank == 0:
        Path(output).write_text(json.dumps(found))
    torch.distributed.barrier()


def train_sharded(module: str, *arguments: str) -> None:
    """Run a trainer whose memory is sharded over the processes by torch itself, as accelerate does on GPUs alone."""
    import contextlib

    import torch
    from torch.distributed.fsdp import fully_shard

    from training import run as train_memory
    from training.arguments import make_accelerator

    class Sharding:
        """An `Accelerator` but for what it does to a model."""

        def __init__(self, inner) -> None:
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def prepare(self, model, optimizer):
            for block in model.memory.modules():
                if type(block).__name__.endswith("MLPBlock"):
                    fully_shard(block)
            fully_shard(model)
            optimizer.param_groups[0]["params"] = list(model.parameters())
            return model, optimizer

        @contextlib.contextmanager
        def no_sync(self, model):
            model.set_requires_gradient_sync(False)
            yield
            model.set_requires_gradient_sync(True)

        def clip_grad_norm_(self, parameters, norm):
            return torch.nn.utils.clip_grad_norm_(parameters, norm)

        def unwrap_model(self, model):
            return model

        def save_state(self, folder, **_):
            Path(folder, "kept").touch()

        def get_state_dict(self, model):
            return {name: weight.full_tensor() for name, weight in model.state_dict().items()}

    train_memory.make_accelerator = lambda arguments: Sharding(make_accelerator(arguments))
    try:
        run_command(module, *arguments)
    finally:
        train_memory.make_accelerator = make_accelerator


@command
def main() -> None:
    import torch

    # A trainer ends the processes' connection, as the last act of its command; here another command follows.
    torch.distributed.destroy_process_group = lambda *_: None
    for step in json.loads(Path(sys.argv[1]).read_text()):
        name, arguments = step[0], [str(item) for item in step[1:]]
        if name in ("stop_after", "shard", "train_sharded"):
            globals()[name](*arguments)
        else:
            run_command(name, *arguments)


if __name__ == "__main__":
    main()
