"""A program for `accelerate launch`: runs the steps of a plan (JSON) one after another in the processes of one launch.

A step is [command's module, its arguments…] or [function of this file, its arguments…]. One launch for many steps, since
starting processes is what takes the time.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from unittest import mock

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


def stop_after(checkpoint: str, *step: str) -> None:
    """Run a trainer until it has written `checkpoint`, and leave everything as it is then."""
    from training.trainer import MemoryTrainer

    save = MemoryTrainer._save

    def save_and_stop(trainer, name):
        save(trainer, name)
        if name == checkpoint:
            raise Stopped

    with mock.patch.object(MemoryTrainer, "_save", save_and_stop):
        try:
            run_step(*step)
        except Stopped:
            return
    raise AssertionError(f"never came to {checkpoint}")


def sharded(*step: str) -> None:
    """A step whose memory accelerate shards by FSDP 2, which it does only for processes that it takes for GPUs."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state()
    before = PartialState._shared_state["distributed_type"]
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    try:
        with mock.patch.dict(os.environ, FSDP):
            run_step(*step)
    finally:
        AcceleratorState._reset_state()
        PartialState._shared_state["distributed_type"] = before


def run_step(name: str, *arguments: str) -> None:
    if name in ("stop_after", "sharded"):
        globals()[name](*arguments)
        return
    sys.argv = [name, *arguments]
    importlib.import_module(name).main()


@command
def main() -> None:
    import torch

    # A command closes the process group at its end; here another command follows.
    torch.distributed.destroy_process_group = lambda *_: None
    for step in json.loads(Path(sys.argv[1]).read_text()):
        run_step(*step)


if __name__ == "__main__":
    main()
