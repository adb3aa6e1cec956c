"""What a continued training keeps though it could be chosen otherwise at the second start; remote code."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from harness import Command, refused_here, run

from training.arguments import TrainerArguments


def flags(world, output, *more):
    """The offline trainer's flags without --mixed_precision: flags, launcher or device choose it."""
    words = world.trainer(output, "--knn_dstore_path", world.dstore("train"), "--checkpointing_steps", 1, *more)
    at = words.index("--mixed_precision")
    return [*words[:at], *words[at + 2 :]]


@pytest.mark.unit
@pytest.mark.parametrize(
    ("capability", "given", "sharded", "chosen"),
    [
        *(((8, 0), None, "", "bf16"), ((7, 5), None, "", "fp16"), ((7, 0), None, "true", "no")),
        ((7, 5), "bf16", "", "bf16"),
    ],
)
def test_the_bf16_of_a_launcher_becomes_fp16_on_a_gpu_without_it(
    capability, given, sharded, chosen, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("training.arguments.default_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("accelerate.Accelerator", lambda **given: SimpleNamespace(state=None, **given))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", sharded)
    assert (
        TrainerArguments(output_dir=str(tmp_path), mixed_precision=given).make_accelerator().mixed_precision == chosen
    )
    assert capsys.readouterr().out.count("\n") == (chosen in ("fp16", "no"))


@pytest.fixture(scope="module")
def interrupted(llama_world, tmp_path_factory):
    """A run in bfloat16 that was cut off before it was recorded as complete."""
    folder = tmp_path_factory.mktemp("precision") / "run"
    log = folder.with_name("log")
    Command(log, "train_mlpmem_offline", *flags(llama_world, folder, "--mixed_precision", "bf16")).done()
    state = next(folder.glob("epoch_*/state"))
    saved = json.loads((state / "trainer_state.json").read_text())
    assert saved["precision"] == {"mixed_precision": "bf16", "torch_dtype": "float32"}
    record = json.loads((folder / "training.json").read_text())
    (folder / "training.json").write_text(json.dumps(record | {"complete": False}))
    return folder


def continued(interrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(interrupted, folder)
    return folder


def test_a_continued_run_keeps_the_precision_that_was_chosen_for_it(llama_world, interrupted, tmp_path):
    folder = continued(interrupted, tmp_path)
    launcher = {"ACCELERATE_MIXED_PRECISION": "no"}
    again = Command(tmp_path / "log", "train_mlpmem_offline", *flags(llama_world, folder), environment=launcher)
    text = again.done()
    assert "precision bf16, in which this run began" in text
    assert "precision bf16, seed" in text
    assert json.loads((folder / "training.json").read_text())["precision"]["mixed_precision"] == "bf16"


def test_another_precision_is_refused_by_name_for_a_continued_run(llama_world, interrupted, tmp_path):
    text = refused_here("train_mlpmem_offline", *flags(llama_world, interrupted, "--mixed_precision", "no"))
    assert "--mixed_precision no" in text and "bf16" in text and "--overwrite" in text
    checkpoint = next(interrupted.glob("epoch_*"))
    other = flags(llama_world, tmp_path, "--resume_from_checkpoint", checkpoint, "--mixed_precision", "no")
    assert "bf16" in refused_here("train_mlpmem_offline", *other)


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
    assert "--trust_remote_code" in refused_here(*scored)
    words = llama_world.trainer(tmp_path / "memory", "--model_name_or_path", base, "--validation_split_name", "none")
    assert "--trust_remote_code" in refused_here("train_mlpmem_online", *words)
    assert not mark.exists()
    run("-m", *scored, "--trust_remote_code", **cache)
    assert mark.exists()
