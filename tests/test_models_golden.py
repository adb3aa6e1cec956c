"""The models give the original's numbers (tests/golden) for all three families, within 1e-4."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from models import MLPMemory, load_memory
from models.capture import base_logits, hidden_and_head_input, hidden_states
from utils.evaluation import predicted_positions

pytestmark = pytest.mark.unit
GOLDEN = Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
TOLERANCE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module", params=["gpt2", "llama", "mistral"])
def golden(request):
    folder = GOLDEN / request.param
    base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    memory = load_memory(folder / "memory")
    return base, memory, load_file(folder / "expected.safetensors"), EXPECTED[request.param]


def test_captured_hidden_states_are_the_originals(golden):
    base, _, tensors, _ = golden
    torch.testing.assert_close(hidden_states(base, tensors["input_ids"]), tensors["mlp_input"], **TOLERANCE)


@torch.no_grad()
def test_base_and_memory_logits_are_the_originals(golden):
    base, memory, tensors, _ = golden
    torch.testing.assert_close(base(tensors["input_ids"]).logits, tensors["base_logits"], **TOLERANCE)
    torch.testing.assert_close(memory(tensors["mlp_input"]).logits, tensors["memory_logits"], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize(("lmbda", "knn_temp", "name"), [(0.25, 1.0, "l025_t1"), (0.6, 2.0, "l06_t2")])
def test_joint_log_probabilities_and_loss_are_the_originals(golden, lmbda, knn_temp, name):
    base, memory, tensors, losses = golden
    joint = MLPMemory(base, memory, lmbda=lmbda, knn_temp=knn_temp)
    output = joint(tensors["input_ids"], labels=tensors["labels"])
    torch.testing.assert_close(output.logits, tensors[f"joint_logprobs_{name}"], **TOLERANCE)
    assert output.loss.item() == pytest.approx(losses[f"loss_{name}"], abs=1e-4)


@torch.no_grad()
def test_loss_at_the_first_block_is_the_originals(golden):
    base, memory, tensors, losses = golden
    joint = MLPMemory(base, memory, layer_position=0)
    loss = joint(tensors["input_ids"], labels=tensors["labels"]).loss
    assert loss.item() == pytest.approx(losses["loss_layer_position_0"], abs=1e-4)


def test_greedy_tokens_are_the_originals(golden):
    base, memory, tensors, _ = golden
    joint = MLPMemory(base, memory)
    prompt = tensors["input_ids"][:1, :6]
    tokens = joint.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(tokens, tensors["greedy_l025_t1_prompt6_new12"])


def test_datastore_rows_are_captured_states_and_next_labels(golden):
    base, _, tensors, _ = golden
    positions, values = predicted_positions(tensors["labels"])
    keys, head_input = hidden_and_head_input(base, tensors["input_ids"], positions)
    torch.testing.assert_close(keys.half(), tensors["dstore_keys"], rtol=2e-3, atol=1e-6)
    assert torch.equal(values.int(), tensors["dstore_vals"])
    torch.testing.assert_close(
        base_logits(base, head_input), tensors["base_logits"].flatten(0, 1)[positions], **TOLERANCE
    )
