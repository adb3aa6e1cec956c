"""To be deleted: what callers still use of the former utils/files.py. Files that are either whole or not there: temporary name, sync, rename. Locks that die with their owner. And what made
a file, compared with what is asked for now: the one place that refuses files of other settings."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.errors import InputError, one_line

TEMPORARY_PREFIX = ".tmp-"
# What files are made from: in words, and the flag that says what is at hand.
MADE_FROM = {
    "model": ("a base with the checksum", "that of --model_name_or_path"),
    "dataset": ("windows with the checksum", "that of --dataset_name"),
    "layer_position": ("hidden states of block", "--layer_position"),
}


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable (a rename survives a power cut only after this)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the bytes of `path` durable."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_tree(folder: Path) -> None:
    """Make all files and names in `folder` durable."""
    for root, _, names in os.walk(folder):
        for name in names:
            sync_file(Path(root) / name)
        sync_folder(Path(root))


def ensure_folder(folder: str | os.PathLike) -> Path:
    """Create `folder` (and parents) and check that it can be written. Raises InputError otherwise."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{folder}: is or lies under a file, expected a folder; choose another path") from None
    except OSError as error:
        raise InputError(f"{folder}: cannot be created ({error.strerror}); choose another folder") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: cannot be written; check its permissions or choose another folder")
    return folder


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed to `path`, on failure removed."""
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{path.name}")
    try:
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_temporary(folder: str | os.PathLike) -> None:
    """Delete what an interrupted run left under temporary names in `folder`. Call it only under the folder's lock."""
    for path in Path(folder).glob(f"{TEMPORARY_PREFIX}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike) -> Any:
    """Read JSON. Raises InputError when the file is missing or is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise InputError(f"{path}: is not readable JSON ({error}); make the file again") from None


def sha256_file(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class FolderLock:
    """An exclusive lock on a folder for the life of this process; the kernel drops it when the process dies.

    `acquire` raises InputError when another process holds it.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.path = Path(folder) / ".lock"
        self._file: Any = None

    def acquire(self) -> FolderLock:
        self._file = open(self.path, "a+")  # noqa: SIM115 (held open as long as the lock)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            self._file = None
            told = "another run is writing here; wait for it to end or choose another folder"
            raise InputError(f"{self.path.parent}: {told}") from None
        return self

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> FolderLock:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def changes(before: Mapping[str, Any], now: Mapping[str, Any], ignored: Iterable[str] = ()) -> str:
    """What differs between two records of settings, in words; '' where nothing does.

    Values are compared as JSON holds them. Settings inside a setting are compared by themselves (`data.rows`).
    """
    there, here = (_flat(json.loads(json.dumps(each, default=str))) for each in (before, now))
    skipped = set(ignored)
    return "; ".join(
        f"{name} {_shown(there.get(name))} there, {_shown(here.get(name))} now"
        for name in sorted(there.keys() | here.keys())
        if name.split(".")[0] not in skipped and there.get(name) != here.get(name)
    )


def require_same(
    holder: object, before: Mapping[str, Any], now: Mapping[str, Any], remedy: str, ignored: Iterable[str] = ()
) -> None:
    """Refuse what was made with other settings. Raises InputError: `holder`, the differences, and the `remedy`."""
    if differing := changes(before, now, ignored):
        raise InputError(f"{holder}: was made with other settings ({one_line(differing, 400)}); {remedy}")


def check_made(path: object, made: Mapping[str, Any], source: object = None, **now: Any) -> None:
    """Refuse the file at `path` that was made (`made`: its recorded settings) from something else than what is at hand.

    `now`: of MADE_FROM, what `source` (else a flag) says. None is not compared: the original's files record nothing.
    Raises InputError.
    """
    for name, here in now.items():
        (what, flag), there = MADE_FROM[name], made.get(name)
        # Quantised weights, whose checksum says so in a word, cannot be compared.
        if None not in (there, here) and there != here and " " not in f"{there}{here}":
            told = f"was made from {what} {there}, but {f'that of {source}' if source else flag} is {here}"
            raise InputError(f"{path}: {told}; name files of the same base, block and windows")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)


def full_disk(error: Exception, output: Path, name: str, needed: int) -> InputError | None:
    """What to tell of an `error` while checkpoint `name` was written; None where the disk has space for it.

    Each library that writes has an error of its own for a full disk.
    """
    free = shutil.disk_usage(output).free
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    if not full and free >= needed:
        return None
    return InputError(
        f"{output}: no space left on the device for checkpoint {name}, which needs about {needed / 1e6:.1f} MB "
        f"({free / 1e6:.1f} MB are free); the checkpoints before it are kept: free some space and run the same command "
        "again"
    )


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it takes the place of `path`, on failure it is removed."""
    path = Path(path)
    temporary, old = (path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}{mark}-{path.name}") for mark in ("", "-old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        sync_tree(temporary)
        shutil.rmtree(old, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
        sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
