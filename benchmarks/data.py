"""Benchmarks of stages that write files: embedding, knn_targets."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.setting import Setting
from benchmarks.timing import Row, rounds

WINDOWS, BATCH = 4, 2  # of the embedding benchmark


def embedding(setting: Setting) -> list[Row]:
    """Windows to datastore, compared with the bare decoder body: the base without head and last MLP, which has to run to
    compute the captured input."""
    import torch

    from knn_utils.saveEmbedMulti import save_datastore
    from utils.evaluation import window_batches

    windows = setting.windows()
    windows = windows.select(range(min(WINDOWS, len(windows))))
    batches = [batch["input_ids"].to(setting.device) for _, batch in window_batches(windows, BATCH)]
    tokens, path, rows = sum(batch.numel() for batch in batches), setting.folder / "embedding_benchmark", []
    for dtype in ("float32", "bfloat16"):
        base = setting.base(dtype)
        options = {"settings": {"dim": base.config.hidden_size}, "made_from": {}, "batch_size": BATCH}

        def product(base: Any = base, options: dict[str, Any] = options) -> None:
            save_datastore(base, windows, path, **options, overwrite=True)

        @torch.inference_mode()
        def bare(base: Any = base) -> None:
            with without_last_mlp(base) as body:
                for batch in batches:
                    body(input_ids=batch, use_cache=False)

        seconds = rounds({"bare": bare, "product": product}, setting.repeats, setting.device)
        shutil.rmtree(path)
        rate, bare_rate = (tokens / seconds.median(name) for name in ("product", "bare"))
        share = seconds.ratio("bare", "product")
        detail = f"{rate:.0f} of {bare_rate:.0f} tokens/s"
        rows.append(Row(f"rate of the bare decoder body, {dtype}", share, ">=", 0.95, "x", detail))
    return rows


@contextlib.contextmanager
def without_last_mlp(base: Any) -> Iterator[Any]:
    """The decoder body of `base`, with the identity in place of its last MLP."""
    from torch import nn

    from models.capture import captured_block

    block = captured_block(base)
    mlp, block.mlp = block.mlp, nn.Identity()
    try:
        yield base.base_model
    finally:
        block.mlp = mlp


def knn_targets(setting: Setting) -> list[Row]:
    """Datastore and index to kNN targets on disk, compared with the bare FAISS search of the same queries."""
    import faiss
    import numpy as np

    from knn_utils.datastore import Datastore

    setting.prepare("index")
    dstore = Datastore.open(setting.datastore())
    index = faiss.read_index(str(setting.chain_folder() / "train.index"))
    faiss.extract_index_ivf(index).nprobe = setting.probe
    queries, k = dstore.keys(0, dstore.rows).astype(np.float32), min(setting.k, dstore.rows)
    changes = {"k": k, "overwrite": True, "output_path": setting.folder / "targets_benchmark"}
    module, *flags = setting.step("targets", **changes)
    runs = {"bare": lambda: index.search(queries, k), "product": lambda: run_here(module, flags)}
    seconds = rounds(runs, setting.repeats)
    detail = f"{seconds.median('product'):.2f} s against {seconds.median('bare'):.2f} s for {dstore.rows} rows, k {k}"
    share = seconds.ratio("product", "bare")
    return [Row("whole stage, of the bare FAISS search", share, "<=", 1.25, "x", detail)]


def run_here(module: str, flags: list[str]) -> None:
    """Run a command's `main` in this process, without its output."""
    before, sys.argv = sys.argv, [module, *flags]
    try:
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            importlib.import_module(module).main()
    finally:
        sys.argv = before
