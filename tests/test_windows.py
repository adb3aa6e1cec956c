"""Windows are the original's, for any number of processes; what readers of windows accept."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from utils import windows
from utils.errors import InputError
from utils.evaluation import rounded, window_batches
from utils.loading import load_windows, vocabulary_digest
from utils.preprocess_dataset import tokenize_and_group_text
from utils.windows import WindowSizes, cut_windows, shared_runs, windows_of_split

GOLDEN = Path(__file__).parent / "golden" / "preprocess"
COLUMNS = ("input_ids", "labels", "attention_mask", "dstore_range")
LETTERS = "abcdefgh"

pytestmark = pytest.mark.unit


def letters_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token (3 to 10) for each letter a to h, between [CLS] (1) and [SEP] (2), with token_type_ids."""
    vocabulary = {token: number for number, token in enumerate(["[UNK]", "[CLS]", "[SEP]", *LETTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing("[CLS]:1 $A:0 [SEP]:0", None, [("[CLS]", 1), ("[SEP]", 2)])
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", model_input_names=names, **special)


def dataset(texts):
    return datasets.Dataset.from_dict({"text": texts})


def columns(made):
    return {name: made[name][:] for name in COLUMNS}


def reference_windows(texts, block_size, stride, pad, keep_all=False):
    """The definition, token by token, for token lists that are cut by themselves."""
    found = {name: [] for name in COLUMNS}
    row = 0
    for tokens in texts:
        total = len(tokens)
        if total >= block_size and not keep_all:
            total = total // block_size * block_size
        for i in range(0, total, stride):
            begin, end = max(i + stride - block_size, 0), min(i + stride, total)
            ids = tokens[begin:end]
            labels = [token if begin + at >= i else -100 for at, token in enumerate(ids)]
            short = block_size - len(ids)
            labels += [-100] * short
            past = row + sum(label != -100 for label in labels[1:])
            for name, value in zip(COLUMNS, (ids + [pad] * short, labels, [1] * block_size, [row, past]), strict=True):
                found[name].append(value)
            row = past
    return found


@pytest.mark.parametrize("num_process", [1, 2])
def test_golden_windows_with_one_process_and_with_two(num_process):
    golden = json.loads((GOLDEN / "expected.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    raw = {"train": dataset(golden["text"])}
    made = tokenize_and_group_text(raw, tokenizer, golden["block_size"], golden["stride"], -100, num_process)
    assert list(made) == ["train"] and columns(made["train"]) == {name: golden[name] for name in COLUMNS}


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
        patch.setattr(windows, "CHUNK_TOKENS", at_once)
        chunks = list(cut_windows(tokens, WindowSizes(block_size, stride), 7))
    expected = reference_windows([tokens.tolist()], block_size, stride, 7)
    assert [row for ids, _ in chunks for row in ids.tolist()] == expected["input_ids"]
    assert [row for _, labels in chunks for row in labels.tolist()] == expected["labels"]


def test_each_thousand_rows_is_cut_by_itself_with_special_tokens():
    letters = letters_tokenizer(pad_token="[SEP]")
    raw = {"train": dataset(["ab"] * 1000 + ["c", "", "d"]).rename_column("text", "body")}
    made = tokenize_and_group_text(raw, letters, 6, 6)["train"]
    assert columns(made) == reference_windows([[1, 3, 4, 2] * 1000, [1, 5, 2, 1, 2, 1, 6, 2]], 6, 6, 2)


@pytest.mark.parametrize(("block_size", "stride"), [(6, 6), (6, 4), (64, 3)])
@pytest.mark.parametrize(("mode", "at_once"), [("", 3), ("group_rows", 12), ("by_document", 1)])
@pytest.mark.parametrize("bos", [None, 1])
def test_modes_cut_their_texts_alike_in_one_process_or_two(
    block_size, stride, mode, at_once, bos, monkeypatch, tmp_path
):
    monkeypatch.setattr(windows, "ROWS_PER_BATCH", 3)
    monkeypatch.setattr(windows, "BATCHES_PER_GROUP", 4)
    letters = letters_tokenizer(pad_token="[SEP]", bos_token="[CLS]")
    texts = [LETTERS[: number % 9] for number in range(29)]
    sizes = WindowSizes(block_size, stride, bos=bos, **({mode: True} if mode else {}))
    made, counts = windows_of_split(dataset(texts), letters, sizes, 1, tmp_path / "one.arrow")
    two, _ = windows_of_split(dataset(texts), letters, sizes, 2, tmp_path / "two.arrow")
    assert columns(two) == columns(made)

    def ids(text):
        letters = [LETTERS.index(letter) + 3 for letter in text]
        return [1, *letters, 2] if bos is None else letters

    cut = [[number for text in texts[at : at + at_once] for number in ids(text)] for at in range(0, 29, at_once)]
    width = block_size - (bos is not None)
    expected = reference_windows(cut, width, min(stride, width), 2, keep_all=bool(mode))
    kept = sum(label != -100 for labels in expected["labels"] for label in labels)
    if bos is not None:  # before each window; it and the first token after it are not predicted
        expected["input_ids"] = [[1, *row] for row in expected["input_ids"]]
        expected["labels"] = [[-100, -100, *row[1:]] for row in expected["labels"]]
        expected["attention_mask"] = [[1, *row] for row in expected["attention_mask"]]
    assert columns(made) == expected
    total = sum(map(len, cut))
    assert counts == {"tokens": kept, "tokens_left_out": total - kept, "dstore_size": made[-1]["dstore_range"][1]}
    assert not mode or kept == total


def test_short_windows_take_the_padding_token_before_end_of_sequence():
    raw = {"train": dataset(["a"])}
    both = tokenize_and_group_text(raw, letters_tokenizer(pad_token="[UNK]", eos_token="[SEP]"), 5, 5)["train"]
    end = tokenize_and_group_text(raw, letters_tokenizer(eos_token="[SEP]"), 5, 5)["train"]
    assert both["input_ids"][:] == [[1, 3, 2, 0, 0]] and end["input_ids"][:] == [[1, 3, 2, 2, 2]]
    assert both["labels"][:] == end["labels"][:] == [[1, 3, 2, -100, -100]]


def test_without_a_token_to_pad_with_only_full_windows_can_be_made():
    raw = {"train": dataset(["a"] * 4)}
    assert len(tokenize_and_group_text(raw, letters_tokenizer(), 6, 6)["train"]) == 2
    with pytest.raises(InputError, match="tokenizer_path"):
        tokenize_and_group_text(raw, letters_tokenizer(), 6, 3)


def test_vocabulary_digest_ignores_added_tokens():
    digest = vocabulary_digest(letters_tokenizer())
    assert digest == vocabulary_digest(letters_tokenizer(pad_token="<pad>"))
    assert digest != vocabulary_digest(AutoTokenizer.from_pretrained(GOLDEN / "tokenizer"))


def test_padding_that_ends_all_windows_of_a_batch_is_not_read():
    ids = np.arange(160).reshape(4, 40)
    labels = np.where(np.arange(40) < [[3], [14], [0], [0]], ids, -100)
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": labels}).with_format("numpy")
    batches = [batch for _, batch in window_batches(rows, 2)]
    assert [batch["input_ids"].tolist() for batch in batches] == [ids[:2, :16].tolist(), ids[2:, :8].tolist()]
    assert [batch["labels"].tolist() for batch in batches] == [labels[:2, :16].tolist(), labels[2:, :8].tolist()]


def test_few_sizes_are_computed_with():
    sizes = [rounded(count) for count in range(1, 1025)]
    assert len(set(sizes)) == 24 and all(count <= size < 1.25 * count + 8 for count, size in enumerate(sizes, 1))


def test_windows_that_cannot_be_read_are_refused(tmp_path):
    window = {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "attention_mask": [1, 1, 1], "dstore_range": [0, 2]}
    rows = {name: [value, value] for name, value in window.items()}
    saved = {"whole": rows, "lacking": {name: rows[name] for name in rows if name != "labels"}}
    for name, each in saved.items():
        datasets.DatasetDict({"train": datasets.Dataset.from_dict(each)}).save_to_disk(str(tmp_path / name))
    assert len(load_windows(tmp_path / "whole", "train", at_most=1)) == 1
    with pytest.raises(InputError, match="lacking"):
        load_windows(tmp_path / "lacking", "train")
    with pytest.raises(InputError, match="valid"):
        load_windows(tmp_path / "whole", "valid")
    (file,) = (tmp_path / "whole" / "train").glob("*.arrow")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(InputError, match="whole"):
        load_windows(tmp_path / "whole", "train")


def test_shared_runs_finds_text_that_is_part_of_another():
    random = np.random.default_rng(0)
    text, other = random.integers(0, 500, 40_000), random.integers(0, 500, 9000)
    other[:3000] = text[20_007:23_007]
    gaps = np.delete(text, np.arange(0, len(text), 1024))  # as other windows leave them out
    assert shared_runs(text[5000:9000], gaps) > 0.9
    assert shared_runs(other, text) == pytest.approx(1 / 3, abs=0.02)
    assert shared_runs(other[3000:], text) == shared_runs(text[:5], text) == shared_runs(text, text[:5]) == 0
