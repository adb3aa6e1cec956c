"""Windows in, a datastore of (hidden state, next token) out.

The base runs up to the captured input: no head, no loss, nothing of the block after it. Each process writes its own
parts; the same command continues an interrupted run, with any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from knn_utils.datastore import datastore_schema
from knn_utils.parts import datastore_batch, write_stream
from knn_utils.scored_rows import Scorer, check_token_ids
from utils.artefact import Made, begin
from utils.errors import InputError
from utils.evaluation import count_rows, fetch, predicted_positions, send, window_batches

PART_BYTES = 1 << 30  # of keys in a part, at most about so many
LEAST_PARTS = 16  # also of a small datastore, so that an interruption loses little


def datastore_name(model_type: str, subset: str, dim: int) -> str:
    """The original's file name of a datastore."""
    return f"dstore_{model_type}_{subset}_{dim}.arrow"


def plan_parts(window_rows: np.ndarray, dim: int) -> list[range]:
    """The windows of each part, given the rows of each window (windows,). The plan depends on the data alone."""
    windows = len(window_rows)
    parts = max(LEAST_PARTS, math.ceil(int(window_rows.sum()) * dim * 2 / PART_BYTES))
    size = max(1, windows // parts)
    return [range(first, min(first + size, windows)) for first in range(0, windows, size)]


def capture_rows(
    base: Any, windows: Any, first: int, last: int, batch_size: int, layer_position: int, with_logprob: bool
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """Run the base over windows [first, last), `batch_size` at a time.

    Yields:
        keys float16 (rows, hidden), values int32 (rows,), and `with_logprob` the base's log-probabilities of the
        values, float32 (rows,), else None.

    Raises:
        InputError: a hidden state is not finite in float16, or a log-probability is not.
    """
    # A GPU computes the next batch while this one is copied and written.
    waiting = None
    for launched in _launched(base, windows.select(range(first, last)), batch_size, layer_position, with_logprob):
        if waiting:
            yield _finished(base, first, *waiting)
        waiting = launched
    if waiting:
        yield _finished(base, first, *waiting)


@torch.inference_mode()
def _launched(
    base: Any, windows: Any, batch_size: int, layer_position: int, with_logprob: bool
) -> Iterator[tuple[range, Tensor, Callable[[], list[Tensor]]]]:
    """The windows of a batch, its values, and a function that waits for keys, whether all is finite, and log-probabilities."""
    from models.capture import hidden_states

    device, scorer = base.get_input_embeddings().weight.device, Scorer(base, layer_position)
    for start, batch in window_batches(windows, batch_size):
        positions, values = predicted_positions(batch["labels"])
        if not values.numel():
            continue
        if with_logprob:
            keys, *logprob = scorer.score(batch["input_ids"], positions, values)
        else:
            hidden = hidden_states(base, send(batch["input_ids"], device), layer_position=layer_position)
            keys, logprob = hidden.flatten(0, 1)[send(positions, hidden.device)], []  # (rows, hidden)
        keys = keys.to(torch.float16)
        finite = (each.isfinite().all().to(keys.device) for each in (keys, *logprob))
        yield range(start, start + len(batch["labels"])), values, fetch([keys, torch.stack([*finite]).all(), *logprob])


def _finished(
    base: Any, first: int, numbers: range, values: Tensor, arrived: Callable[[], list[Tensor]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    keys, finite, *logprob = arrived()
    if not finite:
        windows = f"windows {first + numbers[0]} to {first + numbers[-1]}"
        remedy = "check its weights, or use --torch_dtype float32"
        raise InputError(f"base {base.name_or_path}, {windows}: gives NaN or infinity (in float16); {remedy}")
    return keys.numpy(), values.to(torch.int32).numpy(), logprob[0].numpy() if logprob else None


def save_datastore(
    base: Any,
    windows: Any,
    path: str | Path,
    *,
    settings: dict[str, Any],
    made_from: dict[str, str | None],
    batch_size: int = 8,
    layer_position: int = -1,
    with_logprob: bool = False,
    overwrite: bool = False,
) -> Made:
    """Write the datastore of `windows` to the folder `path`, all processes together; returns its record.

    Args:
        base: the base model, on its device.
        windows: a split of a windows folder, in NumPy format.
        settings: what decides the rows (`dim`, `layer_position`, …); `part_rows` is added.
        made_from: ids of base and windows.
        with_logprob: also run the head and keep the base's log-probability of each value as a third column.

    Raises:
        InputError: hidden states that are not finite, token ids beyond the vocabulary, labels that do not agree with
            `dstore_range`; a folder that was made with other settings, or that another run is writing.
    """
    from accelerate import PartialState

    state = PartialState()
    check_token_ids(windows, base.get_input_embeddings().weight.shape[0], settings.get("subset", "windows"))
    window_rows, dim = count_rows(windows), int(settings["dim"])
    parts = plan_parts(window_rows, dim)
    part_rows = [int(window_rows[part.start : part.stop].sum()) for part in parts]
    made = Made("datastore", {**settings, "part_rows": part_rows}, sum(part_rows), made_from)
    making = begin(path, made, overwrite=overwrite, state=state)
    own_parts = making.own_parts(len(parts))
    total, quiet = sum(part_rows[number] for number in own_parts), None if state.is_main_process else True

    def batches(number: int) -> Iterator[Any]:
        part, rows = parts[number], 0
        for captured in capture_rows(base, windows, part.start, part.stop, batch_size, layer_position, with_logprob):
            yield datastore_batch(*captured)
            bar.update(len(captured[0]))
            rows += len(captured[0])
        if rows != part_rows[number]:
            raise InputError(f"windows {part.start} to {part.stop - 1}: labels do not agree with their dstore_range")

    with tqdm(total=total, desc="embed", unit="row", unit_scale=True, disable=quiet) as bar:
        for number in own_parts:
            write_stream(making.part(number), datastore_schema(dim, with_logprob), batches(number))
    return making.finish()
