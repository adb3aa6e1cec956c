"""The datastore and kNN-target files: the one owner of their columns, read and built without Python objects per row.

Both are Arrow IPC streams. A datastore row is (keys float16[dim], vals int32[, logprob float32]); a kNN-target row is
(id_cnt int32, token_id list<int32>, prob list<float16>, label int32[, distance float32]). Files are memory-mapped, and
rows that lie in one record batch are views of the map (read-only). Files of other writers, whose numbers are wider or
whose lists are of another kind, are read too. manifest.py says which files make up an output, parts.py writes them.
"""

from __future__ import annotations

import functools
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from knn_utils.manifest import KINDS, Part, find_parts
from utils.errors import InputError
from utils.legacy import check_made, sha256_file
from utils.loading import windows_fingerprint

# Files (each map holds a file descriptor) and record batches kept open; rows that a scorer reads at a time.
OPEN_FILES, OPEN_BATCHES = 128, 64

_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_Kind = TypeVar("_Kind", bound="_Rows")


def datastore_schema(dim: int, logprob: bool = False) -> pa.Schema:
    """Columns of a datastore of key width `dim`, with or without the base's log-probabilities."""
    fields = [pa.field("keys", pa.list_(pa.float16(), dim)), pa.field("vals", pa.int32())]
    return pa.schema(fields + [pa.field("logprob", pa.float32())] * logprob)


def targets_schema(distance: bool = True) -> pa.Schema:
    """Columns of kNN targets, with or without the fifth one, the nearest hit's squared distance."""
    columns = [("id_cnt", pa.int32()), ("token_id", pa.list_(pa.int32())), ("prob", pa.list_(pa.float16()))]
    return pa.schema([*columns, ("label", pa.int32()), *[("distance", pa.float32())] * distance])


@dataclass
class TargetRows:
    """kNN targets of n rows: row i owns the next id_cnt[i] entries of `token_id` and `prob`.

    `id_cnt` int32 (n,), `token_id` int32 (entries,), `prob` float16 (entries,) falling within a row, `label` int32
    (n,), `distance` float32 (n,): squared distance of the nearest hit, or None.
    """

    id_cnt: np.ndarray
    token_id: np.ndarray
    prob: np.ndarray
    label: np.ndarray
    distance: np.ndarray | None = None


def _map_file(path: Path) -> pa.Buffer:
    # Python's map, not pyarrow's, which asks the kernel to read ahead all that it slices: on opening, the whole file.
    with open(path, "rb") as file:
        is_empty = os.fstat(file.fileno()).st_size == 0  # nothing to map
        return pa.py_buffer(b"" if is_empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _unreadable(path: Path, reason: object) -> InputError:
    return InputError(
        f"{path}: not a whole, readable Arrow IPC stream of these columns ({reason}); it is truncated, damaged or of "
        "another format: make or fetch it again"
    )


class _Stream:
    """Where the record batches of one file are: `positions` (batches,) in bytes, `starts` (batches + 1,) first rows.

    Reads headers only. Raises InputError where the file is no whole stream.
    """

    def __init__(self, path: Path, map_file: Callable[[Path], pa.Buffer]) -> None:
        self.path, self._map = path, map_file
        content = map_file(path)
        source = pa.BufferReader(content)
        try:
            reader = pa.ipc.open_stream(source)
            self.schema = reader.schema
            positions, counts = [source.tell()], [0]
            while (batch := next(reader, None)) is not None:
                positions.append(source.tell())
                counts.append(batch.num_rows)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, error) from None
        # A stream that a killed writer left may end at a batch, but without the mark.
        if source.tell() < content.size or content[-len(_END_OF_STREAM) :] != _END_OF_STREAM:
            raise _unreadable(path, "it does not end with the end-of-stream mark")
        self.positions, self.starts = np.array(positions[:-1]), np.cumsum(counts)
        self.rows = int(self.starts[-1])

    def batch(self, number: int) -> pa.RecordBatch:
        """Record batch `number`, on the mapped memory."""
        source = pa.BufferReader(self._map(self.path))
        source.seek(int(self.positions[number]))
        return pa.ipc.read_record_batch(pa.ipc.read_message(source), self.schema)


def _view(column: pa.Array, field: pa.Field) -> Any:
    """A column as the type of `field` in NumPy: (rows,), (rows, width), or for lists of any length (offsets, values)."""
    kind, found = field.type, column.type
    if column.null_count:
        raise ValueError(f"column {field.name} holds nulls")
    if pa.types.is_fixed_size_list(found) and found.list_size == 1 and not pa.types.is_fixed_size_list(kind):
        column = column.flatten()
    if column.type != kind:
        column = column.cast(kind)
    # By DLPack, because to_numpy() imports pandas.
    if pa.types.is_list(kind):
        return np.from_dlpack(column.offsets), np.from_dlpack(column.values)
    if pa.types.is_fixed_size_list(kind):
        return np.from_dlpack(column.flatten()).reshape(len(column), kind.list_size)
    return np.from_dlpack(column)


class _Rows:
    """Rows addressed by number over the record batches of the parts of one output. A part is opened when it is read."""

    kind: str
    needed: tuple[str, ...]

    def __init__(self, path: Path, parts: list[Part], manifest: dict | None) -> None:
        self.path, self.manifest, self._parts = path, manifest, parts
        self._map = functools.lru_cache(OPEN_FILES)(_map_file)
        self._streams: dict[int, _Stream] = {}
        self._views = functools.lru_cache(OPEN_BATCHES)(self._read_views)
        counts = [self._stream(number).rows if part.rows is None else part.rows for number, part in enumerate(parts)]
        self._starts = np.cumsum([0, *counts])
        self.rows = int(self._starts[-1])
        if not self.rows:
            raise InputError(f"{path}: holds no rows; make it again from at least one window")
        schema = self._stream(0).schema
        if missing := [name for name in self.needed if name not in schema.names]:
            raise InputError(
                f"{parts[0].path}: no column {missing[0]} among {', '.join(schema.names)}; expected {KINDS[self.kind]} "
                f"with {', '.join(self.needed)}: name another file"
            )
        self._schema = self._own_schema(schema)

    @classmethod
    def open(cls: type[_Kind], path: str | os.PathLike, *, verify: bool = False) -> _Kind:
        """Open what is at `path`: our folder, one stream file, a folder of shards or a `datasets` folder.

        Reads the manifest and headers; `verify` also compares the recorded checksums, which reads everything. Raises
        InputError if it is missing, empty, incomplete, truncated or has other columns.
        """
        parts, manifest = find_parts(path, cls.kind)
        for part in parts if verify else []:
            if part.sha256 not in (None, sha256_file(part.path)):
                raise InputError(
                    f"{part.path}: does not match its checksum, a byte was changed; delete this file and run the "
                    "command that made it again, which writes this part anew"
                )
        return cls(Path(path), parts, manifest)

    @property
    def settings(self) -> dict:
        """What made the rows, as the manifest records it; empty where there is none."""
        return self.manifest["settings"] if self.manifest else {}

    def __len__(self) -> int:
        return self.rows

    def _own_schema(self, found: pa.Schema) -> pa.Schema:
        """The columns that are `found`, as this project writes them: those of other writers are cast to them."""
        raise NotImplementedError

    def _stream(self, number: int) -> _Stream:
        """The stream of a part; its headers are read the first time."""
        if number not in self._streams:
            part = self._parts[number]
            stream = _Stream(part.path, self._map)
            if part.rows not in (None, stream.rows):
                raise InputError(f"{part.path}: {stream.rows} rows, the manifest records {part.rows}; make it again")
            if self._streams and stream.schema != self._streams[0].schema:
                raise InputError(f"{part.path}: has other columns than {self._parts[0].path.name}; make it again")
            self._streams[number] = stream
        return self._streams[number]

    def _read_views(self, part: int, batch: int) -> dict[str, Any]:
        """Column → its `_view` in a record batch."""
        stream = self._stream(part)
        try:
            found = stream.batch(batch)
            return {field.name: _view(found.column(field.name), field) for field in self._schema}
        except (pa.ArrowException, ValueError) as error:
            raise _unreadable(stream.path, error) from None

    def _find(self, row: int) -> tuple[int, int, int, int]:
        """(part, record batch in it, first and past-last row of the batch) of a row."""
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        base, starts = int(self._starts[part]), self._stream(part).starts
        batch = int(np.searchsorted(starts, row - base, side="right")) - 1
        return part, batch, base + int(starts[batch]), base + int(starts[batch + 1])

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.rows:
            raise InputError(f"{self.path}: rows {start} to {stop} were asked for, it holds {self.rows}")

    def _pieces(self, start: int, stop: int | None) -> Iterator[tuple[dict[str, Any], int, int, Path]]:
        """(views, first, past-last, file) of the record batches, at least one, that hold rows [start, stop)."""
        row, stop = int(start), self.rows if stop is None else int(stop)
        self._check_range(row, stop)
        while True:
            part, batch, begin, end = self._find(min(row, self.rows - 1))
            last = min(stop, end)
            yield self._views(part, batch), row - begin, last - begin, self._parts[part].path
            if last == stop:
                return
            row = last

    def _column(self, name: str, start: int, stop: int | None) -> np.ndarray:
        return _joined([views[name][first:last] for views, first, last, _ in self._pieces(start, stop)])


def _joined(pieces: Sequence[np.ndarray]) -> np.ndarray:
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


class Datastore(_Rows):
    """Keys and values of a datastore, memory-mapped, rows addressed by number. Made by `Datastore.open(path)`.

    `rows` (also len()), `dim`, `path`, `manifest` (None where there is none), `settings` ({} without a manifest).
    Reading raises InputError for rows outside the datastore and for damaged batches.
    """

    kind = "datastore"
    needed = ("keys", "vals")

    def _own_schema(self, found: pa.Schema) -> pa.Schema:
        kind = found.field("keys").type
        if not pa.types.is_nested(kind):
            raise _unreadable(self._parts[0].path, f"column keys is {kind}, expected lists of float16")
        self.dim = getattr(kind, "list_size", None)
        if self.dim is None:  # as `datasets` writes them when no length is given: the first row says the width
            part, batch, *_ = self._find(0)
            self.dim = len(self._stream(part).batch(batch).column("keys")[0])
        return datastore_schema(self.dim, "logprob" in found.names)

    def keys(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Keys of rows [start, stop): float16 (n, dim); a read-only view within one record batch, else a copy."""
        return self._column("keys", start, stop)

    def vals(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Values (token ids) of rows [start, stop): int32 (n,)."""
        return self._column("vals", start, stop)

    def logprob(self, start: int = 0, stop: int | None = None) -> np.ndarray | None:
        """The base's log-probability of each row's value, float32 (n,); None where the datastore has no such column."""
        return self._column("logprob", start, stop) if "logprob" in self._schema.names else None

    def gather_keys(self, row_numbers: np.ndarray) -> np.ndarray:
        """Keys of any rows, in the order given: int64 (n,) → float16 (n, dim). Each batch is visited once."""
        numbers = np.asarray(row_numbers, dtype=np.int64).reshape(-1)
        result = np.empty((len(numbers), self.dim), np.float16)
        order = np.argsort(numbers, kind="stable")
        ordered = numbers[order]
        if len(ordered):
            self._check_range(int(ordered[0]), int(ordered[-1]) + 1)
        done = 0
        while done < len(ordered):
            part, batch, begin, end = self._find(int(ordered[done]))
            upto = int(np.searchsorted(ordered, end, side="left"))
            result[order[done:upto]] = self._views(part, batch)["keys"][ordered[done:upto] - begin]
            done = upto
        return result


class KNNTargets(_Rows):
    """kNN targets, memory-mapped, rows addressed by number. Made by `KNNTargets.open(path)`.

    `rows` (also len()), `path`, `manifest`, `settings` as for a datastore. Reading raises InputError for rows outside
    the file and for damaged batches; whether token ids lie in a vocabulary is for the caller to check.
    """

    kind = "knn_targets"
    needed = ("id_cnt", "token_id", "prob", "label")

    def _own_schema(self, found: pa.Schema) -> pa.Schema:
        return targets_schema("distance" in found.names)

    def labels(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Labels (true next tokens) of rows [start, stop): int32 (n,)."""
        return self._column("label", start, stop)

    def read(self, start: int, stop: int | None = None) -> TargetRows:
        """Targets of rows [start, stop): read-only views within one record batch, else copies."""
        pieces = [self._slice(*piece) for piece in self._pieces(start, stop)]
        return TargetRows(*map(_joined, zip(*pieces, strict=True)))

    def _slice(self, views: dict[str, Any], first: int, last: int, path: Path) -> list[np.ndarray]:
        """The columns of rows [first, last) of a record batch, in the order of `TargetRows`."""
        found = []
        for name, view in views.items():
            if isinstance(view, tuple):
                offsets, values = view
                if not np.array_equal(np.diff(offsets[first : last + 1]), views["id_cnt"][first:last]):
                    raise InputError(f"{path}: the list lengths of {name} are not those in id_cnt; make it again")
                found.append(values[offsets[first] : offsets[last]])
            else:
                found.append(view[first:last])
        return found


def check_belongs(
    stored: _Rows,
    *,
    rows: int | None = None,
    dim: int | None = None,
    windows: Any = None,
    base: Any = None,
    **made: Any,
) -> None:
    """Refuse a datastore or kNN targets of other windows or of another model than those at hand.

    `rows`: the windows' datastore rows, or the `windows` themselves. `dim`: the width of the hidden states; `base`: the
    `BaseArguments` of their base and block. `made`: what else `check_made` compares. Raises InputError naming both values.
    """
    if windows is not None:
        from utils.evaluation import count_rows

        rows, made["dataset"] = int(count_rows(windows).sum()), windows_fingerprint(windows)
    if rows is not None and stored.rows != rows:
        low, high = sorted((stored.rows, rows))
        raise InputError(
            f"{stored.path}: holds {stored.rows} rows, but the windows' dstore_range goes to {rows} (rows {low} to "
            f"{high - 1} are in one of them only); make it from these windows"
        )
    if dim is not None and stored.dim != dim:
        raise InputError(
            f"{stored.path}: keys are {stored.dim} wide, but the model's hidden states {dim}; "
            "name the datastore of this base model"
        )
    if base is not None:
        made |= {"model": base.fingerprint(stored.settings), "layer_position": base.layer_position}
    check_made(stored.path, stored.settings, **made)
