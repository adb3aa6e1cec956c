"""A run that is continued: every setting is applied, or another value of it is refused and nothing is recorded."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from conftest import make_text
from harness import command, refused_here
from tiny_models import make_base

from train_mlpmem_offline import OfflineArguments
from train_mlpmem_online import OnlineArguments
from training.arguments import TrainerArguments
from training.trainer import LENGTH

# Another value of each flag of the trainers that decides what is trained, and how it is called where it is refused.
DECISIVE = {
    "learning_rate": (1e-3, "learning_rate"),
    "weight_decay": (0.1, "weight_decay"),
    "lr_scheduler_type": ("constant", "lr_scheduler_type"),
    "num_warmup_steps": (2, "num_warmup_steps"),
    "alpha": (0.9, "alpha"),
    "seed": (4, "seed"),
    "max_grad_norm": (9, "max_grad_norm"),
    "per_device_train_batch_size": (32, "windows_per_step"),
    "gradient_accumulation_steps": (2, "windows_per_step"),
    "memory_layers": (3, "data.layers"),
    "memory_dropout": (0.1, "data.dropout"),
    "init_from_base": (True, "data.start"),
    "init_lm_head": (True, "data.start"),
    "mixed_precision": ("bf16", "--mixed_precision bf16"),
    "knn_save_path": ("{other}/targets", "data.targets.k"),
    # Refused by what was made from the one that is given: the datastore, the targets.
    "knn_dstore_path": ("{world}/dstore/dstore_llama_test_32.arrow", "rows"),
    "model_name_or_path": ("{other}/base", "a base with the checksum"),
    "dataset_name": ("{other}/windows", "window"),
    "dataset_split_name": ("test", "rows"),
    "layer_position": (0, "--layer_position"),
}
# What only says how the same is computed, held, shown, saved or scored meanwhile; another value is taken.
FREE = {
    *("output_dir", "overwrite", "resume_from_checkpoint", "checkpointing_steps", "logging_steps", "loss"),
    *("micro_batch_rows", "per_device_eval_batch_size", "base_batch_size", "max_eval_samples"),
    *("validation_split_name", "validation_dstore_path", "with_tracking", "report_to", "run_name", "project_name"),
    *("device_map", "trust_remote_code"),
    "base_model_name",  # a number of layers and a width, which the memory's weights show
    # The base's weights are compared online, its tokenizer's length by the memory's weights.
    *("torch_dtype", "load_in_4bit", "load_in_8bit", "tokenizer_name"),
}


def flags(world, output, **changes):
    words = world.trainer(output, "--knn_dstore_path", world.dstore("train"), "--validation_split_name", "none")
    given = dict(zip(words[::2], words[1::2], strict=True)) | {"--per_device_train_batch_size": 64}
    return [word for pair in (given | {f"--{k}": v for k, v in changes.items()}).items() for word in pair]


@pytest.fixture(scope="module")
def begun(llama_world, tmp_path_factory):
    """(a finished epoch, files of another base and other windows)."""
    folder = tmp_path_factory.mktemp("begun")
    command("train_mlpmem_offline", *flags(llama_world, folder / "run"))
    make_base("llama", folder / "base", seed=7)
    text = make_text(folder / "text.txt", lines=400)
    tokens = ("--dataset_name", text, "--tokenizer_path", llama_world.base, "--output_dir", folder / "windows")
    command("utils.preprocess_dataset", *tokens, "--block_size", 64, "--stride", 32)
    stores = ("--dstore_path", llama_world.dstore("train"), "--index_path", llama_world.index)
    command("knn_utils.saveKNNMulti", *stores, "--output_path", folder / "targets", "--k", 9)
    return folder / "run", folder


def test_every_flag_of_the_trainers_is_looked_at():
    kinds = (TrainerArguments, OfflineArguments, OnlineArguments)
    names = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    assert names == DECISIVE.keys() | FREE | set(LENGTH) | {"round_hidden_states"}


@pytest.mark.parametrize("where", ["the same folder", "another folder"])
@pytest.mark.parametrize("name", DECISIVE)
def test_a_run_is_not_continued_with_another(llama_world, begun, tmp_path, name, where):
    run, other = begun
    value, expected = DECISIVE[name]
    changes = {name: str(value).format(other=other, world=llama_world.folder)}
    if where == "the same folder":
        shutil.copytree(run, tmp_path / "out")
    else:
        changes["resume_from_checkpoint"] = run / "epoch_1"
    before = sorted(tmp_path.rglob("*.json"))
    assert expected in refused_here("train_mlpmem_offline", *flags(llama_world, tmp_path / "out", **changes))
    assert sorted(tmp_path.rglob("*.json")) == before


def test_a_checkpoint_of_another_run_is_refused_in_a_folder_that_agrees_with_the_flags(llama_world, begun, tmp_path):
    command("train_mlpmem_offline", *flags(llama_world, tmp_path, learning_rate=1e-3, max_train_steps=1))
    record = json.loads((tmp_path / "training.json").read_text())
    (tmp_path / "training.json").write_text(json.dumps(record | {"complete": False}))
    changes = {"learning_rate": 1e-3, "max_train_steps": 1, "resume_from_checkpoint": begun[0] / "epoch_1"}
    text = refused_here("train_mlpmem_offline", *flags(llama_world, tmp_path, **changes))
    assert "learning_rate 5e-05 there, 0.001 now" in text


def test_another_folder_may_go_on_for_longer_which_is_applied_and_recorded(llama_world, begun, tmp_path):
    changes = {"num_train_epochs": 2, "resume_from_checkpoint": begun[0] / "epoch_1"}
    command("train_mlpmem_offline", *flags(llama_world, tmp_path, **changes))
    record = json.loads((tmp_path / "training.json").read_text())
    steps = [entry for entry in record["log"] if "loss" in entry]
    assert record["settings"]["num_train_epochs"] == 2 and record["step"] == 2 * record["steps_per_epoch"] == len(steps)
    # The second half of a linear schedule over all steps, not the end of the first run's.
    assert steps[-1]["learning_rate"] == pytest.approx(5e-5 / len(steps))


def test_rounded_hidden_states_are_not_continued_with_whole_ones(llama_world, tmp_path):
    words = flags(llama_world, tmp_path, max_train_steps=1)
    at = words.index("--knn_dstore_path")
    del words[at : at + 2]
    command("train_mlpmem_online", *words, "--round_hidden_states")
    assert "data.rounded" in refused_here("train_mlpmem_online", *words)


# Fine-tuning, by the Trainer

TUNING = {
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 9,
    "lr_scheduler_type": "constant",
    "warmup_steps": 3,
    "seed": 6,
    "data_seed": 7,
    "optim": "adafactor",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_train_samples": 20,
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5,
    "dataloader_drop_last": True,
    "train_sampling_strategy": "sequential",
    "lr_scheduler_kwargs": '{"last_epoch": 1}',
    "optim_args": "fused=False",
    "bf16": True,
}


@pytest.fixture(scope="module")
def tuned(llama_world, tmp_path_factory):
    output = tmp_path_factory.mktemp("tuned") / "run"
    command("train_base", *tuning(llama_world, output, save_steps=2))
    return output


def tuning(world, output, **changes):
    given = {"model_name_or_path": world.base, "dataset_name": world.windows, "output_dir": output, "seed": 5}
    given |= {"per_device_train_batch_size": 16, "learning_rate": 5e-3, "num_train_epochs": 1, "logging_steps": 1}
    words = [word for name, value in (given | changes).items() for word in (f"--{name}", value)]
    return [*words, "--do_train", "--use_cpu"]


@pytest.mark.parametrize("name", TUNING)
def test_fine_tuning_is_not_continued_with_another(llama_world, tuned, tmp_path, name):
    for output, more in ((tuned, {}), (tmp_path / "out", {"resume_from_checkpoint": tuned / "checkpoint-2"})):
        text = refused_here("train_base", *tuning(llama_world, output, **{name: TUNING[name]}, **more))
        assert {"max_train_samples": "windows"}.get(name, name) in text
    assert not (tmp_path / "out" / "finetune.json").exists()


def test_a_checkpoint_without_a_record_tells_the_settings_of_its_optimizer(llama_world, tuned, tmp_path):
    checkpoint = shutil.copytree(tuned / "checkpoint-2", tmp_path / "checkpoint-2")
    goes_on = {"resume_from_checkpoint": checkpoint, "num_train_epochs": 2}
    refused = tuning(llama_world, tmp_path / "out", learning_rate=1e-3, **goes_on)
    assert "learning_rate 0.005 there, 0.001 now" in refused_here("train_base", *refused)
    command("train_base", *tuning(llama_world, tmp_path / "out", **goes_on))
    record = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert record["complete"] and record["settings"]["num_train_epochs"] == 2
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["param_groups"][0]
    assert state["initial_lr"] == record["settings"]["learning_rate"]
