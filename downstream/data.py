"""Reading questions: JSONL, JSON, CSV, TSV and parquet files, folders of `datasets`, and the hub."""

from __future__ import annotations

import ast
import csv
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from downstream.tasks import Column
from utils.errors import InputError, one_line
from utils.legacy import sha256_file

FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


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
        elif path.exists() or not (path.suffix in FILES or path.is_absolute() or source.startswith((".", "~"))):
            self.table = read_dataset(source, config, split)
            self.identity = hashlib.sha256(json.dumps(self.table, default=str).encode()).hexdigest()
        else:
            raise InputError(f"--dataset_name {source}: no such file or folder")
        if len(self.table) == 0:
            raise InputError(f"--dataset_name {source}: holds no rows")
        names = list(self.table[0])
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
                    row[role] = column.read(cells.get(self.names[role]))
                except ValueError as error:
                    told = f"row {number}: the {self.names[role]} {error}; leave it out with --start"
                    raise InputError(f"--dataset_name {self.source}: {told}") from None
            yield number, row


def read_file(path: Path, flag: str = "--dataset_name") -> list[dict[str, Any]]:
    """The rows of a local file, by its ending. Raises InputError naming `flag`."""
    import pyarrow.parquet

    kind = path.suffix.lower()
    if kind not in FILES:
        raise InputError(f"{flag} {path}: expected a file ending in {', '.join(FILES)}")
    try:
        if kind == ".parquet":
            return pyarrow.parquet.read_table(path).to_pylist()
        with open(path, encoding="utf-8-sig", newline="") as file:
            if kind in (".csv", ".tsv"):
                csv.field_size_limit(sys.maxsize)
                rows = csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ",")
                return [{name: listed(cell) for name, cell in row.items()} for row in rows]
            text = file.read()
        # A list, or a row a line; not splitlines: JSON text may hold other line separators than the newline.
        whole = text.lstrip().startswith("[")
        rows = json.loads(text if whole else "[" + ",\n".join(filter(str.strip, text.split("\n"))) + "]")
    except UnicodeDecodeError as error:
        raise InputError(f"{flag} {path}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (ValueError, csv.Error, pyarrow.ArrowException) as error:
        raise InputError(f"{flag} {path}: is not a readable {kind} file ({one_line(error, 160)})") from None
    if not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{flag} {path}: expected JSON objects, one for each row")
    return rows


def listed(cell: Any) -> Any:
    """A CSV cell as it stands, or the list of texts that it spells in JSON's or Python's way."""
    if isinstance(cell, str) and cell.startswith("[") and cell.endswith("]"):
        for parse in (json.loads, ast.literal_eval):
            try:
                found = parse(cell)
            except (ValueError, SyntaxError):
                continue
            if found and all(isinstance(item, str) for item in found):
                return found
    return cell


def read_dataset(source: str, config: str | None, split: str | None) -> list[dict[str, Any]]:
    """A split of a folder that `datasets` saved, of a local copy of a hub repository, or of the hub."""
    import datasets

    folder = Path(source)
    saved = (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()
    try:
        found = datasets.load_from_disk(source) if saved else datasets.load_dataset(source, config)
    except Exception as error:
        kind = "folder" if folder.exists() else "hub dataset"
        raise InputError(
            f"--dataset_name {source}: the {kind} cannot be loaded ({one_line(error, 200)}); "
            f"expected a file ({', '.join(FILES)}), a folder or a hub name"
        ) from None
    if isinstance(found, datasets.Dataset):
        return found.to_list()
    if split not in found:
        raise InputError(f"--dataset_name {source}: has the splits {', '.join(found)}; choose one with --eval_subset")
    return found[split].to_list()


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
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompt_file {path}: cannot be read ({error}); expected {holds}") from None
    if not text.strip():
        raise InputError(f"--prompt_file {path}: is empty; expected {holds}")
    return text
