"""The benchmarks run on a tiny model and give their rows; times are not checked."""

from __future__ import annotations

import importlib
import json

import pytest
from conftest import make_text
from harness import ROOT, command, refused_here
from tiny_models import make_base

from benchmarks.run import STAGES

ROWS = {
    **{"whole_chain": 2, "embedding": 2, "knn_targets": 1, "training_step": 2, "training_memory": 1},
    **{"joint_evaluation": 1, "first_token": 1, "decoding": 1, "gate": 4, "start": 1},
}
SMALL = {
    **{"rows": 511, "block_size": 64, "stride": 32, "memory_layers": 2, "k": 16, "repeats": 1},
    **{"ncentroids": 4, "probe": 2, "code_size": 8},
}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    from benchmarks.setting import BenchmarkArguments, Setting

    folder = tmp_path_factory.mktemp("benchmarks")
    inputs = {"model": str(make_base("llama", folder / "base")), "text": str(make_text(folder / "text.txt"))}
    return Setting.of(BenchmarkArguments(**SMALL, **inputs, output_dir=str(folder / "out")))


@pytest.mark.unit
def test_every_module_can_be_imported():
    for path in (ROOT / "benchmarks").glob("*.py"):
        importlib.import_module(f"benchmarks.{path.stem}")


@pytest.mark.parametrize("stage", ROWS)
def test_a_stage_gives_its_rows(stage, setting, monkeypatch):
    from accelerate.state import AcceleratorState

    from benchmarks.setting import Setting

    def here(self, *words, **_):
        AcceleratorState._reset_state(reset_partial_state=True)  # the commands differ in precision
        command(*words[1:])
        return 1.0

    monkeypatch.setattr(Setting, "run", here)  # a process for each takes too long here
    rows = getattr(importlib.import_module(f"benchmarks.{STAGES[stage]}"), stage)(setting)
    assert len(rows) == ROWS[stage]
    assert all(row.detail and (row.reached is not None or not row.applies) for row in rows)


def test_windows_hold_exactly_the_requested_number_of_rows(setting):
    assert setting.rows == 511
    assert setting.windows("train")[-1]["dstore_range"][1] == 511
    assert setting.windows("test")[-1]["dstore_range"][1] == setting.test_rows


def test_a_failed_stage_is_recorded_and_the_table_goes_into_a_page(setting, tmp_path, monkeypatch):
    from benchmarks.run import run
    from benchmarks.setting import Setting
    from utils.errors import InputError
    from utils.files import write_json

    def measure(self, *words, **_):
        stage, _, rows = words[2:]
        if stage == "gate":
            raise InputError("no gate")
        write_json(
            rows, [{"name": "some row", "reached": 2.0, "sign": "<=", "target": 3.0, "unit": "s", "stage": stage}]
        )
        return 1.0

    monkeypatch.setattr(Setting, "run", measure)
    with pytest.raises(InputError, match="gate"):
        run(setting, ["decoding", "gate"], tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["stage"] for row in results["rows"]] == ["decoding"] and results["failed"] == {"gate": "no gate"}
    assert (tmp_path / "targets.png").stat().st_size > 0
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: begin -->\nold\n<!-- table: end -->\nafter\n")
    command("benchmarks.run", "--page", page, "--output_dir", tmp_path, "--before", tmp_path / "results.json")
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and "some row" in text
    assert "speed" in refused_here("benchmarks.run", "speed")
