"""Files that do not belong together are refused by the command that reads them."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pytest
from harness import command, refused_here
from tiny_models import make_base

from knn_utils.datastore import Datastore, KNNTargets, TargetRows
from knn_utils.parts import targets_batch, write_single_file
from utils.errors import InputError


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


@dataclass
class Other:
    """Files of another base on the same windows, and of the same base on other windows with as many rows."""

    base: Path  # another base, with the same tokenizer and sizes
    windows: Path  # other windows
    bases: Path  # the other base's folder of datastores and index
    rows: Path  # the other windows' folder of datastores, index and values
    memory: Path  # of the other base
    bare: Path  # an index without its record


def shifted(windows: Path, folder: Path) -> Path:
    """Windows of as many rows whose tokens are others."""
    splits = datasets.load_from_disk(str(windows))

    def shift(row):
        return {
            "input_ids": [token % 200 + 1 for token in row["input_ids"]],
            "labels": [label if label == -100 else label % 200 + 1 for label in row["labels"]],
        }

    datasets.DatasetDict({name: rows.map(shift, keep_in_memory=True) for name, rows in splits.items()}).save_to_disk(
        str(folder)
    )
    return folder


@pytest.fixture(scope="module")
def other(llama_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    made = Other(
        base=make_base("llama", folder / "base", seed=7),
        windows=shifted(llama_world.windows, folder / "windows"),
        bases=folder / "bases",
        rows=folder / "rows",
        memory=folder / "memory" / "epoch_1",
        bare=folder / "bare.index",
    )
    for stores, base, windows in (
        (made.bases, made.base, llama_world.windows),
        (made.rows, llama_world.base, made.windows),
    ):
        for split in ("train", "validation"):
            flags = ("--model_name_or_path", base, "--dataset_name", windows, "--do_eval", "--eval_subset", split)
            output = ("--save_knnlm_dstore", "--save_logprob", "--dstore_dir", stores, "--output_dir", folder / "tmp")
            command("train_base", *flags, *output)
        flags = ("--index_path", stores / "train.index", "--index_factory", "Flat")
        command("knn_utils.build_index", "--dstore_path", stores / "dstore_llama_train_32.arrow", *flags)
    shutil.copyfile(llama_world.index, made.bare)
    changes = {"--model_name_or_path": made.base, "--knn_dstore_path": made.bases / "dstore_llama_train_32.arrow"}
    command("train_mlpmem_offline", *trainer(llama_world, made.memory.parent, **{"--max_train_steps": 1, **changes}))
    return made


def words(flags):
    return [word for name, value in flags.items() for word in (f"--{name}", value)]


def base_scores(world, **changes):
    flags = {"model_name_or_path": world.base, "dataset_name": world.windows, "output_dir": world.folder / "tmp"}
    return "train_base", [*words({**flags, "eval_subset": "validation", **changes}), "--do_eval"]


def knn_scores(world, **changes):
    module, flags = base_scores(
        world, **{"index_file": world.index, "val_file": world.dstore("train"), "k": 8} | changes
    )
    return module, [*flags, "--knn"]


def joint_scores(world, **changes):
    flags = {"model_name_or_path": world.base, "dataset_name": world.windows, "output_dir": world.folder / "tmp"}
    flags |= {"knn_generator_path": world.memory, "dataset_split_name": "validation"}
    return "evaluate_joint", words(flags | changes)


def recall(world, **changes):
    articles = world.folder / "articles.jsonl"
    articles.write_text(
        json.dumps({"text": "Zi\n\nThe small river of so zi ka is a word of so zi ka that was in 1999."})
    )
    flags = {"model_name_or_path": world.base, "knn_generator_path": world.memory, "articles": articles}
    return "downstream.recall", words(flags | {"output_dir": world.folder / "tmp"} | changes)


def targets(world, **changes):
    flags = {"dstore_path": world.dstore("train"), "index_path": world.index, "k": 8} | changes
    return "knn_utils.saveKNNMulti", words({**flags, "output_path": world.folder / "unwritten"})


def index(world, **changes):
    return "knn_utils.build_index", words({"index_factory": "Flat", **changes})


def train(world, **changes):
    flags = {f"--{name}": value for name, value in {"validation_split_name": "validation", **changes}.items()}
    return "train_mlpmem_offline", trainer(world, world.folder / "trained", **flags)


def preflight(world, **changes):
    return "knn_utils.preflight", words(changes)


# Of another base ("{bases}") and of other windows ("{rows}").
TRAIN, VALIDATION = "dstore_llama_train_32.arrow", "dstore_llama_validation_32.arrow"
BASES_TRAIN, BASES_VALIDATION, BASES_INDEX = f"{{bases}}/{TRAIN}", f"{{bases}}/{VALIDATION}", "{bases}/train.index"
ROWS_TRAIN, ROWS_VALIDATION, ROWS_VALUES = f"{{rows}}/{TRAIN}", f"{{rows}}/{VALIDATION}", "{rows}/train_vals.npy"
OWN_TRAIN, OWN_VALIDATION = f"{{own}}/{TRAIN}", f"{{own}}/{VALIDATION}"
BASE, ROWS, WINDOWS = "a base with the checksum", "other rows", "windows with the checksum"
NO_RECORD, NO_KNN, NO_JOINT = "has no record, and finds", "another mixture.*evaluate_joint", "another mixture.*--knn"
# Every command with every file of another command that it reads, of another run: its flags, and what is said. Windows
# of another tokenizer: test_any_decoder_pipeline.py. A run, an output or a folder that is continued with other files:
# test_training.py, test_finetune.py, test_growing.py, test_build_index.py, test_save_knn.py, test_eval_qa.py.
PAIRS = [
    (base_scores, {"dstore_path": BASES_VALIDATION}, BASE),
    (base_scores, {"dstore_path": ROWS_VALIDATION}, WINDOWS),
    (knn_scores, {"val_file": ROWS_TRAIN}, ROWS),
    (knn_scores, {"val_file": ROWS_VALUES}, ROWS),
    (knn_scores, {"val_file": BASES_TRAIN}, ROWS),
    (knn_scores, {"val_file": BASES_TRAIN, "index_file": BASES_INDEX}, BASE),
    (knn_scores, {"val_file": "{bases}/train_vals.npy", "index_file": BASES_INDEX}, BASE),
    (knn_scores, {"val_file": BASES_TRAIN, "index_file": BASES_INDEX, "dstore_path": OWN_VALIDATION}, BASE),
    (knn_scores, {"val_file": BASES_TRAIN, "index_file": "{bare}"}, NO_RECORD),
    (knn_scores, {"choose_on": "{joint_results}"}, NO_JOINT),
    (joint_scores, {"dstore_path": BASES_VALIDATION}, BASE),
    (joint_scores, {"dstore_path": ROWS_VALIDATION}, WINDOWS),
    (joint_scores, {"knn_generator_path": "{memory}"}, f"--knn_generator_path .*{BASE}"),
    (joint_scores, {"knn_generator_path": "{memory}", "dstore_path": OWN_VALIDATION}, f"--knn_generator_path .*{BASE}"),
    (joint_scores, {"choose_on": "{knn_results}"}, NO_KNN),
    (recall, {"knn_generator_path": "{memory}"}, f"--knn_generator_path .*{BASE}"),
    (recall, {"choose_on": "{knn_results}"}, NO_KNN),
    (targets, {"dstore_path": BASES_VALIDATION, "val_path": OWN_TRAIN}, BASE),
    (targets, {"val_path": ROWS_TRAIN}, ROWS),
    (targets, {"val_path": ROWS_VALUES}, ROWS),
    (targets, {"dstore_path": BASES_TRAIN, "index_path": "{bare}"}, NO_RECORD),
    (targets, {"choose_on": "{joint_results}"}, NO_JOINT),
    (index, {"dstore_path": ROWS_TRAIN, "index_path": "{bases}/2.index"}, "train_vals.npy.*belongs to train.index"),
    (train, {"knn_dstore_path": BASES_TRAIN}, BASE),
    (train, {"knn_dstore_path": ROWS_TRAIN}, "other windows"),
    (train, {"validation_dstore_path": BASES_VALIDATION}, BASE),
    (train, {"validation_dstore_path": ROWS_VALIDATION}, WINDOWS),
    (train, {"dataset_name": "{windows}", "knn_dstore_path": ROWS_TRAIN}, "other windows"),
    (preflight, {"dataset_name": "{windows}", "dstore_path": OWN_TRAIN}, WINDOWS),
    (preflight, {"dataset_name": "{windows}", "knn_save_path": "{targets}"}, WINDOWS),
    (preflight, {"dstore_path": OWN_TRAIN, "index_path": BASES_INDEX}, ROWS),
    (preflight, {"dstore_path": BASES_TRAIN, "index_path": "{bare}"}, NO_RECORD),
    (preflight, {"dstore_path": OWN_TRAIN, "model_name_or_path": "{base}", "verify": True}, BASE),
]


@pytest.fixture(scope="module")
def own(llama_world):
    """The world with a memory, and with results of both mixtures."""
    folder = llama_world.folder
    llama_world.memory = folder / "own-memory" / "epoch_1"
    command("train_mlpmem_offline", *trainer(llama_world, folder / "own-memory", **{"--max_train_steps": 1}))
    for name, memory in (("knn_results", None), ("joint_results", "epoch_1")):
        (folder / name).write_text(json.dumps({"lmbda": 0.5, "knn_temp": 2.0, "memory": memory}))
    return llama_world


@pytest.mark.parametrize(("given", "changes", "expected"), PAIRS)
def test_files_of_another_run_are_refused_by_every_command_that_reads_them(
    own, other, given, changes, expected, capsys
):
    places = vars(other) | {"own": own.dstore_dir, "targets": own.targets}
    places |= {name: own.folder / name for name in ("knn_results", "joint_results")}
    module, flags = given(own, **{name: str(value).format(**places) for name, value in changes.items()})
    with pytest.raises((InputError, SystemExit)) as caught:
        command(module, *flags)
    assert re.search(expected, f"{caught.value} {capsys.readouterr().err}")
    assert not (own.folder / "unwritten").exists()


def test_files_of_one_run_are_taken_in_any_precision_and_without_a_record(own, other, capsys):
    for dtype in ("float32", "bfloat16"):
        for module, flags in (
            knn_scores(own, torch_dtype=dtype, index_file=other.bare),
            joint_scores(own, torch_dtype=dtype),
            joint_scores(own, torch_dtype=dtype, dstore_path=own.dstore("validation")),
        ):
            command(module, *flags)
    printed = capsys.readouterr().out
    assert printed.count("base + memory: perplexity") == 4 and printed.count("kNN-LM: perplexity") == 2
