"""Windows that begin with a BOS token each: no stage stores it, scores it or learns from its position."""

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
from utils.errors import InputError

BOS = 0


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder of a base whose tokenizer has a BOS token but adds none, its windows, and files of all stages."""
    folder = tmp_path_factory.mktemp("bos")
    tiny_base("llama").save_pretrained(folder / "base")
    letter_tokenizer().save_pretrained(folder / "base")
    texts = (f"Thing {number}. A thing is a small word of {number} letters." for number in range(60))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    base = ("--model_name_or_path", folder / "base", "--dataset_name", folder / "windows")
    command(
        "utils.preprocess_dataset",
        *("--dataset_name", folder / "text.jsonl", "--tokenizer_path", folder / "base", "--block_size", 32),
        *("--stride", 32, "--window_bos", "--group_rows", "--test_fraction", 0.2, "--output_dir", folder / "windows"),
    )
    for split in ("train", "test"):
        save = ("--do_eval", "--eval_subset", split, "--save_knnlm_dstore", "--save_logprob")
        command("train_base", *base, *save, "--dstore_dir", folder, "--output_dir", folder / "tmp")
    store = folder / "dstore_llama_train_32.arrow"
    command(
        "knn_utils.build_index", "--dstore_path", store, "--index_factory", "Flat", "--index_path", folder / "i.index"
    )
    found = ("--index_path", folder / "i.index", "--output_path", folder / "targets", "--k", 8)
    command("knn_utils.saveKNNMulti", "--dstore_path", store, *found)
    for name, own in (("offline", ("--knn_dstore_path", store)), ("online", ("--round_hidden_states",))):
        train = ("--knn_save_path", folder / "targets", "--memory_layers", 1, "--max_train_steps", 2, "--seed", 1)
        rest = ("--output_dir", folder / name, "--validation_split_name", "none", "--mixed_precision", "no")
        command(f"train_mlpmem_{name}", *base, *train, *rest, *own, "--logging_steps", 1)
    return folder


def predicted(windows):
    """Rows of the windows by hand: (window, position) of each label that is predicted from a token of text."""
    labels = np.array(windows["labels"][:])
    return [(row, at - 1) for row, at in zip(*np.nonzero(labels != -100), strict=True)]


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_datastore_holds_no_bos_and_no_hidden_state_of_one(world, split):
    windows = datasets.load_from_disk(str(world / "windows"))[split]
    ids, labels = np.array(windows["input_ids"][:]), np.array(windows["labels"][:])
    assert (ids[:, 0] == BOS).all() and (ids[:, 1:] != BOS).all() and (labels[:, :2] == -100).all()
    rows, store = predicted(windows), Datastore.open(world / f"dstore_llama_{split}_32.arrow")
    assert len(rows) == len(store) == windows[-1]["dstore_range"][1] and min(at for _, at in rows) == 1
    assert store.vals().tolist() == [int(ids[row, at + 1]) for row, at in rows]
    from models.capture import hidden_states

    hidden = hidden_states(tiny_base("llama"), torch.from_numpy(ids))
    expected = torch.stack([hidden[row, at] for row, at in rows])
    torch.testing.assert_close(torch.from_numpy(store.keys().copy()).float(), expected, atol=2e-3, rtol=2e-3)


def test_targets_training_and_evaluation_count_the_same_rows(world, tmp_path):
    windows = datasets.load_from_disk(str(world / "windows"))
    rows = {split: len(predicted(windows[split])) for split in windows}
    assert len(KNNTargets.open(world / "targets")) == rows["train"]
    logs = [json.loads((world / name / "training.json").read_text())["log"] for name in ("offline", "online")]
    assert logs[0][0]["rows"] == logs[1][0]["rows"] and logs[0][0]["loss"] == pytest.approx(
        logs[1][0]["loss"], abs=1e-3
    )
    base = ("--model_name_or_path", world / "base", "--dataset_name", world / "windows", "--output_dir", tmp_path)
    for module, more in (
        ("train_base", ("--do_eval", "--eval_subset", "test")),
        ("evaluate_joint", ("--knn_generator_path", world / "offline" / "epoch_1")),
    ):
        command(module, *base, *more)
        assert json.loads((tmp_path / "results.json").read_text())["tokens"] == rows["test"]
    tuned = (
        *base[:4],
        "--output_dir",
        tmp_path / "tuned",
        "--do_train",
        "--max_steps",
        1,
        "--use_cpu",
        "--eval_strategy",
        "steps",
    )
    command(
        "train_base",
        *tuned,
        "--eval_steps",
        1,
        "--eval_subset",
        "test",
        "--per_device_eval_batch_size",
        3,
        "--patience",
        1,
    )
    log = json.loads((tmp_path / "tuned" / "finetune.json").read_text())["log"]
    (loss,) = (entry["eval_loss"] for entry in log if "eval_loss" in entry)
    command("train_base", *base, "--do_eval", "--eval_subset", "test", "--model_name_or_path", tmp_path / "tuned")
    assert np.log(json.loads((tmp_path / "results.json").read_text())["perplexity"]) == pytest.approx(loss, rel=1e-5)


def test_prompts_begin_with_bos_where_the_windows_do(world, tmp_path):
    assert windows_have_bos(world / "windows" / "raw" / "train.jsonl") and not windows_have_bos(world / "text.jsonl")
    tokenizer, model = letter_tokenizer(), tiny_base("llama")
    plain, begun = (Evaluator(model, tokenizer, 2, add_bos).encode("ab").tolist() for add_bos in (False, True))
    assert begun == [BOS, *plain]
    assert Evaluator(model, tokenizer, 2, True).encode("<bos>ab").tolist().count(BOS) == 1
    tokenizer.bos_token = None
    with pytest.raises(InputError, match="--add_bos"):
        Evaluator(model, tokenizer, 2, True)
    articles = world / "windows" / "raw" / "train.jsonl"
    memory = ("--knn_generator_path", world / "offline" / "epoch_1", "--articles", articles, "--output_dir", tmp_path)
    command("downstream.recall", "--model_name_or_path", world / "base", *memory, "--max_cases", 4)


def test_passages_show_no_bos(world):
    from demo.passages import Passages

    places = (world / "dstore_llama_train_32.arrow", world / "i.index", world / "windows")
    shown = Passages(*map(str, places), letter_tokenizer(), dim=32, layer_position=-1)
    store = Datastore.open(places[0])
    found = shown.nearest(torch.from_numpy(store.keys(0, 3).copy()), 1)
    assert all(passages[0].before and "<bos>" not in passages[0].before for passages in found)
