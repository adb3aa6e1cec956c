"""Questions about a memory's documents, answered by the base and by base + memory; by kNN-LM and RAG on request.

    python -m downstream.ask --model_name_or_path BASE --knn_generator_path MEMORY --questions questions.jsonl \\
        --documents documents.jsonl --dstore_path DATASTORE --index_path INDEX --knn_results RESULTS

A row of the table has an answer, and a prompt that is continued as it is, or a question; it may have a kind, for which
results are given separately. An answer is right if the greedy continuation begins with it. A wrong one may be the answer of
another question, which is confidently wrong: that is counted too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.cli import command, flag, parse, required, say
from utils.documents import QUESTION, chat
from utils.errors import InputError
from utils.files import read_json
from utils.loading import BaseArguments
from utils.results import Lambda, check_lambda

PASSAGE_TOKENS = 512  # of a document, for RAG
MORE_TOKENS = 3  # generated beyond the longest answer
CHAT = "chat"  # questions of this kind are put into the chat template


@dataclass
class Question:
    """A prompt and the answer that should follow it; `kind` is how it asks."""

    kind: str
    prompt: str
    answer: str


@dataclass(kw_only=True)
class AskArguments(BaseArguments):
    """Models and questions."""

    knn_generator_path: list[str] = required("folder of the memory, or of several")
    questions: str = required("table (.jsonl, .csv, .parquet) with prompt or question, answer, and perhaps kind")
    lmbda: Lambda = flag(0.25, "weight of the memory: 0 to 1, or adaptive (the memory's gate)")
    memory_temp: float = flag(1.0, "temperature of the memory's softmax")
    documents: str | None = flag(
        None, "RAG too: table of the documents (column text); the best one by BM25 is put in front"
    )
    dstore_path: str | None = flag(None, "kNN-LM too: datastore of the documents")
    index_path: str | None = flag(None, "kNN-LM: its index")
    knn_results: str | None = flag(
        None, "kNN-LM: results.json of train_base --knn, for lambda by distance and temperature"
    )
    batch_size: int = flag(64, "prompts per forward pass")
    output_dir: str = flag("tmp", "folder for results.json")


def read_questions(path: str, tokenizer: Any, documents: Sequence[str] | None = None) -> list[Question]:
    """The questions of a table; with `documents` only those whose column document one of these begins with.

    Raises InputError where a column or a value is missing.
    """
    from downstream.data import read_table

    found = []
    for number, row in enumerate(read_table(path)):
        kind, answer = row.get("kind") or "question", row.get("answer")
        if answer in (None, "") or not (row.get("prompt") or row.get("question")):
            raise InputError(f"--questions {path}: row {number}: expected an answer, and a prompt or a question")
        if not (prompt := row.get("prompt")):
            question = row["question"]
            prompt = chat(tokenizer, question) if kind == CHAT else QUESTION.format(question=question)
        if documents is None or any(text.startswith(row.get("document") or "") for text in documents):
            found.append(Question(kind, prompt, str(answer).strip()))
    return found


def new_tokens(questions: Sequence[Question], tokenizer: Any) -> int:
    """How many tokens are generated, so that every answer fits."""
    return max(len(tokenizer(f" {each.answer}")["input_ids"]) for each in questions) + MORE_TOKENS


def begins_with(text: str, answer: str) -> bool:
    """Whether `text` begins with `answer` as whole words, in upper or lower case."""
    text, answer = text.lstrip().casefold(), answer.casefold()
    return text.startswith(answer) and not text[len(answer) : len(answer) + 1].isalnum()


def rates(questions: Sequence[Question], texts: Sequence[str]) -> dict[str, dict[str, float]]:
    """For each kind: cases, and the shares that are right and that are the answer of another question."""
    answers = {each.answer for each in questions}
    counts: dict[str, list[int]] = {}
    for question, text in zip(questions, texts, strict=True):
        count = counts.setdefault(question.kind, [0, 0, 0])
        count[0] += 1
        if begins_with(text, question.answer):
            count[1] += 1
        elif any(begins_with(text, answer) for answer in answers):
            count[2] += 1
    return {kind: {"cases": n, "right": right / n, "another": other / n} for kind, (n, right, other) in counts.items()}


def rates_table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A Markdown table: a row for each name in `found`, a column for each kind, and all answers of other questions."""
    kinds = list(next(iter(found.values())))
    lines = ["| | " + " | ".join(kinds) + " | another question's answer |", "| --- " * (len(kinds) + 2) + "|"]
    for name, by_kind in found.items():
        cases = sum(each["cases"] for each in by_kind.values())
        another = sum(each["another"] * each["cases"] for each in by_kind.values()) / cases
        lines.append(
            f"| {name} | " + " | ".join(f"{by_kind[kind]['right']:.1%}" for kind in kinds) + f" | {another:.1%} |"
        )
    return "\n".join(lines)


def answers(
    evaluator: Any, questions: Sequence[Question], before: Callable[[str], list[int]] | None = None
) -> list[str]:
    """What a `downstream.scoring.Evaluator`'s model answers. `before`: question → token ids to put in front of the prompt."""
    count = new_tokens(questions, evaluator.tokenizer)
    groups: dict[tuple[int, ...], list[int]] = {}  # questions with the same ids in front: these are read once
    for number, each in enumerate(questions):
        groups.setdefault(tuple(before(each.prompt)) if before else (), []).append(number)
    found = {}
    for start, numbers in groups.items():
        prompts = [np.array([*start, *evaluator.encode(questions[number].prompt)], np.int32) for number in numbers]
        found |= zip(numbers, evaluator.continuations(prompts, count, "\n"), strict=True)
    return [found[number] for number in range(len(questions))]


def knnlm_of(arguments: AskArguments) -> Any:
    """The kNN-LM with the lambdas by distance and the temperature that were chosen on validation text."""
    from knn_utils.adaptive import Buckets
    from knn_utils.knn_lm import KNNLM

    chosen, buckets = read_json(arguments.knn_results), Buckets.read(arguments.knn_results)
    options = {"k": chosen["k"], "probe": chosen["probe"], "lmbda": buckets, "knn_temp": buckets.knn_temp}
    return KNNLM(arguments.index_path, arguments.dstore_path, layer_position=arguments.layer_position, **options)


def main() -> None:
    (arguments,) = parse(AskArguments, description=__doc__.split("\n")[0])
    check_lambda("--lmbda", arguments.lmbda, len(arguments.knn_generator_path))
    near = arguments.dstore_path, arguments.index_path, arguments.knn_results
    if any(near) and not all(near):
        raise InputError("--dstore_path, --index_path and --knn_results: expected all three or none")
    from downstream.data import read_table
    from downstream.retrieval import bm25_search, passages
    from downstream.scoring import Evaluator
    from utils.loading import quiet_libraries
    from utils.memories import open_joint
    from utils.results import write_results

    started = time.time()
    quiet_libraries()
    tokenizer = arguments.open_tokenizer(required=True)
    questions = read_questions(arguments.questions, tokenizer)
    base = arguments.open_base(tokenizer)
    joint = open_joint(arguments, arguments.knn_generator_path, base, arguments.lmbda, arguments.memory_temp)
    alone, together = (Evaluator(model, tokenizer, arguments.batch_size) for model in (base, joint))
    found = {
        "base": rates(questions, answers(alone, questions)),
        "base + memory": rates(questions, answers(together, questions)),
    }
    if arguments.dstore_path:
        with knnlm_of(arguments).on(base):
            found["kNN-LM"] = rates(questions, answers(alone, questions))
    if arguments.documents:
        texts = read_table(arguments.documents)["text"][:]
        before = passages(bm25_search(texts)[0], texts, tokenizer, 1, PASSAGE_TOKENS)
        found["RAG"] = rates(questions, answers(alone, questions, before))
    say(rates_table(found))
    write_results(arguments.output_dir, {"answered": found, "lmbda": arguments.lmbda}, started)


if __name__ == "__main__":
    command(main)()
