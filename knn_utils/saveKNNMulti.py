"""Datastore and index in, kNN targets out: for each row, the distribution over next tokens of its nearest neighbours
(paper, section 3), which the memory learns.

Each process writes its own parts of one folder: threads search and aggregate blocks of rows, the main thread writes them.
An interrupted run continues. The files do not depend on the number of threads or processes.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from knn_utils.datastore import Datastore, TargetRows, targets_schema
from knn_utils.distribution import aggregate, drop_own_row, hit_tokens
from knn_utils.parts import targets_batch, write_stream
from knn_utils.search import BLOCK_ROWS, load_values, map_in_order, open_searcher
from utils.artefact import Made, Making, begin, require
from utils.cli import command, flag, note_unused, parse, required, say
from utils.errors import InputError, check_positive
from utils.results import chosen

BATCH_ROWS = 4096  # of a record batch; also what a GPU searches at least at once
PARTS, LARGEST_PART, MOST_PARTS = 8, 4096, 4096


@dataclass
class TargetArguments:
    """Flags of saveKNNMulti."""

    dstore_path: str = required("datastore of the queries: the rows that get targets")
    index_path: str = required("index to search, made by build_index")
    output_path: str = required("folder where the kNN targets are written")
    val_path: str | None = flag(
        None, "values of the indexed rows: their datastore or .npy; default: the datastore of the queries was indexed"
    )
    model_path: str | None = flag(None, "ignored, the base model is not needed")
    k: int = flag(1024, "neighbours per query")
    knn_temp: float = flag(1.0, "temperature of the distribution")
    choose_on: str | None = flag(None, "results.json of train_base --knn on validation text: use its best temperature")
    threshold: float = flag(1e-8, "drop probabilities up to this")
    probe: int = flag(32, "inverted lists searched per query")
    batch_size: int = flag(32, "queries that a GPU searches at once, at least 4096; a CPU searches 256")
    ignore_first: bool = flag(
        False, "leave out the query itself, or the first hit of a query from another datastore: k-1 hits remain"
    )
    knn_gpu: bool = flag(False, "search on the GPU where FAISS sees one")
    overwrite: bool = flag(False, "replace existing targets")


@command
def main() -> None:
    """Entry point of `python -m knn_utils.saveKNNMulti`."""
    (arguments,) = parse(TargetArguments, description="Search the kNN distribution of every datastore row.")
    note_unused(("model_path",), "here: hidden states and values come from files")
    check_positive("--knn_temp", arguments.knn_temp)
    if not 0 <= arguments.threshold < 1:
        raise InputError(f"--threshold {arguments.threshold:g}: expected a probability from 0 to below 1")
    from accelerate import PartialState

    state, started = PartialState(), time.perf_counter()
    search = TargetSearch(arguments)
    made = search.record()
    making = begin(arguments.output_path, made, overwrite=arguments.overwrite, state=state)
    if not making.done:
        write_parts(search, making)
    making.finish()
    done = "complete, nothing to do" if making.done else f"{time.perf_counter() - started:.1f} s"
    say(f"kNN targets {arguments.output_path}: {made.rows} rows, temperature {search.knn_temp:g}, {done}")


class TargetSearch:
    """Queries (a datastore), index and values of its rows, int32 (rows,), checked to belong together.

    `are_indexed`: whether the queries are the indexed rows themselves. Raises InputError.
    """

    def __init__(self, arguments: TargetArguments) -> None:
        self.arguments = arguments
        self.knn_temp = chosen(arguments.choose_on, knn=True)[1][0] if arguments.choose_on else arguments.knn_temp
        self.queries, val_path = Datastore.open(arguments.dstore_path), arguments.val_path or arguments.dstore_path
        self.searcher = open_searcher(arguments.index_path, val_path, probe=arguments.probe, gpu=arguments.knn_gpu)
        self.searcher.check_width(arguments.dstore_path, self.queries.dim)
        self.searcher.check_k(arguments.k)
        queries, index = self.queries.made, self.searcher.made
        if queries and index:
            names = {"base": queries.made_from.get("base"), "layer_position": queries.settings.get("layer_position")}
            require(arguments.index_path, index, **names)
            self.are_indexed = queries.id == index.made_from["datastore"]
        else:
            same_path = Path(val_path).resolve() == Path(arguments.dstore_path).resolve()
            self.are_indexed = same_path or np.array_equal(load_values(val_path), self.queries.vals())

    @functools.cached_property
    def values(self) -> np.ndarray:
        """The values of the indexed rows, which are read only when there are targets to make."""
        return load_values(self.arguments.val_path or self.arguments.dstore_path)

    def record(self) -> Made:
        """The record of the targets."""
        queries, index = self.queries.made or Made("datastore"), self.searcher.made
        settings = {name: getattr(self.arguments, name) for name in ("k", "threshold", "ignore_first", "probe")}
        settings |= {name: queries.settings.get(name) for name in ("subset", "layer_position", "vocab_size")}
        settings |= {"knn_temp": self.knn_temp, "part_rows": part_rows(self.queries.rows)}
        made_from = {name: queries.made_from.get(name) for name in ("base", "windows")}
        made_from |= {"datastore": self.queries.made and queries.id, "index": index and index.id}
        return Made("knn_targets", settings, self.queries.rows, made_from)

    def targets(self, block: tuple[int, int]) -> tuple[np.ndarray, ...]:
        """Columns of `TargetRows` for the queries of the rows [start, stop)."""
        queries, arguments = self.queries, self.arguments
        distances, ids = self.searcher.search(queries.keys(*block), arguments.k, queries.path, block[0])  # (rows, k)
        if arguments.ignore_first and self.are_indexed:
            drop_own_row(ids, np.arange(*block))
        elif arguments.ignore_first:
            ids[:, 0] = -1
        tokens = hit_tokens(ids, self.values)
        found = aggregate(distances, tokens, knn_temp=self.knn_temp, threshold=arguments.threshold)
        return found.id_cnt, found.token_id, found.prob, np.ascontiguousarray(queries.vals(*block)), found.distance


def part_rows(rows: int) -> int:
    """Rows of each part, from the number of rows alone: a small datastore has several parts, a large one at most 4096."""
    wanted = max(min(math.ceil(rows / PARTS), LARGEST_PART), math.ceil(rows / MOST_PARTS))
    return math.ceil(wanted / BLOCK_ROWS) * BLOCK_ROWS


def write_parts(search: TargetSearch, making: Making) -> None:
    """Write the parts that this process has to make; threads search ahead of it, also into the next parts."""
    import faiss

    rows, length, on_gpu = search.queries.rows, making.made.settings["part_rows"], search.searcher.on_gpu
    block_rows = max(search.arguments.batch_size, BATCH_ROWS) if on_gpu else BLOCK_ROWS
    parts = {}  # blocks [start, stop) of rows
    for number in making.own_parts(math.ceil(rows / length)):
        end = min((number + 1) * length, rows)
        parts[number] = [(row, min(row + block_rows, end)) for row in range(number * length, end, block_rows)]
    # With a GPU one thread searches while another aggregates.
    threads = max(faiss.omp_get_max_threads(), 2 if on_gpu else 1)
    found = map_in_order(search.targets, itertools.chain(*parts.values()), threads)
    total = sum(stop - start for blocks in parts.values() for start, stop in blocks)
    quiet = None if making.state.is_main_process else True
    with tqdm(desc="kNN", total=total, unit="row", unit_scale=True, disable=quiet) as bar:
        for number, blocks in parts.items():
            batches = record_batches(itertools.islice(found, len(blocks)), max(BATCH_ROWS // block_rows, 1), bar)
            write_stream(making.part(number), targets_schema(), batches)


def record_batches(blocks: Iterator[tuple[np.ndarray, ...]], count: int, bar: Any) -> Iterator[Any]:
    """Record batches of the columns of `count` blocks each; `bar` shows the rows that are done."""
    while group := list(itertools.islice(blocks, count)):
        rows = TargetRows(*map(np.concatenate, zip(*group, strict=True)))
        yield targets_batch(rows)
        bar.update(len(rows.id_cnt))


if __name__ == "__main__":
    main()
