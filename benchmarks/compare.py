"""A memory compared with the alternatives, on one model and text: a table, a plot of quality by speed, results.json.

    python -m benchmarks.compare                                what the quickstart left in results/quickstart/work
    python -m benchmarks.compare --methods base memory          some of the methods
    python -m benchmarks.compare --page docs/compare.md         write the table of the last run's results.json into a page
    python -m benchmarks.compare --work results/memories/NAME/measured --questions questions.jsonl
                                                                a memory of scripts/remember.sh, and answers to questions

Methods: the base, kNN-LM with one lambda and with lambda by distance, RAG with BM25 and with a sentence encoder, LoRA at
its best on validation and after all epochs, MLP memory with one lambda and with lambda by token, and a memory of the
LoRA-tuned base. Figures: perplexity on held-out articles; beginnings of training articles continued (the rule of
`downstream.recall`) and their first tokens; perplexity and next-token accuracy on web text that none was trained on; time
to first token, tokens per second, and bytes on disk. Methods that were measured before are skipped. Needs the extra
`compare`.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.compare_table import add_differences, markdown, plot
from benchmarks.page import machine, put_in_page
from downstream import recall
from utils.cli import command, flag, parse, say
from utils.errors import InputError
from utils.files import ensure_folder, read_json, write_json

# The methods in the order in which they are measured, with their names in the table.
METHODS = {
    "base": "base",
    "knnlm": "kNN-LM",
    "knnlm_adaptive": "kNN-LM, adaptive lambda",
    "rag_bm25": "RAG, BM25",
    "rag_dense": "RAG, dense",
    "lora": "LoRA, best on validation",
    "lora_last": "LoRA, all epochs",
    "memory": "MLP memory",
    "memory_adaptive": "MLP memory, adaptive lambda",
    "lora_memory": "LoRA + MLP memory",
}


@dataclass
class CompareArguments:
    """Which methods, on what, and how much."""

    work: str = flag("results/quickstart/work", "work folder of a finished quickstart")
    output_dir: str = flag("results/compare", "folder of results.json, compare.md, compare.png and the methods' files")
    methods: list[str] = flag([*METHODS], "methods to measure; the report contains all that are measured")
    web_text: str | None = flag(None, "text that nothing was trained on; default: the quickstart's embedded/web.txt")
    answer_words: int = flag(recall.ANSWER_WORDS, "words that answer a definition, as in downstream.recall")
    max_cases: int = flag(400, "maximum number of beginnings, spread evenly over the training articles")
    questions: str | None = flag(
        None,
        "questions that are asked too, as in downstream.ask; with a column document only of "
        "training documents that begin with it",
    )
    max_eval_tokens: int = flag(20480, "maximum number of tokens of held-out articles, and of web text")
    speed_prompts: int = flag(8, "prompts for the measurement of speed")
    new_tokens: int = flag(32, "tokens generated in it after the first")
    rag_chunk: int = flag(128, "RAG: tokens of a window that are scored with the same passages")
    rag_query: int = flag(64, "RAG: tokens before a chunk that passages are searched with")
    rag_passages: int = flag(1, "RAG: number of passages")
    passage_tokens: int = flag(256, "RAG: maximum number of tokens of a passage")
    encoder: str | None = flag(None, "RAG: folder of a sentence encoder; default: all-MiniLM-L6-v2 from PyPI")
    lora_epochs: int | None = flag(None, "LoRA: epochs; default: those of the memory")
    lora_rank: int = flag(16, "LoRA: rank; alpha is twice the rank")
    lora_learning_rate: float = flag(5e-4, "LoRA: peak learning rate")
    speed_again: bool = flag(False, "time the methods that were measured before once more, and measure nothing else")
    page: str | None = flag(None, "write the table of results.json into this page, the plot beside it; measure nothing")


def main() -> None:
    (arguments,) = parse(CompareArguments, description=__doc__.split("\n")[0])
    output = Path(arguments.output_dir)
    if arguments.page:
        page = Path(arguments.page)
        put_in_page(page, lambda: markdown(read_json(output / "results.json")))
        shutil.copyfile(output / "compare.png", page.with_suffix(".png"))
        return
    for name in arguments.methods:
        if name not in METHODS:
            raise InputError(f"--methods {name}: no such method; expected some of {', '.join(METHODS)}")
    run(arguments, ensure_folder(output))


def run(arguments: CompareArguments, output: Path) -> None:
    """Measure the methods that were not measured before with these settings, and write the report."""
    from benchmarks.compare_methods import Quickstart, build
    from utils.loading import quiet_libraries

    quiet_libraries()
    work, records = Quickstart(arguments), {}
    settings = {
        name: value
        for name, value in vars(arguments).items()
        if name not in ("output_dir", "methods", "speed_again", "page")
    }
    settings |= work.ids()
    for name, title in METHODS.items():
        path = ensure_folder(output / "methods") / f"{name}.json"
        record = read_json(path) if path.exists() else {}
        if arguments.speed_again:
            if not record or name not in arguments.methods:
                continue
            record["speed"] = speed(work, build(work, name))
            write_json(path, record)
        elif record.get("compared") != settings:
            if name not in arguments.methods:
                continue
            record = {"name": name, "title": title, "compared": settings, **measure(work, name)}
            write_json(path, record)
        elif name in arguments.methods:
            say(f"{title}: measured before")
        records[name] = record
    report(work, records, output)


def measure(work: Any, name: str) -> dict[str, Any]:
    """All figures of a method."""
    from benchmarks.compare_methods import build
    from benchmarks.compare_scores import score_facts, score_questions, score_windows

    flags, tokenizer, method, started = work.flags, work.tokenizer, build(work, name), time.perf_counter()
    found = {
        "speed": speed(work, method),
        "facts": score_facts(method, work.cases, tokenizer),
        "answered": score_questions(method, work.questions, tokenizer) if flags.questions else None,
        "held_out": score_windows(method, work.held_out, tokenizer, flags.rag_chunk, flags.rag_query),
        "web": score_windows(method, work.web, tokenizer, flags.rag_chunk, flags.rag_query),
        "bytes": method.bytes,
        "note": method.note,
        "settings": method.settings,
        "seconds": round(time.perf_counter() - started, 1),
    }
    say(f"{METHODS[name]}: perplexity {found['held_out']['perplexity']:.4g}, {found['seconds']} s")
    return found


def speed(work: Any, method: Any) -> dict[str, Any]:
    """Time to first token and tokens per second of a method."""
    from benchmarks.compare_scores import measure_speed, speed_prompts

    prompts = speed_prompts(work.cases, work.flags.speed_prompts)
    return measure_speed(method, prompts, work.tokenizer, work.flags.new_tokens)


def report(work: Any, methods: dict[str, Any], output: Path) -> None:
    """Write results.json, compare.md and compare.png."""
    add_differences(methods)
    rule = recall.RULE.format(words=work.flags.answer_words, shortest=recall.SHORTEST, longest=recall.LONGEST)
    description = {"model": work.name, "train_tokens": work.train_tokens, "dtype": work.dtype, "rule": rule}
    results = {"description": description, "machine": machine("cpu"), "methods": methods}
    text = markdown(results)
    write_json(output / "results.json", results)
    (output / "compare.md").write_text(text + "\n", encoding="utf-8")
    plot(methods, output / "compare.png")
    say(f"\n{text}\n\n{output / 'results.json'}, {output / 'compare.md'}, {output / 'compare.png'}")


if __name__ == "__main__":
    command(main)()
