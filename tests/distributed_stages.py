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


def sharded(name: str, *arguments: str) -> None:
    """A step whose memory accelerate shards by FSDP 2, which it does only for processes that it takes for GPUs.

    In any precision gradients are added up, and losses handed out, in float32.
    """
    import os
    from unittest import mock

    import torch
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    from training.trainer import MemoryTrainer

    AcceleratorState._reset_state()
    before = PartialState._shared_state["distributed_type"]
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    os.environ.update(FSDP)
    dtypes = set()

    def note(home, name):
        def noted(*given, **options):
            found = call(*given, **options)
            tensors = [each for each in (found, *given, *options.values()) if isinstance(each, torch.Tensor)]
            dtypes.update((name, each.dtype) for each in tensors)
            return found

        call = getattr(home, name)
        return mock.patch.object(home, name, noted)

    try:
        # The sum of gradients, by its name in this version of torch; losses.
        adds = (
            "reduce_scatter_single" if hasattr(torch.distributed, "reduce_scatter_single") else "reduce_scatter_tensor"
        )
        with note(torch.distributed, adds), note(MemoryTrainer, "_pass"):
            run_step(name, *arguments)
        assert dtypes == {(adds, torch.float32), ("_pass", torch.float32)}, dtypes
    finally:
        for variable in FSDP:
            del os.environ[variable]
        AcceleratorState._reset_state()
        PartialState._shared_state["distributed_type"] = before


def run_step(name: str, *arguments: str) -> None:
    own = {"stop_after": stop_after, "sharded": sharded}
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
