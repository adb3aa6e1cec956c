"""Base and memory trained together: a peft adapter on the base, trained through the mixture, merged and saved."""

from __future__ import annotations

import re

import pytest
import torch
from harness import command
from tiny_models import some_ids, tiny_base, tiny_memory
from transformers import AutoModelForCausalLM

from models import MLPMemory

peft = pytest.importorskip("peft", reason="the extra `compare` is not installed")
pytestmark = pytest.mark.unit


def adapted(base):
    """`base` with a LoRA adapter of nonzero weights, as after training."""
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return wrapped.eval()


def log_probs(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_an_adapted_base_is_mixed_trained_and_saved_merged(family, tmp_path):
    base, ids = tiny_base(family), some_ids()
    memory = tiny_memory(base)
    unadapted = log_probs(MLPMemory(base, memory, lmbda=0.4), ids)
    joint = MLPMemory(adapted(base), memory, lmbda=0.4)
    assert not torch.allclose(log_probs(joint, ids), unadapted, atol=1e-3)
    joint(ids, labels=ids).loss.backward()
    trained = {name for name, weight in joint.named_parameters() if weight.grad is not None}
    assert trained == {name for name, _ in joint.named_parameters() if "lora" in name or name.startswith("knn_")}
    joint.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(opened.base_lm, "peft_config")
    torch.testing.assert_close(log_probs(opened, ids), log_probs(joint, ids), rtol=1e-4, atol=1e-4)
    greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(opened.generate(ids, **greedy), joint.generate(ids, **greedy))
    assert torch.equal(log_probs(joint, ids), log_probs(MLPMemory(joint.base_lm, memory, lmbda=0.4), ids))


def test_the_memorys_share_trains_the_adapter_through_the_captured_state():
    base = tiny_base("llama")
    joint = MLPMemory(adapted(base), tiny_memory(base), lmbda=1.0)  # the base's own share is nothing
    joint(some_ids(), labels=some_ids()).loss.backward()
    weights = joint.base_lm.named_parameters()
    reached = {name for name, weight in weights if weight.grad is not None and weight.grad.any()}
    assert any("layers.0.mlp" in name for name in reached) and any("layers.1.self_attn" in name for name in reached)
    assert not any("layers.1.mlp" in name for name in reached)


def test_the_command_lowers_the_loss_and_writes_a_joint_folder(llama_world, tmp_path, capsys):
    tiny_memory(AutoModelForCausalLM.from_pretrained(llama_world.base)).save_pretrained(tmp_path / "memory")
    models = ("--model_name_or_path", llama_world.base, "--knn_generator_path", tmp_path / "memory")
    settings = ("--dataset_name", llama_world.windows, "--max_train_steps", 40, "--lmbda", 0.5)
    command("demo.train_together", *models, *settings, "--learning_rate", 1e-2, "--output_dir", tmp_path / "joint")
    losses = [float(number) for number in re.findall(r"step \d+: loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 40 and sum(losses[-5:]) < 0.95 * sum(losses[:5]), losses
    before = MLPMemory.from_pretrained(llama_world.base, tmp_path / "memory")
    after = MLPMemory.from_pretrained(tmp_path / "joint")
    changed = {name for name, weight in after.named_parameters() if not torch.equal(weight, before.get_parameter(name))}
    assert {name.split(".")[0] for name in changed} == {"base_lm", "knn_generator"}
