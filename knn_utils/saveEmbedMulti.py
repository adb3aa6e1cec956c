"""Capture and save: windows in, a datastore of (hidden state, next token) out.

The base runs only up to the captured input: no head, no loss, nothing of the block after it. Each process writes its
own parts, in the order of the windows; the same command continues an interrupted run. Windows that were added after
those of a complete datastore become further parts of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from knn_utils.datastore import datastore_schema
from knn_utils.manifest import MANIFEST_NAME, plan_of, read_manifest
from knn_utils.parts import PartedOutput, datastore_batch, write_single_file
from utils.errors import InputError
from utils.evaluation import Scorer, check_token_ids, count_rows, predicted_positions, window_batches
from utils.loading import windows_fingerprint

PART_BYTES = 1 << 30
SMALLEST_PARTS = 16


def datastore_name(model_type: str, subset: str, dim: int) -> str:
    """The original's file name of a datastore."""
    return f"dstore_{model_type}_{subset}_{dim}.arrow"


def plan_windows(window_rows: np.ndarray, dim: int, batch_size: int) -> list[int]:
    """Rows of the parts, each of whole windows (rows of each: `window_rows`).

    A part holds at most about a gibibyte of keys, and a small datastore still gets several parts, so that an
    interruption loses little. The plan depends on the data alone, not on the number of processes.
    """
    windows, rows = len(window_rows), int(window_rows.sum())
    parts = max(SMALLEST_PARTS, math.ceil(rows * dim * 2 / PART_BYTES))
    size = math.ceil(windows / parts / batch_size) * batch_size
    planned = [int(window_rows[start : start + size].sum()) for start in range(0, windows, size)]
    return [rows for rows in planned if rows]


def continued_plan(
    path: str | Path, windows: Any, window_rows: np.ndarray, dim: int, batch_size: int, extend: bool
) -> tuple[list[int], bool]:
    """Rows of the parts: as in the datastore at `path` where it is of these windows, else by `plan_windows`.

    The second value tells whether further parts follow those of a shorter datastore. Raises InputError where `extend`
    is given and the datastore is not one of the first of these windows.
    """
    fresh = plan_windows(window_rows, dim, batch_size)
    if not (Path(path) / MANIFEST_NAME).is_file():
        return fresh, False
    manifest = read_manifest(path, "datastore")
    there, total = plan_of(manifest), int(window_rows.sum())
    held, count = sum(there), manifest["info"].get("windows", 0)
    if held == total and np.isin(np.cumsum(there), np.cumsum(window_rows)).all():
        return there, False
    if not extend:
        return fresh, False  # PartedOutput says what differs
    is_first = held < total and int(window_rows[:count].sum()) == held
    if not (is_first and windows_fingerprint(windows.select(range(count))) == manifest["settings"].get("dataset")):
        raise InputError(
            f"--extend: {path} holds {held} rows, which are not the first windows' of these {len(windows)} "
            f"({total} rows); new documents come after the old ones (preprocess_dataset --append_to)"
        )
    return there + plan_windows(window_rows[count:], dim, batch_size), True


def windows_of(part_rows: list[int], window_rows: np.ndarray) -> list[tuple[int, int]]:
    """(first, past-last) window of each part."""
    window_ends, part_ends = np.cumsum(window_rows), np.cumsum(part_rows)
    first = np.searchsorted(window_ends, part_ends - part_rows, side="right")
    return list(zip(first.tolist(), (np.searchsorted(window_ends, part_ends) + 1).tolist(), strict=True))


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
                keys, logprob = hidden[mask.to(hidden.device)], None  # (rows, hidden)
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
    from accelerate.utils import broadcast_object_list

    state = PartialState()
    check_token_ids(windows, base.get_input_embeddings().weight.shape[0], settings.get("dataset", "windows"))
    window_rows, dim = count_rows(windows), int(settings["dim"])
    schema = datastore_schema(dim, with_logprob)
    settings = settings | {"rows": int(window_rows.sum())}

    def batches(first: int, last: int) -> Iterator[Any]:
        for rows in capture_rows(base, windows, first, last, batch_size, layer_position, with_logprob):
            yield datastore_batch(*rows)

    if single_file:
        if extend:
            raise InputError("--extend: adds parts to a folder; leave --single_file out")
        if state.num_processes > 1:
            raise InputError("--single_file: is written by one process; run without accelerate launch")
        rows = write_single_file(path, schema, batches(0, len(windows)))
        return {"rows": rows, "settings": settings, "complete": True}
    plan, grows = None, False
    if state.is_main_process:
        plan, grows = continued_plan(path, windows, window_rows, dim, batch_size, extend and not overwrite)
    plan, grows = broadcast_object_list([plan, grows])
    ranges = windows_of(plan, window_rows)
    output = PartedOutput(
        path,
        kind="datastore",
        settings=settings,
        part_rows=plan,
        schema=schema,
        info=(info or {}) | {"batch_size": batch_size, "windows": len(windows)},
        overwrite=overwrite,
        extend=grows,
        growing=("rows", "dataset"),
        process_index=state.process_index,
        num_processes=state.num_processes,
        wait_for_everyone=state.wait_for_everyone,
    )
    rows = sum(plan[number] for number in output.mine())
    quiet = None if state.is_main_process else True
    with tqdm(total=rows, desc="embed", unit="row", unit_scale=True, disable=quiet) as bar:
        for number in output.mine():
            with output.write(number) as part:
                for batch in batches(*ranges[number]):
                    part.write(batch)
                    bar.update(batch.num_rows)
    return output.finish()
