"""The gated MLP's own backward pass, and gradients added in place: the numbers of the plain modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from models.gated_mlp import _GatedMLP, gated_mlp
from utils.cal_loss import fused_linear_distillation_loss
from utils.direct_gradients import gradients_in_place


def make(dtype: torch.dtype = torch.float32, inner: int = 48, **options) -> LlamaMLP:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=16, intermediate_size=inner, num_attention_heads=2, **options)
    mlp = LlamaMLP(config)
    for weight in mlp.parameters():
        nn.init.normal_(weight, std=0.3)
    return mlp.to(dtype)


def gradients(mlp, inputs: torch.Tensor, run, *, autocast: bool = False) -> list[torch.Tensor]:
    """Output, gradient of the input, gradients of the weights."""
    mlp.zero_grad()
    x = inputs.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = run(mlp, x)
    out.float().square().sum().backward()
    return [out.detach(), x.grad, *(weight.grad for weight in mlp.parameters())]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("shape", [(7, 16), (2, 5, 16), (700, 16), (0, 16)])
def test_output_and_gradients_are_those_of_the_modules(shape, autocast, monkeypatch):
    monkeypatch.setattr("models.gated_mlp.BLOCK_BYTES", 4096)  # several blocks, the last one short
    mlp = make()
    inputs = torch.randn(shape)
    plain = gradients(mlp, inputs, lambda m, x: m(x), autocast=autocast)
    fused = gradients(mlp, inputs, gated_mlp, autocast=autocast)
    for a, b in zip(plain, fused, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2 if autocast else 1e-5, atol=1e-2 if autocast else 1e-5)


def test_the_gradient_in_double_precision():
    sizes = (3, 4), (5, 4), (5, 4), (4, 5)
    tensors = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    assert torch.autograd.gradcheck(lambda *given: _GatedMLP.apply(*given, torch.float64), tensors)


def is_fused(output: torch.Tensor) -> bool:
    return "GatedMLP" in str((output.grad_fn, output.grad_fn.next_functions))


def test_it_keeps_away_from_what_it_does_not_know():
    x = torch.randn(3, 16)
    assert is_fused(gated_mlp(make(), x))
    others = [make(mlp_bias=True), make(hidden_act="gelu"), make()]
    others[2].up_proj.register_forward_hook(lambda module, inputs, output: 2 * output)
    for mlp in others:
        output = gated_mlp(mlp, x)
        assert not is_fused(output)
        assert torch.equal(output, mlp(x))
    with torch.no_grad():
        assert gated_mlp(make(), x).grad_fn is None


class Tiny(nn.Module):
    """An MLP, a head and the fused loss."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = make()
        self.head = nn.Parameter(torch.randn(30, 16))

    def forward(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        count = len(x)
        hidden = x + gated_mlp(self.mlp, x)
        labels = torch.arange(count) % 30
        ids, prob = torch.arange(2 * count) % 30, torch.full((2 * count,), 0.5)
        counts = torch.full((count,), 2)
        return fused_linear_distillation_loss(hidden, self.head, labels, counts, ids, prob, 0.3, 3, num_rows=rows)[0]


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_added_in_place_are_those_of_autograd(autocast):
    torch.manual_seed(1)
    model, rows = Tiny(), torch.randn(12, 16)
    found = []
    for allowed in (False, True):
        model.zero_grad()
        kept = None
        for piece in rows.split(5):
            with gradients_in_place(allowed), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                model(piece, 12).backward()
            if kept is None:
                kept = model.head.grad.data_ptr()
        assert model.head.grad.data_ptr() == kept
        found.append([weight.grad.clone() for weight in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2 if autocast else 1e-5, atol=1e-3 if autocast else 1e-6)


def test_a_scaled_gradient_in_place_is_refused():
    model, rows = Tiny(), torch.randn(4, 16)
    model(rows, 4).backward()
    with gradients_in_place():
        loss = model(rows, 4)
    with pytest.raises(RuntimeError, match="cannot be scaled"):
        (2 * loss).backward()
