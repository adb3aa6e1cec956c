"""Datastore in, FAISS index out: trained once, then filled row by row, over squared L2 (the original's IVFPQ by
default, any FAISS factory string with --index_factory).

One process writes one index file; several (`accelerate launch`), or --num_shards, write a folder of shards, each the
work of one process. Beside it go the values of the indexed rows (`{subset}_vals.npy`) and a record of what made it.
An interrupted build continues; a complete one is left alone; --extend adds the rows that a datastore has grown by.
Everything is made in a work folder `<index>.building`, under a lock, and moved to its name when it is whole.
"""

from __future__ import annotations

if __package__ in (None, ""):
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import contextlib
import itertools
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from knn_utils.faiss_files import (
    FORMAT,
    FORMAT_VERSION,
    RECORD_IN_FOLDER,
    TRAINED_NAME,
    check_faiss,
    faiss_reason,
    find_index,
    has_gpu,
    load_values,
    read_faiss,
    read_record,
    record_path,
    rows_fingerprint,
    same_rows,
    set_probe,
    shard_name,
    to_gpu,
    values_fingerprint,
    write_faiss,
)
from knn_utils.index_training import block_rows, float_keys, ivfpq, make_index, sample_size, supported, training_sample
from utils.cli import command, flag, parse, required, say
from utils.errors import InputError, check_at_least, check_seed
from utils.files import atomic, ensure_folder, read_json, write_json
from utils.legacy import FolderLock, require_same, sha256_file, sync_folder

PLAN_NAME = "plan.json"
CHECKPOINT_SECONDS = 600


@dataclass
class BuildArguments:
    """Flags of build_index."""

    dstore_path: str = required("datastore whose keys are indexed: a folder or an Arrow stream of train_base")
    index_path: str | None = flag(None, "the index to write; default {subset}_{dim}.index beside the datastore")
    ncentroids: int = flag(4096, "inverted lists; lowered to what the number of rows supports")
    code_size: int = flag(32, "bytes of a compressed key (sub-quantisers of 8 bits); must divide the keys' width")
    probe: int = flag(8, "inverted lists searched where a search does not say otherwise")
    index_factory: str | None = flag(
        None, "FAISS factory string in place of --ncentroids and --code_size: Flat, IVF512,Flat, IVF4096,PQ64, …"
    )
    num_keys_to_add_at_a_time: int = flag(500_000, "keys added at a time, at most")
    seed: int = flag(1, "seed of the training sample and of the clustering")
    num_shards: int | None = flag(None, "index files that share the rows; default one for each process")
    knn_gpu: bool = flag(False, "train and add on the GPU where FAISS has one")
    extend: bool = flag(False, "add the rows that the datastore has grown by to the index, without training again")
    overwrite: bool = flag(False, "replace an index that is there")


@command
def main() -> None:
    """Entry point of `python -m knn_utils.build_index`."""
    (arguments,) = parse(BuildArguments, description="Build a FAISS index over the keys of a datastore.")
    check_at_least(1, arguments, "num_keys_to_add_at_a_time", "probe", "ncentroids", "code_size", "num_shards")
    check_seed("--seed", arguments.seed, bits=31)
    check_faiss()
    from knn_utils.datastore import Datastore

    IndexBuild(arguments, Datastore.open(arguments.dstore_path)).run()


def default_names(dstore_path: Path, index_path: str | None) -> tuple[Path, Path]:
    """(index, values): the original's `{subset}_{dim}.index` and our `{subset}_vals.npy` beside it.

    Subset and width are those in the datastore's name `dstore_{model_type}_{subset}_{dim}.arrow`; a datastore of
    another name lends its own.
    """
    stem = dstore_path.name.removesuffix(".arrow")
    match = re.fullmatch(r"dstore_.+_(?P<subset>[^_]+)_(?P<dim>[0-9]+)", stem)
    subset, name = (match["subset"], f"{match['subset']}_{match['dim']}") if match else (stem, stem)
    index = Path(index_path) if index_path else dstore_path.parent / f"{name}.index"
    if index.suffix != ".index":
        raise InputError(f"--index_path {index}: expected a name that ends in .index")
    return index, index.parent / f"{subset}_vals.npy"


def write_values(datastore: Any, path: Path) -> None:
    """Write the datastore's values to `path`: int32 (rows,) .npy, atomically."""
    with atomic(path) as temporary:
        # Through a map, a million at a time: a datastore may have billions of rows.
        values = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.int32, shape=(datastore.rows,))
        for start in range(0, datastore.rows, 1 << 20):
            stop = min(start + (1 << 20), datastore.rows)
            values[start:stop] = datastore.vals(start, stop)
        values.flush()


def divide(first: int, rows: int, shards: int) -> list[tuple[int, int]]:
    """(first row, rows) of `shards` contiguous, nearly equal shares; fewer where there are fewer rows."""
    shards = max(min(shards, rows), 1)
    bounds = [first + rows * number // shards for number in range(shards + 1)]
    return [(start, stop - start) for start, stop in itertools.pairwise(bounds)]


class IndexBuild:
    """One build of an index, with the flags of the command; `run()` does it all, on every process of a run.

    Raises:
        InputError: another index is there, FAISS cannot build or train it, a key is not finite, another run
            is building here.
    """

    def __init__(self, arguments: BuildArguments, datastore: Any) -> None:
        from accelerate import PartialState

        self.state = PartialState()
        self.arguments, self.datastore = arguments, datastore
        self.path, self.values_path = default_names(Path(arguments.dstore_path), arguments.index_path)
        self.work = self.path.with_name(self.path.name + ".building")
        self.fingerprint = rows_fingerprint(datastore)
        # What the request was, not what became of it: a datastore that grows must not look like a changed request.
        self.settings = {"index_factory": arguments.index_factory, "seed": arguments.seed}
        if not arguments.index_factory:
            self.settings |= {"ncentroids": arguments.ncentroids, "code_size": arguments.code_size}
        self.gpu = arguments.knn_gpu and has_gpu()

    def run(self) -> None:
        """Build, continue, extend or leave alone, and say which."""
        from accelerate.utils import broadcast_object_list

        started = time.perf_counter()
        lock: FolderLock | None = None
        plan = None
        try:
            if self.state.is_main_process and (plan := self._plan()) is not None:
                lock = FolderLock(ensure_folder(self.work)).acquire()
                self._begin(plan)
            (plan,) = broadcast_object_list([plan])
            if plan is None:
                return say(f"index {self.path}: complete, {self.datastore.rows} rows; nothing to do")
            for number in range(len(plan["shards"]))[self.state.process_index :: self.state.num_processes]:
                self._fill_shard(plan, number)
            self.state.wait_for_everyone()
            if self.state.is_main_process:
                record = self._put_in_place(plan)
                shutil.rmtree(self.work, ignore_errors=True)
                say(
                    f"index {self.path}: {record['rows']} rows of {record['dim']}, {record['factory']}, "
                    f"{len(record['shards'])} file(s), {sum(shard['bytes'] for shard in record['shards'])} bytes, "
                    f"{time.perf_counter() - started:.1f} s"
                )
            self.state.wait_for_everyone()
        except InputError:
            # Bad input does not get better by continuing: nothing of the attempt is left.
            if lock is not None:
                shutil.rmtree(self.work, ignore_errors=True)
            raise
        finally:
            if lock is not None:
                lock.release()

    # What is there, and what to do about it (main process)

    def _plan(self) -> dict[str, Any] | None:
        """What is to be made: {"request", "factory", "folder", "first_shard", "shards": [(first row, rows)], "extends":
        record of the index that grows, or None}. That of an interrupted build of the same request, where there is one.

        None where the index is there, whole; its values are written again if they are gone.
        """
        try:
            record = find_index(self.path).record
        except InputError:
            record = None
        if record is not None and self._is_wanted(record):
            if not self.values_path.is_file():
                write_values(self.datastore, self.values_path)
            if self.work.is_dir():
                # Left by a kill after the last step; unless another run is at work there.
                with contextlib.suppress(InputError), FolderLock(self.work):
                    shutil.rmtree(self.work, ignore_errors=True)
            return None
        extend = self.arguments.extend
        request = {"settings": self.settings, "fingerprint": self.fingerprint, "extend": extend}
        if (self.work / PLAN_NAME).is_file() and (plan := read_json(self.work / PLAN_NAME))["request"] == request:
            return plan
        self._check_values()
        return {"request": request} | (self._extension(record) if extend else self._new_index(record))

    def _is_wanted(self, record: dict[str, Any]) -> bool:
        if self.arguments.overwrite or record["rows"] != self.datastore.rows:
            return False
        settings_fit = self.arguments.extend or record["settings"] == self.settings
        return settings_fit and same_rows(record["datastore"].get("fingerprint"), self.datastore)

    def _new_index(self, record: dict[str, Any] | None) -> dict[str, Any]:
        asked, store = self.arguments, self.datastore
        if self.path.exists() and not asked.overwrite:
            if record is not None:
                there = {"rows": record["rows"], "datastore": record["datastore"].get("fingerprint")}
                here = {"rows": store.rows, "datastore": self.fingerprint}
                remedy = "give another --index_path, --overwrite to replace it, or --extend if the datastore has grown"
                require_same(self.path, record["settings"] | there, self.settings | here, remedy)
            if read_record(self.path) is None:
                raise InputError(
                    f"{self.path}: is there and was not made by this command; "
                    "give another --index_path, or --overwrite to replace it"
                )
        factory = asked.index_factory or ivfpq(asked.ncentroids, asked.code_size, store.dim)
        factory, remarks = supported(factory, store.rows)
        make_index(factory, store.dim, asked.seed)
        for remark in remarks:
            say(remark)
        num_shards = asked.num_shards or self.state.num_processes
        if num_shards > store.rows:
            raise InputError(f"--num_shards {num_shards}: expected at most {store.rows}, the rows of {store.path}")
        plan = {"factory": factory, "folder": num_shards > 1, "first_shard": 0, "extends": None}
        return plan | {"shards": divide(0, store.rows, num_shards)}

    def _check_values(self) -> None:
        """Refuse to replace the values that another index in the folder goes with."""
        folder, values = self.path.parent, self.values_path
        for file in [*folder.glob("*.index.json"), *folder.glob(f"*.index/{RECORD_IN_FOLDER}")]:
            other = file.parent if file.name == RECORD_IN_FOLDER else file.with_suffix("")
            shared = other != self.path and read_json(file).get("values") == values.name and values.is_file()
            if shared and values_fingerprint(self.datastore) != values_fingerprint(load_values(values)):
                told = f"belongs to {other.name}, which indexes other rows; give an --index_path in another folder"
                raise InputError(f"{values}: {told}")

    def _extension(self, record: dict[str, Any] | None) -> dict[str, Any]:
        if record is None:
            raise InputError(f"--extend: {self.path} is not a whole index with a record; build it without --extend")
        before, now, is_folder = record["rows"], self.datastore.rows, self.path.is_dir()
        fits = now > before and record["dim"] == self.datastore.dim
        if not (fits and same_rows(record["datastore"].get("fingerprint"), self.datastore, before)):
            raise InputError(
                f"--extend: the first {before} rows of {self.datastore.path} are not those that {self.path} indexes; "
                "build it anew with --overwrite"
            )
        plan = {"factory": record["factory"], "folder": is_folder, "extends": record}
        if not is_folder:
            return plan | {"first_shard": 0, "shards": [(0, now)]}
        shards = divide(before, now - before, self.arguments.num_shards or self.state.num_processes)
        return plan | {"first_shard": len(record["shards"]), "shards": shards}

    def _begin(self, plan: dict[str, Any]) -> None:
        """Write the plan down, train, and say what is being done."""
        path = self.work / PLAN_NAME
        continued = path.is_file() and read_json(path)["request"] == plan["request"]
        if not continued:
            for item in self.work.iterdir():
                if item.name != ".lock":
                    item.unlink()
            write_json(path, plan)
        verb = "continuing" if continued else "extending" if plan["extends"] else "building"
        say(f"{verb} {self.path}: {plan['factory']} over {self.datastore.rows} rows of {self.datastore.dim}")
        trained = self.work / TRAINED_NAME
        if plan["extends"] is None and not trained.is_file():
            write_faiss(self._train(plan["factory"]), trained)

    def _train(self, factory: str) -> Any:
        index = make_index(factory, self.datastore.dim, self.arguments.seed)
        set_probe(index, self.arguments.probe)
        if index.is_trained:
            return index
        sample = training_sample(self.datastore, sample_size(index), self.arguments.seed)
        index = self._to_device(index)
        try:
            index.train(sample)
        except RuntimeError as error:
            raise InputError(
                f"{factory}: FAISS cannot train it on {len(sample)} keys ({faiss_reason(error)}); "
                "choose a simpler --index_factory, such as Flat"
            ) from None
        return self._from_device(index)

    def _to_device(self, index: Any) -> Any:
        try:
            return to_gpu(index) if self.gpu else index
        except RuntimeError as error:
            say(f"--knn_gpu: this index cannot be built on a GPU ({faiss_reason(error)}), the CPU does it")
            self.gpu = False
            return index

    def _from_device(self, index: Any) -> Any:
        import faiss

        return faiss.index_gpu_to_cpu(index) if self.gpu else index

    # Filling (every process its own shards)

    def _fill_shard(self, plan: dict[str, Any], number: int) -> None:
        """Add the rows of one shard, continuing from what is saved, and record it when it is whole."""
        from tqdm import tqdm

        if self._shard_record(plan, number) is not None:
            return
        first_row, rows = plan["shards"][number]
        path = self.work / shard_name(plan["first_shard"] + number)
        partial = path.with_name(f"{path.name}.partial")
        begun = self.path if plan["extends"] else self.work
        if plan["folder"] or not plan["extends"]:
            begun /= TRAINED_NAME
        index = read_faiss(partial if partial.is_file() else begun)
        done, saved = index.ntotal, time.monotonic()
        index = self._to_device(index)
        at_once = min(self.arguments.num_keys_to_add_at_a_time, block_rows(self.datastore.dim))
        quiet = None if self.state.is_main_process else True
        with tqdm(total=rows, initial=done, desc="add", unit="row", unit_scale=True, disable=quiet) as bar:
            for start in range(done, rows, at_once):
                if time.monotonic() - saved > CHECKPOINT_SECONDS and start > done:
                    write_faiss(self._from_device(index), partial)
                    saved = time.monotonic()
                stop = min(start + at_once, rows)
                index.add(float_keys(self.datastore, first_row + start, first_row + stop))
                bar.update(stop - start)
        write_faiss(self._from_device(index), path)
        record = {"file": path.name, "first_row": first_row, "rows": rows, "bytes": path.stat().st_size}
        write_json(path.with_name(f"{path.name}.json"), record | {"sha256": sha256_file(path)})
        partial.unlink(missing_ok=True)

    def _place(self, plan: dict[str, Any], name: str) -> Path:
        return self.path / name if plan["folder"] else self.path

    def _shard_record(self, plan: dict[str, Any], number: int) -> dict[str, Any] | None:
        """The record of a finished shard, wherever its file has got to; None while it is not finished."""
        name = shard_name(plan["first_shard"] + number)
        if not (self.work / f"{name}.json").is_file():
            return None
        record = read_json(self.work / f"{name}.json")
        places = (self.work / name, self._place(plan, name))
        there = any(place.is_file() and place.stat().st_size == record["bytes"] for place in places)
        return record if there else None

    # Putting in place (main process)

    def _put_in_place(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Move the files to their names and record them; returns the record. Repeatable after a kill."""
        import faiss

        shards = [self._shard_record(plan, number) for number in range(len(plan["shards"]))]
        if None in shards:
            raise InputError(f"{self.work}: shard {shards.index(None)} was not written; run the same command again")
        names = [shard["file"] for shard in shards]
        old, datastore = plan["extends"], self.datastore
        if self.path.exists() and self.path.is_dir() != plan["folder"]:
            record_path(self.path).unlink(missing_ok=True)
            shutil.rmtree(self.path) if self.path.is_dir() else self.path.unlink()
        if plan["folder"]:
            self.path.mkdir(exist_ok=True)
            names.insert(0, TRAINED_NAME)
            if old:
                shards = old["shards"] + shards
            else:
                # Without a record nothing takes a folder in between for an index.
                record_path(self.path).unlink(missing_ok=True)
                for item in self.path.glob("*.index"):
                    if item.name not in names:
                        item.unlink()
        else:
            shards[0]["file"] = self.path.name
        write_values(datastore, self.values_path)
        for name in names:
            # What an interrupted run has moved already is no longer in the work folder.
            if (self.work / name).is_file():
                os.replace(self.work / name, self._place(plan, name))
        sync_folder(self.path if plan["folder"] else self.path.parent)
        record = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "dim": datastore.dim,
            "rows": datastore.rows,
            "metric": "squared L2",
            "factory": plan["factory"],
            "probe": self.arguments.probe,
            "settings": old["settings"] if old else self.settings,
            "datastore": {"rows": datastore.rows, "fingerprint": self.fingerprint, "settings": datastore.settings},
            "shards": shards,
            "values": self.values_path.name,
            "values_fingerprint": values_fingerprint(load_values(self.values_path)),
            "info": {"dstore_path": str(datastore.path), "faiss": faiss.__version__},
            "history": [*old["history"], {"rows_before": old["rows"], "rows_after": datastore.rows}] if old else [],
        }
        write_json(record_path(self.path), record)
        return record


if __name__ == "__main__":
    main()
