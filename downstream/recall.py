"""What was remembered: completing facts of the articles a memory was trained on, base against base + memory.

    python -m downstream.recall --model_name_or_path BASE --knn_generator_path MEMORY \\
        --articles WINDOWS/raw/train.jsonl --choose_on results.json --output_dir OUTPUT

A case is a prompt from an article's beginning and the words that follow it there. It counts as right when greedy
decoding gives every token of the answer; how often it gives the first one is told beside.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.cli import command, flag, parse, required
from utils.errors import InputError, check_at_least
from utils.files import read_json
from utils.loading import WINDOWS_RECORD, BaseArguments
from utils.results import ADAPTIVE, Lambda, check_mixture, chosen

RULE = (
    "an article's title and its first sentence up to 'is a', 'was an', 'are the' and the like, answered by the next "
    "{words} word(s); and its text up to the first year (1000 to 2099), answered by that year; one line of the article "
    "at most, between {shortest} and {longest} characters of prompt"
)
DEFINITION = r"\b(?:is|was|are|were) (?:an?|the|one of the)(?= [\w\"'])"
YEAR = r"(\s(?:1\d|20)\d\d\b)"
ANSWER_WORDS = 2
SHORTEST, LONGEST = 8, 400


@dataclass
class Case:
    """A prompt, and the answer with the white space before it."""

    prompt: str
    answer: str


@dataclass(kw_only=True)
class RecallArguments(BaseArguments):
    """Which models, which articles."""

    knn_generator_path: str = required("the memory's folder")
    articles: str = required(".jsonl of the trained articles, one a row, in the column text")
    max_cases: int = flag(400, "cases at most, taken evenly over the articles")
    answer_words: int = flag(ANSWER_WORDS, "words that answer a definition")
    lmbda: Lambda = flag(0.25, "weight of the memory: 0 to 1, or adaptive (by the memory's gate)")
    knn_temp: float = flag(1.0, "temperature of the memory")
    choose_on: str | None = flag(None, "results.json of an evaluation whose best lambda and temperature are used")
    batch_size: int = flag(16, "prompts at a time")
    examples: int = flag(3, "prompts to continue with both, side by side")
    new_tokens: int = flag(24, "tokens of those continuations")
    output_dir: str = flag("tmp", "folder of results.json")

    def check(self) -> None:
        """Check the values by themselves; `choose_on` gives lambda and temperature. Raises InputError."""
        self.require_base()
        self.one_lambda: tuple[float, float] | None = None  # beside adaptive: the chosen number and its temperature
        if self.choose_on:
            (lmbda,), (knn_temp,) = chosen(self.choose_on, knn=False)
            if self.lmbda != ADAPTIVE:
                self.lmbda, self.knn_temp = lmbda, knn_temp
            elif lmbda != ADAPTIVE:
                self.one_lambda = lmbda, knn_temp
        check_mixture(self.lmbda, self.knn_temp)
        check_at_least(1, self, "max_cases", "answer_words", "batch_size", "new_tokens")
        check_at_least(0, self, "examples")


def cases_of(article: str, answer_words: int = ANSWER_WORDS) -> Iterator[Case]:
    """The cases that RULE finds in an article whose first line is its title."""
    title, _, body = article.strip().partition("\n")
    sentence = body.lstrip("\n").split("\n")[0]
    definition = re.search(rf"{DEFINITION}((?:\s+\S+){{{answer_words}}})", sentence)
    for found in filter(None, (definition, re.search(YEAR, sentence))):
        before = sentence[: found.start(1)]
        if SHORTEST <= len(before) <= LONGEST and before.strip():
            yield Case(f"{title}\n\n{before}", found[1])


def read_articles(path: str) -> list[str]:
    """The column `text` of a .jsonl file. Raises InputError naming the file and row."""
    from downstream.data import read_file

    if not Path(path).is_file():
        raise InputError(f"--articles {path}: no such file")
    texts = [row.get("text") for row in read_file(Path(path), "--articles")]
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"--articles {path}: row {number} has no text")
    return texts


def windows_have_bos(articles: str) -> bool:
    """Whether the articles are the text of windows that begin with a BOS token each: then the prompts do so, too."""
    record = Path(articles).resolve().parent.parent / WINDOWS_RECORD
    return record.is_file() and read_json(record)["settings"].get("window_bos") is not None


def choose_cases(articles: Sequence[str], most: int, answer_words: int = ANSWER_WORDS) -> list[Case]:
    """At most `most` cases, evenly spread over the articles."""
    cases = [case for article in articles for case in cases_of(article, answer_words)]
    step = max(1.0, len(cases) / most)
    return [cases[int(number * step)] for number in range(min(most, len(cases)))]


def main() -> None:
    (arguments,) = parse(RecallArguments, description=__doc__.split("\n")[0])
    arguments.check()
    from downstream.scoring import Evaluator
    from utils.cli import say
    from utils.loading import quiet_libraries
    from utils.memories import open_joint
    from utils.results import write_results

    started = time.time()
    quiet_libraries()
    rule = RULE.format(words=arguments.answer_words, shortest=SHORTEST, longest=LONGEST)
    say(f"rule: {rule}")
    cases = choose_cases(read_articles(arguments.articles), arguments.max_cases, arguments.answer_words)
    names = (f"recall_{name}" for name in ("base", "memory", "first_base", "first_memory"))
    results: dict[str, Any] = dict.fromkeys((*names, "standard_error_difference"))
    results |= {"rule": rule, "lmbda": arguments.lmbda, "knn_temp": arguments.knn_temp, "cases": len(cases)}
    results["examples"] = []
    if not cases:
        say(f"{arguments.articles}: no article fits the rule, nothing to complete")
        write_results(arguments.output_dir, results, started)
        return
    tokenizer = arguments.open_tokenizer(required=True)
    base = arguments.open_base(tokenizer)
    joint = open_joint(arguments, arguments.knn_generator_path, base, arguments.lmbda, arguments.knn_temp)
    results["knn_temp"] = joint.knn_temp  # a gate brings its own
    evaluator = Evaluator(joint, tokenizer, arguments.batch_size, windows_have_bos(arguments.articles))
    mixtures = {"base": (0.0, 1.0), "memory": (arguments.lmbda, arguments.knn_temp)}
    if arguments.one_lambda:
        mixtures["one_lambda"] = arguments.one_lambda
    right = recall(evaluator, cases, mixtures)
    for name, flags in right.items():
        share = sum(flags) / len(cases)
        error = math.sqrt(share * (1 - share) / len(cases))
        results |= {f"recall_{name}": share, f"standard_error_{name}": error}
        what = "by their first token" if name.startswith("first_") else "facts completed"
        say(f"{name}: {sum(flags)} of {len(cases)} {what} ({share:.1%}, standard error {error:.1%})")
    differences = [int(b) - int(a) for a, b in zip(right["base"], right["memory"], strict=True)]
    results["standard_error_difference"] = statistics.pstdev(differences) / math.sqrt(len(cases))
    results["examples"] = examples(evaluator, cases, right, arguments)
    for example in results["examples"]:
        say(f"\nprompt: {example['prompt']}\n  article:       {example['article']}")
        say(f"  base:          {example['base']}\n  base + memory: {example['memory']}")
    write_results(arguments.output_dir, results, started)


def recall(
    evaluator: Any, cases: Sequence[Case], mixtures: Mapping[str, tuple[float | str, float]]
) -> dict[str, list[bool]]:
    """For each case whether greedy decoding gives the whole answer, by the name of each mixture; and whether it gives its
    first token, by "first_" and the name.

    Teacher-forced: the answer is right when each of its tokens has the highest probability after the ones before.

    Args:
        evaluator: a `downstream.scoring.Evaluator` of the joint model.
        mixtures: lambda and temperature of each; the base is lambda 0.
    """
    from downstream.scoring import Encoded

    encoded = []
    for case in cases:
        prompt, whole = evaluator.encode(case.prompt), evaluator.encode(case.prompt + case.answer)
        # Where the answer's tokens begin; a tokenizer may merge over the boundary, then the case starts earlier.
        begin = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
        encoded.append(Encoded(whole, begin))
    right, first = {}, {}
    for name, (lmbda, knn_temp) in mixtures.items():
        # In this order: a gate brings its temperature.
        evaluator.model.knn_temp, evaluator.model.lmbda = knn_temp, lmbda
        found = evaluator.likelihoods(encoded)
        right[name], first[f"first_{name}"] = [each.greedy for each in found], [each.first for each in found]
    return right | first


def examples(
    evaluator: Any, cases: Sequence[Case], right: dict[str, list[bool]], arguments: RecallArguments
) -> list[dict[str, str]]:
    """Greedy continuations of a few prompts by both: of cases that the memory completes and the base does not, else of
    cases that the two disagree on, else of any."""
    pairs = list(zip(right["base"], right["memory"], strict=True))
    gained, differ = (
        [n for n, (base, memory) in enumerate(pairs) if memory - base in each] for each in ((1,), (1, -1))
    )
    pool = gained or differ or list(range(len(cases)))
    numbers = pool[:: max(1, len(pool) // max(arguments.examples, 1))][: arguments.examples]
    shown = [{"prompt": cases[number].prompt, "article": cases[number].answer.strip()} for number in numbers]
    prompts = [evaluator.encode(row["prompt"]) for row in shown]
    for name, lmbda, knn_temp in (("base", 0.0, 1.0), ("memory", arguments.lmbda, arguments.knn_temp)):
        evaluator.model.knn_temp, evaluator.model.lmbda = knn_temp, lmbda
        for row, text in zip(shown, evaluator.continuations(prompts, arguments.new_tokens, ""), strict=True):
            row[name] = " ".join(text.split())
    return shown


if __name__ == "__main__":
    command(main)()
