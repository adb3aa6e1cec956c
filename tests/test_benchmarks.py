"""The benchmarks run through on a tiny model and give every row; nothing here looks at a time."""

from __future__ import annotations

import importlib
import json

import pytest
from conftest import make_text
from harness import command, refused, refused_here, run
from tiny_models import make_base

from benchmarks.run import STAGES

STAGE_ROWS = {
    **{"whole_chain": 4, "embedding": 3, "knn_targets": 3, "target_batches": 3, "training_step": 3},
    **{"training_memory": 2, "joint_evaluation": 2, "first_token": 1, "decoding": 2, "gate": 5, "start": 2},
}
# Each of these starts many processes.
SLOW = ("whole_chain", "knn_targets", "training_memory", "start")
SMALL = {
    **{"rows": 511, "block_size": 64, "stride": 32, "memory_layers": 2, "k": 16, "repeats": 1},
    **{"ncentroids": 4, "probe": 2, "code_size": 8},
}


@pytest.fixture(autouse=True)
def errors_are_raised(monkeypatch):
    monkeypatch.setenv("MLPMEM_TRACEBACK", "1")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    return {"model": make_base("llama", folder / "base"), "text": make_text(folder / "text.txt")}


@pytest.fixture(scope="module")
def setting(inputs, tmp_path_factory):
    from benchmarks.setting import BenchmarkArguments, Setting

    values = SMALL | {name: str(path) for name, path in inputs.items()}
    return Setting.of(BenchmarkArguments(**values, output_dir=str(tmp_path_factory.mktemp("out"))))


def flags(inputs, output, **changes):
    values = SMALL | inputs | {"output_dir": output} | changes
    return [word for name, value in values.items() for word in (f"--{name}", value)]


@pytest.mark.parametrize("stage", [stage for stage in STAGE_ROWS if stage not in SLOW])
def test_a_stage_gives_its_rows(stage, setting):
    rows = getattr(importlib.import_module(f"benchmarks.{STAGES[stage]}"), stage)(setting)
    assert len(rows) == STAGE_ROWS[stage]
    assert all(row.reached is not None and row.detail for row in rows)


def test_windows_hold_exactly_the_asked_number_of_rows(setting):
    assert setting.rows == 511
    assert setting.windows("train")[-1]["dstore_range"][1] == 511
    assert setting.windows("test")[-1]["dstore_range"][1] == setting.test_rows


def test_one_command_prints_a_table_and_writes_results_chart_and_page_though_a_stage_fails(inputs, tmp_path):
    # 7 does not divide the width of the keys, so no index can be built.
    line = refused(
        *("-m", "benchmarks.run", "first_token", "knn_targets", *flags(inputs, tmp_path, code_size=7)),
        MLPMEM_TRACEBACK="",
    )
    assert "knn_targets" in line
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["stage"] for row in results["rows"]] == ["first_token"]
    assert "code_size" in results["failed"]["knn_targets"]
    assert (tmp_path / "targets.png").stat().st_size > 0
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: begin -->\nold\n<!-- table: end -->\nafter\n")
    command("benchmarks.run", "--page", page, "--output_dir", tmp_path)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert results["rows"][0]["name"] in text and "| knn_targets | did not run: " in text
    earlier = tmp_path / "earlier.json"
    rows = [row | {"reached": 1234.0} for row in results["rows"]]
    earlier.write_text(json.dumps(results | {"rows": rows}))
    command("benchmarks.run", "--page", page, "--output_dir", tmp_path, "--before", earlier)
    assert "| before | now |" in page.read_text() and "| 1,234 |" in page.read_text()
    page.write_text("no marks\n")
    assert str(page) in refused_here("benchmarks.run", "--page", page, "--output_dir", tmp_path)
    assert page.read_text() == "no marks\n"


@pytest.mark.slow
def test_the_stages_that_start_many_processes_give_their_rows(inputs, tmp_path):
    done = run("-m", "benchmarks.run", *SLOW, *flags(inputs, tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["failed"] == {}
    for stage in SLOW:
        assert len([row for row in results["rows"] if row["stage"] == stage]) == STAGE_ROWS[stage]
    assert all(row["name"] in done.stdout for row in results["rows"])


def test_unknown_stages_numbers_pages_and_missing_results_are_refused(inputs, tmp_path):
    assert "speed" in refused_here("benchmarks.run", "speed")
    assert "--k 0" in refused_here("benchmarks.run", *flags(inputs, tmp_path, k=0))
    page, nothing = tmp_path / "page.md", tmp_path / "nothing"
    assert str(page) in refused_here("benchmarks.run", "--page", page, "--output_dir", nothing)
    page.write_text("<!-- table: begin -->\n<!-- table: end -->\n")
    told = refused_here("benchmarks.run", "--page", page, "--output_dir", nothing)
    assert str(nothing / "results.json") in told


@pytest.mark.slow
def test_scaling_measures_each_size_once_and_draws_it(inputs, tmp_path):
    words = ["-m", "benchmarks.scaling", "--sizes", 127, *flags(inputs, tmp_path, stride=64)]
    first = run(*words).stdout
    results = json.loads((tmp_path / "scaling.json").read_text())["127"]
    assert set(results["stages"]) == {"embed", "index", "targets", "train", "joint"}
    assert all(figures["seconds"] > 0 and figures["peak_bytes"] > 0 for figures in results["stages"].values())
    assert set(results["milliseconds_a_token"]) == {"base", "memory", "kNN-LM"}
    assert (tmp_path / "scaling.png").stat().st_size > 0
    again = run(*words).stdout
    assert again.splitlines()[0] == first.splitlines()[0]  # the stages' seconds are those of the first run
    assert "--sizes" in refused_here("benchmarks.scaling", "--sizes", 0, *flags(inputs, tmp_path))
