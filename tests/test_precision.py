"""The precision of a run, which a continued one keeps; remote code."""

from __future__ import annotations

import json
import os
import shutil

from harness import Command, refused_here, run


def flags(world, output, *more):
    """The offline trainer's flags without --mixed_precision: flags, launcher or device choose it."""
    words = world.trainer(output, "--knn_dstore_path", world.dstore("train"), "--checkpointing_steps", 1, *more)
    at = words.index("--mixed_precision")
    return [*words[:at], *words[at + 2 :]]


def test_a_continued_run_keeps_its_precision(llama_world, tmp_path):
    run = tmp_path / "run"
    command = ("train_mlpmem_offline", *flags(llama_world, run, "--validation_split_name", "none"))
    first = Command(tmp_path / "log", *command, "--mixed_precision", "bf16", hook=(stop_after, "step_2"))
    assert first.wait() == 7
    text = Command(tmp_path / "log", *command, "--mixed_precision", "no").refused()
    assert "mixed_precision" in text and "--overwrite" in text
    again = Command(tmp_path / "log", *command, environment={"ACCELERATE_MIXED_PRECISION": "no"}).done()
    assert "at step 2" in again and "precision bf16" in again
    settings = json.loads((run / "training.json").read_text())["settings"]
    assert settings["mixed_precision"] == "bf16"
    named = flags(llama_world, tmp_path / "other", "--resume_from_checkpoint", run / "epoch_1")
    text = Command(tmp_path / "log", "train_mlpmem_offline", *named, "--mixed_precision", "no").refused()
    assert "mixed_precision" in text and not (tmp_path / "other").exists()


def stop_after(checkpoint: str) -> None:
    """Hook: the process ends, with status 7, when it has written that checkpoint."""
    from training.trainer import MemoryTrainer

    save = MemoryTrainer._save

    def save_and_stop(trainer, name):
        save(trainer, name)
        if name == checkpoint:
            os._exit(7)

    MemoryTrainer._save = save_and_stop


REMOTE = """
from transformers import LlamaForCausalLM
from transformers.models.llama import LlamaConfig

open("{mark}", "a").write("ran\\n")


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_in_a_models_repository_runs_only_where_asked_for(llama_world, tmp_path):
    base, mark = tmp_path / "base", tmp_path / "mark"
    shutil.copytree(llama_world.base, base)
    (base / "own.py").write_text(REMOTE.format(mark=mark))
    config = json.loads((base / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (base / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": classes}))
    cache = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    scored = ("train_base", "--model_name_or_path", base, "--dataset_name", llama_world.windows, "--do_eval")
    scored += ("--eval_subset", "test", "--max_eval_samples", 1, "--output_dir", tmp_path / "scored")
    assert str(base) in refused_here(*scored)
    assert not mark.exists()
    run("-m", *scored, "--trust_remote_code", **cache)
    assert mark.exists()
