"""The temperature of the kNN distribution, chosen by what it is for: the kNN-LM's perplexity on validation text.

One search serves the whole grid. The base is not run: its log-probabilities are a column of the validation datastore.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from knn_utils.block_search import blocks_of, search_blocks
from knn_utils.distribution import label_probability
from knn_utils.search import BLOCK_ROWS, KNNSearcher
from utils.errors import InputError, check_fraction, check_positive

TEMPERATURES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
LAMBDAS = tuple(round(0.05 * step, 2) for step in range(1, 20))


@dataclass(frozen=True)
class TemperatureChoice:
    """What was chosen and why.

    Attributes:
        knn_temp: the temperature with the lowest perplexity; lmbda: the lambda it has it at; perplexity: that.
        base_perplexity: of the base alone, on the same rows; rows: how many those are.
        table: for each temperature {"knn_temp", "lmbda", "perplexity"} at its best lambda.
    """

    knn_temp: float
    lmbda: float
    perplexity: float
    base_perplexity: float
    rows: int
    table: list[dict[str, float]]

    def text(self) -> str:
        """The table, a line for each temperature."""
        lines = [f"kNN temperature on {self.rows} validation rows (base perplexity {self.base_perplexity:.3f}):"]
        for row in self.table:
            mark = "  <- chosen" if row["knn_temp"] == self.knn_temp else ""
            lines.append(
                f"  temperature {row['knn_temp']:<8g} kNN-LM perplexity {row['perplexity']:.3f} "
                f"at lambda {row['lmbda']:g}{mark}"
            )
        return "\n".join(lines)


def choose_temperature(
    searcher: KNNSearcher,
    values: np.ndarray,
    validation: Any,
    *,
    k: int,
    temperatures: Sequence[float] = TEMPERATURES,
    lambdas: Sequence[float] = LAMBDAS,
    max_rows: int | None = None,
) -> TemperatureChoice:
    """The temperature with the lowest kNN-LM perplexity over all lambdas (Khandelwal et al. 2020, equation 3).

    Under several processes each searches its share of the rows; all come to the same choice.

    Args:
        searcher: the opened index.
        values: values of the indexed rows, int32.
        validation: `Datastore` of other text than the indexed, with the `logprob` column.
        max_rows: use only so many rows, spread evenly.

    Raises:
        InputError: a grid value out of range, no log-probabilities, or no rows.
    """
    for value in temperatures:
        check_positive("--temperature_grid", value)
    for value in lambdas:
        check_fraction("--lmbda_grid", value)
    if not temperatures or not lambdas:
        raise InputError("--temperature_grid, --lmbda_grid: expected at least one value each")
    if validation.rows < 1:
        raise InputError(f"{validation.path}: holds no rows to choose a temperature on")
    if validation.logprob(0, 1) is None:
        raise InputError(
            f"{validation.path}: holds no log-probabilities of the base; write it with train_base "
            "--save_knnlm_dstore --save_logprob"
        )
    mixing = np.asarray(lambdas, dtype=np.float64)

    def losses(block: tuple[int, int], distances: np.ndarray, ids: np.ndarray) -> tuple[int, np.ndarray]:
        """(first row, summed NLL of the block's rows: (1 + temperatures · lambdas,), the base's first)."""
        start, stop = block
        base = validation.logprob(start, stop).astype(np.float64)
        if not np.isfinite(base).all():
            row = start + int(np.argmin(np.isfinite(base)))
            raise InputError(f"{validation.path}: row {row} has a log-probability that is not finite; write it again")
        found = label_probability(distances, ids, values, validation.vals(start, stop), temperatures)  # (rows, T)
        mixed = found[:, :, None] * mixing + np.exp(base)[:, None, None] * (1 - mixing)  # (rows, T, lambdas)
        with np.errstate(divide="ignore"):
            return start, np.concatenate([[-base.sum()], -np.log(mixed).sum(axis=0).ravel()])

    state = PartialState()
    blocks = _blocks(validation.rows, max_rows)
    mine = blocks[state.process_index :: state.num_processes]
    scored = list(search_blocks(searcher, validation, mine, BLOCK_ROWS, k, losses))
    # Added in the order of the blocks, so that the number of processes changes no bit.
    everyones = dict(gather_object(scored))
    sums = np.sum([everyones[start] for start, _ in blocks], axis=0)
    rows = sum(stop - start for start, stop in blocks)
    perplexity = np.exp(np.minimum(sums[1:] / rows, 700.0)).reshape(len(temperatures), len(lambdas))
    table = []
    for temperature, row in zip(temperatures, perplexity, strict=True):
        best = int(np.argmin(row))
        table.append(
            {"knn_temp": float(temperature), "lmbda": float(lambdas[best]), "perplexity": round(float(row[best]), 6)}
        )
    chosen = min(table, key=lambda row: row["perplexity"])
    return TemperatureChoice(
        knn_temp=chosen["knn_temp"],
        lmbda=chosen["lmbda"],
        perplexity=chosen["perplexity"],
        base_perplexity=round(math.exp(min(sums[0] / rows, 700.0)), 6),
        rows=rows,
        table=table,
    )


def _blocks(rows: int, max_rows: int | None) -> list[tuple[int, int]]:
    """Row ranges of the blocks to score: all of them, or as many as hold `max_rows`, spread evenly."""
    blocks = list(blocks_of([(0, rows)], BLOCK_ROWS))
    if max_rows is None or max_rows >= rows:
        return blocks
    wanted = max(max_rows // BLOCK_ROWS, 1)
    return [blocks[number] for number in np.linspace(0, len(blocks) - 1, wanted).astype(int)]
