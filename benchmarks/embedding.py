"""Windows to datastore, against the bare decoder body and against a forward pass with logits.

The bare body is the base's own decoder with the last block's MLP taken out: what must run to know the captured input.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

from benchmarks import plain
from benchmarks.measure import Row, median, ratio, rounds
from benchmarks.setting import Setting

STAGE = "embedding"
WINDOWS, BATCH = 4, 2


def measure(setting: Setting) -> list[Row]:
    import torch

    from knn_utils.datastore import count_rows
    from knn_utils.saveEmbedMulti import save_datastore
    from utils.evaluation import window_batches

    windows = setting.windows()
    windows = windows.select(range(min(WINDOWS, len(windows))))
    batches = [batch for _, batch in window_batches(windows, BATCH)]
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    first = {name: batches[-1][name][:1].to(setting.device) for name in ("input_ids", "labels")}
    path = setting.folder / "embedding_benchmark"
    rows = []
    for dtype, name in (("float32", "no"), ("bfloat16", "bf16")):
        base = setting.base(dtype)
        settings = {"dim": base.config.hidden_size, "dataset": "benchmark", "dtype": dtype}

        def product(base: Any = base, settings: dict[str, Any] = settings) -> None:
            save_datastore(base, windows, path, settings=settings, batch_size=BATCH, overwrite=True)

        @torch.inference_mode()
        def bare(base: Any = base) -> None:
            with without_last_mlp(base) as body:
                for batch in batches:
                    body(input_ids=batch["input_ids"].to(setting.device), use_cache=False)

        runs = {"bare": bare, "product": product}
        if name == "no":
            runs["with logits"] = lambda base=base: plain.embed(base, first["input_ids"], first["labels"])
        seconds = rounds(runs, setting.repeats, device=setting.device)
        shutil.rmtree(path, ignore_errors=True)
        rates = f"{tokens / median(seconds['product']):.0f} of {tokens / median(seconds['bare']):.0f} tokens/s"
        share = ratio(seconds, "bare", "product")
        detail = f"{rates}, {int(count_rows(windows).sum())} rows written"
        rows.append(Row(STAGE, f"rate of the bare decoder body, {dtype}", share, ">=", 0.95, "x", detail))
        if name == "no":
            per_token = median(seconds["with logits"]) / first["input_ids"].numel()
            faster = per_token * tokens / median(seconds["product"])
            detail = f"a forward with logits and loss: {1 / per_token:.0f} tokens/s"
            rows.append(Row(STAGE, "rate of a forward with logits, float32", faster, ">=", 1.2, "x", detail))
        del base
    return rows


@contextlib.contextmanager
def without_last_mlp(base: Any) -> Iterator[Any]:
    """The decoder body of `base`, its last MLP replaced by nothing meanwhile."""
    from torch import nn

    from models.capture import captured_block

    block = captured_block(base)
    mlp = block.mlp
    block.mlp = nn.Identity()
    try:
        yield base.base_model
    finally:
        block.mlp = mlp
