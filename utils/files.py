"""Files and folders that are either whole or not there: temporary name, sync, rename. `atomic` is the only writer."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.errors import InputError

TEMPORARY_PREFIX = ".tmp-"
UMASK = os.umask(0)
os.umask(UMASK)
# How safetensors, `datasets` and torch.save say that the disk or a quota is full.
FULL = os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "Not enough disk space", "StreamWriter", "unexpected pos"
NOT_FINITE = "nan", "inf", "-inf"


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`, where the block makes a file or a folder.

    On success it is synced and renamed to `path`, replacing what was there. On failure it is removed and `path` is
    unchanged. A full disk raises `OSError` as in `naming_full_disk`.
    """
    path = Path(path)
    temporary, old = (path.with_name(f"{TEMPORARY_PREFIX}{mark}{path.name}") for mark in ("", "old-"))
    remove(temporary)
    try:
        with naming_full_disk(path):
            yield temporary
            sync(temporary)
            if temporary.is_dir() and path.exists():
                remove(old)
                os.replace(path, old)
            os.replace(temporary, path)
            sync(path.parent, deep=False)
            remove(old)
    except BaseException:
        remove(temporary)
        raise


@contextlib.contextmanager
def naming_full_disk(path: str | os.PathLike) -> Iterator[None]:
    """Raise `OSError` with `path` as its file name where a library finds the disk full: each has its own error for it."""
    try:
        yield
    except Exception as error:
        text, number = f"{error!r} {error.__cause__!r}", getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or any(words in text for words in FULL):
            raise OSError(errno.ENOSPC, FULL[0], str(path)) from error
        raise


def sync(path: Path, *, deep: bool = True) -> None:
    """Make a file, or a folder's names and with `deep` its files, survive a power cut. Files get the umask's mode."""
    for item in path.iterdir() if deep and path.is_dir() else ():
        sync(item)
    if path.is_file():
        path.chmod(0o666 & ~UMASK)  # safetensors writes 0600
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def ensure_folder(folder: str | os.PathLike) -> Path:
    """Create `folder` and its parents. Raises InputError where it cannot be created or written."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be created ({error.strerror}); choose another folder") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: cannot be written; check its permissions or choose another folder")
    return folder


def lock_folder(folder: Path, name: str = ".lock") -> Any:
    """An open file that holds an exclusive lock until it is closed or the process ends.

    Raises InputError where another process holds the lock.
    """
    file = open(folder / name, "a+")  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not inherited by forked workers
    except OSError:
        file.close()
        raise InputError(f"{folder}: another run is writing here; wait for it, or choose another folder") from None
    return file


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON, atomically; numbers that are not finite as in `finite`."""
    with atomic(path) as temporary:
        text = json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """`value` with NaN and infinity, which JSON has no numbers for, as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, (list, tuple)) else value


def read_json(path: str | os.PathLike) -> Any:
    """Read JSON; entries that `finite` made strings are numbers again. Raises InputError where there is no file or no JSON."""

    def numbers(found: dict[str, Any]) -> dict[str, Any]:
        return {name: float(each) if each in NOT_FINITE else each for name, each in found.items()}

    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), object_hook=numbers)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except ValueError as error:
        raise InputError(f"{path}: is not readable JSON ({error}); make the file again") from None
