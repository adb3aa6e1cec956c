"""Hidden-state capture: the input of one block's `.mlp`, equal to a full forward's, with nothing computed after it."""

import threading

import pytest
import torch
from tiny_models import some_ids, tiny_base
from torch import nn

from models.capture import (
    HiddenCapture,
    base_logits,
    captured_module,
    decoder_blocks,
    final_norm,
    hidden_and_head_input,
    hidden_states,
)

pytestmark = pytest.mark.unit
FAMILIES = ["gpt2", "llama", "mistral", "gemma2", "gpt_neox"]


@pytest.fixture(scope="module", params=FAMILIES)
def base(request):
    return tiny_base(request.param)


def captured_by_a_full_forward(base, layer_position, **inputs):
    with HiddenCapture(captured_module(base, layer_position)) as capture, torch.no_grad():
        base(**inputs)
    return capture.hidden


@pytest.mark.parametrize("layer_position", [-1, 0, 1, -2])
def test_states_equal_those_of_a_full_forward_bit_by_bit(base, layer_position):
    ids = some_ids()
    expected = captured_by_a_full_forward(base, layer_position, input_ids=ids)
    assert torch.equal(hidden_states(base, ids, layer_position=layer_position), expected)


def test_nothing_after_the_captured_input_runs(base):
    ran = []
    later = [captured_module(base, 0), decoder_blocks(base)[1], final_norm(base), base.get_output_embeddings()]
    handles = [module.register_forward_hook(lambda module, args, output: ran.append(module)) for module in later]
    hidden_states(base, some_ids(), layer_position=0)
    for handle in handles:
        handle.remove()
    assert ran == []


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, {}) for family in [*FAMILIES, "cohere"]),
        ("gemma3_text", {"final_logit_softcapping": 5.0}),  # a cap
        ("granite", {"logits_scaling": 6.0}),  # this family divides by it,
        ("hyperclovax", {"logits_scaling": 6.0}),  # and this one multiplies
    ],
)
def test_states_and_logits_at_positions_are_those_of_a_full_forward(family, changes):
    base, ids = tiny_base(family, **changes), some_ids()
    positions = torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < 0.4
    hidden, head_input = hidden_and_head_input(base, ids, positions.flatten().nonzero()[:, 0])
    assert torch.equal(hidden, captured_by_a_full_forward(base, -1, input_ids=ids)[positions])
    torch.testing.assert_close(base_logits(base, head_input), base(ids).logits[positions], rtol=1e-4, atol=1e-4)


def test_a_family_that_does_something_else_to_its_logits_is_refused():
    base = tiny_base("llama")
    base.register_forward_hook(lambda module, args, output: setattr(output, "logits", output.logits.square()))
    with pytest.raises(ValueError, match="'llama'"):
        base_logits(base, torch.zeros(1, 32))


def test_a_layer_position_outside_the_model_is_refused(base):
    for layer_position in (2, -3):
        with pytest.raises(ValueError, match=f"layer_position {layer_position}"):
            captured_module(base, layer_position)


def test_a_model_without_one_list_of_blocks_with_mlp_is_refused():
    for model in (
        tiny_base("opt", ffn_dim=48, word_embed_proj_dim=32),
        nn.ModuleList([tiny_base("llama"), tiny_base("gpt2")]),
    ):
        with pytest.raises(ValueError, match="expected one"):
            decoder_blocks(model)


def test_a_pass_of_another_thread_is_not_captured():
    base = tiny_base("llama")
    ids = some_ids()
    with HiddenCapture(captured_module(base)) as capture:
        other = threading.Thread(target=lambda: base(ids))
        other.start()
        other.join()
        assert capture.hidden is None
        base(ids[:1])
        assert capture.take().shape[:2] == (1, 12)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_checkpointed_blocks_change_no_state_and_lose_no_gradient(family):
    base, ids = tiny_base(family).train(), some_ids()
    expected = hidden_states(base, ids)
    positions = torch.arange(ids.numel())
    for reentrant in (False, True):
        base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert torch.equal(hidden_states(base, ids), expected)  # as the online trainer and the datastore take them
        with torch.no_grad():
            assert torch.equal(hidden_and_head_input(base, ids, positions)[0], expected.flatten(0, 1))
    with pytest.raises(RuntimeError, match="use_reentrant"):
        hidden_and_head_input(base, ids, positions)
