"""The comparison with the alternatives, on a tiny quickstart folder: same tokens, same rule, nothing measured twice."""

from __future__ import annotations

import json
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from harness import command, refused, refused_here
from tiny_models import byte_tokenizer, make_base

from utils.errors import InputError

pytest.importorskip("peft", reason="the extra `compare` is not installed")
pytest.importorskip("bm25s", reason="the extra `compare` is not installed")

WORDS = ("river", "village", "painter", "album", "bridge", "castle", "valley", "island", "station", "museum", "garden")
SIZES = {
    **{"max_cases": 20, "max_eval_tokens": 320, "speed_prompts": 2, "new_tokens": 3, "rag_chunk": 16},
    **{"rag_query": 24, "choose_windows": 2, "passage_tokens": 40},
}


def article(number: int) -> str:
    chosen = random.Random(number).choices(WORDS, k=8)
    name = f"{chosen[0].title()} {number}"
    return f"{name}\n\n{name} is a {chosen[1]} {chosen[2]} of {1900 + number}.\nIts {' '.join(chosen[3:])} are known.\n"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """What `scripts/quickstart.sh` leaves, of a tiny model and 60 articles."""
    folder = tmp_path_factory.mktemp("quickstart") / "work"
    model = make_base("llama", folder / "embedded" / "model", vocabulary=len(byte_tokenizer()))
    byte_tokenizer().save_pretrained(model)
    (folder / "embedded" / "web.txt").write_text("\n".join(f"Buy {a} and {b} now!" for a in WORDS for b in WORDS))
    text = folder / "embedded" / "wiki.txt"
    text.write_text("@@".join(article(number) for number in range(60)))
    windows, dstore, targets = folder / "windows", folder / "dstore", folder / "targets"
    index, memory = dstore / "train.index", folder / "memory"
    stored = {split: dstore / f"dstore_llama_{split}_32.arrow" for split in ("train", "validation", "test")}
    base = ("--model_name_or_path", model, "--dataset_name", windows, "--report_to", "none")

    command(
        *("utils.preprocess_dataset", "--dataset_name", text, "--tokenizer_path", model, "--output_dir", windows),
        *("--document_separator", "@@", "--block_size", 64, "--stride", 64),
        *("--validation_fraction", 0.2, "--test_fraction", 0.2),
    )
    for split in stored:
        save = ("--do_eval", "--save_knnlm_dstore", "--dstore_dir", dstore, "--output_dir", folder / "embed")
        save += () if split == "train" else ("--save_logprob",)
        command("train_base", *base, "--eval_subset", split, *save)
    made = ("--dstore_path", stored["train"], "--index_path", index)
    command("knn_utils.build_index", *made, "--index_factory", "IVF4,Flat")
    search = ("--k", 16, "--probe", 4)
    settings = ("--output_path", targets, "--ignore_first", "True", "--knn_temp", 4, "--batch_size", 256)
    command("knn_utils.saveKNNMulti", *made, *search, *settings)
    command(
        *("train_mlpmem_offline", *base, "--knn_save_path", targets, "--knn_dstore_path", stored["train"]),
        *("--validation_split_name", "none", "--output_dir", memory, "--init_from_base", "--memory_layers", 1),
        *("--num_train_epochs", 1, "--seed", 3, "--num_warmup_steps", 2, "--per_device_train_batch_size", 4),
        *("--learning_rate", 1e-2, "--mixed_precision", "no"),
    )
    known = ("--known_windows", 4, "--steps", 5, "--seed", 3)
    command("training.gate", *base[:4], "--knn_generator_path", memory / "epoch_1", *known)
    for split in ("validation", "test"):
        for name in ("knnlm", "joint"):
            output = ("--output_dir", folder / f"{name}_{split}")
            chosen = ("--choose_on", folder / f"{name}_validation" / "results.json")
            chosen = ("--lmbda", 0.2, 0.5) if split == "validation" else chosen
            if name == "knnlm":
                chosen += ("adaptive",) if split == "validation" else ()
                near = ("--knn", "--dstore_path", stored[split], "--val_file", stored["train"], "--index_file", index)
                flags = ("--dataset_name", windows, "--report_to", "none", "--do_eval", "--eval_subset", split, *near)
                command("train_base", *flags, *search, *output, *chosen)
            else:
                flags = ("--do_test", "--dataset_split_name", split, "--knn_generator_path", memory / "epoch_1")
                command("evaluate_joint", *base, *flags, *output, *chosen)
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


@pytest.fixture(scope="module")
def compared(work, encoder, tmp_path_factory):
    """(flags, output folder) of a whole comparison that has run."""
    output = tmp_path_factory.mktemp("compare")
    flags = flags_of(work, output, encoder=encoder, lora_learning_rate=1e-2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.compare_lora.stage", command)  # a process for each takes too long here
        command("benchmarks.compare", *flags)
    return flags, output


def flags_of(work, output, **changes):
    values = {"work": work, "output_dir": output, **SIZES, **changes}
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def results_of(output):
    return json.loads((output / "results.json").read_text())["methods"]


def work_of(work, **flags):
    from benchmarks.compare import CompareArguments
    from benchmarks.compare_methods import Quickstart

    return Quickstart(CompareArguments(**{"work": str(work), "output_dir": str(work / "unused"), **SIZES, **flags}))


def test_each_method_has_every_figure_on_the_same_tokens_and_cases(compared):
    _, output = compared
    methods = results_of(output)
    mixtures, adapters = ["knnlm", "knnlm_adaptive"], ["lora", "lora_last"]
    memories = ["memory", "memory_adaptive"]
    assert list(methods) == ["base", *mixtures, "rag_bm25", "rag_dense", *adapters, *memories, "lora_memory"]
    for record in methods.values():
        for part in ("held_out", "web"):
            assert record[part]["tokens"] == methods["base"][part]["tokens"] > 100
            assert record[part]["perplexity"] > 1 and 0 <= record[part]["accuracy"] <= 1
        facts = record["facts"]
        assert facts["cases"] == len(facts["right"]) == len(facts["first_right"]) == 20
        assert facts["first_token"] == facts["first_right"].count("1") / 20 >= facts["accuracy"]
        assert record["speed"]["first_token_seconds"] > 0 and record["speed"]["tokens_per_second"] > 0
        assert (record["bytes"] == 0) == (record["name"] == "base")
    assert len({round(record["held_out"]["perplexity"], 6) for record in methods.values()}) >= 7


def test_mixtures_have_the_perplexity_that_the_stages_reported(work, compared):
    _, output = compared
    flags = flags_of(work, output / "whole", max_eval_tokens=10**6)
    command("benchmarks.compare", *flags, "--methods", "base", "knnlm", "knnlm_adaptive", "memory")
    methods = results_of(output / "whole")
    knnlm, joint = (json.loads((work / f"{name}_test" / "results.json").read_text()) for name in ("knnlm", "joint"))
    assert methods["base"]["held_out"]["tokens"] == joint["tokens"]
    # The stages keep hidden states in float16.
    assert methods["base"]["held_out"]["perplexity"] == pytest.approx(joint["base_perplexity"], rel=1e-4)
    assert methods["memory"]["held_out"]["perplexity"] == pytest.approx(joint["perplexity"], rel=1e-3)
    assert methods["knnlm"]["held_out"]["perplexity"] == pytest.approx(knnlm["perplexity"], rel=1e-3)
    adaptive = knnlm["adaptive"]["perplexity"]
    assert methods["knnlm_adaptive"]["held_out"]["perplexity"] == pytest.approx(adaptive, rel=1e-3)


def test_facts_are_right_where_the_recall_command_says_so(work):
    from benchmarks.compare_methods import build
    from benchmarks.compare_scores import score_facts
    from downstream.recall import recall
    from downstream.scoring import Evaluator

    opened = work_of(work)
    opened.joint["lmbda"] = 0.7
    base, memory = build(opened, "base"), build(opened, "memory")
    mixtures = {"base": (0.0, 1.0), "memory": (0.7, opened.joint["knn_temp"])}
    expected = recall(Evaluator(memory.model, opened.tokenizer, 16), opened.cases, mixtures)
    for name, method in (("base", base), ("memory", memory)):
        found = score_facts(method, opened.cases, opened.tokenizer)
        assert [flag == "1" for flag in found["right"]] == expected[name]
        assert [flag == "1" for flag in found["first_right"]] == expected[f"first_{name}"]


def test_a_second_run_measures_nothing_and_a_cut_off_one_only_what_is_missing(compared, capsys):
    flags, output = compared
    before = {path.name: path.read_bytes() for path in (output / "methods").iterdir()}
    path = output / "methods" / "memory.json"
    record = json.loads(path.read_text())
    del record["web"]
    path.write_text(json.dumps(record))
    capsys.readouterr()
    command("benchmarks.compare", *flags)
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.endswith("measured before")]) == 9
    assert len([line for line in lines if line.startswith("MLP memory: web")]) == 1
    assert not any("MLP memory: facts" in line for line in lines)
    after = {path.name: json.loads(path.read_bytes()) for path in (output / "methods").iterdir()}
    assert after["memory.json"]["web"] == json.loads(before["memory.json"])["web"]
    assert all(after[name] == json.loads(text) for name, text in before.items() if name != "memory.json")


def test_another_memory_leaves_the_figures_of_the_others(compared, work):
    _, output = compared
    now, later = work_of(work), work_of(work)
    later.training["alpha"] = 0.9
    changed = {name for name in results_of(output) if now.identity_of(name) != later.identity_of(name)}
    assert changed == {"memory", "memory_adaptive", "lora_memory"}
    later = work_of(work)
    later.adaptive["memory_adaptive"] = "another gate"
    changed = {name for name in results_of(output) if now.identity_of(name) != later.identity_of(name)}
    assert changed == {"memory_adaptive", "lora_memory"}
    later.training["seed"], later.knnlm["k"] = 5, 3
    changed = {name for name in results_of(output) if now.identity_of(name) != later.identity_of(name)}
    assert changed == results_of(output).keys() - {"base", "rag_bm25", "rag_dense"}


def test_other_sizes_are_measured_anew_and_not_mixed_with_the_old(compared, work, capsys, tmp_path):
    command("benchmarks.compare", *flags_of(work, tmp_path), "--methods", "base", "memory")
    capsys.readouterr()
    command("benchmarks.compare", *flags_of(work, tmp_path, max_cases=7), "--methods", "base")
    assert "measured again" in capsys.readouterr().out
    methods = results_of(tmp_path)
    assert list(methods) == ["base"] and methods["base"]["facts"]["cases"] == 7


def test_retrieval_sees_only_what_is_before_a_chunk_and_scores_each_token_once(work):
    from benchmarks.compare_scores import Method, score_windows

    opened = work_of(work)
    base, tokenizer, windows = opened.base, opened.tokenizer, opened.windows("test").select(range(2))
    asked = []

    def nothing(text: str) -> list[int]:
        asked.append(text)
        return []

    whole = score_windows(Method(base), windows, tokenizer, 16, 24)
    found = score_windows(Method(base, passages=nothing), windows, tokenizer, 16, 24)
    # With nothing before it, a window in chunks is the window.
    assert found["tokens"] == whole["tokens"] and found["accuracy"] == whole["accuracy"]
    assert found["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-5)
    ids = windows[0]["input_ids"]
    assert asked[:3] == [tokenizer.decode(ids[max(end - 24, 0) : end]) for end in (16, 32, 48)]
    some = score_windows(Method(base, passages=lambda _: [5, 6, 7] * 10), windows, tokenizer, 16, 24)
    assert some["tokens"] == whole["tokens"] and some["perplexity"] != whole["perplexity"]


@pytest.mark.unit
def test_what_a_quickstart_did_not_make_is_left_out_unless_it_was_asked_for(capsys):
    from benchmarks.compare import METHODS, is_there

    flags = SimpleNamespace(methods=[*METHODS])
    work = SimpleNamespace(folder="work", flags=flags, adaptive={"knnlm_adaptive": None, "memory_adaptive": "0a"})
    assert is_there(work, "base") and is_there(work, "memory_adaptive") and not is_there(work, "knnlm_adaptive")
    assert "kNN-LM, adaptive lambda: left out, work has no adaptive lambda" in capsys.readouterr().out
    flags.methods = ["knnlm_adaptive"]
    with pytest.raises(InputError, match="--methods knnlm_adaptive: work has no adaptive lambda"):
        is_there(work, "knnlm_adaptive")


@pytest.mark.unit
def test_passages_and_text_stay_within_the_context():
    from transformers import LlamaConfig

    from benchmarks.compare_scores import Method

    for context, kept in ((100, range(10, 20)), (8, range(15, 20))):
        base = SimpleNamespace(config=LlamaConfig(max_position_embeddings=context))
        method = Method(base, passages=lambda _: [1, 2, 3])
        together, moved = method.before("text", torch.arange(10, 20))
        assert together.tolist() == [1, 2, 3, *kept] and together[9 + moved] == 19
        assert method.before(" ", torch.arange(3))[0].tolist() == [0, 1, 2]


def test_both_searches_find_the_article_that_a_text_is_from(encoder):
    from benchmarks.compare_methods import bm25_search, dense_search, passages

    articles = [article(number) for number in range(30)]
    sparse, sparse_bytes = bm25_search(articles)
    dense, dense_bytes = dense_search(articles, encoder)
    name = articles[17].split("\n")[0]
    assert sparse(f"{name} is a", 2)[0] == 17
    assert sparse("qqq zzz", 2) == []
    assert dense(articles[17], 3)[0] == 17
    assert sparse_bytes > 0 and dense_bytes > sum(path.stat().st_size for path in encoder.glob("*.safetensors"))

    def tokenizer(text, **_):
        return {"input_ids": list(text.encode())}

    before = bytes(passages(sparse, articles, tokenizer, 2, 30)(f"{name} is a")).decode()
    assert before.endswith(articles[17][:30] + "\n\n") and before.count("\n\n") >= 2


def test_the_adapter_with_the_lowest_validation_loss_is_kept_and_changes_the_base(compared):
    _, output = compared
    settings = results_of(output)["lora"]["settings"]
    losses = dict(settings["validation"])
    assert losses[settings["kept"]] == min(losses.values()) and len(losses) >= 2
    assert len(list(output.glob("work/lora-*/adapter_model.safetensors"))) == 1


def test_the_state_after_all_epochs_and_the_memory_of_the_adapted_base_are_made_with_the_same_settings(work, compared):
    _, output = compared
    methods = results_of(output)
    best, last = (methods[name]["settings"] for name in ("lora", "lora_last"))
    assert last["validation"] == best["validation"] and last["kept"] == best["validation"][-1][0]
    (folder,) = output.glob("work/lora-*-memory-*")
    ours, theirs = (json.loads((where / "memory/training.json").read_text())["settings"] for where in (work, folder))
    assert {**theirs, "data": None} == {**ours, "data": None}
    assert theirs["data"]["model"] != ours["data"]["model"] and theirs["data"]["windows"] == ours["data"]["windows"]
    assert theirs["data"]["targets"]["k"] == ours["data"]["targets"]["k"]
    joint, tuned = (methods[name]["held_out"]["perplexity"] for name in ("lora_memory", "lora"))
    assert joint != tuned and methods["lora_memory"]["bytes"] > methods["lora"]["bytes"]
    mine, other = (json.loads((where / "memory/epoch_1/gate.json").read_text()) for where in (work, folder))
    assert mine["known_weight"] == other["known_weight"] and mine["base_probe"] != other["base_probe"]
    assert "lambda by token" in methods["lora_memory"]["note"]


@pytest.mark.unit
def test_differences_from_the_base_are_paired():
    from benchmarks.compare_table import add_differences

    def record(nats, right):
        part = {"log_likelihood": [[-value, 10] for value in nats]}
        facts = {"right": right, "first_right": right}
        return {"held_out": part, "web": json.loads(json.dumps(part)), "facts": facts}

    methods = {"base": record([20, 40], "0101"), "other": record([10, 20], "0111")}
    add_differences(methods)
    assert methods["other"]["held_out"]["nats_below_base"] == {"mean": 1.5, "standard_error": 0.5}
    assert methods["other"]["facts"]["above_base"] == {"mean": 0.25, "standard_error": 0.25}


def test_the_table_goes_into_a_page_with_the_plot_beside_it(compared, tmp_path):
    _, output = compared
    page = tmp_path / "compare.md"
    page.write_text("before\n<!-- table: begin -->\nold\n<!-- table: end -->\nafter\n")
    command("benchmarks.compare", "--page", page, "--output_dir", output)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert all(f"| {record['title']} |" in text for record in results_of(output).values())
    assert (tmp_path / "compare.png").read_bytes()[:4] == b"\x89PNG"


def test_bad_input_is_one_line(work, tmp_path):
    assert "quickstart" in refused("-m", "benchmarks.compare", "--work", tmp_path / "none")
    assert "magic" in refused_here("benchmarks.compare", "--methods", "magic")
    assert "--max_cases 0" in refused_here("benchmarks.compare", "--max_cases", 0)
    assert "--rag_passages" in refused_here("benchmarks.compare", "--rag_passages", 0)
    line = refused_here("benchmarks.compare", *flags_of(work, tmp_path / "a", web_text=tmp_path / "no.txt"))
    assert "no.txt" in line
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    flags = flags_of(work, tmp_path / "a", web_text=short)
    assert "short.txt" in refused_here("benchmarks.compare", *flags, "--methods", "base")
    flags = flags_of(work, tmp_path / "b", encoder=tmp_path)
    assert "--encoder" in refused_here("benchmarks.compare", *flags, "--methods", "rag_dense")
    page = tmp_path / "page.md"
    page.write_text("no marks")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "results.json").write_text('{"description": {}}')
    assert "page.md" in refused_here("benchmarks.compare", "--page", page, "--output_dir", tmp_path / "c")


def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch, work, tmp_path):
    for name in ("peft", "bm25s"):
        monkeypatch.setitem(sys.modules, name, None)
    for method in ("rag_bm25", "lora"):
        line = refused_here("benchmarks.compare", *flags_of(work, tmp_path), "--methods", method)
        assert method in line and "pip install" in line
