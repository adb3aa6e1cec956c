"""The comparison of one index with its shards, small: equal hits, and a share of the index in each process."""

from __future__ import annotations

import json

from conftest import run


def test_shards_give_the_hits_of_one_index_and_each_process_reads_its_own(tmp_path):
    # Large enough that the sampling of memory, ten times a second, sees the search.
    sizes = ("--rows", 50_000, "--dim", 64, "--queries", 2_000, "--shards", 2, "--k", 8, "--index_factory", "IVF8,Flat")
    done = run("-m", "benchmarks.shards", "--output", tmp_path, *sizes)
    found = json.loads((tmp_path / "results.json").read_text())
    assert [(one["shards"], one["processes"]) for one in found] == [(1, 1), (2, 1), (2, 2)]
    assert len({one["targets"] for one in found}) == 1
    assert "| 2 | 2 |" in done.stdout
    whole, _, apart = found
    assert len(apart["memory"]) == 2
    for figures in apart["memory"]:
        assert 0 < figures["mapped_bytes"] < 0.7 * whole["memory"][0]["mapped_bytes"]
