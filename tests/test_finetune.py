"""Fine-tuning a base: from scratch, interrupted, stopped early, refused."""

from __future__ import annotations

import gc
import json
import math
import signal
import time

import datasets
import pytest
import torch
from conftest import make_text
from harness import Command, command, refused_here, together
from safetensors.torch import load_file
from tiny_models import make_base

from training.finetune import collate
from utils.artefact import read_made


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """(folder of a random tiny GPT-2, folder of windows)."""
    folder = tmp_path_factory.mktemp("finetune")
    base = make_base("gpt2", folder / "base")
    splits = folder / "text"
    splits.mkdir()
    for name, count in (("train", 300), ("validation", 100)):
        make_text(splits / f"{name}.txt", lines=count)
    command(
        "utils.preprocess_dataset",
        *("--dataset_name", splits, "--tokenizer_path", base, "--output_dir", folder / "windows"),
        *("--block_size", 64, "--stride", 32),
    )
    return base, folder / "windows"


def flags(ground, output, *more):
    base, windows = ground
    return [
        *("--model_name_or_path", base, "--dataset_name", windows, "--output_dir", output, "--do_train"),
        *("--per_device_train_batch_size", 8, "--learning_rate", 5e-3, "--num_train_epochs", 2, "--seed", 5),
        *("--logging_steps", 1, "--use_cpu", *more),
    ]


def logged(output, name):
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in log if name in entry]


def perplexity(output):
    return json.loads((output / "results.json").read_text())["perplexity"]


def score(base, windows, output, *more):
    """Perplexity of a base on the validation split."""
    scored = ("--model_name_or_path", base, "--dataset_name", windows, "--do_eval", "--output_dir", output)
    command("train_base", *scored, *more)
    return perplexity(output)


def test_from_scratch_the_perplexity_falls_and_the_model_loads(ground, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, windows = ground
    output = tmp_path / "tuned"
    command("train_base", *flags(ground, output, "--from_scratch", "--num_train_epochs", 4))
    before, after = (score(model, windows, tmp_path / f"of_{model.name}") for model in (base, output))
    assert after < 0.85 * before
    assert AutoModelForCausalLM.from_pretrained(output).config.model_type == "gpt2"
    assert len(AutoTokenizer.from_pretrained(output)) == 276
    assert read_made(output).kind == "model" and not (output / "training_args.bin").exists()


def test_a_killed_run_continues_to_the_same_losses_and_weights(ground, tmp_path):
    # Long enough for the kill to come before the end on a busy machine.
    more = ("--save_steps", 2, "--num_train_epochs", 20)
    command("train_base", *flags(ground, tmp_path / "undisturbed", *more))
    killed = tmp_path / "killed"
    process = Command(tmp_path / "log", "train_base", *flags(ground, killed, *more))
    while process.process.is_alive() and not (killed / "checkpoint-4").exists():
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL and read_made(killed) is None
    (killed / "checkpoint-900").mkdir()  # as a kill leaves it within a checkpoint
    text = Command(tmp_path / "log", "train_base", *flags(ground, killed, *more)).done()
    assert "continuing from" in text and "checkpoint-900" not in text
    assert logged(killed, "loss") == pytest.approx(logged(tmp_path / "undisturbed", "loss"), abs=1e-6)
    found, expected = (load_file(folder / "model.safetensors") for folder in (killed, tmp_path / "undisturbed"))
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)
    assert "nothing to do" in Command(tmp_path / "log", "train_base", *flags(ground, killed, *more)).done()


def test_patience_stops_early_and_keeps_the_best(ground, tmp_path):
    more = ("--patience", 1, "--learning_rate", 0.2, "--num_train_epochs", 12, "--eval_subset", "validation")
    command("train_base", *flags(ground, tmp_path / "tuned", *more))
    evaluated = logged(tmp_path / "tuned", "eval_loss")
    assert len(evaluated) < 12
    found = score(tmp_path / "tuned", ground[1], tmp_path / "scored")
    assert math.log(found) == pytest.approx(min(evaluated), rel=1e-5)


@pytest.mark.parametrize(("windows", "processes"), [(8, 1), (5, 2), (7, 2)])
def test_the_held_out_loss_is_the_mean_over_tokens(ground, tmp_path, windows, processes):
    splits = datasets.load_from_disk(str(ground[1]))
    rows, past = [], 0
    for number, row in enumerate(splits["validation"].select(range(windows))):  # every other window has two labels
        labels = row["labels"] if number % 2 else [-100] * 62 + row["labels"][62:]
        count = sum(label != -100 for label in labels[1:])
        rows.append(row | {"labels": labels, "dstore_range": [past, past := past + count]})
    splits["validation"] = datasets.Dataset.from_list(rows, features=splits["validation"].features)
    splits.save_to_disk(str(tmp_path / "windows"))
    more = ("--max_steps", 1, "--eval_strategy", "steps", "--eval_steps", 1, "--per_device_eval_batch_size", 2)
    words = flags((ground[0], tmp_path / "windows"), tmp_path / "tuned", *more)
    for process in together(tmp_path / "log", processes, "train_base", *words):
        process.done()
    found = score(tmp_path / "tuned", tmp_path / "windows", tmp_path / "scored")
    assert logged(tmp_path / "tuned", "eval_loss") == pytest.approx([math.log(found)], rel=1e-5)


def test_another_run_in_the_folder_is_refused_or_overwritten(ground, tmp_path):
    command("train_base", *flags(ground, tmp_path, "--max_steps", 2))
    for other in (("--learning_rate", 1e-4), ("--max_train_samples", 9), ("--from_scratch",)):
        words = flags(ground, tmp_path, "--max_steps", 2, *other)
        assert other[0].lstrip("-") in refused_here("train_base", *words)
        gc.collect()  # the folder's lock
    command("train_base", *words, "--overwrite")
    assert read_made(tmp_path).settings["from_scratch"]


def test_a_loss_that_is_not_finite_ends_the_run(ground, tmp_path):
    text = refused_here("train_base", *flags(ground, tmp_path, "--learning_rate", 1e30, "--max_grad_norm", 1e30))
    assert "--learning_rate" in text and read_made(tmp_path) is None


def test_a_batch_is_as_long_as_its_longest_window():
    rows = torch.arange(2 * 512).reshape(2, 512)
    labels = rows.clone()
    labels[0, 40:] = labels[1, 70:] = -100
    batch = collate([{"input_ids": ids, "labels": each} for ids, each in zip(rows, labels, strict=True)])
    assert 70 <= batch["input_ids"].shape[1] == batch["labels"].shape[1] < 100
    assert torch.equal(batch["labels"], labels[:, : batch["labels"].shape[1]])
