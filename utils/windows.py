"""Rows of text → windows of token ids, by one process or several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import InputError

ROWS_PER_BATCH = 1000  # rows that are concatenated and cut together: published token counts depend on it
BATCHES_PER_GROUP = 50  # with group_rows, so many batches are concatenated
CHUNK_TOKENS = 4 << 20  # tokens of the windows that are cut at once
COUNTS = ("tokens", "tokens_left_out", "dstore_size")
MOST_SHARED = 0.2  # a larger share of validation text in the corpus is no coincidence
HASHED_TOKENS = 4 << 20  # tokens of the corpus that are hashed at a time


@dataclass(frozen=True)
class WindowSizes:
    """How tokens are cut into windows.

    Each 1,000 rows of text are concatenated and cut, and what does not fill a window at their end is left out, as in
    the original. With `group_rows` it is each 50,000 rows, with `by_document` each row; then the last window may be
    short and nothing is left out.

    Attributes:
        block_size: tokens of a window.
        stride: tokens from one window to the next.
        padding_index: label of positions that predict nothing.
        bos: a token that begins each window, as one of its block_size tokens; the rows then have no special tokens.

    Raises InputError for sizes that make no windows.
    """

    block_size: int = 1024
    stride: int = 512
    padding_index: int = -100
    group_rows: bool = False
    by_document: bool = False
    bos: int | None = None

    def __post_init__(self) -> None:
        least = 2 if self.bos is None else 3
        if self.block_size < least or not 1 <= self.stride <= self.block_size or self.padding_index >= 0:
            given = f"--block_size {self.block_size} --stride {self.stride} --padding_index {self.padding_index}"
            expected = f"a block of {least} or more, a stride from 1 to the block, and a negative padding index"
            raise InputError(f"{given}: expected {expected}")

    @property
    def width(self) -> int:
        """Tokens of text in a window."""
        return self.block_size - (self.bos is not None)

    @property
    def rows_at_once(self) -> int:
        """Rows whose windows depend on no other rows."""
        return ROWS_PER_BATCH * (BATCHES_PER_GROUP if self.group_rows else 1)

    def kept(self, tokens: int) -> int:
        """Of so many tokens that are cut together, those that get into windows."""
        if self.group_rows or self.by_document:
            return tokens
        return tokens // self.width * self.width or tokens


def tokenize(texts: Sequence[str], tokenizer: Any, special: bool = True) -> list[np.ndarray]:
    """The token ids of each text, int32 (tokens,), with `special` tokens or without."""
    options = {"add_special_tokens": special, "return_attention_mask": False, "return_token_type_ids": False}
    ids = []
    for start in range(0, len(texts), ROWS_PER_BATCH):
        ids += tokenizer(texts[start : start + ROWS_PER_BATCH], verbose=False, **options)["input_ids"]
    return [np.array(each, dtype=np.int32) for each in ids]


def padding_token(tokenizer: Any) -> int | None:
    """The token that fills up short windows: the tokenizer's padding token, else its end-of-sequence token."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def cut_windows(
    tokens: np.ndarray, sizes: WindowSizes, pad_token: int | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cut tokens into windows.

    With total = sizes.kept(len(tokens)), the window for i = 0, stride, 2·stride, … < total holds tokens
    max(i+stride−block_size, 0) … min(i+stride, total). Those from i on are their own labels, the others have the label
    padding_index, so each token is a label once. Short windows are padded on the right.

    With sizes.bos this holds for the block_size - 1 tokens of text after it. The first of them has no label, since the
    hidden state of the BOS token alone is the same in all windows.

    Args:
        tokens: (tokens,) int32.

    Yields:
        (input_ids, labels), each int32 (windows, block_size), a few million tokens at a time.

    Raises:
        InputError: a window must be padded and `pad_token` is None.
    """
    width, ignored = sizes.width, np.int32(sizes.padding_index)
    stride, total = min(sizes.stride, width), sizes.kept(len(tokens))
    step = max(1, CHUNK_TOKENS // width) * stride
    for start in range(0, total, step):
        begin = np.arange(start, min(start + step, total), stride)[:, None]  # (windows, 1): where labels begin
        end = np.minimum(begin + stride, total)
        position = np.maximum(begin + stride - width, 0) + np.arange(width)  # (windows, width)
        inside = position < end
        if pad_token is None and not inside.all():
            raise InputError("--tokenizer_path: a window is short, and the tokenizer has no token to pad it with")
        ids = tokens[np.minimum(position, total - 1)]
        labels = np.where(inside & (position >= begin), ids, ignored)
        ids = np.where(inside, ids, np.int32(pad_token or 0))
        if sizes.bos is not None:
            labels[:, 0] = ignored
            ids, labels = np.insert(ids, 0, sizes.bos, axis=1), np.insert(labels, 0, ignored, axis=1)
        yield ids, labels


def _windows_of_rows(
    batch: dict[str, list[int]], rows: Any, tokenizer: Any, sizes: WindowSizes
) -> dict[str, np.ndarray]:
    """The windows of the rows from `batch["start"]` on, for `Dataset.map`, with the counts of `COUNTS`."""
    (start,) = batch["start"]
    texts = tokenize(rows[start : start + sizes.rows_at_once]["text"], tokenizer, special=sizes.bos is None)
    if texts and not sizes.by_document:
        texts = [np.concatenate(texts)]
    none = np.zeros((0, sizes.block_size), np.int32)
    ids, labels = [none], [none]
    for tokens in texts:
        for window_ids, window_labels in cut_windows(tokens, sizes, padding_token(tokenizer)):
            ids.append(window_ids)
            labels.append(window_labels)
    ids, labels = np.concatenate(ids), np.concatenate(labels)  # (windows, block_size)
    # The counts of these rows' tokens stand in their first window.
    kept, left_out = np.zeros((2, len(ids)), np.int64)
    kept[:1] = sum(sizes.kept(len(tokens)) for tokens in texts)
    left_out[:1] = sum(map(len, texts)) - kept[:1]
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": np.ones(ids.shape, np.int8),
        "tokens": kept,
        "tokens_left_out": left_out,
        "dstore_size": (labels[:, 1:] != sizes.padding_index).sum(1),
    }


def windows_of_split(
    rows: Any, tokenizer: Any, sizes: WindowSizes, num_process: int = 1, path: Path | None = None
) -> tuple[Any, dict[str, int]]:
    """The windows of one split: the same for any number of processes.

    Args:
        rows: a Dataset with a column `text`.
        path: an Arrow file to write the windows to, from which they are then memory-mapped; else they are in memory.

    Returns:
        A Dataset with input_ids, labels (int32), attention_mask (int8, all ones), each a list of block_size, and
        dstore_range (int64): first and past-last datastore row of the window, where a window has a row for each of
        labels[1:] that is not padding_index. And the counts: tokens in windows (each counted once), tokens left out,
        datastore rows.
    """
    import datasets

    lists = {"input_ids": "int32", "labels": "int32", "attention_mask": "int8"}
    features = {name: datasets.List(datasets.Value(dtype)) for name, dtype in lists.items()}
    features |= {name: datasets.Value("int64") for name in COUNTS}
    # Mapped over the numbers of first rows: batches of 1,000 rows, whichever process has them.
    starts = range(0, max(len(rows), 1), sizes.rows_at_once)
    windows = datasets.Dataset.from_dict({"start": list(starts)}).map(
        _windows_of_rows,
        batched=True,
        batch_size=1,
        remove_columns="start",
        features=datasets.Features(features),
        fn_kwargs={"rows": rows.with_format(None), "tokenizer": tokenizer, "sizes": sizes},
        num_proc=min(num_process, len(starts)) if num_process > 1 else None,
        cache_file_name=path and str(path),
        load_from_cache_file=False,
        new_fingerprint="windows",
        desc="windows",
    )
    counts = {name: windows.data.column(name).to_numpy() for name in COUNTS}
    ends = np.cumsum(counts["dstore_size"])
    ranges = datasets.Dataset.from_dict({"dstore_range": np.stack([ends - counts["dstore_size"], ends], axis=1)})
    windows = datasets.concatenate_datasets([windows.remove_columns(list(COUNTS)), ranges], axis=1)
    return windows, {name: int(column.sum()) for name, column in counts.items()}


def check_held_out(windows: Any, corpus: np.ndarray, flag: str, kind: str) -> None:
    """Raises InputError where the text of windows is part of the `kind` ("indexed", "training") text, `corpus` (tokens,)."""
    labels = np.concatenate(windows["labels"][:])
    if (shared := shared_runs(labels[labels >= 0], corpus)) > MOST_SHARED:
        raise InputError(f"{flag}: {shared:.0%} of it is in the {kind} text; choose on validation text that is not")


def shared_runs(tokens: np.ndarray, corpus: np.ndarray, length: int = 64, at_most: int = 4096) -> float:
    """The share of the runs of `length` tokens in `tokens` (n,) that are in `corpus` (m,) too, however both are cut into
    windows; shorter runs are shared by documents that follow one template. `at_most` runs, evenly spread, are looked up; 0 where there is no run."""
    if min(len(tokens), len(corpus)) < length:
        return 0.0
    starts = np.linspace(0, len(tokens) - length, min(at_most, len(tokens) - length + 1)).astype(np.int64)
    wanted = _run_hashes(tokens, length)[starts]
    found = np.zeros(len(wanted), bool)
    for start in range(0, len(corpus) - length + 1, HASHED_TOKENS):
        found |= np.isin(wanted, _run_hashes(corpus[start : start + HASHED_TOKENS + length - 1], length))
    return float(found.mean())


def _run_hashes(tokens: np.ndarray, length: int) -> np.ndarray:
    """A 64-bit hash of each run of `length` tokens: (n,) -> (n - length + 1,) uint64."""
    tokens = np.asarray(tokens).astype(np.uint64)
    runs = len(tokens) - length + 1
    hashes = np.zeros(runs, np.uint64)
    for place in range(length):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + tokens[place : place + runs]
    return hashes
