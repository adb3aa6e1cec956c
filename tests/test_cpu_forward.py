"""Attention in bfloat16 by blocks, linear layers by oneDNN: the numbers of torch's own ways, only where they apply."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from models import cpu_forward
from models.capture import hidden_and_logits, hidden_states
from models.cpu_forward import (
    BLOCK_QUERIES,
    attention_blocks_are_quicker,
    causal_attention,
    onednn_is_quicker,
    onednn_linear,
    quick_forward,
)


def counted(monkeypatch, decides: str, works: str) -> list:
    """On a processor for which `decides` says yes: the shapes that the function `works` was called with."""
    calls, function = [], getattr(cpu_forward, works)

    def call(*given):
        calls.append(given[0].shape)
        return function(*given)

    monkeypatch.setattr(cpu_forward, decides, lambda: True)
    monkeypatch.setattr(cpu_forward, works, call)
    return calls


@pytest.fixture
def quicker(monkeypatch):
    return counted(monkeypatch, "attention_blocks_are_quicker", "causal_attention")


@pytest.fixture
def onednn(monkeypatch):
    return counted(monkeypatch, "onednn_is_quicker", "onednn_linear")


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
        with quick_forward(query.device):
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
    monkeypatch.setattr(cpu_forward, "attention_blocks_are_quicker", lambda: False)
    with torch.no_grad():
        wanted = hidden_and_logits(model, ids)
    assert len(quicker) == 6
    for one, other in zip(both, wanted, strict=True):
        assert (one.float() - other.float()).norm() / other.float().norm() < 0.02


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(300, 24), (2, 150, 24), (0, 24)])
def test_a_linear_layer_by_onednn(shape, bias):
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 40, bias=bias)
    inputs = torch.randn(shape)
    with torch.inference_mode():
        found = onednn_linear(inputs, layer.weight, layer.bias)
        torch.testing.assert_close(found, layer(inputs), rtol=1e-5, atol=1e-5)
        if len(shape) == 3:  # a view that is not contiguous
            turned = inputs.transpose(0, 1)
            torch.testing.assert_close(onednn_linear(turned, layer.weight, layer.bias), layer(turned))


class Other(torch.Tensor):
    """Stands for what quantised and sharded weights are: a class of tensors with ways of its own."""


def test_onednn_takes_float32_products_of_many_rows(onednn, monkeypatch):
    layer = torch.nn.Linear(24, 40)
    many, few = torch.randn(300, 24), torch.randn(200, 24)
    cpu = torch.device("cpu")

    def count(run) -> int:
        with quick_forward(cpu):
            run()
        return len(onednn)

    with torch.inference_mode():
        assert count(lambda: layer(many)) == 1
        assert count(lambda: linear(many, layer.weight)) == 2
        assert count(lambda: layer(few)) == 2
        assert count(lambda: layer.double()(many.double())) == 2
        assert count(lambda: layer.bfloat16()(many.bfloat16())) == 2
        layer.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert count(lambda: layer(many)) == 2
        with monkeypatch.context() as small:
            small.setattr(cpu_forward, "MOST_BYTES", 1000)
            assert count(lambda: layer(many)) == 2
        assert count(lambda: torch.addmm(layer.bias, many, torch.randn(24, 40))) == 3
        assert count(lambda: torch.addmm(torch.randn(300, 40), many, torch.randn(24, 40))) == 3
        other = torch.nn.Linear(24, 40)
        other.weight = torch.nn.Parameter(torch.randn(40, 24).as_subclass(Other), requires_grad=False)
        assert count(lambda: other(many)) == 3
    trained = torch.nn.Linear(24, 40)
    assert count(lambda: trained(many).sum().backward()) == 3 and trained.weight.grad is not None


@pytest.mark.parametrize("make", [llama, gpt2])
def test_captured_states_and_logits_in_float32_stay_within_rounding(make, onednn, monkeypatch):
    torch.manual_seed(0)
    model = make().eval()
    ids = torch.randint(0, 99, (2, 300))
    with torch.no_grad():
        hidden = hidden_states(model, ids)
        used = len(onednn)
        both = hidden_and_logits(model, ids)
    assert used >= 10
    torch.testing.assert_close(both[0], hidden)
    monkeypatch.setattr(cpu_forward, "onednn_is_quicker", lambda: False)
    with torch.no_grad():
        wanted = hidden_and_logits(model, ids)
    for one, other in zip(both, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_processor_decides(monkeypatch):
    cases = [
        ({"avx512_bf16": True, "amx_tile": False, "avx512_f": True, "cpu_name": "AMD EPYC"}, (True, True)),
        ({"avx512_bf16": True, "amx_tile": True, "avx512_f": True, "cpu_name": "Intel(R) Xeon(R)"}, (False, False)),
        ({"avx512_bf16": False, "avx512_f": False, "cpu_name": "AMD Ryzen 7"}, (False, False)),
        ({}, (False, False)),
    ]
    there = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    for found, (blocks, products) in cases:
        cpu_forward._capabilities.cache_clear()
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert attention_blocks_are_quicker() is blocks
        assert onednn_is_quicker() is (products and there)
        plain = isinstance(quick_forward(torch.device("cpu")), contextlib.nullcontext)
        assert plain is not (blocks or (products and there))
        assert isinstance(quick_forward(torch.device("cuda")), contextlib.nullcontext)
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # an older torch
    cpu_forward._capabilities.cache_clear()
    assert not attention_blocks_are_quicker() and not onednn_is_quicker()
    cpu_forward._capabilities.cache_clear()
