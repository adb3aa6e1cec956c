"""A datastore or kNN targets on disk: a folder of parts that ends with a complete manifest, written by one process or many.

A part is written under a temporary name, synced, renamed, and only then recorded. What is not recorded is written again,
so a kill at any moment costs at most the parts under way. The rows come as record batches on NumPy's own memory.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import io
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from knn_utils.datastore import TargetRows, datastore_schema, targets_schema
from knn_utils.manifest import FORMAT, MANIFEST_NAME, part_name, part_sizes, plan_of, read_manifest
from utils.errors import InputError
from utils.files import TEMPORARY_PREFIX, atomic, ensure_folder, read_json, write_json
from utils.legacy import FolderLock, changes, remove_temporary, require_same, sync_folder
from utils.units import size_text

_OWN_NAME = re.compile(r"manifest\.json|part-[0-9]{5,}\.(arrow|json)")
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


def plan_parts(rows: int, rows_per_part: int, existing: Sequence[int] = ()) -> list[int]:
    """Row counts of the parts for `rows` rows: the `existing` ones first, then parts of `rows_per_part`, a short last.

    Raises InputError when there are fewer rows than the existing parts hold.
    """
    left = rows - sum(existing)
    if left < 0:
        raise InputError(f"{rows} rows cannot follow parts that hold {sum(existing)}")
    return [*existing, *(min(rows_per_part, left - start) for start in range(0, left, rows_per_part))]


def _array(values: np.ndarray, dtype: type, what: str, length: int) -> pa.Array:
    """An Arrow array on a NumPy buffer, not copied when it is contiguous."""
    if values.dtype != dtype or values.shape != (length,):
        raise ValueError(f"{what}: {values.dtype} {values.shape}, expected {np.dtype(dtype)} ({length},)")
    return pa.Array.from_buffers(pa.from_numpy_dtype(dtype), length, [None, pa.py_buffer(np.ascontiguousarray(values))])


def datastore_batch(keys: np.ndarray, vals: np.ndarray, logprob: np.ndarray | None = None) -> pa.RecordBatch:
    """A record batch of datastore rows on the arrays' own memory.

    `keys` float16 (n, dim), `vals` int32 (n,), `logprob` float32 (n,) or None. Raises ValueError for other dtypes or
    shapes. The arrays must not change until the batch is written.
    """
    if keys.ndim != 2:
        raise ValueError(f"keys: {keys.shape}, expected (rows, dim)")
    rows, dim = keys.shape
    flat = _array(keys.reshape(-1), np.float16, "keys", rows * dim)
    columns = [pa.FixedSizeListArray.from_arrays(flat, dim), _array(vals, np.int32, "vals", rows)]
    if logprob is not None:
        columns.append(_array(logprob, np.float32, "logprob", rows))
    return pa.RecordBatch.from_arrays(columns, schema=datastore_schema(dim, logprob is not None))


def targets_batch(rows: TargetRows) -> pa.RecordBatch:
    """A record batch of kNN targets on the arrays' own memory.

    Raises ValueError for other dtypes or shapes, and for counts that do not sum to the entries (fewer than 2^31 in a
    batch). The arrays must not change until the batch is written.
    """
    count, entries = len(rows.id_cnt), len(rows.token_id)
    offsets = np.zeros(count + 1, np.int64)
    np.cumsum(rows.id_cnt, out=offsets[1:])
    if offsets[-1] != entries or entries > np.iinfo(np.int32).max:
        raise ValueError(f"id_cnt sums to {offsets[-1]}, there are {entries} entries; expected as many, below 2^31")
    bounds = _array(offsets.astype(np.int32), np.int32, "offsets", count + 1)
    columns = [
        _array(rows.id_cnt, np.int32, "id_cnt", count),
        pa.ListArray.from_arrays(bounds, _array(rows.token_id, np.int32, "token_id", entries)),
        pa.ListArray.from_arrays(bounds, _array(rows.prob, np.float16, "prob", entries)),
        _array(rows.label, np.int32, "label", count),
    ]
    if rows.distance is not None:
        columns.append(_array(rows.distance, np.float32, "distance", count))
    return pa.RecordBatch.from_arrays(columns, schema=targets_schema(rows.distance is not None))


class _HashedFile(io.BufferedWriter):
    """A file being written that keeps the SHA-256 of its bytes."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"), 1 << 20)
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return super().write(data)


class PartWriter:
    """Takes the record batches of one Arrow stream file, in row order. `rows` and `bytes`: of the batches so far."""

    def __init__(self, file: _HashedFile, stream: pa.RecordBatchStreamWriter) -> None:
        self.rows = self.bytes = 0
        self.digest, self._stream = file.digest, stream

    def write(self, batch: pa.RecordBatch) -> None:
        """Append a record batch of the output's schema; its arrays may change afterwards."""
        # Counted before it is written: where the disk is full, this batch says what a row takes.
        self.rows += batch.num_rows
        self.bytes += batch.nbytes
        self._stream.write_batch(batch)


@contextlib.contextmanager
def _stream_file(path: Path, schema: pa.Schema) -> Iterator[PartWriter]:
    """A writer of the file `path`, which after the block is whole and durable; on failure nothing is left."""
    try:
        with atomic(path) as temporary, _HashedFile(temporary) as file, pa.ipc.new_stream(file, schema) as stream:
            yield PartWriter(file, stream)
    except OSError as error:
        error.filename = error.filename or str(path)  # for the line that tells it
        raise


def write_single_file(path: str | os.PathLike, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
    """Write all batches as one Arrow stream file (`--single_file`), atomically; returns the number of rows.

    Raises InputError when `path` is a folder or cannot be written, OSError when the disk is full.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; choose another path for the single file")
    ensure_folder(path.parent)
    _remove_orphans(path)
    with _stream_file(path, schema) as writer:
        for batch in batches:
            writer.write(batch)
    return writer.rows


def _remove_orphans(path: Path) -> None:
    """Delete what killed processes left of `path` under temporary names; those of living ones stay."""
    for item in path.parent.glob(f"{TEMPORARY_PREFIX}*-{glob.escape(path.name)}"):
        owner = item.name.removeprefix(TEMPORARY_PREFIX).partition("-")[0]
        try:
            os.kill(int(owner), 0)
        except ProcessLookupError:
            item.unlink(missing_ok=True)
        except (ValueError, PermissionError):
            continue  # no process number, or another user's living process


class PartedOutput:
    """A datastore or kNN targets being written to the folder `path` in planned parts, by `num_processes` processes.

    Every process makes one with the same arguments (a collective call: it waits for all), writes the parts of `mine()`
    with `write(number)`, and calls `finish()`. After any interruption the same call continues with the parts that are
    not there yet, whatever the number of processes. A start reads names, sizes and the manifest, no rows.

    Args:
        settings: JSON; what made the rows, compared on resume.
        info: JSON; anything else worth keeping.
        part_rows: rows of each part, above 0, whatever the number of processes.
        schema: of the record batches.
        overwrite: an output that is complete, or was made with other settings, is deleted and made anew; one that was
            interrupted with the same settings is continued.
        extend: `part_rows` may begin with the parts of the output that is there, and the settings named in `growing`
            may differ; the further parts are added and the manifest's history gets
            {"rows_before", "rows_after", "settings_before", "info"}.

    Raises:
        InputError: the folder holds something else or was made with other settings or another plan, another run is
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
        self.path, self.kind, self.part_rows = Path(path), kind, [int(rows) for rows in part_rows]
        self._settings, self._info, self._schema = settings, info or {}, schema
        self._columns = [f"{field.name}: {field.type}" for field in schema]
        self._is_main, self._wait = process_index == 0, wait_for_everyone
        self._lock = FolderLock(self.path)
        try:
            if self._is_main:
                self._prepare(overwrite, extend, growing)
            self._wait()
            self._manifest = read_manifest(self.path, kind)
            if plan_of(self._manifest) != self.part_rows:
                raise InputError(f"{self.path}: process {process_index} planned other parts than process 0")
            self._run = self._lock.path.read_text()
            self._mine = self._missing()[process_index::num_processes]
            # Nobody writes before everybody has made the same list.
            self._wait()
        except BaseException:
            self.close()
            raise
        self.complete = self._manifest["complete"]
        if self.complete:
            self.close()

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
        path, part = self.path / part_name(number), None
        try:
            with _stream_file(path, self._schema) as part:
                yield part
                if part.rows != self.part_rows[number]:
                    raise InputError(f"{path}: {part.rows} rows came, the plan has {self.part_rows[number]}")
                self._require_own_run()
            record = {"file": path.name, "rows": part.rows, "bytes": path.stat().st_size}
            write_json(self.path / part_name(number, ".json"), record | {"sha256": part.digest.hexdigest()})
        except OSError as error:
            if error.errno not in _FULL_DISK:
                raise
            raise self._no_space(part) from None
        self._mine.remove(number)

    def finish(self) -> dict:
        """Wait for all (a collective call), complete the manifest, release the lock; returns the manifest.

        Raises InputError when a part is missing.
        """
        self._wait()
        if self._is_main and not self.complete:
            records, info = self._records(), self._manifest["info"] | self._info
            if None in records:
                raise InputError(f"{self.path}: part {records.index(None)} was not written; run the same command again")
            self._write_manifest(True, records, info, self._manifest["history"])
            self._remove_records()
        self.close()
        self._wait()
        self.complete = True
        return read_manifest(self.path, self.kind)

    def close(self) -> None:
        """Release the lock without finishing; what is written stays."""
        self._lock.release()

    def _prepare(self, overwrite: bool, extend: bool, growing: Sequence[str]) -> None:
        """Take the lock and bring the folder into a state from which parts can be written (main process)."""
        if self.path.is_file():
            if not overwrite:
                raise InputError(f"{self.path}: is a file; choose another path, or --overwrite to replace it")
            self.path.unlink()
        ensure_folder(self.path)
        self._lock.acquire()
        anew, grows = True, False
        if not (self.path / MANIFEST_NAME).exists():
            self._require_own_files(overwrite)
        else:
            self._manifest = there = read_manifest(self.path, self.kind)
            plan = plan_of(there)
            grows = extend and len(plan) < len(self.part_rows) and plan == self.part_rows[: len(plan)]
            before = there["settings"] | {"columns": ", ".join(there["columns"]), "rows of the parts": plan}
            now = self._settings | {"columns": ", ".join(self._columns), "rows of the parts": self.part_rows}
            ignored = ("rows of the parts", *growing) if grows else ()
            if not overwrite:
                require_same(self.path, before, now, "choose another folder, or --overwrite to make it anew", ignored)
            anew = bool(changes(before, now, ignored)) or (overwrite and there["complete"] and not grows)
        # Only now is the folder known to be ours.
        remove_temporary(self.path)
        # By this mark a process that outlived a killed run notices that the folder is no longer its own.
        self._lock.path.write_text(uuid.uuid4().hex)
        if anew:
            self._start_anew()
        elif grows:
            self._grow()
        elif there["complete"] and not self._missing():
            self._remove_records()
        elif there["complete"]:
            print(f"{self.path}: parts are missing or cut off; they are written again", file=sys.stderr, flush=True)
            self._write_manifest(False, there["parts"], there["info"], there["history"])

    def _require_own_files(self, overwrite: bool) -> None:
        """Raise InputError unless the folder without a manifest is ours to fill."""
        found = sorted(item.name for item in self.path.iterdir() if not item.name.startswith("."))
        foreign = [name for name in found if not _OWN_NAME.fullmatch(name)]
        if foreign:
            raise InputError(f"{self.path}: holds other files ({', '.join(foreign[:3])}); choose an empty folder")
        if found and not overwrite:
            raise InputError(f"{self.path}: holds parts without a manifest; choose another folder, or --overwrite")

    def _start_anew(self) -> None:
        # The manifest first and durably: at no moment does it describe parts of another plan.
        (self.path / MANIFEST_NAME).unlink(missing_ok=True)
        sync_folder(self.path)
        for item in list(self.path.iterdir()):
            if _OWN_NAME.fullmatch(item.name):
                item.unlink()
        sync_folder(self.path)
        self._write_manifest(False, [], self._info, [])

    def _grow(self) -> None:
        """Take the longer plan over into the manifest, with a line of history."""
        there, settings = self._manifest, self._manifest["settings"]
        step = {
            "rows_before": there["rows"],
            "rows_after": sum(self.part_rows),
            "settings_before": {key: settings[key] for key in settings if settings[key] != self._settings.get(key)},
            "info": self._info,
        }
        self._write_manifest(False, there["parts"], there["info"] | self._info, [*there["history"], step])

    def _records(self) -> list[dict | None]:
        """For each planned part its record; None where the part is not there in the recorded size."""
        sizes, earlier = part_sizes(self.path), {record["file"]: record for record in self._manifest["parts"] if record}
        found: list[dict | None] = []
        for number in range(len(self.part_rows)):
            name = part_name(number, ".json")
            # A part's own record is newer than the manifest's.
            record = read_json(self.path / name) if name in sizes else earlier.get(part_name(number))
            found.append(record if record and sizes.get(record["file"]) == record["bytes"] else None)
        return found

    def _missing(self) -> list[int]:
        return [number for number, record in enumerate(self._records()) if record is None]

    def _require_own_run(self) -> None:
        if self._lock.path.read_text() != self._run:
            raise InputError(f"{self.path}: another run took this folder over; this process ends")

    def _write_manifest(self, complete: bool, parts: list[dict | None], info: dict, history: list[dict]) -> None:
        manifest = {
            "format": FORMAT[0],
            "format_version": FORMAT[1],
            "kind": self.kind,
            "complete": complete,
            "rows": sum(self.part_rows),
            "columns": self._columns,
            "settings": self._settings,
            "info": info,
            "history": history,
        }
        if not complete:
            manifest["part_rows"] = self.part_rows
        write_json(self.path / MANIFEST_NAME, manifest | {"parts": parts})

    def _remove_records(self) -> None:
        for record in list(self.path.glob("part-*.json")):
            record.unlink()

    def _no_space(self, part: PartWriter | None) -> InputError:
        missing = self._missing()
        rows = sum(self.part_rows[number] for number in missing)
        need = ""
        if part and part.rows:
            free = size_text(shutil.disk_usage(self.path).free)
            need = f", which need about {size_text(rows * part.bytes / part.rows)} ({free} are free)"
        return InputError(
            f"{self.path}: no space left on the device; still to be written are {len(missing)} of "
            f"{len(self.part_rows)} parts, {rows} rows{need}; finished parts are kept: "
            "free some space and run the same command again"
        )
