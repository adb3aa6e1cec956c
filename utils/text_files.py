"""Text in, rows out: opens any text source as memory-mapped splits, and makes splits by document.

A source is a hub dataset, a folder or a file. Its splits are `datasets.Dataset`s with a column `text`
whose rows are what gets tokenized one by one: lines (with their newline) of a .txt file, rows of
anything else. A column `document` numbers the document that each row belongs to; without it a row is a document.

Hub datasets, folders and parquet files are opened by the library `datasets`. Lines of text are read here, because only
a newline may end one and a separator may span several; so are JSON lines, whose other fields may differ from row to row.
"""

from __future__ import annotations

import bz2
import csv
import errno
import gzip
import hashlib
import io
import itertools
import json
import lzma
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from utils.cli import say
from utils.errors import InputError, one_line

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")
PACKED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}  # any of the others but parquet
SPLIT_NAMES = {
    **{"train": "train", "test": "test"},
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}
TEXT_SCHEMA = pa.schema([("text", pa.string()), ("document", pa.int64())])
LONGEST_SEPARATOR = 1 << 20  # characters that one match of a separator, with what it looks at, may span


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 text file, compressed or not, each with its newline; Windows' \\r\\n is one too, nothing else
    ends a line.

    Raises InputError.
    """
    for number, line in enumerate(_byte_lines(path), start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: line {number} is not UTF-8 text ({error.reason}); convert the file") from None
        text = text.removeprefix("\ufeff") if number == 1 else text
        yield text[:-2] + "\n" if text.endswith("\r\n") else text


def _byte_lines(path: Path) -> Iterator[bytes]:
    try:
        with PACKED.get(path.suffix.lower(), open)(path, "rb") as file:
            yield from file
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if getattr(error, "errno", None) is not None:  # the file's, not its content's
            raise
        raise InputError(f"{path}: cannot be unpacked ({one_line(error)}); fetch it again") from None


def _unpacked(path: Path) -> Path:
    """The path of a file as its name would be without compression, its suffix in lower case."""
    path = path.with_suffix("") if path.suffix.lower() in PACKED else path
    return path.with_suffix(path.suffix.lower())


def read_documents(path: Path, separator: re.Pattern[str]) -> Iterator[str]:
    """The documents of a text file: what lies between the matches of `separator`.

    The matched text belongs to no document (a look-ahead matches nothing and so keeps all). Documents of
    white space only are dropped; each ends with a newline, added where it is missing, so that the last
    line of one does not run into the first of the next. Memory holds one document and a few MiB.
    """
    lines = read_lines(path)
    text, begin, scan, ended = "", 0, 0, False
    while not ended:
        # As much as is held already, so that a document of any length is copied a few times only.
        wanted, block = max(4 * LONGEST_SEPARATOR, len(text)), io.StringIO()
        while block.tell() < wanted and not ended:
            line = next(lines, None)
            ended = line is None
            block.write(line or "")
        text += block.getvalue()
        # A match that ends near the end of what was read may be another one once more is there.
        limit = len(text) if ended else len(text) - LONGEST_SEPARATOR
        for match in separator.finditer(text, scan):
            if match.end() > limit:
                scan = match.start()
                break
            yield from _whole_document(text[begin : match.start()])
            begin = scan = match.end()
        else:
            scan = max(scan, limit)
        cut = max(0, min(begin, scan) - LONGEST_SEPARATOR)  # look-behinds see what stays before `cut`
        text, begin, scan = text[cut:], begin - cut, scan - cut
    yield from _whole_document(text[begin:])


def _whole_document(text: str) -> Iterator[str]:
    if text.strip():
        yield text if text.endswith("\n") else text + "\n"


def _txt_rows(paths: Sequence[Path], separator: re.Pattern[str] | None) -> Iterator[tuple[str, int]]:
    number = 0
    for path in paths:
        documents = [read_lines(path)] if separator is None else map(io.StringIO, read_documents(path, separator))
        for document in documents:
            for line in document:
                yield line, number
            number += 1


def _jsonl_rows(path: Path, column: str) -> Iterator[tuple[str, int]]:
    for row, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise InputError(f"{path}: line {row} is not a JSON object; expected one object on each line")
        if column not in value:
            raise _no_column(f"{path}: line {row}", column, value)
        if not isinstance(value[column], str):
            raise InputError(f"{path}: line {row}: {column!r} holds {type(value[column]).__name__}, expected text")
        # An escape may spell half of a surrogate pair, which is no text; it becomes a question mark.
        yield value[column].encode("utf-8", "replace").decode(), row


def _csv_rows(path: Path, column: str) -> Iterator[tuple[str, int]]:
    csv.field_size_limit(sys.maxsize)  # a document may be longer than the 131,072 characters that it is else
    rows = csv.DictReader(read_lines(path), strict=True)
    try:
        if column not in (names := rows.fieldnames or ()):
            raise _no_column(str(path), column, names)
        for number, row in enumerate(rows, start=1):
            if row[column] is None:
                raise InputError(f"{path}: line {rows.line_num} has no {column!r}")
            yield row[column], number
    except csv.Error as error:
        raise InputError(f"{path}: line {rows.line_num + 1} is no CSV ({error})") from None


def _no_column(where: str, column: str, names: Iterable[str]) -> InputError:
    return InputError(f"--text_column {column}: {where} has no such column; it has {', '.join(names) or 'none'}")


def write_rows(rows: Iterable[tuple[str, int]], path: Path) -> Any:
    """Write (text, document number) rows to an Arrow stream and open it memory-mapped, as a Dataset."""
    import datasets

    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, TEXT_SCHEMA) as writer:
        rows = iter(rows)
        while batch := list(itertools.islice(rows, 1000)):
            texts, documents = zip(*batch, strict=True)
            writer.write_batch(pa.record_batch([pa.array(texts, pa.string()), documents], schema=TEXT_SCHEMA))
    return datasets.Dataset.from_file(str(path))


def open_source(
    name: str,
    *,
    config_name: str | None = None,
    text_column: str = "text",
    document_separator: str | None = None,
    work: Path,
) -> dict[str, Any]:
    """Open `--dataset_name` as splits of text rows.

    Args:
        name: a file (.txt, .jsonl, .csv, these compressed with .gz, .bz2 or .xz, .parquet: the split `train`); a folder
            of files named by their split (train.txt, validation.jsonl.gz, test.parquet); a folder of .txt files with
            other names (`train`, one document each); a folder that `datasets` saved or loads; or the name of a dataset on the hub.
        config_name: the dataset's configuration, or the subfolder of that name.
        text_column: the column that holds the text.
        document_separator: regular expression for .txt files, see `read_documents`.
        work: folder for Arrow files; the result is memory-mapped from it.

    Returns:
        {split: Dataset} with the column `text`, and where rows are not documents `document` (int64, rising).

    Raises:
        InputError: nothing there, no text in it, no such column.
    """
    try:
        separator = None if document_separator is None else re.compile(document_separator)
    except re.error as error:
        raise InputError(f"--document_separator {document_separator}: is not a regular expression ({error})") from None
    path = Path(name).expanduser()
    if config_name and (path / config_name).is_dir():
        path, config_name = path / config_name, None
    files = {} if config_name else local_files(path)
    if separator is not None and not any(_unpacked(paths[0]).suffix == ".txt" for paths in files.values()):
        raise InputError(f"--document_separator: separates documents in .txt files; {name} holds none")
    if files:
        name_unused(path, [file for paths in files.values() for file in paths])
        return {split: _open_files(paths, split, text_column, separator, work) for split, paths in files.items()}
    splits = _open_with_datasets(str(path) if path.exists() else name, config_name, work)
    return {split: _text_only(rows, f"split {split} of {name}", text_column) for split, rows in splits.items()}


def local_files(path: Path) -> dict[str, list[Path]]:
    """{split: files} of a file, or of a folder of files that are named by their split or are all .txt; else nothing."""
    if path.is_file():
        if not _is_text(path):
            ends = f"{', '.join(SUFFIXES)}; all but the last may be compressed ({', '.join(PACKED)})"
            raise InputError(f"--dataset_name {path}: expected a file that ends in {ends}")
        return {"train": [path]}
    if not path.is_dir() or (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return {}
    files = sorted(file for file in path.iterdir() if _is_text(file) and file.is_file())
    splits: dict[str, list[Path]] = {}
    for file in files:
        if split := SPLIT_NAMES.get(_unpacked(file).stem.lower()):
            if split in splits:
                names = f"{splits[split][0].name} and {file.name}"
                raise InputError(f"--dataset_name {path}: {names} are both split {split}")
            splits[split] = [file]
    if not splits and files and all(_unpacked(file).suffix == ".txt" for file in files):
        return {"train": files}
    return {split: splits[split] for split in ("train", "validation", "test") if split in splits}


def _is_text(path: Path) -> bool:
    return path.suffix.lower() == ".parquet" or _unpacked(path).suffix in SUFFIXES[:-1]


def name_unused(folder: Path, used: Iterable[str | Path]) -> None:
    """Say which files of `folder`, hidden ones left out, are not among `used`; of a file there is nothing to say."""
    read = {Path(file).resolve() for file in used}
    left = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.resolve() not in read)
    if names := [name for file in left if "/." not in f"/{(name := file.relative_to(folder).as_posix())}"]:
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        say(f"--dataset_name {folder}: not used: {', '.join(names[:8])}{more}")


def _open_files(paths: list[Path], split: str, column: str, separator: re.Pattern[str] | None, work: Path) -> Any:
    suffix, where = _unpacked(paths[0]).suffix, str(paths[0] if len(paths) == 1 else paths[0].parent)
    if suffix == ".parquet":
        loaded = _open_with_datasets(where, None, work, builder="parquet", data_files=where, batch_size=1000)
        dataset = _text_only(loaded["train"], where, column)
    else:
        of_fields = _csv_rows if suffix == ".csv" else _jsonl_rows
        rows = _txt_rows(paths, separator) if suffix == ".txt" else of_fields(paths[0], column)
        dataset = write_rows(rows, work / f"source-{split}.arrow")
    if not any(text.strip() for text in texts_of(dataset)):
        raise InputError(f"{where}: is empty, expected text")
    return dataset


def _open_with_datasets(
    name: str, config_name: str | None, work: Path, builder: str | None = None, **options: Any
) -> dict[str, Any]:
    """{split: Dataset} of a folder or hub dataset; with `builder`, of the files that `options` give to it."""
    import datasets

    path = Path(name)
    # Prepared data goes to `work`; where the hub is off limits, what is in the user's cache is all there is.
    cache = None if datasets.config.HF_HUB_OFFLINE and not path.exists() else str(work / "cache")
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            loaded = datasets.load_from_disk(name)
        else:
            prepared = datasets.load_dataset_builder(builder or name, config_name, cache_dir=cache, **options)
            if hasattr(prepared.config, "keep_linebreaks"):
                prepared.config.keep_linebreaks = True
            prepared.download_and_prepare()
            loaded = prepared.as_dataset()
            if path.is_dir():
                name_unused(path, itertools.chain.from_iterable((prepared.config.data_files or {}).values()))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = "" if path.exists() else "no such file or folder here, and as a hub dataset "
        raise InputError(
            f"--dataset_name {name}: {where}it cannot be loaded ({one_line(error.__cause__ or error, 300)})"
        ) from None
    return {"train": loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)


def _text_only(dataset: Any, where: str, column: str) -> Any:
    """`dataset` cut to its text column, under the name `text`."""
    if column not in dataset.column_names:
        raise _no_column(where, column, dataset.column_names)
    found = getattr(dataset.features[column], "dtype", str(dataset.features[column]))
    if found not in ("string", "large_string", "string_view"):
        raise InputError(f"--text_column {column}: {where} holds {found} there, expected text")
    if dataset.data.column(column).null_count:
        raise InputError(f"--text_column {column}: {where} holds rows without text (null); drop such rows")
    dataset = dataset.with_format(None).select_columns([column])
    return dataset if column == "text" else dataset.rename_column(column, "text")


def texts_of(dataset: Any) -> Iterator[str]:
    """The rows' texts, read batch by batch."""
    for batch in dataset.with_format("arrow").iter(1000):
        yield from batch.column("text").to_pylist()


def document_numbers(dataset: Any) -> np.ndarray:
    """Which document each row belongs to, int64 (rows,), rising from 0 without gaps."""
    if "document" not in dataset.column_names:
        return np.arange(len(dataset))
    numbers = dataset.data.column("document").to_numpy()
    return np.cumsum(np.diff(numbers, prepend=numbers[:1]) != 0)


def iterate_documents(dataset: Any) -> Iterator[str]:
    """The whole texts of the documents, in order."""
    if "document" not in dataset.column_names:
        yield from texts_of(dataset)
        return
    pairs = zip(texts_of(dataset), document_numbers(dataset).tolist(), strict=True)
    for _, rows in itertools.groupby(pairs, key=lambda pair: pair[1]):
        yield "".join(text for text, _ in rows)


def filter_documents(
    dataset: Any,
    path: Path,
    *,
    min_characters: int = 0,
    max_documents: int | None = None,
    max_characters: int | None = None,
) -> Any:
    """The first `max_documents` documents of at least `min_characters` characters (code points, all counted).

    Of each, only the rows that begin within its first `max_characters` are kept, whole. The result is mapped from an
    Arrow file at `path`; without any condition `dataset` itself is returned. Raises InputError when no document is left.
    """
    import pyarrow.compute as pc

    if min_characters <= 0 and max_documents is None and max_characters is None:
        return dataset
    numbers = document_numbers(dataset)
    lengths = pc.utf8_length(dataset.data.column("text")).to_numpy()  # (rows,)
    characters = np.bincount(numbers, weights=lengths)  # (documents,)
    kept = characters >= min_characters
    if max_documents is not None:
        kept &= np.cumsum(kept) <= max_documents
    if not kept.any():
        raise InputError(f"--min_document_characters {min_characters}: none of {len(kept)} documents is that long")
    rows = kept[numbers]
    if max_characters is not None:
        begins = np.cumsum(lengths) - lengths  # (rows,), over the whole dataset
        first_rows = np.flatnonzero(np.diff(numbers, prepend=-1))
        rows &= begins - begins[first_rows][numbers] < max_characters
    return select_rows(dataset, rows, path)


def select_rows(dataset: Any, mask: np.ndarray, path: Path) -> Any:
    """The rows under a boolean mask (rows,), copied to an Arrow file at `path` and mapped from it."""
    import datasets

    rows = dataset.with_format("arrow")
    with pa.ipc.new_stream(str(path), rows[:0].schema) as writer:
        for start, batch in zip(range(0, len(mask), 1000), rows.iter(1000), strict=True):
            writer.write_table(batch.filter(pa.array(mask[start : start + 1000])))
    return datasets.Dataset.from_file(str(path))


def split_documents(dataset: Any, fractions: dict[str, float], *, seed: int, work: Path) -> dict[str, Any]:
    """Divide the documents into train and, each with its share of them, validation and test; a share of 0 is no split.

    Documents are ranked by the SHA-256 of the seed and their text: the same on any platform, in any order of
    the documents, and equal documents fall into the same split. Within a split the source's order is kept.

    Raises:
        InputError: too few documents.
    """
    ranks = (hashlib.sha256(f"{seed}:{document}".encode()).digest() for document in iterate_documents(dataset))
    ranked = np.fromiter((int.from_bytes(rank[:8], "big") for rank in ranks), dtype=np.uint64)  # (documents,)
    order = np.argsort(ranked, kind="stable")
    assigned = np.full(len(ranked), "train", dtype=object)
    taken = 0
    for split in ("test", "validation"):
        fraction = fractions[split]
        stop = taken + max(1, round(fraction * len(ranked))) if fraction > 0 else taken
        while taken < stop < len(order) and ranked[order[stop]] == ranked[order[stop - 1]]:
            stop += 1
        assigned[order[taken:stop]] = split
        taken = stop
    if taken >= len(ranked):
        raise InputError(
            f"--validation_fraction, --test_fraction: {len(ranked)} documents are too few to divide; "
            "give more text, or --document_separator to find the documents in a .txt file"
        )
    numbers = document_numbers(dataset)
    names = [split for split in ("train", "validation", "test") if (assigned == split).any()]
    return {split: select_rows(dataset, (assigned == split)[numbers], work / f"split-{split}.arrow") for split in names}
