"""Several processes of one run: how they find each other, and how all of them end when one fails.

A launcher (accelerate launch, torchrun) starts them and sets WORLD_SIZE; `join` connects them, over NCCL where there
are GPUs and over gloo where there are none. Knows nothing of what they compute.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

# A process may work for days on its parts while the others wait for it at the end.
PATIENCE = timedelta(days=7)
# Time for the launcher to end this process, which has nothing of its own to say.
GRACE_SECONDS = 2.0
# Where MPI tells its processes how many they are.
MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_T = TypeVar("_T")
LOST = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe", "Socket Timeout")


def started_together() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def process_number() -> int:
    """This process's number among those of its run, 0 for the main one."""
    return int(os.environ.get("RANK") or 0)


def start_those_asked_for() -> None:
    """Where accelerate was asked for several processes and started this one alone, start them; else return.

    `accelerate launch --cpu --num_processes 3` (or without --cpu and without a GPU) starts one process whatever the
    number is, and sets the address of a main process in it. The number stands in the launcher's command line, where
    the system shows it. This process then becomes torch's launcher of its own command.
    """
    environment = os.environ
    alone = not any(name in environment for name in ("WORLD_SIZE", *MPI_SIZES))
    if not (alone and "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment):
        return
    count = _processes_of_launcher()
    if count == 1:
        return
    if count is None or not _runs_on_cpu():
        print(
            "accelerate started one process only; for several on the CPU: "
            "accelerate launch --config_file accelerate_config/cpu.yaml --num_processes N",
            file=sys.stderr,
        )
        return
    # The address is torch's launcher's to choose; the last would bind all processes to the same cores.
    for name in ("MASTER_ADDR", "MASTER_PORT", "KMP_AFFINITY"):
        environment.pop(name, None)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count))
    sys.stdout.flush()
    os.execv(sys.executable, [*launcher, *sys.orig_argv[1:]])


def _runs_on_cpu() -> bool:
    import torch

    return os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not torch.cuda.is_available()


def _processes_of_launcher() -> int | None:
    """--num_processes in the command line of this process's parent, an `accelerate launch` on one machine, or None."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    line = " ".join(words)
    machines = re.search(r" --num[_-]machines[ =]([0-9]+)", line)
    found = re.search(r"accelerate.*? --num[_-]processes[ =]([0-9]+)", line)
    if found is None or (machines is not None and int(machines[1]) > 1):
        return None
    return int(found[1])


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


def decided_by_main(decide: Callable[[], _T]) -> _T:
    """What `decide` returns on the main process, on all of them: for what is read from files that change."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState()
    if state.num_processes == 1:
        return decide()
    return broadcast_object_list([decide() if state.is_main_process else None])[0]


def is_sharded(model: Any) -> bool:
    """Whether each process holds a part of `model`'s weights only (FSDP 1 or 2)."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return any(isinstance(module, (FullyShardedDataParallel, FSDPModule)) for module in model.modules())


@contextlib.contextmanager
def whole_weights(model: Any) -> Iterator[None]:
    """Within the block each process holds all weights of a `model` whose weights are sharded (FSDP 1 or 2).

    So that processes may run it a different number of times: no exchange happens within the block. Entering and
    leaving it are collective. A model that is not sharded is left as it is.
    """
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    modules = list(model.modules())
    if any(isinstance(module, FullyShardedDataParallel) for module in modules):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            yield
        return
    sharded = [module for module in modules if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
            # The outermost keeps its weights between forward and backward, as fully_shard has it by default.
            module.set_reshard_after_forward(module is not sharded[0], recurse=False)
            _forget_passes(module)


def _forget_passes(module: Any) -> None:
    """Make torch forget the forward passes of a `fully_shard`ed module that no backward pass followed.

    It gathers weights ahead in the order of the passes it remembers: processes that made another number of them would
    gather others, and wait for each other forever.
    """
    state = module._get_fsdp_state()
    state._comm_ctx.post_forward_order.clear()
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    for group in groups:
        if group is not None:
            group._post_forward_indices.clear()


def let_main_speak() -> None:
    """Before a process other than the main one reports bad input: time for the main one to report the same.

    What is wrong is mostly wrong for all; the launcher ends the other processes as soon as the first has ended, so that
    the line appears once. A process whose trouble is its own comes to speak after this.
    """
    if started_together() and process_number() > 0:
        time.sleep(GRACE_SECONDS)


def is_lost_connection(error: BaseException) -> bool:
    """Whether `error` says that another process of this run has ended in the middle of an exchange."""
    import torch

    if not started_together() or not isinstance(error, RuntimeError):
        return False
    kinds = tuple(
        kind
        for kind in (getattr(torch.distributed, name, None) for name in ("DistBackendError", "DistNetworkError"))
        if kind is not None
    )
    return isinstance(error, kinds) or any(text in str(error) for text in LOST)


def report_lost_connection() -> str:
    """The line for a process that lost another one, after the time in which the launcher ends it silently."""
    time.sleep(GRACE_SECONDS)
    return f"process {process_number()} ends: another process of this run has ended, its own line says why"
