"""kNN targets as files: golden numbers, which hits count, processes, interruptions, temperature, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import faiss
import numpy as np
import pytest
from harness import GOLDEN, command, refused_here, together
from knn_files import (
    DIM,
    as_dicts,
    assert_same_distributions,
    exact_neighbours,
    plain_distribution,
    random_rows,
    stops_at_rename,
    write_datastore,
)
from safetensors.numpy import load_file

from knn_utils.datastore import KNNTargets, TargetRows, datastore_schema
from knn_utils.parts import datastore_batch, write_stream
from knn_utils.saveKNNMulti import part_rows
from utils.artefact import read_made

ROWS = 700
MODULE = "knn_utils.saveKNNMulti"


@pytest.fixture(autouse=True)
def errors_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPMEM_TRACEBACK", "1")


def save(dstore: Path, index: Path, output: Path, *more: object) -> TargetRows:
    flags = ("--dstore_path", dstore, "--index_path", index, "--output_path", output, "--k", 20, "--knn_temp", 4)
    command(MODULE, *flags, *more)
    return KNNTargets.open(output).read(0)


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.*")) if not file.name.startswith(".")}


class Files:
    """A training and a validation datastore, and an index over the first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys, self.values = random_rows(ROWS)
        self.queries, self.labels = random_rows(150, seed=1)
        self.train = write_datastore(folder / "train", self.keys, self.values)
        self.validation = write_datastore(folder / "validation", self.queries, self.labels)
        self.index = folder / "train.index"
        command("knn_utils.build_index", "--dstore_path", self.train, "--index_factory", "Flat")

    def expected(self, knn_temp: float = 4.0, *, ignore_first: bool = True) -> list[dict[int, float]]:
        distances, ids = exact_neighbours(self.keys, self.keys, 20)
        tokens = self.values[ids]
        if ignore_first:
            tokens[ids == np.arange(ROWS)[:, None]] = -1
        return plain_distribution(distances, tokens, knn_temp, 1e-8)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLPMEM_TRACEBACK", "1")
        return Files(tmp_path_factory.mktemp("knn"))


@pytest.mark.parametrize(("name", "ignore_first"), [("ignore", "True"), ("keep", "false")])
def test_golden_targets_come_out_of_the_command(tmp_path: Path, name: str, ignore_first: str) -> None:
    golden = load_file(GOLDEN / f"knn_{name}_first.safetensors")
    settings = json.loads((GOLDEN / "expected.json").read_text())["knn"]
    dstore = tmp_path / "dstore_gpt2_train_16.arrow"  # one stream without a record, as the original writes it
    write_stream(dstore, datastore_schema(DIM), [datastore_batch(golden["keys"], golden["vals"])])
    command("knn_utils.build_index", "--dstore_path", dstore, "--index_factory", "Flat")
    command(
        MODULE,
        *("--model_path", "not/there", "--dstore_path", dstore, "--val_path", tmp_path / "train_vals.pkl"),
        *("--index_path", tmp_path / "train_16.index", "--output_path", tmp_path / "knn", "--k", settings["k"]),
        *("--knn_temp", settings["knn_temp"], "--probe", 32, "--batch_size", 16000, "--ignore_first", ignore_first),
        "--knn_gpu",
    )
    targets = KNNTargets.open(tmp_path / "knn").read(0)
    expected = TargetRows(golden["id_cnt"], golden["token_id"], golden["prob"], golden["vals"])
    assert_same_distributions(as_dicts(targets), as_dicts(expected))
    np.testing.assert_array_equal(targets.label, golden["vals"])


def test_rows_have_distribution_label_nearest_distance_and_a_record(files: Files, tmp_path: Path) -> None:
    targets = save(files.train, files.index, tmp_path / "t", "--ignore_first")
    assert_same_distributions(as_dicts(targets), files.expected())
    np.testing.assert_array_equal(targets.label, files.values)
    nearest = exact_neighbours(files.keys, files.keys, 2)[0][:, 1]
    np.testing.assert_allclose(targets.distance, nearest, rtol=1e-4, atol=1e-4)
    made, store = read_made(tmp_path / "t"), read_made(files.train)
    assert made.rows == ROWS and made.settings["k"] == 20 and made.settings["layer_position"] == -1
    assert made.made_from == {**store.made_from, "datastore": store.id, "index": read_made(files.index).id}


def test_queries_of_another_datastore_drop_their_first_hit(files: Files, tmp_path: Path) -> None:
    more = ("--val_path", files.train, "--ignore_first", "True")
    targets = save(files.validation, files.index, tmp_path / "t", *more)
    distances, ids = exact_neighbours(files.queries, files.keys, 20)
    expected = plain_distribution(distances[:, 1:], files.values[ids[:, 1:]], 4.0, 1e-8)
    assert_same_distributions(as_dicts(targets), expected)
    np.testing.assert_array_equal(targets.label, files.labels)


def test_threads_and_processes_change_no_byte(files: Files, tmp_path: Path) -> None:
    before = faiss.omp_get_max_threads()
    try:
        for threads in (1, 3):
            faiss.omp_set_num_threads(threads)
            save(files.train, files.index, tmp_path / str(threads))
    finally:
        faiss.omp_set_num_threads(before)
    flags = ("--dstore_path", files.train, "--index_path", files.index, "--k", 20, "--knn_temp", 4)
    for process in together(tmp_path / "log", 2, MODULE, *flags, "--output_path", tmp_path / "two"):
        process.done()
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3") == files_of(tmp_path / "two")
    assert len(files_of(tmp_path / "1")) == 4
    assert [part_rows(rows) for rows in (1, 24_575, 10**6, 5 * 10**9)] == [256, 3072, 4096, 1_220_864]


def test_a_run_stopped_at_any_rename_is_continued(files: Files, tmp_path: Path, monkeypatch) -> None:
    save(files.train, files.index, tmp_path / "whole")
    number, stopped = 0, True
    while stopped:
        output = tmp_path / str(number)
        stopped = stops_at_rename(monkeypatch, lambda output=output: save(files.train, files.index, output), number)
        finished = {path: path.stat().st_mtime_ns for path in output.glob("part-*")}
        save(files.train, files.index, output)
        assert files_of(output) == files_of(tmp_path / "whole")
        assert finished == {path: path.stat().st_mtime_ns for path in finished}  # a finished part is left alone
        number += 1
    assert number >= 5


def test_complete_targets_stay_and_overwrite_replaces_them(files: Files, tmp_path: Path, capsys) -> None:
    save(files.train, files.index, tmp_path / "t")
    save(files.train, files.index, tmp_path / "t")
    assert "nothing to do" in capsys.readouterr().out
    assert "knn_temp" in refusal(files, tmp_path, output_path=tmp_path / "t", knn_temp=8)
    # The best temperature of a kNN-LM's evaluation.
    (tmp_path / "results.json").write_text(json.dumps({"lmbda": 0.2, "knn_temp": 8.0, "perplexity": 3.0}))
    more = ("--choose_on", tmp_path / "results.json", "--overwrite")
    targets = save(files.train, files.index, tmp_path / "t", *more)
    assert read_made(tmp_path / "t").settings["knn_temp"] == 8
    assert_same_distributions(as_dicts(targets), files.expected(8.0, ignore_first=False))


def refusal(files: Files, tmp_path: Path, **changes: object) -> str:
    flags = {"dstore_path": files.train, "index_path": files.index, "output_path": tmp_path / "out", "k": 20} | changes
    return refused_here(MODULE, *(item for name, value in flags.items() for item in (f"--{name}", value)))


def test_what_does_not_fit_is_refused_and_nothing_is_written(files: Files, tmp_path: Path) -> None:
    wide = write_datastore(tmp_path / "wide", np.tile(files.keys, 2), files.values)
    infinite = write_datastore(tmp_path / "infinite", np.where(files.keys > 3, np.inf, files.keys), files.values)
    other = write_datastore(tmp_path / "other", *random_rows(ROWS, seed=9))
    layer = write_datastore(tmp_path / "layer", files.queries, files.labels, layer_position=0)
    base = write_datastore(tmp_path / "base", files.queries, files.labels, base="another")
    np.save(tmp_path / "short.npy", files.values[:-1])
    for changes, named in (
        ({"k": ROWS + 1}, f"--k {ROWS + 1}"),
        ({"dstore_path": wide, "val_path": files.train}, f"{2 * DIM} wide"),
        ({"dstore_path": other}, "datastore"),
        ({"dstore_path": files.validation, "val_path": other}, "datastore"),
        ({"dstore_path": layer, "val_path": files.train}, "layer_position"),
        ({"dstore_path": base, "val_path": files.train}, "base"),
        ({"val_path": tmp_path / "short.npy"}, "short.npy"),
        ({"dstore_path": files.validation}, "--val_path"),
        ({"knn_temp": "nan"}, "--knn_temp nan"),
        ({"threshold": "nan"}, "--threshold"),
        ({"probe": 0}, "--probe 0"),
    ):
        assert named in refusal(files, tmp_path, **changes)
    assert not (tmp_path / "out").exists()
    assert f"{infinite}: row " in refusal(files, tmp_path, dstore_path=infinite, val_path=files.train)
