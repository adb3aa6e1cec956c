"""Files that do not belong together are refused by the command that reads them."""

from __future__ import annotations

import re

import datasets
import numpy as np
import pytest
from harness import command, refused_here
from tiny_models import make_base

from knn_utils.datastore import Datastore, KNNTargets, TargetRows
from knn_utils.parts import targets_batch, write_single_file


def trainer(world, output, **changes):
    words = world.trainer(output, "--knn_dstore_path", world.dstore("train"), "--validation_split_name", "none")
    flags = dict(zip(words[::2], words[1::2], strict=True))
    return [word for pair in (flags | changes).items() for word in pair]


@pytest.mark.parametrize("name", ["train_mlpmem_offline", "train_mlpmem_online"])
def test_an_unknown_preset_lists_the_known_and_says_that_sizes_can_come_from_the_config(llama_world, tmp_path, name):
    words = llama_world.trainer(tmp_path, "--base_model_name", "gpt5")
    text = refused_here(name, *words)
    assert text.startswith("--base_model_name gpt5")
    assert all(known in text for known in ("small", "med", "large", "llama2", "llama3", "mistral", "config"))


def test_a_memory_of_another_width(llama_world, tmp_path):
    output = tmp_path / "memory"
    command("train_mlpmem_offline", *trainer(llama_world, output, **{"--max_train_steps": 1}))
    base = make_base("llama", tmp_path / "base", hidden=48)
    flags = ("--model_name_or_path", base, "--knn_generator_path", output / "epoch_1", "--do_test")
    text = refused_here("evaluate_joint", *flags, "--dataset_name", llama_world.windows, "--output_dir", tmp_path)
    assert str(output) in text and "32" in text and "48" in text


@pytest.mark.parametrize("name", ["train_mlpmem_offline", "train_mlpmem_online"])
def test_targets_of_another_dataset_with_as_many_rows(llama_world, tmp_path, name):
    found = KNNTargets.open(llama_world.targets)
    rows = found.read(0, found.rows)
    labels = np.array(rows.label)
    labels[40:] = (labels[40:] + 1) % 276
    batch = targets_batch(TargetRows(rows.id_cnt, rows.token_id, rows.prob, labels, None))
    write_single_file(tmp_path / "other", batch.schema, [batch])
    words = trainer(llama_world, tmp_path / "out", **{"--knn_save_path": tmp_path / "other"})
    if name == "train_mlpmem_online":
        at = words.index("--knn_dstore_path")
        del words[at : at + 2]
    text = refused_here(name, *words)
    assert str(tmp_path / "other") in text and "row 40" in text and "other windows" in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda ranges: np.add.at(ranges, (-1, 1), 5), r"holds {rows} rows, but .* dstore_range goes to {past}"),
        (lambda ranges: np.add(ranges[2:], 7, out=ranges[2:]), "^--dataset_name: window 2 .*dstore_range"),
    ],
    ids=["beyond the datastore", "with a jump"],
)
def test_a_dstore_range_of_another_datastore(llama_world, tmp_path, change, expected):
    splits = datasets.load_from_disk(str(llama_world.windows))
    ranges = np.array(splits["train"]["dstore_range"][:])  # (windows, 2)
    change(ranges)
    train = splits["train"].remove_columns("dstore_range").add_column("dstore_range", ranges.tolist())
    datasets.DatasetDict({**splits, "train": train}).save_to_disk(str(tmp_path / "windows"))
    rows = Datastore.open(llama_world.dstore("train")).rows
    words = trainer(llama_world, tmp_path, **{"--dataset_name": tmp_path / "windows"})
    assert re.search(expected.format(past=rows + 5, rows=rows), refused_here("train_mlpmem_offline", *words))
