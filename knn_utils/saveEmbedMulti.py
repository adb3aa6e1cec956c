"""Capture and save: windows in, a datastore of (hidden state, next token) out.

The base runs only up to the captured input: no head, no loss, nothing of the block after it. Each process
writes its own parts, in the order of the windows; the same command continues an interrupted run.
Windows that were added after those of a complete datastore become further parts of it. Knows nothing of indexes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from knn_utils.datastore import count_rows, datastore_batch
from knn_utils.manifest import MANIFEST_NAME, plan_of, read_manifest
from knn_utils.parts import PartedOutput, write_single_file
from utils.distributed import decided_by_main
from utils.errors import InputError
from utils.evaluation import Scorer, check_token_ids, predicted_positions, window_batches
from utils.loading import windows_fingerprint

PART_BYTES = 1 << 30
SMALLEST_PARTS = 16


def datastore_name(model_type: str, subset: str, dim: int) -> str:
    """The original's file name of a datastore."""
    return f"dstore_{model_type}_{subset}_{dim}.arrow"


def plan_parts(window_rows: np.ndarray, dim: int, batch_size: int) -> list[tuple[int, int]]:
    """Window ranges (first, past-last) of the parts.

    A part holds at most about a gibibyte of keys, and a small datastore still gets several parts, so that an
    interruption loses little. The plan depends on the data alone, not on the number of processes.
    """
    windows, rows = len(window_rows), int(window_rows.sum())
    parts = max(SMALLEST_PARTS, math.ceil(rows * dim * 2 / PART_BYTES))
    size = math.ceil(windows / parts / batch_size) * batch_size
    plan: list[tuple[int, int]] = []
    for start in range(0, windows, size):
        stop = min(start + size, windows)
        if plan and not window_rows[start:stop].any():
            plan[-1] = (plan[-1][0], stop)  # a part needs a row
        else:
            plan.append((start, stop))
    return plan


def continued_plan(
    path: str | Path, windows: Any, window_rows: np.ndarray, dim: int, batch_size: int, extend: bool
) -> tuple[list[tuple[int, int]], bool]:
    """The parts of the datastore at `path`, where there is one of these windows, else new ones.

    Returns:
        window ranges (first, past-last) of the parts, and whether further parts follow those of a shorter datastore.

    Raises:
        InputError: with `extend`, the datastore is not one of the first of these windows.
    """
    fresh = plan_parts(window_rows, dim, batch_size)
    if not (Path(path) / MANIFEST_NAME).is_file():
        return fresh, False
    manifest = read_manifest(Path(path), "datastore")
    ends, bounds = np.cumsum(window_rows), np.cumsum(plan_of(manifest))
    held, total = int(bounds[-1]) if len(bounds) else 0, int(ends[-1])
    if held == 0 or not (held == total or extend):
        return fresh, False
    reached = np.searchsorted(ends, bounds)  # (parts,) the window that ends each part
    aligned = held <= total and bool((ends[np.minimum(reached, len(ends) - 1)] == bounds).all())
    if not aligned:
        if extend:
            raise InputError(
                f"--extend: {path} holds {held} rows, which are not the first windows' of these {len(windows)} "
                f"({total} rows); new documents come after the old ones (preprocess_dataset --append_to)"
            )
        return fresh, False
    stops = [int(window) + 1 for window in reached]
    if held == total:
        stops[-1] = len(windows)
    else:
        count = manifest["info"].get("windows")
        if isinstance(count, int) and stops[-1] <= count <= len(windows) and ends[count - 1] == held:
            stops[-1] = count
        if windows_fingerprint(windows.select(range(stops[-1]))) != manifest["settings"].get("dataset"):
            raise InputError(
                f"--extend: {path} was made from {stops[-1]} windows that are not the first ones of these; new "
                "documents come after the old ones (preprocess_dataset --append_to)"
            )
    plan = list(zip([0, *stops[:-1]], stops, strict=True))
    if held == total:
        return plan, False
    further = plan_parts(window_rows[stops[-1] :], dim, batch_size)
    return plan + [(stops[-1] + first, stops[-1] + last) for first, last in further], True


def capture_rows(
    base: Any, windows: Any, first: int, last: int, batch_size: int, layer_position: int, with_logprob: bool
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """Run the base over windows [first, last) and yield (keys float16, values int32, log-probabilities) by batch.

    Raises:
        InputError: a hidden state is not finite in float16.
    """
    from models.capture import hidden_states

    device = base.get_input_embeddings().weight.device
    scorer = Scorer(base, layer_position)
    piece = windows.select(range(first, last)) if (first, last) != (0, len(windows)) else windows
    for start, batch in window_batches(piece, batch_size):
        mask, values = predicted_positions(batch["labels"])
        if not values.numel():
            continue
        with torch.inference_mode():
            if with_logprob:
                keys, logprob = scorer.score(batch["input_ids"], mask, values.to(device))
            else:
                hidden = hidden_states(base, batch["input_ids"].to(device), layer_position=layer_position)
                keys, logprob = hidden[mask.to(device)], None  # (rows, hidden)
            keys = keys.to(torch.float16).cpu()
        if not bool(torch.isfinite(keys).all()):
            raise InputError(
                f"windows {first + start} to {first + start + len(batch['labels']) - 1}: the base's hidden states hold "
                "NaN or infinity in float16; check the model, or run it in float32"
            )
        yield keys.numpy(), values.to(torch.int32).numpy(), None if logprob is None else logprob.cpu().numpy()


def save_datastore(
    base: Any,
    windows: Any,
    path: str | Path,
    *,
    settings: dict[str, Any],
    info: dict[str, Any] | None = None,
    batch_size: int = 8,
    layer_position: int = -1,
    with_logprob: bool = False,
    overwrite: bool = False,
    extend: bool = False,
    single_file: bool = False,
) -> dict[str, Any]:
    """Write the datastore of `windows` to `path`.

    Args:
        base: the base model, on its device.
        windows: a split of a windows folder.
        path: the folder (or, with `single_file`, the Arrow stream) to write.
        settings: what made it, recorded in the manifest; a run with other settings is refused.
        with_logprob: also run the head and keep the base's log-probability of each value (a third column), which
            validation during training and the choice of a temperature read.
        extend: a datastore of the first of these windows is kept and gets further parts.

    Returns:
        the manifest.

    Raises:
        InputError: hidden states that are not finite, token ids beyond the vocabulary, a folder made with other
            settings, or a folder that another run is writing.
    """
    from accelerate import PartialState

    state = PartialState()
    vocabulary = base.get_input_embeddings().weight.shape[0]
    check_token_ids(windows, vocabulary, settings.get("dataset", "windows"))
    window_rows = count_rows(windows)
    dim = int(settings["dim"])
    if single_file:
        if extend:
            raise InputError("--extend: adds parts to a folder; leave --single_file out")
        return _save_single_file(base, windows, path, window_rows, batch_size, layer_position, with_logprob, settings)
    plan, grows = decided_by_main(
        lambda: continued_plan(path, windows, window_rows, dim, batch_size, extend and not overwrite)
    )
    empty_logprob = np.zeros(0, np.float32) if with_logprob else None
    schema = datastore_batch(np.zeros((0, dim), np.float16), np.zeros(0, np.int32), empty_logprob).schema
    output = PartedOutput(
        path,
        kind="datastore",
        settings=settings | {"rows": int(window_rows.sum())},
        part_rows=[int(window_rows[first:last].sum()) for first, last in plan],
        schema=schema,
        info=(info or {}) | {"batch_size": batch_size, "windows": len(windows)},
        overwrite=overwrite,
        extend=grows,
        growing=("rows", "dataset"),
        process_index=state.process_index,
        num_processes=state.num_processes,
        wait_for_everyone=state.wait_for_everyone,
    )
    mine = output.mine()
    rows = sum(int(window_rows[slice(*plan[number])].sum()) for number in mine)
    bar = tqdm(total=rows, desc="embed", unit="row", unit_scale=True, disable=None if state.is_main_process else True)
    for number in mine:
        first, last = plan[number]
        with output.write(number) as part:
            for keys, values, logprob in capture_rows(
                base, windows, first, last, batch_size, layer_position, with_logprob
            ):
                part.write(datastore_batch(keys, values, logprob))
                bar.update(len(values))
    bar.close()
    return output.finish()


def _save_single_file(
    base: Any,
    windows: Any,
    path: str | Path,
    window_rows: np.ndarray,
    batch_size: int,
    layer_position: int,
    with_logprob: bool,
    settings: dict[str, Any],
) -> dict[str, Any]:
    from accelerate import PartialState

    if PartialState().num_processes > 1:
        raise InputError(
            "--single_file: is written by one process; run without accelerate launch, or leave the flag out"
        )
    batches = (
        datastore_batch(*rows)
        for rows in capture_rows(base, windows, 0, len(windows), batch_size, layer_position, with_logprob)
    )
    first = np.zeros((0, int(settings["dim"])), np.float16), np.zeros(0, np.int32)
    schema = datastore_batch(*first, np.zeros(0, np.float32) if with_logprob else None).schema
    write_single_file(path, schema, batches)
    return {"rows": int(window_rows.sum()), "settings": settings, "complete": True}
