"""The datastore and kNN-target files: the one owner of their columns, read and built without Python objects per row.

Both are Arrow IPC streams. A datastore row is (keys float16[dim], vals int32[, logprob float32]); a kNN-target row is
(id_cnt int32, token_id list<int32>, prob list<float16>, label int32[, distance float32]). Files are memory-mapped and
what is returned are NumPy views of the map (read-only) as long as the rows asked for lie in one record batch.

Knows nothing of models, searching or resuming: parts.py writes folders, manifest.py says which files belong together,
arrow_stream.py maps a file. Files come from outside: whatever they hold, reading gives typed rows or an InputError.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa

from knn_utils.arrow_stream import (
    BAD_BYTES,
    INTEGERS,
    Stream,
    as_int32,
    entries,
    is_list,
    is_scalar,
    matrix_view,
    ragged_view,
    scalar_view,
)
from knn_utils.manifest import Part, find_parts, require_file, verify_parts
from utils.errors import InputError
from utils.made_with import check_layer

if TYPE_CHECKING:
    from torch import Tensor

# Rows that a scorer reads at a time.
SCORED_ROWS = 4096
# Parts and batches kept open, each part with a map and a file descriptor. Outputs of more parts than this are checked
# part by part when first read.
_OPEN_PARTS = 128
_OPEN_BATCHES = 64
_LARGEST_DIM = 1 << 20

_Kind = TypeVar("_Kind", bound="_Rows")


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


class _Rows:
    """Rows addressed by number over the record batches of the parts of one output."""

    kind: str

    def __init__(self, path: Path, parts: list[Part], manifest: dict | None, verify: bool) -> None:
        self.path = path
        self.manifest = manifest
        self._parts = parts
        if verify:
            verify_parts(parts)
        # Without recorded checksums the values themselves are all there is to check.
        self._full_check = verify and manifest is None
        self._stream = functools.lru_cache(_OPEN_PARTS)(self._open_stream)
        self._views = functools.lru_cache(_OPEN_BATCHES)(self._open_batch)
        counts = [part.rows for part in parts]
        if manifest is None or len(parts) <= _OPEN_PARTS:
            counts = [self._stream(number).rows for number in range(len(parts))]
        self._starts = np.zeros(len(parts) + 1, np.int64)
        np.cumsum(np.asarray(counts, dtype=np.int64), out=self._starts[1:])
        self.rows = int(self._starts[-1])
        if not self.rows:
            raise InputError(f"{path}: holds no rows; make it again from at least one window")
        self._stream(0)

    @classmethod
    def open(cls: type[_Kind], path: str | os.PathLike, *, verify: bool = False) -> _Kind:
        """Open what is at `path`: our folder, one stream file, a folder of shards or a `datasets` folder.

        Reads headers only; `verify` also compares checksums (or checks every value where none are recorded), reading
        everything. Raises InputError if it is missing, empty, incomplete, truncated or has other columns.
        """
        parts, manifest = find_parts(path, cls.kind)
        return cls(Path(path), parts, manifest, verify)

    @property
    def settings(self) -> dict:
        """What made the rows, as the manifest records it; empty where there is none."""
        return self.manifest["settings"] if self.manifest else {}

    def __len__(self) -> int:
        return self.rows

    def __reduce__(self) -> tuple:
        # Worker processes map the files themselves.
        return type(self).open, (self.path,)

    def _check_columns(self, stream: Stream) -> None:
        """Raise InputError unless the columns are those of this kind of file."""
        raise NotImplementedError

    def _read_batch(self, batch: pa.RecordBatch) -> Any:
        """Views of a batch's columns."""
        raise NotImplementedError

    def _open_stream(self, number: int) -> Stream:
        part = self._parts[number]
        stream = Stream(part.path, self._full_check)
        if part.rows is not None and stream.rows != part.rows:
            raise InputError(
                f"{part.path}: {stream.rows} rows, the manifest records {part.rows}; make the output again"
            )
        self._check_columns(stream)
        return stream

    def _open_batch(self, part: int, batch: int) -> Any:
        stream = self._stream(part)
        try:
            return self._read_batch(stream.batch(batch))
        except BAD_BYTES as error:
            raise stream.refused(error) from None

    def _part_of(self, row: int) -> int:
        return int(np.searchsorted(self._starts, row, side="right")) - 1

    def _pieces(self, start: int, stop: int | None) -> Iterator[tuple[Any, int, int, Path]]:
        """(views, first, last, file) of each record batch that holds rows of [start, stop)."""
        start, stop = int(start), self.rows if stop is None else int(stop)
        if not 0 <= start <= stop <= self.rows:
            raise self._outside(start, stop)
        part = self._part_of(start)
        while start < stop:
            stream = self._stream(part)
            base = int(self._starts[part])
            end = min(stop, int(self._starts[part + 1])) - base
            row = start - base
            batch = stream.batch_of(row) if row < end else 0
            while row < end:
                origin = int(stream.starts[batch])
                last = min(end, int(stream.starts[batch + 1]))
                if row < last:
                    yield self._views(part, batch), row - origin, last - origin, stream.path
                row = last
                batch += 1
            start = base + end
            part += 1

    def _outside(self, start: int, stop: int) -> InputError:
        return InputError(f"{self.path}: rows {start} to {stop} were asked for, it holds {self.rows}")

    def _column(self, name: str, start: int, stop: int | None, dtype: type) -> np.ndarray:
        """(n,) rows of a one-number column: a view within one batch, else a copy."""
        pieces = []
        for views, first, last, path in self._pieces(start, stop):
            values = getattr(views, name)[first:last]
            try:
                pieces.append(as_int32(values, name) if dtype is np.int32 else values)
            except ValueError as error:
                raise InputError(f"{path}: {error}; make the file again") from None
        return _joined(pieces, (0,), dtype)


def _joined(pieces: list[np.ndarray], empty: tuple[int, ...], dtype: type) -> np.ndarray:
    if len(pieces) == 1:
        return pieces[0]
    return np.concatenate(pieces) if pieces else np.empty(empty, dtype)


def _expect(stream: Stream, name: str, accepted: bool, expected: str) -> None:
    if name not in stream.types:
        names = ", ".join(stream.types)[:200]
        raise InputError(
            f"{stream.path}: no column {name} among {names}; expected {name} of {expected}: name another file"
        )
    if not accepted:
        found = stream.types[name]
        raise InputError(f"{stream.path}: column {name} is {found}, expected {expected}; make or fetch the file again")


@dataclass
class _KeyBatch:
    keys: np.ndarray
    vals: np.ndarray
    logprob: np.ndarray | None


class Datastore(_Rows):
    """Keys and values of a datastore, memory-mapped, rows addressed by number. Made by `Datastore.open(path)`.

    `rows` (also len()), `dim`, `path`, `manifest` (None where there is none), `settings` ({} without a manifest).
    Reading raises InputError for rows outside the datastore and for damaged batches.
    """

    kind = "datastore"

    def __init__(self, path: Path, parts: list[Part], manifest: dict | None, verify: bool) -> None:
        self.dim = 0
        self._has_logprob: bool | None = None
        super().__init__(path, parts, manifest, verify)

    def _check_columns(self, stream: Stream) -> None:
        path = stream.path
        keys, vals, logprob = (stream.types.get(name) for name in ("keys", "vals", "logprob"))
        fixed = keys is not None and pa.types.is_fixed_size_list(keys) and keys.value_type == pa.float16()
        accepted = keys is not None and (fixed or is_list(keys, [pa.float16()]))
        _expect(stream, "keys", accepted, "lists of float16 of one width")
        _expect(stream, "vals", vals is not None and is_scalar(vals, INTEGERS), "int32")
        if logprob is not None:
            _expect(stream, "logprob", logprob == pa.float32(), "float32")
        if self._has_logprob not in (None, logprob is not None):
            raise InputError(f"{path}: column logprob is in some parts only; make the datastore again")
        self._has_logprob = logprob is not None
        if not fixed and not stream.rows:
            return
        dim = keys.list_size if fixed else self._first_width(stream)
        if not 0 < dim <= _LARGEST_DIM:
            raise InputError(f"{path}: keys of width {dim}, expected 1 to {_LARGEST_DIM}; make the datastore again")
        if self.dim not in (0, dim):
            raise InputError(f"{path}: keys of width {dim}, other parts have {self.dim}; make the datastore again")
        self.dim = dim

    @staticmethod
    def _first_width(stream: Stream) -> int:
        # Lists of any length, as `datasets` writes them when no length is given: the first row says the width.
        try:
            offsets, _ = ragged_view(stream.batch(stream.batch_of(0)), "keys")
        except BAD_BYTES as error:
            raise stream.refused(error) from None
        return int(offsets[1]) - int(offsets[0])

    def _read_batch(self, batch: pa.RecordBatch) -> _KeyBatch:
        return _KeyBatch(
            keys=matrix_view(batch, "keys", self.dim),
            vals=scalar_view(batch, "vals"),
            logprob=scalar_view(batch, "logprob") if self._has_logprob else None,
        )

    def keys(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Keys of rows [start, stop): float16 (n, dim); a read-only view within one record batch, else a copy."""
        pieces = [views.keys[first:last] for views, first, last, _ in self._pieces(start, stop)]
        return _joined(pieces, (0, self.dim), np.float16)

    def vals(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Values (token ids) of rows [start, stop): int32 (n,)."""
        return self._column("vals", start, stop, np.int32)

    def logprob(self, start: int = 0, stop: int | None = None) -> np.ndarray | None:
        """The base's log-probability of each row's value, float32 (n,); None where the datastore has no such column."""
        return self._column("logprob", start, stop, np.float32) if self._has_logprob else None

    def gather_keys(self, row_numbers: np.ndarray) -> np.ndarray:
        """Keys of any rows, in the order given: int64 (n,) → float16 (n, dim). Each batch is visited once."""
        numbers = np.asarray(row_numbers, dtype=np.int64).reshape(-1)
        result = np.empty((len(numbers), self.dim), np.float16)
        order = np.argsort(numbers, kind="stable")
        ordered = numbers[order]
        if len(ordered) and not 0 <= ordered[0] <= ordered[-1] < self.rows:
            raise self._outside(int(ordered[0]), int(ordered[-1]))
        done = 0
        while done < len(ordered):
            part = self._part_of(int(ordered[done]))
            stream, base = self._stream(part), int(self._starts[part])
            batch = stream.batch_of(int(ordered[done]) - base)
            upto = int(np.searchsorted(ordered, base + int(stream.starts[batch + 1]), side="left"))
            rows = ordered[done:upto] - (base + int(stream.starts[batch]))
            result[order[done:upto]] = self._views(part, batch).keys[rows]
            done = upto
        return result


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


@dataclass
class _TargetBatch:
    id_cnt: np.ndarray
    token_id: tuple[np.ndarray, np.ndarray]
    prob: tuple[np.ndarray, np.ndarray]
    label: np.ndarray
    distance: np.ndarray | None


class KNNTargets(_Rows):
    """kNN targets, memory-mapped, rows addressed by number. Made by `KNNTargets.open(path)`.

    `rows` (also len()), `path`, `manifest`, `settings` as for a datastore; `has_distance`. Reading raises InputError
    for rows outside the file and for damaged batches; whether token ids lie in a vocabulary is for the caller to check.
    """

    kind = "knn_targets"

    def __init__(self, path: Path, parts: list[Part], manifest: dict | None, verify: bool) -> None:
        self.has_distance = True
        super().__init__(path, parts, manifest, verify)

    def _check_columns(self, stream: Stream) -> None:
        types = stream.types
        for name in ("id_cnt", "label"):
            _expect(stream, name, name in types and is_scalar(types[name], INTEGERS), "int32")
        for name, values, expected in (
            ("token_id", INTEGERS, "list<int32>"),
            ("prob", (pa.float16(), pa.float32()), "list<float16>"),
        ):
            _expect(stream, name, name in types and is_list(types[name], values), expected)
        if "distance" in types:
            _expect(stream, "distance", types["distance"] == pa.float32(), "float32")
        # Files of the original have no distances; where one part lacks them the whole counts as having none.
        self.has_distance = self.has_distance and "distance" in types

    def _read_batch(self, batch: pa.RecordBatch) -> _TargetBatch:
        return _TargetBatch(
            id_cnt=scalar_view(batch, "id_cnt"),
            token_id=ragged_view(batch, "token_id"),
            prob=ragged_view(batch, "prob"),
            label=scalar_view(batch, "label"),
            distance=scalar_view(batch, "distance") if "distance" in batch.schema.names else None,
        )

    def labels(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Labels (true next tokens) of rows [start, stop): int32 (n,)."""
        return self._column("label", start, stop, np.int32)

    def read(self, start: int, stop: int | None = None) -> TargetRows:
        """Targets of rows [start, stop): read-only views within one record batch, else copies."""
        pieces = [self._slice(*piece) for piece in self._pieces(start, stop)]
        if len(pieces) == 1:
            return pieces[0]

        def joined(name: str, dtype: type) -> np.ndarray:
            return _joined([getattr(piece, name) for piece in pieces], (0,), dtype)

        return TargetRows(
            id_cnt=joined("id_cnt", np.int32),
            token_id=joined("token_id", np.int32),
            prob=joined("prob", np.float16),
            label=joined("label", np.int32),
            distance=joined("distance", np.float32) if self.has_distance else None,
        )

    def _slice(self, views: _TargetBatch, first: int, last: int, path: Path) -> TargetRows:
        try:
            id_cnt = as_int32(views.id_cnt[first:last], "id_cnt")
            token_id = entries(*views.token_id, first, last, id_cnt, "token_id")
            prob = entries(*views.prob, first, last, id_cnt, "prob")
            return TargetRows(
                id_cnt=id_cnt,
                token_id=as_int32(token_id, "token_id"),
                prob=prob.astype(np.float16, copy=False),
                label=as_int32(views.label[first:last], "label"),
                distance=views.distance[first:last] if self.has_distance else None,
            )
        except ValueError as error:
            raise InputError(f"{path}: {error}; make or fetch the kNN targets again") from None


# ---------------------------------------------------------------------------------------------------------------------
# Building record batches
# ---------------------------------------------------------------------------------------------------------------------


def datastore_schema(dim: int, logprob: bool = False) -> pa.Schema:
    """Columns of a datastore of key width `dim`, with or without the base's log-probabilities."""
    fields = [pa.field("keys", pa.list_(pa.float16(), dim)), pa.field("vals", pa.int32())]
    return pa.schema(fields + [pa.field("logprob", pa.float32())] * logprob)


def targets_schema(distance: bool = True) -> pa.Schema:
    """Columns of kNN targets, with or without the fifth one, the nearest hit's squared distance."""
    fields = [
        pa.field("id_cnt", pa.int32()),
        pa.field("token_id", pa.list_(pa.int32())),
        pa.field("prob", pa.list_(pa.float16())),
        pa.field("label", pa.int32()),
    ]
    return pa.schema(fields + [pa.field("distance", pa.float32())] * distance)


def _arrow(values: np.ndarray, dtype: type, kind: pa.DataType, what: str, length: int) -> pa.Array:
    """An Arrow array on a NumPy buffer, not copied when it is contiguous."""
    values = np.asarray(values)
    if values.dtype != dtype or values.shape != (length,):
        raise ValueError(f"{what}: {values.dtype} {values.shape}, expected {np.dtype(dtype)} ({length},)")
    return pa.Array.from_buffers(kind, length, [None, pa.py_buffer(np.ascontiguousarray(values))])


def datastore_batch(keys: np.ndarray, vals: np.ndarray, logprob: np.ndarray | None = None) -> pa.RecordBatch:
    """A record batch of datastore rows on the arrays' own memory.

    `keys` float16 (n, dim), `vals` int32 (n,), `logprob` float32 (n,) or None. Raises ValueError for other dtypes or
    shapes. The arrays must not change until the batch is written.
    """
    if keys.ndim != 2:
        raise ValueError(f"keys: {keys.shape}, expected (rows, dim)")
    rows, dim = keys.shape
    flat = _arrow(np.ascontiguousarray(keys).reshape(-1), np.float16, pa.float16(), "keys", rows * dim)
    columns = [pa.FixedSizeListArray.from_arrays(flat, dim), _arrow(vals, np.int32, pa.int32(), "vals", rows)]
    if logprob is not None:
        columns.append(_arrow(logprob, np.float32, pa.float32(), "logprob", rows))
    return pa.RecordBatch.from_arrays(columns, schema=datastore_schema(dim, logprob is not None))


def targets_batch(rows: TargetRows) -> pa.RecordBatch:
    """A record batch of kNN targets on the arrays' own memory.

    Raises ValueError for other dtypes or shapes, for counts that do not sum to the entries, and for 2^31 entries or
    more (write smaller batches). The arrays must not change until the batch is written.
    """
    count, entries = len(rows.id_cnt), len(rows.token_id)
    id_cnt = _arrow(rows.id_cnt, np.int32, pa.int32(), "id_cnt", count)
    offsets = np.zeros(count + 1, np.int64)
    np.cumsum(rows.id_cnt, out=offsets[1:])
    if int(offsets[-1]) != entries or (count and int(rows.id_cnt.min()) < 0):
        raise ValueError(f"id_cnt sums to {offsets[-1]}, but there are {entries} entries")
    if entries > np.iinfo(np.int32).max:
        raise ValueError(f"{entries} entries in one record batch; write batches of fewer rows")
    bounds = _arrow(offsets.astype(np.int32), np.int32, pa.int32(), "offsets", count + 1)
    columns = [
        id_cnt,
        pa.ListArray.from_arrays(bounds, _arrow(rows.token_id, np.int32, pa.int32(), "token_id", entries)),
        pa.ListArray.from_arrays(bounds, _arrow(rows.prob, np.float16, pa.float16(), "prob", entries)),
        _arrow(rows.label, np.int32, pa.int32(), "label", count),
    ]
    if rows.distance is not None:
        columns.append(_arrow(rows.distance, np.float32, pa.float32(), "distance", count))
    return pa.RecordBatch.from_arrays(columns, schema=targets_schema(rows.distance is not None))


# ---------------------------------------------------------------------------------------------------------------------
# The indexed rows' values
# ---------------------------------------------------------------------------------------------------------------------


def load_values(path: str | os.PathLike) -> np.ndarray:
    """The values of the indexed datastore (`--val_path`): int32 (rows,), memory-mapped where possible.

    `path` is a .npy file, a datastore (file or folder), or a name ending in .pkl, which is never opened: it stands for
    the .npy beside it, or for the values in the datastore beside it. Raises InputError for anything else.
    """
    path = Path(path)
    if path.suffix == ".npy":
        return _load_npy(path)
    if path.suffix != ".pkl":
        return Datastore.open(path).vals()
    if path.with_suffix(".npy").is_file():
        return _load_npy(path.with_suffix(".npy"))
    subset = path.stem.removesuffix("_vals")
    beside = sorted(path.parent.glob("dstore_*.arrow")) if path.parent.is_dir() else []
    # dstore_{model_type}_{subset}_{dim}.arrow
    matching = [item for item in beside if item.stem.rpartition("_")[0].endswith(f"_{subset}")]
    if len(matching) != 1:
        raise InputError(
            f"{path}: pickles are not read, and {path.with_suffix('.npy').name} is not beside it; "
            "name the .npy that build_index writes, or the indexed datastore"
        )
    return Datastore.open(matching[0]).vals()


def _load_npy(path: Path) -> np.ndarray:
    require_file(path)
    try:
        values: Any = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "iu":
            raise ValueError("it holds no plain integers")
        if values.ndim == 2 and values.shape[1] == 1:
            values = values[:, 0]
        if values.ndim != 1 or not len(values):
            raise ValueError(f"its shape is {values.shape}, expected (rows,)")
        return as_int32(values, "vals")
    # Any exception: on a damaged header NumPy passes on whatever Python's own tokenizer and parser raise.
    except Exception as error:
        raise InputError(f"{path}: not the values of a datastore ({error}); build the index again") from None


# ---------------------------------------------------------------------------------------------------------------------
# What belongs together
# ---------------------------------------------------------------------------------------------------------------------


def count_rows(windows: Any) -> np.ndarray:
    """(windows,) int64: datastore rows of each window, from its `dstore_range`."""
    found = windows.with_format("numpy")["dstore_range"][:]
    try:
        ranges = np.asarray(found, dtype=np.int64).reshape(len(windows), 2)
    except (TypeError, ValueError):
        raise InputError("--dataset_name: a window's dstore_range is not two numbers; make the windows again") from None
    rows = ranges[:, 1] - ranges[:, 0]
    longest = len(windows[0]["input_ids"]) if len(windows) else 0
    wrong = (rows < 0) | (rows > longest) | (np.concatenate([[0], ranges[:-1, 1]]) != ranges[:, 0])
    if wrong.any():
        bad = int(np.argmax(wrong))
        raise InputError(
            f"--dataset_name: window {bad} has the dstore_range {ranges[bad].tolist()}, which does not follow the window "
            f"before it, or holds more rows than its {longest} tokens; make the windows again"
        )
    return rows


def check_belongs(
    stored: Datastore | KNNTargets,
    *,
    rows: int | None = None,
    dim: int | None = None,
    layer_position: int | None = None,
) -> None:
    """Refuse a datastore or kNN targets that do not belong to the windows or the model at hand.

    Args:
        rows: the windows' datastore rows (see `count_rows`).
        dim: the width of the model's hidden states.
        layer_position: the block whose MLP input they are.

    Raises:
        InputError: one of those that are given is another one; the line names the file and both values.
    """
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
    check_layer(stored.settings, stored.path, layer_position)


# ---------------------------------------------------------------------------------------------------------------------
# Scored rows: a datastore with log-probabilities stands for a run of the base
# ---------------------------------------------------------------------------------------------------------------------


def open_scored_datastore(
    path: str | os.PathLike,
    *,
    rows: int | None = None,
    dim: int | None = None,
    layer_position: int | None = None,
) -> Datastore:
    """A datastore that holds the base's log-probabilities; `rows`, `dim` and `layer_position` as in `check_belongs`.

    Raises InputError where it holds none, or does not belong to the windows or the model.
    """
    datastore = Datastore.open(path)
    if datastore.logprob(0, 1) is None:
        raise InputError(f"{path}: holds no log-probabilities; write it with --save_knnlm_dstore --save_logprob")
    check_belongs(datastore, rows=rows, dim=dim, layer_position=layer_position)
    return datastore


def stored_rows(datastore: Datastore) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (hidden states (rows, dim) float16, base log-probabilities (rows,) float32, values (rows,) int64).

    Under several processes block b goes to process b mod N.
    """
    import torch
    from accelerate import PartialState

    state = PartialState()
    for start in range(0, datastore.rows, SCORED_ROWS)[state.process_index :: state.num_processes]:
        stop = min(start + SCORED_ROWS, datastore.rows)
        yield (
            torch.from_numpy(np.array(datastore.keys(start, stop))),
            torch.from_numpy(np.array(datastore.logprob(start, stop))),
            torch.from_numpy(datastore.vals(start, stop).astype(np.int64)),
        )
