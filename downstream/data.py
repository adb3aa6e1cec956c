"""Reading questions: JSONL, JSON, CSV, TSV and parquet files, folders of `datasets`, and the hub.

Knows nothing of prompts or metrics: it hands out rows under the names of their roles.
"""

from __future__ import annotations

import ast
import csv
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from downstream.tasks import Column
from utils.errors import InputError, one_line
from utils.files import sha256_file

READERS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


class Questions:
    """The rows of one benchmark split, each a mapping role → what the role's column holds.

    Args:
        source: file, folder or hub name. Folders may be what `datasets` saved or a copy of a hub repository.
        columns: role → its column, as a task has them.
        config, split: for folders and the hub; a file has neither.

    Raises:
        InputError: nothing there, not readable, no rows, or a role without a column.
    """

    def __init__(
        self, source: str, columns: Mapping[str, Column], *, config: str | None = None, split: str | None = None
    ) -> None:
        self.source, self.columns = source, columns
        path = Path(source)
        if path.is_file():
            self.table = read_file(path)
            self.identity = sha256_file(path)
        elif path.exists() or not (path.suffix in READERS or path.is_absolute() or source.startswith((".", "~"))):
            self.table = read_dataset(source, config, split)
            self.identity = getattr(self.table, "_fingerprint", None)
        else:
            raise InputError(f"--dataset_name {source}: no such file or folder")
        if len(self.table) == 0:
            raise InputError(f"--dataset_name {source}: holds no rows")
        names = list(self.table[0]) if isinstance(self.table, list) else self.table.column_names
        self.names = {}
        for role, column in columns.items():
            found = [name for name in column.names if name in names]
            if not found:
                raise InputError(
                    f"--dataset_name {source}: has the columns {', '.join(map(str, names))}; "
                    f"expected one named {' or '.join(column.names)}"
                )
            self.names[role] = found[0]

    def __len__(self) -> int:
        return len(self.table)

    def select(self, start: int, count: int | None) -> Iterator[tuple[int, dict[str, Any]]]:
        """Rows `start` to `start + count` (or to the end) as (row number from 0, role → value).

        Raises InputError naming the row whose cell does not hold what its column should.
        """
        stop = len(self) if count is None else min(start + count, len(self))
        for number in range(start, stop):
            cells, row = self.table[number], {}
            for role, column in self.columns.items():
                try:
                    row[role] = column.read(cells.get(self.names[role]), column.holds)
                except ValueError as error:
                    raise InputError(
                        f"--dataset_name {self.source}: row {number}: {error}; mend it, or leave it out with --start"
                    ) from None
            yield number, row


def read_file(path: Path) -> Any:
    """The rows of a local file, by its ending."""
    readers = {
        ".jsonl": read_jsonl,
        ".json": read_json_rows,
        ".csv": read_csv,
        ".tsv": read_csv,
        ".parquet": read_parquet,
    }
    if path.suffix.lower() not in readers:
        raise InputError(f"--dataset_name {path}: expected a file ending in {', '.join(READERS)}")
    try:
        return readers[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise InputError(f"--dataset_name {path}: is not UTF-8 text ({error.reason} at byte {error.start})") from None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """One JSON object in each line; empty lines are skipped."""
    rows = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise InputError(f"--dataset_name {path}: line {number} is not a JSON object")
            rows.append(row)
    return rows


def read_json_rows(path: Path) -> list[dict[str, Any]]:
    """A JSON list of objects, or JSON lines under that ending."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, RecursionError):
        return read_jsonl(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"--dataset_name {path}: expected a list of JSON objects")
    return rows


def read_csv(path: Path) -> list[dict[str, Any]]:
    """Comma- or tab-separated rows under a header line. A cell that spells a list of texts becomes that list."""
    csv.field_size_limit(sys.maxsize)
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            rows = list(csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ","))
        except csv.Error as error:
            raise InputError(f"--dataset_name {path}: is not readable CSV ({error})") from None
    for row in rows:
        for name, cell in row.items():
            row[name] = listed(cell)
    return rows


def listed(cell: Any) -> Any:
    """A CSV cell as it stands, or the list of texts that it spells in JSON's or Python's way."""
    if not (isinstance(cell, str) and cell.startswith("[") and cell.endswith("]")):
        return cell
    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(cell)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list) and found and all(isinstance(item, str) for item in found):
            return found
    return cell


def read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path).read().to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"--dataset_name {path}: is not a readable parquet file ({one_line(error, 160)})") from None


def read_dataset(source: str, config: str | None, split: str | None) -> Any:
    """A split of a folder that `datasets` saved, of a local copy of a hub repository, or of the hub."""
    import datasets

    folder = Path(source)
    saved = folder.is_dir() and ((folder / "dataset_dict.json").exists() or (folder / "state.json").exists())
    try:
        found = datasets.load_from_disk(source) if saved else datasets.load_dataset(source, config)
    except Exception as error:
        kind = "folder" if folder.exists() else "hub dataset"
        raise InputError(
            f"--dataset_name {source}: the {kind} cannot be loaded ({one_line(error, 200)}); "
            f"expected a file ({', '.join(READERS)}), a folder or a hub name"
        ) from None
    if isinstance(found, datasets.Dataset):
        return found
    if split in found:
        return found[split]
    if split is None and len(found) == 1:
        return next(iter(found.values()))
    raise InputError(f"--dataset_name {source}: has the splits {', '.join(found)}; choose one with --eval_subset")


def read_prompt_file(path: str | os.PathLike | None, task: str, holds: str | None) -> str:
    """The text of `--prompt_file`, without outer empty lines; "" for a task that needs none.

    Raises:
        InputError: the file is needed and not given, missing, empty or no UTF-8 text.
    """
    if holds is None:
        return ""
    if path is None:
        raise InputError(f"--prompt_file: --task {task} needs it; a text file with {holds}")
    try:
        text = Path(path).read_text(encoding="utf-8-sig").strip("\n")
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"--prompt_file {path}: no such file; expected {holds}") from None
    except UnicodeDecodeError:
        raise InputError(f"--prompt_file {path}: is not UTF-8 text") from None
    if not text.strip():
        raise InputError(f"--prompt_file {path}: is empty; expected {holds}")
    return text
