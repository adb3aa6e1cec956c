"""Datastore and index to kNN targets on disk, against the bare FAISS search of the same queries; and its memory."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from pathlib import Path

from benchmarks import plain
from benchmarks.measure import Row, median, ratio, rounds, timed
from benchmarks.setting import Setting

STAGE = "knn_targets"
PLAIN_ROWS = 64
# What two runs of one process may differ by; the hits of all rows, or one array of V, would be hundreds of MiB.
MORE_MIB = 32


def measure(setting: Setting) -> list[Row]:
    import numpy as np

    from knn_utils.datastore import Datastore
    from knn_utils.faiss_files import read_faiss
    from knn_utils.search import set_probe

    setting.prepare("index")
    dstore = Datastore.open(setting.dstore_path)
    index = read_faiss(setting.index_path, memory_map=False)
    set_probe(index, setting.probe)
    queries = dstore.keys(0, dstore.rows).astype(np.float32)
    k = min(setting.k, dstore.rows)
    flags = target_flags(setting, setting.dstore_path, setting.folder / "targets_benchmark", k)
    runs = {
        "bare": lambda: index.search(queries, k),
        "product": lambda: run_here("knn_utils.saveKNNMulti", [*flags, "--overwrite"]),
    }
    seconds = rounds(runs, setting.repeats)
    some = queries[:PLAIN_ROWS]
    vocabulary = int(dstore.settings.get("vocab_size") or dstore.vals().max() + 1)
    slow = timed(lambda: plain.knn_targets(index, some, dstore.vals(), k, 16.0, vocabulary)) / len(some)
    detail = (
        f"{median(seconds['product']):.2f} s against {median(seconds['bare']):.2f} s for {dstore.rows} rows, k {k}; "
        f"textbook loop {slow * dstore.rows:.0f} s (from {len(some)} rows)"
    )
    rows = [
        Row(STAGE, "whole stage, of the bare FAISS search", ratio(seconds, "product", "bare"), "<=", 1.25, "x", detail)
    ]
    return rows + memory_rows(setting, dstore, k)


def memory_rows(setting: Setting, dstore: object, k: int) -> list[Row]:
    """Peak anonymous memory with a quarter of the query rows, with all, and with token ids up to two billion."""
    import numpy as np

    quarter = setting.folder / "quarter.arrow"
    head_of(dstore, quarter, max(dstore.rows // 4, 1))
    large = setting.folder / "large_values.npy"
    values = dstore.vals().astype(np.int64)
    np.save(large, (values * ((2**31 - 1) // (values.max() + 1))).astype(np.int32))
    cases = {
        "quarter": target_flags(setting, quarter, setting.folder / "memory_benchmark", k, setting.dstore_path),
        "all": target_flags(setting, setting.dstore_path, setting.folder / "memory_benchmark", k, setting.dstore_path),
        "large": target_flags(setting, setting.dstore_path, setting.folder / "memory_benchmark", k, large),
    }
    peaks = {
        name: setting.watched("knn_utils.saveKNNMulti", *flags, "--overwrite")["peak_bytes"] / 2**20
        for name, flags in cases.items()
    }
    more_rows, more_tokens = peaks["all"] - peaks["quarter"], peaks["large"] - peaks["all"]
    detail = f"whole process: {peaks['quarter']:.0f} MiB with a quarter of the rows, {peaks['all']:.0f} MiB with all"
    rows = [Row(STAGE, "more memory for four times the rows", more_rows, "<=", MORE_MIB, "MiB", detail)]
    detail = f"{peaks['large']:.0f} MiB with token ids up to 2^31, {peaks['all']:.0f} MiB with the model's"
    rows.append(Row(STAGE, "more memory for a huge vocabulary", more_tokens, "<=", MORE_MIB, "MiB", detail))
    return rows


def target_flags(setting: Setting, dstore: Path, output: Path, k: int, values: Path | None = None) -> list[str]:
    """saveKNNMulti's flags. `values`: of the indexed rows, where the queries are not the indexed datastore."""
    flags = ["--dstore_path", dstore, "--index_path", setting.index_path, "--output_path", output, "--k", k]
    flags += ["--knn_temp", 16, "--probe", setting.probe, "--ignore_first", True]
    return [str(word) for word in flags + (["--val_path", values] if values else [])]


def head_of(dstore: object, path: Path, rows: int) -> None:
    """The first rows of a datastore as one Arrow stream."""
    from knn_utils.datastore import datastore_batch
    from knn_utils.parts import write_single_file

    batch = datastore_batch(dstore.keys(0, rows), dstore.vals(0, rows))
    write_single_file(path, batch.schema, [batch])


def run_here(module: str, flags: list[str]) -> None:
    """Run a command's `main` in this process, without its output: rows in, file out, imports done before."""
    before = sys.argv
    sys.argv = [module, *flags]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module(module).main()
    finally:
        sys.argv = before
