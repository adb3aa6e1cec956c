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

from utils.cli import command  # noqa: E402

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaMLPBlock",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


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

    with torch.no_grad():
        # As in validation; more often than there are backward passes.
        scored = [sharded(rows) for _ in range(3)]
        sharded.reshard()
        plain = whole(rows)
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
        "log_probs": float((scored[2] - plain).abs().max()),
        "names": sorted(expected) == sorted(gradients),
        "kept": kept / sum(weight.numel() for weight in whole.parameters()),
    }
    if rank == 0:
        Path(output).write_text(json.dumps(found))
    torch.distributed.barrier()


def sharded(name: str, *arguments: str) -> None:
    """A step whose memory accelerate shards by FSDP 2, which it does only for processes that it takes for GPUs."""
    import os

    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state()
    before = PartialState._shared_state["distributed_type"]
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    os.environ.update(FSDP)
    try:
        run_step(name, *arguments)
    finally:
        for variable in FSDP:
            del os.environ[variable]
        AcceleratorState._reset_state()
        PartialState._shared_state["distributed_type"] = before


def run_step(name: str, *arguments: str) -> None:
    own = {"stop_after": stop_after, "shard": shard, "sharded": sharded}
    if name in own:
        own[name](*arguments)
    else:
        run_command(name, *arguments)


@command
def main() -> None:
    import torch

    # A trainer ends the processes' connection, as the last act of its command; here another command follows.
    torch.distributed.destroy_process_group = lambda *_: None
    for step in json.loads(Path(sys.argv[1]).read_text()):
        run_step(*map(str, step))


if __name__ == "__main__":
    main()
