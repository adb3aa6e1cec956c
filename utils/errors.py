"""How a command ends when its input is bad: one clear line, exit status 2, no traceback. And checks of plain values.

Code below the entry scripts raises `InputError` with a line that names the file, flag or value, what was expected and
what to do; `command` prints it.
"""

from __future__ import annotations

import errno
import functools
import gc
import math
import os
import sys
from collections.abc import Callable, Sequence

from utils import distributed

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
    """

    @functools.wraps(main)
    def run() -> None:
        try:
            if distributed.started_together():
                distributed.join()
            else:
                distributed.note_lone_process()
            main()
            distributed.part()
            if main.__module__ == "__main__":
                gc.freeze()  # else Python's exit looks through all modules' objects once more, for a second
        except KeyboardInterrupt:
            leave(EXIT_INTERRUPTED, "interrupted; run the same command again to continue")
        except (InputError, OSError) as error:
            if os.environ.get("MLPMEM_TRACEBACK") or isinstance(error, BrokenPipeError):
                raise
            distributed.let_others_speak()
            text = describe_os_error(error) if isinstance(error, OSError) and error.errno else error
            leave(EXIT_BAD_INPUT, f"error: {one_line(text)}")
        except RuntimeError as error:
            if os.environ.get("MLPMEM_TRACEBACK") or not distributed.is_lost_connection(error):
                raise
            distributed.let_others_speak(lost=True)
            line = "another process of this run has ended, its own line says why"
            leave(EXIT_LOST_PROCESS, f"process {distributed.process_number()} ends: {line}")

    return run


def leave(status: int, line: str) -> None:
    """Exit with `status` after `line` on stderr; a process of a distributed run does not wait for the others."""
    sys.stdout.flush()
    print(line, file=sys.stderr, flush=True)
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
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


def check_grid(lmbda: Sequence[float], knn_temp: Sequence[float]) -> None:
    """Check the values of `--lmbda` (each in [0, 1]) and `--knn_temp` (each above 0). Raises InputError."""
    for name, values, check in (("--lmbda", lmbda, check_fraction), ("--knn_temp", knn_temp, check_positive)):
        if not values:
            raise InputError(f"{name}: expected at least one value")
        for value in values:
            check(name, value)
