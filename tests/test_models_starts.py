"""Initial weights of a memory: the base's head and final norm, or close to the base itself; and neuron dropout."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import HIDDEN, some_ids, tiny_base, tiny_memory
from torch import nn
from transformers.pytorch_utils import Conv1D

from models import MLPMemory, memory_class, memory_config
from models.capture import final_norm, hidden_states
from models.stack import head_scale
from models.starts import drop_neurons, init_from_base, init_lm_head, measure_scale

pytestmark = pytest.mark.unit
FAMILIES = ["gpt2", "llama", "mistral"]


def setup_of(family):
    base = tiny_base(family)
    with torch.no_grad():
        states, logits = hidden_states(base, some_ids(8, 32)), base(some_ids(8, 32)).logits
    return SimpleNamespace(base=base, states=states, logits=logits, scale=measure_scale(base, some_ids(4, 32)))


@pytest.fixture(scope="module", params=FAMILIES)
def setup(request):
    return setup_of(request.param)


def test_head_and_final_norm_are_the_bases(setup):
    memory = tiny_memory(setup.base)
    blocks = {name: value.clone() for name, value in memory.blocks.state_dict().items()}
    init_lm_head(memory, setup.base)
    assert torch.equal(memory.lm_head.weight, setup.base.get_output_embeddings().weight)
    assert memory.lm_head.weight is not setup.base.get_output_embeddings().weight
    for name, value in memory.final_norm.named_parameters():
        assert torch.equal(value, dict(final_norm(setup.base).named_parameters())[name])
    assert all(torch.equal(value, blocks[name]) for name, value in memory.blocks.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("family", [*FAMILIES, "qwen3", "gemma2", "gpt_neox", "gpt_bigcode", "granite"])
def test_a_memory_initialized_from_the_base_predicts_like_it(family):
    setup = setup_of(family)

    def divergence():
        """KL(base || memory) per position."""
        found, wanted = (logits.log_softmax(-1).flatten(0, 1) for logits in (memory(setup.states).logits, setup.logits))
        return nn.functional.kl_div(found, wanted, log_target=True, reduction="batchmean").item()

    memory = tiny_memory(setup.base)
    random = divergence()
    init_lm_head(memory, setup.base)
    head = divergence()
    init_from_base(memory, setup.base, setup.scale)
    assert divergence() < (0.25 if family in FAMILIES else 0.7) * head
    assert head < random or family not in FAMILIES


def test_a_constant_factor_on_the_logits_goes_into_the_head():
    base = tiny_base("cohere", logit_scale=0.125)
    memory = tiny_memory(base)
    init_lm_head(memory, base)
    torch.testing.assert_close(memory.lm_head.weight, base.get_output_embeddings().weight * 0.125, rtol=1e-3, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("family", "scale"), [("gpt2", {}), ("gemma2", {}), ("granite", {"logits_scaling": 6.0})])
def test_a_tied_memory_equals_one_with_the_bases_head(family, scale):
    base = tiny_base(family, **scale)
    copied = tiny_memory(base)
    config = memory_config(base.config, len(copied.blocks))
    config.tie_head, config.head_scale = "base", head_scale(base.config)
    tied = memory_class(config)(config).eval()
    assert tied.load_state_dict(copied.state_dict(), strict=False).missing_keys == []
    pairs = [MLPMemory(base, memory, 0.4) for memory in (tied, copied)]
    for joint in pairs:
        init_from_base(joint.knn_generator, base, measure_scale(base, some_ids(4, 32)))
    for size in (97, 60):
        tokens = [joint.resize_token_embeddings(size) and joint(some_ids().clamp(max=59)).logits for joint in pairs]
        assert tokens[0].shape[-1] == size
        torch.testing.assert_close(*tokens, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gpt_neox"])
def test_dropout_zeroes_neurons_in_training_only(family):
    memory, entered = tiny_memory(tiny_base(family)), []
    states = torch.randn(400, HIDDEN)
    whole = memory.eval()(states).logits
    drop_neurons(memory, 0.25)
    for block in memory.blocks:
        *_, projection = (each for each in block.mlp.modules() if isinstance(each, (nn.Linear, Conv1D)))
        projection.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    assert torch.equal(memory(states).logits, whole)
    kept = entered.copy()
    entered.clear()
    memory.train()(states)
    assert len(entered) == len(memory.blocks)
    assert all(0.2 < (each == 0).float().mean() < 0.3 for each in entered)
    left = entered[0] != 0
    assert torch.allclose(entered[0][left], kept[0][left] / 0.75)


def test_shapes_that_differ_are_refused():
    base = tiny_base("llama")
    with pytest.raises(ValueError, match=r"\(40, 32\).*\(48, 32\)"):
        init_from_base(tiny_memory(tiny_base("llama", intermediate_size=40)), base, measure_scale(base, some_ids()))
