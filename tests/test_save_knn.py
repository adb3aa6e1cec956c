"""kNN targets as files: golden numbers, which hits count, processes, interruptions, growth, temperature, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from harness import GOLDEN, command, refused_here, run, together
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

from knn_utils.block_search import blocks_of
from knn_utils.datastore import KNNTargets, datastore_schema
from knn_utils.parts import datastore_batch, write_single_file
from knn_utils.saveKNNMulti import parts_of
from knn_utils.search import KNNSearcher

ROWS = 700
MODULE = "knn_utils.saveKNNMulti"


@pytest.fixture(autouse=True)
def errors_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPMEM_TRACEBACK", "1")


def build(dstore: Path, *more: object) -> Path:
    command("knn_utils.build_index", "--dstore_path", dstore, "--index_factory", "Flat", *more)
    return dstore.parent / f"{dstore.name}.index"


def save(dstore: Path, index: Path, output: Path, *more: object) -> KNNTargets:
    flags = ("--dstore_path", dstore, "--index_path", index, "--output_path", output, "--k", 20, "--knn_temp", 4)
    command(MODULE, *flags, *more)
    return KNNTargets.open(output, verify=True)


def all_rows(targets: KNNTargets):
    return targets.read(0, targets.rows)


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("part-*"))}


class Files:
    """A training and a validation datastore, and an index over the first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys, self.values = random_rows(ROWS)
        self.queries, self.labels = random_rows(150, seed=1)
        self.train = write_datastore(folder / "train", self.keys, self.values)
        self.validation = write_datastore(folder / "validation", self.queries, self.labels)
        self.index = build(self.train)

    def expected(self, knn_temp: float = 4.0, k: int = 20, ignore_first: bool = True) -> list[dict[int, float]]:
        distances, ids = exact_neighbours(self.keys, self.keys, k)
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
    data = load_file(GOLDEN / f"knn_{name}_first.safetensors")
    settings = json.loads((GOLDEN / "expected.json").read_text())["knn"]
    dstore = tmp_path / "dstore_gpt2_train_16.arrow"
    write_single_file(dstore, datastore_schema(DIM), [datastore_batch(data["keys"], data["vals"])])
    command("knn_utils.build_index", "--dstore_path", dstore, "--index_factory", "Flat")
    command(
        MODULE,
        *("--model_path", "not/there", "--dstore_path", dstore, "--val_path", tmp_path / "train_vals.pkl"),
        *("--index_path", tmp_path / "train_16.index", "--output_path", tmp_path / "knn", "--k", settings["k"]),
        *("--knn_temp", settings["knn_temp"], "--probe", 32, "--batch_size", 16000, "--ignore_first", ignore_first),
        "--knn_gpu",
    )
    targets = all_rows(KNNTargets.open(tmp_path / "knn", verify=True))

    class Golden:
        id_cnt, token_id, prob = data["id_cnt"], data["token_id"], data["prob"]

    assert_same_distributions(as_dicts(targets), as_dicts(Golden))
    np.testing.assert_array_equal(targets.label, data["vals"])


def test_rows_stand_in_the_datastores_order_with_label_and_nearest_distance(files: Files, tmp_path: Path) -> None:
    targets = all_rows(save(files.train, files.index, tmp_path / "t", "--ignore_first", "--part_rows", 300))
    assert_same_distributions(as_dicts(targets), files.expected())
    np.testing.assert_array_equal(targets.label, files.values)
    nearest = exact_neighbours(files.keys, files.keys, 2)[0][:, 1]
    np.testing.assert_allclose(targets.distance, nearest, rtol=1e-4, atol=1e-4)


def test_among_equal_keys_each_row_drops_itself(tmp_path: Path) -> None:
    keys, values = random_rows(60)
    keys[:] = keys[0]
    values[:] = np.arange(60)
    dstore = write_datastore(tmp_path / "d", keys, values)
    targets = as_dicts(all_rows(save(dstore, build(dstore), tmp_path / "t", "--ignore_first", "True")))
    for row, found in enumerate(targets):
        assert row not in found and len(found) == 19
    # Beyond the 20 hits, which are the rows of lowest number, the farthest is dropped in place of the query.
    assert set(targets[50]) == set(range(19))


@pytest.mark.parametrize("values", ["datastore", "npy", "pkl"])
def test_queries_of_another_datastore_drop_their_first_hit(files: Files, tmp_path: Path, values: str) -> None:
    path = {"datastore": files.train, "npy": files.folder / "train_vals.npy", "pkl": files.folder / "train_vals.pkl"}
    more = ("--val_path", path[values], "--ignore_first", "True")
    targets = all_rows(save(files.validation, files.index, tmp_path / "t", *more))
    distances, ids = exact_neighbours(files.queries, files.keys, 20)
    expected = plain_distribution(distances[:, 1:], files.values[ids[:, 1:]], 4.0, 1e-8)
    assert_same_distributions(as_dicts(targets), expected)
    np.testing.assert_array_equal(targets.label, files.labels)


def test_the_own_values_given_by_name_make_the_same_targets_as_none(files: Files, tmp_path: Path) -> None:
    more = ("--ignore_first", "True")
    without = files_of(save(files.train, files.index, tmp_path / "a", *more).path)
    for values in ("train", "train_vals.npy", "train_vals.pkl"):
        named = save(files.train, files.index, tmp_path / values, *more, "--val_path", files.folder / values)
        assert without == files_of(named.path)


def test_places_that_the_probed_lists_leave_empty_are_no_hits(files: Files, tmp_path: Path) -> None:
    command(
        "knn_utils.build_index",
        *("--dstore_path", files.train, "--index_factory", "IVF16,Flat", "--index_path", tmp_path / "ivf.index"),
    )
    searcher = KNNSearcher(tmp_path / "ivf.index", probe=1)
    distances, ids = searcher.search(files.keys, 200)
    assert (ids < 0).any()
    targets = save(files.train, tmp_path / "ivf.index", tmp_path / "t", "--k", 200, "--probe", 1)
    expected = plain_distribution(distances, np.where(ids < 0, -1, files.values[ids]), 4.0, 1e-8)
    assert_same_distributions(as_dicts(all_rows(targets)), expected)


def test_the_original_file_is_one_stream_and_is_not_replaced_unasked(files: Files, tmp_path: Path) -> None:
    parts = save(files.train, files.index, tmp_path / "parts", "--ignore_first", "True")
    path = tmp_path / "knn.arrow"
    single = save(files.train, files.index, path, "--ignore_first", "True", "--single_file")
    assert path.is_file()
    for here, there in zip(vars(all_rows(single)).values(), vars(all_rows(parts)).values(), strict=True):
        np.testing.assert_array_equal(here, there)
    with pytest.raises(Exception, match="--overwrite"):
        save(files.train, files.index, path, "--single_file")
    save(files.train, files.index, path, "--single_file", "--overwrite")


def test_threads_change_no_byte(files: Files, tmp_path: Path) -> None:
    import faiss

    outputs = []
    before = faiss.omp_get_max_threads()
    try:
        for threads in (1, 3):
            faiss.omp_set_num_threads(threads)
            outputs.append(files_of(save(files.train, files.index, tmp_path / str(threads), "--part_rows", 150).path))
    finally:
        faiss.omp_set_num_threads(before)
    assert outputs[0] == outputs[1]


def launch(processes: int, *arguments: object):
    """`python -m …` on several processes of this machine, by the launcher that `accelerate launch` calls."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, "-m")
    return run(*launcher, *arguments, MLPMEM_TRACEBACK="", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")


def test_two_processes_write_the_files_of_one(files: Files, tmp_path: Path) -> None:
    more = ("--knn_temp", 4, "--part_rows", 150)
    one = save(files.train, files.index, tmp_path / "one", *more)
    flags = ("--dstore_path", files.train, "--index_path", files.index, "--output_path", tmp_path / "two", "--k", 20)
    launch(2, MODULE, *flags, *more)
    two = KNNTargets.open(tmp_path / "two", verify=True)
    assert files_of(one.path) == files_of(two.path)
    assert one.settings == two.settings


def test_processes_that_share_an_index_make_the_targets_of_one_whole_index(files: Files, tmp_path: Path) -> None:
    factory = ("--index_factory", "IVF8,PQ4x4")
    index = tmp_path / "whole.index"
    command("knn_utils.build_index", "--dstore_path", files.train, *factory, "--index_path", index)
    more = ("--ignore_first", "True", "--part_rows", 150, "--probe", 4)
    more += ("--knn_temp", 4, "--k", 150)
    whole = save(files.train, index, tmp_path / "whole", *more)
    shared = tmp_path / "shared.index"
    command("knn_utils.build_index", "--dstore_path", files.train, *factory, "--index_path", shared, "--num_shards", 2)
    runs = {
        "shared": ({"MLPMEM_INDEX_GB": "0"}, 3, "in 2 shards, is divided among the processes"),
        "with_room": ({}, 2, "in 2 shards, is whole in every process"),
    }
    for name, (room, processes, told) in runs.items():
        flags = ("--dstore_path", files.train, "--index_path", shared, "--output_path", tmp_path / name)
        started = together(tmp_path / "log", processes, MODULE, *flags, *more, environment=room)
        assert told in "".join(process.done() for process in started)
        assert files_of(KNNTargets.open(tmp_path / name, verify=True).path) == files_of(whole.path)
    alone = save(files.train, shared, tmp_path / "alone", *more)
    assert files_of(alone.path) == files_of(whole.path)


def test_a_run_stopped_at_any_rename_is_continued_to_the_same_files(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("--part_rows", 300, "--ignore_first", "True")
    whole = files_of(save(files.train, files.index, tmp_path / "whole", *more).path)
    number, stopped = 0, True
    while stopped:
        output = tmp_path / str(number)
        stopped = stops_at_rename(
            monkeypatch, lambda output=output: save(files.train, files.index, output, *more), number
        )
        if stopped:
            save(files.train, files.index, output, *more)
        assert files_of(output) == whole
        number += 1
    assert number >= 8


def test_finished_parts_are_left_alone(files: Files, tmp_path: Path, monkeypatch, capsys) -> None:
    more, output = ("--part_rows", 256), tmp_path / "t"
    # manifest, part 0, its record, part 1, its record; the rename of part 2 is stopped
    assert stops_at_rename(monkeypatch, lambda: save(files.train, files.index, output, *more), 5)
    before = {path.name: path.stat().st_mtime_ns for path in output.glob("part-*.arrow")}
    assert len(before) == 2
    save(files.train, files.index, output, *more)
    after = {path.name: path.stat().st_mtime_ns for path in output.glob("part-*.arrow")}
    assert before.items() < after.items()
    # The same targets by an earlier version have a fingerprint of all rows, which is not compared any more.
    manifest = json.loads((output / "manifest.json").read_text())
    for fingerprint in (manifest["settings"]["dstore"]["fingerprint"], "0" * 64):
        manifest["settings"]["dstore"]["fingerprint"] = fingerprint
        (output / "manifest.json").write_text(json.dumps(manifest))
        capsys.readouterr()
        save(files.train, files.index, output, *more)
        assert "nothing to do" in capsys.readouterr().out
    assert after == {path.name: path.stat().st_mtime_ns for path in output.glob("part-*.arrow")}


def test_changed_settings_are_refused_by_name_and_overwrite_replaces(files: Files, tmp_path: Path) -> None:
    save(files.train, files.index, tmp_path / "t")
    flags = ("--dstore_path", files.train, "--index_path", files.index, "--output_path", tmp_path / "t", "--k", 20)
    line = refused_here(MODULE, *flags, "--knn_temp", 8)
    assert "knn_temp 4" in line and "8" in line and "--overwrite" in line
    assert "ignore_first" in refused_here(MODULE, *flags, "--knn_temp", 4, "--ignore_first", "True")
    assert save(files.train, files.index, tmp_path / "t", "--knn_temp", 8, "--overwrite").settings["knn_temp"] == 8


def test_a_grown_datastore_gets_targets_for_its_new_rows_only_unless_all_are_made_anew(tmp_path: Path, capsys) -> None:
    keys, values = random_rows(ROWS)
    dstore, output = tmp_path / "dstore", tmp_path / "t"
    write_datastore(dstore, keys[:400], values[:400])
    index = build(dstore)
    first = files_of(save(dstore, index, output, "--ignore_first", "True").path)
    write_datastore(dstore, keys, values, existing=[100, 100, 100, 100])
    line = refused_here(
        MODULE, "--dstore_path", dstore, "--index_path", index, "--output_path", output, "--k", 20, "--knn_temp", 4
    )
    assert "--extend" in line
    build(dstore, "--extend")
    grown = save(dstore, index, output, "--ignore_first", "True")
    assert grown.rows == ROWS and grown.manifest["history"][0]["rows_before"] == 400
    now = files_of(output)
    assert all(now[name] == data for name, data in first.items())
    distances, ids = exact_neighbours(keys, keys, 20)
    tokens = values[ids]
    tokens[ids == np.arange(ROWS)[:, None]] = -1
    expected = plain_distribution(distances, tokens, 4.0, 1e-8)
    assert_same_distributions(as_dicts(grown.read(400, ROWS)), expected[400:])
    fresh = save(dstore, index, output, "--ignore_first", "True", "--overwrite")
    assert_same_distributions(as_dicts(all_rows(fresh)), expected)
    capsys.readouterr()
    save(dstore, index, output, "--ignore_first", "True")
    assert "nothing to do" in capsys.readouterr().out


def test_the_temperature_is_the_best_one_of_a_knn_lm_evaluation(files: Files, tmp_path: Path) -> None:
    best = {"lmbda": 0.2, "knn_temp": 8.0, "perplexity": 3.0}
    (tmp_path / "results.json").write_text(json.dumps(best))
    targets = save(files.train, files.index, tmp_path / "t", "--choose_on", tmp_path / "results.json")
    assert targets.settings["knn_temp"] == 8
    assert_same_distributions(as_dicts(all_rows(targets)), files.expected(8.0, ignore_first=False))
    (tmp_path / "results.json").write_text(json.dumps(best | {"knn_temp": None}))
    assert "--choose_on" in refusal(files, tmp_path, choose_on=tmp_path / "results.json")


@pytest.mark.unit
def test_parts_depend_on_the_number_of_rows_alone() -> None:
    assert parts_of(400, None) == [256, 144]
    assert parts_of(24_575, None)[:2] == [3072, 3072]
    assert set(parts_of(1_000_000, None)[:-1]) == {4096}
    assert len(parts_of(5_000_000_000, None)) <= 4096
    assert parts_of(500, 200, [300]) == [300, 200]
    assert list(blocks_of([(0, 5), (8, 10)], 3)) == [(0, 3), (3, 5), (8, 10)]


def refusal(files: Files, tmp_path: Path, **changes: object) -> str:
    flags = {"dstore_path": files.train, "index_path": files.index, "output_path": tmp_path / "out", "k": 20} | changes
    return refused_here(MODULE, *(item for name, value in flags.items() for item in (f"--{name}", value)))


def test_what_does_not_fit_is_refused_in_one_line_and_nothing_is_written(files: Files, tmp_path: Path) -> None:
    wide = write_datastore(tmp_path / "wide", np.tile(files.keys, 2), files.values)
    other = write_datastore(tmp_path / "other", *random_rows(ROWS, seed=9))
    layer = write_datastore(tmp_path / "layer", files.keys, files.values, layer_position=0)
    np.save(tmp_path / "short.npy", files.values[:-1])
    for changes, expected in (
        ({"k": ROWS + 1}, f"--k {ROWS + 1}"),
        ({"k": 0}, "--k 0"),
        ({"dstore_path": wide}, f"{2 * DIM} wide"),
        ({"dstore_path": wide, "val_path": files.train}, f"{2 * DIM} wide"),
        ({"dstore_path": other}, "other rows"),
        ({"dstore_path": files.validation, "val_path": other}, "other rows"),
        ({"dstore_path": layer}, "hidden states of block -1"),
        ({"val_path": tmp_path / "short.npy"}, f"{ROWS - 1} values"),
        ({"dstore_path": files.validation}, "--val_path"),
        ({"dstore_path": tmp_path / "none"}, "no such file"),
        ({"index_path": tmp_path / "none"}, "no such index"),
        ({"knn_temp": "0"}, "--knn_temp 0"),
        ({"knn_temp": "nan"}, "--knn_temp nan"),
        ({"threshold": -0.1}, "--threshold"),
        ({"threshold": "nan"}, "--threshold"),
        ({"probe": 0}, "--probe 0"),
    ):
        assert expected in refusal(files, tmp_path, **changes)
    assert not (tmp_path / "out").exists()


def test_a_hidden_state_that_is_not_finite_is_named_and_the_finished_parts_stay(files: Files, tmp_path: Path) -> None:
    keys = files.keys.copy()
    keys[600, 2] = np.inf
    dstore = write_datastore(tmp_path / "bad", keys, files.values)
    more = {"dstore_path": dstore, "val_path": files.train, "knn_temp": 4, "part_rows": 256}
    line = refusal(files, tmp_path, **more)
    assert f"{dstore}: row 600 " in line
    with pytest.raises(Exception, match="incomplete"):
        KNNTargets.open(tmp_path / "out")
