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

from knn_utils.datastore import Datastore, KNNTargets, TargetRows, datastore_schema
from knn_utils.parts import datastore_batch, write_stream
from knn_utils.saveKNNMulti import part_rows
from knn_utils.search import KNNSearcher
from utils.artefact import read_made

ROWS = 700
MODULE = "knn_utils.saveKNNMulti"


@pytest.fixture(autouse=True)
def errors_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPMEM_TRACEBACK", "1")


def build(dstore: Path) -> Path:
    command("knn_utils.build_index", "--dstore_path", dstore, "--index_factory", "Flat")
    return dstore.parent / f"{dstore.name}.index"


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
        self.index = build(self.train)

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


def test_among_equal_keys_each_row_drops_itself(tmp_path: Path) -> None:
    keys, values = random_rows(60)
    keys[:] = keys[0]
    values[:] = np.arange(60)
    dstore = write_datastore(tmp_path / "d", keys, values)
    for row, found in enumerate(as_dicts(save(dstore, build(dstore), tmp_path / "t", "--ignore_first", "True"))):
        assert row not in found and len(found) == 19


@pytest.mark.parametrize("values", ["train", "train_vals.npy"])
def test_queries_of_another_datastore_drop_their_first_hit(files: Files, tmp_path: Path, values: str) -> None:
    more = ("--val_path", files.folder / values, "--ignore_first", "True")
    targets = save(files.validation, files.index, tmp_path / "t", *more)
    distances, ids = exact_neighbours(files.queries, files.keys, 20)
    expected = plain_distribution(distances[:, 1:], files.values[ids[:, 1:]], 4.0, 1e-8)
    assert_same_distributions(as_dicts(targets), expected)
    np.testing.assert_array_equal(targets.label, files.labels)


def test_the_indexed_rows_are_recognised_without_records(files: Files, tmp_path: Path) -> None:
    dstore, index = tmp_path / "dstore.arrow", tmp_path / "foreign.index"
    write_stream(dstore, datastore_schema(DIM), [datastore_batch(files.keys, files.values)])
    index.write_bytes(files.index.read_bytes())
    for number, more in enumerate([(), ("--val_path", files.folder / "train_vals.npy")]):
        targets = save(dstore, index, tmp_path / str(number), "--ignore_first", *more)
        assert_same_distributions(as_dicts(targets), files.expected())


def test_places_that_the_searched_lists_leave_empty_are_no_hits(files: Files, tmp_path: Path) -> None:
    index = tmp_path / "ivf.index"
    command(
        "knn_utils.build_index", "--dstore_path", files.train, "--index_factory", "IVF16,Flat", "--index_path", index
    )
    distances, ids = KNNSearcher(index, probe=1).search(files.keys, 200)
    assert (ids < 0).any()
    targets = save(files.train, index, tmp_path / "t", "--k", 200, "--probe", 1)
    expected = plain_distribution(distances, np.where(ids < 0, -1, files.values[ids]), 4.0, 1e-8)
    assert_same_distributions(as_dicts(targets), expected)


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
    save(files.train, files.index, tmp_path / "t", "--knn_temp", 8, "--overwrite")
    assert read_made(tmp_path / "t").settings["knn_temp"] == 8


def test_the_temperature_is_the_best_one_of_a_knn_lm_evaluation(files: Files, tmp_path: Path) -> None:
    best = {"lmbda": 0.2, "knn_temp": 8.0, "perplexity": 3.0}
    (tmp_path / "results.json").write_text(json.dumps(best))
    targets = save(files.train, files.index, tmp_path / "t", "--choose_on", tmp_path / "results.json")
    assert read_made(tmp_path / "t").settings["knn_temp"] == 8
    assert_same_distributions(as_dicts(targets), files.expected(8.0, ignore_first=False))


@pytest.mark.unit
@pytest.mark.parametrize(
    ("rows", "expected"), [(1, 256), (400, 256), (24_575, 3072), (1_000_000, 4096), (5_000_000_000, 1_220_864)]
)
def test_part_sizes_depend_on_the_number_of_rows_alone(rows: int, expected: int) -> None:
    assert part_rows(rows) == expected


def refusal(files: Files, tmp_path: Path, **changes: object) -> str:
    flags = {"dstore_path": files.train, "index_path": files.index, "output_path": tmp_path / "out", "k": 20} | changes
    return refused_here(MODULE, *(item for name, value in flags.items() for item in (f"--{name}", value)))


def test_what_does_not_fit_is_refused_and_nothing_is_written(files: Files, tmp_path: Path) -> None:
    wide = write_datastore(tmp_path / "wide", np.tile(files.keys, 2), files.values)
    other = write_datastore(tmp_path / "other", *random_rows(ROWS, seed=9))
    layer = write_datastore(tmp_path / "layer", files.queries, files.labels, layer_position=0)
    base = write_datastore(tmp_path / "base", files.queries, files.labels, base="another")
    np.save(tmp_path / "short.npy", files.values[:-1])
    for changes, named in (
        ({"k": ROWS + 1}, f"--k {ROWS + 1}"),
        ({"dstore_path": wide}, f"{2 * DIM} wide"),
        ({"dstore_path": wide, "val_path": files.train}, f"{2 * DIM} wide"),
        ({"dstore_path": other}, "datastore"),
        ({"dstore_path": files.validation, "val_path": other}, "datastore"),
        ({"dstore_path": layer, "val_path": files.train}, "layer_position"),
        ({"dstore_path": base, "val_path": files.train}, "base"),
        ({"val_path": tmp_path / "short.npy"}, "short.npy"),
        ({"dstore_path": files.validation}, "--val_path"),
        ({"dstore_path": tmp_path / "none"}, "none"),
        ({"index_path": tmp_path / "none.index"}, "none.index"),
        ({"knn_temp": "nan"}, "--knn_temp nan"),
        ({"threshold": "nan"}, "--threshold"),
        ({"probe": 0}, "--probe 0"),
    ):
        assert named in refusal(files, tmp_path, **changes)
    assert not (tmp_path / "out").exists()


def test_a_hidden_state_that_is_not_finite_is_named(files: Files, tmp_path: Path) -> None:
    keys = files.keys.copy()
    keys[600, 2] = np.inf
    dstore = write_datastore(tmp_path / "bad", keys, files.values)
    assert f"{dstore}: row 600 " in refusal(files, tmp_path, dstore_path=dstore, val_path=files.train)
    assert Datastore.open(dstore).rows == ROWS and read_made(tmp_path / "out") is None
