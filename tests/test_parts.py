"""Writing datastores: whatever interrupts it, the same call ends in the same files; rows to score are read back."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from knn_files import write_datastore
from tiny_models import HIDDEN, VOCABULARY, tiny_base

from knn_utils import saveEmbedMulti
from knn_utils.datastore import Datastore, TargetRows
from knn_utils.parts import datastore_batch, targets_batch, write_stream
from knn_utils.saveEmbedMulti import capture_rows, plan_parts, save_datastore
from knn_utils.scored_rows import scored_rows
from utils.artefact import Made, begin
from utils.errors import InputError

DIM, TIME = 4, 8
STEPS = ("fsync", "replace", "unlink", "rmdir")

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def make(path: Path, part_rows: int = 5, overwrite: bool = False) -> None:
    """A datastore of 13 rows, whose values are their numbers."""
    keys, values = np.ones((13, DIM), np.float16), np.arange(13, dtype=np.int32)
    write_datastore(path, keys, values, part_rows=part_rows, overwrite=overwrite)


def files_of(folder: Path) -> dict[str, bytes]:
    return {item.name: item.read_bytes() for item in folder.iterdir() if item.name != ".lock"}


def killed_at(work, step: int) -> bool:
    """Run `work` in a child that SIGKILLs itself before its `step`-th durable step; False if it got to the end."""
    pid = os.fork()
    if pid == 0:
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
        try:
            work()
        finally:
            os._exit(sys.exc_info()[0] is not None)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


@pytest.mark.parametrize("overwrites", [False, True])
def test_after_a_kill_at_any_step_the_same_call_finishes(tmp_path: Path, monkeypatch, overwrites: bool) -> None:
    # A killed process loses nothing that it handed to the kernel: syncing only costs time here.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    make(tmp_path / "expected")
    expected, step, killed = files_of(tmp_path / "expected"), 0, True
    assert sorted(expected) == ["made.json", *(f"part-{number:05d}.arrow" for number in range(3))]
    while killed:
        folder = tmp_path / str(step)
        if overwrites:
            make(folder, part_rows=7)
        killed = killed_at(lambda folder=folder: make(folder, overwrite=overwrites), step)
        if (folder / "making.json").exists() and not (folder / "made.json").exists():
            with pytest.raises(InputError, match="incomplete"):
                Datastore.open(folder)
        make(folder, overwrite=overwrites)
        assert files_of(folder) == expected, step
        step += 1
    assert step > 12
    assert np.array_equal(Datastore.open(folder).vals(), np.arange(13))


def test_a_stream_that_fails_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    batch = datastore_batch(np.zeros((4, DIM), np.float16), np.zeros(4, np.int32))
    assert write_stream(tmp_path / "d.arrow", batch.schema, [batch, batch]) == 8
    with pytest.raises(ZeroDivisionError):
        write_stream(tmp_path / "d.arrow", batch.schema, (batch if left else 1 / left for left in (1, 0)))
    assert [item.name for item in tmp_path.iterdir()] == ["d.arrow"] and Datastore.open(tmp_path / "d.arrow").rows == 8


def test_rows_of_the_wrong_type_or_length_are_not_written() -> None:
    keys, vals = np.ones((3, DIM), np.float16), np.ones(3, np.int32)
    for wrong in ((keys.astype(np.float32), vals), (keys, vals.astype(np.int64)), (keys, vals[:-1]), (keys[0], vals)):
        with pytest.raises(ValueError):
            datastore_batch(*wrong)
    rows = TargetRows(np.array([2, 0, 1], np.int32), vals, np.ones(3, np.float16), vals)
    assert targets_batch(rows).column("token_id").to_pylist() == [[1, 1], [], [1]]
    for change in ({"id_cnt": np.array([2, 1, 1], np.int32)}, {"prob": rows.prob[:-1]}):
        with pytest.raises(ValueError):
            targets_batch(replace(rows, **change))


@pytest.fixture(scope="module")
def base():
    return tiny_base("llama")


def windows_of(count: int, counted: int = TIME - 1) -> datasets.Dataset:
    """Windows whose last `counted` tokens are labels."""
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (count, TIME))
    labels = np.where(np.arange(TIME) >= TIME - counted, ids, -100)
    ranges = [[counted * window, counted * window + counted] for window in range(count)]
    columns = {"input_ids": ids.tolist(), "labels": labels.tolist(), "dstore_range": ranges}
    return datasets.Dataset.from_dict(columns).with_format("numpy")


SETTINGS = {"dim": HIDDEN, "subset": "train", "layer_position": -1, "logprob": True}


def save(base, windows, path: Path, batch_size: int = 2, settings: dict = SETTINGS, **options) -> Made:
    made_from = {"base": "some base", "windows": "some windows"}
    options = {"batch_size": batch_size, "with_logprob": True} | options
    return save_datastore(base, windows, path, settings=settings, made_from=made_from, **options)


def test_the_datastore_holds_what_the_base_captures(base, tmp_path: Path) -> None:
    windows = windows_of(35)
    made = save(base, windows, tmp_path / "d")
    store = Datastore.open(tmp_path / "d")
    assert store.made == made and made.rows == 35 * 7 and made.settings["part_rows"] == [14] * 17 + [7]
    expected = [np.concatenate(column) for column in zip(*capture_rows(base, windows, 0, 35, 2, -1, True), strict=True)]
    for found, column in zip((store.keys(), store.vals(), store.logprob()), expected, strict=True):
        assert np.array_equal(found, column)


def test_parts_hold_whole_windows_and_a_gibibyte_of_keys_at_most() -> None:
    for windows in (1, 5, 16, 31, 1000, 200_000):
        parts = plan_parts(np.full(windows, 512), 1280)
        assert [window for part in parts for window in part] == list(range(windows))
        assert len(parts) >= min(windows, 16)
        assert max(map(len, parts)) * 512 * 1280 * 2 <= saveEmbedMulti.PART_BYTES


def test_an_interrupted_datastore_is_continued_with_its_parts(base, tmp_path: Path, monkeypatch) -> None:
    windows, written = windows_of(20), []
    save(base, windows, tmp_path / "whole")

    def interrupted(path, *arguments):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(path)
        return write_stream(path, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(saveEmbedMulti, "write_stream", interrupted)
        save(base, windows, tmp_path / "d")
    kept = {path: path.stat().st_mtime_ns for path in written}
    with pytest.raises(InputError, match="subset"):
        save(base, windows, tmp_path / "d", settings=SETTINGS | {"subset": "test"})
    for _ in range(2):
        save(base, windows, tmp_path / "d", batch_size=3)
        assert files_of(tmp_path / "d") == files_of(tmp_path / "whole")
        assert {path: path.stat().st_mtime_ns for path in written} == kept


def test_hidden_states_that_are_not_finite_name_the_windows(tmp_path: Path) -> None:
    windows, base = windows_of(5), tiny_base("llama")
    base.get_input_embeddings().weight.data[int(windows[3]["input_ids"][0])] = torch.nan
    with pytest.raises(InputError, match="windows 3 to 3"):
        save(base, windows, tmp_path / "d")


def test_windows_of_another_vocabulary_or_with_other_ranges_are_refused(base, tmp_path: Path) -> None:
    ids = [[VOCABULARY] * TIME]
    windows = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids, "dstore_range": [[0, 7]]})
    with pytest.raises(InputError, match=str(VOCABULARY)):
        save(base, windows.with_format("numpy"), tmp_path / "d")
    windows = windows_of(3).remove_columns("dstore_range").add_column("dstore_range", [[0, 7], [7, 14], [14, 22]])
    with pytest.raises(InputError, match="dstore_range"):
        save(base, windows.with_format("numpy"), tmp_path / "d")


def flags(**changes) -> SimpleNamespace:
    """A command's flags, on windows of the original, which have no id."""
    given = {"dstore_path": None, "dataset_name": "windows", "model_name_or_path": "base", "layer_position": -1}
    return SimpleNamespace(**given | {"base_id": lambda: "some base"} | changes)


def test_stored_rows_are_those_that_the_base_gives(base, tmp_path: Path) -> None:
    windows = windows_of(20, counted=5)
    save(base, windows, tmp_path / "d")
    given = scored_rows(base, windows, flags(), "train", 4)
    stored = scored_rows(None, windows, flags(dstore_path=tmp_path / "d"), "train", 4, dim=HIDDEN)
    one, other = ([torch.cat(column) for column in zip(*rows, strict=True)] for rows in (given, stored))
    assert torch.allclose(one[0], other[0].float(), rtol=2e-3, atol=1e-4)
    assert torch.allclose(one[1], other[1], atol=1e-5) and torch.equal(one[2], other[2])


def test_stored_rows_of_something_else_are_refused(base, tmp_path: Path) -> None:
    windows = windows_of(20)
    save(base, windows, tmp_path / "d")
    save(base, windows, tmp_path / "plain", with_logprob=False, settings=SETTINGS | {"logprob": False})

    def given(count=20, dim=HIDDEN, path="d", **changes):
        return scored_rows(None, windows_of(count), flags(dstore_path=tmp_path / path, **changes), "train", 4, dim)

    given(model_name_or_path=None)
    for wrong in (
        *({"count": 19}, {"dim": 16}, {"path": "plain"}, {"layer_position": 0}),
        {"base_id": lambda: "other base"},
    ):
        with pytest.raises(InputError, match=str(tmp_path)):
            given(**wrong)
    begin(tmp_path / "w", Made("windows")).finish()
    with pytest.raises(InputError, match="windows"):
        given(dataset_name=tmp_path / "w")
