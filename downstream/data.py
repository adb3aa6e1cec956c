"""Reads questions through `datasets`: JSONL, JSON, CSV, TSV and Parquet files, saved folders, and the hub."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from downstream.tasks import Column
from utils.errors import InputError, one_line

FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


def read_table(source: str, config: str | None = None, split: str | None = None) -> Any:
    """A `datasets.Dataset` from a file, a folder (saved by `datasets`, or a copy of a hub repository) or the hub.

    `config` and `split` are ignored for files. Raises InputError where nothing can be loaded.
    """
    import datasets

    path = Path(source)
    kind = FILES.get(path.suffix.lower())
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            found = datasets.load_from_disk(source)
            return found if isinstance(found, datasets.Dataset) else found[split]
        if kind is None or path.is_dir():
            return datasets.load_dataset(source, config, split=split)
        if kind != "csv":
            return datasets.load_dataset(kind, data_files=source, split="train")
        import pandas

        # Cells stay text: "NA" and "1972" are answers.
        separator = "\t" if path.suffix.lower() == ".tsv" else ","
        return datasets.Dataset.from_pandas(pandas.read_csv(path, sep=separator, dtype=str, keep_default_na=False))
    except Exception as error:
        problem = one_line(error.__cause__ or "", 300) or one_line(error, 300)
        raise InputError(
            f"--dataset_name {source}: cannot be loaded ({problem}); expected a file ({', '.join(FILES)}), a folder or a "
            f"hub name, with split {split}"
        ) from None


def questions(
    table: Any, columns: Mapping[str, Column], start: int = 0, count: int | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows `start` to `start + count` (or to the end) of a table, as (row number from 0, role → value of its column).

    Raises InputError where a role has no column, and for a row with an empty or unusable cell.
    """
    names = {}
    for role, column in columns.items():
        names[role] = next((name for name in column.names if name in table.column_names), None)
        if names[role] is None:
            have = ", ".join(table.column_names)
            raise InputError(f"--dataset_name: has the columns {have}; expected one named {' or '.join(column.names)}")
    stop = len(table) if count is None else min(start + count, len(table))
    for number in range(start, stop):
        cells, row = table[number], {}
        for role, column in columns.items():
            try:
                row[role] = column.read(parse_list(cells[names[role]]))
            except ValueError as error:
                problem = f"row {number}: the {names[role]} {error}; skip it with --start"
                raise InputError(f"--dataset_name: {problem}") from None
        yield number, row


def parse_list(cell: Any) -> Any:
    """The list of texts that a CSV cell spells, such as `["a", "b"]`; any other cell unchanged."""
    if isinstance(cell, str) and cell.startswith("[") and cell.endswith("]"):
        with contextlib.suppress(ValueError, SyntaxError):
            found = ast.literal_eval(cell)
            return found if all(isinstance(item, str) for item in found) else cell
    return cell
