"""The steps of an index build: plan, train, fill shards, put in place; each survives a kill.

Everything is made in a work folder `<index>.building`, under a lock, and moved to its name when whole. Knows
datastores and index files; knows nothing of command lines or of searching.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from knn_utils.distribution import float32_from_float16
from knn_utils.faiss_files import (
    FORMAT,
    FORMAT_VERSION,
    TRAINED_NAME,
    faiss_reason,
    find_index,
    read_faiss,
    read_record,
    record_path,
    rows_fingerprint,
    shard_name,
    write_faiss,
)
from knn_utils.search import check_finite, gpu_count, set_probe
from utils.errors import InputError
from utils.files import FolderLock, atomic_file, ensure_folder, read_json, sha256_file, sync_folder, write_json

PLAN_NAME = "plan.json"
SAMPLE_ROWS, SAMPLE_RUNS = 1_000_000, 1_000
# Beyond so many points per centroid FAISS would draw a sample of its own.
MOST_POINTS = 256
# float32 keys in memory at once, besides the index and the training sample.
BLOCK_BYTES = 64 << 20
CHECKPOINT_SECONDS = 600


def make_index(factory: str, dim: int, seed: int) -> Any:
    """An empty FAISS index. Raises InputError when FAISS cannot build it for this width."""
    import faiss

    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_L2)
    except Exception as error:
        raise InputError(
            f"--index_factory {factory}: FAISS cannot build it for keys of width {dim} ({faiss_reason(error)})"
        ) from None
    ivf = faiss.try_extract_index_ivf(index)
    inner = faiss.downcast_index(ivf) if ivf is not None else faiss.downcast_index(index)
    quantiser = getattr(inner, "pq", None)
    for trained in (ivf, quantiser):
        if hasattr(trained, "cp"):
            trained.cp.seed = seed
            trained.cp.min_points_per_centroid = 1
    if hasattr(inner, "do_polysemous_training"):
        # It only renumbers the codebooks, for a kind of search not used here, and takes ten times the training.
        inner.do_polysemous_training = False
    return index


def sample_size(index: Any) -> int:
    """Keys worth training `index` on: as many as FAISS uses, at most a million."""
    import faiss

    ivf = faiss.try_extract_index_ivf(index)
    inner = faiss.downcast_index(ivf if ivf is not None else index)
    centroids = max(getattr(ivf, "nlist", 0), getattr(getattr(inner, "pq", None), "ksub", 0), 256)
    return min(SAMPLE_ROWS, MOST_POINTS * centroids)


def block_rows(dim: int) -> int:
    """Keys of width `dim` to convert at once."""
    return max(BLOCK_BYTES // (4 * dim), 1)


def training_sample(datastore: Any, wanted: int, seed: int) -> np.ndarray:
    """Keys to train on, (n, dim) float32: all rows if they are at most `wanted`, else 1,000 contiguous runs.

    The runs lie at seeded random places and do not overlap.
    """
    if datastore.rows <= wanted:
        length, size = block_rows(datastore.dim), datastore.rows
        starts = np.arange(0, size, length)
    else:
        length = wanted // SAMPLE_RUNS
        places = np.random.default_rng(seed).choice(datastore.rows // length, SAMPLE_RUNS, replace=False)
        starts, size = np.sort(places) * length, SAMPLE_RUNS * length
    sample = np.empty((size, datastore.dim), dtype=np.float32)
    filled = 0
    for start in starts.tolist():
        keys = float32_from_float16(datastore.keys(start, min(start + length, datastore.rows)))
        check_finite(keys, start, datastore.path)
        sample[filled : filled + len(keys)] = keys
        filled += len(keys)
    return sample


def write_values(datastore: Any, path: Path) -> None:
    """Write the datastore's values to `path`: int32 (rows,) .npy, atomically."""
    with atomic_file(path) as temporary:
        values = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.int32, shape=(datastore.rows,))
        for start in range(0, datastore.rows, 1 << 20):
            stop = min(start + (1 << 20), datastore.rows)
            values[start:stop] = datastore.vals(start, stop)
        values.flush()
        del values


def divide(first: int, rows: int, shards: int) -> list[tuple[int, int]]:
    """(first row, rows) of `shards` contiguous, nearly equal shares; fewer where there are fewer rows."""
    shards = max(min(shards, rows), 1)
    bounds = [first + rows * number // shards for number in range(shards + 1)]
    return [(start, stop - start) for start, stop in itertools.pairwise(bounds)]


class IndexBuild:
    """One build of an index; `run()` does it all, on every process of a run.

    Args:
        datastore: the opened `Datastore`.
        index_path, values_path: what to write.
        factory, remarks: FAISS factory string, and what to say about how it was chosen.
        settings: the request, recorded; a finished index made by another request is not replaced unasked.
        num_shards: files that share the rows; None: one for each process.
        extend: keep the index that is there and add the datastore's further rows.

    Raises:
        InputError: another index is there, FAISS cannot build or train it, a key is not finite, another run
            is building here.
    """

    def __init__(
        self,
        datastore: Any,
        index_path: Path,
        values_path: Path,
        *,
        factory: str,
        remarks: list[str],
        settings: dict[str, Any],
        seed: int,
        probe: int,
        keys_at_a_time: int = 500_000,
        num_shards: int | None = None,
        gpu: bool = False,
        extend: bool = False,
        overwrite: bool = False,
    ) -> None:
        from datetime import timedelta

        from accelerate import PartialState

        # Training on one process may take hours in which the others wait.
        self.state = PartialState(timeout=timedelta(days=7))
        self.datastore, self.path, self.values_path = datastore, index_path, values_path
        self.factory, self.remarks, self.settings = factory, remarks, settings
        self.seed, self.probe, self.keys_at_a_time = seed, probe, keys_at_a_time
        self.num_shards = self.state.num_processes if num_shards is None else num_shards
        self.extend, self.overwrite = extend, overwrite
        self.work = index_path.with_name(index_path.name + ".building")
        self.gpu = gpu and gpu_count() > 0
        if gpu and not self.gpu:
            self._say("--knn_gpu: FAISS sees no GPU here, the index is built on the CPU")

    def run(self) -> None:
        """Build, continue, extend or leave alone, and say which."""
        from accelerate.utils import broadcast_object_list

        started = time.perf_counter()
        plans: list[Any] = [None]
        lock = None
        try:
            if self.state.is_main_process:
                self.fingerprint = rows_fingerprint(self.datastore)
                if self._is_finished():
                    self._say(f"index {self.path}: complete, {self.datastore.rows} rows; nothing to do")
                else:
                    plan = self._continued_plan() or self._new_plan()
                    lock = FolderLock(ensure_folder(self.work)).acquire()
                    plans[0] = self._begin(plan)
            broadcast_object_list(plans)
            plan = plans[0]
            if plan is None:
                return
            for number in range(len(plan["shards"]))[self.state.process_index :: self.state.num_processes]:
                self._fill_shard(plan, number)
            self.state.wait_for_everyone()
            if self.state.is_main_process:
                record = self._put_in_place(plan)
                shutil.rmtree(self.work, ignore_errors=True)
                self._say(
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

    def _say(self, text: str) -> None:
        if self.state.is_main_process:
            print(text, flush=True)

    # What is there, and what to do about it (main process)

    def _is_finished(self) -> bool:
        """Whether the index wanted is there already, whole; its values are written again if they are gone."""
        record = self._whole_record()
        if record is None or self.overwrite or record["datastore"].get("fingerprint") != self.fingerprint:
            return False
        if record["settings"] != self.settings and not self.extend:
            return False
        if not self.values_path.is_file():
            write_values(self.datastore, self.values_path)
        if self.work.is_dir():
            # Left by a kill after the last step; unless another run is at work there.
            with contextlib.suppress(InputError), FolderLock(self.work):
                shutil.rmtree(self.work, ignore_errors=True)
        return True

    def _whole_record(self) -> dict[str, Any] | None:
        """The record of a complete index at the path, or None."""
        if not self.path.exists():
            return None
        try:
            return find_index(self.path).record
        except InputError:
            return None

    def _request(self) -> dict[str, Any]:
        return {"settings": self.settings, "fingerprint": self.fingerprint, "extend": self.extend}

    def _continued_plan(self) -> dict[str, Any] | None:
        """The plan of an interrupted build of the same request."""
        if not (self.work / PLAN_NAME).is_file():
            return None
        plan = read_json(self.work / PLAN_NAME)
        return plan if isinstance(plan, dict) and plan.get("request") == self._request() else None

    def _new_plan(self) -> dict[str, Any]:
        plan = {"request": self._request(), "factory": self.factory, "first_shard": 0, "extends": None}
        record = self._whole_record()
        if self.extend:
            return plan | self._extension(record)
        if self.path.exists() and not self.overwrite:
            if record is None and read_record(self.path) is None:
                raise InputError(
                    f"{self.path}: is there and was not made by this command; "
                    "give another --index_path, or --overwrite to replace it"
                )
            if record is not None:
                raise InputError(f"{self.path}: was made otherwise: {self._difference(record)}")
        make_index(self.factory, self.datastore.dim, self.seed)
        shards = divide(0, self.datastore.rows, self.num_shards)
        return plan | {"folder": self.num_shards > 1, "shards": shards}

    def _extension(self, record: dict[str, Any] | None) -> dict[str, Any]:
        if record is None:
            raise InputError(f"--extend: {self.path} is not a whole index with a record; build it without --extend")
        before, now = record["rows"], self.datastore.rows
        if record["dim"] != self.datastore.dim:
            raise InputError(
                f"--extend: {self.path} indexes keys of width {record['dim']}, the datastore's are {self.datastore.dim}"
            )
        if now <= before or record["datastore"].get("fingerprint") != rows_fingerprint(self.datastore, before):
            raise InputError(
                f"--extend: the first {before} rows of {self.datastore.path} are not those that {self.path} indexes; "
                "build it anew with --overwrite"
            )
        plan = {"factory": record["factory"], "extends": record, "folder": self.path.is_dir()}
        if not self.path.is_dir():
            return plan | {"shards": [(0, now)]}
        return plan | {
            "first_shard": len(record["shards"]),
            "shards": divide(before, now - before, self.num_shards),
        }

    def _difference(self, record: dict[str, Any]) -> str:
        changed = [
            f"{key} {record['settings'].get(key)} there, {self.settings.get(key)} now"
            for key in sorted(record["settings"].keys() | self.settings.keys())
            if record["settings"].get(key) != self.settings.get(key)
        ]
        if record["datastore"].get("fingerprint") != self.fingerprint:
            changed.append(f"{record['rows']} other rows there, {self.datastore.rows} now (--extend if it has grown)")
        return "; ".join(changed) + "; give another --index_path, or --overwrite to replace it"

    def _begin(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Write the plan down, train, and say what is being done."""
        continued = self._continued_plan() is not None
        if not continued:
            for item in self.work.iterdir():
                if item.name != ".lock":
                    item.unlink()
            write_json(self.work / PLAN_NAME, plan)
        for remark in self.remarks if plan["extends"] is None else []:
            self._say(remark)
        verb = "continuing" if continued else "extending" if plan["extends"] else "building"
        self._say(f"{verb} {self.path}: {plan['factory']} over {self.datastore.rows} rows of {self.datastore.dim}")
        trained = self.work / TRAINED_NAME
        if plan["extends"] is None and not trained.is_file():
            index = self._train(plan["factory"])
            with atomic_file(trained) as temporary:
                write_faiss(index, temporary)
        return plan

    def _train(self, factory: str) -> Any:
        index = make_index(factory, self.datastore.dim, self.seed)
        set_probe(index, self.probe)
        if index.is_trained:
            return index
        sample = training_sample(self.datastore, sample_size(index), self.seed)
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
        import faiss

        if not self.gpu:
            return index
        self._resources = faiss.StandardGpuResources()
        device = int(os.environ.get("LOCAL_RANK", "0")) % gpu_count()
        try:
            return faiss.index_cpu_to_gpu(self._resources, device, index)
        except RuntimeError as error:
            self._say(f"--knn_gpu: this index cannot be built on a GPU ({faiss_reason(error)}), the CPU does it")
            self.gpu = False
            return index

    def _from_device(self, index: Any) -> Any:
        import faiss

        return faiss.index_gpu_to_cpu(index) if self.gpu else index

    # Filling (every process its own shards)

    def _fill_shard(self, plan: dict[str, Any], number: int) -> None:
        """Add the rows of one shard, continuing from what is saved, and record it when it is whole."""
        first_row, rows = plan["shards"][number]
        name = shard_name(plan["first_shard"] + number)
        if self._shard_record(plan, number) is not None:
            return
        partial = self.work / f"{name}.partial"
        if partial.is_file():
            index = read_faiss(partial)
        elif plan["extends"] is not None and not plan["folder"]:
            index = read_faiss(self.path)
        elif plan["extends"] is not None:
            index = read_faiss(self.path / TRAINED_NAME)
        else:
            index = read_faiss(self.work / TRAINED_NAME)
        done, saved = index.ntotal, time.monotonic()
        index = self._to_device(index)
        quiet = None if self.state.is_main_process else True
        bar = tqdm(total=rows, initial=done, desc="add", unit="row", unit_scale=True, disable=quiet)
        while done < rows:
            upto = min(done + self.keys_at_a_time, rows)
            while done < upto:
                start, stop = first_row + done, first_row + min(done + block_rows(self.datastore.dim), upto)
                keys = float32_from_float16(self.datastore.keys(start, stop))
                check_finite(keys, start, self.datastore.path)
                index.add(keys)
                bar.update(stop - start)
                done += stop - start
            if done < rows and time.monotonic() - saved > CHECKPOINT_SECONDS:
                with atomic_file(partial) as temporary:
                    write_faiss(self._from_device(index), temporary)
                saved = time.monotonic()
        bar.close()
        with atomic_file(self.work / name) as temporary:
            write_faiss(self._from_device(index), temporary)
        path = self.work / name
        record = {"file": name, "first_row": first_row, "rows": rows}
        write_json(self.work / f"{name}.json", record | {"bytes": path.stat().st_size, "sha256": sha256_file(path)})
        partial.unlink(missing_ok=True)

    def _shard_record(self, plan: dict[str, Any], number: int) -> dict[str, Any] | None:
        """The record of a finished shard, wherever its file has got to; None while it is not finished."""
        name = shard_name(plan["first_shard"] + number)
        if not (self.work / f"{name}.json").is_file():
            return None
        record = read_json(self.work / f"{name}.json")
        places = [self.work / name, self.path / name if plan["folder"] else self.path]
        there = [place for place in places if place.is_file() and place.stat().st_size == record["bytes"]]
        return record if there else None

    # Putting in place (main process)

    def _put_in_place(self, plan: dict[str, Any]) -> dict[str, Any]:
        import faiss

        shards = [self._shard_record(plan, number) for number in range(len(plan["shards"]))]
        if None in shards:
            raise InputError(f"{self.work}: shard {shards.index(None)} was not written; run the same command again")
        old = plan["extends"]
        if old and plan["folder"]:
            shards = [*old["shards"], *shards]
        history = [*old["history"], {"rows_before": old["rows"], "rows_after": self.datastore.rows}] if old else []
        record = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "dim": self.datastore.dim,
            "rows": self.datastore.rows,
            "metric": "squared L2",
            "factory": plan["factory"],
            "probe": self.probe,
            "settings": old["settings"] if old else self.settings,
            "datastore": {
                "rows": self.datastore.rows,
                "fingerprint": self.fingerprint,
                "settings": self.datastore.settings,
            },
            "shards": shards,
            "values": self.values_path.name,
            "info": {"dstore_path": str(self.datastore.path), "faiss": faiss.__version__},
            "history": history,
        }
        write_values(self.datastore, self.values_path)
        if plan["folder"]:
            self._place_folder(plan, record)
        else:
            record["shards"][0]["file"] = self.path.name
            if (self.work / shard_name(0)).is_file():
                if self.path.is_dir():
                    shutil.rmtree(self.path)
                os.replace(self.work / shard_name(0), self.path)
            sync_folder(self.path.parent)
            write_json(record_path(self.path), record)
        return record

    def _place_folder(self, plan: dict[str, Any], record: dict[str, Any]) -> None:
        if self.path.is_file():
            record_path(self.path).unlink(missing_ok=True)
            self.path.unlink()
        self.path.mkdir(exist_ok=True)
        names = [shard_name(plan["first_shard"] + number) for number in range(len(plan["shards"]))]
        if plan["extends"] is None:
            # Without a record nothing takes a folder in between for an index.
            record_path(self.path).unlink(missing_ok=True)
            for item in self.path.glob("*.index"):
                if item.name not in (TRAINED_NAME, *names):
                    item.unlink()
        for name in [TRAINED_NAME, *names]:
            # What an interrupted run has moved already is no longer in the work folder.
            if (self.work / name).is_file():
                os.replace(self.work / name, self.path / name)
        sync_folder(self.path)
        write_json(record_path(self.path), record)
