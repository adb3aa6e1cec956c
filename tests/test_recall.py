"""Completing facts of trained articles: the rule, and scoring against generation."""

from __future__ import annotations

import json

import pytest
import torch
from harness import command, refused_here

from downstream.recall import cases_of, choose_cases


@pytest.mark.unit
def test_rule_takes_the_words_after_is_a_and_the_first_year():
    article = "Paradox, Colorado\n\nParadox is an unincorporated community that was founded in 1877 by farmers.\nMore."
    cases = list(cases_of(article))
    assert cases[0].prompt == "Paradox, Colorado\n\nParadox is an"
    assert cases[0].answer == " unincorporated community"
    assert cases[1].prompt.endswith("that was founded in")
    assert cases[1].answer == " 1877"
    assert list(cases_of("Title\n\nNothing to see here.")) == list(cases_of("")) == []


def test_a_definition_is_answered_by_as_many_words_as_are_asked_for(tmp_path, capsys):
    article = "Paradox, Colorado\n\nParadox is an unincorporated community that was founded in 1877 by farmers."
    for words, answer in ((1, " unincorporated"), (3, " unincorporated community that")):
        assert [case.answer for case in cases_of(article, words)] == [answer, " 1877"]
    assert [case.answer for case in cases_of("T\n\nThe thing is a stone", 2)] == []
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "T\n\nThe thing is a stone"}) + "\n")
    flags = ("--model_name_or_path", tmp_path, "--knn_generator_path", "no", "--articles", tmp_path / "a.jsonl")
    command("downstream.recall", *flags, "--answer_words", 2, "--output_dir", tmp_path)
    said = capsys.readouterr().out
    assert "the next 2 word(s)" in said and "no article fits" in said
    assert json.loads((tmp_path / "results.json").read_text())["cases"] == 0
    # With one word there is a case, so the models are needed.
    assert "holds no tokenizer" in refused_here("downstream.recall", *flags, "--answer_words", 1)


@pytest.mark.parametrize(
    ("flag", "value", "told"),
    [
        ("--layer_position", 9, "--layer_position 9: "),
        ("--answer_words", 0, "--answer_words"),
        ("--new_tokens", 0, "--new_tokens 0"),
        ("--examples", -1, "--examples -1"),
        ("--articles", "{bad}", "row 0 has no text"),
        ("--knn_generator_path", "{bad}", "--knn_generator_path"),
    ],
)
def test_bad_input_ends_in_one_line(llama_world, tmp_path, flag, value, told):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "T\n\nThe thing is a small stone"}) + "\n")
    (tmp_path / "bad.jsonl").write_text(json.dumps({"text": 7}) + "\n")
    flags = {
        "--model_name_or_path": llama_world.base,
        "--knn_generator_path": llama_world.base,
        "--articles": tmp_path / "a.jsonl",
        "--output_dir": tmp_path,
        flag: str(value).format(bad=tmp_path / "bad.jsonl"),
    }
    assert told in refused_here("downstream.recall", *(text for pair in flags.items() for text in pair))


@pytest.mark.unit
def test_cases_are_spread_over_the_articles():
    articles = [f"Thing {n}\n\nThing {n} is a small thing of kind {n}." for n in range(100)]
    chosen = choose_cases(articles, 10)
    assert len(chosen) == 10
    assert len({case.prompt for case in chosen}) == 10


def test_right_answers_are_those_greedy_decoding_gives(llama_world, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from downstream.recall import recall
    from downstream.scoring import Evaluator
    from models import MLPMemory, load_memory

    more = ("--knn_dstore_path", llama_world.dstore("train"), "--validation_split_name", "none", "--init_from_base")
    command("train_mlpmem_offline", *llama_world.trainer(tmp_path / "m", *more))
    # In an order of its own: that of a vocabulary is another in each process.
    words = sorted(w for w in AutoTokenizer.from_pretrained(llama_world.base).get_vocab() if w.isalpha())[:60]
    articles = tmp_path / "articles.jsonl"
    lines = [f"{a}\n\n{a} {b} is a {c} {d}" for a, b, c, d in zip(words, words[1:], words[2:], words[3:], strict=False)]
    articles.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    tokenizer = AutoTokenizer.from_pretrained(llama_world.base)
    base = AutoModelForCausalLM.from_pretrained(llama_world.base).eval()
    memory = load_memory(tmp_path / "m" / "epoch_1").eval()
    cases = choose_cases(lines, 40)
    joint = MLPMemory(base, memory, 0.5, 1.0)
    found = recall(Evaluator(joint, tokenizer, 7), cases, {"base": (0.0, 1.0), "memory": (0.5, 1.0)})
    for name, model in (("base", base), ("memory", joint)):
        for case, right, first in zip(cases, found[name], found[f"first_{name}"], strict=True):
            prompt = tokenizer(case.prompt, return_tensors="pt")["input_ids"]
            whole = tokenizer(case.prompt + case.answer, return_tensors="pt")["input_ids"]
            out = model.generate(
                prompt,
                max_new_tokens=whole.shape[1] - prompt.shape[1],
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )
            begin = prompt.shape[1]
            assert torch.equal(whole[:, :begin], prompt)  # no token merges prompt and answer
            assert torch.equal(out, whole) == right
            assert (out[0, begin] == whole[0, begin]).item() == first
