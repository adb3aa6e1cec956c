"""A memory against the alternatives, on one model and text: a table, a plot of quality against speed, results.json.

    python -m benchmarks.compare                                what the quickstart left in results/quickstart/work
    python -m benchmarks.compare --methods base memory          some of the methods
    python -m benchmarks.compare --page docs/compare.md         the page's table from the last run's results.json

Methods: base, kNN-LM with one lambda and with one that follows the distance, RAG with BM25 and with a sentence encoder,
LoRA at its best on validation and after all epochs, MLP memory with one lambda and with its gate's, and a memory of the
LoRA-tuned base. Each has perplexity on held-out articles, facts of the trained articles completed (the rule of
`downstream.recall`) and by their first token, perplexity and next-token accuracy on web text that none was trained on,
time to first token, tokens a second, and bytes on disk. What was measured before is kept; the same command again
continues. Needs the extra `compare`.
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
from utils.errors import InputError, check_positive
from utils.files import ensure_folder, read_json, write_json
from utils.legacy import FolderLock

# As the table calls them; methods and their figures, in the order in which they are measured.
METHODS = {
    **{"base": "base", "knnlm": "kNN-LM", "knnlm_adaptive": "kNN-LM, adaptive lambda"},
    **{"rag_bm25": "RAG, BM25", "rag_dense": "RAG, dense", "lora": "LoRA, best on validation"},
    **{"lora_last": "LoRA, all epochs", "memory": "MLP memory", "memory_adaptive": "MLP memory, adaptive lambda"},
    **{"lora_memory": "LoRA + MLP memory"},
}
PARTS = ("speed", "facts", "held_out", "web")
# What all figures depend on beside the quickstart, and those of one method; a change of one measures it again.
SIZES = ("answer_words", "max_cases", "max_eval_tokens", "speed_prompts", "new_tokens")
RAG = ("rag_chunk", "rag_query", "rag_passages", "choose_windows", "passage_tokens")
LORA = ("lora_rank", "lora_learning_rate", "lora_epochs")
OWN = {"rag_bm25": RAG, "rag_dense": (*RAG, "encoder"), "lora": LORA, "lora_last": LORA, "lora_memory": LORA}
FIGURES = 2  # raised when a part gets another figure: what was measured without it is measured again


@dataclass
class CompareArguments:
    """Where from, which methods, how much."""

    work: str = flag("results/quickstart/work", "work folder of a finished quickstart")
    output_dir: str = flag(
        "results/compare", "folder of results.json, compare.md, compare.png and of each method's files"
    )
    methods: list[str] = flag([*METHODS], "which to measure; the report holds every method measured so far")
    model_name_or_path: str | None = flag(None, "the base model; default: the quickstart's")
    web_text: str | None = flag(None, "text that nothing was trained on; default: the quickstart's embedded/web.txt")
    answer_words: int = flag(recall.ANSWER_WORDS, "words that answer a definition, as in downstream.recall")
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
        for name, value in vars(self).items():
            if isinstance(value, (int, float)):
                check_positive(f"--{name}", value)


def main() -> None:
    """Entry point of `python -m benchmarks.compare`."""
    (arguments,) = parse(CompareArguments, description=__doc__.split("\n")[0])
    output = Path(arguments.output_dir)
    if arguments.page:
        page = Path(arguments.page)
        put_in_page(page, lambda: markdown(read_json(output / "results.json")))
        shutil.copyfile(output / "compare.png", page.with_suffix(".png"))
        return
    arguments.check()
    run(arguments, output)


def run(arguments: CompareArguments, output: Path) -> None:
    """Measure what is missing, method by method, and write the report."""
    from benchmarks.compare_methods import Quickstart
    from utils.loading import quiet_libraries

    quiet_libraries()
    work = Quickstart(arguments)
    folder = ensure_folder(output / "methods")
    sizes = {"figures": FIGURES} | {name: getattr(arguments, name) for name in SIZES}
    with FolderLock(output):
        for name in METHODS:
            if name in arguments.methods and is_there(work, name):
                own = {flag: getattr(arguments, flag) for flag in OWN.get(name, ())}
                measure(work, name, work.identity_of(name) | sizes | own, folder / f"{name}.json")
        records = [read_json(path) for name in METHODS if (path := folder / f"{name}.json").exists()]
        asked = {name: (work.identity_of(name) | sizes).items() for name in METHODS}
        report(work, [record for record in records if asked[record["name"]] <= record["identity"].items()], output)


def is_there(work: Any, name: str) -> bool:
    """Whether the quickstart made what a method needs. Raises InputError where it did not and the method was named."""
    if name not in work.adaptive or work.adaptive[name]:
        return True
    how = "python -m training.gate" if name == "memory_adaptive" else "train_base --knn --lmbda adaptive"
    told = f"{work.folder} has no adaptive lambda for it ({how} makes one)"
    if work.flags.methods != [*METHODS]:
        raise InputError(f"--methods {name}: {told}")
    say(f"{METHODS[name]}: left out, {told}")
    return False


def measure(work: Any, name: str, identity: dict[str, Any], path: Path) -> None:
    """Measure what a method's record in the file `path` lacks, saving it after each part."""
    from benchmarks.compare_methods import build
    from benchmarks.compare_scores import measure_speed, score_facts, score_windows, speed_prompts

    record, title = read_json(path) if path.exists() else {}, METHODS[name]
    if record.get("identity") != identity:
        if record:
            say(f"{title}: the settings have changed, it is measured again")
        record = {"name": name, "title": title, "identity": identity, "seconds": {}}
    missing = [part for part in PARTS if part not in record]
    if not missing:
        say(f"{title}: measured before")
        return
    flags, tokenizer, method = work.flags, work.tokenizer, build(work, name)
    record |= {"bytes": method.bytes, "note": method.note, "settings": method.settings}
    for part in missing:
        started = time.perf_counter()
        if part == "speed":
            prompts = speed_prompts(work.cases, work.held_out, tokenizer, flags.speed_prompts)
            found = measure_speed(method, prompts, tokenizer, flags.new_tokens)
        elif part == "facts":
            found = score_facts(method, work.cases, tokenizer)
        else:
            found = score_windows(method, getattr(work, part), tokenizer, flags.rag_chunk, flags.rag_query)
        record[part], record["seconds"][part] = found, round(time.perf_counter() - started, 1)
        write_json(path, record)
        names = ("perplexity", "accuracy", "first_token_seconds", "tokens_per_second")
        told = [f"{name} {found[name]:.4g}" for name in names if found.get(name) is not None]
        say(f"{title}: {part}, {', '.join(told)} ({record['seconds'][part]} s)")


def report(work: Any, records: list[dict[str, Any]], output: Path) -> None:
    """Write results.json, compare.md and compare.png from the methods that are measured to their end."""
    methods = {
        record["name"]: {name: value for name, value in record.items() if name != "identity"}
        for record in records
        if all(part in record for part in PARTS)
    }
    add_differences(methods)
    rule = recall.RULE.format(words=work.flags.answer_words, shortest=recall.SHORTEST, longest=recall.LONGEST)
    description = {"model": work.name, "train_tokens": work.training["data"].get("rows"), "dtype": work.dtype}
    results = {"description": description | {"rule": rule}, "machine": machine("cpu"), "methods": methods}
    text = markdown(results)
    write_json(output / "results.json", results)
    (output / "compare.md").write_text(text + "\n", encoding="utf-8")
    plot(methods, output / "compare.png")
    say(f"\n{text}\n\n{output / 'results.json'}, {output / 'compare.md'}, {output / 'compare.png'}")


if __name__ == "__main__":
    command(main)()
