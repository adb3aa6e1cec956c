"""One Arrow IPC stream file, memory-mapped, and NumPy views of its columns.

Knows the stream's framing and the layout of plain, fixed-size-list and list columns; knows nothing of datastores, kNN
targets or folders. The bytes come from outside and may be anything: what leaves this module is within the file's
bounds, of the type it claims, or an InputError.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from knn_utils.manifest import require_file
from utils.errors import InputError

# What pyarrow, NumPy and struct raise on bytes that are no table.
BAD_BYTES = (pa.ArrowException, ArithmeticError, LookupError, MemoryError, OSError, ValueError, struct.error)
INTEGERS = (pa.int32(), pa.int64())

_NUMPY_TYPES = {pa.int32(): np.int32, pa.int64(): np.int64, pa.float16(): np.float16, pa.float32(): np.float32}
# The mark that ends a stream, in its present form and in that of files from before 2019.
_END_MARKS = (b"\xff\xff\xff\xff\x00\x00\x00\x00", b"\x00\x00\x00\x00")


def _table_field(data: memoryview, table: int, number: int) -> int | None:
    """Position of field `number` of the flatbuffer table at `table`, or None where it is left out."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if vtable < 0:
        raise ValueError("damaged message header")
    if 6 + 2 * number > struct.unpack_from("<H", data, vtable)[0]:
        return None
    offset = struct.unpack_from("<H", data, vtable + 4 + 2 * number)[0]
    return table + offset if offset else None


def _header_field(metadata: pa.Buffer, number: int, form: str) -> int | None:
    """Scalar field `number` of a message's header table (Schema or RecordBatch in Arrow's Message.fbs), or None."""
    data = memoryview(metadata)
    pointer = _table_field(data, struct.unpack_from("<I", data, 0)[0], 2)
    if pointer is None:
        raise ValueError("a message without header")
    field = _table_field(data, pointer + struct.unpack_from("<I", data, pointer)[0], number)
    return None if field is None else struct.unpack_from(form, data, field)[0]


class Stream:
    """A stream file. Opening walks the message headers, reading no rows, and checks the layout of every batch.

    `types`: column name → Arrow type; `rows`; `starts` int64 (batches + 1,): first row of each batch, then `rows`. With `full`, all values are
    checked too. Raises InputError for anything that is not a whole, uncompressed, little-endian stream of batches.
    """

    def __init__(self, path: Path, full: bool = False) -> None:
        self.path = path
        self._buffer = self._map()
        try:
            self._schema, self._positions, counts = self._walk(full)
            names = self._schema.names
            self.types = dict(zip(names, self._schema.types, strict=True))
            # Printed once here, because names that are no text only show when one tries.
            if len(self.types) < len(names) or not str(self._schema):
                raise ValueError("two columns have the same name")
            self.starts = np.zeros(len(counts) + 1, np.int64)
            np.cumsum(np.asarray(counts, dtype=np.int64), out=self.starts[1:])
        except BAD_BYTES as error:
            raise self.refused(error) from None
        self.rows = int(self.starts[-1])

    def refused(self, reason: object) -> InputError:
        """The error that says this file cannot be used, and why."""
        return InputError(
            f"{self.path}: not a whole, readable Arrow IPC stream ({reason}); it is truncated, damaged or of another "
            "format: make or fetch it again"
        )

    def batch(self, number: int) -> pa.RecordBatch:
        """Record batch `number`, on the mapped memory."""
        source = pa.BufferReader(self._buffer)
        source.seek(self._positions[number])
        return pa.ipc.read_record_batch(pa.ipc.read_message(source), self._schema)

    def batch_of(self, row: int) -> int:
        """Number of the batch that holds `row`."""
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def _map(self) -> pa.Buffer:
        # Python's map, not pyarrow's: the latter asks the kernel to read ahead whatever it slices, which on opening
        # would be the whole file.
        if require_file(self.path) == 0:
            raise self.refused("the file is empty")
        with open(self.path, "rb") as file:
            try:
                return pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            except (OSError, ValueError) as error:
                raise self.refused(error) from None

    def _walk(self, full: bool) -> tuple[pa.Schema, list[int], list[int]]:
        source = pa.BufferReader(self._buffer)
        messages = pa.MessageReader.open_stream(source)
        try:
            first = messages.read_next_message()
        except StopIteration:
            raise ValueError("it ends before its schema") from None
        if first.type != "schema":
            raise ValueError("it does not begin with a schema")
        if _header_field(first.metadata, 0, "<h"):
            raise ValueError("its numbers are big-endian")
        schema = pa.ipc.read_schema(first)
        positions, counts = [], []
        while True:
            position = source.tell()
            try:
                message = messages.read_next_message()
            except StopIteration:
                break
            if message.type != "record batch":
                raise ValueError(f"it holds a message of type {message.type}")
            # A compressed buffer says itself how large it unpacks: nothing to map, and any amount of memory to ask for.
            if _header_field(message.metadata, 3, "<I") is not None:
                raise ValueError("its buffers are compressed, expected an uncompressed stream")
            batch = pa.ipc.read_record_batch(message, schema)
            batch.validate(full=full)
            positions.append(position)
            counts.append(batch.num_rows)
        # A stream that a killed writer left may end at a batch, but without the mark.
        if self._buffer.size - position > 8 or self._buffer.slice(position).to_pybytes() not in _END_MARKS:
            raise ValueError("it does not end with the end-of-stream mark")
        return schema, positions, counts


def is_list(kind: pa.DataType, values: Sequence[pa.DataType]) -> bool:
    """Whether a column type is a list of any length of one of the `values` types."""
    return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and kind.value_type in values


def is_scalar(kind: pa.DataType, values: Sequence[pa.DataType]) -> bool:
    """Whether a column type is one of the `values` types, plain or as lists of fixed length 1."""
    if pa.types.is_fixed_size_list(kind):
        return kind.list_size == 1 and kind.value_type in values
    return kind in values


def _flat(array: pa.Array, what: str) -> np.ndarray:
    if array.null_count:
        raise ValueError(f"column {what} holds nulls")
    dtype = np.dtype(_NUMPY_TYPES[array.type])
    buffer = array.buffers()[1]
    if len(array) == 0 or buffer is None:
        if len(array):
            raise ValueError(f"column {what} has no values")
        return np.empty(0, dtype)
    return np.frombuffer(buffer, dtype, len(array), array.offset * dtype.itemsize)


def scalar_view(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """(n,) view of a column of one number per row. Raises ValueError for nulls and missing bytes, as all views do."""
    array = batch.column(name)
    if not pa.types.is_fixed_size_list(array.type):
        return _flat(array, name)
    return matrix_view(batch, name, 1)[:, 0]


def matrix_view(batch: pa.RecordBatch, name: str, width: int) -> np.ndarray:
    """(n, width) view of a column of lists that are all `width` long, of fixed size or not."""
    array = batch.column(name)
    rows = len(array)
    if pa.types.is_fixed_size_list(array.type):
        if array.null_count:
            raise ValueError(f"column {name} holds nulls")
        first, values = array.offset * width, _flat(array.values, name)
    else:
        offsets, values = ragged_view(batch, name)
        first, steps = int(offsets[0]), np.diff(offsets)
        if first < 0 or (rows and not (steps.min() == steps.max() == width)):
            raise ValueError(f"column {name} does not hold {width} numbers in every row")
    return values[first : first + rows * width].reshape(rows, width)


def ragged_view(batch: pa.RecordBatch, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(offsets (n + 1,), values) views of a list column. The offsets are the file's, unchecked: see `entries`."""
    array = batch.column(name)
    if array.null_count:
        raise ValueError(f"column {name} holds nulls")
    values = _flat(array.values, name)
    if len(array) == 0:
        return np.zeros(1, np.int64), values
    dtype = np.dtype(np.int64 if pa.types.is_large_list(array.type) else np.int32)
    return np.frombuffer(array.buffers()[1], dtype, len(array) + 1, array.offset * dtype.itemsize), values


def entries(
    offsets: np.ndarray, values: np.ndarray, first: int, last: int, counts: np.ndarray, name: str
) -> np.ndarray:
    """View of the entries of rows [first, last) of a list column. Raises ValueError unless row i has counts[i]."""
    begin, end = int(offsets[first]), int(offsets[last])
    if len(counts) and counts.min() < 0:
        raise ValueError("a row has a negative number of entries")
    if (
        not 0 <= begin <= end <= len(values)
        # in 64 bits: differences of hostile 32-bit offsets can wrap around
        or int(counts.sum(dtype=np.int64)) != end - begin
        or not np.array_equal(np.diff(offsets[first : last + 1]), counts)
    ):
        raise ValueError(f"the list lengths of {name} are not the numbers of entries recorded")
    return values[begin:end]


def as_int32(values: np.ndarray, name: str) -> np.ndarray:
    """Integers as int32: a view where they are, else a copy. Raises ValueError where one does not fit."""
    if values.dtype == np.int32:
        return values
    limits = np.iinfo(np.int32)
    if len(values) and (values.min() < limits.min or values.max() > limits.max):
        raise ValueError(f"column {name} holds numbers beyond int32")
    return values.astype(np.int32)
