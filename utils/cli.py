"""A command: its flags from dataclasses, how it ends when its input is bad, and its processes where there are several.

A field is a flag, its `help` metadata the text, its default the default. A launcher (accelerate launch, torchrun) starts
several processes and sets WORLD_SIZE; `join` connects them, over NCCL where there are GPUs and over gloo where there are
none. Torch is imported only then, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import field
from datetime import timedelta
from typing import Any, NoReturn

from utils.errors import InputError, one_line

EXIT_BAD_INPUT = 2
EXIT_LOST_PROCESS = 1
EXIT_INTERRUPTED = 130
TIMEOUT, LISTEN = "MLPMEM_TIMEOUT_MINUTES", timedelta(seconds=2)
LESS_AT_ONCE = "Less at a time: --micro_batch_rows, --per_device_train_batch_size, --per_device_eval_batch_size"
LOST = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe", "Socket Timeout")


def flag(default: Any, text: str) -> Any:
    """A dataclass field that becomes a command-line flag with `text` as its help. Lists get their own copy."""
    given = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**given, metadata={"help": text})


def required(text: str) -> Any:
    """A dataclass field that becomes a flag which must be given."""
    return field(metadata={"help": text})


def make_parser(dataclass_types: Sequence[type], description: str) -> Any:
    """A `HfArgumentParser` over `dataclass_types` whose errors are one line with exit status 2."""
    from transformers.hf_argparser import HfArgumentParser

    class OneLineParser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            leave(EXIT_BAD_INPUT, f"error: {one_line(message)}; see --help")

    return OneLineParser(list(dataclass_types), description=description, allow_abbrev=False)


def parse(*dataclass_types: type, description: str, arguments: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Parse the command line into one instance of each dataclass.

    Unknown flags, missing flags and values of the wrong type end in one line and exit status 2.
    """
    parser = make_parser(dataclass_types, description)
    try:
        *instances, unknown = parser.parse_args_into_dataclasses(
            args=arguments, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, OverflowError, ImportError) as error:  # of transformers' dataclass, which checks its values
        parser.error(str(error))
    if unknown:
        parser.error(f"unknown argument {unknown[0]}")
    return tuple(instances)


def note_unused(names: Sequence[str], why: str) -> None:
    """Say in one line each that the flags among `names` on the command line have no use, and `why`."""
    for name in names:
        if any(word.partition("=")[0] == f"--{name}" for word in sys.argv[1:]):
            say(f"--{name}: has no use {why}")


def say(text: str) -> None:
    """Print a line on the main process only."""
    if process_number() == 0:
        print(text, flush=True)


def describe_os_error(error: OSError) -> str:
    """A line for an operating-system failure: the path, what went wrong, what to do."""
    path = error.filename or "a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{path}: no space left on the device; free some space and run the same command again, finished parts are kept"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{path}: cannot be read or written ({error.strerror}); check the permissions or choose another folder"
    return f"{path}: {error.strerror or error}"


def command(main: Callable[[], None], *, training: bool = False) -> Callable[[], None]:
    """Decorator of an entry script's `main`: turns bad input into one line on stderr and exit status 2.

    Handles `InputError`, operating-system errors on files, and Ctrl-C. Any other exception is a fault of ours and keeps
    its traceback; `MLPMEM_TRACEBACK=1` keeps that of all. Processes that a launcher started together are connected
    first, and one that fails ends them all. `training`: they wait for each other for torch's own time (minutes), unless
    MLPMEM_TIMEOUT_MINUTES says another.
    """

    @functools.wraps(main)
    def run() -> None:
        try:
            if started_together():
                join(None if training and TIMEOUT not in os.environ else patience())
            else:
                note_lone_process()
            main()
            part()
            if main.__module__ == "__main__":
                gc.freeze()  # else Python's exit looks through all modules' objects once more, for a second
        except KeyboardInterrupt:
            leave(EXIT_INTERRUPTED, "interrupted; run the same command again to continue")
        except (InputError, OSError) as error:
            if os.environ.get("MLPMEM_TRACEBACK") or isinstance(error, BrokenPipeError):
                raise
            text = describe_os_error(error) if isinstance(error, OSError) and error.errno else error
            leave(EXIT_BAD_INPUT, f"error: {one_line(text)}")
        except RuntimeError as error:
            full = type(error).__name__ == "OutOfMemoryError"  # torch's, of a GPU
            if os.environ.get("MLPMEM_TRACEBACK") or not (full or (started_together() and is_lost_connection(error))):
                raise
            if full:
                leave(EXIT_BAD_INPUT, f"error: {one_line(error, 200)} {LESS_AT_ONCE}")
            time.sleep(LISTEN.total_seconds())  # the other's line first
            line = "another process of this run has ended, its own line says why"
            leave(EXIT_LOST_PROCESS, f"process {process_number()} ends: {line}")

    return run


def leave(status: int, line: str) -> NoReturn:
    """Exit with `status` after `line` on stderr; a process of a distributed run does not wait for the others."""
    sys.stdout.flush()
    if started_together():
        tell(line)
        os._exit(status)
    print(line, file=sys.stderr, flush=True)
    sys.exit(status)


def tell(line: str) -> None:
    """Print `line` on stderr, which the main process does at once, and alone where another ends with the same line.

    Another one waits for that line before it tells its own; the main process, whose end may end it, waits until it has.
    """
    from torch.distributed import distributed_c10d as connection

    main, told, store = process_number() == 0, False, None
    if connection.is_initialized():
        store = connection._get_default_store()
    elif not main:
        time.sleep(LISTEN.total_seconds())
    with contextlib.suppress(RuntimeError):  # no such line, or the main process has ended
        if store and not main:
            store.wait(["line 0"], LISTEN)
            told = store.get("line 0").decode() == line
    if not told:
        print(line, file=sys.stderr, flush=True)
    with contextlib.suppress(RuntimeError):
        if store:
            store.set(f"line {process_number()}", line)
            store.wait([f"line {number}" for number in range(main and connection.get_world_size())], LISTEN)


def started_together() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def process_number() -> int:
    """This process's number among those of its run, 0 for the main one."""
    return int(os.environ.get("RANK") or 0)


def note_lone_process() -> None:
    """Say so where `accelerate launch` was asked for several, but started this one alone (--cpu, or no GPU)."""
    counts = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    asked_for_several = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    if asked_for_several and not any(name in os.environ for name in counts):
        remedy = "accelerate launch --config_file accelerate_config/cpu.yaml --num_processes N"
        print(f"accelerate started one process only; for several on the CPU: {remedy}", file=sys.stderr)


def patience() -> timedelta:
    """How long a process waits for another, which may work for days on its parts. Raises InputError."""
    if not (minutes := os.environ.get(TIMEOUT, "10080")).isdecimal() or not 0 < int(minutes) < 10**9:
        raise InputError(f"{TIMEOUT} {minutes}: expected a number of minutes")
    return timedelta(minutes=int(minutes))


def join(timeout: timedelta | None) -> Any:
    """Connect the processes of this run; returns accelerate's `PartialState`. One process alone needs no connection.

    accelerate starts several processes on a machine without GPUs (`distributed_type: MULTI_GPU`), but takes each of
    them for a run of its own unless it is told that the CPU is meant.
    """
    import torch
    from accelerate import PartialState

    on_cpu = started_together() and not torch.cuda.is_available()
    if on_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    return PartialState(cpu=on_cpu, timeout=timeout)


def part() -> None:
    """Close the connection that `join` opened: left to Python's own end, its threads may abort the process."""
    if started_together():
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether `error` says that another process of this run has ended in the middle of an exchange."""
    import torch

    return isinstance(error, torch.distributed.DistError) or any(text in str(error) for text in LOST)
