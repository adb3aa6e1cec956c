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


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`, where the block makes a file or a folder.

    On success it is synced and renamed to `path`, replacing what was there. On failure it is removed and `path` is
    unchanged. A full disk raises the `OSError` with `path` as its file name.
    """
    path = Path(path)
    temporary, old = (path.with_name(f"{TEMPORARY_PREFIX}{mark}{path.name}") for mark in ("", "old-"))
    remove(temporary)
    try:
        yield temporary
        allow_reading(temporary)
        sync(temporary)
        if temporary.is_dir() and path.exists():
            remove(old)
            os.replace(path, old)
        os.replace(temporary, path)
        sync(path.parent, deep=False)
        remove(old)
    except BaseException as error:
        remove(temporary)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            error.filename = str(path)
        raise


def allow_reading(path: Path) -> None:
    """Give a file, or the files of a folder, the mode that the umask asks for: safetensors writes 0600."""
    mask = os.umask(0)
    os.umask(mask)
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            file.chmod(0o666 & ~mask)


def sync(path: Path, *, deep: bool = True) -> None:
    """Make a file, or a folder's names and with `deep` its files, survive a power cut."""
    for item in path.iterdir() if deep and path.is_dir() else ():
        sync(item)
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
    """Write `value` as indented JSON, atomically. Numbers that are not finite are written as strings."""
    with atomic(path) as temporary:
        text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, (list, tuple)) else value


def read_json(path: str | os.PathLike) -> Any:
    """Read JSON. Raises InputError where the file is missing or is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except ValueError as error:
        raise InputError(f"{path}: is not readable JSON ({error}); make the file again") from None
