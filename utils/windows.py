"""Rows of text → token windows, in parts on disk, by one process or several."""

from __future__ import annotations

import ctypes
import functools
import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from utils.errors import InputError

ROWS_PER_BATCH = 1000  # rows that are concatenated and cut together: published token counts depend on it
BATCHES_PER_PART = 50  # batches in one file: the unit of work of a process
TOKENIZE_CHARACTERS = 4 << 20  # text given to the tokenizer at once
LONGEST_WINDOW = 1 << 24
WINDOW_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("attention_mask", pa.list_(pa.int8())),
    ]
)
TABLE_TOKENS = 4 << 20  # tokens in one Arrow record batch of windows


@dataclass(frozen=True)
class WindowSizes:
    """How tokens are cut: tokens of a window, tokens from one to the next, the label of what predicts nothing.

    `group_rows`: windows go on from each 1,000 rows to the next, and the last one may be short, so that no token is
    left out. `by_document`: each document begins a window of its own and goes on in further ones, the last of which may
    be short; none of its tokens is left out either. `bos`: a token that stands at the start of each window, one of its
    block_size, in place of the special tokens of the rows. Raises InputError unless 2 <= block_size,
    1 <= stride <= block_size, padding_index < 0.
    """

    block_size: int = 1024
    stride: int = 512
    padding_index: int = -100
    group_rows: bool = False
    by_document: bool = False
    bos: int | None = None

    def __post_init__(self) -> None:
        least = 2 if self.bos is None else 3
        if not least <= self.block_size <= LONGEST_WINDOW:
            raise InputError(f"--block_size {self.block_size}: expected {least} or more, up to {LONGEST_WINDOW}")
        if not 1 <= self.stride <= self.block_size:
            raise InputError(f"--stride {self.stride}: expected a number from 1 to --block_size {self.block_size}")
        if self.padding_index >= 0:
            raise InputError(f"--padding_index {self.padding_index}: is a token id; expected a negative number")
        if self.padding_index < -(1 << 31):
            raise InputError(f"--padding_index {self.padding_index}: expected {-(1 << 31)} or more")

    @property
    def width(self) -> int:
        """Tokens of text in a window."""
        return self.block_size - (self.bos is not None)

    def whole(self, tokens: int) -> int:
        """Of so many tokens, those that fill windows; all where they fill none."""
        return tokens // self.width * self.width or tokens


def token_ids(texts: Sequence[str], tokenizer: Any, special: bool = True) -> np.ndarray:
    """Tokenize each text by itself, with `special` tokens or without, and lay the ids end to end, int32 (tokens,)."""
    options = {"add_special_tokens": special, "return_attention_mask": False, "return_token_type_ids": False}
    pieces = [np.zeros(0, np.int32)]
    begin = held = 0
    for end, text in enumerate(texts, start=1):
        held += len(text)
        if held >= TOKENIZE_CHARACTERS or end == len(texts):
            ids = tokenizer(list(texts[begin:end]), verbose=False, **options)["input_ids"]
            pieces.append(np.fromiter(chain.from_iterable(ids), dtype=np.int32, count=sum(map(len, ids))))
            begin, held = end, 0
    return np.concatenate(pieces)


def cut_windows(
    tokens: np.ndarray, sizes: WindowSizes, pad_token: int | None, first: int = 0, total: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cut the tokens of one batch of rows into windows.

    The window for i = first, first + stride, … is tokens max(i+stride−block_size, 0) … min(i+stride, total); its
    tokens from i on carry themselves as labels, the others padding_index, so that each token is a label once. Short
    windows are padded on the right.

    With sizes.bos that holds for block_size - 1 tokens of text after it, whose first one carries no label: nothing is
    predicted from the BOS token alone, whose hidden state is the same in all windows.

    Args:
        tokens: (tokens,) int32.
        pad_token: None is an error only if a window is short.
        first: tokens at the beginning that are context only.
        total: tokens to cut; by default those of `sizes.whole`.

    Yields:
        (input_ids, labels), each int32 (windows, block_size), a few million tokens at a time.

    Raises:
        InputError: a window must be padded and there is no token for it.
    """
    width, ignored = sizes.width, np.int32(sizes.padding_index)
    stride = min(sizes.stride, width)
    total = sizes.whole(len(tokens)) if total is None else total
    at_once = max(1, TABLE_TOKENS // width) * stride
    for start in range(first, total, at_once):
        begin = np.arange(start, min(start + at_once, total), stride)[:, None]  # (windows, 1): where labels begin
        end = np.minimum(begin + stride, total)
        position = np.maximum(begin + stride - width, 0) + np.arange(width)  # (windows, width)
        inside = position < end
        if pad_token is None and not inside.all():
            raise InputError(
                "--tokenizer_path: the tokenizer has no padding and no end-of-sequence token, and a window is short; "
                "give it one, or choose --stride equal to --block_size, more text and no --group_rows or --by_document"
            )
        ids = tokens[np.minimum(position, total - 1)]
        labels = np.where(inside & (position >= begin), ids, ignored)
        ids = np.where(inside, ids, np.int32(pad_token or 0))
        if sizes.bos is not None:
            labels[:, 0] = ignored
            ids, labels = np.insert(ids, 0, sizes.bos, axis=1), np.insert(labels, 0, ignored, axis=1)
        yield ids, labels


def _cut_documents(
    rows: Any, tokenizer: Any, sizes: WindowSizes, pad_token: int | None, first_row: int, past_last: int
) -> Iterator[tuple[int, int, list[tuple[np.ndarray, np.ndarray]]]]:
    """As `_cut_rows`, each document by itself; the windows of those that end within the same 1,000 rows together."""
    for documents in _documents(rows, tokenizer, sizes, first_row, past_last):
        cut = [each for tokens in documents for each in cut_windows(tokens, sizes, pad_token, total=len(tokens))]
        found = sum(map(len, documents))
        yield found, found, [tuple(np.concatenate(column) for column in zip(*cut, strict=True))] if cut else []


def _documents(
    rows: Any, tokenizer: Any, sizes: WindowSizes, first_row: int, past_last: int
) -> Iterator[list[np.ndarray]]:
    """The tokens (tokens,) of each document of some rows, those that end within the same 1,000 rows together."""
    waiting: list[str] = []
    for start in range(first_row, past_last, ROWS_PER_BATCH):
        batch = rows[start : min(start + ROWS_PER_BATCH, past_last)]
        texts = batch["text"]
        numbers = batch.get("document", range(start, start + len(texts)))
        following = rows[start + len(texts)].get("document") if start + len(texts) < past_last else None
        found = []
        for number, pairs in itertools.groupby(zip(numbers, texts, strict=True), key=lambda pair: pair[0]):
            waiting += [text for _, text in pairs]
            if number != following:
                found.append(token_ids(waiting, tokenizer, special=sizes.bos is None))
                waiting = []
        yield found


def _lists(values: np.ndarray) -> pa.ListArray:
    """A (rows, width) array as a list column, without copying the values."""
    offsets = np.arange(len(values) + 1, dtype=np.int32) * np.int32(values.shape[1])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.reshape(-1)))


def _cut_rows(
    rows: Any, tokenizer: Any, sizes: WindowSizes, pad_token: int | None, first_row: int, past_last: int
) -> Iterator[tuple[int, int, Iterator[tuple[np.ndarray, np.ndarray]]]]:
    """How many tokens each 1,000 of some rows have and bring into windows, and these windows (`cut_windows`)."""
    kept, first = np.zeros(0, np.int32), 0  # with group_rows: tokens that the next batch's windows need
    stride = min(sizes.stride, sizes.width)
    for start in range(first_row, past_last, ROWS_PER_BATCH):
        tokens = token_ids(rows[start : start + ROWS_PER_BATCH]["text"], tokenizer, special=sizes.bos is None)
        found, total = len(tokens), sizes.whole(len(tokens))
        if sizes.group_rows:
            tokens = np.concatenate([kept, tokens])
            is_last = start + ROWS_PER_BATCH >= past_last
            total = len(tokens) if is_last else len(tokens) - (len(tokens) - first) % stride
        yield found, total - first, cut_windows(tokens, sizes, pad_token, first, total)
        if sizes.group_rows:
            kept = tokens[max(total + stride - sizes.width, 0) :]
            first = total - (len(tokens) - len(kept))


def _write_part(first_row: int, path: Path, *, rows: Any, tokenizer: Any, sizes: WindowSizes) -> tuple[Any, int, int]:
    """Write the windows of one part's rows.

    Returns int64 (windows,): labels but the first position's; how many tokens are in the windows, and in the rows.
    """
    pad_token = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    past_last = min(first_row + BATCHES_PER_PART * ROWS_PER_BATCH, len(rows))
    counts, in_windows, in_text = [np.zeros(0, np.int64)], 0, 0
    batches = (_cut_documents if sizes.by_document else _cut_rows)(
        rows, tokenizer, sizes, pad_token, first_row, past_last
    )
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, WINDOW_SCHEMA) as writer:
        for found, brought, cut in batches:
            in_text, in_windows = in_text + found, in_windows + brought
            for ids, labels in cut:
                columns = [_lists(ids), _lists(labels), _lists(np.ones(ids.shape, np.int8))]
                writer.write_batch(pa.record_batch(columns, schema=WINDOW_SCHEMA))
                counts.append((labels[:, 1:] != sizes.padding_index).sum(1))
    return np.concatenate(counts), in_windows, in_text


def windows_of_split(
    rows: Any,
    tokenizer: Any,
    sizes: WindowSizes,
    num_process: int,
    work: Path,
    *,
    first_row: int = 0,
    in_memory: bool = False,
) -> tuple[Any, int, int]:
    """The windows of one split.

    Each run of 1,000 rows is tokenized row by row, concatenated by itself and cut (`cut_windows`), whichever process
    does it: the windows do not depend on `num_process`. With `sizes.group_rows` it is each run of 50,000 rows, with
    `sizes.by_document` each run's documents one by one (rows of one number in the column `document`; without it each row
    is one), and no token is left out.

    Args:
        rows: a Dataset with a column `text`, and perhaps `document`.
        work: an existing, empty folder for the parts, which the result is memory-mapped from, unless `in_memory`.
        first_row: the datastore row of the first window's first.

    Returns:
        A Dataset with input_ids, labels (int32), attention_mask (int8, all ones), each a list of block_size, and
        dstore_range (int64): first and past-last datastore row of the window, where a window has a row for each of
        labels[1:] that is not padding_index. The number of the text's tokens that are new in a window, and of all:
        without group_rows and by_document, what does not fill a window at the end of 1,000 rows is left out.

    Raises:
        InputError: no token to pad with; a worker process was killed.
    """
    import datasets

    first_rows = range(0, len(rows), BATCHES_PER_PART * ROWS_PER_BATCH)
    paths = [work / f"windows-{number:05d}.arrow" for number in range(len(first_rows))]
    if not paths:
        schema = WINDOW_SCHEMA.append(pa.field("dstore_range", pa.list_(pa.int64())))
        return datasets.Dataset(schema.empty_table()), 0, 0
    write = functools.partial(_write_part, rows=rows.with_format(None), tokenizer=tokenizer, sizes=sizes)
    done = _run(write, first_rows, paths, num_process)
    counts, in_windows, in_text = zip(
        *tqdm(done, desc="windows", total=len(paths), unit="part", disable=None), strict=True
    )

    bounds = first_row + np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    parts = [datasets.Dataset.from_file(str(path), in_memory=in_memory) for path in paths]
    windows = datasets.concatenate_datasets(parts).add_column(
        "dstore_range",
        _lists(np.stack([bounds[:-1], bounds[1:]], axis=1)),
        new_fingerprint="windows",  # the same in every run
        feature=datasets.List(datasets.Value("int64")),
    )
    return windows, sum(in_windows), sum(in_text)


def _run(
    write: Any, first_rows: Sequence[int], paths: Sequence[Path], num_process: int
) -> Iterable[tuple[Any, int, int]]:
    """What `write` returns for each part, in order, from this process or from `num_process` others."""
    workers = min(num_process, len(paths))
    if workers <= 1:
        yield from map(write, first_rows, paths)
        return
    # Forking needs no importable main module and no second start of Python; elsewhere than on Linux it is unsafe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        try:
            yield from pool.map(write, first_rows, paths)
        except BrokenProcessPool:
            raise InputError(f"--num_proc {num_process}: a process was killed; run again with fewer") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start_worker() -> None:
    """A worker takes one core, and the kernel ends it when its parent is killed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
