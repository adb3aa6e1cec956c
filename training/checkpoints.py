"""The checkpoint folders of a training run: their names, which is the latest, and what a full disk says.

A complete checkpoint is a folder `epoch_N` or `step_N`; the newest holds `state/`, from which a run continues. Knows
nothing of what is trained.
"""

from __future__ import annotations

import contextlib
import errno
import math
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from utils.errors import InputError
from utils.files import read_json, sync_file, sync_folder

STATE_FOLDER = "state"


def checkpoint_name(step: int, steps_per_epoch: int) -> str:
    return f"epoch_{math.ceil(step / steps_per_epoch)}"


def checkpoints(output: Path) -> list[Path]:
    """Complete checkpoint folders of a run, oldest first."""
    found = []
    for path in output.glob("*_*"):
        kind, _, number = path.name.partition("_")
        if path.is_dir() and kind in ("epoch", "step") and number.isdigit():
            found.append(path)
    return sorted(found, key=lambda path: path.stat().st_mtime)


def latest_checkpoint(output: Path) -> Path | None:
    """The checkpoint with the highest step that can be resumed from."""
    best, best_step = None, -1
    for path in checkpoints(output):
        if trainer_state(path).exists():
            step = read_state(path)["step"]
            if step > best_step:
                best, best_step = path, step
    return best


def names_checkpoint(wanted: str | None) -> bool:
    """Whether `--resume_from_checkpoint` names a folder; else it asks for the latest, as its absence does."""
    return wanted not in (None, "", "latest", "auto", "True", "true")


def trainer_state(folder: Path) -> Path:
    """Where a checkpoint keeps the run's step, settings and log."""
    return folder / STATE_FOLDER / "trainer_state.json"


def read_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of its run, its fields checked: `step`, `steps_per_epoch`, `training_seconds`, `log`.

    Raises InputError for a damaged one.
    """
    source = trainer_state(folder)
    saved = read_json(source)
    expected = {"step": int, "steps_per_epoch": int, "training_seconds": (int, float), "log": list}
    for name, kind in expected.items():
        value = saved.get(name) if isinstance(saved, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool) or (name != "log" and not 0 <= value < 1 << 53):
            raise InputError(
                f"{source}: {name!r} is missing or of the wrong kind; the checkpoint is damaged: delete it"
            )
    if not all(isinstance(entry, dict) for entry in saved["log"]):
        raise InputError(f"{source}: 'log' is of the wrong kind; the checkpoint is damaged: delete it")
    return saved


def read_record(path: Path) -> dict[str, Any]:
    """The record of a training run, or of a checkpoint; {} where there is none. Raises InputError for a damaged one."""
    record = read_json(path) if path.exists() else {}
    parts = [record.get(name, {}) for name in ("settings", "precision")] if isinstance(record, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        raise InputError(f"{path}: is not the record of a training run; choose another folder, or delete it")
    return record


def sync_tree(folder: Path) -> None:
    """Make all files and names in `folder` durable."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync_file(path)
        else:
            sync_folder(path)


class Publisher:
    """Gives written checkpoints their names once they are on the disk, while training goes on.

    A checkpoint that was not yet named when the process ended is as if it had not been written; those before it, which
    are only deleted afterwards, are still there.
    """

    def __init__(self, needed: int) -> None:
        """`needed`: bytes of a checkpoint, for what is told of a full disk."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._needed = needed
        self._waiting: tuple[Path, Path, Future[None]] | None = None

    def start(self, temporary: Path, final: Path) -> None:
        """Sync `temporary`, rename it to `final`, delete what only older checkpoints were resumed from."""
        self.wait()
        self._waiting = temporary, final, self._pool.submit(_publish, temporary, final)

    def wait(self) -> None:
        """Wait for the checkpoint that was started. Raises what went wrong with it, InputError for a full disk."""
        if self._waiting is None:
            return
        temporary, final, future = self._waiting
        self._waiting = None
        try:
            future.result()
        except Exception as error:
            raise (full_disk(error, temporary, final.name, self._needed) or error) from None

    def close(self) -> None:
        """Wait, whatever became of the checkpoint."""
        with contextlib.suppress(Exception):
            self.wait()
        self._pool.shutdown()


def _publish(temporary: Path, final: Path) -> None:
    sync_tree(temporary)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    sync_folder(final.parent)
    for older in checkpoints(final.parent):
        if older != final:
            shutil.rmtree(older if older.name.startswith("step_") else older / STATE_FOLDER, ignore_errors=True)


def full_disk(error: Exception, temporary: Path, name: str, needed: int) -> InputError | None:
    """What to tell of an `error` while checkpoint `name` was written to `temporary`; None where the disk had space.

    Each library that writes has an error of its own for a full disk. What was written is deleted.
    """
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    output = temporary.parent
    written = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
    if not full and shutil.disk_usage(output).free + written >= needed:
        return None
    shutil.rmtree(temporary, ignore_errors=True)
    free = shutil.disk_usage(output).free
    return InputError(
        f"{output}: no space left on the device for checkpoint {name}, which needs about {needed / 1e6:.1f} MB "
        f"({free / 1e6:.1f} MB are free); the checkpoints before it are kept: free some space and run the same command "
        "again"
    )
