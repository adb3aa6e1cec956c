"""Datastores and kNN targets: their columns, and readers that address rows by number.

Both are Arrow IPC streams: our folders of parts, or what others wrote (one stream, shards in a folder, a `datasets`
folder), whose columns are cast to ours. Files are memory-mapped; rows within one record batch are read-only views.
"""

from __future__ import annotations

import functools
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from utils.artefact import BEGUN, Made, read_made, require
from utils.errors import InputError
from utils.files import read_json

OPEN_FILES, OPEN_BATCHES = 128, 64  # maps (each holds a file descriptor) and record batches kept open
SCORED_ROWS = 4096  # read at a time for scoring
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
Reader = TypeVar("Reader", bound="_Rows")


def datastore_schema(dim: int, logprob: bool = False) -> pa.Schema:
    """Columns of a datastore of key width `dim`, with or without the base's log-probabilities."""
    columns = [("keys", pa.list_(pa.float16(), dim)), ("vals", pa.int32())]
    return pa.schema([*columns, *[("logprob", pa.float32())] * logprob])


def targets_schema(distance: bool = True) -> pa.Schema:
    """Columns of kNN targets, with or without the fifth one, the nearest neighbour's squared distance."""
    columns = [("id_cnt", pa.int32()), ("token_id", pa.list_(pa.int32())), ("prob", pa.list_(pa.float16()))]
    return pa.schema([*columns, ("label", pa.int32()), *[("distance", pa.float32())] * distance])


@dataclass
class TargetRows:
    """kNN targets of n rows: row i owns the next id_cnt[i] entries of `token_id` and `prob`.

    `id_cnt` int32 (n,), `token_id` int32 (entries,), `prob` float16 (entries,) in descending order within a row,
    `label` int32 (n,), `distance` float32 (n,): squared distance of the nearest neighbour, or None.
    """

    id_cnt: np.ndarray
    token_id: np.ndarray
    prob: np.ndarray
    label: np.ndarray
    distance: np.ndarray | None = None


def _map_file(path: Path) -> pa.Buffer:
    # Python's map, not pyarrow's, which asks the kernel to read ahead all that it slices: on opening, the whole file.
    with open(path, "rb") as file:
        return pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _unreadable(path: Path, reason: object) -> InputError:
    return InputError(f"{path}: not a complete Arrow IPC stream of these columns ({reason}); make or download it again")


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _view(column: pa.Array, field: pa.Field) -> Any:
    """A column as the type of `field` in NumPy: (rows,), (rows, width), or for lists of any length (offsets, values)."""
    wanted = field.type
    if pa.types.is_fixed_size_list(column.type) and not pa.types.is_fixed_size_list(wanted):
        column = column.flatten()  # values in lists of one
    column = column.cast(wanted)
    # By DLPack, because to_numpy() imports pandas.
    if pa.types.is_list(wanted):
        return np.from_dlpack(column.offsets), np.from_dlpack(column.values)
    if pa.types.is_fixed_size_list(wanted):
        return np.from_dlpack(column.flatten()).reshape(len(column), wanted.list_size)
    return np.from_dlpack(column)


def _find_files(path: Path, kind: str) -> tuple[list[Path], list[int] | None, Made | None]:
    """The Arrow files at `path` in row order, the rows of each and the record; None where there is no made.json."""
    if path.is_file():
        return [path], None, None
    if made := read_made(path):
        if made.kind != kind:
            raise InputError(f"{path}: holds {made.kind}, expected {kind}; name another folder")
        rows = made.settings["part_rows"]
        if isinstance(rows, int):
            rows = [min(rows, made.rows - first) for first in range(0, made.rows, rows)]
        return [path / f"part-{number:05d}.arrow" for number in range(len(rows))], rows, made
    if read_made(path, BEGUN):
        raise InputError(f"{path}: is incomplete; run the command that makes it again, it continues")
    if (path / "state.json").is_file():  # written by `datasets`
        return [path / item["filename"] for item in read_json(path / "state.json")["_data_files"]], None, None
    files = [file for file in path.glob("[!.]*.arrow") if file.is_file()]
    if len({re.sub("[0-9]+", "#", file.name) for file in files}) != 1:  # none, or of several tables
        found = ", ".join(sorted(file.name for file in path.glob("*"))[:5]) or "nothing"
        raise InputError(f"{path}: expected {kind}, an Arrow file or a folder of its shards; found {found}")
    return sorted(files, key=lambda file: [int(digits) for digits in re.findall("[0-9]+", file.name)]), None, None


def _rows_of(view: Any, first: int, last: int) -> np.ndarray:
    """Rows [first, last) of a view; of lists their values, end to end."""
    return view[1][view[0][first] : view[0][last]] if isinstance(view, tuple) else view[first:last]


class _Rows:
    """Rows, numbered over the record batches of all files. A file is opened when it is first read."""

    kind: str
    columns: tuple[str, ...]  # that must be there

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files, counts, self.made = _find_files(path, self.kind)
        self._map = functools.lru_cache(OPEN_FILES)(_map_file)
        self._views = functools.lru_cache(OPEN_BATCHES)(self._read_views)
        self._headers = functools.cache(self._read_headers)
        counts = counts or [int(self._headers(number)[2][-1]) for number in range(len(self._files))]
        self._starts = np.cumsum([0, *counts])
        self.rows = int(self._starts[-1])
        found = self._headers(0)[0]
        if missing := [name for name in self.columns if name not in found.names]:
            raise InputError(f"{path}: has no column {missing[0]}, expected {self.kind}; name another file")
        self._read_schema(found)

    @classmethod
    def open(cls: type[Reader], path: str | os.PathLike) -> Reader:
        """Open what is at `path`: our folder, an Arrow stream, a folder of its shards or a `datasets` folder.

        Reads names and headers. Raises InputError if it is missing, incomplete, truncated or has other columns.
        """
        return cls(Path(path))

    def _read_headers(self, number: int) -> tuple[pa.Schema, np.ndarray, np.ndarray]:
        """Columns of a file; of its record batches: positions (batches,) in bytes, first rows (batches + 1,)."""
        counts = [0]
        try:
            content = self._map(self._files[number])
            source = pa.BufferReader(content)
            reader = pa.ipc.open_stream(source)
            positions = [source.tell()]
            for batch in reader:
                positions.append(source.tell())
                counts.append(batch.num_rows)
            # A stream whose writer was killed may end after a batch, but without this mark.
            if content[-len(END_OF_STREAM) :] != END_OF_STREAM:
                raise ValueError("it does not end with the end-of-stream mark")
        except (pa.ArrowException, OSError, ValueError) as error:
            raise _unreadable(self._files[number], error) from None
        return reader.schema, np.array(positions[:-1]), np.cumsum(counts)

    def _read_views(self, number: int, batch: int) -> dict[str, Any]:
        """Column → its `_view` in a record batch of file `number`."""
        schema, positions, _ = self._headers(number)
        source = pa.BufferReader(self._map(self._files[number]))
        source.seek(int(positions[batch]))
        try:
            found = pa.ipc.read_record_batch(pa.ipc.read_message(source), schema)
            return {field.name: _view(found.column(field.name), field) for field in self._schema}
        except (pa.ArrowException, KeyError, ValueError) as error:
            raise _unreadable(self._files[number], error) from None

    def _find(self, row: int) -> tuple[dict[str, Any], int, int]:
        """The views of the record batch that holds a row, its first and past-last row. Raises IndexError."""
        if not 0 <= row < self.rows:
            raise IndexError(f"{self.path}: row {row} of {self.rows}")
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        begin, starts = int(self._starts[number]), self._headers(number)[2]
        batch = int(np.searchsorted(starts, row - begin, side="right")) - 1
        return self._views(number, batch), begin + int(starts[batch]), begin + int(starts[batch + 1])

    def _slices(self, start: int, stop: int | None) -> Iterator[tuple[dict[str, Any], int, int]]:
        """(views, first, past-last row in them) of the record batches, at least one, that hold rows [start, stop)."""
        row, stop = int(start), self.rows if stop is None else int(stop)
        if not 0 <= row <= stop <= self.rows:
            raise IndexError(f"{self.path}: rows {row} to {stop} of {self.rows}")
        while True:
            views, begin, end = self._find(min(row, self.rows - 1))
            yield views, row - begin, min(stop, end) - begin
            if (row := end) >= stop:
                return

    def _column(self, name: str, start: int, stop: int | None) -> np.ndarray:
        return _joined([views[name][first:last] for views, first, last in self._slices(start, stop)])


class Datastore(_Rows):
    """Keys and values of a datastore, by row number. Made by `Datastore.open(path)`.

    `rows`, `dim`, `path`, `made` (None for files of the original). Reading raises IndexError for rows
    outside the datastore and InputError for damaged batches.
    """

    kind, columns = "datastore", ("keys", "vals")

    def _read_schema(self, found: pa.Schema) -> None:
        self.dim = found.field("keys").type.list_size
        self._schema = datastore_schema(self.dim, "logprob" in found.names)

    def keys(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Keys of rows [start, stop): float16 (n, dim); a read-only view within one record batch, else a copy."""
        return self._column("keys", start, stop)

    def vals(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Values (token ids) of rows [start, stop): int32 (n,)."""
        return self._column("vals", start, stop)

    def logprob(self, start: int = 0, stop: int | None = None) -> np.ndarray | None:
        """The base's log-probability of each row's value, float32 (n,); None where the datastore has no such column."""
        return self._column("logprob", start, stop) if "logprob" in self._schema.names else None


class KNNTargets(_Rows):
    """kNN targets, by row number. Made by `KNNTargets.open(path)`; attributes and errors as for a `Datastore`."""

    kind, columns = "knn_targets", ("id_cnt", "token_id", "prob", "label")

    def _read_schema(self, found: pa.Schema) -> None:
        self._schema = targets_schema("distance" in found.names)

    def labels(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Labels (true next tokens) of rows [start, stop): int32 (n,)."""
        return self._column("label", start, stop)

    def read(self, start: int, stop: int | None = None) -> TargetRows:
        """Targets of rows [start, stop): read-only views within one record batch, else copies."""
        found = [[_rows_of(view, *rows) for view in views.values()] for views, *rows in self._slices(start, stop)]
        return TargetRows(*map(_joined, zip(*found, strict=True)))


def check_rows(stored: Datastore | KNNTargets, rows: int) -> None:
    """Refuse a file of another number of rows than the windows have. Raises InputError."""
    if stored.rows != rows:
        raise InputError(f"{stored.path}: holds {stored.rows} rows, but the windows have {rows}")


def open_scored_datastore(path: str | os.PathLike, **expected: Any) -> Datastore:
    """A datastore that holds the base's log-probabilities.

    `expected`: for `require`, None is not compared: ids `base` and `windows`, `layer_position`, `dim`. Raises InputError
    for a datastore without log-probabilities, or of something else than `expected`.
    """
    store = Datastore.open(path)
    if store.logprob(0, 1) is None:
        raise InputError(f"{path}: holds no log-probabilities; write it with --save_knnlm_dstore --save_logprob")
    require(path, store.made, **expected)
    return store


def stored_rows(store: Datastore) -> Iterator[tuple[Any, Any, Any]]:
    """Yield tensors: hidden states (rows, dim) float16, base log-probabilities (rows,) float32, values (rows,) int64.

    Under several processes block b goes to process b mod N.
    """
    import torch
    from accelerate import PartialState

    state = PartialState()
    for start in range(0, store.rows, SCORED_ROWS)[state.process_index :: state.num_processes]:
        rows = start, min(start + SCORED_ROWS, store.rows)
        columns = store.keys(*rows), store.logprob(*rows), store.vals(*rows).astype(np.int64)
        yield tuple(torch.from_numpy(np.array(column)) for column in columns)
