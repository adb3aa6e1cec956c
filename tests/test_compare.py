"""The comparison with the alternatives, on a tiny quickstart folder."""

from __future__ import annotations

import json
import random

import pytest
import torch
from harness import command, refused_here
from tiny_models import byte_tokenizer, make_base

WORDS = ("river", "village", "painter", "album", "bridge", "castle", "valley", "island", "station", "museum", "garden")
SIZES = {
    **{"max_cases": 20, "max_eval_tokens": 256, "speed_prompts": 2, "new_tokens": 3, "rag_chunk": 16},
    **{"rag_query": 24, "passage_tokens": 30, "lora_learning_rate": 1e-2},
}
MIXTURES = ("base", "knnlm", "knnlm_adaptive", "memory", "memory_adaptive")


def article(number: int) -> str:
    chosen = random.Random(number).choices(WORDS, k=8)
    name = f"{chosen[0].title()} {number}"
    return f"{name}\n\n{name} is a {chosen[1]} {chosen[2]} of {1900 + number}.\nIts {' '.join(chosen[3:])} are known.\n"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """What `scripts/quickstart.sh` leaves, of a tiny model and 60 articles."""
    folder = tmp_path_factory.mktemp("quickstart")
    model = make_base("llama", folder / "embedded" / "model", vocabulary=len(byte_tokenizer()))
    byte_tokenizer().save_pretrained(model)
    (folder / "embedded" / "web.txt").write_text("\n".join(f"Buy {a} and {b} now!" for a in WORDS for b in WORDS))
    text, windows, dstore = folder / "embedded" / "wiki.jsonl", folder / "windows", folder / "dstore"
    text.write_text("".join(json.dumps({"text": article(number)}) + "\n" for number in range(60)))
    source = ("--dataset_name", text, "--tokenizer_path", model, "--output_dir", windows)
    fractions = ("--validation_fraction", 0.2, "--test_fraction", 0.2)
    command("utils.preprocess_dataset", *source, "--block_size", 64, "--stride", 64, *fractions)
    base = ("--model_name_or_path", model, "--dataset_name", windows, "--report_to", "none")
    for split in ("train", "validation", "test"):
        save = ("--save_knnlm_dstore", "--dstore_dir", dstore, "--output_dir", folder / "embed", "--save_logprob")
        command("train_base", *base, "--do_eval", "--eval_subset", split, *save)
    stored = {split: dstore / f"dstore_llama_{split}_32.arrow" for split in ("train", "validation", "test")}
    index, targets, memory = dstore / "train.index", folder / "targets", folder / "memory"
    made = ("--dstore_path", stored["train"], "--index_path", index)
    command("knn_utils.build_index", *made, "--index_factory", "IVF4,Flat")
    search = ("--k", 16, "--probe", 4)
    command(
        "knn_utils.saveKNNMulti", *made, *search, "--output_path", targets, "--ignore_first", "True", "--knn_temp", 4
    )
    rows = ("--knn_save_path", targets, "--knn_dstore_path", stored["train"], "--validation_split_name", "none")
    settings = ("--num_train_epochs", 1, "--seed", 3, "--per_device_train_batch_size", 4, "--learning_rate", 1e-2)
    settings += ("--init_from_base", "--memory_layers", 1, "--mixed_precision", "no", "--output_dir", memory)
    command("train_mlpmem_offline", *base, *rows, *settings)
    used = ("--knn_generator_path", memory / "epoch_1")
    command("training.gate", *base[:4], *used, "--known_windows", 4, "--steps", 5, "--seed", 3)
    for split in ("validation", "test"):
        near = ("--knn", "--dstore_path", stored[split], "--val_file", stored["train"], "--index_file", index, *search)
        near += ("--output_dir", folder / f"knnlm_{split}")
        joint = (*used, "--dataset_split_name", split, "--output_dir", folder / f"joint_{split}")
        lmbda = {"knnlm": ("--lmbda", 0.2, "adaptive"), "joint": ("--lmbda", 0.2, 0.5)}
        if split == "test":
            lmbda = {name: ("--choose_on", folder / f"{name}_validation" / "results.json") for name in lmbda}
        command("train_base", "--do_eval", *base, "--eval_subset", split, *near, *lmbda["knnlm"])
        command("evaluate_joint", *base, *joint, *lmbda["joint"])
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny random sentence encoder."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(byte_tokenizer()), max_position_embeddings=256, **sizes)
    BertModel(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def compare(work, output, *methods, **changes):
    """Run the comparison; the records of the methods."""
    values = {"work": work, "output_dir": output, **SIZES, **changes}
    flags = [word for name, value in values.items() for word in (f"--{name}", value)]
    command("benchmarks.compare", *flags, "--methods", *methods)
    return json.loads((output / "results.json").read_text())["methods"]


def opened(work):
    from benchmarks.compare import CompareArguments
    from benchmarks.compare_methods import Quickstart

    return Quickstart(CompareArguments(work=str(work), output_dir=str(work / "unused"), **SIZES))


def test_methods_are_scored_on_the_same_tokens_once(work, encoder, tmp_path, capsys):
    trained = opened(work).articles[0].split("\n")[0]
    rows = [{"question": f"Who is {who}?", "answer": "a moon", "document": who} for who in (trained, "Nobody")]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoder = {"encoder": encoder, "questions": questions}
    methods = compare(work, tmp_path, *MIXTURES, "rag_dense", **encoder)
    assert all(record["answered"]["question"]["cases"] == 1 for record in methods.values())
    assert {*methods} == {*MIXTURES, "rag_dense"}
    for record in methods.values():
        for part in ("held_out", "web"):
            assert record[part]["tokens"] == methods["base"][part]["tokens"] > 100
            assert record[part]["perplexity"] > 1 and 0 <= record[part]["accuracy"] <= 1
        facts = record["facts"]
        assert facts["cases"] == len(facts["right"]) == len(facts["first_right"]) == 20
        assert facts["first_token"] >= facts["accuracy"]
        assert record["speed"]["first_token_seconds"] > 0 and record["speed"]["tokens_per_second"] > 0
        assert (record["bytes"] == 0) == (record["name"] == "base")
    assert len({round(record["held_out"]["perplexity"], 6) for record in methods.values()}) == 6
    capsys.readouterr()
    assert compare(work, tmp_path, *MIXTURES, **encoder) == methods
    assert capsys.readouterr().out.count("measured before") == len(MIXTURES)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: begin -->\nold\n<!-- table: end -->\nafter\n")
    command("benchmarks.compare", "--page", page, "--output_dir", tmp_path)
    assert "| MLP memory |" in page.read_text() and (tmp_path / "page.png").read_bytes()[:4] == b"\x89PNG"
    assert [*compare(work, tmp_path, "base", **encoder, max_cases=7)] == ["base"]


def test_mixtures_have_the_perplexity_that_the_stages_reported(work, tmp_path):
    methods = compare(work, tmp_path, *MIXTURES, max_eval_tokens=10**6)
    knnlm, joint = (json.loads((work / f"{name}_test" / "results.json").read_text()) for name in ("knnlm", "joint"))
    assert methods["base"]["held_out"]["tokens"] == joint["tokens"]
    expected = {"base": joint["base_perplexity"], "memory": joint["perplexity"], "knnlm": knnlm["perplexity"]}
    expected["knnlm_adaptive"] = knnlm["adaptive"]["perplexity"]
    for name, perplexity in expected.items():  # the stages keep hidden states in float16
        assert methods[name]["held_out"]["perplexity"] == pytest.approx(perplexity, rel=1e-3)


def test_lora_is_trained_and_its_best_state_is_kept(work, tmp_path, monkeypatch):
    pytest.importorskip("peft", reason="the extra `compare` is not installed")
    # The quickstart of the adapted base takes minutes: here the memory of the other base stands in.
    monkeypatch.setattr("benchmarks.compare_lora.quickstart_of", lambda *_: opened(work))
    methods = compare(work, tmp_path, "lora", "lora_last", "lora_memory")
    best, last = (methods[name]["settings"] for name in ("lora", "lora_last"))
    losses = dict(best["validation"])
    assert losses[best["kept"]] == min(losses.values()) and last["kept"] == max(losses)
    assert methods["lora_memory"]["bytes"] > methods["lora"]["bytes"]


def test_lora_of_several_ranks_is_compared_at_two_states(work, tmp_path):
    pytest.importorskip("peft", reason="the extra `compare` is not installed")
    compare(work, tmp_path / "compared", "base", "memory")
    flags = ("--compared", tmp_path / "compared", "--output_dir", tmp_path / "lora", "--limit", "memory", "--epochs", 1)
    command("benchmarks.lora", *flags, "--ranks", 2, 4, "--rates", 1e-3)
    found = json.loads((tmp_path / "lora" / "results.json").read_text())
    small, large = found["runs"]
    assert small["bytes"] < large["bytes"] and (tmp_path / "lora" / "plot.png").exists()
    for run in (small, large):
        assert run["best"]["validation"] == min(state["validation"] for state in run["states"])
        assert "within" not in run or run["within"]["web"] <= found["others"]["memory"]["web"]


def test_retrieval_sees_only_the_text_before_a_chunk(work):
    from benchmarks.compare_scores import Method, score_windows

    quickstart = opened(work)
    base, tokenizer, windows = quickstart.base, quickstart.tokenizer, quickstart.windows("test").select(range(2))
    asked = []

    def nothing(text: str) -> list[int]:
        asked.append(text)
        return []

    whole = score_windows(Method(base), windows, tokenizer, 16, 24)
    found = score_windows(Method(base, passages=nothing), windows, tokenizer, 16, 24)
    # Without passages, a window in chunks is the window.
    assert found["tokens"] == whole["tokens"] and found["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-5)
    ids = windows[0]["input_ids"]
    assert asked[:3] == [tokenizer.decode(ids[max(end - 24, 0) : end]) for end in (16, 32, 48)]
    some = score_windows(Method(base, passages=lambda _: [5, 6, 7] * 10), windows, tokenizer, 16, 24)
    assert some["tokens"] == whole["tokens"] and some["perplexity"] != whole["perplexity"]


def test_both_searches_find_the_article_of_a_text(encoder):
    from benchmarks.compare_methods import bm25_search, dense_search, passages

    articles = [article(number) for number in range(30)]
    dense, size = dense_search(articles, encoder)
    assert dense(articles[17], 3)[0] == 17 and size > 0
    tokens = passages(lambda *_: [17, 3], articles, lambda text, **_: {"input_ids": list(text.encode())}, 2, 30)("")
    assert bytes(tokens).decode() == f"{articles[3].strip()[:30]}\n\n{articles[17].strip()[:30]}\n\n"
    pytest.importorskip("bm25s", reason="the extra `compare` is not installed")
    sparse, size = bm25_search(articles)
    assert sparse(articles[17].split("\n")[0] + " is a", 2)[0] == 17 and sparse("qqq zzz", 2) == [] and size > 0


def test_unknown_methods_and_short_web_text_are_refused(work, tmp_path):
    assert "magic" in refused_here("benchmarks.compare", "--methods", "magic")
    (tmp_path / "short.txt").write_text("a few words")
    flags = ("--work", work, "--output_dir", tmp_path, "--methods", "base", "--web_text", tmp_path / "short.txt")
    assert "short.txt" in refused_here("benchmarks.compare", *flags)
