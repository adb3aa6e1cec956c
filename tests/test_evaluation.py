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

from utils.errors import InputError
from utils.evaluation import MixtureScore, label_log_probabilities, predicted_positions


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def memory(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("memory")
    more = ("--knn_dstore_path", world.dstore("train"), "--validation_split_name", "none", "--learning_rate", 1e-2)
    command("train_mlpmem_offline", *world.trainer(output, *more))
    return output / "epoch_1"


def joint_flags(world, memory, output, *more):
    return (
        *("--do_test", "--model_name_or_path", world.base, "--knn_generator_path", memory),
        *("--dataset_name", world.windows, "--output_dir", output, "--report_to", "none", *more),
    )


@pytest.mark.unit
@pytest.mark.parametrize("vocabulary", [50_257, 256_000])
def test_logits_of_a_large_vocabulary_come_in_blocks_of_bytes_away_from_the_cpu_too(vocabulary):
    class Largest(torch.overrides.TorchFunctionMode):
        size = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            self.size = max(self.size, result.nbytes if isinstance(result, torch.Tensor) else 0)
            return result

    hidden, weight = torch.empty(4096, 16, device="meta"), torch.empty(vocabulary, 16, device="meta")
    labels = torch.empty(4096, dtype=torch.int64, device="meta")
    with Largest() as largest:
        assert label_log_probabilities(hidden, weight, labels, (1.0, 2.0)).shape == (4096, 2)
    assert 1 << 26 < largest.size <= 1 << 29


def test_every_combination_equals_the_joint_model_scored_by_itself(world, memory, tmp_path):
    from transformers import AutoModelForCausalLM

    from models import MLPMemory, load_memory
    from utils.loading import load_windows

    command("evaluate_joint", *joint_flags(world, memory, tmp_path, "--lmbda", 0, 0.3, 1, "--knn_temp", 0.5, 1, 2))
    found = results(tmp_path)
    assert len(found["grid"]) == 9
    windows = load_windows(world.windows, "test")
    ids, labels = torch.tensor(windows["input_ids"][:]), torch.tensor(windows["labels"][:])
    base, stack = AutoModelForCausalLM.from_pretrained(world.base).eval(), load_memory(memory).eval()
    for row in found["grid"]:
        joint = MLPMemory(base, stack, row["lmbda"], row["knn_temp"])
        with torch.no_grad():
            loss = joint(input_ids=ids, labels=labels).loss.item()
        assert row["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert found["perplexity"] == min(row["perplexity"] for row in found["grid"])
    assert {"tokens", "lmbda", "knn_temp", "model", "memory", "dataset", "split", "seconds", "versions"} <= found.keys()
    assert found["tokens"] == int((labels[:, 1:] != -100).sum())


def test_stored_scores_stand_for_a_run_of_the_base(world, memory, tmp_path):
    command("evaluate_joint", *joint_flags(world, memory, tmp_path / "live"))
    command("evaluate_joint", *joint_flags(world, memory, tmp_path / "stored", "--dstore_path", world.dstore("test")))
    live, stored = results(tmp_path / "live"), results(tmp_path / "stored")
    assert stored["perplexity"] == pytest.approx(live["perplexity"], rel=1e-3)
    assert stored["base_perplexity"] == pytest.approx(live["base_perplexity"], rel=1e-5)


def test_choice_on_validation_is_used_on_test(world, memory, tmp_path):
    grid = ("--lmbda", 0.1, 0.4, "--knn_temp", 1, 2)
    command("evaluate_joint", *joint_flags(world, memory, tmp_path / "v", "--dataset_split_name", "validation", *grid))
    command("evaluate_joint", *joint_flags(world, memory, tmp_path / "t", "--choose_on", tmp_path / "v/results.json"))
    chosen, used = results(tmp_path / "v"), results(tmp_path / "t")
    assert (used["lmbda"], used["knn_temp"]) == (chosen["lmbda"], chosen["knn_temp"])
    assert len(used["grid"]) == 1


def knn_flags(world, output, *more):
    return (
        *("--model_name_or_path", world.base, "--dataset_name", world.windows, "--do_eval", "--knn"),
        *("--eval_subset", "test", "--val_file", world.dstore("train"), "--index_file", world.index),
        *("--k", 16, "--output_dir", output, *more),
    )


def test_knn_lm_equals_the_formula_worked_out_in_full(world, tmp_path):
    from knn_utils.datastore import Datastore

    command("train_base", *knn_flags(world, tmp_path, "--lmbda", 0.2, 0.6, "--knn_temp", 1, 5))
    train, test = (Datastore.open(world.dstore(split)) for split in ("train", "test"))
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
    from transformers import AutoModelForCausalLM

    from knn_utils.knn_lm import KNNLM

    model = AutoModelForCausalLM.from_pretrained(llama_world.base).eval()
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        before = model(ids).logits
        knn = KNNLM(llama_world.index, llama_world.dstore("train"), k=16, probe=4, lmbda=0.5, knn_temp=2.0)
        with knn.on(model):
            mixed = model(ids).logits
        after = model(ids).logits
    assert torch.allclose(mixed.exp().sum(-1), torch.ones(1, 38), atol=1e-4)
    assert not torch.allclose(mixed, torch.log_softmax(before, -1), atol=1e-3)
    assert torch.equal(before, after)
    with pytest.raises(KeyError), knn.on(model):
        raise KeyError
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    prompt = ids[:, :8]
    with knn.on(model):
        mixed = model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=True)
        whole = model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(mixed, whole)


@pytest.mark.unit
@pytest.mark.parametrize("family", FAMILIES)
def test_label_log_probabilities_agree_with_golden_logits(family):
    expected = load_file(GOLDEN / family / "expected.safetensors")
    head = torch.eye(97)
    mask, labels = predicted_positions(expected["labels"])
    base = label_log_probabilities(expected["base_logits"][mask], head, labels)[:, 0]
    memory = label_log_probabilities(expected["memory_logits"][mask], head, labels, [1.0, 2.0])
    golden = json.loads((GOLDEN / "expected.json").read_text())[family]
    score = MixtureScore([0.25, 0.6], [1.0, 2.0])
    score.add(base, memory)
    found = {(row["lmbda"], row["knn_temp"]): math.log(row["perplexity"]) for row in score.grid()}
    assert found[0.25, 1.0] == pytest.approx(golden["loss_l025_t1"], abs=1e-4)
    assert found[0.6, 2.0] == pytest.approx(golden["loss_l06_t2"], abs=1e-4)


class TestRefused:
    @pytest.mark.parametrize(
        ("flag", "value", "says"),
        [
            *(("--lmbda", value, "--lmbda") for value in (1.2, -0.1)),
            *(("--knn_temp", value, "--knn_temp") for value in (0, "nan")),
            ("--dataset_split_name", "exam", "exam; it has train, validation, test"),
            *(
                (name, value, name)
                for name in ("--per_device_eval_batch_size", "--max_eval_samples")
                for value in (0, -1)
            ),
            ("--layer_position", 9, "--layer_position 9"),
        ],
    )
    def test_values_that_cannot_be(self, llama_world, tmp_path, flag, value, says):
        assert says in refused_here("evaluate_joint", *joint_flags(llama_world, "x", tmp_path, flag, value))

    def test_more_neighbours_than_rows(self, llama_world, tmp_path):
        assert "--k 100000" in refused_here("train_base", *knn_flags(llama_world, tmp_path, "--k", 100000))

    def test_stored_scores_beside_what_needs_the_base(self, llama_world, tmp_path):
        stored = ("--dataset_name", llama_world.windows, "--dstore_path", llama_world.dstore("test"))
        for more in ("--do_train", "--save_knnlm_dstore"):
            assert "--dstore_path: " in refused_here("train_base", *stored, more, "--output_dir", tmp_path)

    def test_a_folder_that_is_no_model(self, llama_world, tmp_path):
        flags = ("--dataset_name", llama_world.windows, "--do_eval", "--output_dir", tmp_path)
        line = refused("-m", "train_base", "--model_name_or_path", tmp_path, *flags)
        assert str(tmp_path) in line and "config.json" in line

    def test_a_family_without_a_stack(self, llama_world, tmp_path):
        from transformers import AutoConfig

        AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2, vocab_size=276).save_pretrained(tmp_path)
        text = refused_here(
            "train_mlpmem_offline",
            *("--model_name_or_path", tmp_path, "--tokenizer_name", llama_world.base),
            *("--dataset_name", llama_world.windows, "--knn_save_path", llama_world.targets),
            *("--knn_dstore_path", llama_world.dstore("train"), "--output_dir", tmp_path / "out"),
        )
        assert "mamba" in text

    def test_token_ids_beyond_the_vocabulary(self, llama_world, tmp_path):
        from tiny_models import make_base

        small = make_base("llama", tmp_path / "small", vocabulary=50)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (small / name).unlink()
        text = refused_here(
            "train_base",
            *("--model_name_or_path", small, "--dataset_name", llama_world.windows, "--do_eval"),
            *("--output_dir", tmp_path / "out"),
        )
        assert "token id" in text and "50" in text

    @pytest.mark.parametrize("module", ["train_base", "evaluate_joint", "train_mlpmem_online"])
    def test_windows_of_another_tokenizer_or_longer_than_the_positions(self, llama_world, tmp_path, module):
        from tiny_models import letter_tokenizer, make_base

        flags = {
            "train_base": ("--do_eval", "--output_dir", tmp_path / "out", "--dataset_name", llama_world.windows),
            "evaluate_joint": joint_flags(llama_world, "x", tmp_path / "out"),
            "train_mlpmem_online": llama_world.trainer(tmp_path / "out"),
        }[module]
        short = make_base("llama", tmp_path / "short", positions=32)
        assert "has 32 positions" in refused_here(module, *flags, "--model_name_or_path", short)
        letter_tokenizer().save_pretrained(tmp_path / "letters")
        other = ("--model_name_or_path", llama_world.base, "--tokenizer_name", tmp_path / "letters")
        text = refused_here(module, *flags, *other)
        assert "another tokenizer" in text and str(llama_world.base) in text

    def test_windows_whose_rows_do_not_follow_each_other(self, llama_world, tmp_path):
        import datasets

        splits = datasets.load_from_disk(str(llama_world.windows))
        gap = splits["test"].select([0, 2, 3])
        datasets.DatasetDict({"test": gap}).save_to_disk(str(tmp_path / "gap"))
        base = ("--model_name_or_path", llama_world.base, "--dataset_name", tmp_path / "gap", "--eval_subset", "test")
        more = ("--save_knnlm_dstore", "--dstore_dir", tmp_path / "dstore", "--output_dir", tmp_path / "out")
        assert "window 1" in refused_here("train_base", *base, *more)
        assert not list(tmp_path.rglob("part-*"))


def test_a_padded_vocabulary_is_cut_to_the_tokenizer_and_that_is_said(llama_world, tmp_path, capsys):
    from tiny_models import make_base

    padded = make_base("llama", tmp_path / "padded", vocabulary=300)
    command(
        "train_base",
        *("--model_name_or_path", padded, "--dataset_name", llama_world.windows, "--do_eval"),
        *("--eval_subset", "test", "--output_dir", tmp_path / "out"),
    )
    assert "300 cut to the tokenizer's 276" in capsys.readouterr().out


@pytest.mark.unit
def test_a_tokenizer_that_is_named_or_there_is_read_or_refused(tmp_path):
    from tiny_models import make_base

    from utils.loading import BaseArguments

    folder = make_base("llama", tmp_path / "base")
    arguments = BaseArguments(model_name_or_path=str(folder))
    for name in ("no/such/tokenizer", tmp_path):
        with pytest.raises(InputError, match=f"{name}: .*no tokenizer"):
            dataclasses.replace(arguments, tokenizer_name=str(name)).open_tokenizer()
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="base: no tokenizer could be loaded"):
        arguments.open_tokenizer()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert arguments.open_tokenizer() is None


@pytest.mark.unit
def test_a_vocabulary_whose_ids_have_holes_keeps_its_highest_id(tmp_path):
    from tiny_models import make_base
    from transformers import AutoTokenizer

    from utils.loading import BaseArguments

    folder = make_base("llama", tmp_path, vocabulary=320)
    state = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = state["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 310
    (folder / "tokenizer.json").write_text(json.dumps(state))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (len(tokenizer), max(tokenizer.get_vocab().values())) == (276, 310)
    base = BaseArguments(model_name_or_path=str(folder)).open_base(tokenizer)
    assert base.get_input_embeddings().weight.shape[0] == base.config.vocab_size == 311


@pytest.mark.unit
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_rows_of_added_tokens_are_the_same_at_every_start_and_in_every_stage(tmp_path, family):
    from tiny_models import make_base, tiny_memory
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from models.joint_base import resize_to_memory
    from utils.loading import BaseArguments, model_fingerprint

    folder = make_base(family, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    first, second = (BaseArguments(model_name_or_path=str(folder)).open_base(tokenizer) for _ in range(2))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    resize_to_memory(loaded, tiny_memory(first), str(folder))
    assert model_fingerprint(first) == model_fingerprint(second) == model_fingerprint(loaded)
    for other in (second, loaded):
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in first.state_dict().items())
    for layer in (first.get_input_embeddings(), first.get_output_embeddings()):
        assert torch.allclose(layer.weight[276], layer.weight[:276].mean(0), atol=1e-6)
