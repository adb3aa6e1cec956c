"""Windows that begin with a BOS token: no stage stores it, scores it or learns at its position."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
import torch
from harness import command
from tiny_models import letter_tokenizer, tiny_base

from downstream.recall import windows_have_bos
from downstream.scoring import Evaluator
from knn_utils.datastore import Datastore, KNNTargets
from models.capture import hidden_states
from utils.errors import InputError

BOS = 0
TRAINERS = ("offline", "online")
STORE = "dstore_llama_train_32.arrow"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder of a base whose tokenizer has a BOS token but adds none, its windows, and files of all stages."""
    folder = tmp_path_factory.mktemp("bos")
    tiny_base("llama").save_pretrained(folder / "base")
    letter_tokenizer().save_pretrained(folder / "base")
    texts = (f"Thing {number}. A thing is a small word of {number} letters." for number in range(60))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    cut = ("--block_size", 32, "--stride", 32, "--window_bos", "--group_rows", "--test_fraction", 0.2)
    text = ("--dataset_name", folder / "text.jsonl", "--tokenizer_path", folder / "base")
    command("utils.preprocess_dataset", *text, *cut, "--output_dir", folder / "windows")
    base = ("--model_name_or_path", folder / "base", "--dataset_name", folder / "windows")
    save = ("--do_eval", "--eval_subset", "train", "--save_knnlm_dstore", "--dstore_dir", folder)
    command("train_base", *base, *save, "--output_dir", folder / "tmp")
    store, index = ("--dstore_path", folder / STORE), ("--index_path", folder / "i.index")
    command("knn_utils.build_index", *store, *index, "--index_factory", "Flat")
    command("knn_utils.saveKNNMulti", *store, *index, "--output_path", folder / "targets", "--k", 8)
    for name, own in (("offline", ("--knn_dstore_path", folder / STORE)), ("online", ("--round_hidden_states",))):
        train = ("--knn_save_path", folder / "targets", "--memory_layers", 1, "--max_train_steps", 2, "--seed", 1)
        rest = ("--output_dir", folder / name, "--validation_split_name", "none", "--mixed_precision", "no")
        command(f"train_mlpmem_{name}", *base, *train, *rest, *own, "--logging_steps", 1)
    return folder


def predicted(windows):
    """Rows of the windows by hand: (window, position) of each label that is predicted from a token of text."""
    labels = np.array(windows["labels"][:])
    return [(row, at - 1) for row, at in zip(*np.nonzero(labels != -100), strict=True)]


def test_the_datastore_holds_no_bos_and_no_hidden_state_of_one(world):
    windows = datasets.load_from_disk(str(world / "windows"))["train"]
    ids, labels = np.array(windows["input_ids"][:]), np.array(windows["labels"][:])
    assert (ids[:, 0] == BOS).all() and (ids[:, 1:] != BOS).all() and (labels[:, :2] == -100).all()
    rows, store = predicted(windows), Datastore.open(world / STORE)
    assert len(rows) == store.rows == windows[-1]["dstore_range"][1] and min(at for _, at in rows) == 1
    assert store.vals().tolist() == [int(ids[row, at + 1]) for row, at in rows]
    hidden = hidden_states(tiny_base("llama"), torch.from_numpy(ids))
    expected = torch.stack([hidden[row, at] for row, at in rows])
    torch.testing.assert_close(torch.from_numpy(store.keys().copy()).float(), expected, atol=2e-3, rtol=2e-3)


def test_targets_training_and_evaluation_count_the_same_rows(world, tmp_path):
    windows = datasets.load_from_disk(str(world / "windows"))
    rows = {split: len(predicted(windows[split])) for split in windows}
    assert KNNTargets.open(world / "targets").rows == rows["train"]
    offline, online = (json.loads((world / name / "training.json").read_text())["log"] for name in TRAINERS)
    assert offline[0]["rows"] == online[0]["rows"]
    assert offline[0]["loss"] == pytest.approx(online[0]["loss"], abs=1e-3)
    base = ("--model_name_or_path", world / "base", "--dataset_name", world / "windows", "--output_dir", tmp_path)
    command("evaluate_joint", *base, "--knn_generator_path", world / "offline" / "epoch_1")
    assert json.loads((tmp_path / "results.json").read_text())["tokens"] == rows["test"]


def test_prompts_begin_with_bos_where_the_windows_do(world):
    assert windows_have_bos(world / "windows" / "raw" / "train.jsonl") and not windows_have_bos(world / "text.jsonl")
    tokenizer, model = letter_tokenizer(), tiny_base("llama")
    plain, begun = (Evaluator(model, tokenizer, 2, add_bos).encode("ab").tolist() for add_bos in (False, True))
    assert begun == [BOS, *plain]
    assert Evaluator(model, tokenizer, 2, True).encode("<bos>ab").tolist().count(BOS) == 1
    tokenizer.bos_token = None
    with pytest.raises(InputError, match="--add_bos"):
        Evaluator(model, tokenizer, 2, True)
