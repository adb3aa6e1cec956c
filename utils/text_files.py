"""Opens any text source with the library `datasets`, selects documents and divides them into splits."""

from __future__ import annotations

import functools
import glob
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import InputError

BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
SPLIT_NAMES = {"train": "train", "test": "test", **dict.fromkeys(("validation", "valid", "val", "dev"), "validation")}


def open_source(name: str, config_name: str | None, text_column: str, whole_files: bool, work: Path) -> dict[str, Any]:
    """Open `--dataset_name` as {split: Dataset with one column, `text`}, memory-mapped from files in the folder `work`.

    A single file is the split `train`, and so are the .txt files of a folder, one row each. Otherwise each line of a .txt
    file is a row, with its newline, unless `whole_files`. Raises InputError if nothing is there, it cannot be loaded, or
    it has no such column.
    """
    import datasets

    path = Path(name).expanduser()
    if config_name and (path / config_name).is_dir():
        path, config_name = path / config_name, None
    files = [file for file in sorted(path.glob("[!.]*")) or [path] if _builder_of(file)]
    stems = {file.name.split(".")[0]: file for file in files if path.is_dir()}
    named = {SPLIT_NAMES[stem]: file for stem, file in stems.items() if stem in SPLIT_NAMES}
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            loaded = datasets.load_from_disk(str(path))
            splits = {"train": loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)
        elif named:
            splits = {split: _load([file], None, whole_files, work)["train"] for split, file in named.items()}
        elif files and (path.is_file() or all(_builder_of(file) == "text" for file in files)):
            splits = _load(files, None, whole_files or path.is_dir(), work)
        else:
            splits = _load(str(path) if path.exists() else name, config_name, whole_files, work)
    except Exception as error:
        missing = "" if path.exists() else "no such file or folder, and as a hub dataset it "
        raise InputError(f"--dataset_name {name}: {missing}cannot be loaded ({error.__cause__ or error})") from None
    for split, rows in splits.items():
        if text_column not in rows.column_names:
            raise InputError(f"--text_column {text_column}: split {split} of {name} has {rows.column_names}")
        rows = rows.with_format(None).select_columns([text_column])
        splits[split] = rows if text_column == "text" else rows.rename_column(text_column, "text")
    return splits


def _builder_of(path: Path) -> str | None:
    """The builder in `datasets` that reads a file, compressed or not."""
    return next((BUILDERS[suffix] for suffix in path.suffixes[-2:] if suffix in BUILDERS), None)


def _load(source: str | list[Path], config_name: str | None, whole_files: bool, work: Path) -> dict[str, Any]:
    """{split: Dataset} of some files (`train`), of a folder, or of a hub dataset."""
    import datasets

    files = None if isinstance(source, str) else [glob.escape(str(file)) for file in source]
    name = source if isinstance(source, str) else _builder_of(source[0])
    # Without the hub, only what is prepared in the user's cache can be opened.
    cache = None if datasets.config.HF_HUB_OFFLINE and files is None and not Path(name).exists() else str(work)
    builder = datasets.load_dataset_builder(name, config_name, data_files=files, cache_dir=cache)
    if hasattr(builder.config, "keep_linebreaks"):  # the builder of .txt files
        builder.config.keep_linebreaks = True
        builder.config.sample_by = "document" if whole_files else "line"
    builder.download_and_prepare()
    return dict(builder.as_dataset())


def select_documents(
    rows: Any, min_characters: int, max_characters: int | None, max_documents: int | None, path: Path
) -> tuple[Any, int]:
    """The first `max_documents` documents of at least `min_characters`, and how many characters are left out of `rows`.

    Each is cut at the end of the line in which it reaches `max_characters`; cut documents are in an Arrow file at `path`.
    """
    lengths = np.array([len(text) for text in _texts(rows)])  # (documents,)
    chosen = rows.select(np.flatnonzero(lengths >= min_characters)[:max_documents])
    if max_characters is not None:
        cut = functools.partial(_cut, characters=max_characters)
        chosen = chosen.map(cut, cache_file_name=str(path), load_from_cache_file=False)
    return chosen, int(lengths.sum()) - sum(len(text) for text in _texts(chosen))


def _texts(rows: Any) -> Iterator[str]:
    return (text for batch in rows.iter(1000) for text in batch["text"])


def _cut(row: dict[str, str], characters: int) -> dict[str, str]:
    end = row["text"].find("\n", characters - 1)
    return {"text": row["text"] if end < 0 else row["text"][: end + 1]}


def split_documents(
    rows: Any, fractions: dict[str, float], seed: int, flags: str = "--validation_fraction, --test_fraction"
) -> dict[str, Any]:
    """Divide documents into train and {split: fraction of the documents}. Raises InputError naming `flags` for too few.

    Documents are ranked by the SHA-256 of seed and text: the same on any platform and in any order, and equal documents
    fall into the same split. Within a split the source's order is kept.
    """
    digests = (hashlib.sha256(f"{seed}:{text}".encode()).digest() for text in _texts(rows))
    ranks = np.fromiter((int.from_bytes(digest[:8], "big") for digest in digests), dtype=np.uint64)
    position = np.searchsorted(np.sort(ranks), ranks)  # (documents,), the same for equal documents
    splits, taken = {}, 0
    for split, fraction in fractions.items():
        if fraction > 0:
            end = taken + max(1, round(fraction * len(ranks)))
            numbers = np.flatnonzero((position >= taken) & (position < end))
            splits[split] = rows.select(numbers)
            taken += len(numbers)
    if taken >= len(ranks):
        raise InputError(f"{flags}: {len(ranks)} documents are too few to divide")
    return {"train": rows.select(np.flatnonzero(position >= taken)), **splits}
