"""Datastore and index in, kNN targets out: for each row, the distribution over next tokens of its nearest neighbours
(paper, section 3), which the memory learns.

Threads search and aggregate blocks of rows, the main thread writes them; with several processes each writes its own
parts of the same folder. An interrupted run continues, a grown datastore gets targets for its new rows. The files do
not depend on the number of threads or processes. How hits become probabilities is in distribution.py, how they are
found in search.py.
"""

from __future__ import annotations

if __package__ in (None, ""):
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.cli import command, flag, note_unused, parse, required
from utils.errors import InputError, check_positive

# Rows of a part: small datastores get several parts, large ones at most so many.
LEAST_PART_ROWS, FEW_PARTS, SMALL_PART_ROWS, MOST_PARTS = 256, 8, 4096, 4096
# Rows that go into one record batch, so that readers find whole windows in one.
BATCH_ROWS = 4096
# What the targets take over from the datastore's settings.
RECORDED = ("model", "dataset", "subset", "layer_position", "vocab_size")
# Queries that a GPU searches at least at once.
GPU_BLOCK_ROWS = 4096


@dataclass
class TargetArguments:
    """Flags of saveKNNMulti."""

    dstore_path: str = required("datastore of the queries: the rows that get targets")
    index_path: str = required("index to search: a FAISS file, or a folder of shards, of build_index")
    output_path: str = required("where the kNN targets are written (a folder; with --single_file a file)")
    val_path: str | None = flag(
        None, "values of the indexed rows: their datastore or .npy; default: the queries' datastore is the indexed one"
    )
    model_path: str | None = flag(None, "of the original's command line; the base is not needed")
    k: int = flag(1024, "neighbours per query")
    knn_temp: float = flag(1.0, "temperature of the distribution")
    choose_on: str | None = flag(
        None, "take the temperature that was best in this results.json, of train_base --knn on validation text"
    )
    threshold: float = flag(1e-8, "entries with a probability up to this are left out")
    probe: int = flag(32, "inverted lists searched per query")
    batch_size: int = flag(32, "queries searched at once on a GPU (at least 4096 are); a CPU takes its own blocks")
    ignore_first: bool = flag(
        False, "leave out the query itself (in another datastore than its own: the first hit), so that k-1 remain"
    )
    knn_gpu: bool = flag(False, "search on the GPU where FAISS has one")
    part_rows: int | None = flag(None, "rows of a part of the output; default by the number of rows")
    single_file: bool = flag(False, "write one Arrow stream, as the original does, in place of a folder of parts")
    overwrite: bool = flag(False, "replace targets that are there")


@command
def main() -> None:
    """Entry point of `python -m knn_utils.saveKNNMulti`."""
    (arguments,) = parse(TargetArguments, description="Search the kNN distribution of every datastore row.")
    check_arguments(arguments)
    from accelerate import PartialState

    state = PartialState()
    if arguments.single_file and state.num_processes > 1:
        raise InputError("--single_file: is written by one process; run without accelerate launch")
    started = time.perf_counter()
    job = Job(arguments, (state.process_index, state.num_processes))
    rows = save_single_file(arguments, job) if arguments.single_file else save_parts(arguments, job, state)
    if state.is_main_process:
        done = f"k {arguments.k}, temperature {job.knn_temp:g}, {time.perf_counter() - started:.1f} s"
        done = done if rows else "complete; nothing to do"
        print(f"kNN targets {arguments.output_path}: {job.dstore.rows} rows, {done}", flush=True)


def check_arguments(arguments: TargetArguments) -> None:
    """Refuse what is wrong whatever the files are. Raises InputError."""
    note_unused(("model_path",), "here: hidden states and values come from the files")
    check_positive("--knn_temp", arguments.knn_temp)
    if not (math.isfinite(arguments.threshold) and 0 <= arguments.threshold < 1):
        raise InputError(f"--threshold {arguments.threshold:g}: expected a probability from 0 to below 1")
    for name in ("k", "probe", "batch_size", "part_rows"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: expected 1 or more")
    if arguments.k == 1 and arguments.ignore_first:
        raise InputError("--k 1: nothing is left with --ignore_first; give a larger --k")


class Job:
    """What a run works on: opened, and checked to belong together.

    Args:
        share: (process, processes): of a sharded index only this process's part is opened.

    Attributes:
        dstore: the queries; values: (indexed rows,) int32, or the datastore that holds them until `batches` needs
        them; searcher: the index; is_own: whether the queries are the indexed rows themselves; knn_temp: the
        temperature; settings: what makes the targets, for the manifest.

    Raises:
        InputError: the files do not belong together.
    """

    def __init__(self, arguments: TargetArguments, share: tuple[int, int]) -> None:
        import numpy as np

        from knn_utils.belonging import check_queries, check_values
        from knn_utils.datastore import Datastore
        from knn_utils.faiss_files import find_index, is_comparable, load_values, rows_fingerprint
        from knn_utils.search import KNNSearcher
        from utils.results import chosen

        self.arguments = arguments
        self.knn_temp = chosen(arguments.choose_on, knn=True)[1][0] if arguments.choose_on else arguments.knn_temp
        dstore, val_path = Datastore.open(arguments.dstore_path), arguments.val_path
        holds_keys = val_path is None or Path(val_path).suffix not in (".npy", ".pkl")
        values = Datastore.open(val_path or arguments.dstore_path) if holds_keys else load_values(val_path)
        fingerprint = rows_fingerprint(dstore)
        record = find_index(arguments.index_path).record or {"datastore": {}}
        recorded = record["datastore"].get("fingerprint")
        if is_comparable(recorded):
            self.is_own = recorded == fingerprint
        elif holds_keys:
            self.is_own = rows_fingerprint(values) == fingerprint
        else:
            self.is_own = len(values) == dstore.rows and np.array_equal(values, dstore.vals())
        self.searcher = KNNSearcher(
            arguments.index_path,
            probe=arguments.probe,
            gpu=arguments.knn_gpu,
            datastore=values if holds_keys else dstore if self.is_own else None,
            share=share,
        )
        if not holds_keys:
            check_values(self.searcher, values, f"--val_path {val_path}")
        self.searcher.check_width(arguments.dstore_path, dstore.dim)
        self.searcher.check_k(arguments.k)
        check_queries(self.searcher, arguments.dstore_path, dstore.settings)
        self.dstore, self.values, self._holds_keys = dstore, values, holds_keys
        index = {"fingerprint": self.searcher.fingerprint, "rows": self.searcher.rows, "factory": record.get("factory")}
        self.settings = {
            "k": arguments.k,
            "knn_temp": self.knn_temp,
            "threshold": arguments.threshold,
            "ignore_first": arguments.ignore_first,
            "probe": arguments.probe,
            "refine_factor": 0,  # as earlier versions recorded it, whose targets are continued
            "own_datastore": self.is_own,
            "index": index,
            "dstore": {"fingerprint": fingerprint, "rows": dstore.rows},
            "rows": dstore.rows,
            "dim": dstore.dim,
            **{name: dstore.settings.get(name) for name in RECORDED},
        }

    def targets(self, block: tuple[int, int], distances: Any, ids: Any) -> tuple[Any, ...]:
        """Fields of `TargetRows` for the datastore rows [start, stop) from their hits, (rows, k) each."""
        import numpy as np

        from knn_utils.distribution import aggregate, drop_own_row, hit_tokens

        if self.arguments.ignore_first and self.is_own:
            drop_own_row(ids, np.arange(*block))
        elif self.arguments.ignore_first:
            ids[:, 0] = -1
        tokens = hit_tokens(ids, self.values)
        found = aggregate(distances, tokens, knn_temp=self.knn_temp, threshold=self.arguments.threshold)
        return found.id_cnt, found.token_id, found.prob, np.ascontiguousarray(self.dstore.vals(*block)), found.distance

    def batches(self, parts: list[tuple[int, int]], bar: Any) -> Iterator[Iterator[Any]]:
        """For each row range in turn, its record batches; threads work on the ranges that follow meanwhile."""
        from knn_utils.block_search import search_blocks
        from knn_utils.search import BLOCK_ROWS

        if self._holds_keys:
            # Read only now that there is something to do.
            self.values = self.values.vals()
        on_gpu = self.searcher.on_gpu
        block_rows = max(self.arguments.batch_size, GPU_BLOCK_ROWS) if on_gpu else BLOCK_ROWS
        if self.searcher.share:  # a round's blocks, one of each process, are searched at once
            block_rows = max(block_rows // self.searcher.share[1], BLOCK_ROWS)
        found = search_blocks(self.searcher, self.dstore, parts, block_rows, self.arguments.k, self.targets)
        for first, last in parts:
            blocks = itertools.islice(found, math.ceil((last - first) / block_rows))
            yield joined(blocks, max(BATCH_ROWS // block_rows, 1), bar)
        # Where processes share an index, the others may still need this one's shards.
        for _ in found:
            raise AssertionError("more blocks than planned")


def joined(blocks: Iterator[tuple[Any, ...]], count: int, bar: Any) -> Iterator[Any]:
    """Record batches of `count` blocks of targets each."""
    import numpy as np

    from knn_utils.datastore import TargetRows
    from knn_utils.parts import targets_batch

    while group := list(itertools.islice(blocks, count)):
        rows = TargetRows(*(np.concatenate(column) for column in zip(*group, strict=True)))
        yield targets_batch(rows)
        bar.update(len(rows.id_cnt))


def parts_of(rows: int, part_rows: int | None, existing: list[int] | None = None) -> list[int]:
    """Rows of each part, from the number of rows alone: neither processes nor threads change the files."""
    from knn_utils.parts import plan_parts

    if part_rows is None:
        share = min(max(math.ceil(rows / FEW_PARTS), LEAST_PART_ROWS), SMALL_PART_ROWS)
        share = max(share, math.ceil(rows / MOST_PARTS))
        part_rows = math.ceil(share / LEAST_PART_ROWS) * LEAST_PART_ROWS
    return plan_parts(rows, part_rows, existing or ())


def planned(arguments: TargetArguments, job: Job) -> dict[str, Any]:
    """How the folder is to be written, given what is in it: `PartedOutput`'s part_rows, settings, extend, overwrite."""
    from knn_utils.faiss_files import is_comparable, same_rows
    from knn_utils.manifest import MANIFEST_NAME, plan_of, read_manifest

    folder, rows, settings = Path(arguments.output_path), job.dstore.rows, job.settings
    anew = {"part_rows": parts_of(rows, arguments.part_rows), "settings": settings, "overwrite": arguments.overwrite}
    if arguments.overwrite or not (folder / MANIFEST_NAME).is_file():
        return anew
    manifest = read_manifest(folder, "knn_targets")
    there, held = manifest["settings"], plan_of(manifest)
    if sum(held) == rows and not is_comparable(there["dstore"]["fingerprint"]):
        settings = settings | {"dstore": there["dstore"]}
    if sum(held) == rows:
        return {"part_rows": held, "settings": settings}
    if sum(held) < rows and same_rows(there["dstore"]["fingerprint"], job.dstore, sum(held)):
        return {"part_rows": parts_of(rows, arguments.part_rows, held), "settings": settings, "extend": True}
    return anew


def save_parts(arguments: TargetArguments, job: Job, state: Any) -> int:
    """Write the targets as a folder of parts; returns the number of rows, 0 where all were there."""
    from accelerate.utils import broadcast_object_list
    from tqdm import tqdm

    from knn_utils.datastore import targets_schema
    from knn_utils.parts import PartedOutput

    (plan,) = broadcast_object_list([planned(arguments, job) if state.is_main_process else None])
    output = PartedOutput(
        arguments.output_path,
        kind="knn_targets",
        schema=targets_schema(),
        info={name: getattr(arguments, name) for name in ("dstore_path", "index_path", "val_path", "choose_on")},
        growing=("rows", "dstore", "index"),
        process_index=state.process_index,
        num_processes=state.num_processes,
        wait_for_everyone=state.wait_for_everyone,
        **plan,
    )
    if output.complete:
        return 0
    mine = output.mine()
    ranges = [(output.row_start(number), output.row_start(number) + output.part_rows[number]) for number in mine]
    quiet = None if state.is_main_process else True
    with tqdm(total=sum(b - a for a, b in ranges), desc="kNN", unit="row", unit_scale=True, disable=quiet) as bar:
        for number, record_batches in zip(mine, job.batches(ranges, bar), strict=True):
            with output.write(number) as part:
                for batch in record_batches:
                    part.write(batch)
    return output.finish()["rows"]


def save_single_file(arguments: TargetArguments, job: Job) -> int:
    """Write the targets as one Arrow stream; returns the number of rows."""
    from tqdm import tqdm

    from knn_utils.datastore import targets_schema
    from knn_utils.parts import write_single_file

    path = Path(arguments.output_path)
    if path.exists() and not arguments.overwrite:
        raise InputError(f"{path}: is there already; give another --output_path, or --overwrite to replace it")
    with tqdm(total=job.dstore.rows, desc="kNN", unit="row", unit_scale=True, disable=None) as bar:
        return write_single_file(path, targets_schema(), next(job.batches([(0, job.dstore.rows)], bar)))


if __name__ == "__main__":
    main()
