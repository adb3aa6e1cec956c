"""A user's documents: read without losing a character, learnt in several contexts, asked about; and the two scripts."""

import json
import os
import sys
from pathlib import Path

import pytest
from harness import calls, command, flags, refused_here, shell, stub_python
from invented_documents import KINDS, invent
from tiny_models import save_models

from downstream.ask import Question, begins_with, rates
from utils.documents import in_contexts, paragraphs, passages, read_documents, titled

MODULE = "utils.documents"


def texts(folder, name):
    return [json.loads(line)["text"] for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.unit
@pytest.mark.parametrize("text", ["", "a", "a\n\nb\n\n\nc\n", "\n\na", "a\n \nb\n\n", "one.\ntwo\n\n\n\n three"])
def test_paragraphs_are_the_whole_text(text):
    assert "".join(paragraphs(text)) == text
    assert "".join(passages(text * 300)) == text * 300


@pytest.mark.unit
def test_a_file_with_titles_is_several_documents(tmp_path):
    wiki = "\n = Robert = \n\n He ran .\n\n = = Career = = \n\n Long .\n = Du Fu = \n A poet .\n"
    markdown = "# One\n\ntext\n## Part\nmore\n# Two\nend"
    code = "# One\n```sh\n# a comment\nls\n```\n# Two\nend"
    for text, count in ((wiki, 2), (markdown, 2), ("no titles\n", 1), (code, 2)):
        assert len(titled(text)) == count and "".join(titled(text)) == text
    folder = tmp_path / "notes"
    (folder / "deeper").mkdir(parents=True)
    (folder / "a.md").write_text(markdown)
    (folder / "deeper" / "b.txt").write_text(wiki)
    (folder / "c.jsonl").write_text('{"text": "row one"}\n{"text": "row two"}\n')
    (folder / "image.png").write_bytes(b"\x89PNG")
    found = read_documents([str(folder)])
    assert len(found) == 6 and "".join(found) == markdown + "row one" + "row two" + wiki


@pytest.mark.unit
@pytest.mark.parametrize("end", ["\n\n", "\n"])
def test_one_document_is_divided_at_paragraphs_or_lines(tmp_path, end):
    text = "".join(f"Paragraph {number}. {'word ' * 60}{end}" for number in range(20))
    (tmp_path / "manual.txt").write_text(text)
    found = read_documents([str(tmp_path / "manual.txt")])
    assert len(found) > 4 and "".join(found) == text


@pytest.mark.unit
def test_what_is_learnt_begins_at_paragraphs_and_sentences_and_after_other_documents():
    documents = ['Title A\n\nOne is 1. Two is "2." Three is 3.\n\nFour.\n', "Title B\n\nFive.\n"]
    pieces = in_contexts(documents, ["documents", "paragraphs", "sentences"], 0)
    assert pieces[:2] == documents
    assert (
        "One is 1.\n" in pieces
        and 'Two is "2."\n' in pieces
        and "Three is 3.\n" in pieces
        and 'One is 1. Two is "2." Three is 3.\n' in pieces
    )
    assert len(pieces) == len(set(pieces))
    after = in_contexts(documents, ["documents", "after"], 0)
    assert len(after) == 4 and set(after[2:]) == {f"{a.rstrip()}\n\n{b}" for a, b in (documents, documents[::-1])}


def test_the_command_holds_documents_out_and_adds_pairs(tmp_path):
    base, _ = save_models(tmp_path)
    documents, questions, pairs = invent(20)
    (tmp_path / "docs").mkdir()
    for number, text in enumerate(documents):
        (tmp_path / "docs" / f"{number}.txt").write_text(text)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    given = ("--texts", tmp_path / "docs", "--tokenizer_path", base, "--output_dir", tmp_path / "out")
    command(MODULE, *given, "--also", tmp_path / "pairs.jsonl", "--held_out", 0.1)
    held_out = texts(tmp_path / "out", "validation") + texts(tmp_path / "out", "test")
    assert sorted(held_out + texts(tmp_path / "out", "documents")) == sorted(documents) and len(held_out) == 4
    train = texts(tmp_path / "out", "train")
    assert [len(text) for text in train] == sorted(map(len, train), reverse=True)
    assert f"Question: {pairs[0]['question']}\nAnswer: {pairs[0]['answer']}\n" in train
    assert not any(text.split("\n")[0] in piece for text in held_out for piece in train if "Question" not in piece)
    assert {question["kind"] for question in questions} == set(KINDS)
    (tmp_path / "bad.jsonl").write_text('{"title": "x"}\n')
    assert "bad.jsonl" in refused_here(MODULE, *given, "--also", tmp_path / "bad.jsonl")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    assert "bytes.txt" in refused_here(MODULE, "--texts", tmp_path / "bytes.txt", *given[2:])


@pytest.mark.unit
def test_an_answer_is_right_if_the_text_begins_with_it_as_whole_words():
    assert begins_with(" Red cedar, of course", "red cedar") and begins_with("42.", "42")
    assert not begins_with("423 grams", "42") and not begins_with("a red cedar", "red cedar")
    asked = [Question("one", "a", "red"), Question("one", "b", "blue"), Question("two", "c", "green")]
    found = rates(asked, ["red", "red", "grey"])
    assert found == {
        "one": {"cases": 2, "right": 0.5, "another": 0.5},
        "two": {"cases": 1, "right": 0.0, "another": 0.0},
    }


def test_questions_are_asked_of_base_and_memory(tmp_path, capsys):
    base, memory = save_models(tmp_path)
    rows = [
        {"question": "Who wrote it?", "answer": "James"},
        {"prompt": "The moon is", "answer": "there", "kind": "own"},
        {"prompt": "Craters on it, in per cent:", "answer": 0, "kind": "own"},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = ("--model_name_or_path", base, "--knn_generator_path", memory, "--output_dir", tmp_path / "out")
    command("downstream.ask", *model, "--questions", tmp_path / "q.jsonl")
    found = json.loads((tmp_path / "out" / "results.json").read_text())["answered"]
    assert set(found) == {"base", "base + memory"} and set(found["base"]) == {"question", "own"}
    (tmp_path / "bad.jsonl").write_text('{"question": "Who?"}\n')
    assert "row 0" in refused_here("downstream.ask", *model, "--questions", tmp_path / "bad.jsonl")


@pytest.mark.unit
def test_ask_uses_all_memories_that_are_there(tmp_path):
    program = stub_python(tmp_path / "stub")
    program.write_text(program.read_text() + 'case "$1" in -c) exec python3 "$@" ;; esac\n')
    for name, lmbda in (("a", 0.9), ("b", "adaptive")):
        (tmp_path / "memories" / name).mkdir(parents=True)
        results = {"model": "base", "memory": str(tmp_path / name), "lambda": lmbda}
        (tmp_path / "memories" / name / "results.json").write_text(json.dumps(results))
    asked = {}
    for which in ("", "a", "none"):
        environment = {"OUTPUT": tmp_path / "memories", "PYTHON": program, "VIRTUAL_ENV": "x", "ONLY": which}
        done = shell("bash", "scripts/ask.sh", "Who?", "--max_new_tokens", "5", **environment)
        asked[which] = (done.returncode, [call for call in calls(program) if "demo.generation_example" in call][-1:])
    assert "adaptive" in asked[""][1][0] and flags(asked[""][1][0])["--model_name_or_path"] == "base"
    assert str(tmp_path / "a") in asked[""][1][0] and str(tmp_path / "b") in asked[""][1][0]
    assert "0.9" in asked["a"][1][0] and str(tmp_path / "b") not in asked["a"][1][0]
    assert asked["none"][0] == 2


@pytest.mark.slow
def test_remember_makes_a_memory_of_all_documents_and_asks_it(tmp_path):
    base, _ = save_models(tmp_path)
    other = tmp_path / "out" / "embedded" / "other"
    other.mkdir(parents=True)
    for split in ("train", "test"):
        lines = (json.dumps({"text": f"Line {n} of the web, a place for {split}.\n"}) for n in range(100))
        (other / f"{split}.jsonl").write_text("\n".join(lines))
    documents, _, pairs = invent(20)
    (tmp_path / "docs").mkdir()
    for number, text in enumerate(documents):
        (tmp_path / "docs" / f"{number}.txt").write_text(text)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    words = ("bash", "scripts/remember.sh", "notes", tmp_path / "docs", "--also", tmp_path / "pairs.jsonl")
    small = {"BLOCK_SIZE": 64, "LAYERS": 1, "EPOCHS": 1, "K": 8, "OUTPUT": tmp_path / "out", "MODEL": base}
    active = {"VIRTUAL_ENV": sys.prefix, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = shell(*map(str, words), **small, **active)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out" / "notes"
    results = json.loads((folder / "results.json").read_text())
    assert set(results["perplexity"]) == {"validation", "test", "other"}
    best = min(("one_lambda", "adaptive"), key=results["perplexity"]["validation"].get)
    assert results["lambda"] == ("adaptive" if best == "adaptive" else results["one_lambda"])
    evaluated = json.loads((folder / "measured" / "joint_test" / "results.json").read_text())
    assert results["perplexity"]["test"]["adaptive"] == evaluated["adaptive"]["perplexity"]
    assert sorted(texts(folder / "all" / "text", "documents")) == sorted(documents)
    asked = shell("bash", "scripts/ask.sh", "The moon", "--max_new_tokens", "3", OUTPUT=tmp_path / "out", **active)
    assert asked.returncode == 0 and "The moon" in asked.stdout, asked.stderr
