"""Windows are the original's; documents are what lies between separators; splits by document repeat everywhere."""

from __future__ import annotations

import itertools
import json
import re
import tempfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from utils import text_files, windows
from utils.errors import InputError
from utils.evaluation import shared_runs, window_batches
from utils.loading import load_windows, vocabulary_digest
from utils.preprocess_dataset import tokenize_and_group_text
from utils.windows import WindowSizes, cut_windows

GOLDEN = Path(__file__).parent / "golden" / "preprocess"
COLUMNS = ("input_ids", "labels", "attention_mask", "dstore_range")

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def golden():
    return json.loads((GOLDEN / "expected.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")


def letters_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token for each letter a to h, between [CLS] and [SEP], with token_type_ids."""
    vocabulary = {token: number for number, token in enumerate(["[UNK]", "[CLS]", "[SEP]", *"abcdefgh"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing("[CLS]:1 $A:0 [SEP]:0", None, [("[CLS]", 1), ("[SEP]", 2)])
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", model_input_names=names, **special)


def reference_windows(batches, block_size, stride, pad, ignored=-100, keep_all=False):
    """The definition, token by token."""
    found = {name: [] for name in COLUMNS}
    row = 0
    for tokens in batches:
        total = len(tokens)
        if total >= block_size and not keep_all:
            total = total // block_size * block_size
        for i in range(0, total, stride):
            begin, end = max(i + stride - block_size, 0), min(i + stride, total)
            ids = tokens[begin:end]
            labels = [token if begin + at >= i else ignored for at, token in enumerate(ids)]
            short = block_size - len(ids)
            labels += [ignored] * short
            past = row + sum(label != ignored for label in labels[1:])
            for name, value in zip(COLUMNS, (ids + [pad] * short, labels, [1] * block_size, [row, past]), strict=True):
                found[name].append(value)
            row = past
    return found


@pytest.mark.parametrize("num_process", [1, 2])
def test_golden_windows_are_reproduced_by_one_process_and_by_two(golden, tokenizer, num_process, monkeypatch):
    monkeypatch.setattr(windows, "BATCHES_PER_PART", 1)
    raw = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": golden["text"]})})
    made = tokenize_and_group_text(raw, tokenizer, golden["block_size"], golden["stride"], -100, num_process)
    assert list(made) == ["train"] and set(made["train"].column_names) == set(COLUMNS)
    for name in COLUMNS:
        assert made["train"][name][:] == golden[name], name


@settings(max_examples=60, deadline=None)
@given(
    total=st.integers(0, 90),
    block_size=st.integers(2, 20),
    stride=st.integers(1, 20),
    at_once=st.sampled_from([1, 64, 1 << 20]),
)
def test_windows_follow_the_definition_token_by_token(total, block_size, stride, at_once):
    stride = min(stride, block_size)
    tokens = np.arange(100, 100 + total, dtype=np.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "TABLE_TOKENS", at_once)
        pieces = list(cut_windows(tokens, WindowSizes(block_size, stride), 7))
    expected = reference_windows([tokens.tolist()], block_size, stride, 7)
    assert [row for ids, _ in pieces for row in ids.tolist()] == expected["input_ids"]
    assert [row for _, labels in pieces for row in labels.tolist()] == expected["labels"]


def test_special_tokens_come_with_each_row_and_token_type_ids_do_no_harm():
    letters = letters_tokenizer(sep_token="[SEP]", pad_token="[SEP]")
    texts = ["abc", "", "defgh", "a"]
    assert "token_type_ids" in letters(texts)
    made = tokenize_and_group_text({"test": datasets.Dataset.from_dict({"text": texts})}, letters, 4, 2)["test"]
    tokens = [1, 3, 4, 5, 2, 1, 2, 1, 6, 7, 8, 9, 10, 2, 1, 3, 2]
    expected = reference_windows([tokens], 4, 2, 2)
    assert {name: made[name][:] for name in COLUMNS} == expected


def test_each_thousand_rows_is_cut_by_itself():
    letters = letters_tokenizer(pad_token="[SEP]")
    texts = ["ab"] * 1000 + ["c"] * 3
    made = tokenize_and_group_text({"train": datasets.Dataset.from_dict({"text": texts})}, letters, 6, 6)["train"]
    expected = reference_windows([[1, 3, 4, 2] * 1000, [1, 5, 2] * 3], 6, 6, 2)
    assert {name: made[name][:] for name in COLUMNS} == expected


@pytest.mark.parametrize(("block_size", "stride"), [(6, 6), (6, 4), (6, 1), (64, 3)])
@pytest.mark.parametrize("num_process", [1, 2])
def test_grouped_rows_are_cut_as_one_text_and_no_token_is_left_out(
    block_size, stride, num_process, monkeypatch, tmp_path
):
    monkeypatch.setattr(windows, "ROWS_PER_BATCH", 3)
    monkeypatch.setattr(windows, "BATCHES_PER_PART", 4)
    letters = letters_tokenizer(pad_token="[SEP]")
    texts = ["abcdefgh"[: number % 9] for number in range(29)]
    rows = datasets.Dataset.from_dict({"text": texts})
    sizes = WindowSizes(block_size, stride, group_rows=True)
    made, kept, in_text = windows.windows_of_split(rows, letters, sizes, num_process, tmp_path)
    groups = [windows.token_ids(texts[start : start + 12], letters).tolist() for start in (0, 12, 24)]
    expected = reference_windows(groups, block_size, stride, 2, keep_all=True)
    assert {name: made[name][:] for name in COLUMNS} == expected
    assert kept == in_text == sum(map(len, groups))


@pytest.mark.parametrize(("block_size", "stride"), [(6, 6), (6, 4), (64, 3)])
@pytest.mark.parametrize("num_process", [1, 2])
def test_by_document_each_one_is_cut_by_itself_and_no_token_is_left_out(
    block_size, stride, num_process, monkeypatch, tmp_path
):
    monkeypatch.setattr(windows, "ROWS_PER_BATCH", 3)
    monkeypatch.setattr(windows, "BATCHES_PER_PART", 4)
    letters = letters_tokenizer(pad_token="[SEP]")
    texts = ["abcdefgh"[: number % 9] for number in range(24)]
    documents = [0, 0, 0, 0, 0, 3, 3, 4, 4, 4, 4, 4, 9, 10, 10, 10, 10, 10, 10, 10, 11, 12, 12, 12]
    rows = datasets.Dataset.from_dict({"text": texts, "document": documents})
    sizes = WindowSizes(block_size, stride, by_document=True)
    made, kept, in_text = windows.windows_of_split(rows, letters, sizes, num_process, tmp_path)
    pairs = itertools.groupby(zip(documents, texts, strict=True), key=lambda pair: pair[0])
    alone = [windows.token_ids([text for _, text in group], letters).tolist() for _, group in pairs]
    expected = reference_windows(alone, block_size, stride, 2, keep_all=True)
    assert {name: made[name][:] for name in COLUMNS} == expected
    assert kept == in_text == sum(map(len, alone))


def test_without_documents_each_row_is_one(tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["abc", "de"]})
    sizes = WindowSizes(8, 8, by_document=True)
    made, *_ = windows.windows_of_split(rows, letters_tokenizer(pad_token="[SEP]"), sizes, 1, tmp_path)
    assert made["input_ids"][:] == [[1, 3, 4, 5, 2, 2, 2, 2], [1, 6, 7, 2, 2, 2, 2, 2]]


def test_padding_that_ends_all_windows_of_a_batch_is_not_read():
    ids = np.arange(24).reshape(4, 6)
    labels = np.where(np.arange(6) < [[3], [4], [0], [0]], ids, -100)
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": labels}).with_format("numpy")
    batches = [batch for _, batch in window_batches(rows, 2)]
    assert [batch["input_ids"].tolist() for batch in batches] == [ids[:2, :4].tolist(), ids[2:, :1].tolist()]
    assert [batch["labels"].tolist() for batch in batches] == [labels[:2, :4].tolist(), [[-100], [-100]]]


@pytest.mark.parametrize(("block_size", "stride"), [(6, 6), (6, 5), (6, 3), (64, 7)])
@pytest.mark.parametrize("mode", ["", "group_rows", "by_document"])
def test_a_bos_token_stands_before_each_window_and_neither_it_nor_what_follows_it_alone_is_a_label(
    block_size, stride, mode, monkeypatch, tmp_path
):
    monkeypatch.setattr(windows, "ROWS_PER_BATCH", 4)
    letters = letters_tokenizer(bos_token="[CLS]", pad_token="[SEP]")  # which it puts at each row, too
    texts = ["abcdefgh"[: number % 9] for number in range(14)]
    rows = datasets.Dataset.from_dict({"text": texts})
    sizes = WindowSizes(block_size, stride, bos=1, **({mode: True} if mode else {}))
    made, kept, in_text = windows.windows_of_split(rows, letters, sizes, 1, tmp_path)
    rows_at_once = {"": 4, "group_rows": 14, "by_document": 1}[mode]
    texts_at_once = ["".join(texts[at : at + rows_at_once]) for at in range(0, 14, rows_at_once)]
    tokens = [["abcdefgh".index(letter) + 3 for letter in text] for text in texts_at_once]
    expected = reference_windows(tokens, block_size - 1, min(stride, block_size - 1), 2, keep_all=bool(mode))
    assert made["input_ids"][:] == [[1, *ids] for ids in expected["input_ids"]]
    assert made["labels"][:] == [[-100, -100, *labels[1:]] for labels in expected["labels"]]
    assert made["dstore_range"][:] == expected["dstore_range"]
    assert in_text == sum(map(len, texts)) and kept == sum(label != -100 for row in expected["labels"] for label in row)


def test_short_windows_take_the_padding_token_before_the_end_of_sequence_token():
    rows = {"train": datasets.Dataset.from_dict({"text": ["a"]})}
    both = tokenize_and_group_text(rows, letters_tokenizer(pad_token="[UNK]", eos_token="[SEP]"), 5, 5)["train"]
    end = tokenize_and_group_text(rows, letters_tokenizer(eos_token="[SEP]"), 5, 5)["train"]
    assert both["input_ids"][:] == [[1, 3, 2, 0, 0]] and end["input_ids"][:] == [[1, 3, 2, 2, 2]]
    assert both["labels"][:] == end["labels"][:] == [[1, 3, 2, -100, -100]]


def test_without_a_token_to_pad_with_only_full_windows_can_be_made():
    rows = {"train": datasets.Dataset.from_dict({"text": ["a"] * 4})}
    assert len(tokenize_and_group_text(rows, letters_tokenizer(), 6, 6)["train"]) == 2
    with pytest.raises(InputError, match="padding"):
        tokenize_and_group_text(rows, letters_tokenizer(), 6, 3)


def test_a_split_without_rows_gives_no_windows_and_the_first_column_serves_without_a_text_column(tokenizer):
    raw = {
        "empty": datasets.Dataset.from_dict({"text": []}),
        "other": datasets.Dataset.from_dict({"body": ["zi so ka ni"] * 4}),
    }
    made = tokenize_and_group_text(raw, tokenizer, 8, 4)
    assert len(made["empty"]) == 0 and set(made["empty"].column_names) == set(COLUMNS)
    assert made["other"]["dstore_range"][:] == [[0, 3], [3, 7], [7, 11], [11, 15]]


def documents_of(path: Path, separator: str) -> list[str]:
    return list(text_files.read_documents(path, re.compile(separator)))


@settings(max_examples=80, deadline=None)
@given(
    text=st.text(st.sampled_from("ab<>\n é"), max_size=300),
    separator=st.sampled_from(["<[^<>]{0,3}>", "\n\n", "(?m)^(?=a)", "b|bb\n", "(?<=a)\n", r"\n?<>\n*"]),
)
def test_documents_read_in_pieces_are_those_of_the_whole_text(text, separator):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder) / "text.txt"
        path.write_bytes(text.encode())
        patch.setattr(text_files, "LONGEST_SEPARATOR", 12)
        found = documents_of(path, separator)
    expected = [piece for piece in re.split(separator, text) if piece.strip()]
    assert found == [piece if piece.endswith("\n") else piece + "\n" for piece in expected]


def test_only_a_newline_ends_a_line_of_windows_too_and_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes("\ufeffone\r\n\ntwo\x0b\u2028three\rfour".encode())
    assert list(text_files.read_lines(path)) == ["one\n", "\n", "two\x0b\u2028three\rfour"]


def split_texts(dataset, work, validation=0.2, seed=1):
    work.mkdir(parents=True)
    splits = text_files.split_documents(dataset, {"validation": validation, "test": 0.1}, seed=seed, work=work)
    return {split: list(text_files.iterate_documents(rows)) for split, rows in splits.items()}


def test_splits_by_document_are_the_same_on_every_platform(tmp_path):
    texts = [f"document {number}" for number in range(20)]
    found = split_texts(datasets.Dataset.from_dict({"text": texts}), tmp_path / "a")
    assert found["test"] == ["document 1", "document 4"]
    assert found["validation"] == ["document 9", "document 12", "document 13", "document 15"]
    assert found["train"] == [text for text in texts if text not in found["test"] + found["validation"]]
    backwards = split_texts(datasets.Dataset.from_dict({"text": texts[::-1]}), tmp_path / "b")
    assert {split: sorted(texts) for split, texts in backwards.items()} == {s: sorted(t) for s, t in found.items()}
    other = split_texts(datasets.Dataset.from_dict({"text": texts}), tmp_path / "c", seed=2)
    assert other["test"] != found["test"]


def test_equal_documents_fall_into_one_split(tmp_path):
    texts = [f"document {number % 5}" for number in range(50)]
    found = split_texts(datasets.Dataset.from_dict({"text": texts}), tmp_path / "a")
    assert sum(map(len, found.values())) == 50 and sum(len(set(part)) for part in found.values()) == 5


def test_lines_of_a_document_stay_together(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"= {number} =\nfirst\n\nsecond\n" for number in range(30)))
    rows = text_files.open_source(str(path), document_separator="(?m)^(?== )", work=tmp_path)["train"]
    assert len(rows) == 120 and rows[0]["text"] == "= 0 =\n"
    found = split_texts(rows, tmp_path / "a")
    assert {split: len(documents) for split, documents in found.items()} == {"train": 21, "validation": 6, "test": 3}
    assert all(re.fullmatch(r"= \d+ =\nfirst\n\nsecond\n", document) for part in found.values() for document in part)


@pytest.mark.parametrize(("texts", "fraction"), [(["one"], 0.1), (["one", "two"], 0.9), (["same"] * 9, 0.1)])
def test_too_few_documents_to_divide_are_refused(tmp_path, texts, fraction):
    with pytest.raises(InputError, match=f"{len(texts)} documents are too few"):
        split_texts(datasets.Dataset.from_dict({"text": texts}), tmp_path / "a", validation=fraction)


def test_a_padding_token_makes_no_other_tokenizer_but_another_vocabulary_does():
    digest = vocabulary_digest(letters_tokenizer())
    assert digest == vocabulary_digest(letters_tokenizer(pad_token="<pad>"))
    other = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    assert digest != vocabulary_digest(other)


WINDOW = {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "attention_mask": [1, 1, 1], "dstore_range": [0, 2]}


def saved_windows(folder: Path, **columns) -> Path:
    rows = {name: [value, value] for name, value in WINDOW.items()} | columns
    rows = {name: value for name, value in rows.items() if value is not None}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows)}).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize("value", [None, [1, 2], [["a"], ["b"]]])
@pytest.mark.parametrize("name", WINDOW)
def test_windows_without_a_column_or_with_one_of_another_kind_are_refused(tmp_path, name, value):
    with pytest.raises(InputError, match=rf"split train.* column {name}"):
        load_windows(saved_windows(tmp_path / "windows", **{name: value}), "train")


def test_a_windows_folder_that_is_empty_or_was_cut_off_is_refused(tmp_path):
    folder = saved_windows(tmp_path / "windows")
    assert len(load_windows(folder, "train", at_most=1)) == 1
    (file,) = (folder / "train").glob("*.arrow")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(InputError, match="is not a windows folder"):
        load_windows(folder, "train")
    none = load_windows(saved_windows(tmp_path / "whole"), "train").with_format(None).select([])
    datasets.DatasetDict({"train": none}).save_to_disk(str(tmp_path / "empty"))
    with pytest.raises(InputError, match="make the windows with"):
        load_windows(tmp_path / "empty", "train")


def test_a_text_that_is_part_of_another_is_told_from_one_that_is_not():
    random = np.random.default_rng(0)
    text, other = random.integers(0, 500, 40_000), random.integers(0, 500, 9000)
    other[:3000] = text[20_007:23_007]
    gaps = np.delete(text, np.arange(0, len(text), 1024))  # as other windows leave them out
    assert shared_runs(text[5000:9000], gaps) > 0.9
    assert shared_runs(other, text) == pytest.approx(1 / 3, abs=0.02)
    assert shared_runs(other[3000:], text) == shared_runs(text[:5], text) == shared_runs(text, text[:5]) == 0
