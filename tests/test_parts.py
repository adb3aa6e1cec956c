"""Resumable folders of parts: whatever interrupts the writing, the same call ends in the same files."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from harness import GOLDEN

from knn_utils.datastore import Datastore, datastore_schema
from knn_utils.parts import PartedOutput, datastore_batch, plan_parts, write_single_file
from utils.errors import InputError

DIM = 4
PLAN = [5, 5, 5, 5, 5, 5, 3]
SETTINGS = {"model": "tiny", "k": 8, "temperature": 16.0, "shape": [1, 2]}

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def rows_of(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    numbers = np.arange(start, stop)
    keys = (numbers[:, None] * DIM + np.arange(DIM)).astype(np.float16)
    return keys, numbers.astype(np.int32)


def output_at(path: Path, plan: list[int] = PLAN, **changes) -> PartedOutput:
    arguments = {"kind": "datastore", "settings": SETTINGS, "part_rows": plan, "schema": datastore_schema(DIM)}
    return PartedOutput(path, **(arguments | changes))


def write_parts(output: PartedOutput, numbers: list[int] | None = None) -> None:
    for number in output.mine() if numbers is None else numbers:
        start = output.row_start(number)
        with output.write(number) as part:
            for first in range(start, start + output.part_rows[number], 2):
                part.write(datastore_batch(*rows_of(first, min(first + 2, start + output.part_rows[number]))))


def make(path: Path, plan: list[int] = PLAN, **changes) -> dict:
    output = output_at(path, plan, **changes)
    write_parts(output)
    return output.finish()


def files_of(folder: Path) -> dict[str, bytes]:
    return {item.name: item.read_bytes() for item in folder.iterdir() if item.name != ".lock"}


def begin(path: Path, done: int, **changes) -> None:
    """A run that is interrupted after `done` parts."""
    output = output_at(path, **changes)
    write_parts(output, output.mine()[:done])
    output.close()


def fork(work) -> int:
    """Run `work` in a child process; returns its pid."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def outcome(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_processes(path: Path, count: int, stop_after: int | None = None) -> None:
    """A run of `count` processes; with `stop_after` each is killed within the part after so many of its own."""
    barrier = multiprocessing.get_context("fork").Barrier(count)

    def work(index: int) -> None:
        output = output_at(path, process_index=index, num_processes=count, wait_for_everyone=lambda: barrier.wait(30))
        if stop_after is None:
            write_parts(output)
            output.finish()
            return
        write_parts(output, output.mine()[:stop_after])
        barrier.wait(30)
        for number in output.mine():
            with output.write(number) as part:
                part.write(datastore_batch(*rows_of(0, 2)))
                os.kill(os.getpid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    expected = 0 if stop_after is None else -signal.SIGKILL
    children = [fork(lambda index=index: work(index)) for index in range(count)]
    assert [outcome(pid) for pid in children] == [expected] * count


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed") / "dstore"
    make(folder)
    return files_of(folder)


def test_a_finished_folder_holds_the_parts_and_the_manifest_and_reads_back(tmp_path: Path) -> None:
    manifest = make(tmp_path / "new" / "dstore", info={"seconds": 1})
    assert sorted(files_of(tmp_path / "new" / "dstore")) == [
        "manifest.json",
        *(f"part-{n:05d}.arrow" for n in range(7)),
    ]
    assert manifest["complete"] and manifest["rows"] == 33 and manifest["settings"] == SETTINGS
    assert manifest["info"] == {"seconds": 1} and manifest["history"] == []
    keys, values = rows_of(0, 33)
    datastore = Datastore.open(tmp_path / "new" / "dstore", verify=True)
    assert np.array_equal(datastore.keys(), keys) and np.array_equal(datastore.vals(), values)
    assert datastore.settings["k"] == 8


@pytest.mark.parametrize("count", [1, 3])
def test_any_number_of_processes_writes_the_same_files(tmp_path: Path, count: int, undisturbed: dict) -> None:
    run_processes(tmp_path, count)
    assert files_of(tmp_path) == undisturbed


@pytest.mark.parametrize(("before", "after"), [(3, 2), (1, 3)])
def test_a_killed_run_continues_with_another_number_of_processes(
    tmp_path: Path, before: int, after: int, undisturbed: dict
) -> None:
    run_processes(tmp_path, before, stop_after=1)
    assert len(list(tmp_path.glob(".tmp-*"))) == before
    kept = {item.name: item.stat().st_mtime_ns for item in tmp_path.glob("part-*.arrow")}
    assert len(kept) == before
    run_processes(tmp_path, after)
    assert files_of(tmp_path) == undisturbed
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in kept} == kept


STEPS = ("fsync", "replace", "unlink", "mkdir")


def killed_at(work, step: int) -> bool:
    """Run `work` in a child that SIGKILLs itself before its `step`-th durable step; False if it got to the end."""

    def child() -> None:
        left = step

        def counted(original):
            def call(*args, **kwargs):
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return original(*args, **kwargs)

            return call

        for name in STEPS:
            setattr(os, name, counted(getattr(os, name)))
        work()

    status = outcome(fork(child))
    assert status in (0, -signal.SIGKILL)
    return status != 0


GROWN = {"settings": SETTINGS | {"rows": 12}, "info": {"documents": 3}, "extend": True}
# What is in the folder before, and what the call that is killed makes of it; the steps that it takes at least.
KILLED = {
    "new": (None, lambda folder: make(folder, [5, 5, 2]), 25),
    "extended": (
        lambda folder: make(folder, [5, 3], settings=SETTINGS | {"rows": 8}),
        lambda folder: make(folder, [5, 3, 4], **GROWN),
        8,
    ),
    "overwritten": (
        lambda folder: make(folder, [5, 3]),
        lambda folder: make(folder, [4, 4], settings={"model": "other"}, overwrite=True),
        15,
    ),
}


@pytest.mark.parametrize("name", KILLED)
def test_a_kill_before_any_step_leaves_a_folder_that_the_same_call_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # A killed process loses nothing that it handed to the kernel: syncing only costs time here.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    start, work, least = KILLED[name]

    def begun(folder: Path) -> Path:
        if start is not None:
            start(folder)
        return folder

    work(begun(tmp_path / "undisturbed"))
    expected = files_of(tmp_path / "undisturbed")
    step, killed = 0, True
    while killed:
        folder = begun(tmp_path / str(step))
        killed = killed_at(lambda folder=folder: work(folder), step)
        manifest = folder / "manifest.json"
        if manifest.exists() and not json.loads(manifest.read_text())["complete"]:
            with pytest.raises(InputError, match="incomplete"):
                Datastore.open(folder)
        work(folder)
        assert files_of(folder) == expected, step
        step += 1
    assert step > least


def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path: Path, undisturbed: dict) -> None:
    reading, writing = os.pipe()

    def first() -> None:
        output = output_at(tmp_path)
        os.write(writing, b"!")
        time.sleep(60)
        output.close()

    pid = fork(first)
    os.read(reading, 1)
    with pytest.raises(InputError, match="another run is writing here"):
        output_at(tmp_path)
    os.kill(pid, signal.SIGKILL)
    outcome(pid)
    make(tmp_path)
    assert files_of(tmp_path) == undisturbed


def test_a_process_that_outlives_its_killed_run_cannot_write_into_the_next(tmp_path: Path) -> None:
    output_at(tmp_path).close()
    mark = tmp_path / ".lock"
    mark.write_text("first run")
    survivor = output_at(tmp_path, process_index=1, num_processes=2)
    mark.write_text("second run")
    with pytest.raises(InputError, match="another run took this folder over"):
        write_parts(survivor)
    assert not list(tmp_path.glob("part-*")) and not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("done", [2, 7])
def test_changed_settings_are_named_and_refused(tmp_path: Path, done: int) -> None:
    begin(tmp_path, done)
    before = files_of(tmp_path)
    changed = SETTINGS | {"k": 16, "model": None}
    with pytest.raises(InputError, match=r"k 8 there, 16 now; model tiny there, not set now.*--overwrite"):
        output_at(tmp_path, settings=changed)
    assert files_of(tmp_path) == before


def test_another_plan_and_other_columns_are_refused(tmp_path: Path) -> None:
    make(tmp_path)
    assert output_at(tmp_path, settings=SETTINGS | {"probe": None, "shape": (1, 2)}).complete
    with pytest.raises(InputError, match=r"rows of the parts \[5, 5, 5, 5, 5, 5, 3\] there, \[10, 10, 10, 3\] now"):
        output_at(tmp_path, [10, 10, 10, 3])
    with pytest.raises(InputError, match=r"columns .*logprob: float now"):
        output_at(tmp_path, schema=datastore_schema(DIM, logprob=True))


def test_overwrite_makes_a_complete_or_different_output_anew_and_continues_an_interrupted_one(tmp_path: Path) -> None:
    make(tmp_path)
    assert output_at(tmp_path, overwrite=True).mine() == list(range(7))
    begin(tmp_path, done=4)
    assert output_at(tmp_path, overwrite=True).mine() == [4, 5, 6]
    assert output_at(tmp_path, settings={"model": "other"}, overwrite=True).mine() == list(range(7))


def test_a_folder_with_other_files_or_of_the_other_kind_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    (tmp_path / ".tmp-thesis").write_text("precious")
    with pytest.raises(InputError, match=r"holds other files \(thesis.tex\)"):
        output_at(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").exists() and (tmp_path / ".tmp-thesis").exists()
    make(tmp_path / "d")
    before = files_of(tmp_path / "d")
    with pytest.raises(InputError, match="holds a datastore, expected kNN targets"):
        output_at(tmp_path / "d", kind="knn_targets", overwrite=True)
    assert files_of(tmp_path / "d") == before


def test_a_file_in_the_way_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "dstore.arrow"
    write_single_file(path, datastore_schema(DIM), [datastore_batch(*rows_of(0, 3))])
    with pytest.raises(InputError, match=r"is a file; .*--overwrite"):
        output_at(path)
    assert path.is_file()
    make(path, overwrite=True)
    assert len(Datastore.open(path)) == 33


def test_parts_without_a_manifest_are_not_trusted(tmp_path: Path, undisturbed: dict) -> None:
    make(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(InputError, match="parts without a manifest"):
        output_at(tmp_path)
    make(tmp_path, overwrite=True)
    assert files_of(tmp_path) == undisturbed


@pytest.mark.parametrize("done", [4, 7, None])
@pytest.mark.parametrize("damage", [lambda path: os.truncate(path, path.stat().st_size - 9), Path.unlink])
def test_a_part_that_is_cut_off_or_gone_is_written_again_and_no_other(
    tmp_path: Path, done: int | None, damage, undisturbed: dict
) -> None:
    if done is None:
        make(tmp_path)
    else:
        begin(tmp_path, done)
    damage(tmp_path / "part-00002.arrow")
    output = output_at(tmp_path)
    assert not output.complete
    assert output.mine() == [2, *range(done or 7, 7)]
    with pytest.raises(InputError, match="incomplete"):
        Datastore.open(tmp_path)
    write_parts(output)
    output.finish()
    assert files_of(tmp_path) == undisturbed


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs /proc")
def test_a_start_with_nothing_to_do_reads_no_rows_and_writes_nothing(tmp_path: Path) -> None:
    rows = 1 << 16
    keys, values = np.ones((rows, DIM), np.float16), np.zeros(rows, np.int32)

    def start() -> PartedOutput:
        return output_at(tmp_path, [rows] * 8)

    output = start()
    for number in output.mine():
        with output.write(number) as part:
            part.write(datastore_batch(keys, values))
    output.finish()

    def bytes_read() -> int:
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])

    times = {item.name: item.stat().st_mtime_ns for item in tmp_path.iterdir() if item.name != ".lock"}
    before = bytes_read()
    output = start()
    assert output.complete and output.mine() == [] and output.finish()["complete"]
    assert bytes_read() - before < 50_000 < (tmp_path / "part-00000.arrow").stat().st_size
    assert {item.name: item.stat().st_mtime_ns for item in tmp_path.iterdir() if item.name != ".lock"} == times


def copied(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "parts" / name, folder / name))


def test_a_folder_of_an_earlier_version_is_read_verified_and_extended(tmp_path: Path) -> None:
    folder = copied("complete", tmp_path)
    store = Datastore.open(folder, verify=True)
    assert (store.rows, store.dim, store.settings["dataset"]) == (7, DIM, "a")
    keys, values = rows_of(0, 7)
    assert np.array_equal(store.keys(), keys) and np.array_equal(store.vals(), values)
    assert np.array_equal(store.logprob(), -values / 8)
    before = files_of(folder)
    settings = store.settings
    same = {"schema": datastore_schema(DIM, logprob=True)}
    assert output_at(folder, [4, 3], settings=settings, **same).complete
    assert files_of(folder) == before
    grown = output_at(folder, [4, 3, 2], settings=settings | {"rows": 9}, extend=True, **same)
    write_logprob_parts(grown)
    grown.finish()
    assert before.items() - files_of(folder).items() == {("manifest.json", before["manifest.json"])}
    assert np.array_equal(Datastore.open(folder, verify=True).vals(), np.arange(9))


def test_an_interrupted_folder_of_an_earlier_version_is_continued(tmp_path: Path) -> None:
    folder = copied("interrupted", tmp_path)
    with pytest.raises(InputError, match="incomplete, 1 of 3 parts"):
        Datastore.open(folder)
    settings = Datastore.open(copied("complete", tmp_path)).settings | {"rows": 9}
    output = output_at(folder, [4, 3, 2], settings=settings, schema=datastore_schema(DIM, logprob=True))
    assert output.mine() == [1, 2]
    write_logprob_parts(output)
    assert output.finish()["info"] == {"windows": 3}
    assert np.array_equal(Datastore.open(folder, verify=True).vals(), np.arange(9))


def write_logprob_parts(output: PartedOutput) -> None:
    for number in output.mine():
        start = output.row_start(number)
        keys, values = rows_of(start, start + output.part_rows[number])
        with output.write(number) as part:
            part.write(datastore_batch(keys, values, (-values / 8).astype(np.float32)))


def test_a_part_that_fails_or_has_other_rows_than_planned_leaves_nothing(tmp_path: Path) -> None:
    output = output_at(tmp_path)
    with pytest.raises(InputError, match="4 rows came, the plan has 5"), output.write(0) as part:
        part.write(datastore_batch(*rows_of(0, 4)))
    assert sorted(item.name for item in tmp_path.iterdir()) == [".lock", "manifest.json"]
    with pytest.raises(ZeroDivisionError), output.write(1) as part:
        part.write(datastore_batch(*rows_of(5, 7)))
        raise ZeroDivisionError
    assert sorted(item.name for item in tmp_path.iterdir()) == [".lock", "manifest.json"]
    assert output.mine() == list(range(7))
    with pytest.raises(InputError, match="part 0 was not written"):
        output.finish()


def test_a_grown_output_keeps_its_parts_and_tells_its_history(tmp_path: Path) -> None:
    make(tmp_path, [5, 3], settings=SETTINGS | {"rows": 8, "dataset": "a"}, info={"documents": 2})
    old = (tmp_path / "part-00001.arrow").stat().st_mtime_ns
    plan = plan_parts(18, 5, [5, 3])
    assert plan == [5, 3, 5, 5]
    grown = {"settings": SETTINGS | {"rows": 18, "dataset": "a+b"}, "info": {"documents": 5}}
    with pytest.raises(InputError, match="dataset a there, a\\+b now"):
        output_at(tmp_path, plan, extend=True, **grown)
    output = output_at(tmp_path, plan, extend=True, growing=("rows", "dataset"), **grown)
    assert not output.complete and output.mine() == [2, 3]
    write_parts(output)
    manifest = output.finish()
    assert manifest["history"] == [
        {
            "rows_before": 8,
            "rows_after": 18,
            "settings_before": {"rows": 8, "dataset": "a"},
            "info": {"documents": 5},
        }
    ]
    assert manifest["info"] == {"documents": 5} and manifest["settings"]["rows"] == 18
    assert (tmp_path / "part-00001.arrow").stat().st_mtime_ns == old
    assert np.array_equal(Datastore.open(tmp_path, verify=True).vals(), np.arange(18))
    assert output_at(tmp_path, plan, extend=True, growing=("rows", "dataset"), **grown).complete


def test_growing_needs_the_existing_parts_as_they_are(tmp_path: Path) -> None:
    make(tmp_path, [5, 3])
    with pytest.raises(InputError, match=r"\[5, 3\] there, \[5, 5\] now"):
        output_at(tmp_path, [5, 5], extend=True)
    with pytest.raises(InputError, match=r"\[5, 3\] there, \[5, 3, 2\] now"):
        output_at(tmp_path, [5, 3, 2])
    with pytest.raises(InputError, match="cannot follow parts that hold 8"):
        plan_parts(7, 5, [5, 3])


def test_a_single_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "dstore.arrow"

    def batches(fail: bool):
        yield datastore_batch(*rows_of(0, 4))
        if fail:
            raise ZeroDivisionError
        yield datastore_batch(*rows_of(4, 6))

    with pytest.raises(ZeroDivisionError):
        write_single_file(path, datastore_schema(DIM), batches(fail=True))
    assert list(path.parent.iterdir()) == []
    assert write_single_file(path, datastore_schema(DIM), batches(fail=False)) == 6
    assert len(Datastore.open(path)) == 6
    with pytest.raises(InputError, match="is a folder"):
        write_single_file(tmp_path, datastore_schema(DIM), [])


def test_a_single_file_clears_what_killed_runs_left_of_it(tmp_path: Path) -> None:
    pid = fork(lambda: None)
    outcome(pid)
    dead, alive, other = (
        tmp_path / f".tmp-{name}" for name in (f"{pid}-d.arrow", f"{os.getppid()}-d.arrow", f"{pid}-e")
    )
    for item in (dead, alive, other):
        item.write_text("left behind")
    write_single_file(tmp_path / "d.arrow", datastore_schema(DIM), [datastore_batch(*rows_of(0, 4))])
    assert (dead.exists(), alive.exists(), other.exists()) == (False, True, True)
