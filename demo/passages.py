"""The training passages nearest to a hidden state: datastore row → window → text around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from knn_utils.datastore import Datastore, check_belongs
from knn_utils.search import KNNSearcher
from utils.errors import InputError
from utils.evaluation import count_rows
from utils.loading import load_windows

TOKENS_BEFORE, TOKENS_AFTER = 24, 8
PROBE = 32


@dataclass(frozen=True)
class Passage:
    """A training position whose hidden state is near: the text before it, the token that followed, the text after.

    `distance`: squared L2 between the hidden states.
    """

    before: str
    next: str
    after: str
    token_id: int
    distance: float


class Passages:
    """A datastore, its index and its windows, opened for looking passages up. `belongs`: for `check_belongs`.

    Raises:
        InputError: one of them is missing, or they do not belong together or to the model.
    """

    def __init__(
        self,
        dstore_path: str | None,
        index_path: str | None,
        dataset_name: str | None,
        tokenizer: Any,
        *,
        split: str = "train",
        **belongs: Any,
    ) -> None:
        given = {"--dstore_path": dstore_path, "--index_path": index_path, "--dataset_name": dataset_name}
        for name, value in given.items():
            if not value:
                raise InputError(f"{name}: is needed to show training passages, as all of {', '.join(given)} are")
        datastore = Datastore.open(dstore_path)
        self._searcher = KNNSearcher(index_path, probe=PROBE, datastore=datastore)
        self._windows = load_windows(dataset_name, split)
        self._tokenizer = tokenizer
        check_belongs(datastore, windows=self._windows, **belongs)
        counts = count_rows(self._windows)
        self._starts = np.cumsum(counts) - counts

    def nearest(self, hidden: Any, count: int) -> list[list[Passage]]:
        """For each hidden state (n, hidden) the `count` nearest training positions, nearest first."""
        # Keys are float16 in the datastore, so the queries are as well.
        queries = hidden.detach().float().cpu().numpy().astype(np.float16)
        distances, rows = self._searcher.search(queries, min(count, self._searcher.rows), source="hidden states")
        return [
            [self._passage(int(row), float(distance)) for distance, row in zip(*pair, strict=True) if row >= 0]
            for pair in zip(distances, rows, strict=True)
        ]

    def _passage(self, row: int, distance: float) -> Passage:
        """The text around a datastore row."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        window = self._windows[number]
        ids, labels = np.asarray(window["input_ids"]), np.asarray(window["labels"])  # (time,) each
        predicted = np.flatnonzero(labels[1:] != -100)
        place = int(predicted[row - int(self._starts[number])]) + 1  # of the token that followed
        after = slice(place + 1, place + 1 + TOKENS_AFTER)
        # A BOS token that each window begins with is no text.
        has_bos = ids[0] == self._tokenizer.bos_token_id and labels[0] == -100
        begin = max(int(has_bos), place - TOKENS_BEFORE)
        decode = self._tokenizer.decode
        before, followed = decode(ids[begin:place].tolist()), decode(ids[begin : place + 1].tolist())
        whole = decode([*ids[begin : place + 1].tolist(), *ids[after][labels[after] != -100].tolist()])
        return Passage(
            before=before,
            next=followed.removeprefix(before),
            after=whole.removeprefix(followed),
            token_id=int(ids[place]),
            distance=distance,
        )
