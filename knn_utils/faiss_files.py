"""Index files: which FAISS files make up an index, what they were made from, the values of their rows; GPUs.

An index is one FAISS file with a record `<name>.json` beside it, or a folder of shards (`shard-00000.index` …) with
the record `index.json` in it; shard s holds the datastore rows from `first_row` on, in order. A FAISS file without a
record, such as the original's, is read too.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import re
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np

from knn_utils.datastore import Datastore
from utils.cli import say, timeout
from utils.errors import InputError, one_line
from utils.files import atomic, read_json
from utils.loading import default_device
from utils.units import size_text

FORMAT = "mlpmemory-index"
FORMAT_VERSION = 1
RECORD_IN_FOLDER = "index.json"
TRAINED_NAME = "trained.index"
SAMPLED_ROWS = 256
SAMPLE_PREFIX = "rows-"
EDGE_BYTES = 1 << 20
# PyPI's FAISS with GPU code, and the compute capabilities that the code is for.
GPU_WHEEL = "faiss-gpu-cu12"
WHEEL_FROM, WHEEL_BELOW = (7, 0), (9, 0)
# Codes of so many bytes need half-precision tables to fit a GPU's shared memory.
LONG_CODE = 56
# Bytes of a GPU that FAISS works in beside an index, and some to spare.
GPU_SCRATCH = 3 << 30


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


def read_record(path: Path) -> dict[str, Any] | None:
    """The record of the index at `path`, or None when there is none. Raises InputError for one of another format."""
    source = record_path(path)
    if not source.is_file():
        return None
    record = read_json(source)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise InputError(f"{source}: is not the record of an index; build the index again with --overwrite")
    if record["format_version"] != FORMAT_VERSION:
        raise InputError(
            f"{source}: format version {record['format_version']}, this program reads {FORMAT_VERSION}; "
            "use the newer program"
        )
    return record


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
    shards = [Shard(folder / item["file"], item["first_row"], item["rows"], item["bytes"]) for item in record["shards"]]
    for shard in shards:
        if not shard.path.is_file():
            raise InputError(f"{shard.path}: no such file, but the index needs it; build the index again")
        size = shard.path.stat().st_size
        if size != shard.bytes:
            raise InputError(
                f"{shard.path}: {size} bytes, its record says {shard.bytes}: truncated or replaced; "
                "build the index again"
            )
    checksums = [item["sha256"] for item in record["shards"]]
    one = checksums[0] if len(checksums) == 1 else hashlib.sha256("".join(checksums).encode()).hexdigest()
    return IndexFiles(path, tuple(shards), one, record)


def _edges_fingerprint(path: Path) -> str:
    """Checksum of size, first and last bytes: an unrecorded index may be too large to read for this alone."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        digest.update(file.read(EDGE_BYTES))
        file.seek(max(size - EDGE_BYTES, 0))
        digest.update(file.read(EDGE_BYTES))
    return "edges-" + digest.hexdigest()


def rows_fingerprint(datastore: Any, rows: int | None = None) -> str:
    """What tells the first `rows` rows of a datastore from others, however they are stored: a checksum of some of
    them, spread evenly. It reads no more of a datastore of any size."""
    rows = datastore.rows if rows is None else rows
    digest = hashlib.sha256(f"{rows} {datastore.dim}".encode())
    sampled = np.unique(np.linspace(0, rows - 1, SAMPLED_ROWS).astype(np.int64))
    for row in sampled.tolist():
        digest.update(np.ascontiguousarray(datastore.vals(row, row + 1)))
    digest.update(np.ascontiguousarray(datastore.gather_keys(sampled)))
    return SAMPLE_PREFIX + digest.hexdigest()


def values_fingerprint(values: Any) -> str:
    """What tells values, (rows,) or in a datastore, from others: a checksum of some of them, spread evenly."""
    sampled = np.unique(np.linspace(0, len(values) - 1, SAMPLED_ROWS).astype(np.int64)).tolist()
    held = isinstance(values, Datastore)
    found = [int(values.vals(row, row + 1)[0] if held else values[row]) for row in sampled]
    return SAMPLE_PREFIX + hashlib.sha256(f"{len(values)} {found}".encode()).hexdigest()


def is_comparable(recorded: Any) -> bool:
    """Whether a recorded fingerprint is one of `rows_fingerprint`: earlier versions hashed every row."""
    return isinstance(recorded, str) and recorded.startswith(SAMPLE_PREFIX)


def same_rows(recorded: Any, datastore: Any, rows: int | None = None) -> bool:
    """Whether the first `rows` rows have the recorded fingerprint; True for one that cannot be compared."""
    return not is_comparable(recorded) or recorded == rows_fingerprint(datastore, rows)


def check_faiss() -> None:
    """Raise InputError unless FAISS, which comes with an extra, can be imported."""
    try:
        import faiss  # noqa: F401
    except ImportError as error:
        raise InputError(
            f'FAISS cannot be imported ({one_line(error, 160)}); install it with pip install ".[cpu]", on a machine '
            'with a GPU ".[gpu]" or conda (README.md, FAISS, CUDA and torch)'
        ) from None


def read_faiss(path: str | os.PathLike, *, memory_map: bool = False) -> Any:
    """A FAISS index from its file.

    With `memory_map` the inverted lists stay on disk and the page cache is shared by all processes of a machine;
    other parts are loaded.

    Raises:
        InputError: truncated, of another format, or not over squared L2.
    """
    import faiss

    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY if memory_map else 0)
    except Exception as error:
        raise InputError(
            f"{path}: not a whole FAISS index ({faiss_reason(error)}); it is truncated, damaged or of another format: "
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


def write_faiss(index: Any, path: Path) -> None:
    """Write a FAISS index to `path`, atomically. Raises OSError where FAISS cannot write."""
    import faiss

    try:
        with atomic(path) as temporary:
            faiss.write_index(index, str(temporary))
    except RuntimeError as error:
        number = errno.ENOSPC if "No space left" in str(error) else errno.EIO
        raise OSError(number, one_line(error, 200), str(path)) from None


def faiss_reason(error: Exception) -> str:
    """What FAISS says, without the names of its own functions and files."""
    text = one_line(error)
    return one_line(re.split(r"\.(?:cpp|h):[0-9]+: ", text)[-1].removeprefix("Error: "), 160)


def has_gpu() -> bool:
    """Whether the installed FAISS can work on this process's GPU, for `--knn_gpu`; says so where it cannot."""
    import faiss
    import torch

    if not faiss.get_num_gpus():
        why = (
            '; torch sees one: install a FAISS for GPUs (pip install ".[gpu]", or conda)'
            if torch.cuda.is_available()
            else ""
        )
        say(f"--knn_gpu: FAISS sees no GPU here, the CPU does the work{why}")
        return False
    device = default_device()
    if device.type == "cpu" or not any(distributions(name=GPU_WHEEL)):
        return True
    capability = torch.cuda.get_device_capability(device)
    if WHEEL_FROM <= capability < WHEEL_BELOW:
        return True
    # FAISS would end the process there, not raise.
    found = ".".join(map(str, capability))
    say(
        f"--knn_gpu: {GPU_WHEEL} has no code for a GPU of compute capability {found}, the CPU does the work; conda-forge's "
        "faiss-gpu has (conda env create -f environment.yml)"
    )
    return False


@functools.cache
def gpu_resources() -> Any:
    """FAISS's working memory on a GPU, one for the process."""
    import faiss

    return faiss.StandardGpuResources()


def to_gpu(index: Any, *, half_precision: bool = False) -> Any:
    """`index` on this process's GPU, where long codes are always looked up in half precision.

    Raises RuntimeError where FAISS cannot.
    """
    import faiss

    ivf = faiss.try_extract_index_ivf(index)
    ivf = None if ivf is None else faiss.downcast_index(ivf)
    options = faiss.GpuClonerOptions()
    options.useFloat16 = half_precision or (isinstance(ivf, faiss.IndexIVFPQ) and ivf.pq.code_size >= LONG_CODE)
    device = int(os.environ.get("LOCAL_RANK", "0")) % faiss.get_num_gpus()
    return faiss.index_cpu_to_gpu(gpu_resources(), device, index, options)


@functools.cache
def arrays_group() -> Any:
    """The group by which arrays travel between the processes of a run: gloo, whatever the GPUs talk by."""
    import torch.distributed as distributed

    return None if distributed.get_backend() == "gloo" else distributed.new_group(backend="gloo", timeout=timeout())


def everyone_has_room(files: IndexFiles, on_gpu: bool) -> bool:
    """Whether each process of the run can hold the whole index, which saves them the exchange of hits; says it."""
    import torch
    import torch.distributed as distributed

    size = sum(shard.path.stat().st_size for shard in files.shards)
    fits = torch.tensor(size <= room_for_index(on_gpu), dtype=torch.int32)
    distributed.all_reduce(fits, distributed.ReduceOp.MIN, group=arrays_group())
    how = "is whole in every process" if fits else "is divided among the processes"
    say(f"{files.path}: {size_text(size)} in {len(files.shards)} shards, {how}")
    return bool(fits)


def room_for_index(on_gpu: bool) -> float:
    """Bytes that an index may take: of what is free on this process's GPU, or half the memory of the machine, whose
    processes map the same pages. MLPMEM_INDEX_GB sets another number. Raises InputError."""
    if given := os.environ.get("MLPMEM_INDEX_GB"):
        if not re.fullmatch(r"[0-9]+\.?[0-9]*", given):
            raise InputError(f"MLPMEM_INDEX_GB {given}: expected a number of GB")
        return float(given) * 1e9
    if not on_gpu:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
    import torch

    on_one_card = -(-int(os.environ.get("LOCAL_WORLD_SIZE", "1")) // torch.cuda.device_count())
    return torch.cuda.mem_get_info(default_device())[0] / on_one_card - GPU_SCRATCH


def set_probe(index: Any, probe: int) -> None:
    """Set how many inverted lists a query visits, wherever in the index they are; nothing to set without lists."""
    import faiss

    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        ivf.nprobe = min(probe, ivf.nlist)


def load_values(path: str | os.PathLike) -> np.ndarray:
    """The values of the indexed datastore (`--val_path`): int32 (rows,), memory-mapped where possible.

    `path` is a .npy file, a datastore (file or folder), or a name ending in .pkl, which is never opened: it stands for
    the .npy beside it, or for the values in the datastore beside it. Raises InputError for anything else.
    """
    path = Path(path)
    npy = path.parent / f"{path.stem}.npy"
    if path.suffix == ".npy" or (path.suffix == ".pkl" and npy.is_file()):
        return _load_npy(npy)
    if path.suffix == ".pkl":  # beside dstore_{model_type}_{subset}_{dim}.arrow
        ending = f"_{path.stem.removesuffix('_vals')}"
        beside = path.parent.glob("dstore_*.arrow")
        found = [store for store in beside if store.stem.rpartition("_")[0].endswith(ending)]
        if len(found) != 1:
            raise InputError(
                f"{path}: pickles are not read, and {npy.name} is not beside it; "
                "name the .npy that build_index writes, or the indexed datastore"
            )
        path = found[0]
    return Datastore.open(path).vals()


def _load_npy(path: Path) -> np.ndarray:
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
        if values.dtype.kind not in "iu" or not values.size or values.shape not in ((values.size,), (values.size, 1)):
            raise ValueError(f"{values.dtype} {values.shape}, expected whole numbers (rows,)")
        if values.dtype != np.int32 and (values.min() < 0 or values.max() > np.iinfo(np.int32).max):
            raise ValueError("it holds numbers beyond int32")
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: not the values of a datastore ({error}); build the index again") from None
    return values.reshape(-1).astype(np.int32, copy=False)
