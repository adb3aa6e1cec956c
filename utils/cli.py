"""Command lines: flags from dataclasses, errors in one line, and the process group of a distributed run.

A field is a flag, its `help` metadata the text, its default the default. Torch is imported only where several processes
were started, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import functools
import gc
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import field
from datetime import timedelta
from typing import Any, NoReturn

from utils.errors import InputError, one_line

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
TIMEOUT = "MLPMEM_TIMEOUT_MINUTES"
SMALLER = "use smaller batches: --micro_batch_rows, --per_device_train_batch_size, --per_device_eval_batch_size"


def flag(default: Any, text: str) -> Any:
    """A dataclass field that becomes a command-line flag with `text` as its help. Lists get their own copy."""
    given = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**given, metadata={"help": text})


def required(text: str) -> Any:
    """A dataclass field that becomes a required flag."""
    return field(metadata={"help": text})


def make_parser(dataclass_types: Sequence[type], description: str) -> Any:
    """A `HfArgumentParser` over `dataclass_types` that reports errors in one line with exit status 2."""
    from transformers.hf_argparser import HfArgumentParser

    class OneLineParser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            exit_with(EXIT_BAD_INPUT, f"error: {one_line(message)}; see --help")

    return OneLineParser(list(dataclass_types), description=description, allow_abbrev=False)


def parse(
    *dataclass_types: type, description: str, arguments: Sequence[str] | None = None, unused: str = ""
) -> tuple[Any, ...]:
    """Parse the command line into one instance of each dataclass; `unused` flags (of `utils.unused_flags`) are dropped.

    Unknown flags, missing flags and values of the wrong type are reported in one line with exit status 2.
    """
    parser = make_parser(dataclass_types, description)
    arguments = without(sys.argv[1:] if arguments is None else arguments, unused)
    try:
        *instances, unknown = parser.parse_args_into_dataclasses(
            args=arguments, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, OverflowError, ImportError) as error:  # from transformers' own dataclass
        parser.error(str(error))
    if unknown:
        parser.error(f"unknown argument {unknown[0]}")
    return tuple(instances)


def without(words: Sequence[str], unused: str) -> list[str]:
    """The command line `words` without the flags in `unused` and their values; says in one line which were dropped."""
    takes_value = {f"--{name.rstrip('*')}": not name.endswith("*") for name in unused.split()}
    kept, dropped, left = [], [], list(words)
    while left:
        word = left.pop(0)
        name, given, _ = word.partition("=")
        if name not in takes_value:
            kept.append(word)
            continue
        dropped.append(name)
        if takes_value[name] and not given and left and not left[0].startswith("--"):
            left.pop(0)
    if dropped:
        say(f"{' '.join(dropped)}: without a use here, ignored")
    return kept


def note_unused(names: Sequence[str], why: str) -> None:
    """Print a line for each flag among `names` on the command line: it is ignored, and why."""
    for name in names:
        if any(word.partition("=")[0] == f"--{name}" for word in sys.argv[1:]):
            say(f"--{name}: ignored {why}")


def say(text: str) -> None:
    """Print a line on the main process only."""
    if process_number() == 0:
        print(text, flush=True)


def command(main: Callable[[], None], *, training: bool = False) -> Callable[[], None]:
    """Decorator of an entry script's `main`: reports user errors in one line on stderr, with exit status 2.

    Handles `InputError`, operating-system errors, a full GPU and Ctrl-C; any other exception keeps its traceback, and
    MLPMEM_TRACEBACK=1 keeps that of all. Processes that a launcher started together form a process group; in `training`
    they exchange tensors and wait for each other for torch's default time, else for days on gloo.
    """

    @functools.wraps(main)
    def run() -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="replace")  # a terminal without Unicode
        try:
            if started_together():
                init_group(training)
            main()
            destroy_group()
            if main.__module__ == "__main__":
                gc.freeze()  # saves Python's exit a second of looking through all modules' objects
        except KeyboardInterrupt:
            exit_with(EXIT_INTERRUPTED, "interrupted; run the same command again to continue")
        except (InputError, OSError, RuntimeError) as error:
            full = type(error).__name__ == "OutOfMemoryError"  # torch's, of a GPU
            foreign = isinstance(error, BrokenPipeError) or (isinstance(error, RuntimeError) and not full)
            if foreign or os.environ.get("MLPMEM_TRACEBACK"):
                raise
            text = describe_os_error(error) if isinstance(error, OSError) and error.errno else error
            exit_with(
                EXIT_BAD_INPUT, f"error: {one_line(error, 200)}; {SMALLER}" if full else f"error: {one_line(text)}"
            )

    return run


def describe_os_error(error: OSError) -> str:
    """A line for an operating-system failure: the path, what went wrong, what to do."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    advice = "; free some space and run the same command again, finished parts are kept" if full else ""
    return f"{error.filename or 'a file'}: {error.strerror or error}{advice}"


def exit_with(status: int, line: str) -> NoReturn:
    """Exit with `status` after `line` on stderr. A process of a distributed run does not wait for the others."""
    rank = process_number()
    print(f"[rank {rank}] {line}" if rank else line, file=sys.stderr, flush=True)
    sys.stdout.flush()
    if started_together():
        os._exit(status)
    sys.exit(status)


def started_together() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def process_number() -> int:
    """This process's rank, 0 for the main one."""
    return int(os.environ.get("RANK") or 0)


def longest_wait(training: bool) -> timedelta | None:
    """How long a process waits for the others, which outside training may work for days on their parts; None: torch's
    default. MLPMEM_TIMEOUT_MINUTES sets another time. Raises InputError."""
    minutes = os.environ.get(TIMEOUT)
    if minutes is None:
        return None if training else timedelta(days=7)
    if not minutes.isdecimal() or not 0 < int(minutes) < 10**9:
        raise InputError(f"{TIMEOUT} {minutes}: expected a number of minutes")
    return timedelta(minutes=int(minutes))


def init_group(training: bool) -> Any:
    """Connect the processes of this run; returns accelerate's `PartialState`.

    Training on GPUs uses NCCL. Elsewhere processes exchange a few numbers, over gloo: its connections, unlike NCCL's, end
    with a process that dies, however long a wait may take.
    """
    import torch
    from accelerate import PartialState

    on_cpu = not torch.cuda.is_available()
    if on_cpu:  # else accelerate takes each process for a run of its own
        os.environ["ACCELERATE_USE_CPU"] = "true"
    backend = {} if training else {"backend": "gloo"}
    return PartialState(cpu=on_cpu, timeout=longest_wait(training), **backend)


def destroy_group() -> None:
    """Close the process group: its threads may abort a process that ends without it."""
    if started_together():
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
