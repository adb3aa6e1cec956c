"""Perplexities: base, base + memory over a grid in one pass, kNN-LM, from the base or from stored scores."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from harness import FAMILIES, GOLDEN, command, refused, refused_here
from safetensors.torch import load_file
from tiny_models import letter_tokenizer, make_base, tiny_memory
from transformers import AutoModelForCausalLM, AutoTokenizer

from knn_utils.datastore import Datastore
from utils.artefact import read_made
from utils.errors import InputError
from utils.evaluation import MixtureScore, label_log_probabilities, predicted_positions
from utils.files import read_json
from utils.loading import BaseArguments, load_windows


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def memory(llama_world, tmp_path_factory):
    output = tmp_path_factory.mktemp("memory")
    more = (
        "--knn_dstore_path",
        llama_world.dstore("train"),
        "--validation_split_name",
        "none",
        "--learning_rate",
        1e-2,
    )
    command("train_mlpmem_offline", *llama_world.trainer(output, *more))
    return output / "epoch_1"


def joint_flags(world, memory, output, *more):
    return (
        *("--do_test", "--model_name_or_path", world.base, "--knn_generator_path", memory),
        *("--dataset_name", world.windows, "--output_dir", output, "--report_to", "none", *more),
    )


def knn_flags(world, output, *more):
    return (
        *("--model_name_or_path", world.base, "--dataset_name", world.windows, "--do_eval", "--knn"),
        *("--eval_subset", "test", "--val_file", world.dstore("train"), "--index_file", world.index),
        *("--k", 16, "--output_dir", output, *more),
    )


def test_every_combination_equals_the_joint_model_by_itself(llama_world, memory, tmp_path):
    from models import MLPMemory, load_memory

    grid = ("--lmbda", 0, 0.3, 1, "--memory_temp", 0.5, 1, 2)
    command("evaluate_joint", *joint_flags(llama_world, memory, tmp_path, *grid))
    found = results(tmp_path)
    windows = load_windows(llama_world.windows, "test")
    ids, labels = torch.tensor(windows["input_ids"][:]), torch.tensor(windows["labels"][:])
    base, stack = AutoModelForCausalLM.from_pretrained(llama_world.base).eval(), load_memory(memory)
    assert len(found["grid"]) == 9
    for row in found["grid"]:
        with torch.no_grad():
            loss = MLPMemory(base, stack, row["lmbda"], row["memory_temp"])(input_ids=ids, labels=labels).loss.item()
        assert row["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert found["perplexity"] == min(row["perplexity"] for row in found["grid"])
    assert {"lmbda", "memory_temp", "model", "memory", "dataset", "split", "seconds", "versions"} <= found.keys()
    assert found["tokens"] == int((labels[:, 1:] != -100).sum())
    made = read_made(tmp_path / "results.json")
    assert made.kind == "results" and made.rows == found["tokens"]
    ids = {"base": BaseArguments(str(llama_world.base)).base_id(), "windows": read_made(llama_world.windows).id}
    assert made.made_from == ids | {"memory": read_made(memory).id}


def test_stored_scores_stand_for_a_run_of_the_base(llama_world, memory, tmp_path):
    stored = ("--dstore_path", llama_world.dstore("test"), "--knn_temp", 1)
    command("evaluate_joint", *joint_flags(llama_world, memory, tmp_path / "live"))
    command("evaluate_joint", *joint_flags(llama_world, memory, tmp_path / "stored", *stored))
    live, stored = results(tmp_path / "live"), results(tmp_path / "stored")
    assert stored["perplexity"] == pytest.approx(live["perplexity"], rel=1e-3)
    assert stored["base_perplexity"] == pytest.approx(live["base_perplexity"], rel=1e-5)


def test_choice_on_validation_is_used_on_test(llama_world, memory, tmp_path):
    grid = ("--dataset_split_name", "validation", "--lmbda", 0.1, 0.4, "--memory_temp", 1, 2)
    command("evaluate_joint", *joint_flags(llama_world, memory, tmp_path / "v", *grid))
    choice = ("--choose_on", tmp_path / "v/results.json")
    command("evaluate_joint", *joint_flags(llama_world, memory, tmp_path / "t", *choice))
    chosen, used = results(tmp_path / "v"), results(tmp_path / "t")
    assert (used["lmbda"], used["memory_temp"]) == (chosen["lmbda"], chosen["memory_temp"])
    assert len(used["grid"]) == 1
    assert str(tmp_path / "v/results.json") in refused_here("train_base", *knn_flags(llama_world, tmp_path, *choice))


def test_a_memory_of_another_base_is_refused(llama_world, memory, tmp_path):
    other = ("--model_name_or_path", make_base("llama", tmp_path / "other", seed=7, positions=256))
    assert str(memory) in refused_here("evaluate_joint", *joint_flags(llama_world, memory, tmp_path, *other))


def test_knn_lm_equals_the_formula_in_full(llama_world, tmp_path):
    from knn_utils.datastore import Datastore

    command("train_base", *knn_flags(llama_world, tmp_path, "--lmbda", 0.2, 0.6, "--knn_temp", 1, 5))
    train, test = (Datastore.open(llama_world.dstore(split)) for split in ("train", "test"))
    keys, values = np.array(train.keys(0, train.rows), np.float64), train.vals(0, train.rows)
    queries, labels = np.array(test.keys(0, test.rows), np.float64), test.vals(0, test.rows)
    squared = ((queries[:, None] - keys[None]) ** 2).sum(-1)
    nearest = np.argsort(squared, axis=1)[:, :16]
    for row in results(tmp_path)["grid"]:
        weights = np.exp(-(np.take_along_axis(squared, nearest, 1)) / row["knn_temp"])
        weights /= weights.sum(1, keepdims=True)
        knn = (weights * (values[nearest] == labels[:, None])).sum(1)
        mixed = (1 - row["lmbda"]) * np.exp(test.logprob(0, test.rows).astype(np.float64)) + row["lmbda"] * knn
        assert row["perplexity"] == pytest.approx(np.exp(-np.log(mixed).mean()), rel=2e-3)


def test_knn_lm_wrapper_leaves_no_trace(llama_world):
    from knn_utils.knn_lm import KNNLM

    model = AutoModelForCausalLM.from_pretrained(llama_world.base).eval()
    ids = torch.arange(2, 40)[None]
    knn = KNNLM(llama_world.index, llama_world.dstore("train"), k=16, probe=4, lmbda=0.5, knn_temp=2.0)
    with torch.no_grad():
        before = model(ids).logits
        with knn.on(model):
            mixed = model(ids).logits
        assert torch.allclose(mixed.exp().sum(-1), torch.ones(1, 38), atol=1e-4)
        assert not torch.allclose(mixed, torch.log_softmax(before, -1), atol=1e-3)
        assert torch.equal(model(ids).logits, before)
    with knn.on(model):
        made = [model.generate(ids[:, :8], max_new_tokens=6, do_sample=False, use_cache=way) for way in (True, False)]
    assert torch.equal(*made)


@pytest.mark.unit
@pytest.mark.parametrize("family", FAMILIES)
def test_label_log_probabilities_agree_with_golden_logits(family):
    expected = load_file(GOLDEN / family / "expected.safetensors")
    head = torch.eye(97)
    positions, labels = predicted_positions(expected["labels"])
    logits = (expected[f"{name}_logits"].flatten(0, 1)[positions] for name in ("base", "memory"))
    base = label_log_probabilities(next(logits), head, labels)[:, 0]
    memory = label_log_probabilities(next(logits), head, labels, [1.0, 2.0])
    golden = json.loads((GOLDEN / "expected.json").read_text())[family]
    score = MixtureScore([0.25, 0.6], [1.0, 2.0])
    score.add(base, memory)
    found = {(row["lmbda"], row["memory_temp"]): math.log(row["perplexity"]) for row in score.grid()}
    assert found[0.25, 1.0] == pytest.approx(golden["loss_l025_t1"], abs=1e-4)
    assert found[0.6, 2.0] == pytest.approx(golden["loss_l06_t2"], abs=1e-4)


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--lmbda", 1.2), ("--memory_temp", 0), ("--layer_position", 9), ("--per_device_eval_batch_size", 0)],
)
def test_values_that_cannot_be_are_refused_by_name(llama_world, tmp_path, flag, value):
    assert flag in refused_here("evaluate_joint", *joint_flags(llama_world, "x", tmp_path, flag, value))


def test_folders_that_are_no_complete_model_are_refused(llama_world, tmp_path):
    flags = ("--dataset_name", llama_world.windows, "--do_eval", "--output_dir", tmp_path / "out")
    assert str(tmp_path) in refused("-m", "train_base", "--model_name_or_path", tmp_path, *flags)
    folder = make_base("llama", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(folder)
    weights = {name: value for name, value in model.state_dict().items() if "layers.1.mlp" not in name}
    model.save_pretrained(folder, state_dict=weights)
    assert "layers.1.mlp" in refused_here("train_base", "--model_name_or_path", folder, *flags)


# A token's embedding, the head, and sums that float16 cannot hold.
@pytest.fixture(scope="module", params=["model.embed_tokens.weight", "lm_head.weight", "float16"])
def broken(request, llama_world, tmp_path_factory):
    """(flags of a base that gives NaN or infinity, and of a memory that was made for it; the base's folder)."""
    folder = tmp_path_factory.mktemp("broken")
    base = make_base("llama", folder / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        if request.param == "float16":
            model.model.embed_tokens.weight *= 1e7
        else:
            token = load_windows(llama_world.windows, "validation")[0]["input_ids"][3]
            model.state_dict()[request.param][token] = math.nan
    model.save_pretrained(base)
    tiny_memory(model).save_pretrained(folder / "memory")
    dtype = ("--torch_dtype", "float16") if request.param == "float16" else ()
    return ("--model_name_or_path", base, *dtype), ("--knn_generator_path", folder / "memory"), str(base)


@pytest.mark.parametrize("module", ["train_base", "datastore", "knn", "evaluate_joint", "gate", "online"])
def test_a_base_that_gives_nan_or_infinity_is_named(llama_world, broken, tmp_path, monkeypatch, module):
    monkeypatch.setattr("utils.windows.MOST_SHARED", 1)  # the validation text of the world is training text
    base, memory, folder = broken
    windows, output = ("--dataset_name", llama_world.windows), ("--output_dir", tmp_path / "out")
    score = ("train_base", *base, *windows, "--do_eval", *output)
    knn = ("--knn", "--val_file", llama_world.dstore("train"), "--index_file", llama_world.index, "--k", 4)
    flags = {
        "train_base": score,
        "datastore": (*score, "--save_knnlm_dstore", "--save_logprob", "--dstore_dir", tmp_path / "dstore"),
        "knn": (*score, *knn),
        "evaluate_joint": ("evaluate_joint", *base, *memory, *windows, *output, "--dataset_split_name", "validation"),
        "gate": ("training.gate", *base, *memory, *windows),
        "online": ("train_mlpmem_online", *llama_world.trainer(tmp_path / "out"), *base),
    }[module]
    text = refused_here(*flags)
    assert folder in text or (module == "knn" and "check the base" in text)
    assert not (tmp_path / "out" / "results.json").exists()


def test_an_infinite_perplexity_does_not_lose_the_others(llama_world, tmp_path):
    store, index = llama_world.dstore("test"), tmp_path / "test.index"
    command("knn_utils.build_index", "--dstore_path", store, "--index_path", index, "--index_factory", "Flat")
    knn = ("--eval_subset", "train", "--val_file", store, "--index_file", index)  # labels that no neighbour has
    command("train_base", *knn_flags(llama_world, tmp_path, *knn, "--lmbda", 0, 0.1, 1))
    refuse = {"parse_constant": lambda name: pytest.fail(f"{name} is no JSON")}
    json.loads((tmp_path / "results.json").read_text(), **refuse)
    base, mixed, alone = [row["perplexity"] for row in read_json(tmp_path / "results.json")["grid"]]
    assert math.isfinite(base + mixed) and alone == math.inf
    command("train_base", *knn_flags(llama_world, tmp_path / "alone", *knn, "--lmbda", 1))
    chosen = ("--choose_on", tmp_path / "alone" / "results.json")
    command("train_base", *knn_flags(llama_world, tmp_path / "again", *knn, *chosen))
    assert read_json(tmp_path / "again" / "results.json")["perplexity"] == math.inf


@pytest.mark.parametrize("module", ["train_base", "evaluate_joint", "train_mlpmem_online"])
def test_windows_that_the_base_cannot_read_are_refused(llama_world, tmp_path, module):
    flags = {
        "train_base": ("--do_eval", "--output_dir", tmp_path / "out", "--dataset_name", llama_world.windows),
        "evaluate_joint": joint_flags(llama_world, "x", tmp_path / "out"),
        "train_mlpmem_online": llama_world.trainer(tmp_path / "out"),
    }[module]
    short = make_base("llama", tmp_path / "short", positions=32)
    assert "32" in refused_here(module, *flags, "--model_name_or_path", short)
    letter_tokenizer().save_pretrained(tmp_path / "letters")
    other = ("--model_name_or_path", llama_world.base, "--tokenizer_name", tmp_path / "letters")
    assert str(llama_world.windows) in refused_here(module, *flags, *other)


def test_token_ids_beyond_the_vocabulary_are_refused(llama_world, tmp_path):
    small = make_base("llama", tmp_path / "small", vocabulary=50)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (small / name).unlink()
    flags = ("--dataset_name", llama_world.windows, "--do_eval", "--output_dir", tmp_path / "out")
    assert "50" in refused_here("train_base", "--model_name_or_path", small, *flags)


@pytest.mark.unit
def test_a_named_tokenizer_is_read_or_refused(tmp_path):
    folder = make_base("llama", tmp_path / "base")
    arguments = BaseArguments(model_name_or_path=str(folder))
    with pytest.raises(InputError, match=str(tmp_path)):
        dataclasses.replace(arguments, tokenizer_name=str(tmp_path)).open_tokenizer()
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=str(folder)):
        arguments.open_tokenizer()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert arguments.open_tokenizer() is None


@pytest.mark.unit
def test_a_vocabulary_is_resized_to_the_tokenizers_highest_id(tmp_path, capsys):
    folder = make_base("llama", tmp_path, vocabulary=320)
    state = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = state["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 310
    (folder / "tokenizer.json").write_text(json.dumps(state))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = BaseArguments(model_name_or_path=str(folder)).open_base(tokenizer)
    assert base.get_input_embeddings().weight.shape[0] == base.config.vocab_size == 311
    assert "320" in capsys.readouterr().out


@pytest.mark.unit
def test_the_rows_of_added_tokens_are_always_the_same(tmp_path):
    from models.joint_files import resize_to_memory

    folder = make_base("llama", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    first, second = (BaseArguments(model_name_or_path=str(folder)).open_base(tokenizer) for _ in range(2))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    resize_to_memory(loaded, tiny_memory(first), str(folder))
    for other in (second, loaded):
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in first.state_dict().items())


def test_several_splits_are_embedded_in_one_process_and_training_text_without_log_probabilities(llama_world, tmp_path):
    words = ("--model_name_or_path", llama_world.base, "--dataset_name", llama_world.windows, "--do_eval")
    words = (*words, "--eval_subset", "train", "validation", "--output_dir", tmp_path / "out")
    save = ("--save_knnlm_dstore", "--save_logprob", "--dstore_dir", tmp_path)
    command("train_base", *words, *save)
    for split, has_logprob in (("train", False), ("validation", True)):
        found, expected = (
            Datastore.open(folder / llama_world.dstore(split).name) for folder in (tmp_path, llama_world.dstore_dir)
        )
        assert (found.keys() == expected.keys()).all() and (found.vals() == expected.vals()).all()
        assert (found.logprob(0, 1) is not None) == has_logprob
    assert "--eval_subset" in refused_here("train_base", *words)
