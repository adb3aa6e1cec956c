"""Planned sizes against real files, real memories and the paper's numbers."""

from __future__ import annotations

import numpy as np
import pytest
from harness import GOLDEN, command
from knn_files import random_rows, write_datastore
from tiny_models import kept_of_a_row
from transformers import AutoConfig

from knn_utils.datastore import TargetRows
from knn_utils.parts import targets_batch, write_stream
from knn_utils.sizes import Sizes, make_table, memory_parameters, training_memory
from models import memory_class


def disk(**given) -> dict[str, float]:
    return {name: size for name, _, size, *_ in make_table(Sizes(**given))}


def test_planned_bytes_are_those_of_real_files(tmp_path):
    rows, entries = 20_000, 8
    store = write_datastore(tmp_path / "d", *random_rows(rows), part_rows=10_000)
    counts, tokens = np.full(rows, entries, np.int32), np.zeros(rows * entries, np.int32)
    batch = targets_batch(TargetRows(counts, tokens, tokens.astype(np.float16), counts, np.zeros(rows, np.float32)))
    write_stream(tmp_path / "targets.arrow", batch.schema, [batch])
    planned = disk(tokens=rows, hidden=16, entries_per_row=entries)
    assert planned["datastore"] == pytest.approx(sum(part.stat().st_size for part in store.glob("*.arrow")), rel=0.01)
    assert planned["kNN targets"] == pytest.approx((tmp_path / "targets.arrow").stat().st_size, rel=0.01)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_planned_memories_are_those_of_real_ones(family):
    config = AutoConfig.from_pretrained(GOLDEN / family / "memory")
    memory = memory_class(config)(config)
    gated = family == "llama"
    inner = config.intermediate_size if gated else None
    given = {"hidden": config.hidden_size, "vocabulary": config.vocab_size, "layers": config.num_hidden_layers}
    one, two = (
        Sizes(tokens=1, intermediate=inner, gated=gated, micro_batch_rows=rows, **given) for rows in (1000, 2000)
    )
    assert memory_parameters(one) == sum(weight.numel() for weight in memory.parameters())
    kept = (training_memory(two) - training_memory(one)) / 1000
    assert kept == pytest.approx(kept_of_a_row(memory, "bf16") + 8 * config.hidden_size, rel=0.1)


def test_the_command_prints_the_papers_sizes(capsys):
    assert memory_parameters(Sizes(tokens=1)) == pytest.approx(774e6, rel=0.01)
    assert disk(tokens=5_000_000_000, hidden=4096)["datastore"] == pytest.approx(40e12, rel=0.05)
    command("knn_utils.sizes", "--tokens", 1_000_000, "--model_name_or_path", GOLDEN / "llama" / "base")
    lines = capsys.readouterr().out.splitlines()
    assert "| datastore | 1,000,000 | 68.0 MB |" in lines[3]  # 32 float16 and an int32 each
