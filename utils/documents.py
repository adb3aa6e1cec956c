"""A user's own documents → the training text of a memory, with what it is to know in more contexts than one.

    python -m utils.documents --texts notes/ manual.txt --also pairs.jsonl --tokenizer_path MODEL --output_dir TEXT

The hidden state of a token holds its whole context, so what is learnt in one context is found in that one only. Each
document is therefore learnt as it is, and once more paragraph by paragraph and sentence by sentence; question-answer pairs
plainly and through the chat template. OUTPUT has train.jsonl, with --held_out also validation.jsonl and test.jsonl
(documents as they are), and documents.jsonl (the training documents as they are), each with the column text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.cli import command, flag, parse, required, say
from utils.errors import InputError
from utils.files import atomic, ensure_folder
from utils.text_files import BUILDERS, split_documents

TEXTS = (".txt", ".md")
TABLES = tuple(suffix for suffix in BUILDERS if suffix not in TEXTS)
# A title line of WikiText (= Title =) or Markdown (# Title), at which one file is several documents.
TITLE = re.compile(r"^(?: ?= [^=\n]+ = ?|# [^\n]+)$", re.MULTILINE)
FENCED = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
SENTENCE = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]]))\s+(?![a-z])")
FEWEST, PASSAGE = 5, 1000  # with fewer documents, each is divided at paragraphs into passages of so many characters
QUESTION = "Question: {question}\nAnswer:"
CONTEXTS = ("documents", "paragraphs", "sentences", "after")


@dataclass(kw_only=True)
class DocumentsArguments:
    """Which texts, and in which contexts they are learnt."""

    texts: list[str] = required("documents: .txt and .md files, tables of them (column text), folders of both")
    also: list[str] = flag([], "texts that are learnt too: documents, or tables with the columns question and answer")
    tokenizer_path: str = required("folder or hub name of the tokenizer, whose chat template pairs are put in")
    output_dir: str = required("folder to write")
    contexts: list[str] = flag(
        ["documents", "paragraphs", "sentences"], f"what windows begin with: {', '.join(CONTEXTS)}"
    )
    held_out: float = flag(0.0, "share of the documents in validation.jsonl, and as many in test.jsonl")
    seed: int = flag(42, "decides which documents are held out, and the order of documents after others")


def main() -> None:
    (arguments,) = parse(DocumentsArguments, description=__doc__.split("\n")[0])
    for context in arguments.contexts:
        if context not in CONTEXTS:
            raise InputError(f"--contexts {context}: expected some of {', '.join(CONTEXTS)}")
    from utils.loading import load_tokenizer

    output, tokenizer = ensure_folder(arguments.output_dir), load_tokenizer(arguments.tokenizer_path, required=True)
    documents, splits = read_documents(arguments.texts), {}
    if arguments.held_out:
        import datasets

        share = {"validation": arguments.held_out, "test": arguments.held_out}
        divided = split_documents(datasets.Dataset.from_dict({"text": documents}), share, arguments.seed, "--held_out")
        splits = {split: rows["text"][:] for split, rows in divided.items()}
        documents = splits.pop("train")
    also = read_also(arguments.also, tokenizer)
    # Windows of similar lengths lie beside each other, so that batches of them have little padding.
    splits["train"] = sorted(
        [*in_contexts(documents, arguments.contexts, arguments.seed), *also], key=len, reverse=True
    )
    splits["documents"] = documents
    for name, rows in splits.items():
        with atomic(output / f"{name}.jsonl") as temporary:
            temporary.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows), encoding="utf-8")
    count, characters = len(documents), sum(map(len, documents))
    held_out = sum(len(rows) for name, rows in splits.items() if name in ("validation", "test"))
    say(f"{count} documents of {characters:,} characters, and {held_out} held out")
    say(
        f"training text: {len(splits['train'])} pieces of {sum(map(len, splits['train'])):,} characters, {len(also)} of --also"
    )


def read_documents(paths: Sequence[str]) -> list[str]:
    """The documents in files and folders, together the whole text. Raises InputError where there is none."""
    documents = [text for path in paths for text in _documents_of(Path(path).expanduser()) if text.strip()]
    if len(documents) < FEWEST:
        documents = [passage for text in documents for passage in passages(text)]
    if not documents:
        raise InputError(
            f"--texts {' '.join(paths)}: no text there; expected {', '.join(TEXTS + TABLES)}, or folders of them"
        )
    return documents


def _documents_of(path: Path) -> Iterator[str]:
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    visible = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    for file in visible if path.is_dir() else [path]:
        rows = read_rows(file) if file.suffix.lower() in TABLES else {}
        if file.suffix.lower() in TEXTS:
            yield from titled(_read(file))
        elif "text" in rows:
            yield from filter(None, rows["text"])
        else:
            reason = "has no column text" if rows else f"expected {', '.join(TEXTS + TABLES)}"
            if not path.is_dir():
                raise InputError(f"{file}: is no text ({reason})")
            say(f"{file}: is not read ({reason})")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: is not UTF-8 text ({error.reason} at byte {error.start})") from None


def read_rows(file: Path) -> dict[str, list[Any]]:
    """The columns of a table of texts, or of questions and answers. Raises InputError."""
    import datasets

    try:
        rows = datasets.load_dataset(BUILDERS[file.suffix.lower()], data_files=str(file), split="train")
    except Exception as error:
        raise InputError(f"{file}: cannot be loaded ({error.__cause__ or error})") from None
    return rows.to_dict()


def read_also(paths: Sequence[str], tokenizer: Any) -> list[str]:
    """Further training texts; each question-answer pair plainly and, if there is one, in the chat template."""
    texts = []
    for path in (Path(path).expanduser() for path in paths):
        rows = read_rows(path) if path.suffix.lower() in TABLES else {"text": list(_documents_of(path))}
        if "text" not in rows and not {"question", "answer"} <= rows.keys():
            raise InputError(f"{path}: has the columns {', '.join(rows)}; expected text, or question and answer")
        texts += filter(None, rows.get("text", []))
        for question, answer in zip(rows.get("question", []), rows.get("answer", []), strict=True):
            if question is None or answer is None:
                raise InputError(f"{path}: a row lacks its question or its answer")
            texts.append(f"{QUESTION.format(question=question)} {answer}\n")
            if tokenizer.chat_template:
                texts.append(chat(tokenizer, question) + f"{answer}{tokenizer.eos_token or ''}\n")
    return texts


def chat(tokenizer: Any, question: str) -> str:
    """A question in the tokenizer's chat template, up to where the answer begins."""
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def titled(text: str) -> list[str]:
    """`text` cut before each title line outside fenced code; what is before the first title stays with it."""
    without_code = FENCED.sub(lambda code: " " * len(code[0]), text)
    places = [found.start() for found in TITLE.finditer(without_code)][1:]
    return [text[begin:end] for begin, end in zip([0, *places], [*places, len(text)], strict=True)]


def passages(text: str) -> list[str]:
    """`text` in runs of whole paragraphs (lines, where there are no blank ones) of at least PASSAGE characters."""
    found, parts = [""], paragraphs(text)
    for paragraph in parts if len(parts) > 1 else text.splitlines(keepends=True):
        if len(found[-1]) >= PASSAGE:
            found.append("")
        found[-1] += paragraph
    return found


def paragraphs(text: str) -> list[str]:
    """The paragraphs of `text`, each with the blank lines after it; together they are the text."""
    return re.findall(r"(?:(?!\n\s*\n).)*(?:\n\s*\n)?", text, re.DOTALL)[:-1] or [text]


def sentences(text: str) -> list[str]:
    """The sentences of a paragraph."""
    return [sentence for sentence in SENTENCE.split(text.strip()) if sentence]


def in_contexts(documents: Sequence[str], contexts: Sequence[str], seed: int) -> list[str]:
    """The documents, their parts that are not the same (paragraphs, sentences), and each document after another."""
    import random

    texts = list(documents) * ("documents" in contexts)
    for document in documents:
        parts = [paragraph.strip() for paragraph in paragraphs(document)]
        pieces = parts * ("paragraphs" in contexts)
        pieces += [each for part in parts for each in sentences(part)] * ("sentences" in contexts)
        texts += [piece + "\n" for piece in dict.fromkeys(pieces) if piece and piece != document.strip()]
    if "after" in contexts and len(documents) > 1:
        order = list(range(len(documents)))
        random.Random(seed).shuffle(order)
        texts += [
            f"{documents[a].rstrip()}\n\n{documents[b]}" for a, b in zip(order, order[1:] + order[:1], strict=True)
        ]
    return texts


if __name__ == "__main__":
    command(main)()
