"""Datastore and index in, kNN targets out: for each row, the distribution over next tokens of its nearest neighbours
(paper, section 3), which the memory learns.

Threads search and aggregate blocks of rows, the main thread writes them; with several processes each writes its own
parts of the same folder. An interrupted run continues, a grown datastore gets targets for its new rows. The files do
not depend on the number of threads or processes. How hits become probabilities is in aggregate.py, how they are
found in search.py.
"""

from __future__ import annotations

if __package__ in (None, ""):
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.cli import flag, note_unused, parse, required
from utils.errors import InputError, check_positive, command

# Rows of a part: small datastores get several parts, large ones at most so many.
LEAST_PART_ROWS, FEW_PARTS, SMALL_PART_ROWS, MOST_PARTS = 256, 8, 4096, 4096
# Rows that go into one record batch, so that readers find whole windows in one.
BATCH_ROWS = 4096
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
    knn_temp: str = flag("1.0", "temperature of the distribution, or auto: chosen by the kNN-LM's perplexity")
    threshold: float = flag(1e-8, "entries with a probability up to this are left out")
    probe: int = flag(32, "inverted lists searched per query")
    batch_size: int = flag(32, "queries searched at once on a GPU (at least 4096 are); a CPU takes its own blocks")
    ignore_first: bool = flag(
        False, "leave out the query itself (in another datastore than its own: the first hit), so that k-1 remain"
    )
    knn_gpu: bool = flag(False, "search on the GPU where FAISS has one")
    refine_factor: int = flag(0, "rank k times so many candidates by exact distance from the datastore's keys; 0: off")
    layer_position: int | None = flag(None, "refuse a datastore that was captured at another block")
    validation_dstore_path: str | None = flag(
        None, "for --knn_temp auto: datastore of validation text with log-probabilities (train_base --save_logprob)"
    )
    temperature_grid: list[float] = flag([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0], "temperatures to choose from")
    lmbda_grid: list[float] = flag([round(0.05 * step, 2) for step in range(1, 20)], "lambdas tried for each of them")
    max_validation_rows: int = flag(65536, "validation rows used for the choice, spread evenly")
    part_rows: int | None = flag(None, "rows of a part of the output; default by the number of rows")
    single_file: bool = flag(False, "write one Arrow stream, as the original does, in place of a folder of parts")
    refresh: bool = flag(False, "make all targets anew when datastore or index have changed, not only the new rows'")
    overwrite: bool = flag(False, "replace targets that are there")


@dataclass
class Job:
    """What a run works on, opened and checked."""

    dstore: Any
    values: Any
    searcher: Any
    fingerprint: str
    is_indexed: bool
    k: int
    ignore_first: bool
    threshold: float
    knn_temp: float = field(default=math.nan)

    def targets(self, block: tuple[int, int], distances: Any, ids: Any) -> Any:
        """`TargetRows` of the datastore rows [start, stop) from their hits, (rows, k) each."""
        import numpy as np

        from knn_utils.datastore import TargetRows
        from knn_utils.distribution import aggregate, drop_own_row, hit_tokens

        start, stop = block
        if self.ignore_first and self.is_indexed:
            drop_own_row(ids, np.arange(start, stop))
        elif self.ignore_first:
            ids[:, 0] = -1
        tokens = hit_tokens(ids, self.values)
        found = aggregate(distances, tokens, knn_temp=self.knn_temp, threshold=self.threshold)
        labels = np.ascontiguousarray(self.dstore.vals(start, stop))
        return TargetRows(found.id_cnt, found.token_id, found.prob, labels, found.distance)


@command
def main() -> None:
    """Entry point of `python -m knn_utils.saveKNNMulti`."""
    (arguments,) = parse(TargetArguments, description="Search the kNN distribution of every datastore row.")
    check_arguments(arguments)
    from datetime import timedelta

    from accelerate import PartialState

    state = PartialState(timeout=timedelta(days=7))
    if arguments.single_file and state.num_processes > 1:
        raise InputError("--single_file: is written by one process; run without accelerate launch, or leave it out")
    started = time.perf_counter()
    job = open_job(arguments, (state.process_index, state.num_processes))
    rows = save_single_file(arguments, job) if arguments.single_file else save_parts(arguments, job, state)
    if state.is_main_process and rows:
        seconds = time.perf_counter() - started
        print(
            f"kNN targets {arguments.output_path}: {rows} rows, k {job.k}, temperature {job.knn_temp:g}, {seconds:.1f} s",
            flush=True,
        )


def check_arguments(arguments: TargetArguments) -> None:
    """Refuse what is wrong whatever the files are. Raises InputError."""
    note_unused(("model_path",), "here: hidden states and values come from the files")
    if arguments.knn_temp != "auto":
        try:
            check_positive("--knn_temp", float(arguments.knn_temp))
        except InputError:
            raise
        except ValueError:
            raise InputError(f"--knn_temp {arguments.knn_temp}: expected a number above 0, or auto") from None
    elif not arguments.validation_dstore_path:
        raise InputError(
            "--knn_temp auto: needs --validation_dstore_path, a datastore of validation text with log-probabilities"
        )
    if not (math.isfinite(arguments.threshold) and 0 <= arguments.threshold < 1):
        raise InputError(f"--threshold {arguments.threshold:g}: expected a probability from 0 to below 1")
    for name in ("k", "probe", "batch_size", "max_validation_rows", "part_rows"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: expected 1 or more")
    if arguments.k == 1 and arguments.ignore_first:
        raise InputError("--k 1: nothing is left with --ignore_first; give a larger --k")


def open_job(arguments: TargetArguments, share: tuple[int, int]) -> Job:
    """Open datastore, values and (this process's share of) the index, and check that they belong together.

    Raises InputError where they do not.
    """
    from knn_utils.datastore import Datastore, load_values
    from knn_utils.faiss_files import rows_fingerprint
    from knn_utils.search import KNNSearcher
    from utils.made_with import check_layer

    dstore = Datastore.open(arguments.dstore_path)
    check_layer(dstore.settings, arguments.dstore_path, arguments.layer_position)
    fingerprint = rows_fingerprint(dstore)
    if arguments.val_path is None:
        values, indexed = dstore.vals(), dstore
    else:
        values = load_values(arguments.val_path)
        holds_keys = Path(arguments.val_path).suffix not in (".npy", ".pkl")
        indexed = Datastore.open(arguments.val_path) if holds_keys else None
        if indexed is None and same_values(values, dstore):
            indexed = dstore
    if arguments.refine_factor and indexed is None:
        raise InputError(
            f"--refine_factor: needs the indexed keys, but --val_path {arguments.val_path} holds values only; "
            "name the indexed datastore"
        )
    searcher = KNNSearcher(
        arguments.index_path,
        probe=arguments.probe,
        gpu=arguments.knn_gpu,
        refine_factor=arguments.refine_factor,
        datastore=indexed if arguments.refine_factor or arguments.val_path is None else None,
        share=share,
    )
    if len(values) != searcher.rows:
        raise InputError(
            f"--val_path {arguments.val_path}: holds {len(values)} values, but the index {arguments.index_path} has "
            f"{searcher.rows} rows; name the values of the indexed datastore"
        )
    if dstore.dim != searcher.dim:
        raise InputError(
            f"{arguments.dstore_path}: keys are {dstore.dim} wide, but the index {arguments.index_path} takes "
            f"{searcher.dim}; name the index of the same model"
        )
    searcher.check_k(arguments.k)
    is_indexed = indexed is not None and check_origin(arguments, searcher, indexed, dstore, fingerprint)
    return Job(
        dstore, values, searcher, fingerprint, is_indexed, arguments.k, arguments.ignore_first, arguments.threshold
    )


def same_values(values: Any, dstore: Any) -> bool:
    """Whether `values` are those of the datastore, row by row."""
    import numpy as np

    step = 1 << 20
    return len(values) == dstore.rows and all(
        np.array_equal(values[start : start + step], dstore.vals(start, min(start + step, dstore.rows)))
        for start in range(0, dstore.rows, step)
    )


def check_origin(arguments: TargetArguments, searcher: Any, indexed: Any, dstore: Any, fingerprint: str) -> bool:
    """Whether the queries are the indexed rows. Raises InputError where the index was built from other rows."""
    from knn_utils.faiss_files import rows_fingerprint

    own = fingerprint if indexed is dstore else rows_fingerprint(indexed)
    record = searcher.record
    if record is None:
        return own == fingerprint
    layers = [settings.get("layer_position") for settings in (record["datastore"].get("settings", {}), dstore.settings)]
    if None not in layers and layers[0] != layers[1]:
        raise InputError(
            f"{arguments.dstore_path}: holds hidden states of block {layers[1]}, but the index {arguments.index_path} "
            f"those of block {layers[0]}; name an index of the same --layer_position"
        )
    if record["datastore"].get("fingerprint") == own:
        return own == fingerprint
    if indexed is dstore and arguments.val_path is not None:
        # The same text seen by another model: its values fit, its keys are not the indexed ones.
        return False
    name = arguments.dstore_path if arguments.val_path is None else arguments.val_path
    raise InputError(
        f"{arguments.index_path}: was built from other rows than {name}; "
        "name the indexed datastore with --val_path, or build the index again"
    )


def plan_parts_of(rows: int, part_rows: int | None, existing: list[int] | None = None) -> list[int]:
    """Rows of each part, from the number of rows alone: neither processes nor threads change the files."""
    from knn_utils.manifest import plan_parts

    if part_rows is None:
        share = min(max(math.ceil(rows / FEW_PARTS), LEAST_PART_ROWS), SMALL_PART_ROWS)
        share = max(share, math.ceil(rows / MOST_PARTS))
        part_rows = math.ceil(share / LEAST_PART_ROWS) * LEAST_PART_ROWS
    return plan_parts(rows, part_rows, existing)


def batches(job: Job, parts: list[tuple[int, int]], batch_size: int, bar: Any) -> Iterator[Iterator[Any]]:
    """For each row range in turn, its record batches; threads work on the ranges that follow meanwhile."""
    from knn_utils.block_search import search_blocks
    from knn_utils.search import BLOCK_ROWS

    block_rows = max(batch_size, GPU_BLOCK_ROWS) if job.searcher.on_gpu else BLOCK_ROWS
    found = search_blocks(job.searcher, job.dstore, parts, block_rows, job.k, job.targets)
    for first, last in parts:
        yield joined(found, math.ceil((last - first) / block_rows), bar)
    # Where processes share an index, the others may still need this one's shards.
    for _ in found:
        raise AssertionError("more blocks than planned")


def joined(found: Iterator[Any], blocks: int, bar: Any) -> Iterator[Any]:
    """Record batches of the next `blocks` blocks, several blocks in each."""
    from knn_utils.datastore import targets_batch

    waiting: list[Any] = []
    for number in range(blocks):
        waiting.append(next(found))
        rows = sum(len(block.id_cnt) for block in waiting)
        if rows >= BATCH_ROWS or number == blocks - 1:
            yield targets_batch(concatenate(waiting))
            bar.update(rows)
            waiting = []


def concatenate(blocks: list[Any]) -> Any:
    """One `TargetRows` of several."""
    import numpy as np

    from knn_utils.datastore import TargetRows

    if len(blocks) == 1:
        return blocks[0]
    names = ("id_cnt", "token_id", "prob", "label", "distance")
    return TargetRows(*(np.concatenate([getattr(block, name) for block in blocks]) for name in names))


def save_parts(arguments: TargetArguments, job: Job, state: Any) -> int:
    """Write the targets as a folder of parts; returns the number of rows, 0 where all were there."""
    from accelerate.utils import broadcast_object_list
    from tqdm import tqdm

    from knn_utils.datastore import targets_schema
    from knn_utils.parts import PartedOutput

    found: list[Any] = [look(arguments, job) if state.is_main_process else None]
    broadcast_object_list(found)
    there = found[0]
    choice = there["choice"]
    if arguments.knn_temp == "auto" and choice is None:
        choice = choose(arguments, job)
    job.knn_temp = choice["knn_temp"] if choice else float(arguments.knn_temp)
    settings = target_settings(arguments, job)
    # Targets that grew hold rows of several states of the index, which their settings do not show.
    renew = (
        arguments.refresh and there["settings"] is not None and (there["has_grown"] or there["settings"] != settings)
    )
    anew = arguments.overwrite or renew or there["plan"] is None
    info = {name: getattr(arguments, name) for name in ("dstore_path", "index_path", "val_path")}
    output = PartedOutput(
        arguments.output_path,
        kind="knn_targets",
        settings=settings,
        part_rows=plan_parts_of(job.dstore.rows, arguments.part_rows) if anew else there["plan"],
        schema=targets_schema(),
        info=info | ({"knn_temp_choice": choice} if choice else {}),
        overwrite=arguments.overwrite or renew,
        extend=there["extend"] and not anew,
        growing=("rows", "dstore", "index"),
        process_index=state.process_index,
        num_processes=state.num_processes,
        wait_for_everyone=state.wait_for_everyone,
    )
    if output.complete:
        if state.is_main_process:
            print(f"kNN targets {arguments.output_path}: complete, {job.dstore.rows} rows; nothing to do", flush=True)
        return 0
    mine = output.mine()
    ranges = [(output.row_start(number), output.row_start(number) + output.part_rows[number]) for number in mine]
    quiet = None if state.is_main_process else True
    with tqdm(total=sum(b - a for a, b in ranges), desc="kNN", unit="row", unit_scale=True, disable=quiet) as bar:
        for number, record_batches in zip(mine, batches(job, ranges, arguments.batch_size, bar), strict=True):
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
    job.knn_temp = choose(arguments, job)["knn_temp"] if arguments.knn_temp == "auto" else float(arguments.knn_temp)
    with tqdm(total=job.dstore.rows, desc="kNN", unit="row", unit_scale=True, disable=None) as bar:
        stream = next(batches(job, [(0, job.dstore.rows)], arguments.batch_size, bar))
        return write_single_file(path, targets_schema(), stream)


def target_settings(arguments: TargetArguments, job: Job) -> dict[str, Any]:
    """What makes the targets what they are, for the manifest."""
    made_from = job.dstore.settings
    return {
        "k": job.k,
        "knn_temp": job.knn_temp,
        "threshold": job.threshold,
        "ignore_first": job.ignore_first,
        "probe": arguments.probe,
        "refine_factor": arguments.refine_factor,
        "own_datastore": job.is_indexed,
        "index": {
            "fingerprint": job.searcher.fingerprint,
            "rows": job.searcher.rows,
            "factory": job.searcher.record["factory"] if job.searcher.record else None,
        },
        "dstore": {"fingerprint": job.fingerprint, "rows": job.dstore.rows},
        "rows": job.dstore.rows,
        "dim": job.dstore.dim,
        **{name: made_from.get(name) for name in ("model", "dataset", "subset", "layer_position", "vocab_size")},
    }


def look(arguments: TargetArguments, job: Job) -> dict[str, Any]:
    """What is in the output folder and fits this run (main process).

    Returns {"plan": parts to go on with or None, "extend": whether they are more than those there, "choice": a
    temperature that was chosen before, "settings", "has_grown"}.
    """
    from knn_utils.faiss_files import rows_fingerprint
    from knn_utils.manifest import MANIFEST_NAME, plan_of, read_manifest

    folder = Path(arguments.output_path)
    there = {"plan": None, "extend": False, "choice": None, "settings": None, "has_grown": False}
    if not (folder / MANIFEST_NAME).is_file():
        return there
    manifest = read_manifest(folder, "knn_targets")
    settings, plan, rows = manifest["settings"], plan_of(manifest), job.dstore.rows
    there |= {"settings": settings, "has_grown": bool(manifest["history"])}
    if sum(plan) == rows:
        there["plan"] = plan
    elif 0 < sum(plan) < rows:
        recorded = settings.get("dstore")
        prefix = recorded.get("fingerprint") if isinstance(recorded, dict) else None
        if prefix == rows_fingerprint(job.dstore, sum(plan)):
            there |= {"plan": plan_parts_of(rows, arguments.part_rows, plan), "extend": True}
    made = manifest["info"].get("knn_temp_choice")
    if arguments.knn_temp == "auto" and isinstance(made, dict):
        # One temperature for all rows of an output: what was chosen for the first holds for the further ones.
        goes_on = there["extend"] and not (arguments.overwrite or arguments.refresh)
        if goes_on or made.get("request") == choice_request(arguments, job):
            chosen = made.get("knn_temp")
            if not isinstance(chosen, (int, float)) or isinstance(chosen, bool) or not 0 < chosen < 1e9:
                raise InputError(
                    f"{folder}: records no temperature that was chosen; --overwrite to make the targets anew"
                )
            there["choice"] = made | {"knn_temp": float(chosen)}
            print(f"kNN temperature {chosen:g}, chosen before", flush=True)
    return there


def choice_request(arguments: TargetArguments, job: Job) -> dict[str, Any]:
    """All that the choice of the temperature depends on."""
    from knn_utils.datastore import Datastore
    from knn_utils.faiss_files import rows_fingerprint

    return {
        "validation": rows_fingerprint(Datastore.open(arguments.validation_dstore_path)),
        "index": job.searcher.fingerprint,
        "k": job.k,
        "probe": arguments.probe,
        "refine_factor": arguments.refine_factor,
        "temperature_grid": list(arguments.temperature_grid),
        "lmbda_grid": list(arguments.lmbda_grid),
        "max_validation_rows": arguments.max_validation_rows,
    }


def choose(arguments: TargetArguments, job: Job) -> dict[str, Any]:
    """Choose the temperature on validation rows (a collective call); prints the table, returns it for the manifest."""
    from accelerate import PartialState

    from knn_utils.datastore import open_scored_datastore
    from knn_utils.temperature import choose_temperature

    validation = open_scored_datastore(
        arguments.validation_dstore_path, layer_position=job.dstore.settings.get("layer_position")
    )
    request = choice_request(arguments, job)
    if job.is_indexed and request["validation"] == job.fingerprint:
        raise InputError(
            f"--validation_dstore_path {arguments.validation_dstore_path}: holds the indexed rows themselves; "
            "name a datastore of text that is not indexed"
        )
    choice = choose_temperature(
        job.searcher,
        job.values,
        validation,
        k=job.k,
        temperatures=arguments.temperature_grid,
        lambdas=arguments.lmbda_grid,
        max_rows=arguments.max_validation_rows,
    )
    if PartialState().is_main_process:
        print(choice.text(), flush=True)
    return {
        "knn_temp": choice.knn_temp,
        "lmbda": choice.lmbda,
        "perplexity": choice.perplexity,
        "base_perplexity": choice.base_perplexity,
        "rows": choice.rows,
        "table": choice.table,
        "request": request,
    }


if __name__ == "__main__":
    main()
