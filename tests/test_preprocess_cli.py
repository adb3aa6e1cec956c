"""The windows command: every kind of text goes in, one folder comes out whole, user errors are refused in one line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import TOKENIZER, Command, command, refused_here, run

from utils.artefact import read_made
from utils.text_files import open_source, split_documents

MODULE = "utils.preprocess_dataset"
WORDS = re.sub(" ", "\n", "so zi ka ni ko ro di ge su ke ci to gi hi pi po mo nelo\n").splitlines(keepends=True)


def flags(source, output, *more, block_size=8, stride=4):
    given = {"--dataset_name": source, "--output_dir": output, "--tokenizer_path": TOKENIZER}
    return [*(part for pair in given.items() for part in pair), "--block_size", block_size, "--stride", stride, *more]


def make(source, output, *more, **sizes):
    command(MODULE, *flags(source, output, *more, **sizes))
    return datasets.load_from_disk(str(output))


def summary(output):
    return json.loads((output / "dstore_summary.json").read_text())


def raw_texts(output, split):
    return [json.loads(line)["text"] for line in (output / "raw" / f"{split}.jsonl").read_text().splitlines()]


def texts_of(source, work, whole_files=False):
    return {split: rows["text"][:] for split, rows in open_source(str(source), None, "text", whole_files, work).items()}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("".join(WORDS))
    return path


@pytest.fixture
def articles(tmp_path):
    """20 documents of two lines, as JSON lines."""
    path = tmp_path / "articles.jsonl"
    texts = [f"{WORDS[number % 18]}{'so zi ka ' * (number + 2)}\n" for number in range(20)]
    path.write_text("".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(texts)))
    return path


def test_the_command_writes_windows_summary_and_record(tmp_path, text):
    home, out = tmp_path / "home", tmp_path / "deep" / "out"
    home.mkdir()
    done = run("utils/preprocess_dataset.py", *flags(text, out), HOME=str(home), HF_HOME=str(home / "hf"))
    assert done.stderr == "" and all(word in done.stdout for word in ("18 rows", "16 tokens (2 left out)", "4 windows"))
    assert list(home.rglob("*.arrow")) == []
    names = {"train", "dataset_dict.json", "dstore_summary.json", "made.json", ".lock"}
    assert {path.name for path in out.iterdir()} == names
    windows = datasets.load_from_disk(str(out))["train"]
    assert windows["dstore_range"][:] == [[0, 3], [3, 7], [7, 11], [11, 15]]
    counts = {"dstore_size": 15, "dataset_cnt_len": 4, "rows": 18, "tokens": 16, "tokens_left_out": 2}
    assert summary(out)["train"] == counts | {"characters_left_out": 0}
    made = read_made(out)
    assert made.kind == "windows" and made.settings["text"] == [["words.txt", text.stat().st_size]]
    assert made.settings["block_size"] == 8 and len(made.settings["vocabulary"]) == 64


def test_files_named_by_split_may_be_of_any_kind(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "train.txt").write_text("".join(WORDS))
    rows = "".join(json.dumps({"id": number, "text": word}) + "\n" for number, word in enumerate(WORDS[::-1]))
    (source / "valid.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    pq.write_table(pa.table({"text": WORDS[1:], "id": list(range(17))}), source / "test.parquet")
    for name in ("README.md", "chapter1.txt", ".hidden.txt"):
        (source / name).write_text("nothing")
    windows = make(source, tmp_path / "out")
    assert {split: rows[0]["input_ids"][0] for split, rows in windows.items()} == {
        "train": 2,
        "validation": 19,
        "test": 3,
    }


def test_folders_that_datasets_saved_keep_their_splits(tmp_path):
    splits = {"test": WORDS[2:], "train": WORDS, "extra": WORDS[3:]}
    saved = datasets.DatasetDict(
        {name: datasets.Dataset.from_dict({"body": part, "n": part}) for name, part in splits.items()}
    )
    saved.save_to_disk(str(tmp_path / "several"))
    saved["train"].save_to_disk(str(tmp_path / "single"))
    several = make(tmp_path / "several", tmp_path / "out1", "--text_column", "body")
    assert {split: rows[0]["input_ids"][0] for split, rows in several.items()} == {"test": 4, "train": 2, "extra": 5}
    single = make(tmp_path / "single", tmp_path / "out2", "--text_column", "body")
    assert single["train"][:] == several["train"][:]


def test_a_configuration_may_be_a_subfolder_of_sharded_files(tmp_path):
    folder = tmp_path / "wikitext" / "wikitext-103-raw-v1"
    folder.mkdir(parents=True)
    rows = {"train-00000-of-00002": WORDS[:9], "train-00001-of-00002": WORDS[9:], "test-00000-of-00001": ["", *WORDS]}
    for name, part in rows.items():
        pq.write_table(pa.table({"text": part}), folder / f"{name}.parquet")
    windows = make(tmp_path / "wikitext", tmp_path / "out", "--dataset_config_name", folder.name)
    assert windows["train"]["input_ids"][:] == windows["test"]["input_ids"][:]
    assert summary(tmp_path / "out")["test"]["rows"] == 19


@pytest.mark.unit
def test_text_files_are_rows_by_line_or_by_file(tmp_path, text):
    for split in ("train", "test"):
        (tmp_path / "splits" / split).mkdir(parents=True)
        (tmp_path / "splits" / split / "a.txt").write_text("".join(WORDS))
    assert texts_of(tmp_path / "splits", tmp_path / "work") == {"train": WORDS, "test": WORDS}
    assert texts_of(text, tmp_path / "work") == {"train": WORDS}
    assert texts_of(text, tmp_path / "other", whole_files=True) == {"train": ["".join(WORDS)]}
    (tmp_path / "folder").mkdir()
    for name in ("b [1].txt", "a train.txt"):
        (tmp_path / "folder" / name).write_text(f"{name}\nso")
    assert texts_of(tmp_path / "folder", tmp_path / "work") == {"train": ["a train.txt\nso", "b [1].txt\nso"]}


@pytest.mark.unit
@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.bz2", "a.csv", "a.json.xz"])
def test_compressed_and_csv_files_are_read(tmp_path, name):
    text = 'so "zi", ka\nro\n'
    content = {".txt": text, ".csv": 'n,text\n1,"{}"\n'.format(text.replace('"', '""'))}
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    path = tmp_path / name
    plain = content.get(path.suffixes[0], json.dumps({"n": 1, "text": text}) + "\n")
    path.write_bytes(pack.get(path.suffix, bytes)(plain.encode()))
    assert texts_of(path, tmp_path / "work", whole_files=True) == {"train": [text]}


def test_documents_are_selected_cut_divided_and_kept_as_text(tmp_path, articles):
    texts = [json.loads(line)["text"] for line in articles.read_text().splitlines()]
    out = tmp_path / "out"
    limits = ("--min_document_characters", 40, "--max_documents", 10, "--max_document_characters", 3)
    windows = make(articles, out, "--test_fraction", 0.2, *limits, "--by_document", block_size=2, stride=2)
    assert {split: rows["rows"] for split, rows in summary(out).items()} == {"train": 8, "test": 2}
    chosen = [text for text in texts if len(text) >= 40][:10]
    kept = [text.splitlines(keepends=True)[0] for text in chosen]  # character 3 is the first line's last
    assert sorted(raw_texts(out, "train") + raw_texts(out, "test")) == sorted(kept)
    assert summary(out)["train"]["characters_left_out"] == sum(map(len, texts)) - sum(map(len, kept))
    assert len(windows["train"]) == 8
    command(MODULE, *flags(articles, tmp_path / "all", "--validation_fraction", 0.2, "--max_document_characters", 6))
    assert sorted(raw_texts(tmp_path / "all", "train") + raw_texts(tmp_path / "all", "validation")) == sorted(texts)


@pytest.mark.unit
def test_splits_by_document_are_the_same_on_every_platform():
    def divided(texts, seed=1):
        splits = split_documents(datasets.Dataset.from_dict({"text": texts}), {"test": 0.1, "validation": 0.2}, seed)
        return {split: rows["text"][:] for split, rows in splits.items()}

    texts = [f"document {number}" for number in range(20)]
    found = divided(texts)
    assert found["test"] == ["document 1", "document 4"]
    assert found["validation"] == ["document 9", "document 12", "document 13", "document 15"]
    assert found["train"] == [text for text in texts if text not in found["test"] + found["validation"]]
    assert {split: part[::-1] for split, part in divided(texts[::-1]).items()} == found
    assert divided(texts, seed=2)["test"] != found["test"]
    equal = divided([f"document {number % 5}" for number in range(50)])
    assert sum(map(len, equal.values())) == 50 and sum(len(set(part)) for part in equal.values()) == 5


def test_the_same_run_again_does_nothing_and_others_need_overwrite(tmp_path, text):
    out = tmp_path / "out"
    make(text, out)
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    (tmp_path / "moved").mkdir()
    moved = text.rename(tmp_path / "moved" / text.name)
    make(moved, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == made
    line = Command(tmp_path / "log", MODULE, *flags(moved, out, stride=2)).refused()
    assert str(out) in line and "stride" in line
    assert len(make(moved, out, "--overwrite", stride=2)["train"]) == 8
    moved.write_text("so " * 20)
    assert "words.txt" in refused_here(MODULE, *flags(moved, out, stride=2))


def test_a_killed_run_is_finished_by_the_next_one(tmp_path, text):
    text.write_text("".join(WORDS) * 20_000)
    out = tmp_path / "out"
    killed = Command(tmp_path / "log", MODULE, *flags(text, out))
    while killed.process.is_alive() and not list((out / ".work").glob("tmp*")):  # Dataset.map's
        killed.process.join(0.02)
    assert str(out) in refused_here(MODULE, *flags(text, out))  # still at work
    killed.kill()
    killed.wait()
    assert read_made(out) is None
    make(text, out)
    assert read_made(out) and not (out / ".work").exists()


def test_paths_are_printed_on_a_terminal_without_unicode(tmp_path, text):
    make(text, tmp_path / "wörter")
    done = run("-m", MODULE, *flags(text, tmp_path / "wörter"), PYTHONIOENCODING="ascii")
    assert f"{tmp_path / 'w?rter'}" in done.stdout
    done = run("-m", MODULE, *flags(tmp_path / "ö", tmp_path / "out"), check=False, PYTHONIOENCODING="ascii")
    assert done.returncode == 2 and f"{tmp_path / '?'}" in done.stderr


REFUSED = {
    "stride": (["--stride", 9], "--stride 9"),
    "block": (["--block_size", 1], "--block_size 1"),
    "BOS": (["--window_bos"], "--window_bos"),
    "column": (["--text_column", "body"], "--text_column body"),
    "one document": (["--test_fraction", 0.5], "--test_fraction"),
    "none so long": (["--min_document_characters", 999], "train"),
    "short text": (["--block_size", 64], "--block_size"),
}


@pytest.mark.unit
@pytest.mark.parametrize("case", REFUSED)
def test_flags_that_make_no_windows_are_refused(tmp_path, text, case):
    more, named = REFUSED[case]
    assert named in refused_here(MODULE, *flags(text, tmp_path / "out", *more))
    make(text, tmp_path / "out")  # other settings may follow


@pytest.mark.unit
@pytest.mark.parametrize("name", ["missing.txt", "someone/nothing", "words.docx", "not.parquet", "broken.jsonl"])
def test_a_source_that_cannot_be_loaded_is_refused(tmp_path, name):
    source = name if "/" in name else tmp_path / name
    if name.startswith(("words", "not", "broken")):
        source.write_bytes(b'{"text": "so"}\n{"text": \n')
    assert str(source) in refused_here(MODULE, *flags(source, tmp_path / "out"))


def test_a_split_that_is_there_is_not_made_again(tmp_path, articles):
    source = tmp_path / "source"
    source.mkdir()
    for split in ("train", "test"):
        (source / f"{split}.jsonl").write_text(articles.read_text())
    windows = make(source, tmp_path / "out", "--validation_fraction", 0.2, "--test_fraction", 0.2)
    given = [json.loads(line)["text"] for line in articles.read_text().splitlines()]
    assert raw_texts(tmp_path / "out", "test") == given and len(raw_texts(tmp_path / "out", "train")) < len(given)
    assert set(windows) == {"train", "validation", "test"}
