"""A resumable output: a folder of parts, written by one process or many, that ends with a complete manifest.

Knows names, locks, checksums and the order of steps that a kill at any moment cannot spoil; knows nothing of what the
rows mean. Each part is written under a temporary name, synced, renamed, and only then recorded; what is not recorded
is written again.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import sys
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from knn_utils.manifest import (
    FORMAT,
    FORMAT_VERSION,
    KINDS,
    MANIFEST_NAME,
    check_record,
    is_own_file,
    part_name,
    plan_of,
    read_bounded_json,
    read_manifest,
    record_name,
)
from knn_utils.part_writer import PartWriter
from utils.errors import InputError
from utils.files import (
    TEMPORARY_PREFIX,
    FolderLock,
    atomic_file,
    ensure_folder,
    remove_temporary,
    sha256_file,
    sync_folder,
    write_json,
)
from utils.units import size_text

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_LOCK_NAME = ".lock"

# A forked process (a data loader's worker, say) inherits the lock's file and would keep the folder locked after its
# parent was killed. Closing it there leaves the parent's lock as it is.
_held_locks: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _let_go_in_child() -> None:
    for lock in list(_held_locks):
        lock.release()


os.register_at_fork(after_in_child=_let_go_in_child)


class PartedOutput:
    """A datastore or kNN targets being written to the folder `path` in planned parts, by `num_processes` processes.

    Every process makes one with the same arguments (a collective call: it waits for all), writes the parts of `mine()`
    with `write(number)`, and calls `finish()`. After any interruption the same call continues with the parts that are
    not there yet, whatever the number of processes.

    Arguments: `settings` (JSON; what made the rows, compared on resume), `info` (JSON; anything else worth keeping),
    `part_rows` (rows of each part, above 0, independent of the number of processes), `schema` (of the batches).
    `overwrite`: an output that is complete, or was made with other settings, is deleted and made anew; one that was
    interrupted with the same settings is continued. `extend`: `part_rows` may begin with the parts of the output that
    is there, and the settings named in `growing` may differ; the further parts are added and the manifest's history
    gets {"rows_before", "rows_after", "settings_before", "info"}.

    Raises InputError: the folder holds something else or was made with other settings or another plan, another run is
    writing there, it cannot be written, the disk is full.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        kind: str,
        settings: dict,
        part_rows: Sequence[int],
        schema: pa.Schema,
        info: dict | None = None,
        overwrite: bool = False,
        extend: bool = False,
        growing: Sequence[str] = ("rows",),
        process_index: int = 0,
        num_processes: int = 1,
        wait_for_everyone: Callable[[], None] = lambda: None,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r}, expected one of {', '.join(KINDS)}")
        self.path = Path(path)
        self.kind = kind
        self.part_rows = [int(rows) for rows in part_rows]
        if any(rows < 1 for rows in self.part_rows):
            raise ValueError("every planned part needs at least one row")
        self._settings = settings
        self._info = info or {}
        self._schema = schema
        self._columns = [f"{field.name}: {field.type}" for field in schema]
        self._process_index = process_index
        self._num_processes = num_processes
        self._wait = wait_for_everyone
        self._is_main = process_index == 0
        self._lock: FolderLock | None = None
        try:
            if self._is_main:
                self._prepare(overwrite, extend, tuple(growing))
            self._wait()
            self._read_plan()
            self._check_finished()
            self._wait()
            pending = self._missing()
            self.complete = self._was_complete and not pending
            if self._is_main and self._was_complete and pending:
                self._write_manifest(complete=False)
            # Nobody writes before everybody has made the same list.
            self._wait()
        except BaseException:
            self.close()
            raise
        self._mine = pending[process_index::num_processes]
        if self.complete:
            self.close()

    # What the callers do, in order

    def mine(self) -> list[int]:
        """Numbers of the parts that this process still has to write."""
        return list(self._mine)

    def row_start(self, number: int) -> int:
        """Number of the first row of a part."""
        return sum(self.part_rows[:number])

    @contextlib.contextmanager
    def write(self, number: int) -> Iterator[PartWriter]:
        """Write part `number`, one of `mine()`. On success it is durable and recorded, on failure nothing is left.

        Raises InputError when the rows written are not those planned, and when the disk is full.
        """
        if number not in self._mine:
            raise ValueError(f"part {number} is not one that this process has to write")
        path = self.path / part_name(number)
        writer: PartWriter | None = None
        try:
            with atomic_file(path) as temporary:
                writer = PartWriter(temporary, self._schema)
                with writer.ending():
                    yield writer
                if writer.rows != self.part_rows[number]:
                    raise InputError(f"{path}: {writer.rows} rows came, the plan has {self.part_rows[number]}")
                self._require_own_run()
            self._require_own_run()
            write_json(self.path / record_name(number), writer.record(path.name))
        except OSError as error:
            if error.errno not in _FULL_DISK:
                raise
            raise self._no_space(writer) from None
        self._mine.remove(number)

    def finish(self, info: dict | None = None) -> dict:
        """Wait for all, complete the manifest, release the lock; returns the manifest. `info` is added to the first.

        A collective call. Raises InputError when a part is missing.
        """
        self._wait()
        if self._is_main and not self.complete:
            missing = self._missing()
            if missing:
                raise InputError(
                    f"{self.path}: part {missing[0]} of {len(self.part_rows)} was not written; run the same command again"
                )
            self._info |= info or {}
            self._records = [self._record(number) for number in range(len(self.part_rows))]
            self._write_manifest(complete=True)
            self._remove_records()
        self.close()
        self._wait()
        self.complete = True
        return read_manifest(self.path, self.kind)

    def close(self) -> None:
        """Release the lock without finishing; what is written stays."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                (self.path / _LOCK_NAME).write_text("")
            self._lock.release()
            self._lock = None

    # Preparation, by the main process under the lock

    def _prepare(self, overwrite: bool, extend: bool, growing: tuple[str, ...]) -> None:
        if self.path.is_file():
            if not overwrite:
                raise InputError(f"{self.path}: is a file; choose another path, or --overwrite to replace it")
            self.path.unlink()
        mark = ensure_folder(self.path) / _LOCK_NAME
        if mark.is_symlink():
            raise InputError(f"{mark}: is a link, which no run of ours leaves; choose another folder")
        self._lock = FolderLock(self.path).acquire()
        _held_locks.add(self._lock)
        manifest, difference, grows = None, "", False
        if (self.path / MANIFEST_NAME).exists():
            manifest = read_manifest(self.path, self.kind)
            there = plan_of(manifest)
            grows = extend and len(there) < len(self.part_rows) and there == self.part_rows[: len(there)]
            difference = self._difference(manifest, there, growing if grows else (), grows)
            if difference and not overwrite:
                raise InputError(
                    f"{self.path}: was made otherwise: {difference}; "
                    "choose another folder, or --overwrite to make it anew"
                )
        else:
            self._require_empty(overwrite)
        # Only now is the folder known to be ours.
        remove_temporary(self.path)
        # By this mark a process that outlived a killed run notices that the folder is no longer its own.
        mark.write_text(uuid.uuid4().hex)
        if manifest is None or difference or (overwrite and manifest["complete"] and not grows):
            self._start_anew()
        elif grows:
            self._grow(manifest)
        elif manifest["complete"]:
            self._remove_records()

    def _require_empty(self, overwrite: bool) -> None:
        """Raise InputError unless the folder without a manifest is ours to fill."""
        found = sorted(item.name for item in self.path.iterdir() if not item.name.startswith("."))
        foreign = [name for name in found if not is_own_file(name)]
        if foreign:
            shown = ", ".join(foreign[:3])
            raise InputError(f"{self.path}: holds other files ({shown}); choose an empty or a new folder")
        if found and not overwrite:
            raise InputError(f"{self.path}: holds parts without a manifest; choose another folder, or --overwrite")

    def _start_anew(self) -> None:
        # The manifest first and durably: at no moment does it describe parts of another plan.
        (self.path / MANIFEST_NAME).unlink(missing_ok=True)
        sync_folder(self.path)
        for item in list(self.path.iterdir()):
            if is_own_file(item.name):
                item.unlink()
        sync_folder(self.path)
        self._records, self._history = [], []
        self._write_manifest(complete=False)

    def _grow(self, manifest: dict) -> None:
        """Take the longer plan over into the manifest, with a line of history."""
        changed = {
            key: value
            for key, value in manifest["settings"].items()
            if _plain(value) != _plain(self._settings.get(key))
        }
        step = {
            "rows_before": manifest["rows"],
            "rows_after": sum(self.part_rows),
            "settings_before": changed,
            "info": self._info,
        }
        self._records = manifest["parts"]
        self._history = [*manifest["history"], step]
        self._info = manifest["info"] | self._info
        self._write_manifest(complete=False)

    def _difference(self, manifest: dict, plan: list[int], ignored: tuple[str, ...], grows: bool) -> str:
        """What changed since the folder was begun, or ''."""
        changes = []
        there, here = manifest["settings"], self._settings
        for key in sorted(there.keys() | here.keys()):
            if key not in ignored and _plain(there.get(key)) != _plain(here.get(key)):
                changes.append(f"{key} {_shown(there.get(key))} there, {_shown(here.get(key))} now")
        if manifest["columns"] != self._columns:
            changes.append(f"columns {', '.join(map(str, manifest['columns']))} there, {', '.join(self._columns)} now")
        if not grows and plan != self.part_rows:
            now = f"{sum(self.part_rows)} rows in {len(self.part_rows)} parts now"
            changes.append(f"{sum(plan)} rows in {len(plan)} parts there, {now}")
        return "; ".join(changes)

    # State on disk, which all processes read

    def _read_plan(self) -> None:
        manifest = read_manifest(self.path, self.kind)
        if plan_of(manifest) != self.part_rows:
            raise InputError(f"{self.path}: process {self._process_index} planned other parts than process 0")
        self._was_complete = manifest["complete"]
        self._records = manifest["parts"]
        self._history = manifest["history"]
        self._info = manifest["info"] | self._info
        self._run = self._run_mark()

    def _run_mark(self) -> str:
        try:
            return (self.path / _LOCK_NAME).read_text()
        except OSError:
            return ""

    def _require_own_run(self) -> None:
        if not self._is_main and self._run_mark() != self._run:
            raise InputError(f"{self.path}: another run took this folder over; this process ends")

    def _record(self, number: int) -> dict | None:
        """The record of a finished part: its own file's, which is the newer one, or the manifest's."""
        path = self.path / record_name(number)
        if path.is_file():
            # A damaged record counts as none: the part is written again.
            with contextlib.suppress(InputError):
                record = check_record(read_bounded_json(path), str(path))
                if record["file"] == part_name(number) and record["rows"] == self.part_rows[number]:
                    return record
        return self._records[number] if number < len(self._records) else None

    def _is_there(self, number: int) -> bool:
        record = self._record(number)
        path = self.path / part_name(number)
        return record is not None and path.is_file() and path.stat().st_size == record["bytes"]

    def _missing(self) -> list[int]:
        return [number for number in range(len(self.part_rows)) if not self._is_there(number)]

    def _check_finished(self) -> None:
        """Compare this process's share of the finished parts with their checksums; bad ones are dropped."""
        for number in range(self._process_index, len(self.part_rows), self._num_processes):
            record = self._record(number)
            path = self.path / part_name(number)
            if record is None or (self._is_there(number) and sha256_file(path) == record["sha256"]):
                continue
            print(f"{path}: does not match its checksum, it is written again", file=sys.stderr, flush=True)
            path.unlink(missing_ok=True)
            (self.path / record_name(number)).unlink(missing_ok=True)

    def _write_manifest(self, complete: bool) -> None:
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "complete": complete,
            "rows": sum(self.part_rows),
            "columns": self._columns,
            "settings": self._settings,
            "info": self._info,
            "history": self._history,
        }
        if not complete:
            manifest["part_rows"] = self.part_rows
        try:
            write_json(self.path / MANIFEST_NAME, manifest | {"parts": self._records})
        except OSError as error:
            if error.errno not in _FULL_DISK:
                raise
            raise self._no_space(None) from None

    def _remove_records(self) -> None:
        for number in range(len(self.part_rows)):
            (self.path / record_name(number)).unlink(missing_ok=True)

    def _no_space(self, writer: PartWriter | None) -> InputError:
        missing = self._missing()
        rows = sum(self.part_rows[number] for number in missing)
        need = ""
        if writer is not None and writer.rows:
            free = size_text(shutil.disk_usage(self.path).free)
            need = f", which need about {size_text(rows * writer.row_bytes)} ({free} are free)"
        return InputError(
            f"{self.path}: no space left on the device; still to be written are {len(missing)} of "
            f"{len(self.part_rows)} parts, {rows} rows{need}; finished parts are kept: "
            "free some space and run the same command again"
        )


def _plain(value: Any) -> Any:
    """A value as JSON gives it back: tuples become lists."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _shown(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 80 else text[:79] + "…"


def write_single_file(path: str | os.PathLike, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
    """Write all batches as one Arrow stream file (`--single_file`), atomically; returns the number of rows.

    Raises InputError when `path` is a folder or cannot be written, and when the disk is full.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; choose another path for the single file")
    ensure_folder(path.parent)
    _remove_orphans(path)
    writer: PartWriter | None = None
    try:
        with atomic_file(path) as temporary:
            writer = PartWriter(temporary, schema)
            with writer.ending():
                for batch in batches:
                    writer.write(batch)
    except OSError as error:
        if error.errno not in _FULL_DISK:
            raise
        done = f" after {writer.rows} rows, {size_text(writer.rows * writer.row_bytes)}" if writer else ""
        raise InputError(
            f"{path}: no space left on the device{done}; free some space and run the command again"
        ) from None
    return writer.rows


def _remove_orphans(path: Path) -> None:
    """Delete what killed processes left of `path` under temporary names; those of living ones stay."""
    for item in path.parent.glob(f"{TEMPORARY_PREFIX}*-{glob.escape(path.name)}"):
        number = item.name[len(TEMPORARY_PREFIX) :].split("-", 1)[0]
        if number.isdecimal() and item.name == f"{TEMPORARY_PREFIX}{number}-{path.name}":
            try:
                os.kill(int(number), 0)
            except ProcessLookupError:
                item.unlink(missing_ok=True)
            except (PermissionError, OverflowError):
                continue
