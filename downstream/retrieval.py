"""Retrieval in front of a prompt (RAG): documents found with BM25, as token ids."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from utils.errors import InputError

Search = Callable[[str, int], list[int]]  # (text, count) → numbers of the most similar documents, best first


def bytes_of(paths: Iterable[Path]) -> int:
    """Total size of the files among `paths`."""
    return sum(path.stat().st_size for path in paths if path.is_file())


def library(name: str) -> Any:
    """A package of the extra `compare`. Raises InputError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"needs the package {name}; pip install '.[compare]'") from None


def passages(
    search: Search, articles: Sequence[str], tokenizer: Any, count: int, most_tokens: int
) -> Callable[[str], list[int]]:
    """A function: text → token ids of the `count` best articles, each cut to `most_tokens`, the best one last."""
    separator = tokenizer("\n\n", add_special_tokens=False)["input_ids"]

    def before(text: str) -> list[int]:
        ids: list[int] = []
        for number in reversed(search(text, count)):
            article = tokenizer(articles[number].strip(), add_special_tokens=False)["input_ids"]
            ids += article[:most_tokens] + separator
        return ids

    return before


def bm25_search(articles: Sequence[str]) -> tuple[Search, int]:
    """BM25 over `articles` with bm25s (English stop words, no stemming), and the size of its saved index."""
    bm25s = library("bm25s")

    def split(texts: Sequence[str]) -> Any:
        return bm25s.tokenize(list(texts), stopwords="en", show_progress=False, return_ids=False)

    index = bm25s.BM25()
    index.index(split(articles), show_progress=False)
    with tempfile.TemporaryDirectory() as folder:
        index.save(folder, show_progress=False)
        on_disk = bytes_of(Path(folder).iterdir())

    def search(text: str, count: int) -> list[int]:
        found, scores = index.retrieve(split([text]), k=min(count, len(articles)), show_progress=False)
        # Score 0: an article without a word of the text.
        return [int(number) for number, score in zip(found[0], scores[0], strict=True) if score > 0]

    return search, on_disk
