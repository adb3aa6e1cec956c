"""Any decoder whose blocks have `.mlp`: a memory from its config, saved, loaded, joined, trained and generating."""

import json

import pytest
import torch
from tiny_models import VOCABULARY, some_ids, tiny_base, tiny_memory
from transformers import AutoConfig, AutoModelForCausalLM

from models import MLPMemory, load_memory, memory_class
from models.capture import captured_module, final_norm, hidden_states

pytestmark = pytest.mark.unit
FAMILIES = [
    *("qwen2", "qwen3", "gemma", "gemma3_text", "olmo2", "phi3", "smollm3"),
    *("gpt_neox", "gpt_bigcode", "granite", "starcoder2"),
]


@pytest.fixture(scope="module", params=FAMILIES)
def base(request):
    return tiny_base(request.param)


@pytest.fixture(scope="module")
def memory(base):
    return tiny_memory(base)


def test_the_stack_is_made_of_the_familys_own_mlp_and_norm(base, memory):
    assert type(memory) is memory_class(AutoConfig.for_model(base.config.model_type))
    own_mlp, own_norm = captured_module(base), final_norm(base)
    for block in memory.blocks:
        assert type(block.mlp) is type(own_mlp)
        assert type(block.input_layernorm) is type(own_norm)
    assert type(memory.final_norm) is type(own_norm)
    assert len(memory.blocks) == 3
    assert memory.lm_head.weight.shape == (VOCABULARY, 32)
    assert not any(parameter.is_meta for parameter in memory.parameters())


def test_the_joint_model_mixes_trains_and_generates(base, memory):
    joint = MLPMemory(base, memory, lmbda=0.4)
    ids = some_ids()
    output = joint(ids, labels=ids)
    torch.testing.assert_close(output.logits.exp().sum(-1), torch.ones(2, 12))
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in memory.parameters())
    joint.zero_grad()
    tokens = joint.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        assert torch.equal(tokens[:, 12:], joint(tokens).logits.argmax(-1)[:, 11:-1])


def test_a_joint_folder_opens_again_and_the_memory_in_it(base, memory, tmp_path):
    joint = MLPMemory(base, memory, lmbda=0.4)
    joint.save_pretrained(tmp_path, include_base=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    loaded = load_memory(tmp_path)
    assert type(loaded) is type(memory)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in memory.state_dict().items())
    config = json.loads((tmp_path / "memory" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == (base.config.model_type, [type(memory).__name__])
    with torch.no_grad():
        states = hidden_states(base, some_ids())
        assert torch.equal(loaded(states).logits, memory(states).logits)
        torch.testing.assert_close(again(some_ids()).logits, joint(some_ids()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["opt", "mixtral", "vit"])
def test_a_family_without_a_plain_mlp_is_refused(family):
    with pytest.raises(ValueError, match=f"'{family}'"):
        memory_class(AutoConfig.for_model(family))
