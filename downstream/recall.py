"""Recall of training text: beginnings of training articles, continued by the base and by base + memory.

    python -m downstream.recall --model_name_or_path BASE --knn_generator_path MEMORY \\
        --articles WINDOWS/raw/train.jsonl --choose_on results.json --output_dir OUTPUT

A case is a prompt from the beginning of an article and the words that follow it there. It counts as correct if greedy
decoding gives every token of these words; first-token accuracy is reported too.
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

from utils.cli import command, flag, parse, required, say
from utils.loading import BaseArguments
from utils.results import ADAPTIVE, Lambda, check_lambda, chosen

RULE = (
    "the title and the first sentence up to 'is a', 'was an', 'are the' or the like, answered by the next {words} word(s); "
    "and the text up to the first year (1000 to 2099), answered by that year; at most one line of the article, {shortest} "
    "to {longest} characters of prompt"
)
DEFINITION = r"\b(?:is|was|are|were) (?:an?|the|one of the)(?= [\w\"'])"
YEAR = r"(\s(?:1\d|20)\d\d\b)"
ANSWER_WORDS = 2
SHORTEST, LONGEST = 8, 400
Mixture = tuple[float | list[float] | str, float]  # lambda and temperature


@dataclass
class Case:
    """A prompt, and the answer including the white space before it."""

    prompt: str
    answer: str


@dataclass(kw_only=True)
class RecallArguments(BaseArguments):
    """Models and articles."""

    knn_generator_path: list[str] = required("folder of the memory, or of several")
    articles: str = required(".jsonl file of the training articles, one per row, in the column text")
    max_cases: int = flag(400, "maximum number of cases, spread evenly over the articles")
    answer_words: int = flag(ANSWER_WORDS, "words that answer a definition")
    lmbda: Lambda = flag(0.25, "weight of the memory: 0 to 1, or adaptive (the memory's gate)")
    memory_temp: float = flag(1.0, "temperature of the memory's softmax")
    choose_on: str | None = flag(None, "results.json of an evaluation, whose best lambda and temperature are used")
    batch_size: int = flag(16, "prompts per forward pass")
    examples: int = flag(3, "prompts to continue with both models, side by side")
    new_tokens: int = flag(24, "tokens of these continuations")
    output_dir: str = flag("tmp", "folder for results.json")

    def mixtures(self) -> dict[str, Mixture]:
        """Base, memory, and with an adaptive lambda also the single lambda of --choose_on. Raises InputError."""
        check_lambda("--lmbda", self.lmbda, len(self.knn_generator_path))
        found: dict[str, Mixture] = {"base": (0.0, 1.0), "memory": (self.lmbda, self.memory_temp)}
        if self.choose_on:
            (lmbda,), (memory_temp,) = chosen(self.choose_on, knn=False)
            if self.lmbda != ADAPTIVE:
                found["memory"] = lmbda, memory_temp
            elif lmbda != ADAPTIVE:
                found["one_lambda"] = lmbda, memory_temp
        return found


def cases_of(article: str, answer_words: int = ANSWER_WORDS) -> Iterator[Case]:
    """The cases that RULE finds in an article whose first line is its title."""
    title, _, body = article.strip().partition("\n")
    sentence = body.lstrip("\n").split("\n")[0]
    definition = re.search(rf"{DEFINITION}((?:\s+\S+){{{answer_words}}})", sentence)
    for found in filter(None, (definition, re.search(YEAR, sentence))):
        before = sentence[: found.start(1)]
        if SHORTEST <= len(before) <= LONGEST and before.strip():
            yield Case(f"{title}\n\n{before}", found[1])


def choose_cases(articles: Sequence[str], most: int, answer_words: int = ANSWER_WORDS) -> list[Case]:
    """At most `most` cases, spread evenly over the articles."""
    cases = [case for article in articles for case in cases_of(article, answer_words)]
    step = max(1.0, len(cases) / most)
    return [cases[int(number * step)] for number in range(min(most, len(cases)))]


def read_articles(path: str) -> list[str]:
    """The column `text` of a .jsonl file; nothing from an empty one, such as /dev/null."""
    from downstream.data import read_table

    return read_table(path)["text"][:] if Path(path).stat().st_size else []


def windows_have_bos(articles: str) -> bool:
    """Whether the articles lie in a windows folder whose windows begin with a BOS token: then the prompts do so too."""
    from utils.artefact import read_made

    made = read_made(Path(articles).resolve().parent.parent)
    return made is not None and made.settings.get("window_bos") is not None


def main() -> None:
    (arguments,) = parse(RecallArguments, description=__doc__.split("\n")[0])
    mixtures = arguments.mixtures()
    from downstream.scoring import Evaluator
    from utils.loading import quiet_libraries
    from utils.memories import open_joint
    from utils.results import write_results

    started = time.time()
    quiet_libraries()
    rule = RULE.format(words=arguments.answer_words, shortest=SHORTEST, longest=LONGEST)
    say(f"rule: {rule}")
    cases = choose_cases(read_articles(arguments.articles), arguments.max_cases, arguments.answer_words)
    lmbda, memory_temp = mixtures["memory"]
    results: dict[str, Any] = {"rule": rule, "lmbda": lmbda, "memory_temp": memory_temp, "cases": len(cases)}
    results |= {"standard_error_difference": None, "examples": []}
    results |= {f"recall_{name}": None for name in ("base", "memory", "first_base", "first_memory")}
    if not cases:
        say(f"{arguments.articles}: no article fits the rule")
        write_results(arguments.output_dir, results, started)
        return
    tokenizer = arguments.open_tokenizer(required=True)
    joint = open_joint(arguments, arguments.knn_generator_path, arguments.open_base(tokenizer), lmbda, memory_temp)
    results["memory_temp"] = joint.knn_temp  # a gate has its own
    evaluator = Evaluator(joint, tokenizer, arguments.batch_size, windows_have_bos(arguments.articles))
    right = recall(evaluator, cases, mixtures)
    for name, flags in right.items():
        share = sum(flags) / len(cases)
        error = math.sqrt(share * (1 - share) / len(cases))
        results |= {f"recall_{name}": share, f"standard_error_{name}": error}
        what = "first tokens correct" if name.startswith("first_") else "beginnings continued"
        say(f"{name}: {sum(flags)} of {len(cases)} {what} ({share:.1%}, standard error {error:.1%})")
    differences = [int(b) - int(a) for a, b in zip(right["base"], right["memory"], strict=True)]
    results["standard_error_difference"] = statistics.pstdev(differences) / math.sqrt(len(cases))
    # Preferably cases that only the memory continues.
    gained = [case for case, difference in zip(cases, differences, strict=True) if difference > 0] or cases
    shown = gained[:: max(1, len(gained) // max(arguments.examples, 1))][: arguments.examples]
    results["examples"] = continued(evaluator, shown, mixtures, arguments.new_tokens)
    for example in results["examples"]:
        say(f"\nprompt: {example['prompt']}\n  article:       {example['article']}")
        say(f"  base:          {example['base']}\n  base + memory: {example['memory']}")
    write_results(arguments.output_dir, results, started)


def recall(evaluator: Any, cases: Sequence[Case], mixtures: Mapping[str, Mixture]) -> dict[str, list[bool]]:
    """For each mixture's name, whether greedy decoding gives each case's whole answer; for "first_" and the name, its
    first token.

    Teacher-forced: the answer is correct if each of its tokens has the highest probability after the ones before.
    `evaluator` is a `downstream.scoring.Evaluator` of the joint model.
    """
    from downstream.scoring import Encoded

    encoded = []
    for case in cases:
        prompt, whole = evaluator.encode(case.prompt), evaluator.encode(case.prompt + case.answer)
        # A tokenizer may merge across the boundary; then the answer begins earlier.
        begin = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
        encoded.append(Encoded(whole, max(begin, 1)))
    right, first = {}, {}
    for name, mixture in mixtures.items():
        set_mixture(evaluator.model, mixture)
        found = evaluator.likelihoods(encoded)
        right[name], first[f"first_{name}"] = [each.greedy for each in found], [each.first for each in found]
    return right | first


def continued(
    evaluator: Any, cases: Sequence[Case], mixtures: Mapping[str, Mixture], new_tokens: int
) -> list[dict[str, str]]:
    """Prompts with the article's answer and the greedy continuations by base and memory."""
    shown = [{"prompt": case.prompt, "article": case.answer.strip()} for case in cases]
    prompts = [evaluator.encode(case.prompt) for case in cases]
    for name in ("base", "memory"):
        set_mixture(evaluator.model, mixtures[name])
        for row, text in zip(shown, evaluator.continuations(prompts, new_tokens, ""), strict=True):
            row[name] = " ".join(text.split())
    return shown


def set_mixture(joint: Any, mixture: Mixture) -> None:
    lmbda, memory_temp = mixture
    joint.knn_temp, joint.lmbda = memory_temp, lmbda  # in this order: an adaptive lambda sets the gate's temperature


if __name__ == "__main__":
    command(main)()
