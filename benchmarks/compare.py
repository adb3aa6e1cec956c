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

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from downstream.recall import ANSWER_WORDS
from utils.cli import flag, parse
from utils.errors import InputError, check_positive, command

METHODS = ["base", "knnlm", "rag_bm25", "rag_dense", "lora", "memory"]
# In the order in which they are measured.
PARTS = ("speed", "facts", "held_out", "web")


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


POSITIVE = ("max_eval_tokens", "speed_prompts", "new_tokens", "rag_chunk", "rag_query", "choose_windows")
POSITIVE = (*POSITIVE, "passage_tokens", "lora_rank", "lora_learning_rate", "max_cases", "answer_words")
# What a method's figures depend on beside the quickstart; a change of one measures the method again.
SIZES = ("answer_words", "max_cases", "max_eval_tokens", "speed_prompts", "new_tokens")
OWN = {
    "rag": ("rag_chunk", "rag_query", "rag_passages", "choose_windows", "passage_tokens"),
    "lora": ("lora_rank", "lora_learning_rate", "lora_epochs"),
}


def main() -> None:
    """Entry point of `python -m benchmarks.compare`."""
    (arguments,) = parse(CompareArguments, description=__doc__.split("\n")[0])
    output = Path(arguments.output_dir)
    if arguments.page:
        from benchmarks.compare_report import write_page

        write_page(Path(arguments.page), output)
        return
    check(arguments)
    run(arguments, output)


def check(arguments: CompareArguments) -> None:
    """Refuse what cannot be measured. Raises InputError."""
    for name in arguments.methods:
        if name not in METHODS:
            raise InputError(f"--methods {name}: no such method; expected some of {', '.join(METHODS)}")
    if not arguments.methods:
        raise InputError(f"--methods: expected some of {', '.join(METHODS)}")
    for name in POSITIVE:
        check_positive(f"--{name}", getattr(arguments, name))
    if arguments.lora_epochs is not None:
        check_positive("--lora_epochs", arguments.lora_epochs)
    if not arguments.rag_passages or min(arguments.rag_passages) < 1:
        raise InputError("--rag_passages: expected numbers of 1 or more")


def run(arguments: CompareArguments, output: Path) -> None:
    """Measure what is missing, method by method, and write the report."""
    from benchmarks.compare_methods import TITLES, Bench, Work
    from benchmarks.compare_report import report
    from utils.files import FolderLock, ensure_folder, read_json, write_json
    from utils.loading import quiet_libraries, say

    quiet_libraries()
    work = Work.open(Path(arguments.work), arguments.model_name_or_path)
    folder = ensure_folder(output / "methods")
    with FolderLock(output):
        bench = Bench(work, arguments, output)
        texts = Texts(bench)
        for name in [name for name in METHODS if name in arguments.methods]:
            path = folder / f"{name}.json"
            identity = identity_of(name, arguments, texts)
            record = read_json(path) if path.exists() else {}
            if record.get("identity") != identity:
                if record:
                    say(f"{TITLES[name]}: the settings have changed, it is measured again")
                record = {"name": name, "title": TITLES[name], "identity": identity, "seconds": {}}
            if all(part in record for part in PARTS):
                say(f"{TITLES[name]}: measured before")
                continue
            measure(bench, texts, name, record, lambda path=path, record=record: write_json(path, record))
        report(output, METHODS, texts.description(), common_identity(arguments, texts))


def common_identity(arguments: CompareArguments, texts: Texts) -> dict[str, Any]:
    """What the figures of all methods depend on: the quickstart, the web text, the sizes."""
    sizes = {name: getattr(arguments, name) for name in SIZES}
    return {**texts.bench.work.identity(), "web": texts.web_checksum, **sizes}


def identity_of(name: str, arguments: CompareArguments, texts: Texts) -> dict[str, Any]:
    """What the figures of one method depend on."""
    own = {flag_name: getattr(arguments, flag_name) for flag_name in OWN.get(name.split("_")[0], ())}
    if name == "rag_dense":
        own["encoder"] = arguments.encoder
    return {**common_identity(arguments, texts), **own}


def measure(bench: Any, texts: Texts, name: str, record: dict[str, Any], save: Any) -> None:
    """Measure the parts that `record` lacks, saving after each."""
    from benchmarks.compare_scores import Kept, measure_speed, score_facts, score_windows, speed_prompts
    from utils.loading import say

    flags, tokenizer = bench.flags, bench.tokenizer
    clock = Stopwatch(record, save)
    method = clock.run("prepare", lambda _: bench.build(name, record, save))
    record |= {"bytes": method.bytes, "settings": method.settings}
    prompts = speed_prompts(texts.cases, texts.held_out, tokenizer, flags.speed_prompts)
    sizes = (flags.rag_chunk, flags.rag_query)
    parts = {
        "speed": lambda _: measure_speed(method, prompts, tokenizer, flags.new_tokens),
        "facts": lambda kept: score_facts(method, texts.cases, tokenizer, kept),
        "held_out": lambda kept: score_windows(method, texts.held_out, tokenizer, *sizes, kept),
        "web": lambda kept: score_windows(method, texts.web, tokenizer, *sizes, kept),
    }
    for part in PARTS:
        if part not in record:
            rows = record.setdefault("partial", {}).setdefault(part, [])
            record[part] = clock.run(part, lambda tick, part=part, rows=rows: parts[part](Kept(rows, tick)))
            del record["partial"][part]
            save()
            say(f"{record['title']}: {part}, {told(record[part])} ({record['seconds'][part]} s)")


class Stopwatch:
    """Seconds of each part of `record`, added up over interrupted runs."""

    def __init__(self, record: dict[str, Any], save: Any) -> None:
        self.seconds, self.save = record["seconds"], save

    def run(self, part: str, make: Any) -> Any:
        """What `make` returns, given a function that notes the time and saves."""
        before, started = self.seconds.get(part, 0), time.perf_counter()

        def note() -> None:
            self.seconds[part] = round(before + time.perf_counter() - started, 1)

        def tick() -> None:
            note()
            self.save()

        found = make(tick)
        note()
        return found


def told(found: dict[str, Any]) -> str:
    """The figures of a part in a line."""
    names = ("perplexity", "accuracy", "first_token_seconds", "tokens_per_second")
    return ", ".join(f"{name} {found[name]:.4g}" for name in names if found.get(name) is not None)


class Texts:
    """What every method is asked: held-out windows, web windows, facts. Each is read when it is first needed."""

    def __init__(self, bench: Any) -> None:
        import hashlib

        self.bench = bench
        own = bench.flags.web_text
        self.web_path = Path(own) if own else bench.work.folder / "embedded" / "web.txt"
        if not self.web_path.is_file():
            raise InputError(
                f"--web_text {self.web_path}: no such file; name a text that nothing was trained on "
                "(python -m utils.embedded_default writes one, web.txt)"
            )
        self.web_checksum = hashlib.sha256(self.web_path.read_bytes()).hexdigest()[:16]
        self._kept: dict[str, Any] = {}

    def _once(self, name: str, make: Any) -> Any:
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    @property
    def cases(self) -> list[Any]:
        from downstream.recall import choose_cases

        flags = self.bench.flags
        return self._once("cases", lambda: choose_cases(self.bench.articles, flags.max_cases, flags.answer_words))

    @property
    def held_out(self) -> Any:
        from utils.loading import load_windows

        return self._once("held_out", lambda: self.some(load_windows(self.bench.work.windows, "test")))

    @property
    def web(self) -> Any:
        return self._once("web", lambda: self.some(self._web_windows()))

    def some(self, windows: Any) -> Any:
        """Windows evenly taken, of --max_eval_tokens tokens at most, one window at least."""
        most = max(self.bench.flags.max_eval_tokens // len(windows[0]["input_ids"]), 1)
        step = max(len(windows) / most, 1.0)
        return windows.select([int(number * step) for number in range(min(most, len(windows)))])

    def _web_windows(self) -> Any:
        """The web text in windows as long as the held-out ones, without overlap; the rest of it falls away."""
        import datasets
        import numpy as np

        from utils.windows import token_ids

        length = len(self.held_out[0]["input_ids"])
        try:
            lines = [line for line in self.web_path.read_text(encoding="utf-8").split("\n") if line.strip()]
        except UnicodeDecodeError:
            raise InputError(f"--web_text {self.web_path}: is not UTF-8 text") from None
        ids = token_ids(lines, self.bench.tokenizer)
        if len(ids) < length:
            raise InputError(
                f"--web_text {self.web_path}: has {len(ids)} tokens, a window takes {length}; give more text"
            )
        rows = ids[: len(ids) // length * length].reshape(-1, length).astype(np.int32)  # (windows, time)
        return datasets.Dataset.from_dict({"input_ids": rows, "labels": rows}).with_format("numpy")

    def description(self) -> dict[str, Any]:
        """What was asked, for the report."""
        from downstream import recall

        words = self.bench.flags.answer_words
        rule = recall.RULE.format(words=words, shortest=recall.SHORTEST, longest=recall.LONGEST)
        work = self.bench.work
        data = work.training["data"]
        embedded = Path(work.model) == work.folder / "embedded" / "model"
        return {
            "model": "SmolLM2-135M-Instruct" if embedded else Path(work.model).name,
            "train_tokens": data.get("rows"),
            "dtype": work.dtype,
            "rule": rule,
        }


if __name__ == "__main__":
    command(main)()
