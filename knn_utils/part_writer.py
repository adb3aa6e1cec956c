"""Writing one file of record batches while counting and hashing what is written.

Knows nothing of folders, plans or manifests.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa


class _HashedFile:
    """A binary file that keeps the number and the SHA-256 of the bytes written."""

    closed = False

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=1 << 20)
        self._digest = hashlib.sha256()
        self.bytes = 0

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self._digest.update(view)
        self._file.write(view)
        self.bytes += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


class PartWriter:
    """Writes the record batches of one part, in row order. `rows`: rows so far."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.rows = 0
        self._batch_bytes = 0
        self._file = _HashedFile(path)
        self._stream = pa.ipc.new_stream(self._file, schema)

    def write(self, batch: pa.RecordBatch) -> None:
        """Append a record batch of the output's schema; its arrays may change afterwards."""
        # Counted before it is written: where the disk is full, this batch says what a row takes.
        self.rows += batch.num_rows
        self._batch_bytes += batch.nbytes
        self._stream.write_batch(batch)

    @property
    def row_bytes(self) -> float:
        """Bytes that a row takes on average, by the batches so far."""
        return self._batch_bytes / max(self.rows, 1)

    def record(self, name: str) -> dict:
        """What the manifest keeps of the finished part."""
        return {"file": name, "rows": self.rows, "bytes": self._file.bytes, "sha256": self._file.hexdigest()}

    @contextlib.contextmanager
    def ending(self) -> Iterator[PartWriter]:
        """End the stream after the block, and close the file in any case."""
        try:
            yield self
            self._stream.close()
            self._file.flush()
        finally:
            # On a full disk closing fails too, for the reason of the failure that is on its way up.
            with contextlib.suppress(OSError):
                self._file.close()
