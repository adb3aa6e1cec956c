"""What was remembered: completing facts of the articles a memory was trained on, base against base + memory.

    python -m downstream.recall --model_name_or_path BASE --knn_generator_path MEMORY \\
        --articles WINDOWS/raw/train.jsonl --choose_on results.json --output_dir OUTPUT

A case is a prompt from an article's beginning and the words that follow it there. It counts as right when greedy
decoding gives every token of the answer. Knows nothing of training.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from utils.cli import flag, parse
from utils.errors import InputError, check_grid, check_positive, command

RULE = (
    "an article's title and its first sentence up to 'is a', 'was an', 'are the' and the like, answered by the next "
    "{words} word(s); and its text up to the first year (1000 to 2099), answered by that year; one line of the article "
    "at most, between {shortest} and {longest} characters of prompt"
)
DEFINITION = re.compile(r"\b(?:is|was|are|were) (?:an?|the|one of the)(?= [\w\"'])")
YEAR = re.compile(r"(?<=\s)(?:1\d|20)\d\d\b")
ANSWER_WORDS = 2
SHORTEST, LONGEST = 8, 400


@dataclass
class Case:
    """A prompt, and the answer with the white space before it."""

    prompt: str
    answer: str


@dataclass
class RecallArguments:
    """Which models, which articles."""

    model_name_or_path: str | None = flag(None, "folder or hub name of the base model")
    knn_generator_path: str | None = flag(None, "the memory's folder")
    articles: str | None = flag(None, ".jsonl of the trained articles, one a row, in the column text")
    max_cases: int = flag(400, "cases at most, taken evenly over the articles")
    answer_words: int = flag(ANSWER_WORDS, "words that answer a definition")
    lmbda: float = flag(0.25, "weight of the memory")
    knn_temp: float = flag(1.0, "temperature of the memory")
    choose_on: str | None = flag(None, "results.json of an evaluation whose best lambda and temperature are used")
    layer_position: int = flag(-1, "decoder block whose MLP input is the memory's input (0 = first, -1 = last)")
    batch_size: int = flag(16, "prompts at a time")
    examples: int = flag(3, "prompts to continue with both, side by side")
    new_tokens: int = flag(24, "tokens of those continuations")
    torch_dtype: str | None = flag(None, "float32 (default), bfloat16, float16, or auto")
    device_map: str | None = flag(None, "accelerate's placement of the base over several devices, such as auto")
    load_in_4bit: bool = flag(False, "hold the base in 4 bits (needs bitsandbytes)")
    load_in_8bit: bool = flag(False, "hold the base in 8 bits (needs bitsandbytes)")
    trust_remote_code: bool = flag(False, "run model code that comes with the base")
    output_dir: str = flag("tmp", "folder of results.json")


def cases_of(article: str, answer_words: int = ANSWER_WORDS) -> Iterator[Case]:
    """The cases that RULE finds in an article whose first line is its title."""
    title, _, body = article.strip().partition("\n")
    sentence = body.lstrip("\n").split("\n")[0]
    found = DEFINITION.search(sentence)
    if found:
        words = re.match(rf"(?:\s+\S+){{{answer_words}}}", sentence[found.end() :])
        if words:
            yield from _case(title, sentence[: found.end()], words.group())
    year = YEAR.search(sentence)
    if year:
        yield from _case(title, sentence[: year.start() - 1], sentence[year.start() - 1 : year.end()])


def _case(title: str, before: str, answer: str) -> Iterator[Case]:
    if SHORTEST <= len(before) <= LONGEST and before.strip():
        yield Case(f"{title}\n\n{before}", answer)


def read_articles(path: str) -> list[str]:
    """The column `text` of a .jsonl file. Raises InputError naming the file and line."""
    texts = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):  # noqa: B007 (named in the error)
                text = json.loads(line)["text"]
                if not isinstance(text, str):
                    raise TypeError
                texts.append(text)
    except FileNotFoundError:
        raise InputError(f"--articles {path}: no such file") from None
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        raise InputError(f"--articles {path}: line {number} is not a JSON object with a text") from None
    return texts


def choose_cases(articles: Sequence[str], most: int, answer_words: int = ANSWER_WORDS) -> list[Case]:
    """At most `most` cases, evenly spread over the articles."""
    cases = [case for article in articles for case in cases_of(article, answer_words)]
    step = max(1.0, len(cases) / most)
    return [cases[int(number * step)] for number in range(min(most, len(cases)))]


def main() -> None:
    (arguments,) = parse(RecallArguments, description=__doc__.split("\n")[0])
    for name in ("model_name_or_path", "knn_generator_path", "articles"):
        if getattr(arguments, name) is None:
            raise InputError(f"--{name}: is required")
    if arguments.choose_on:
        from utils.evaluation import chosen

        (arguments.lmbda,), (arguments.knn_temp,) = chosen(arguments.choose_on)
    check_grid([arguments.lmbda], [arguments.knn_temp])
    for name in ("max_cases", "answer_words", "batch_size"):
        check_positive(f"--{name}", getattr(arguments, name))
    from utils.base_model import load_base, load_tokenizer
    from utils.evaluation import write_results
    from utils.loading import open_memory_of, quiet_libraries, resolve_dtype, say

    started = time.time()
    quiet_libraries()
    rule = RULE.format(words=arguments.answer_words, shortest=SHORTEST, longest=LONGEST)
    say(f"rule: {rule}")
    results: dict[str, Any] = {"rule": rule, "lmbda": arguments.lmbda, "knn_temp": arguments.knn_temp}
    cases = choose_cases(read_articles(arguments.articles), arguments.max_cases, arguments.answer_words)
    results["cases"] = len(cases)
    if not cases:
        say(f"{arguments.articles}: no article fits the rule, nothing to complete")
        nothing = {"recall_base": None, "recall_memory": None, "standard_error_difference": None, "examples": []}
        write_results(arguments.output_dir, results | nothing, started)
        return
    dtype = resolve_dtype(arguments.torch_dtype)
    remote = {"trust_remote_code": arguments.trust_remote_code}
    tokenizer = load_tokenizer(arguments.model_name_or_path, required=True, **remote)
    base = load_base(
        arguments.model_name_or_path,
        tokenizer=tokenizer,
        dtype=dtype,
        device_map=arguments.device_map,
        load_in_4bit=arguments.load_in_4bit,
        load_in_8bit=arguments.load_in_8bit,
        **remote,
    )
    path, position = arguments.knn_generator_path, arguments.layer_position
    memory = open_memory_of(base, path, layer_position=position, dtype=dtype)
    right = recall(base, memory, tokenizer, cases, arguments)
    for name, flags in right.items():
        share = sum(flags) / len(cases)
        error = math.sqrt(share * (1 - share) / len(cases))
        results |= {f"recall_{name}": share, f"standard_error_{name}": error}
        say(f"{name}: {sum(flags)} of {len(cases)} facts completed ({share:.1%}, standard error {error:.1%})")
    results["standard_error_difference"] = _paired_error(right["base"], right["memory"])
    results["examples"] = examples(base, memory, tokenizer, cases, right, arguments)
    for example in results["examples"]:
        say(f"\nprompt: {example['prompt']}\n  article:       {example['article']}")
        say(f"  base:          {example['base']}\n  base + memory: {example['memory']}")
    write_results(arguments.output_dir, results, started)


def _paired_error(first: list[bool], second: list[bool]) -> float:
    """Standard error of the difference of two shares over the same cases."""
    differences = [int(b) - int(a) for a, b in zip(first, second, strict=True)]
    mean = sum(differences) / len(differences)
    return math.sqrt(sum((value - mean) ** 2 for value in differences)) / len(differences)


def recall(
    base: Any, memory: Any, tokenizer: Any, cases: Sequence[Case], arguments: RecallArguments
) -> dict[str, list]:
    """For each case whether greedy decoding gives the whole answer: {"base": [...], "memory": [...]}.

    Teacher-forced: the answer is right when each of its tokens has the highest probability after the ones before.
    """
    import torch

    from models.capture import base_logits, hidden_and_head_input
    from models.mlpMemory import joint_log_probs

    encoded = []
    for case in cases:
        prompt = tokenizer(case.prompt)["input_ids"]
        whole = tokenizer(case.prompt + case.answer)["input_ids"]
        # Where the answer's tokens begin; a tokenizer may merge over the boundary, then the case starts earlier.
        start = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
        encoded.append((whole, start))
    right: dict[str, list] = {"base": [False] * len(cases), "memory": [False] * len(cases)}
    order = sorted(range(len(cases)), key=lambda number: len(encoded[number][0]))
    with torch.inference_mode():
        for begin in range(0, len(order), arguments.batch_size):
            numbers = order[begin : begin + arguments.batch_size]
            width = max(len(encoded[number][0]) for number in numbers)
            ids = torch.zeros(len(numbers), width, dtype=torch.long)
            positions = torch.zeros(len(numbers), width, dtype=torch.bool)
            for row, number in enumerate(numbers):
                whole, start = encoded[number]
                ids[row, : len(whole)] = torch.tensor(whole)
                positions[row, start - 1 : len(whole) - 1] = True
            wanted = torch.roll(ids, -1, dims=1)[positions]
            owner = torch.arange(len(numbers)).repeat_interleave(positions.sum(1))
            captured, final = hidden_and_head_input(
                base, ids.to(base.device), positions.to(base.device), arguments.layer_position
            )
            logits = base_logits(base, final)  # (answer tokens, V)
            learned = memory(captured).logits.to(logits.device)
            joint = joint_log_probs(logits, learned, arguments.lmbda, arguments.knn_temp)
            for name, scores in (("base", logits), ("memory", joint)):
                hit = scores.argmax(-1).cpu() == wanted
                for row, number in enumerate(numbers):
                    right[name][number] = bool(hit[owner == row].all())
    return right


def examples(
    base: Any, memory: Any, tokenizer: Any, cases: Sequence[Case], right: dict[str, list], arguments: RecallArguments
) -> list[dict[str, str]]:
    """Greedy continuations of a few prompts by both. The prompts are cases the two disagree on, where there are any."""
    import torch

    from models import MLPMemory

    differ = [n for n in range(len(cases)) if right["base"][n] != right["memory"][n]]
    pool = differ or list(range(len(cases)))
    step = max(1, len(pool) // max(arguments.examples, 1))
    joint = MLPMemory(base, memory, arguments.lmbda, arguments.knn_temp, arguments.layer_position)
    shown = []
    for number in pool[::step][: arguments.examples]:
        inputs = tokenizer(cases[number].prompt, return_tensors="pt").to(base.device)
        row = {"prompt": cases[number].prompt, "article": cases[number].answer.strip()}
        for name, model in (("base", base), ("memory", joint)):
            with torch.inference_mode():
                out = model.generate(
                    **inputs,
                    max_new_tokens=arguments.new_tokens,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id
                    if tokenizer.pad_token_id is not None
                    else tokenizer.eos_token_id,
                )
            row[name] = " ".join(
                tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).split()
            )
        shown.append(row)
    return shown


if __name__ == "__main__":
    command(main)()
