"""Training a memory: offline and online, checkpoints, resuming, inputs that do not belong together."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import Command, command, refused, refused_here
from safetensors.torch import load_file
from tiny_models import tiny_base, tiny_memory

from knn_utils.datastore import Datastore, datastore_schema
from knn_utils.parts import datastore_batch, write_stream
from training.arguments import TrainerArguments
from training.memory import MemoryWithLoss
from training.rows import epoch_order
from training.trainer import MemoryTrainer, rows_that_fit
from utils.artefact import read_made
from utils.errors import InputError
from utils.evaluation import rounded
from utils.memories import head_of_base


def record(folder):
    return json.loads((folder / "training.json").read_text())


def losses(folder):
    return [entry["loss"] for entry in record(folder)["log"] if "loss" in entry]


def offline(world, output, *more):
    command("train_mlpmem_offline", *world.trainer(output, "--knn_dstore_path", world.dstore("train"), *more))


def test_offline_training_lowers_the_loss_and_leaves_a_memory(world, tmp_path):
    from models import load_memory

    stored = ("--validation_dstore_path", world.dstore("validation"))
    offline(world, tmp_path, "--learning_rate", 5e-3, "--num_train_epochs", 3, *stored)
    found = losses(tmp_path)
    assert len(found) == 3 * 6
    assert np.mean(found[-3:]) < np.mean(found[:3]) - 0.1
    assert load_memory(tmp_path / "epoch_3").config.num_hidden_layers == 2
    validated = [entry["validation"] for entry in record(tmp_path)["log"] if "validation" in entry]
    assert len(validated) == 3
    assert {"base_perplexity", "memory_perplexity", "joint_perplexity", "lmbda"} <= validated[0].keys()


def test_compiled_blocks_share_their_graph_and_give_the_same_losses(llama_world, tmp_path, monkeypatch):
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    flags = ("--memory_layers", 4, "--max_train_steps", 6, "--micro_batch_rows", 100)
    offline(llama_world, tmp_path / "compiled", "--compile", *flags)
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs < 4  # training and a change from numbers of rows to any number; not one for each block
    offline(llama_world, tmp_path / "plain", *flags)
    assert counters["stats"]["unique_graphs"] == graphs
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)


def test_a_checkpoint_holds_the_memorys_record_and_the_tokenizer(llama_world, tmp_path):
    from transformers import AutoTokenizer

    words = llama_world.trainer(tmp_path, "--max_train_steps", 7)
    command("train_mlpmem_online", *words)
    memories = [tmp_path / name / "knn_generator" for name in ("epoch_1", "epoch_2")]
    first, second = map(read_made, memories)
    assert first.kind == "memory" and (first.settings["step"], second.settings["step"]) == (6, 7)
    assert first.made_from["windows"] == read_made(llama_world.windows).id and first.made_from["base"]
    assert first.made_from["targets"] == read_made(llama_world.targets).id and first.rows
    assert len(AutoTokenizer.from_pretrained(tmp_path / "epoch_2")) == 276
    assert not (tmp_path / "epoch_1" / "state").exists() and (tmp_path / "epoch_2" / "state").exists()


def test_online_and_offline_give_the_same_losses(world, tmp_path):
    offline(world, tmp_path / "offline")
    command("train_mlpmem_online", *world.trainer(tmp_path / "online", "--round_hidden_states"))
    # GPT-2's dropout draws the same numbers from the same seed.
    assert losses(tmp_path / "online") == pytest.approx(losses(tmp_path / "offline"), abs=1e-3)


def test_a_tied_memory_is_saved_without_the_bases_head(world, tmp_path):
    from models import MLPMemory, load_memory

    tied = ("--tie_head", "--init_from_base", "--num_train_epochs", 2, "--learning_rate", 1e-2)
    tied += ("--save_dtype", "bfloat16")
    offline(world, tmp_path / "offline", *tied, "--validation_dstore_path", world.dstore("validation"))
    command("train_mlpmem_online", *world.trainer(tmp_path / "online", *tied, "--round_hidden_states"))
    assert losses(tmp_path / "online") == pytest.approx(losses(tmp_path / "offline"), abs=1e-3)
    assert np.mean(losses(tmp_path / "offline")[6:]) < np.mean(losses(tmp_path / "offline")[:6])
    for folder in (tmp_path / "offline" / "epoch_2", tmp_path / "online" / "epoch_2" / "knn_generator"):
        weights = load_file(folder / "model.safetensors")
        assert not any("head" in name for name in weights)
        assert (
            {weight.dtype for weight in weights.values()} == {load_memory(folder, dtype=None).dtype} == {torch.bfloat16}
        )
    state = load_file(tmp_path / "offline" / "epoch_2" / "state" / "model.safetensors")
    assert len(state) == len(weights) and {weight.dtype for weight in state.values()} == {torch.float32}

    memory = load_memory(tmp_path / "offline" / "epoch_2")
    with pytest.raises(ValueError, match=world.base.name):
        memory(torch.zeros(1, 32))
    joint = MLPMemory.from_pretrained(world.base, tmp_path / "offline" / "epoch_2", lmbda=1.0)
    assert joint.head_of(joint.knn_generator) is joint.get_output_embeddings()
    joint.save_pretrained(tmp_path / "joint")
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(MLPMemory.from_pretrained(tmp_path / "joint")(ids).logits, joint(ids).logits)
    score = ("evaluate_joint", "--model_name_or_path", world.base, "--dataset_name", world.windows, "--lmbda", 0.5, 1)
    score += ("--knn_generator_path", tmp_path / "offline" / "epoch_2", "--dataset_split_name", "validation")
    found = []
    for name, stored in (("live", ()), ("stored", ("--dstore_path", world.dstore("validation")))):
        command(*score, "--output_dir", tmp_path / name, *stored)
        grid = json.loads((tmp_path / name / "results.json").read_text())["grid"]
        found.append([row["perplexity"] for row in grid])
    validated = record(tmp_path / "offline")["log"][-1]["validation"]["memory_perplexity"]
    assert found[0] == pytest.approx(found[1], rel=1e-3) and found[1][1] == pytest.approx(validated, rel=0.01)


def test_tied_offline_training_opens_no_base(llama_world, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainerArguments, "open_base", None)
    offline(llama_world, tmp_path, "--tie_head", "--max_train_steps", 1)
    assert len(losses(tmp_path)) == 1


@pytest.mark.unit
@pytest.mark.parametrize("shard", ["1GB", "10kB"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_a_tied_head_is_read_from_the_bases_files(family, shard, tmp_path):
    base = tiny_base(family)
    base.save_pretrained(tmp_path, max_shard_size=shard)
    arguments, head = TrainerArguments(str(tmp_path)), base.get_output_embeddings().weight
    for rows, opened in ((97, False), (90, False), (98, True)):  # a base with fewer rows is opened, which adds them
        calls, config = [], copy.deepcopy(base.config)
        config.vocab_size = rows
        found = head_of_base(arguments, config, lambda calls=calls: calls.append(1) or base)
        assert torch.equal(found, head[:rows]) and bool(calls) == opened


@pytest.mark.unit
def test_a_head_with_a_bias_cannot_be_tied(tmp_path):
    base = tiny_base("phi")
    base.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="phi"):
        head_of_base(TrainerArguments(str(tmp_path)), base.config, lambda: base)


def test_micro_batches_do_not_change_the_losses(llama_world, tmp_path):
    offline(llama_world, tmp_path / "plain")
    accumulated = ("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 4, "--micro_batch_rows", 50)
    offline(llama_world, tmp_path / "accumulated", *accumulated)
    assert losses(tmp_path / "accumulated") == pytest.approx(losses(tmp_path / "plain"), abs=1e-4)


def test_rows_that_fill_up_a_micro_batch_do_not_change_the_losses(llama_world, tmp_path, monkeypatch):
    flags = ("--per_device_train_batch_size", 11)  # of 32 rows each
    offline(llama_world, tmp_path / "filled", *flags)
    sizes = set()
    for module in ("rows", "trainer"):
        monkeypatch.setattr(f"training.{module}.rounded", lambda count: sizes.add(count) or count)
    offline(llama_world, tmp_path / "plain", *flags)
    assert any(rounded(size) > size for size in sizes)
    assert losses(tmp_path / "filled") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)


def test_dropout_changes_training_and_not_validation(llama_world, tmp_path):
    stored = ("--validation_dstore_path", llama_world.dstore("validation"))
    for name, rate in (("whole", 0), ("dropped", 0.5)):
        offline(llama_world, tmp_path / name, "--memory_dropout", rate, "--learning_rate", 1e-12, *stored)
    pairs = zip(losses(tmp_path / "whole"), losses(tmp_path / "dropped"), strict=True)
    assert all(whole != dropped for whole, dropped in pairs)
    # At this learning rate the weights stay as they began, so the same memory is scored.
    ends = [record(tmp_path / name)["log"][-1]["validation"] for name in ("whole", "dropped")]
    assert ends[0] == pytest.approx(ends[1], rel=1e-6)


def test_the_number_of_steps_overrides_the_epochs(llama_world, tmp_path):
    few = ("--per_device_train_batch_size", 48, "--num_train_epochs", 3, "--max_train_steps", 12)
    offline(llama_world, tmp_path, *few, "--validation_split_name", "none")
    found = record(tmp_path)
    assert found["steps_per_epoch"] == 2 and found["step"] == len(losses(tmp_path)) == 12
    assert found["checkpoint"] == "epoch_6" and found["log"][-1]["learning_rate"] == pytest.approx(5e-5 / 12)


@pytest.mark.unit
def test_biases_do_not_decay(tmp_path):
    from accelerate import Accelerator

    memory = tiny_memory(tiny_base("gpt2"))
    biases = sum(name.endswith("bias") for name, _ in memory.named_parameters())
    arguments = TrainerArguments(weight_decay=0.1, output_dir=str(tmp_path), seed=0)
    source = SimpleNamespace(counts=np.array([3]))
    trainer = MemoryTrainer(memory, source, arguments, None, Accelerator(cpu=True, mixed_precision="no"))
    counts = {group["weight_decay"]: len(group["params"]) for group in trainer.optimizer.param_groups}
    assert counts == {0.1: len(list(memory.parameters())) - biases, 0.0: biases} and biases


def test_a_stored_datastore_validates_as_the_base_does(llama_world, tmp_path):
    stored = ("--validation_dstore_path", llama_world.dstore("validation"))
    for name, more in (("base", ()), ("stored", stored)):
        command("train_mlpmem_online", *llama_world.trainer(tmp_path / name, "--max_train_steps", 2, *more))
    by_base, by_store = (record(tmp_path / name)["log"][-1]["validation"] for name in ("base", "stored"))
    assert by_base == pytest.approx(by_store, rel=1e-5) and by_base["tokens"] == 703


def test_without_validation_offline_training_opens_no_base(llama_world, tmp_path):
    base = shutil.copytree(llama_world.base, tmp_path / "base")
    weights = base / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))  # of the same name and size, but no weights
    without = ("--model_name_or_path", base, "--validation_split_name", "none", "--max_train_steps", 1)
    offline(llama_world, tmp_path / "out", *without)
    assert len(losses(tmp_path / "out")) == 1


@pytest.mark.parametrize("tied", [(), ("--tie_head", "--sampled_vocabulary", 40, "--micro_batch_rows", 16)])
def test_a_killed_run_continues_to_the_same_losses_and_weights(llama_world, tmp_path, tied):
    more = ("--knn_dstore_path", llama_world.dstore("train"), "--checkpointing_steps", 2, "--num_train_epochs", 4)
    more += ("--memory_dropout", 0.2, *tied)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    command("train_mlpmem_offline", *llama_world.trainer(undisturbed, *more))
    words = llama_world.trainer(killed, *more)
    process = Command(tmp_path / "log", "train_mlpmem_offline", *words)
    while process.process.is_alive() and not any(killed.glob("step_[48]")):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not record(killed)["complete"]
    assert "continuing from" in Command(tmp_path / "log", "train_mlpmem_offline", *words).done()
    assert losses(killed) == pytest.approx(losses(undisturbed), abs=1e-6)
    # Another process may round otherwise; one step moves a weight by about fifty times the tolerance.
    found, expected = (load_file(folder / "epoch_4" / "model.safetensors") for folder in (killed, undisturbed))
    assert all(torch.allclose(found[name], expected[name], rtol=0, atol=1e-6) for name in expected)
    assert "nothing to do" in Command(tmp_path / "log", "train_mlpmem_offline", *words).done()


def test_a_last_window_of_one_token_is_skipped(llama_world, tmp_path):
    import datasets

    windows = datasets.load_from_disk(str(llama_world.windows))["train"]
    number, end = len(windows), windows[-1]["dstore_range"][1]
    last = windows[-1] | {"labels": [3] + [-100] * 63, "dstore_range": [end, end]}
    longer = datasets.concatenate_datasets([windows, datasets.Dataset.from_list([last], features=windows.features)])
    datasets.DatasetDict({"train": longer}).save_to_disk(str(tmp_path / "windows"))
    # A seed with which it would be a step of its own.
    seed = next(seed for seed in range(10_000) if epoch_order(number + 1, seed, 0)[-1] == number)
    more = ("--dataset_name", tmp_path / "windows", "--per_device_train_batch_size", number, "--seed", seed)
    offline(llama_world, tmp_path / "out", *more)
    assert len(losses(tmp_path / "out")) == 1


class Card(str):
    """The CPU's device, which says that it is a GPU."""

    type = "cuda"


@pytest.mark.unit
@pytest.mark.parametrize("most", [400, 300])
def test_the_rows_per_forward_pass_are_those_that_fit(most, monkeypatch):
    module = MemoryWithLoss(tiny_memory(tiny_base("llama")), 0.5)
    forward, tried = module.memory.hidden, []

    def hidden(inputs):
        tried.append(len(inputs))
        if len(inputs) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return forward(inputs)

    monkeypatch.setattr(module.memory, "hidden", hidden)
    monkeypatch.setattr("training.trainer.GPU_RESERVE", 1)
    monkeypatch.setattr("training.trainer.GPU_ROWS", 400)
    accelerator = SimpleNamespace(device=Card("cpu"), distributed_type="NO", num_processes=2)
    accelerator.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    accelerator.gather = lambda rows: torch.stack([rows, rows - 8])  # another rank fits 8 fewer
    found = rows_that_fit(module, accelerator)
    assert found == tried[-1] - 8 and 0.85 * most < tried[-1] <= most
    assert all(weight.grad is None for weight in module.parameters())


class TestRefused:
    def refuse(self, world, tmp_path, **changes):
        words = world.trainer(tmp_path / "out", "--knn_dstore_path", world.dstore("train"))
        words += [word for name, value in changes.items() for word in (f"--{name}", value)]
        return refused_here("train_mlpmem_offline", *words)

    def test_targets_of_another_split(self, llama_world, tmp_path):
        text = self.refuse(llama_world, tmp_path, dataset_split_name="test")
        assert str(llama_world.targets) in text

    @pytest.mark.parametrize(("name", "named"), [("labels", "row 7"), ("nan", "windows")])
    def test_a_datastore_that_is_wrong(self, llama_world, tmp_path, name, named):
        store = Datastore.open(llama_world.dstore("train"))
        keys, vals = np.array(store.keys(0, store.rows)), store.vals(0, store.rows).copy()
        if name == "labels":
            vals[[7, 9]] += 1
        else:
            keys[5] = np.nan
        path = tmp_path / "other.arrow"
        write_stream(path, datastore_schema(32), [datastore_batch(keys, vals)])
        assert named in self.refuse(llama_world, tmp_path, knn_dstore_path=path)

    def test_a_diverging_loss_keeps_the_last_good_checkpoint(self, llama_world, tmp_path):
        changes = {"learning_rate": 1e30, "max_grad_norm": 1e30, "checkpointing_steps": 1}
        assert "--learning_rate" in self.refuse(llama_world, tmp_path, **changes)
        assert all(
            torch.isfinite(value).all() for value in load_file(next(tmp_path.glob("out/step_*/*.safetensors"))).values()
        )

    @pytest.mark.parametrize(("name", "value"), [("alpha", 1.5), ("num_train_epochs", 0), ("knn_save_path", "")])
    def test_values_that_train_nothing_or_something_else(self, llama_world, tmp_path, name, value):
        assert f"--{name}" in self.refuse(llama_world, tmp_path, **{name: value})

    def test_bad_input_ends_a_process_in_one_line(self, llama_world, tmp_path):
        words = llama_world.trainer(tmp_path, "--base_model_name", "huge")
        assert "--base_model_name" in refused("-m", "train_mlpmem_offline", *words)
