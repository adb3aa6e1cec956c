"""Several processes of one run: how they find each other, and how all of them end when one fails.

A launcher (accelerate launch, torchrun) starts them and sets WORLD_SIZE; `join` connects them, over NCCL where there
are GPUs and over gloo where there are none. Torch is imported only where there are several.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

# A process may work for days on its parts while the others wait for it at the end.
PATIENCE = timedelta(days=7)
# Time for the launcher to end this process, which has nothing of its own to say.
GRACE_SECONDS = 2.0
LOST = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe", "Socket Timeout")
_T = TypeVar("_T")


def started_together() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def process_number() -> int:
    """This process's number among those of its run, 0 for the main one."""
    return int(os.environ.get("RANK") or 0)


def note_lone_process() -> None:
    """Say so where `accelerate launch` was asked for several processes, but started this one alone.

    It does so with --cpu, and without a GPU; it sets the address of a main process then, though there is none to find.
    """
    counts = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    asked_for_several = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    if asked_for_several and not any(name in os.environ for name in counts):
        print(
            "accelerate started one process only; for several on the CPU: "
            "accelerate launch --config_file accelerate_config/cpu.yaml --num_processes N",
            file=sys.stderr,
        )


def join() -> Any:
    """Connect the processes of this run; returns accelerate's `PartialState`. One process alone needs no connection.

    accelerate starts several processes on a machine without GPUs (`distributed_type: MULTI_GPU`), but takes each of
    them for a run of its own unless it is told that the CPU is meant.
    """
    import torch
    from accelerate import PartialState

    on_cpu = started_together() and not torch.cuda.is_available()
    if on_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    return PartialState(cpu=on_cpu, timeout=PATIENCE)


def part() -> None:
    """Close the connection that `join` opened: left to Python's own end, its threads may abort the process."""
    if started_together():
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def decided_by_main(decide: Callable[[], _T]) -> _T:
    """What `decide` returns on the main process, on all of them: for what is read from files that change."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState()
    if state.num_processes == 1:
        return decide()
    return broadcast_object_list([decide() if state.is_main_process else None])[0]


def let_others_speak(lost: bool = False) -> None:
    """Before a process tells why it ends: time for the one that knows best to tell it first.

    What is wrong is mostly wrong for all, and the main process tells it at once; the launcher ends the other processes
    as soon as the first has ended, so that the line appears once. A process whose trouble is its own comes to speak
    after this. One that only `lost` another waits on the main process too.
    """
    if lost or (started_together() and process_number() > 0):
        time.sleep(GRACE_SECONDS)


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether `error` says that another process of this run has ended in the middle of an exchange."""
    if not started_together():
        return False
    import torch

    return isinstance(error, torch.distributed.DistError) or any(text in str(error) for text in LOST)
