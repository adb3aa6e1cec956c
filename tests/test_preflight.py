"""Before a long job: files against each other, sizes against real files, plans for any size."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from harness import GOLDEN, command, refused_here
from tiny_models import kept_of_a_row, make_base

from knn_utils.planner import (
    Rates,
    Sizes,
    datastore_bytes,
    datastore_rows,
    index_bytes,
    make_plan,
    memory_parameters,
    targets_bytes,
    total,
    training_memory,
    windows_bytes,
)

SIZES = {
    "block_size": 1024,
    "stride": 512,
    "tokens": 1_000_000,
    "dim": 32,
    "vocab": 276,
    "base_parameters": 10_000,
    "layers": 2,
    "intermediate": 64,
    "gated": True,
    "k": 16,
    "entries_per_row": 4.0,
}
PLAN = ("--dim", 32, "--vocab", 276, "--base_parameters", 1e4, "--device_tflops", 1)
MODULE = "knn_utils.preflight"


@pytest.fixture(autouse=True)
def errors_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPMEM_TRACEBACK", "1")


def size_of(folder, pattern):
    return sum(path.stat().st_size for path in folder.rglob(pattern))


def preflight(capsys, *arguments):
    capsys.readouterr()
    command(MODULE, *arguments, "--json")
    return json.loads(capsys.readouterr().out)


def files(world):
    return {
        "--model_name_or_path": world.base,
        "--dataset_name": world.windows,
        "--dstore_path": world.dstore("train"),
        "--index_path": world.index,
        "--knn_save_path": world.targets,
    }


def flat(flags):
    return [item for pair in flags.items() for item in pair]


def test_planned_bytes_are_those_of_real_files(llama_world, tmp_path):
    from knn_utils.datastore import KNNTargets

    index = ("--index_path", tmp_path / "x.index", "--ncentroids", 16, "--code_size", 8)
    command("knn_utils.build_index", "--dstore_path", llama_world.dstore("train"), *index)
    targets = KNNTargets.open(llama_world.targets)
    rows = targets.rows
    entries = float(targets.read(0, rows).id_cnt.mean())
    # Small files: Arrow's headers and padding weigh more than in large ones.
    assert size_of(llama_world.dstore("train"), "part-*.arrow") == pytest.approx(datastore_bytes(rows, 32), rel=0.12)
    assert size_of(llama_world.targets, "part-*.arrow") == pytest.approx(targets_bytes(rows, entries), rel=0.12)
    assert (tmp_path / "x.index").stat().st_size == pytest.approx(index_bytes(rows, 32, 8, 16), rel=0.02)
    sizes = Sizes(**SIZES | {"tokens": 94 * 32, "block_size": 64, "stride": 32})
    assert size_of(llama_world.windows / "train", "*.arrow") == pytest.approx(windows_bytes(sizes), rel=0.12)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_planned_weights_are_counted_as_a_memory_has_them(family):
    from transformers import AutoConfig

    from models import memory_class

    config = AutoConfig.from_pretrained(GOLDEN / family / "memory")
    memory = memory_class(config)(config)
    gated = family == "llama"
    width = config.intermediate_size if gated else 4 * config.hidden_size
    sizes = Sizes(
        **SIZES
        | {"dim": config.hidden_size, "vocab": config.vocab_size, "layers": config.num_hidden_layers}
        | {"intermediate": width, "gated": gated}
    )
    assert memory_parameters(sizes) == sum(weight.numel() for weight in memory.parameters())
    more, less = (training_memory(replace(sizes, micro_batch_rows=rows)) for rows in (2000, 1000))
    assert (more - less) / 1000 == pytest.approx(kept_of_a_row(memory, "bf16") + 8 * sizes.dim, rel=0.1)


def test_the_papers_memory_and_its_datastore_have_the_papers_sizes():
    large = Sizes(**SIZES | {"dim": 1280, "vocab": 50257, "layers": 54, "intermediate": 5120, "gated": False})
    assert memory_parameters(large) / 1e6 == pytest.approx(774, rel=0.01)
    mistral = Sizes(**SIZES | {"tokens": 5_000_000_000, "dim": 4096})
    assert datastore_bytes(datastore_rows(mistral), mistral.dim) / 1e12 == pytest.approx(40, rel=0.05)
    # Windows that do not overlap have a row less each.
    assert datastore_rows(Sizes(**SIZES | {"tokens": 6400, "block_size": 64, "stride": 64})) == 6400 - 100


def test_more_processes_take_less_time_and_sharding_less_memory():
    rates = Rates(1e12, 1e9, 1e9, 1e12)
    one, eight = (total(make_plan(Sizes(**SIZES | {"processes": count}), rates)) for count in (1, 8))
    assert one["seconds"] > 6 * eight["seconds"] and one["bytes"] == eight["bytes"]
    slow = make_plan(Sizes(**SIZES), Rates(1e12, 1e9, 1e9, 1e3))
    assert {stage.bound for stage in slow[1:]} == {"disk"}
    sharded = Sizes(**SIZES | {"processes": 8, "sharded": True, "layers": 50, "micro_batch_rows": 1})
    whole = Sizes(**SIZES | {"processes": 8, "layers": 50, "micro_batch_rows": 1})
    assert training_memory(sharded) < training_memory(whole)


def test_a_smaller_card_trains_with_fewer_rows_at_once(capsys):
    sizes = ("--tokens", 10_000, *PLAN, "--layers", 40)
    for memory, told in ((2, "enough for every stage\n"), (0.8, "enough for every stage, training with fewer rows")):
        command(MODULE, *sizes, "--device_memory_gb", memory)
        assert told in capsys.readouterr().out


def test_files_that_belong_together_pass_and_give_the_plans_sizes(llama_world, capsys):
    flags = files(llama_world)
    found = preflight(capsys, *flat(flags), "--k", 16, "--layers", 2)
    assert [fact.split()[0] for fact in found["checks"]][:5] == ["model", "windows", "datastore", "index", "kNN"]
    sizes = found["plan"]["sizes"]
    assert (sizes["dim"], sizes["vocab"], sizes["block_size"]) == (32, 276, 64)
    assert 1 < sizes["entries_per_row"] < 16
    assert any("measured on --knn_save_path" in fact for fact in found["checks"])
    assert found["plan"]["seconds"] is None
    del flags["--model_name_or_path"]
    found = preflight(capsys, *flat(flags))
    assert len(found["checks"]) == 4 and found["plan"] is None


def test_files_that_do_not_belong_together_are_refused(llama_world, tmp_path):
    wide = make_base("llama", tmp_path / "wide", hidden=64)
    for changed, expected in (
        ({"--dstore_path": llama_world.dstore("test")}, "rows"),
        ({"--dataset_split_name": "test"}, "rows"),
        ({"--model_name_or_path": wide}, "32 wide"),
        ({"--layer_position": 0}, "block -1"),
        ({"--knn_generator_path": GOLDEN / "llama" / "memory"}, "97 tokens"),
    ):
        assert expected in refused_here(MODULE, *flat(files(llama_world) | changed))


def test_a_changed_byte_of_an_index_is_found_on_request(llama_world, capsys, tmp_path):
    index = tmp_path / llama_world.index.name
    content = bytearray(llama_world.index.read_bytes())
    content[-1] ^= 1
    index.write_bytes(content)
    record = llama_world.index.with_name(index.name + ".json")
    (tmp_path / record.name).write_bytes(record.read_bytes())
    preflight(capsys, "--index_path", index)
    assert "checksum" in refused_here(MODULE, "--index_path", index, "--verify")


def test_times_come_from_rates_that_are_called_assumed(capsys):
    command(MODULE, "--tokens", 10_000, *PLAN[:-2])
    assert "No times: give --device_tflops" in capsys.readouterr().out
    command(MODULE, "--tokens", 10_000, *PLAN)
    assert "assumed rates: 1 TFLOP/s" in capsys.readouterr().out


OUT_OF_RANGE = [
    *(
        (name, value)
        for name in ("device_tflops", "device_memory_gb", "disk_gb_per_second")
        for value in ("nan", "inf")
    ),
    *(("lookups_per_second", "nan"), ("hits_per_second", "nan"), ("entries_per_row", "nan"), ("k", 10**400)),
    *(
        ("index_factory", value)
        for value in ("Nope", "HNSW32", "IVF0,Flat", "IVF4096,PQ7", "PQ64x4", "IVF99999999999,Flat")
    ),
]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "nothing to do"),
        (("--tokens", 0), "--tokens 0"),
        (("--tokens", 10, "--base_parameters", "nan"), "--base_parameters nan"),
        (("--tokens", 10), "--dim"),
        *((("--tokens", 10, *PLAN, f"--{name}", value), f"--{name} {value}") for name, value in OUT_OF_RANGE),
        (("--tokens", 10, "--dim", 8, "--vocab", 9), "--base_parameters"),
        # More than the disk, more than a device.
        (("--tokens", 5_000_000_000_000, *PLAN, "--output_dir", "not/there/yet"), "--output_dir not/there/yet"),
        (("--tokens", 10_000, *PLAN, "--device_memory_gb", 0.1, "--layers", 100), "memory: needs about"),
        (("--dataset_name", "nowhere"), "nowhere"),
        (("--index_path", "nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_planned_is_said(arguments, expected):
    assert expected in refused_here(MODULE, *arguments)
