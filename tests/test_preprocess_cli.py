"""The windows command: every kind of text goes in, one folder comes out whole, bad input gets one line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import ROOT, TOKENIZER, command, run

SCRIPT = "utils/preprocess_dataset.py"
WORDS = [f"{word}\n" for word in re.split(" ", "so zi ka ni ko ro di ge su ke ci to gi hi pi po mo nelo")]


def flags(source, output, *more, block_size=8, stride=4):
    given = {"--dataset_name": source, "--output_dir": output, "--tokenizer_path": TOKENIZER}
    return [*(part for pair in given.items() for part in pair), "--block_size", block_size, "--stride", stride, *more]


def make(source, output, *more, **sizes):
    command("utils.preprocess_dataset", *flags(source, output, *more, **sizes))
    return datasets.load_from_disk(str(output))


@pytest.fixture
def refuse(capsys, tmp_path):
    """Run the command in this process on bad input; returns its one line and checks that nothing is left behind."""

    def refuse(source, *more, output=tmp_path / "out", leaves=(), **sizes):
        with pytest.raises(SystemExit) as exited:
            command("utils.preprocess_dataset", *flags(source, output, *more, **sizes))
        lines = capsys.readouterr().err.splitlines()
        assert exited.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        assert not list(tmp_path.rglob(".tmp-*"))
        assert Path(output).exists() == bool(leaves)
        return lines[0]

    return refuse


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("".join(WORDS))
    return path


def first_tokens(dataset, count=4):
    return dataset[0]["input_ids"][:count]


def test_the_command_writes_windows_summary_and_record_and_nothing_else(tmp_path, text):
    home, out = tmp_path / "home", tmp_path / "deep" / "out"
    home.mkdir()
    done = run(SCRIPT, *flags(text, out, "--num_proc", 1), HOME=str(home), HF_HOME=str(home / "hf"))
    told = "1 documents, 18 rows, 18 tokens of text, 2 tokens left out, 16 tokens, 4 windows, 15 datastore rows"
    assert done.stdout == f"train: {told}\n" and done.stderr == ""
    assert list(home.rglob("*")) == [] and [path.name for path in out.parent.iterdir()] == ["out"]
    windows = datasets.load_from_disk(str(out))
    assert list(windows) == ["train"]
    assert windows["train"]["dstore_range"][:] == [[0, 3], [3, 7], [7, 11], [11, 15]]
    assert json.loads((out / "dstore_summary.json").read_text()) == {"train": {"dstore_size": 15, "dataset_cnt_len": 4}}
    record = json.loads((out / "preprocess.json").read_text())
    assert record["settings"]["block_size"] == 8 and record["settings"]["stride"] == 4
    assert record["settings"]["tokenizer_length"] == 276 and record["tokenizer"] == str(TOKENIZER)
    amounts = {"tokens_of_text": 18, "tokens_left_out": 2, "tokens": 16}
    assert record["dataset_name"] == str(text) and record["splits"]["train"].items() >= amounts.items()


def test_grouped_rows_keep_every_token_and_say_so(tmp_path, text, capsys):
    windows = make(text, tmp_path / "out", "--group_rows")["train"]
    told = "18 tokens of text, 0 tokens left out, 18 tokens, 5 windows, 17 datastore rows"
    assert told in capsys.readouterr().out
    assert [label for window in windows["labels"] for label in window if label != -100] == list(range(2, 20))


def test_files_named_by_split_give_their_splits_whatever_their_kind(tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    (source / "train.txt").write_text("".join(WORDS))
    with open(source / "valid.jsonl", "w") as file:
        file.writelines(json.dumps({"id": number, "body": word}) + "\n" for number, word in enumerate(WORDS[::-1]))
    pq.write_table(pa.table({"body": WORDS[1:], "id": list(range(17))}), source / "test.parquet")
    for name in ("README.md", "chapter1.txt", ".hidden"):
        (source / name).write_text("nothing")
    windows = make(source, tmp_path / "out", "--text_column", "body")
    assert f"{source}: not used: README.md, chapter1.txt\n" in capsys.readouterr().out
    assert list(windows) == ["train", "validation", "test"]
    assert [first_tokens(part) for part in windows.values()] == [[2, 3, 4, 5], [19, 18, 17, 16], [3, 4, 5, 6]]


def test_folders_that_datasets_saved_keep_their_splits_and_their_rows(tmp_path):
    splits = {"test": WORDS[2:], "train": WORDS, "extra": WORDS[3:]}
    saved = datasets.DatasetDict(
        {name: datasets.Dataset.from_dict({"text": part, "n": part}) for name, part in splits.items()}
    )
    saved.save_to_disk(str(tmp_path / "several"))
    saved["train"].save_to_disk(str(tmp_path / "single"))
    several = make(tmp_path / "several", tmp_path / "out1")
    assert {name: first_tokens(part, 1) for name, part in several.items()} == {"test": [4], "train": [2], "extra": [5]}
    assert list(several) == list(splits)
    single = make(tmp_path / "single", tmp_path / "out2")
    assert single["train"][:] == several["train"][:]


def test_a_configuration_may_be_a_subfolder_of_sharded_parquet_files(tmp_path):
    folder = tmp_path / "wikitext" / "wikitext-103-raw-v1"
    folder.mkdir(parents=True)
    rows = {"train-00000-of-00002": WORDS[:9], "train-00001-of-00002": WORDS[9:], "test-00000-of-00001": ["", *WORDS]}
    for name, part in rows.items():
        pq.write_table(pa.table({"text": part}), folder / f"{name}.parquet")
    windows = make(tmp_path / "wikitext", tmp_path / "out", "--dataset_config_name", folder.name)
    assert windows["train"]["input_ids"][:] == windows["test"]["input_ids"][:]
    record = json.loads((tmp_path / "out" / "preprocess.json").read_text())
    assert record["splits"]["test"]["rows"] == 19


def test_text_files_in_split_folders_keep_their_newlines(tmp_path):
    for split in ("train", "test"):
        (tmp_path / "source" / split).mkdir(parents=True)
        (tmp_path / "source" / split / "a.txt").write_text("".join(WORDS))
    from utils.text_files import open_source

    rows = open_source(str(tmp_path / "source"), work=tmp_path)
    assert list(rows["test"]["text"]) == list(rows["train"]["text"]) == WORDS


def test_files_of_another_kind_than_most_are_named(tmp_path, capsys):
    (tmp_path / "source").mkdir()
    for name, content in (("a.txt", "so"), ("b.jsonl", '{"text": "so"}\n' * 9)):
        (tmp_path / "source" / name).write_text(content)
    assert len(make(tmp_path / "source", tmp_path / "out")["train"]) == 2
    assert "not used: a.txt\n" in capsys.readouterr().out


@pytest.mark.unit
def test_text_from_windows_gives_the_documents_of_its_plain_form(tmp_path):
    from utils.text_files import iterate_documents, open_source

    lines = ["= a =\n", "so\rzi\n", "\n", "= b =\n", '{"text": "ka"}\n', "end"]
    found = []
    for name, end in (("plain", "\n"), ("windows", "\r\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.txt").write_bytes("".join(lines).replace("\n", end).encode())
        rows = open_source(str(tmp_path / name), document_separator="\n\n", work=tmp_path / name)["train"]
        found.append(list(iterate_documents(rows)))
    assert found[0] == found[1] == ["= a =\nso\rzi\n", '= b =\n{"text": "ka"}\nend\n']


TEXTS = ["so zi, ka\n", '"ko"\n\nro\n', "NA", "1999", "di " * 70_000]
CONTENTS = {".txt": "".join(TEXTS), ".jsonl": "".join(json.dumps({"n": 1, "text": text}) + "\n" for text in TEXTS)}
CONTENTS[".csv"] = "n,text\n" + "".join('1,"{}"\n'.format(text.replace('"', '""')) for text in TEXTS)
PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.unit
@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("name", ["test.txt.gz", "test.jsonl.bz2", "test.csv", "test.CSV.xz"])
def test_compressed_and_csv_files_give_the_documents_of_their_plain_form(tmp_path, name, kind):
    from utils.text_files import iterate_documents, open_source

    suffix = f".{name.lower().split('.')[1]}"
    plain = tmp_path / f"plain{suffix.replace('.csv', '.jsonl')}"
    plain.write_text(CONTENTS[plain.suffix])
    (tmp_path / "folder").mkdir()
    given = tmp_path / "folder" / name
    given.write_bytes(PACK.get(given.suffix, bytes)(CONTENTS[suffix].encode()))
    found = open_source(str(given if kind == "file" else given.parent), work=tmp_path)
    assert list(found) == ["train" if kind == "file" else "test"]
    expected = open_source(str(plain), work=given.parent)["train"]
    assert [*map(list, map(iterate_documents, found.values()))] == [list(iterate_documents(expected))]


def test_a_folder_of_articles_is_divided_by_article_and_its_text_kept(tmp_path):
    source = tmp_path / "articles"
    source.mkdir()
    for number in range(20):
        (source / f"{number:02}.txt").write_text(f"{WORDS[number % 18]}" * (number + 8))
    windows = make(source, tmp_path / "out", "--validation_fraction", 0.2, "--test_fraction", 0.1, "--seed", 5)
    assert list(windows) == ["train", "validation", "test"]
    raw = {split: (tmp_path / "out" / "raw" / f"{split}.jsonl").read_text().splitlines() for split in windows}
    assert {split: len(lines) for split, lines in raw.items()} == {"train": 14, "validation": 4, "test": 2}
    written = sorted(json.loads(line)["text"] for lines in raw.values() for line in lines)
    assert written == sorted(path.read_text() for path in source.iterdir())


def test_separated_documents_are_divided_and_short_ones_left_out(tmp_path):
    text = tmp_path / "wiki.txt"
    redirect = '<doc id="0" title="x">\nx\n\n\n</doc>\n'
    text.write_text("".join(f'{redirect}<doc id="{n}">\n{"so zi ka " * 5}\n{n}\n</doc>\n' for n in range(10)))
    separator = r"\n?</doc>\n*|<doc [^>]*>\n"
    more = ("--document_separator", separator, "--test_fraction", "0.3", "--min_document_characters", "20")
    make(text, tmp_path / "out", *more)
    record = json.loads((tmp_path / "out" / "preprocess.json").read_text())
    assert {split: count["documents"] for split, count in record["splits"].items()} == {"train": 7, "test": 3}
    assert "doc" not in (tmp_path / "out" / "raw" / "train.jsonl").read_text()
    make(text, tmp_path / "few", *more, "--max_documents", "4")
    record = json.loads((tmp_path / "few" / "preprocess.json").read_text())
    assert {split: count["documents"] for split, count in record["splits"].items()} == {"train": 3, "test": 1}


def test_the_same_run_again_does_nothing_and_other_settings_need_overwrite(tmp_path, text, capsys, refuse):
    out = tmp_path / "out"
    make(text, out)
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    moved = text.rename(tmp_path / "moved.txt")
    make(moved, out)
    assert capsys.readouterr().out == f"{out}: these windows are there already; --overwrite makes them again\n"
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == made

    assert "stride 4 there, 2 now" in refuse(moved, leaves=out, stride=2)
    assert "group_rows False there, True now" in refuse(moved, "--group_rows", leaves=out)
    assert len(make(moved, out, "--overwrite", stride=2)["train"]) == 8
    moved.write_text("so " * 20)
    assert "text_sha256" in refuse(moved, leaves=out, stride=2)


def test_a_killed_run_leaves_no_output_and_the_next_one_finishes(tmp_path, text):
    text.write_text("".join(WORDS) * 60_000)
    out = tmp_path / "out"
    arguments = [sys.executable, SCRIPT, *map(str, flags(text, out, "--num_proc", 2))]
    killed = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parts = tmp_path / ".tmp-work-out" / "windows-train"
    while killed.poll() is None and not (parts.is_dir() and any(parts.iterdir())):
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not out.exists() and parts.exists()
    text.write_text("".join(WORDS))
    run(*arguments[1:])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "words.txt"]


def test_two_runs_on_one_output_do_not_mix(tmp_path, text, capsys):
    import fcntl

    work = tmp_path / ".tmp-work-out"
    work.mkdir()
    with open(work / ".lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit):
            make(text, tmp_path / "out")
    assert "another run is writing here" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.unit
@pytest.mark.parametrize("name", ["missing.txt", "folder/"])
def test_a_missing_source_is_named(refuse, tmp_path, name):
    for source in (f"{tmp_path}/{name}", "someone/nothing"):
        assert f"{source}: no such file or folder here" in refuse(source)


@pytest.mark.unit
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_an_empty_file_is_refused(refuse, tmp_path, name):
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    else:
        path.write_text("\n \n" if name.endswith("txt") else "")
    line = refuse(path)
    assert str(path) in line and ("no data" if name.endswith("parquet") else "is empty") in line


BAD_FILES = {
    "latin.txt": (b"so\n\xe9\n", "line 2 is not UTF-8"),
    "broken.jsonl": (b'{"text": "so"}\n{"text": \n', "line 2 is not a JSON object"),
    "list.jsonl": (b'["so"]\n', "line 1 is not a JSON object"),
    "number.jsonl": (b'{"text": "so"}\n\n{"text": 3}\n', "line 3: 'text' holds int, expected text"),
    "column.jsonl": (b'{"body": "so", "id": 1}\n', "--text_column text: "),
    "not.parquet": (b"PAR1 no", "cannot be loaded"),
    "words.docx": (b"so", "expected a file that ends in .txt"),
    "packed.parquet.gz": (b"so", "expected a file that ends in .txt"),
    "plain.txt.gz": (b"so", "cannot be unpacked"),
    "plain.csv.bz2": (b"so", "cannot be unpacked"),
    "plain.txt.xz": (b"so", "cannot be unpacked"),
    "cut.txt.gz": (gzip.compress(b"so zi ka" * 99)[:-9], "cannot be unpacked"),
    "column.csv": (b"body,id\nso,1\n", "--text_column text: "),
    "short.csv": (b"id,text\n1,so\n2\n", "line 3 has no 'text'"),
    "quote.csv": (b'id,text\n1,"so"zi\n', "line 2 is no CSV"),
}


@pytest.mark.unit
@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_not_what_its_name_says_is_refused(refuse, tmp_path, name):
    content, expected = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    line = refuse(tmp_path / name)
    assert expected in line and name in line


@pytest.mark.parametrize("name", ["a.parquet", "saved"])
def test_a_column_that_holds_no_text_is_refused(refuse, tmp_path, name):
    rows = pa.table({"body": WORDS, "n": range(18), "gap": [None, *WORDS[1:]]})
    if name == "saved":
        datasets.Dataset(rows).save_to_disk(str(tmp_path / name))
    else:
        pq.write_table(rows, tmp_path / name)
    assert "has no such column; it has body, n" in refuse(tmp_path / name)
    assert "holds int64 there" in refuse(tmp_path / name, "--text_column", "n")
    assert "rows without text" in refuse(tmp_path / name, "--text_column", "gap")


def test_text_shorter_than_one_window_names_the_split(refuse, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "train.txt").write_text("".join(WORDS))
    (tmp_path / "source" / "test.txt").write_text("so zi ka")
    line = refuse(tmp_path / "source")
    assert "split test has 3 tokens, less than one window of 8" in line


def test_an_output_that_cannot_be_written_is_refused(refuse, tmp_path, text):
    assert "is or lies under a file" in refuse(text, output=text / "out")
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").write_text("x")
    line = refuse(text, "--overwrite", output=other, leaves=other)
    assert "is not empty and holds no windows" in line and (other / "precious").exists()


BAD_FLAGS = {
    "stride": (["--stride", "9"], "--stride 9: expected a number from 1 to --block_size 8"),
    "block": (["--block_size", "1"], "--block_size 1: expected 2 or more"),
    "padding": (["--padding_index", "0"], "--padding_index 0: is a token id"),
    "padding too low": (["--padding_index", str(-(1 << 40))], "expected -2147483648 or more"),
    "block too long": (["--block_size", str(1 << 40)], "up to 16777216"),
    "no BOS": (["--window_bos"], "has no BOS token"),
    "fraction": (["--test_fraction", "1.5"], "--test_fraction 1.5: expected a number from 0 to 1"),
    "fractions": (["--test_fraction", "0.5", "--validation_fraction", "0.5"], "expected a sum below 1"),
    "processes": (["--num_proc", "0"], "--num_proc 0: expected 1 or more"),
    "documents": (["--max_documents", "0"], "--max_documents 0: expected 1 or more"),
    "separator": (["--document_separator", "("], "is not a regular expression"),
    "one document": (["--test_fraction", "0.5"], "1 documents are too few to divide"),
    "too long": (["--min_document_characters", "999"], "none of 1 documents is that long"),
    "tokenizer": (["--tokenizer_path", "no/such/tokenizer/here"], "no/such/tokenizer/here"),
}


@pytest.mark.unit
@pytest.mark.parametrize("case", BAD_FLAGS)
def test_a_bad_flag_is_refused_in_one_line(refuse, text, case):
    more, expected = BAD_FLAGS[case]
    assert expected in refuse(text, *more)


def test_splits_that_are_there_are_not_made_again(refuse, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for split in ("train", "test"):
        (source / f"{split}.jsonl").write_text("".join(json.dumps({"text": word * 4}) + "\n" for word in WORDS))
    assert "has a test split already" in refuse(source, "--test_fraction", "0.2")
    windows = make(source, tmp_path / "out", "--validation_fraction", "0.2")
    assert list(windows) == ["train", "validation", "test"]
    assert "in .txt files" in refuse(source, "--document_separator", "x", output=tmp_path / "new")
