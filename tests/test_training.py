"""Training a memory: offline and online, checkpoints, resuming, what is refused."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import ROOT, command, refused, refused_here, run
from safetensors.torch import load_file, save_file

from knn_utils.datastore import Datastore
from knn_utils.parts import datastore_batch, write_single_file
from training.rows import epoch_order


def record(folder):
    return json.loads((folder / "training.json").read_text())


def losses(folder):
    return [entry["loss"] for entry in record(folder)["log"] if "loss" in entry]


def offline(world, output, *more):
    command("train_mlpmem_offline", *world.trainer(output, "--knn_dstore_path", world.dstore("train"), *more))


def test_offline_training_lowers_the_loss_and_leaves_a_memory_that_loads(world, tmp_path):
    from models import load_memory

    offline(world, tmp_path, "--learning_rate", 5e-3, "--num_train_epochs", 3)
    found = losses(tmp_path)
    assert len(found) == 3 * 6
    assert np.mean(found[-3:]) < np.mean(found[:3]) - 0.1
    memory = load_memory(tmp_path / "epoch_3")
    assert memory.config.num_hidden_layers == 2
    assert (tmp_path / "loss.png").stat().st_size > 0
    validated = [entry["validation"] for entry in record(tmp_path)["log"] if "validation" in entry]
    assert len(validated) == 3
    assert {"base_perplexity", "memory_perplexity", "joint_perplexity", "lmbda"} <= validated[0].keys()


def test_online_and_offline_give_the_same_losses_step_by_step(world, tmp_path):
    offline(world, tmp_path / "offline")
    command("train_mlpmem_online", *world.trainer(tmp_path / "online", "--round_hidden_states"))
    # A memory without dropout sees the same rows; GPT-2's dropout draws the same numbers from the same seed.
    assert losses(tmp_path / "online") == pytest.approx(losses(tmp_path / "offline"), abs=1e-3)
    from models import load_memory

    assert load_memory(tmp_path / "online" / "epoch_1").config.num_hidden_layers == 2


def test_gradient_accumulation_and_micro_batches_do_not_change_the_losses(llama_world, tmp_path):
    offline(llama_world, tmp_path / "plain")
    offline(
        llama_world,
        tmp_path / "pieces",
        *("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 4, "--micro_batch_rows", 50),
    )
    assert losses(tmp_path / "pieces") == pytest.approx(losses(tmp_path / "plain"), abs=1e-4)


def test_dropout_changes_what_is_learnt_and_not_how_it_is_validated(llama_world, tmp_path):
    for name, rate in (("whole", 0), ("dropped", 0.5)):
        offline(llama_world, tmp_path / name, "--memory_dropout", rate, "--learning_rate", 1e-12)
    whole, dropped = losses(tmp_path / "whole"), losses(tmp_path / "dropped")
    assert all(mine != other for mine, other in zip(whole, dropped, strict=True))
    # At this rate the weights stay as they began, so the same memory is scored.
    ends = [record(tmp_path / name)["log"][-1]["validation"] for name in ("whole", "dropped")]
    assert ends[0] == pytest.approx(ends[1], rel=1e-6)


def test_plain_and_fused_losses_train_to_the_same_weights(llama_world, tmp_path):
    ends = {}
    for name in ("plain", "fused"):
        offline(llama_world, tmp_path / name, "--loss", name, "--learning_rate", 1e-3)
        ends[name] = load_file(tmp_path / name / "epoch_1" / "model.safetensors")
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "fused"), rel=1e-5)
    for name, value in ends["fused"].items():
        # Six steps move a weight by up to 6e-3.
        assert (value - ends["plain"][name]).norm() < 1e-4 * value.numel() ** 0.5


def test_validation_by_the_base_gives_the_figures_of_a_stored_datastore(llama_world, tmp_path):
    offline(llama_world, tmp_path / "base", "--max_train_steps", 2)
    stored = ("--validation_dstore_path", llama_world.dstore("validation"))
    offline(llama_world, tmp_path / "stored", "--max_train_steps", 2, *stored)
    mine, other = (record(tmp_path / name)["log"][-1]["validation"] for name in ("base", "stored"))
    assert mine == pytest.approx(other, rel=1e-5) and mine["tokens"] == 703


def test_a_killed_run_continues_to_the_same_losses_and_weights(llama_world, tmp_path):
    more = ("--knn_dstore_path", llama_world.dstore("train"), "--checkpointing_steps", 2, "--num_train_epochs", 4)
    more += ("--memory_dropout", 0.2)  # which draws in each step what it would have drawn
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    command("train_mlpmem_offline", *llama_world.trainer(undisturbed, *more))
    arguments = [sys.executable, "-m", "train_mlpmem_offline", *map(str, llama_world.trainer(killed, *more))]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None and not any(killed.glob("step_[48]")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = run(*arguments[1:])
    assert "continuing from" in done.stdout
    # Another process may sum its products in another order (threads, instructions), so equal means: to rounding. One
    # step moves a weight by about the learning rate, fifty times the tolerance.
    assert losses(killed) == pytest.approx(losses(undisturbed), abs=1e-6)
    mine, other = (load_file(folder / "epoch_4" / "model.safetensors") for folder in (killed, undisturbed))
    assert mine.keys() == other.keys()
    assert all(torch.allclose(mine[name], other[name], rtol=0, atol=1e-6) for name in other)
    again = run(*arguments[1:])
    assert "nothing to do" in again.stdout


def test_the_end_of_a_run_in_another_folder_is_a_checkpoint_too(llama_world, tmp_path):
    from models import load_memory

    offline(llama_world, tmp_path / "first", "--max_train_steps", 2)
    offline(
        llama_world,
        tmp_path / "second",
        *("--max_train_steps", 2, "--resume_from_checkpoint", tmp_path / "first" / "epoch_1"),
    )
    first, second = (load_memory(tmp_path / name / "epoch_1").state_dict() for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_folder_with_another_run_is_refused_and_overwritten_on_request(llama_world, tmp_path):
    offline(llama_world, tmp_path, "--max_train_steps", 1)
    text = refused_here(
        "train_mlpmem_offline",
        *llama_world.trainer(tmp_path, "--knn_dstore_path", llama_world.dstore("train"), "--alpha", 0.1),
    )
    assert "--overwrite" in text
    offline(llama_world, tmp_path, "--alpha", 0.1, "--max_train_steps", 1, "--overwrite")
    assert record(tmp_path)["settings"]["alpha"] == 0.1


def test_a_last_window_of_one_token_is_skipped(llama_world, tmp_path):
    import datasets

    windows = datasets.load_from_disk(str(llama_world.windows))["train"]
    number, end = len(windows), windows[-1]["dstore_range"][1]
    last = windows[-1] | {"labels": [3] + [-100] * 63, "dstore_range": [end, end]}
    longer = datasets.concatenate_datasets([windows, datasets.Dataset.from_list([last], features=windows.features)])
    datasets.DatasetDict({"train": longer}).save_to_disk(str(tmp_path / "windows"))
    # A seed with which it would make a step by itself.
    seed = next(seed for seed in range(10_000) if epoch_order(number + 1, seed, 0)[-1] == number)
    more = ("--dataset_name", tmp_path / "windows", "--per_device_train_batch_size", number, "--seed", seed)
    offline(llama_world, tmp_path / "out", *more)
    assert len(losses(tmp_path / "out")) == 1


def test_order_of_windows_depends_on_seed_and_epoch_alone():
    assert (epoch_order(50, 1, 0) == epoch_order(50, 1, 0)).all()
    assert (epoch_order(50, 1, 0) != epoch_order(50, 1, 1)).any()
    assert sorted(epoch_order(50, 1, 3)) == list(range(50))


def test_seed_is_drawn_and_kept_when_none_is_given(llama_world, tmp_path):
    arguments = llama_world.trainer(tmp_path, "--knn_dstore_path", llama_world.dstore("train"), "--max_train_steps", 1)
    at = arguments.index("--seed")
    command("train_mlpmem_offline", *arguments[:at], *arguments[at + 2 :])
    seed = record(tmp_path)["settings"]["seed"]
    command("train_mlpmem_offline", *arguments[:at], *arguments[at + 2 :])
    assert record(tmp_path)["settings"]["seed"] == seed


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple:
        return open, (self.mark, "w")


@pytest.fixture(scope="module")
def trained(llama_world, tmp_path_factory) -> Path:
    """A finished epoch, from whose checkpoint a longer run can go on."""
    output = tmp_path_factory.mktemp("trained") / "run"
    command("train_mlpmem_offline", *large_steps(llama_world, output))
    return output


def large_steps(world, output: Path, *more: object) -> list[object]:
    stored = ("--knn_dstore_path", world.dstore("train"), "--validation_split_name", "none")
    return world.trainer(output, *stored, "--per_device_train_batch_size", 64, *more)


@pytest.mark.parametrize("name", ["optimizer.bin", "schedule.bin", "random_states_0.pkl", "model.safetensors"])
def test_a_pickle_in_a_training_state_is_not_run(llama_world, trained, tmp_path, name):
    archive = io.BytesIO()  # torch's
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({"state": Payload(tmp_path / "mark")}))
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")
    for number, content in enumerate((pickle.dumps({"state": Payload(tmp_path / "mark")}), archive.getvalue())):
        checkpoint = tmp_path / f"epoch_{number + 1}"
        shutil.copytree(trained / "epoch_1", checkpoint)
        target = checkpoint / name if name == "model.safetensors" else checkpoint / "state" / name
        assert target.exists()
        target.write_bytes(content)
        goes_on = large_steps(
            llama_world,
            tmp_path / f"out{number}",
            *("--num_train_epochs", 2, "--resume_from_checkpoint", checkpoint),
        )
        if name == "random_states_0.pkl":  # which a run can do without
            command("train_mlpmem_offline", *goes_on)
        else:
            assert str(checkpoint) in refused_here("train_mlpmem_offline", *goes_on)
        assert not (tmp_path / "mark").exists()


def test_a_checkpoint_holds_the_weights_once_and_older_ones_that_hold_them_twice_go_on_alike(
    llama_world, trained, tmp_path
):
    assert not list((trained / "epoch_1" / "state").glob("*.safetensors"))
    weights = load_file(trained / "epoch_1" / "model.safetensors")
    older = tmp_path / "older" / "epoch_1"
    shutil.copytree(trained / "epoch_1", older)
    save_file({f"memory.{name}": value for name, value in weights.items()}, older / "state" / "model.safetensors")
    save_file({name: value * 0 for name, value in weights.items()}, older / "model.safetensors")  # not read
    ends = {}
    for name, checkpoint in (("new", trained / "epoch_1"), ("old", older)):
        output = tmp_path / name
        goes_on = ("--num_train_epochs", 2, "--resume_from_checkpoint", checkpoint)
        command("train_mlpmem_offline", *large_steps(llama_world, output, *goes_on))
        ends[name] = load_file(output / "epoch_2" / "model.safetensors")
    for name, value in ends["new"].items():
        assert torch.equal(value, ends["old"][name]) and not torch.equal(value, weights[name])


def test_a_folder_with_a_damaged_record_is_refused(llama_world, tmp_path):
    (tmp_path / "training.json").write_text("{")
    assert str(tmp_path) in refused_here("train_mlpmem_offline", *large_steps(llama_world, tmp_path))


class TestRefused:
    def trainer(self, world, tmp_path, **changes):
        flags = dict(zip(*[iter(map(str, world.trainer(tmp_path / "out")))] * 2, strict=True))
        flags |= {"--knn_dstore_path": str(world.dstore("train"))} | {f"--{k}": str(v) for k, v in changes.items()}
        return [item for pair in flags.items() for item in pair]

    def refuse(self, world, tmp_path, **changes):
        return refused_here("train_mlpmem_offline", *self.trainer(world, tmp_path, **changes))

    def test_targets_of_other_windows_by_row_count(self, llama_world, tmp_path):
        text = self.refuse(llama_world, tmp_path, dataset_split_name="test")
        assert "rows" in text and str(llama_world.targets) in text

    @pytest.mark.parametrize(
        ("name", "says"), [("labels", "row 7"), ("nan", "hidden states of windows 0 ("), ("narrow", "16 wide")]
    )
    def test_a_datastore_that_is_wrong(self, llama_world, tmp_path, name, says):
        store = Datastore.open(llama_world.dstore("train"))
        keys, vals = np.array(store.keys(0, store.rows)), store.vals(0, store.rows).copy()
        if name == "labels":
            vals[[7, 9]] += 1
        elif name == "nan":
            keys[5] = np.nan
        else:
            keys = keys[:, :16].copy()
        batch = datastore_batch(keys, vals)
        write_single_file(tmp_path / "other.arrow", batch.schema, [batch])
        text = self.refuse(llama_world, tmp_path, knn_dstore_path=tmp_path / "other.arrow")
        assert says in text and "other.arrow" in text

    def test_a_loss_that_diverges_keeps_the_last_good_checkpoint(self, llama_world, tmp_path):
        changes = {"learning_rate": 1e30, "max_grad_norm": 1e30, "checkpointing_steps": 1, "num_train_epochs": 3}
        text = self.refuse(llama_world, tmp_path, **changes)
        assert "step" in text and "kept" in text

    def test_unknown_preset_lists_the_known(self, llama_world, tmp_path):
        text = self.refuse(llama_world, tmp_path, base_model_name="huge")
        assert "small" in text and "mistral" in text and "config" in text

    @pytest.mark.parametrize(
        ("flag", "value"),
        [
            *(("memory_dropout", 1), ("memory_dropout", -0.1), ("memory_dropout", "nan")),
            *(("alpha", 1.5), ("learning_rate", -1), ("num_train_epochs", 0), ("checkpointing_steps", "sometimes")),
            *(("checkpointing_steps", "²"), ("seed", -1), ("seed", 1 << 32), ("lr_scheduler_type", "nope")),
            *(("weight_decay", -1), ("weight_decay", "nan"), ("num_warmup_steps", -1), ("max_eval_samples", 0)),
            *(
                ("per_device_eval_batch_size", 0),
                ("per_device_train_batch_size", 0),
                ("gradient_accumulation_steps", 0),
            ),
            *(("max_train_steps", 0), ("memory_layers", 0), ("logging_steps", 0), ("micro_batch_rows", 0)),
            *(("max_grad_norm", 0), ("alpha", "nan"), ("learning_rate", "inf")),
        ],
    )
    def test_values_out_of_range(self, llama_world, tmp_path, flag, value):
        assert f"--{flag}" in self.refuse(llama_world, tmp_path, **{flag: value})

    def test_a_polynomial_schedule_ends_below_its_rate(self, llama_world, tmp_path):
        changes = {"learning_rate": 1e-9, "lr_scheduler_type": "polynomial"}
        assert "--learning_rate 1e-09" in self.refuse(llama_world, tmp_path, **changes)

    def test_the_base_of_the_online_trainer_reads_windows_at_a_time(self, llama_world, tmp_path):
        given = llama_world.trainer(tmp_path, "--base_batch_size", 0)
        assert "--base_batch_size 0" in refused_here("train_mlpmem_online", *given)

    def test_another_layer_than_the_datastore(self, llama_world, tmp_path):
        assert "layer_position" in self.refuse(llama_world, tmp_path, layer_position=0)

    def test_bad_input_ends_a_process_in_one_line_with_status_2(self, llama_world, tmp_path):
        line = refused(
            "-m", "train_mlpmem_offline", *self.trainer(llama_world, tmp_path, knn_save_path=tmp_path / "no")
        )
        assert str(tmp_path / "no") in line
