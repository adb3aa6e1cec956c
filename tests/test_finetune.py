"""Fine-tuning a base: from scratch, interrupted, stopped early, refused."""

from __future__ import annotations

import json
import math
import signal
import time

import pytest
import torch
from conftest import make_text
from harness import Command, command, refused_here, together
from safetensors.torch import load_file
from tiny_models import make_base


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


def record(output):
    return json.loads((output / "finetune.json").read_text())


def losses(output):
    return [entry["loss"] for entry in record(output)["log"] if "loss" in entry]


def test_training_from_scratch_lowers_the_perplexity_and_leaves_a_model_that_loads(ground, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, windows = ground
    scored = ("--model_name_or_path", base, "--dataset_name", windows, "--do_eval", "--output_dir", tmp_path / "before")
    command("train_base", *scored)
    output = tmp_path / "tuned"
    command("train_base", *flags(ground, output, "--from_scratch", "--do_eval", "--num_train_epochs", 4))
    before, after = (json.loads((path / "results.json").read_text()) for path in (tmp_path / "before", output))
    assert after["perplexity"] < 0.85 * before["perplexity"]
    assert after["tokens"] == before["tokens"]
    assert AutoModelForCausalLM.from_pretrained(output).config.model_type == "gpt2"
    assert len(AutoTokenizer.from_pretrained(output)) == 276
    assert not (output / "training_args.bin").exists()


def test_a_killed_run_continues_to_the_same_losses_and_weights(ground, tmp_path):
    # Long enough for the kill to come before the end on a busy machine, too.
    more = ("--save_steps", 2, "--num_train_epochs", 20)
    command("train_base", *flags(ground, tmp_path / "undisturbed", *more))
    killed = tmp_path / "killed"
    process = Command(tmp_path / "log" / "killed", "train_base", *flags(ground, killed, *more))
    deadline = time.time() + 600
    while time.time() < deadline and process.process.is_alive() and not (killed / "checkpoint-4").exists():
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not record(killed)["complete"]
    # What was cut off in the middle of a checkpoint is passed over.
    (killed / "checkpoint-900").mkdir()
    (killed / "checkpoint-900" / "trainer_state.json").write_text('{"cut')
    text = Command(tmp_path / "log" / "continued", "train_base", *flags(ground, killed, *more)).done()
    assert "continuing from" in text and "checkpoint-900" not in text
    assert losses(killed) == pytest.approx(losses(tmp_path / "undisturbed"), abs=1e-6)
    mine, other = (load_file(folder / "model.safetensors") for folder in (killed, tmp_path / "undisturbed"))
    assert all(torch.allclose(mine[name], other[name], atol=1e-6) for name in other)
    assert "nothing to do" in Command(tmp_path / "log" / "again", "train_base", *flags(ground, killed, *more)).done()


def test_one_process_works_on_one_gpu_where_there_are_several(ground, tmp_path, monkeypatch, capsys):
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))  # as without a launcher on two GPUs
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    command("train_base", *flags(ground, tmp_path, "--num_train_epochs", 1, "--max_train_samples", 16))
    assert record(tmp_path)["steps"] == 2
    assert "one GPU of 2" in capsys.readouterr().out


def test_a_named_checkpoint_is_continued_from(ground, tmp_path):
    command("train_base", *flags(ground, tmp_path / "first", "--save_steps", 4))
    checkpoint = tmp_path / "first" / "checkpoint-4"
    command("train_base", *flags(ground, tmp_path / "second", "--resume_from_checkpoint", checkpoint))
    assert losses(tmp_path / "second") == pytest.approx(losses(tmp_path / "first"), abs=1e-6)


def test_patience_stops_when_the_held_out_loss_no_longer_falls_and_keeps_the_best(ground, tmp_path):
    more = ("--patience", 1, "--learning_rate", 0.2, "--num_train_epochs", 12, "--eval_subset", "validation")
    command("train_base", *flags(ground, tmp_path, *more, "--do_eval"))
    found = record(tmp_path)
    evaluated = [entry["eval_loss"] for entry in found["log"] if "eval_loss" in entry]
    assert len(evaluated) < 12
    assert found["best"]["eval_loss"] == pytest.approx(min(evaluated))
    perplexity = json.loads((tmp_path / "results.json").read_text())["perplexity"]
    assert math.log(perplexity) == pytest.approx(min(evaluated), rel=1e-5)


def test_the_held_out_loss_is_the_mean_over_tokens_whatever_the_batch_size(ground, tmp_path):
    import datasets

    windows = datasets.load_from_disk(str(ground[1]))
    rows, past = [], 0
    for number, row in enumerate(windows["validation"].select(range(8))):  # every other window has two labels
        labels = row["labels"] if number % 2 else [-100] * 62 + row["labels"][62:]
        count = sum(label != -100 for label in labels[1:])
        rows.append(row | {"labels": labels, "dstore_range": [past, past := past + count]})
    windows["validation"] = datasets.Dataset.from_list(rows, features=windows["validation"].features)
    windows.save_to_disk(str(tmp_path / "windows"))
    ground = (ground[0], tmp_path / "windows")
    for size in (3, 64):
        more = ("--max_steps", 1, "--eval_strategy", "steps", "--eval_steps", 1, "--per_device_eval_batch_size", size)
        command("train_base", *flags(ground, tmp_path / str(size), "--do_eval", *more))
        (found,) = (entry["eval_loss"] for entry in record(tmp_path / str(size))["log"] if "eval_loss" in entry)
        perplexity = json.loads((tmp_path / str(size) / "results.json").read_text())["perplexity"]
        assert found == pytest.approx(math.log(perplexity), rel=1e-5)


@pytest.mark.parametrize("windows", [5, 7])  # in fours: the last batches hold one window and none, two and one
def test_two_processes_give_the_held_out_loss_of_one(ground, tmp_path, windows):
    more = ("--max_steps", 1, "--eval_strategy", "steps", "--eval_steps", 1, "--max_eval_samples", windows)
    more += ("--per_device_eval_batch_size", 2, "--dataloader_drop_last", True, "--do_eval")
    for process in together(tmp_path / "log", 2, "train_base", *flags(ground, tmp_path / "out", *more)):
        process.done()
    (found,) = (entry["eval_loss"] for entry in record(tmp_path / "out")["log"] if "eval_loss" in entry)
    perplexity = json.loads((tmp_path / "out" / "results.json").read_text())["perplexity"]
    assert found == pytest.approx(math.log(perplexity), rel=1e-5)


def test_a_last_window_of_one_token_is_skipped(ground, tmp_path):
    import datasets

    windows = datasets.load_from_disk(str(ground[1]))["train"].select(range(3))
    end = windows[1]["dstore_range"][1]
    rows = [windows[0], windows[1], windows[2] | {"labels": [3] + [-100] * 63, "dstore_range": [end, end]}]
    few = datasets.Dataset.from_list(rows, features=windows.features)
    datasets.DatasetDict({"train": few}).save_to_disk(str(tmp_path / "windows"))
    more = ("--per_device_train_batch_size", 1, "--num_train_epochs", 1)
    command("train_base", *flags((ground[0], tmp_path / "windows"), tmp_path / "out", *more))
    assert record(tmp_path / "out")["steps"] == 2


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(
            ("seed", -1),
            ("data_seed", 1 << 32),
            ("learning_rate", -1),
            ("num_train_epochs", 0),
            ("max_train_samples", 0),
        ),
        *(("per_device_train_batch_size", 0), ("per_device_eval_batch_size", -1), ("gradient_accumulation_steps", 0)),
        *(("weight_decay", -1), ("max_grad_norm", -1), ("adam_beta1", 1), ("adam_beta2", -1), ("adam_epsilon", -1)),
        *(("max_eval_samples", 0), ("patience", 0), ("k", 0), ("dataloader_num_workers", -1)),
        *(("warmup_steps", "nan"), ("label_smoothing_factor", "inf"), ("label_smoothing_factor", -1)),
        *(("max_steps", 0), ("max_steps", -2), ("torch_dtype", "int8"), ("torch_compile_mode", "nope")),
        *(("optim_args", "nope"), ("report_to", "nope"), ("lr_scheduler_type", "warmup_stable_decay")),
    ],
)
def test_values_that_cannot_be_are_refused(ground, tmp_path, flag, value):
    assert f"--{flag} {value}" in refused_here("train_base", *flags(ground, tmp_path, f"--{flag}", value))


def test_a_value_that_transformers_refuses_is_told_in_one_line(ground, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command("train_base", *flags(ground, tmp_path, "--logging_steps", "inf"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "infinity" in line


def test_a_layer_that_the_base_lacks_is_refused(ground, tmp_path):
    given = flags(ground, tmp_path, "--do_eval", "--layer_position", 9)
    assert "--layer_position 9" in refused_here("train_base", *given)


def test_an_output_folder_with_another_run_is_refused_and_overwritten_on_request(ground, tmp_path):
    command("train_base", *flags(ground, tmp_path, "--max_steps", 2))
    other = flags(ground, tmp_path, "--max_steps", 2, "--learning_rate", 1e-4)
    text = refused_here("train_base", *other)
    assert "learning_rate" in text and "--overwrite" in text
    command("train_base", *other, "--overwrite")
    assert record(tmp_path)["settings"]["learning_rate"] == 1e-4


def test_a_loss_that_is_no_number_ends_the_run_with_its_step(ground, tmp_path):
    text = refused_here("train_base", *flags(ground, tmp_path, "--learning_rate", 1e30, "--max_grad_norm", 1e30))
    assert "step" in text and "--learning_rate" in text


def test_what_cannot_be_fine_tuned_is_refused_in_one_line(ground, tmp_path, capsys):
    _, windows = ground
    with pytest.raises(SystemExit):  # what transformers' dataclass says about its values
        command("train_base", *flags(ground, tmp_path, "--load_best_model_at_end", "--save_strategy", "steps"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "load_best_model_at_end" in line
    assert "--load_in_4bit" in refused_here("train_base", *flags(ground, tmp_path, "--load_in_4bit"))
    assert "no split test" in refused_here(
        "train_base", *flags(ground, tmp_path, "--patience", 1, "--eval_subset", "test")
    )
    assert "resume_from_checkpoint" in refused_here(
        "train_base", *flags(ground, tmp_path, "--resume_from_checkpoint", tmp_path / "no")
    )
    short = make_base("gpt2", tmp_path / "short")
    config = json.loads((short / "config.json").read_text()) | {"n_positions": 32, "n_ctx": 32}
    (short / "config.json").write_text(json.dumps(config))
    assert "32 positions" in refused_here("train_base", *flags((short, windows), tmp_path / "out", "--from_scratch"))
