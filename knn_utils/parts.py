"""Writing datastores and kNN targets: record batches on NumPy's own memory, and the Arrow streams that hold them."""

from __future__ import annotations

import os
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from knn_utils.datastore import TargetRows, datastore_schema, targets_schema
from utils.files import atomic


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
        raise ValueError(f"id_cnt: sums to {offsets[-1]}, there are {entries} entries; expected as many, below 2^31")
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


def write_stream(path: str | os.PathLike, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
    """Write record batches, in row order, as the Arrow IPC stream `path`; returns the number of rows.

    The file is complete or not there. A batch's arrays may change when the next one is asked for.
    """
    rows = 0
    with atomic(path) as temporary, pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        for batch in batches:
            stream.write_batch(batch)
            rows += batch.num_rows
    return rows
