"""Rows to score: from a run of the base over windows, or from a datastore that holds the base's log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from knn_utils.datastore import check_rows, open_scored_datastore, stored_rows
from utils.artefact import read_made


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
