"""Index files: which FAISS files make up an index, what they were made from, and reading them without surprises.

An index is one FAISS file with a record `<name>.json` beside it, or a folder of shards (`shard-00000.index` …) with
the record `index.json` in it; shard s holds the datastore rows from `first_row` on, in order. A FAISS file without a
record is read too. Knows nothing of queries, k or temperatures.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import InputError, one_line
from utils.files import read_json

FORMAT = "mlpmemory-index"
FORMAT_VERSION = 1
SHARD_NAME = re.compile(r"[^/\0]*\.index")
RECORD_IN_FOLDER = "index.json"
TRAINED_NAME = "trained.index"
SAMPLED_KEYS = 1024
EDGE_BYTES = 1 << 20


@dataclass(frozen=True)
class Shard:
    """One FAISS file: rows [first_row, first_row + rows) of the datastore. Unrecorded numbers are None."""

    path: Path
    first_row: int = 0
    rows: int | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class IndexFiles:
    """An index on disk. `record` is None for a FAISS file that nothing describes; `fingerprint` tells indexes apart."""

    path: Path
    shards: tuple[Shard, ...]
    fingerprint: str
    record: dict[str, Any] | None = None


def record_path(path: Path) -> Path:
    """Where the record of the index at `path` is kept."""
    return path / RECORD_IN_FOLDER if path.is_dir() else path.with_name(path.name + ".json")


def shard_name(number: int) -> str:
    """File name of shard `number` in an index folder."""
    return f"shard-{number:05d}.index"


def read_record(path: str | os.PathLike) -> dict[str, Any] | None:
    """The checked record of the index at `path`, or None when there is none. Raises InputError for a damaged one."""
    path = Path(path)
    source = record_path(path)
    if not source.is_file():
        return None

    def refuse(what: str) -> InputError:
        return InputError(f"{source}: {what}; the record is damaged, build the index again with --overwrite")

    record = read_json(source)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise refuse(f"is not the record of an index (no format {FORMAT!r})")
    if record.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{source}: format version {one_line(record.get('format_version'), 40)}, this program reads "
            f"{FORMAT_VERSION}; use the newer program"
        )
    if not all(isinstance(record.get(key), dict) for key in ("settings", "datastore")):
        raise refuse("'settings' or 'datastore' is missing")
    if not (isinstance(record.get("factory"), str) and isinstance(record["datastore"].get("settings", {}), dict)):
        raise refuse("'factory' or the datastore's 'settings' are of the wrong type")
    if not (_is_count(record.get("dim")) and record["dim"] > 0 and isinstance(record.get("shards"), list)):
        raise refuse("'dim' or 'shards' is missing")
    row = 0
    for shard in record["shards"]:
        if not isinstance(shard, dict) or not all(_is_count(shard.get(key)) for key in ("first_row", "rows", "bytes")):
            raise refuse("a shard lacks its numbers")
        name = shard.get("file")
        if not isinstance(name, str) or not SHARD_NAME.fullmatch(name) or name != os.path.basename(name):
            raise refuse(f"shard file {one_line(name, 80)!r}, expected a plain name ending in .index")
        if not isinstance(shard.get("sha256"), str) or not re.fullmatch(r"[0-9a-f]{64}", shard["sha256"]):
            raise refuse(f"shard {name} has no SHA-256")
        if shard["first_row"] != row:
            raise refuse(f"shard {name} begins at row {shard['first_row']}, expected {row}")
        row += shard["rows"]
    if record.get("rows") != row or not row:
        raise refuse(f"{one_line(record.get('rows'), 40)} rows do not equal the sum of the shards, {row}")
    return record


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def find_index(path: str | os.PathLike) -> IndexFiles:
    """The files of the index at `path`. Raises InputError when one is missing or its size is not the recorded one."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such index; build it with python -m knn_utils.build_index")
    record = read_record(path)
    if record is None:
        if path.is_dir():
            raise InputError(f"{path}: is a folder without {RECORD_IN_FOLDER}, expected an index; build it again")
        return IndexFiles(path, (Shard(path),), _edges_fingerprint(path))
    folder = path if path.is_dir() else path.parent
    if not path.is_dir() and [shard["file"] for shard in record["shards"]] != [path.name]:
        raise InputError(f"{record_path(path)}: describes another file than {path.name}; build the index again")
    shards = tuple(
        Shard(folder / shard["file"], shard["first_row"], shard["rows"], shard["bytes"]) for shard in record["shards"]
    )
    for shard in shards:
        if not shard.path.is_file():
            raise InputError(f"{shard.path}: no such file, but the index needs it; build the index again")
        size = shard.path.stat().st_size
        if size != shard.bytes:
            raise InputError(
                f"{shard.path}: {size} bytes, its record says {shard.bytes}: truncated or replaced; "
                "build the index again"
            )
    return IndexFiles(path, shards, record_fingerprint(record), record)


def record_fingerprint(record: dict[str, Any]) -> str:
    """One checksum for all shards of a recorded index."""
    if len(record["shards"]) == 1:
        return record["shards"][0]["sha256"]
    return hashlib.sha256("".join(shard["sha256"] for shard in record["shards"]).encode()).hexdigest()


def _edges_fingerprint(path: Path) -> str:
    """Checksum of size, first and last bytes: an unrecorded index may be too large to read for this alone."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        digest.update(file.read(EDGE_BYTES))
        file.seek(max(size - EDGE_BYTES, 0))
        digest.update(file.read(EDGE_BYTES))
    return "edges-" + digest.hexdigest()


def read_faiss(path: str | os.PathLike, *, memory_map: bool = False) -> Any:
    """A FAISS index from its file.

    With `memory_map` the inverted lists stay on disk and the page cache is shared by all processes of a machine;
    other parts are loaded.

    Raises:
        InputError: truncated, of another format, or not over squared L2.
    """
    import faiss

    path = Path(path)
    size = path.stat().st_size
    try:
        if hasattr(faiss, "set_deserialization_vector_byte_limit"):
            # No vector can be longer than its file (tables that FAISS computes have their own limit, 2 GiB): a
            # damaged length asks for no memory.
            faiss.set_deserialization_vector_byte_limit(size + (2 << 30))
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY if memory_map else 0)
    except Exception as error:
        reason = faiss_reason(error)
        raise InputError(
            f"{path}: not a whole FAISS index ({reason}); it is truncated, damaged or of another format: "
            "build it again with python -m knn_utils.build_index"
        ) from None
    if index.metric_type != faiss.METRIC_L2:
        raise InputError(f"{path}: is not an index over squared L2 distances; build it with knn_utils.build_index")
    ivf = faiss.try_extract_index_ivf(index) if memory_map else None
    lists = faiss.downcast_InvertedLists(ivf.invlists) if ivf is not None else None
    if isinstance(lists, faiss.OnDiskInvertedLists):
        # Otherwise each search starts 32 threads that touch pages ahead of the scan.
        lists.prefetch_nthread = 0
    return index


def faiss_reason(error: Exception) -> str:
    """What FAISS says, without the names of its own functions and files."""
    text = one_line(error)
    return one_line(re.split(r"\.(?:cpp|h):[0-9]+: ", text)[-1].removeprefix("Error: "), 160)


def write_faiss(index: Any, path: str | os.PathLike) -> None:
    """Write a FAISS index to `path` (a temporary name of the caller's). Raises OSError where FAISS cannot write."""
    import errno

    import faiss

    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        number = errno.ENOSPC if "No space left" in str(error) else errno.EIO
        raise OSError(number, one_line(error, 200), str(path)) from None


def rows_fingerprint(datastore: Any, rows: int | None = None) -> str:
    """Checksum of the first `rows` rows of a datastore, however they are stored: all values and about 1,000 keys."""
    rows = datastore.rows if rows is None else rows
    digest = hashlib.sha256(f"{rows} {datastore.dim}".encode())
    for start in range(0, rows, 1 << 20):
        digest.update(np.ascontiguousarray(datastore.vals(start, min(start + (1 << 20), rows))))
    sampled = np.unique(np.linspace(0, rows - 1, min(rows, SAMPLED_KEYS)).astype(np.int64))
    digest.update(np.ascontiguousarray(datastore.gather_keys(sampled)))
    return digest.hexdigest()
