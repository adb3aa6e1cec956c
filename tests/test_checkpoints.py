"""A checkpoint gets its name only when it is on the disk, and those before it stay until then."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

from training import checkpoints
from training.checkpoints import STATE_FOLDER, Publisher
from utils.errors import InputError


def written(output: Path, name: str) -> Path:
    folder = output / name
    (folder / STATE_FOLDER).mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights of " + name.encode())
    (folder / STATE_FOLDER / "optimizer.bin").write_bytes(b"state")
    return folder


def names(output: Path) -> list[str]:
    return sorted(str(path.relative_to(output)) for path in output.rglob("*") if path.is_file())


def test_older_states_go_only_when_the_new_checkpoint_is_named(tmp_path, monkeypatch):
    written(tmp_path, "epoch_1")
    written(tmp_path, "step_7")
    new = written(tmp_path, ".tmp-epoch_2")
    before = names(tmp_path)
    may_sync, sync_tree = threading.Event(), checkpoints.sync_tree

    def slow(folder: Path) -> None:
        assert may_sync.wait(30)
        sync_tree(folder)

    monkeypatch.setattr(checkpoints, "sync_tree", slow)
    publisher = Publisher(1)
    publisher.start(new, tmp_path / "epoch_2")
    assert names(tmp_path) == before  # training goes on meanwhile
    may_sync.set()
    publisher.wait()
    publisher.wait()  # nothing left to wait for
    assert names(tmp_path) == [
        "epoch_1/model.safetensors",
        "epoch_2/model.safetensors",
        f"epoch_2/{STATE_FOLDER}/optimizer.bin",
    ]
    publisher.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_checkpoint_that_does_not_reach_the_disk_is_told_and_the_others_stay(tmp_path, monkeypatch, number):
    written(tmp_path, "epoch_1")
    new = written(tmp_path, ".tmp-epoch_2")

    def failing(_folder: Path) -> None:
        raise OSError(number, "cannot be written")

    monkeypatch.setattr(checkpoints, "sync_tree", failing)
    publisher = Publisher(1)
    publisher.start(new, tmp_path / "epoch_2")
    with pytest.raises(InputError if number == errno.ENOSPC else OSError) as raised:
        publisher.wait()
    if number == errno.ENOSPC:
        assert "epoch_2" in str(raised.value) and str(tmp_path) in str(raised.value)
    publisher.start(written(tmp_path, ".tmp-epoch_3"), tmp_path / "epoch_3")
    publisher.close()  # a run that ends with an error of its own does not tell of this one
    assert {"epoch_1/model.safetensors", f"epoch_1/{STATE_FOLDER}/optimizer.bin"} <= set(names(tmp_path))
    assert not (tmp_path / "epoch_2").exists() and not (tmp_path / "epoch_3").exists()
