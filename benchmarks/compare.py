"""A memory against the alternatives, on one model and text: a table, a plot of quality against speed, results.json.

    python -m benchmarks.compare                                what the quickstart left in results/quickstart/work
    python -m benchmarks.compare --methods base memory          some of the methods
    python -m benchmarks.compare --page docs/compare.md         the page's table from the last run's results.json

Methods: base, kNN-LM, RAG with BM25, RAG with a sentence encoder, LoRA, MLP memory. Each has perplexity on held-out
articles, facts of the trained articles completed (the rule of `downstream.recall`), perplexity and next-token accuracy
on web text that none was trained on, time to first token, tokens a second, and bytes on disk. What was measured
before is kept; the same command again continues. Needs the extra `compare`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from downstream.recall import ANSWER_WORDS
from utils.cli import command, flag, parse
from utils.errors import InputError, check_positive

METHODS = ["base", "knnlm", "rag_bm25", "rag_dense", "lora", "memory"]
# In the order in which they are measured.
PARTS = ("speed", "facts", "held_out", "web")
# What all figures depend on beside the quickstart, and those of one method; a change of one measures it again.
SIZES = ("answer_words", "max_cases", "max_eval_tokens", "speed_prompts", "new_tokens")
RAG = ("rag_chunk", "rag_query", "rag_passages", "choose_windows", "passage_tokens")
OWN = {"rag_bm25": RAG, "rag_dense": (*RAG, "encoder"), "lora": ("lora_rank", "lora_learning_rate", "lora_epochs")}


@dataclass
class CompareArguments:
    """Where from, which methods, how much."""

    work: str = flag("results/quickstart/work", "work folder of a finished quickstart")
    output_dir: str = flag(
        "results/compare", "folder of results.json, compare.md, compare.png and of each method's files"
    )
    methods: list[str] = flag(METHODS, "which to measure; the report holds every method measured so far")
    model_name_or_path: str | None = flag(None, "the base model; default: the quickstart's")
    web_text: str | None = flag(None, "text that nothing was trained on; default: the quickstart's embedded/web.txt")
    answer_words: int = flag(ANSWER_WORDS, "words that answer a definition, as in downstream.recall")
    max_cases: int = flag(400, "facts at most, taken evenly over the trained articles")
    max_eval_tokens: int = flag(20480, "tokens of held-out articles, and of web text, at most")
    speed_prompts: int = flag(8, "prompts (of facts) that speed is measured on")
    new_tokens: int = flag(32, "tokens generated for it after the first")
    rag_chunk: int = flag(128, "RAG: tokens of a window that are scored with the same articles before it")
    rag_query: int = flag(64, "RAG: tokens before a chunk that articles are looked for with")
    rag_passages: list[int] = flag([1, 2], "RAG: numbers of articles, of which validation windows choose")
    choose_windows: int = flag(4, "RAG: how many validation windows")
    passage_tokens: int = flag(256, "RAG: tokens of an article at most")
    encoder: str | None = flag(None, "RAG: folder of a sentence encoder; default: all-MiniLM-L6-v2 from PyPI")
    lora_rank: int = flag(16, "LoRA: rank; alpha is twice that")
    lora_learning_rate: float = flag(5e-4, "LoRA: learning rate at its highest")
    lora_epochs: int | None = flag(None, "LoRA: epochs; default: the memory's")
    page: str | None = flag(None, "write the table of results.json into this page, the plot beside it; measure nothing")

    def check(self) -> None:
        """Refuse what cannot be measured. Raises InputError."""
        for name in self.methods or [""]:
            if name not in METHODS:
                raise InputError(f"--methods {name}: no such method; expected some of {', '.join(METHODS)}")
        if not self.rag_passages or min(self.rag_passages) < 1:
            raise InputError("--rag_passages: expected numbers of 1 or more")
        for name in (*SIZES, *RAG, *OWN["lora"]):
            if name != "rag_passages" and getattr(self, name) is not None:
                check_positive(f"--{name}", getattr(self, name))


def main() -> None:
    """Entry point of `python -m benchmarks.compare`."""
    (arguments,) = parse(CompareArguments, description=__doc__.split("\n")[0])
    if arguments.page:
        from benchmarks.compare_table import write_page

        write_page(Path(arguments.page), Path(arguments.output_dir))
        return
    arguments.check()
    run(arguments, Path(arguments.output_dir))


def run(arguments: CompareArguments, output: Path) -> None:
    """Measure what is missing, method by method, and write the report."""
    from benchmarks.compare_methods import TITLES, Quickstart
    from utils.cli import say
    from utils.files import FolderLock, ensure_folder, read_json, write_json
    from utils.loading import quiet_libraries

    quiet_libraries()
    work = Quickstart(arguments)
    folder = ensure_folder(output / "methods")
    common = work.identity() | {name: getattr(arguments, name) for name in SIZES}
    with FolderLock(output):
        for name in [name for name in METHODS if name in arguments.methods]:
            path, title = folder / f"{name}.json", TITLES[name]
            identity = common | {own: getattr(arguments, own) for own in OWN.get(name, ())}
            record = read_json(path) if path.exists() else {}
            if record.get("identity") != identity:
                if record:
                    say(f"{title}: the settings have changed, it is measured again")
                record = {"name": name, "title": title, "identity": identity, "seconds": {}}
            if all(part in record for part in PARTS):
                say(f"{title}: measured before")
                continue
            measure(work, record, lambda path=path, record=record: write_json(path, record))
        paths = [folder / f"{name}.json" for name in METHODS]
        records = [read_json(path) for path in paths if path.exists()]
        report(work, [record for record in records if common.items() <= record["identity"].items()], output)


def measure(work: Any, record: dict[str, Any], save: Any) -> None:
    """Measure the parts that `record` lacks, saving after each."""
    from benchmarks.compare_scores import measure_speed, score_facts, score_windows, speed_prompts
    from utils.cli import say

    flags, tokenizer = work.flags, work.tokenizer
    method = work.build(record["name"], record)
    record |= {"bytes": method.bytes, "note": method.note, "settings": method.settings}
    save()
    prompts = speed_prompts(work.cases, work.held_out, tokenizer, flags.speed_prompts)
    sizes = (flags.rag_chunk, flags.rag_query)
    parts = {
        "speed": lambda: measure_speed(method, prompts, tokenizer, flags.new_tokens),
        "facts": lambda: score_facts(method, work.cases, tokenizer),
        "held_out": lambda: score_windows(method, work.held_out, tokenizer, *sizes),
        "web": lambda: score_windows(method, work.web, tokenizer, *sizes),
    }
    for part in PARTS:
        if part in record:
            continue
        started = time.perf_counter()
        record[part] = parts[part]()
        record["seconds"][part] = round(time.perf_counter() - started, 1)
        save()
        names = ("perplexity", "accuracy", "first_token_seconds", "tokens_per_second")
        told = [f"{name} {record[part][name]:.4g}" for name in names if record[part].get(name) is not None]
        say(f"{record['title']}: {part}, {', '.join(told)} ({record['seconds'][part]} s)")


def report(work: Any, records: list[dict[str, Any]], output: Path) -> None:
    """Write results.json, compare.md and compare.png from the methods that are measured to their end."""
    from benchmarks.compare_table import add_differences, markdown, plot
    from benchmarks.page import machine
    from downstream import recall
    from utils.cli import say
    from utils.files import atomic_file, write_json

    methods = {
        record["name"]: {name: value for name, value in record.items() if name != "identity"}
        for record in records
        if all(part in record for part in PARTS)
    }
    add_differences(methods)
    rule = recall.RULE.format(words=work.flags.answer_words, shortest=recall.SHORTEST, longest=recall.LONGEST)
    description = {
        "model": work.name,
        "train_tokens": work.training["data"].get("rows"),
        "dtype": work.dtype,
        "rule": rule,
    }
    results = {"description": description, "machine": machine("cpu"), "methods": methods}
    write_json(output / "results.json", results)
    text = markdown(results)
    with atomic_file(output / "compare.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    plot(methods, output / "compare.png")
    say(f"\n{text}\n\n{output / 'results.json'}, {output / 'compare.md'}, {output / 'compare.png'}")


if __name__ == "__main__":
    command(main)()
