"""Rows to score: from a run of the base over windows, or from a datastore that holds the base's log-probabilities."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from knn_utils.datastore import Datastore, check_belongs
from utils.errors import InputError

SCORED_ROWS = 4096  # of a datastore, at a time


def scored_rows(
    base: Any, windows: Any, arguments: Any, split: str, batch_size: int, dim: int | None = None
) -> Iterator[tuple[Any, Any, Any]]:
    """(hidden states, base log-probabilities, labels) by batch: from the base, or from `--dstore_path`'s datastore.

    Raises InputError where the stored rows are not those of base and windows, or not `dim` wide.
    """
    from utils.evaluation import Scorer, check_token_ids

    if arguments.dstore_path:
        return stored_rows(open_scored_datastore(arguments.dstore_path, dim=dim, windows=windows, base=arguments))
    check_token_ids(windows, base.get_input_embeddings().weight.shape[0], arguments.dataset_name)
    return Scorer(base, arguments.layer_position).batches(windows, batch_size, description=f"score {split}")


def open_scored_datastore(path: str | os.PathLike, **belongs: Any) -> Datastore:
    """A datastore that holds the base's log-probabilities and passes `check_belongs` with `belongs`, or InputError."""
    datastore = Datastore.open(path)
    if datastore.logprob(0, 1) is None:
        raise InputError(f"{path}: holds no log-probabilities; write it with --save_knnlm_dstore --save_logprob")
    check_belongs(datastore, **belongs)
    return datastore


def stored_rows(datastore: Datastore) -> Iterator[tuple[Any, Any, Any]]:
    """Yield tensors: hidden states (rows, dim) float16, base log-probabilities (rows,) float32, values (rows,) int64.

    Under several processes block b goes to process b mod N.
    """
    import torch
    from accelerate import PartialState

    state = PartialState()
    for start in range(0, datastore.rows, SCORED_ROWS)[state.process_index :: state.num_processes]:
        rows = start, min(start + SCORED_ROWS, datastore.rows)
        columns = datastore.keys(*rows), datastore.logprob(*rows), datastore.vals(*rows).astype(np.int64)
        yield tuple(torch.from_numpy(np.array(column)) for column in columns)
