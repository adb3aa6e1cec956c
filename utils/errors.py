"""How a command ends when its input is bad: one clear line, exit status 2, no traceback.

Knows nothing of models or files. Code below the entry scripts raises `InputError` with a line
that names the file, flag or value, what was expected and what to do; `command` prints it.
"""

from __future__ import annotations

import atexit
import errno
import functools
import gc
import math
import os
import sys
import threading
from collections.abc import Callable

EXIT_BAD_INPUT = 2
EXIT_LOST_PROCESS = 1
EXIT_INTERRUPTED = 130


class InputError(ValueError):
    """Bad input, told in one line: what was found, what was expected, what to do."""


def one_line(text: object, limit: int = 600) -> str:
    """Fold any text to a single line of at most `limit` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def describe_os_error(error: OSError) -> str:
    """A line for an operating-system failure: the path, what went wrong, what to do."""
    path = error.filename or "a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{path}: no space left on the device; free some space and run the same command again, finished parts are kept"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{path}: cannot be read or written ({error.strerror}); check the permissions or choose another folder"
    return f"{path}: {error.strerror or error}"


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Decorator of an entry script's `main`: turns bad input into one line on stderr and exit status 2.

    Handles `InputError`, operating-system errors on files, and Ctrl-C. Any other exception is a
    fault of ours and keeps its traceback. `MLPMEM_TRACEBACK=1` keeps the traceback of all.
    Where a launcher started several processes they are connected first, and one that fails ends them all.
    A command that is the process's main program starts and ends it quickly (`_hurry`, `_end`).
    """
    is_program = main.__module__ == "__main__"

    @functools.wraps(main)
    def run() -> None:
        several = int(os.environ.get("WORLD_SIZE") or 1) > 1
        if is_program:
            _hurry()
        try:
            if several:
                from utils.distributed import join

                join()
            elif "MASTER_ADDR" in os.environ:
                from utils.distributed import start_those_asked_for

                start_those_asked_for()
            main()
        except (InputError, OSError) as error:
            if os.environ.get("MLPMEM_TRACEBACK") or isinstance(error, BrokenPipeError):
                raise
            text = describe_os_error(error) if isinstance(error, OSError) and error.errno else error
            if several:
                from utils.distributed import let_main_speak

                let_main_speak()
            sys.stdout.flush()
            print(f"error: {one_line(text)}", file=sys.stderr, flush=True)
            leave(EXIT_BAD_INPUT)
        except KeyboardInterrupt:
            print("interrupted; run the same command again to continue", file=sys.stderr, flush=True)
            leave(EXIT_INTERRUPTED)
        except RuntimeError as error:
            if not several or os.environ.get("MLPMEM_TRACEBACK"):
                raise
            from utils.distributed import is_lost_connection, report_lost_connection

            if not is_lost_connection(error):
                raise
            print(report_lost_connection(), file=sys.stderr, flush=True)
            leave(EXIT_LOST_PROCESS)
        if is_program and not several:
            _end()

    return run


def _hurry() -> None:
    """Look for unreachable objects less often: importing the libraries makes millions that stay."""
    gc.set_threshold(50_000, 20, 20)


def _end() -> None:
    """End this process, whose work is done, without taking thousands of modules apart (more than a second)."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def leave(status: int) -> None:
    """Exit with `status`; a process of a distributed run does not wait for the others at exit."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def check_fraction(flag: str, value: float) -> float:
    """Return `value` if it lies in [0, 1]; raises InputError naming `flag` otherwise."""
    if not (math.isfinite(value) and 0.0 <= value <= 1.0):
        raise InputError(f"{flag} {value:g}: expected a number from 0 to 1")
    return value


def check_positive(flag: str, value: float) -> float:
    """Return `value` if it is finite and above 0; raises InputError naming `flag` otherwise."""
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{flag} {value:g}: expected a number above 0")
    return value
