"""Scoring from a stored datastore: its hidden states and base log-probabilities stand for a run of the base.

Knows the datastore's format through `arrow_files` alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knn_utils.datastore import Datastore
from utils.errors import InputError

ROWS_AT_A_TIME = 4096


def open_scored_datastore(path: str | Path, layer_position: int | None = None) -> Datastore:
    """A datastore that holds log-probabilities. Raises InputError when it does not, or for another layer."""
    datastore = Datastore.open(path)
    if datastore.rows and datastore.logprob(0, 1) is None:
        raise InputError(f"{path}: holds no log-probabilities; write it with --save_knnlm_dstore --save_logprob")
    check_layer(datastore, path, layer_position)
    return datastore


def check_layer(datastore: Datastore, path: object, layer_position: int | None) -> None:
    """Refuse a datastore whose hidden states come from another block than `layer_position`."""
    made_with = datastore.settings.get("layer_position")
    if layer_position is not None and made_with is not None and made_with != layer_position:
        raise InputError(
            f"{path}: holds hidden states of block {made_with}, but --layer_position is {layer_position}; "
            f"give --layer_position {made_with}"
        )


def stored_rows(
    path: str | Path, windows: Any = None, layer_position: int | None = None, dim: int | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (hidden states (rows, hidden) float16, log-probabilities (rows,), values (rows,) int64).

    Under several processes block b goes to process b mod N. With `windows`, the row count is checked first.
    """
    from accelerate import PartialState

    datastore = open_scored_datastore(path, layer_position)
    if dim is not None and datastore.dim != dim:
        raise InputError(f"--dstore_path {path}: keys are {datastore.dim} wide, but the memory takes {dim}")
    if windows is not None:
        from knn_utils.saveEmbedMulti import count_rows

        expected = int(count_rows(windows).sum())
        if expected != datastore.rows:
            raise InputError(f"{path}: holds {datastore.rows} rows, but the windows have {expected}; they do not match")
    state = PartialState()
    for start in range(0, datastore.rows, ROWS_AT_A_TIME)[state.process_index :: state.num_processes]:
        stop = min(start + ROWS_AT_A_TIME, datastore.rows)
        yield (
            torch.from_numpy(np.array(datastore.keys(start, stop))),
            torch.from_numpy(np.array(datastore.logprob(start, stop))),
            torch.from_numpy(datastore.vals(start, stop).astype(np.int64)),
        )
