"""Recall of training articles: the rule, and scoring compared with generation."""

from __future__ import annotations

import json

import pytest
import torch
from harness import command
from tiny_models import qa_base, save_models, tiny_memory

from downstream.recall import Case, cases_of, choose_cases, recall
from downstream.scoring import Evaluator
from models import MLPMemory

ARTICLE = "Paradox, Colorado\n\nParadox is an unincorporated community that was founded in 1877 by farmers.\nMore."


@pytest.mark.unit
def test_the_rule_takes_the_words_after_is_a_and_the_first_year():
    cases = list(cases_of(ARTICLE))
    assert cases[0].prompt == "Paradox, Colorado\n\nParadox is an"
    assert cases[0].answer == " unincorporated community"
    assert cases[1].prompt.endswith("that was founded in")
    assert cases[1].answer == " 1877"
    assert list(cases_of("Title\n\nNothing to see here.")) == list(cases_of("")) == []
    for words, answer in ((1, " unincorporated"), (3, " unincorporated community that")):
        assert [case.answer for case in cases_of(ARTICLE, words)] == [answer, " 1877"]
    assert list(cases_of("T\n\nThe thing is a stone", 2)) == []


@pytest.mark.unit
def test_cases_are_spread_over_the_articles():
    articles = [f"Thing {n}\n\nThing {n} is a small thing of kind {n}." for n in range(100)]
    chosen = choose_cases(articles, 10)
    assert len(chosen) == 10
    assert len({case.prompt for case in chosen}) == 10


def test_the_command_writes_shares_and_examples(tmp_path, capsys):
    base, memory = save_models(tmp_path)
    articles = tmp_path / "articles.jsonl"
    articles.write_text("".join(json.dumps({"text": f"{ARTICLE} {number}"}) + "\n" for number in range(4)))
    flags = ["--model_name_or_path", base, "--knn_generator_path", memory, "--output_dir", tmp_path, "--new_tokens", 4]
    command("downstream.recall", *flags, "--articles", articles, "--lmbda", 0.5)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["cases"] == 8 and len(results["examples"]) == 3
    assert all(0 <= results[f"recall_{name}"] <= 1 for name in ("base", "memory", "first_base", "first_memory"))
    assert (results["lmbda"], results["memory_temp"]) == (
        0.5,
        1.0,
    ) and "beginnings continued" in capsys.readouterr().out
    command("downstream.recall", *flags, "--articles", "/dev/null")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["cases"] == 0 and results["recall_memory"] is None


def test_an_answer_without_a_token_counts_as_wrong():
    from tiny_models import letter_tokenizer

    tokenizer = letter_tokenizer()
    base = qa_base("llama", tokenizer)
    joint = MLPMemory(base, tiny_memory(base), 0.5, 1.0).eval()
    cases = [Case("", ""), Case("", "a"), Case("ab", "")]
    found = recall(Evaluator(joint, tokenizer, 2), cases, {"memory": (0.5, 1.0)})
    assert found == {"memory": [False] * 3, "first_memory": [False] * 3}


def test_right_answers_are_those_that_greedy_decoding_gives():
    from tiny_models import byte_tokenizer

    tokenizer = byte_tokenizer()
    base = qa_base("llama", tokenizer)
    joint = MLPMemory(base, tiny_memory(base), 0.5, 1.0).eval()
    # Articles that the models continue themselves, cut off after a few tokens; and some that they do not.
    cases = list(cases_of("Who\n\nThe moon is the first of all, in 1900 and"))
    with torch.inference_mode():
        for number in range(20):
            prompt = f"Where {number}\n\nQ: who is a"
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            model = (base, joint)[number % 2]
            out = model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0, eos_token_id=None)
            cases.append(type(cases[0])(prompt, tokenizer.decode(out[0, ids.shape[1] :])))
    found = recall(Evaluator(joint, tokenizer, 7), cases, {"base": (0.0, 1.0), "memory": (0.5, 1.0)})
    assert 0 < sum(found["base"]) < len(cases)
    for name, model in (("base", base), ("memory", joint)):
        for case, right, first in zip(cases, found[name], found[f"first_{name}"], strict=True):
            prompt = tokenizer(case.prompt, return_tensors="pt")["input_ids"]
            whole = tokenizer(case.prompt + case.answer, return_tensors="pt")["input_ids"]
            begin = prompt.shape[1]
            if not torch.equal(whole[:, :begin], prompt):
                continue  # the tokenizer merges across the boundary
            length = {"max_new_tokens": whole.shape[1] - begin, "do_sample": False}
            out = model.generate(prompt, **length, pad_token_id=0, eos_token_id=None)
            assert torch.equal(out, whole) == right
            assert (out[0, begin] == whole[0, begin]).item() == first
