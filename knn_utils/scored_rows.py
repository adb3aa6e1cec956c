"""Rows to score: from a run of the base over windows, or from a datastore that holds the base's log-probabilities."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from knn_utils.datastore import Datastore, check_rows
from utils.artefact import read_made, require
from utils.errors import InputError

SCORED_ROWS = 4096  # of a datastore, at a time


def scored_rows(
    base: Any, windows: Any, arguments: Any, split: str, batch_size: int, dim: int | None = None
) -> Iterator[tuple[Any, Any, Any]]:
    """(hidden states, base log-probabilities, labels) by batch: from the base, or from `--dstore_path`'s datastore.

    `windows` is the split; `arguments` a command's flags with `BaseArguments`; `dim` the memory's input width. Raises
    InputError where the stored rows are not those of base, block and windows, or not `dim` wide.
    """
    from utils.evaluation import Scorer, check_token_ids, count_rows

    if not arguments.dstore_path:
        check_token_ids(windows, base.get_input_embeddings().weight.shape[0], arguments.dataset_name)
        return Scorer(base, arguments.layer_position).batches(windows, batch_size, description=f"score {split}")
    made = read_made(arguments.dataset_name)
    store = open_scored_datastore(
        arguments.dstore_path,
        base=arguments.base_id() if arguments.model_name_or_path else None,
        windows=made and made.id,
        layer_position=arguments.layer_position,
        dim=dim,
    )
    check_rows(store, int(count_rows(windows).sum()))  # the original's windows have no id
    return stored_rows(store)


def open_scored_datastore(path: str | os.PathLike, **expected: Any) -> Datastore:
    """A datastore that holds the base's log-probabilities.

    `expected`: for `require`, None is not compared: ids `base` and `windows`, `layer_position`, `dim`. Raises InputError
    for a datastore without log-probabilities, or of something else than `expected`.
    """
    store = Datastore.open(path)
    if store.logprob(0, 1) is None:
        raise InputError(f"{path}: holds no log-probabilities; write it with --save_knnlm_dstore --save_logprob")
    require(path, store.made, **expected)
    return store


def stored_rows(store: Datastore) -> Iterator[tuple[Any, Any, Any]]:
    """Yield tensors: hidden states (rows, dim) float16, base log-probabilities (rows,) float32, values (rows,) int64.

    Under several processes block b goes to process b mod N.
    """
    import torch
    from accelerate import PartialState

    state = PartialState()
    for start in range(0, store.rows, SCORED_ROWS)[state.process_index :: state.num_processes]:
        rows = start, min(start + SCORED_ROWS, store.rows)
        columns = store.keys(*rows), store.logprob(*rows), store.vals(*rows).astype(np.int64)
        yield tuple(torch.from_numpy(np.array(column)) for column in columns)
