"""Attention in bfloat16 by blocks: the numbers of torch's own attention, only where it applies."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from models import cpu_attention
from models.capture import hidden_and_logits, hidden_states
from models.cpu_attention import BLOCK_QUERIES, blocks_are_quicker, causal_attention, quick_attention


@pytest.fixture
def quicker(monkeypatch):
    """Counts the calls of `causal_attention`, on a processor for which it is made."""
    calls = []

    def counted(*given):
        calls.append(given[0].shape)
        return causal_attention(*given)

    monkeypatch.setattr(cpu_attention, "blocks_are_quicker", lambda: True)
    monkeypatch.setattr(cpu_attention, "causal_attention", counted)
    return calls


def parts(time: int, heads: int = 6, groups: int = 2, width: int = 16, dtype=torch.bfloat16, batch: int = 2):
    torch.manual_seed(0)
    shapes = [(batch, time, heads, width), (batch, time, groups, width), (batch, time, groups, width)]
    return [torch.randn(shape).to(dtype).transpose(1, 2) for shape in shapes]


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("time", [1, BLOCK_QUERIES, BLOCK_QUERIES + 1, 3 * BLOCK_QUERIES - 5])
def test_it_is_causal_attention(time, scale, groups):
    query, key, value = (part.double() for part in parts(time, groups=groups))
    wanted = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    torch.testing.assert_close(causal_attention(query, key, value, scale), wanted, rtol=1e-9, atol=1e-9)


def test_in_bfloat16_the_error_is_of_the_roundings():
    query, key, value = parts(400, width=64)
    wanted = scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=True, enable_gqa=True)
    found = causal_attention(query, key, value)
    assert found.dtype == torch.bfloat16
    assert (found - wanted).norm() / wanted.norm() < 0.006


def test_it_takes_causal_attention_of_whole_texts_in_bfloat16(quicker):
    def ask(query, key, value, **options):
        with quick_attention(query.device):
            found = scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)
        wanted = scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
        return len(quicker)

    long = parts(300)
    assert ask(*long, is_causal=True) == 1
    assert ask(*long, is_causal=True, scale=0.1) == 2
    assert ask(*long) == 2  # not causal
    assert ask(*long, attn_mask=torch.ones(300, 300, dtype=torch.bool).tril(7)) == 2
    assert ask(*parts(300, dtype=torch.float32), is_causal=True) == 2
    assert ask(*parts(BLOCK_QUERIES), is_causal=True) == 2  # short
    assert ask(long[0][:, :, -200:], *long[1:], is_causal=True) == 2  # a continuation
    wants = [part.clone().requires_grad_() for part in long]
    assert ask(*wants, is_causal=True) == 2
    with torch.no_grad():
        assert ask(*wants, is_causal=True) == 3


def llama():
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=99,
    )
    return LlamaForCausalLM(config)


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=400, vocab_size=99))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_captured_states_and_logits_stay_within_rounding(make, quicker, monkeypatch):
    torch.manual_seed(0)
    model = make().to(torch.bfloat16).eval()
    ids = torch.randint(0, 99, (2, 300))
    found = hidden_states(model, ids)
    assert len(quicker) == 3
    with torch.no_grad():
        both = hidden_and_logits(model, ids)
    assert len(quicker) == 6
    torch.testing.assert_close(both[0], found)
    # A text with padding has a mask, and takes the usual way.
    mask = torch.ones_like(ids)
    mask[0, :40] = 0
    hidden_states(model, ids, mask)
    assert len(quicker) == 6
    monkeypatch.setattr(cpu_attention, "blocks_are_quicker", lambda: False)
    with torch.no_grad():
        wanted = hidden_and_logits(model, ids)
    assert len(quicker) == 6
    for one, other in zip(both, wanted, strict=True):
        assert (one.float() - other.float()).norm() / other.float().norm() < 0.02


def test_the_processor_decides(monkeypatch):
    cases = [
        ({"avx512_bf16": True, "amx_tile": False}, True),
        ({"avx512_bf16": True, "amx_tile": True}, False),
        ({"avx512_bf16": False}, False),
        ({}, False),
    ]
    for found, wanted in cases:
        blocks_are_quicker.cache_clear()
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert blocks_are_quicker() is wanted
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    blocks_are_quicker.cache_clear()
    assert not blocks_are_quicker()  # an older torch
    blocks_are_quicker.cache_clear()
    assert quick_attention(torch.device("meta")).__enter__() is None
