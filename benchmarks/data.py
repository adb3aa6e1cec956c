"""Stages that make and read files: embedding, knn_targets, target_batches."""

from __future__ import annotations

import contextlib
import importlib
import io
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks import plain
from benchmarks.setting import Setting
from benchmarks.timing import Row, rounds, timed

# Embedding: windows, and how many at a time.
WINDOWS, BATCH = 4, 2
# Rows that the textbook search is timed on.
PLAIN_ROWS = 64
# What two runs of one process may differ by; the hits of all rows, or one array of V, would be hundreds of MiB.
MORE_MIB = 32


def embedding(setting: Setting) -> list[Row]:
    """Windows to datastore, against the bare decoder body and against a forward pass with logits.

    The bare body is the base's own decoder with the last block's MLP taken out: what must run to know the captured
    input.
    """
    import torch

    from knn_utils.saveEmbedMulti import save_datastore
    from utils.evaluation import count_rows, window_batches

    windows = setting.windows()
    windows = windows.select(range(min(WINDOWS, len(windows))))
    batches = [batch for _, batch in window_batches(windows, BATCH)]
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    ids, labels = (batches[-1][name][:1].to(setting.device) for name in ("input_ids", "labels"))
    path = setting.folder / "embedding_benchmark"
    rows = []
    for dtype in ("float32", "bfloat16"):
        base = setting.base(dtype)
        made_with = {"dim": base.config.hidden_size, "dataset": "benchmark", "dtype": dtype}

        def product(base: Any = base, made_with: dict[str, Any] = made_with) -> None:
            save_datastore(base, windows, path, settings=made_with, batch_size=BATCH, overwrite=True)

        @torch.inference_mode()
        def bare(base: Any = base) -> None:
            with without_last_mlp(base) as body:
                for batch in batches:
                    body(input_ids=batch["input_ids"].to(setting.device), use_cache=False)

        runs = {"bare": bare, "product": product}
        if dtype == "float32":
            runs["with logits"] = lambda base=base: plain.embed(base, ids, labels)
        seconds = rounds(runs, setting.repeats, setting.device)
        shutil.rmtree(path, ignore_errors=True)
        rate = tokens / seconds.median("product")
        detail = f"{rate:.0f} of {tokens / seconds.median('bare'):.0f} tokens/s"
        detail += f", {int(count_rows(windows).sum())} rows written"
        share = seconds.ratio("bare", "product")
        rows.append(Row(f"rate of the bare decoder body, {dtype}", share, ">=", 0.95, "x", detail))
        if dtype == "float32":
            slow = ids.numel() / seconds.median("with logits")
            detail = f"a forward with logits and loss: {slow:.0f} tokens/s"
            rows.append(Row("rate of a forward with logits, float32", rate / slow, ">=", 1.2, "x", detail))
    return rows


@contextlib.contextmanager
def without_last_mlp(base: Any) -> Iterator[Any]:
    """The decoder body of `base`, its last MLP replaced by nothing meanwhile."""
    from torch import nn

    from models.capture import captured_block

    block = captured_block(base)
    mlp, block.mlp = block.mlp, nn.Identity()
    try:
        yield base.base_model
    finally:
        block.mlp = mlp


def knn_targets(setting: Setting) -> list[Row]:
    """Datastore and index to kNN targets on disk, against the bare FAISS search of the same queries; and its memory."""
    import numpy as np

    setting.prepare("index")
    dstore, index = open_search(setting)
    queries = dstore.keys(0, dstore.rows).astype(np.float32)
    k = min(setting.k, dstore.rows)
    changes = {"k": k, "overwrite": True, "output_path": setting.folder / "targets_benchmark"}
    product = setting.step("targets", **changes)
    runs = {"bare": lambda: index.search(queries, k), "product": lambda: run_here(*product)}
    seconds = rounds(runs, setting.repeats)
    vocabulary = int(dstore.settings.get("vocab_size") or dstore.vals().max() + 1)
    slow = plain_search_seconds(index, dstore, k, vocabulary)
    detail = (
        f"{seconds.median('product'):.2f} s against {seconds.median('bare'):.2f} s for {dstore.rows} rows, k {k}; "
        f"textbook loop {slow:.0f} s (from {min(PLAIN_ROWS, dstore.rows)} rows)"
    )
    whole = Row("whole stage, of the bare FAISS search", seconds.ratio("product", "bare"), "<=", 1.25, "x", detail)
    return [whole, *memory_of_targets(setting, dstore, changes)]


def open_search(setting: Setting) -> tuple[Any, Any]:
    """(datastore, FAISS index in memory with the setting's probe)."""
    from knn_utils.datastore import Datastore
    from knn_utils.faiss_files import read_faiss, set_probe

    index = read_faiss(setting.chain_folder() / "train.index", memory_map=False)
    set_probe(index, setting.probe)
    return Datastore.open(setting.datastore()), index


def plain_search_seconds(index: Any, dstore: Any, k: int, vocabulary: int) -> float:
    """The textbook way's seconds for the targets of all rows, from a few of them."""
    import numpy as np

    some = dstore.keys(0, min(PLAIN_ROWS, dstore.rows)).astype(np.float32)
    values = dstore.vals()
    return timed(lambda: plain.knn_targets(index, some, values, k, 16.0, vocabulary)) / len(some) * dstore.rows


def memory_of_targets(setting: Setting, dstore: Any, changes: dict[str, Any]) -> list[Row]:
    """Peak anonymous memory with a quarter of the query rows, with all, and with token ids up to two billion."""
    import numpy as np

    from knn_utils.parts import datastore_batch, write_single_file

    quarter, large = setting.folder / "quarter.arrow", setting.folder / "large_values.npy"
    rows = max(dstore.rows // 4, 1)
    batch = datastore_batch(dstore.keys(0, rows), dstore.vals(0, rows))
    write_single_file(quarter, batch.schema, [batch])
    values = dstore.vals().astype(np.int64)
    np.save(large, (values * ((2**31 - 1) // (values.max() + 1))).astype(np.int32))
    whole = setting.datastore()
    cases = {"quarter": (quarter, whole), "all": (whole, whole), "large": (whole, large)}
    peaks = {}
    for name, (queries, indexed) in cases.items():
        command = setting.step("targets", **changes, dstore_path=queries, val_path=indexed)
        peaks[name] = setting.watched(*command)["peak_bytes"] / 2**20
    detail = f"whole process: {peaks['quarter']:.0f} MiB with a quarter of the rows, {peaks['all']:.0f} MiB with all"
    more_rows = Row(
        "more memory for four times the rows", peaks["all"] - peaks["quarter"], "<=", MORE_MIB, "MiB", detail
    )
    detail = f"{peaks['large']:.0f} MiB with token ids up to 2^31, {peaks['all']:.0f} MiB with the model's"
    more_tokens = Row("more memory for a huge vocabulary", peaks["large"] - peaks["all"], "<=", MORE_MIB, "MiB", detail)
    return [more_rows, more_tokens]


def run_here(module: str, *flags: str) -> None:
    """Run a command's `main` in this process, without its output: rows in, file out, imports done before."""
    before = sys.argv
    sys.argv = [module, *flags]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module(module).main()
    finally:
        sys.argv = before


def target_batches(setting: Setting) -> list[Row]:
    """From kNN targets on disk to the tensors of a training step: rate, bytes, and that nothing dense is built."""
    import numpy as np

    from benchmarks.training_step import offline_rows, step_windows

    source = offline_rows(setting.prepare("targets"))
    loads = [np.asarray(load) for load in step_windows(setting, source)]
    rows_read = sum(int(source.counts[load].sum()) for load in loads)

    def read() -> None:
        for load in loads:
            source.rows(*source.read(load))

    seconds = rounds({"read": read}, max(setting.repeats, 3))
    label, id_cnt, token_id, prob = arrays = source.read_targets(loads[0])
    rows, entries = len(label), len(token_id)
    in_batch = sum(array.nbytes for array in arrays) / entries
    all_entries = sum(len(source.read_targets(load)[2]) for load in loads)
    on_disk = sum(part.stat().st_size for part in (setting.chain_folder() / "targets").glob("*.arrow")) / all_entries
    lists = plain.as_lists(id_cnt, token_id, prob)
    slow = timed(lambda: plain.dense_target(lists, source.vocabulary)) / len(lists)
    rate = rows_read / seconds.median("read")
    dense, largest = 4 * source.vocabulary * rows / 1e6, max(array.nbytes for array in arrays) / 1e6
    of_rate = f"one worker, warm file, hidden states included; dense targets in a loop: {1 / slow:.0f} tokens/s"
    of_bytes = f"{in_batch:.2f} in a batch, {on_disk:.2f} on disk; {all_entries / rows_read:.0f} entries a row"
    of_largest = f"{largest:.2f} MB where a dense target has {dense:.0f} MB ({rows} rows)"
    return [
        Row("rate of one worker", rate, ">=", 500_000, "tokens/s", of_rate),
        Row("bytes of a stored entry", max(in_batch, on_disk), "<=", 6.5, "bytes", of_bytes),
        Row("largest array of a batch, of the dense target", largest / dense, "<=", 0.1, "x", of_largest),
    ]
