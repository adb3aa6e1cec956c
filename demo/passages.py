"""The training passages nearest to a hidden state: datastore row → window → text around it."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from knn_utils.datastore import Datastore
from knn_utils.search import KNNSearcher
from utils.artefact import read_made, require
from utils.loading import BaseArguments, load_windows

TOKENS_BEFORE, TOKENS_AFTER = 24, 8
PROBE = 32


@dataclass(frozen=True)
class Passage:
    """A training position: the text before it, the token that followed, the text after that.

    `distance`: squared L2 distance of the hidden states.
    """

    before: str
    next: str
    after: str
    token_id: int
    distance: float


class Passages:
    """Looks up training passages in a datastore, its index and its windows (paths), opened for the base of `arguments`.

    Raises InputError if the datastore was made from another base, block or windows.
    """

    def __init__(
        self, datastore: str, index: str, windows: str, split: str, tokenizer: Any, arguments: BaseArguments
    ) -> None:
        made = read_made(windows)
        belongs = {"base": arguments.base_id(), "windows": made and made.id, "layer_position": arguments.layer_position}
        require(datastore, read_made(datastore), **belongs)
        self._searcher = KNNSearcher(index, probe=PROBE, datastore=Datastore.open(datastore))
        self._windows = load_windows(windows, split)
        self._tokenizer = tokenizer

    def nearest(self, hidden: torch.Tensor, count: int) -> list[list[Passage]]:
        """For each hidden state (n, hidden) the `count` nearest training positions, nearest first."""
        queries = hidden.float().cpu().numpy().astype(np.float16)  # as the datastore's keys
        return [
            [self._passage(int(row), float(distance)) for distance, row in zip(*hits, strict=True) if row >= 0]
            for hits in zip(*self._searcher.search(queries, count), strict=True)
        ]

    def _passage(self, row: int, distance: float) -> Passage:
        """The text around a datastore row."""
        number = bisect_right(self._windows, row, key=lambda window: window["dstore_range"][0]) - 1
        window = self._windows[number]
        ids, labels, first_row = window["input_ids"], window["labels"], window["dstore_range"][0]
        place = np.flatnonzero(labels[1:] != -100)[row - first_row] + 1  # of the token that followed
        begins_with_bos = ids[0] == self._tokenizer.bos_token_id and labels[0] == -100
        begin = max(int(begins_with_bos), place - TOKENS_BEFORE)
        end = place + 1 + np.count_nonzero(labels[place + 1 : place + 1 + TOKENS_AFTER] != -100)  # without padding
        before, followed, whole = (self._tokenizer.decode(ids[begin:stop]) for stop in (place, place + 1, end))
        texts = (before, followed.removeprefix(before), whole.removeprefix(followed))
        return Passage(*texts, token_id=int(ids[place]), distance=distance)
