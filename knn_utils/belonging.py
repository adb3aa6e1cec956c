"""Whether an index, its values and the queries belong together: what their records say is compared here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from knn_utils.distribution import float32_from_float16
from knn_utils.faiss_files import same_rows, values_fingerprint
from utils.errors import InputError
from utils.legacy import check_made

# Rows of the datastore that an index without a record is asked for, and the share that it finds at least.
SOUGHT_ROWS, SOUGHT_SHARE = 64, 0.25


def check_indexed(searcher: Any, datastore: Any) -> None:
    """Refuse a datastore of other rows than those of the index that `searcher` has opened.

    Rows are compared by their recorded checksum; an index without a record has to find some of them by their keys.
    Raises InputError.
    """
    told = "name the datastore that it indexes, or build the index again"
    if searcher.record is not None:
        if not same_rows(searcher.record["datastore"].get("fingerprint"), datastore):
            raise InputError(f"{searcher.path}: was built from other rows than {datastore.path}; {told}")
        return
    rows = np.unique(np.linspace(0, searcher.rows - 1, SOUGHT_ROWS).astype(np.int64))
    keys = float32_from_float16(datastore.gather_keys(rows))
    _, ids = searcher.candidates(keys, max(1, min(SOUGHT_ROWS, searcher.rows // 32)))
    found = np.mean((ids == rows[:, None]).any(axis=1))
    if found < SOUGHT_SHARE:
        share = f"finds {found:.0%} of {len(rows)} rows of {datastore.path} by their keys"
        raise InputError(f"{searcher.path}: has no record, and {share}, as an index of other rows does; {told}")


def check_values(searcher: Any, values: np.ndarray, path: object) -> None:
    """Refuse `values` (rows,), from the file `path`, that are not those of the indexed rows. Raises InputError."""
    if len(values) != searcher.rows:
        raise InputError(
            f"{path}: holds {len(values)} values, but the index {searcher.path} has {searcher.rows} rows; "
            "name the values of the indexed datastore"
        )
    recorded = (searcher.record or {}).get("values_fingerprint")
    if recorded not in (None, values_fingerprint(values)):
        raise InputError(f"{path}: holds values of other rows than {searcher.path} indexes; name the indexed datastore")


def check_queries(searcher: Any, path: object, settings: Mapping[str, Any]) -> None:
    """Refuse queries in `path` (`settings`: what made them) of another base or block than the indexed rows'.

    Checksums of a base in two precisions differ, so bases are compared in one only. Raises InputError.
    """
    now = {"layer_position": settings.get("layer_position")}
    if searcher.made.get("dtype") == settings.get("dtype"):
        now["model"] = settings.get("model")
    check_made(searcher.path, searcher.made, path, **now)
