"""A run that is continued: another value of a setting that decides the memory is refused, and nothing is changed."""

from __future__ import annotations

import gc
import json
import shutil

import pytest
import torch
from conftest import make_text
from harness import command, refused_here

# Another value of each flag that decides the memory, and the name under which it is refused.
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
    "memory_layers": (3, "layers"),
    "memory_dropout": (0.1, "memory_dropout"),
    "init_from_base": (True, "init_from_base"),
    "init_lm_head": (True, "init_lm_head"),
    "tie_head": (True, "tie_head"),
    "sampled_vocabulary": (9, "sampled_vocabulary"),
    "save_dtype": ("bfloat16", "save_dtype"),
    "knn_save_path": ("{other}/targets", "targets"),
    # Refused since targets and datastore were made from the others.
    "knn_dstore_path": ("{world}/dstore/dstore_llama_test_32.arrow", "rows"),
    "model_name_or_path": ("{other}/base", "base"),
    "dataset_name": ("{other}/windows", "windows"),
    "dataset_split_name": ("test", "rows"),
    "layer_position": (0, "layer_position"),
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
    config = shutil.copytree(llama_world.base, folder / "base") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-3}))
    text = make_text(folder / "text.txt", lines=400)
    tokens = ("--dataset_name", text, "--tokenizer_path", llama_world.base, "--output_dir", folder / "windows")
    command("utils.preprocess_dataset", *tokens, "--block_size", 64, "--stride", 32)
    stores = ("--dstore_path", llama_world.dstore("train"), "--index_path", llama_world.index)
    command("knn_utils.saveKNNMulti", *stores, "--output_path", folder / "targets", "--k", 9)
    return folder / "run", folder


def test_a_run_is_not_continued_with_other_settings(llama_world, begun, tmp_path):
    run, other = begun
    shutil.copytree(run, tmp_path / "same")
    before = sorted(tmp_path.rglob("*"))
    for name, (value, expected) in DECISIVE.items():
        changes = {name: str(value).format(other=other, world=llama_world.folder)}
        text = refused_here("train_mlpmem_offline", *flags(llama_world, tmp_path / "same", **changes))
        assert expected in text
        gc.collect()  # the folder's lock
        changes["resume_from_checkpoint"] = run / "epoch_1"
        text = refused_here("train_mlpmem_offline", *flags(llama_world, tmp_path / "another", **changes))
        assert expected in text
    assert sorted(tmp_path.rglob("*")) == before
    command("train_mlpmem_offline", *flags(llama_world, tmp_path / "same", alpha=0.9, overwrite=True))
    assert json.loads((tmp_path / "same" / "training.json").read_text())["settings"]["alpha"] == 0.9


def test_another_folder_may_go_on_for_longer(llama_world, begun, tmp_path):
    changes = {"num_train_epochs": 2, "resume_from_checkpoint": begun[0] / "epoch_1"}
    command("train_mlpmem_offline", *flags(llama_world, tmp_path, **changes))
    record = json.loads((tmp_path / "training.json").read_text())
    steps = [entry for entry in record["log"] if "loss" in entry]
    assert record["settings"]["num_train_epochs"] == 2 and record["step"] == 2 * record["steps_per_epoch"] == len(steps)
    # The second half of a linear schedule over all steps, not the end of the first run's.
    rates = [entry["learning_rate"] for entry in steps[len(steps) // 2 :]]
    assert rates == pytest.approx([5e-5 * left / len(steps) for left in range(len(rates), 0, -1)])


def test_the_end_of_a_run_in_another_folder_is_a_checkpoint(llama_world, begun, tmp_path):
    from models import load_memory

    changes = {"resume_from_checkpoint": begun[0] / "epoch_1"}
    command("train_mlpmem_offline", *flags(llama_world, tmp_path, **changes))
    first, second = (load_memory(folder / "epoch_1").state_dict() for folder in (begun[0], tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_seed_is_drawn_and_kept_where_none_is_given(llama_world, tmp_path):
    words = flags(llama_world, tmp_path, max_train_steps=1)
    del words[words.index("--seed") : words.index("--seed") + 2]
    command("train_mlpmem_offline", *words)
    seed = json.loads((tmp_path / "training.json").read_text())["settings"]["seed"]
    command("train_mlpmem_offline", *words)
    assert json.loads((tmp_path / "training.json").read_text())["settings"]["seed"] == seed
