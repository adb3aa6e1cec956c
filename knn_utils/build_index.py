"""Datastore in, FAISS index out: trained once, then filled, over squared L2 distances (by default the original's IVFPQ;
any FAISS factory string with --index_factory).

Rank 0 trains. Then the processes fill parts of --num_keys_to_add_at_a_time rows each, in the work folder
`X.index.building`, and rank 0 merges them into the one file X.index. An interrupted build continues with the parts that
are missing. Beside the index are the values of its rows, `{subset}_vals.npy`, and its record, `X.index.made.json`.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from knn_utils.datastore import Datastore
from knn_utils.search import (
    check_faiss,
    faiss_reason,
    finite_keys,
    has_gpu,
    inverted_lists,
    lists_path,
    read_faiss,
    set_probe,
    to_gpu,
    write_faiss,
)
from utils.artefact import BEGUN, Made, Making, begin, read_made, record_path
from utils.cli import command, flag, parse, required, say
from utils.errors import InputError, check_at_least
from utils.files import atomic, ensure_folder, remove

SAMPLE_ROWS, SAMPLE_RUNS = 1_000_000, 1_000
BLOCK_BYTES = 64 << 20  # of float32 keys that are converted at once
# FAISS asks for at least 39 training points per centroid, and beyond 256 draws a sample of its own.
MIN_POINTS, MAX_POINTS = 39, 256
MEMORY_SHARE = 0.5  # that parts may take when they are merged
TRIED_KEYS, TOLERANCE = 256, 0.25  # of `has_l2_distances`


@dataclass
class BuildArguments:
    """Flags of build_index."""

    dstore_path: str = required("datastore whose keys are indexed: a folder or an Arrow stream of train_base")
    index_path: str | None = flag(None, "the index to write; default {subset}_{dim}.index beside the datastore")
    ncentroids: int = flag(4096, "inverted lists; lowered to what the number of rows supports")
    code_size: int = flag(32, "bytes of a compressed key (sub-quantizers of 8 bits); must divide the keys' width")
    probe: int = flag(8, "inverted lists searched per query, unless a search sets another number")
    index_factory: str | None = flag(
        None, "FAISS factory string, replaces --ncentroids and --code_size: Flat, IVF512,Flat, IVF4096,PQ64, …"
    )
    num_keys_to_add_at_a_time: int = flag(1_000_000, "keys that a process adds before it saves them as a part")
    seed: int = flag(42, "seed of the training sample and of the clustering")
    knn_gpu: bool = flag(False, "train and add on the GPU where FAISS sees one")
    overwrite: bool = flag(False, "replace an existing index")


@command
def main() -> None:
    """Entry point of `python -m knn_utils.build_index`."""
    (arguments,) = parse(BuildArguments, description="Build a FAISS index over the keys of a datastore.")
    check_at_least(1, arguments, "num_keys_to_add_at_a_time", "probe", "ncentroids", "code_size")
    check_at_least(0, arguments, "seed")
    check_faiss()
    from accelerate import PartialState

    build(arguments, Datastore.open(arguments.dstore_path), PartialState())


def build(arguments: BuildArguments, datastore: Any, state: Any) -> None:
    """Build the index and write the values, on all processes of accelerate's `state`, unless they are complete.

    Raises InputError if there is another index, if FAISS cannot build this one, or if a key is not finite.
    """
    started = time.perf_counter()
    path, values_path = default_names(Path(arguments.dstore_path), arguments.index_path)
    wanted = arguments.index_factory or f"IVF{arguments.ncentroids},PQ{arguments.code_size}"
    factory = supported(wanted, datastore.rows)
    make_index(factory, datastore.dim, arguments.seed)  # an unknown factory is refused before anything is written
    if factory != wanted:
        say(f"{factory} instead of {wanted}: {datastore.rows} rows cannot train more centroids")
    made, work = index_record(datastore, factory, arguments.seed), path.with_name(f"{path.name}.building")
    begun = read_made(path, BEGUN)
    making = begin(path, made, overwrite=arguments.overwrite, state=state)
    with contextlib.closing(making):
        if state.is_main_process and (making.done or begun is None or begun.text != made.text):
            remove(work)
        try:
            if not making.done:
                if state.is_main_process and not arguments.overwrite:
                    check_values(datastore, values_path)
                if not path.exists():
                    build_parts(arguments, datastore, factory, path, work, state)
        except InputError:
            if state.is_main_process:  # wrong input cannot be continued
                remove(record_path(path, BEGUN))
                remove(work)
            raise
        if state.is_main_process and not (making.done and values_path.exists()):
            write_values(datastore, values_path)
        making.finish()
        if state.is_main_process:
            remove(work)
    done = "complete, nothing to do" if making.done else f"{time.perf_counter() - started:.1f} s"
    say(f"index {path}: {datastore.rows} rows of {datastore.dim}, {factory}, {path.stat().st_size} bytes, {done}")


def default_names(dstore_path: Path, index_path: str | None) -> tuple[Path, Path]:
    """(index, values): the original's `{subset}_{dim}.index` and our `{subset}_vals.npy` beside it.

    Subset and width are taken from the datastore's name `dstore_{model_type}_{subset}_{dim}.arrow`; a datastore of
    another form of name gives its whole name.
    """
    stem = dstore_path.name.removesuffix(".arrow")
    match = re.fullmatch(r"dstore_.+_(?P<subset>[^_]+)_(?P<dim>[0-9]+)", stem)
    subset, name = (match["subset"], f"{match['subset']}_{match['dim']}") if match else (stem, stem)
    index = Path(index_path) if index_path else dstore_path.parent / f"{name}.index"
    if index.suffix != ".index":
        raise InputError(f"--index_path {index}: expected a name that ends in .index")
    return index, index.parent / f"{subset}_vals.npy"


def index_record(datastore: Any, factory: str, seed: int) -> Made:
    """The record of the index of a datastore."""
    store = datastore.made or Made("datastore")
    settings = {"factory": factory, "seed": seed, "dim": datastore.dim}
    settings |= {name: store.settings.get(name) for name in ("layer_position", "subset")}
    made_from = {name: store.made_from.get(name) for name in ("base", "windows")}
    return Made("index", settings, datastore.rows, {"datastore": datastore.made and datastore.made.id, **made_from})


def build_parts(arguments: BuildArguments, datastore: Any, factory: str, path: Path, work: Path, state: Any) -> None:
    """Train, fill the parts that are missing (a collective call) and merge them into the file `path`."""
    import faiss

    trained, gpu = work / "trained.index", arguments.knn_gpu and has_gpu()
    if state.is_main_process and not trained.exists():
        say(f"training {factory} for {datastore.rows} rows of {datastore.dim}")
        ensure_folder(work)
        write_faiss(trained_index(factory, datastore, seed=arguments.seed, probe=arguments.probe, gpu=gpu), trained)
    state.wait_for_everyone()
    part_rows, empty = min(arguments.num_keys_to_add_at_a_time, datastore.rows), read_faiss(trained)
    try:
        empty.check_compatible_for_merge(empty)
        numbered = inverted_lists(empty) is not None
    except RuntimeError:  # such as HNSW: one process adds all rows
        numbered, part_rows = False, datastore.rows
    # In a folder named after their size, which may be another one when an interrupted build continues.
    parts = Making(ensure_folder(work / str(part_rows)), Made("parts"), False, state)
    count, block_rows = math.ceil(datastore.rows / part_rows), max(BLOCK_BYTES // (4 * datastore.dim), 1)
    for number in parts.own_parts(count, ".index"):
        start, stop = number * part_rows, min((number + 1) * part_rows, datastore.rows)
        index = to_gpu(read_faiss(trained)) if gpu else read_faiss(trained)
        for first in range(start, stop, block_rows):
            last = min(first + block_rows, stop)
            keys = finite_keys(datastore.keys(first, last), first, datastore.path)
            if numbered:
                index.add_with_ids(keys, np.arange(first, last))
            else:  # numbered by their order, also when merged
                index.add(keys)
        write_faiss(faiss.index_gpu_to_cpu(index) if gpu else index, parts.part(number, ".index"))
        say(f"added rows up to {stop} of {datastore.rows}")
    state.wait_for_everyone()
    if state.is_main_process:
        merge([parts.part(number, ".index") for number in range(count)], empty, path)


def merge(parts: list[Path], empty: Any, path: Path) -> None:
    """Merge index files into `path`, on disk if they take more than half of the memory."""
    import faiss
    from faiss.contrib.ondisk import merge_ondisk

    lists, size = lists_path(path), sum(part.stat().st_size for part in parts)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    remove(lists)  # of an index that was overwritten
    if len(parts) == 1:
        with atomic(path) as temporary:
            os.replace(parts[0], temporary)
    elif size > MEMORY_SHARE * memory and isinstance(inverted_lists(empty), faiss.ArrayInvertedLists):
        with atomic(lists) as temporary:
            merge_ondisk(empty, [str(part) for part in parts], str(temporary))
        inverted_lists(empty).filename = str(lists)
        write_faiss(empty, path)
    else:
        index = read_faiss(parts[0])
        for part in parts[1:]:
            index.merge_from(read_faiss(part), 0)
        write_faiss(index, path)


def check_values(datastore: Any, path: Path) -> None:
    """Raise InputError where the values at `path` belong to another index in the folder."""
    if path.exists() and not np.array_equal(np.load(path, mmap_mode="r"), datastore.vals()):
        raise InputError(f"{path}: holds the values of another datastore; choose another --index_path, or --overwrite")


def write_values(datastore: Any, path: Path) -> None:
    """Write the datastore's values to `path`: int32 (rows,) .npy, atomically."""
    with atomic(path) as temporary:
        # Memory-mapped, a million at a time: a datastore may have billions of rows.
        values = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.int32, shape=(datastore.rows,))
        for start in range(0, datastore.rows, 1 << 20):
            stop = min(start + (1 << 20), datastore.rows)
            values[start:stop] = datastore.vals(start, stop)


def supported(factory: str, rows: int) -> str:
    """The factory string with as many centroids as `rows` keys can train; Flat where they are too few for PQ."""
    bits = re.search(r"\bPQ[0-9]+(?:x([0-9]{1,2}))?", factory)  # 4 in PQ64x4, 8 in PQ64
    if bits and rows < 1 << int(bits[1] or 8) <= 1 << 16:
        return "Flat"
    most = max(rows // MIN_POINTS, 1)
    return re.sub(r"\bIVF([0-9]+)", lambda found: f"IVF{min(int(found[1]), most)}", factory)


def make_index(factory: str, dim: int, seed: int) -> Any:
    """An empty FAISS index. Raises InputError if FAISS cannot build it for this width."""
    import faiss

    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_L2)
    except Exception as error:
        text = f"FAISS cannot build it for keys of width {dim} ({faiss_reason(error)})"
        raise InputError(f"{factory}: {text}; see --code_size and --index_factory") from None
    ivf = faiss.try_extract_index_ivf(index)
    inner = faiss.downcast_index(ivf if ivf is not None else index)
    for trained in (ivf, getattr(inner, "pq", None)):
        if hasattr(trained, "cp"):
            trained.cp.seed = seed
            trained.cp.min_points_per_centroid = 1
    if hasattr(inner, "do_polysemous_training"):
        # It only renumbers the codebooks, for a kind of search not used here, and takes ten times as long.
        inner.do_polysemous_training = False
    return index


def trained_index(factory: str, datastore: Any, *, seed: int, probe: int, gpu: bool) -> Any:
    """An index trained on a sample of the datastore's keys, without rows. Raises InputError if FAISS cannot train it, add
    rows to it or save it, and if it measures other distances."""
    import faiss

    index = make_index(factory, datastore.dim, seed)
    try:
        if not index.is_trained:
            ivf = faiss.try_extract_index_ivf(index)
            centroids = max(256, 0 if ivf is None else ivf.nlist)
            sample = training_sample(datastore, min(SAMPLE_ROWS, MAX_POINTS * centroids), seed)
            index = to_gpu(index) if gpu else index
            index.train(sample)
            index = faiss.index_gpu_to_cpu(index) if gpu else index
        keys = finite_keys(datastore.keys(0, min(TRIED_KEYS, datastore.rows)), 0, datastore.path)
        if not has_l2_distances(index, keys):
            raise InputError(f"--index_factory {factory}: its distances are not squared L2 distances of the keys")
    except RuntimeError as error:
        raise InputError(f"--index_factory {factory}: FAISS cannot use it here ({faiss_reason(error)})") from None
    index.reset()
    set_probe(index, probe)
    return index


def has_l2_distances(index: Any, keys: np.ndarray) -> bool:
    """Whether a trained index, to which `keys` (n, dim) float32 are added, measures squared L2 distances.

    They are compared with the distances to the keys as the index stores them. The queries are affine combinations of
    stored keys, since an index may keep a subspace only (PCA). Raises RuntimeError if FAISS cannot add, save or search.
    """
    import faiss

    index.add(keys)
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        ivf.make_direct_map()  # needed to reconstruct a key by its row number
    stored = index.reconstruct_batch(np.arange(len(keys)))  # (n, dim)
    if ivf is not None:
        ivf.make_direct_map(False)
    queries = 2 * stored - np.roll(stored, 1, axis=0)
    saved = faiss.deserialize_index(faiss.serialize_index(index))
    set_probe(saved, len(keys) * 1000)
    distances, ids = saved.search(queries, 1)
    expected = ((queries - stored[ids[:, 0]]) ** 2).sum(axis=1)
    small = 1e-3 * (stored**2).mean() * stored.shape[1]  # rounding, where keys are equal
    return bool(np.isclose(distances[:, 0], expected, rtol=TOLERANCE, atol=small).mean() > 0.5)


def training_sample(datastore: Any, wanted: int, seed: int) -> np.ndarray:
    """Keys to train on, (n, dim) float32: all rows if they are at most `wanted`, else 1,000 contiguous runs.

    The runs begin at seeded random rows and do not overlap.
    """
    if datastore.rows <= wanted:
        return finite_keys(datastore.keys(), 0, datastore.path)
    length = wanted // SAMPLE_RUNS
    runs = np.random.default_rng(seed).choice(datastore.rows // length, SAMPLE_RUNS, replace=False)
    sample = np.empty((SAMPLE_RUNS, length, datastore.dim), np.float32)
    for number, start in enumerate((np.sort(runs) * length).tolist()):
        sample[number] = finite_keys(datastore.keys(start, start + length), start, datastore.path)
    return sample.reshape(-1, datastore.dim)


if __name__ == "__main__":
    main()
