"""Training runs from outside that are damaged or made to harm: refused in one line, nothing of them is run."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import command, refused_here
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

MANY = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple:
        return open, (self.mark, "w")


def disguises(mark: Path) -> list[bytes]:
    """The payload as a plain pickle and in torch's archive."""
    plain = pickle.dumps({"state": Payload(mark)})
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", plain)
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")
    return [plain, archive.getvalue()]


@pytest.fixture(scope="module")
def trained(llama_world, tmp_path_factory) -> Path:
    """A finished epoch, from whose checkpoint a longer run can go on."""
    output = tmp_path_factory.mktemp("trained") / "run"
    command("train_mlpmem_offline", *flags(llama_world, output))
    return output


def flags(world, output: Path, *more: object) -> list[object]:
    stored = ("--knn_dstore_path", world.dstore("train"), "--validation_split_name", "none")
    return world.trainer(output, *stored, "--per_device_train_batch_size", 64, *more)


@pytest.mark.parametrize("name", ["optimizer.bin", "schedule.bin", "random_states_0.pkl", "model.safetensors"])
def test_a_pickle_in_a_training_state_is_not_run(llama_world, trained, tmp_path, name):
    for number, content in enumerate(disguises(tmp_path / "mark")):
        checkpoint = tmp_path / f"epoch_{number + 1}"
        shutil.copytree(trained / "epoch_1", checkpoint)
        target = checkpoint / name if name == "model.safetensors" else checkpoint / "state" / name
        assert target.exists()
        target.write_bytes(content)
        goes_on = flags(
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
        command("train_mlpmem_offline", *flags(llama_world, output, *goes_on))
        ends[name] = load_file(output / "epoch_2" / "model.safetensors")
    for name, value in ends["new"].items():
        assert torch.equal(value, ends["old"][name]) and not torch.equal(value, weights[name])


@pytest.mark.parametrize("content", ["", "{", "\0"])
def test_a_folder_with_a_damaged_record_is_refused(llama_world, tmp_path, content):
    (tmp_path / "training.json").write_text(content)
    assert str(tmp_path) in refused_here("train_mlpmem_offline", *flags(llama_world, tmp_path))


@pytest.mark.parametrize("step", [10**9, -1, None])
def test_an_absurd_step_in_a_checkpoint_is_refused(llama_world, trained, tmp_path, step):
    shutil.copytree(trained / "epoch_1", tmp_path / "epoch_1")
    path = tmp_path / "epoch_1" / "state" / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": step}))
    goes_on = ("--num_train_epochs", 2, "--resume_from_checkpoint", tmp_path / "epoch_1")
    line = refused_here("train_mlpmem_offline", *flags(llama_world, tmp_path / "out", *goes_on))
    assert str(tmp_path / "epoch_1") in line
