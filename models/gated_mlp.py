"""The SwiGLU of Llama-like families, down(silu(gate(x)) · up(x)), as one function with a backward pass of its own, for
training on a CPU.

The plain modules keep five arrays of the MLP's inner width for the backward pass and go over each from memory to memory.
This function keeps two (gate and up), and takes the elementwise parts in blocks of rows that stay in the cache. Products
and roundings are those of the modules, in forward and backward. Knows nothing of losses or trainers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.activations import SiLUActivation

from utils.direct_gradients import add_gradient, in_place

# A block's arrays share a core's cache.
BLOCK_BYTES = 512 << 10


def gated_mlp(mlp: nn.Module, inputs: Tensor) -> Tensor:
    """`mlp(inputs)`, (…, hidden) → (…, hidden): by the function of this module where it applies, else by the modules.

    It applies where gradients are wanted on a CPU and `mlp` is made of three plain Linear layers without bias, with SiLU
    between them, that nothing has been hooked to.
    """
    if not (torch.is_grad_enabled() and inputs.device.type == "cpu" and _is_plain(mlp)):
        return mlp(inputs)
    dtype = torch.promote_types(inputs.dtype, mlp.gate_proj.weight.dtype)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    rows = inputs.reshape(-1, inputs.shape[-1])
    weights = (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
    return _GatedMLP.apply(rows, *weights, dtype).view(*inputs.shape[:-1], mlp.down_proj.out_features)


def _is_plain(mlp: nn.Module) -> bool:
    if torch.compiler.is_compiling() or not isinstance(getattr(mlp, "act_fn", None), nn.SiLU | SiLUActivation):
        return False
    parts = dict(mlp.named_children())
    if parts.keys() != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return False
    del parts["act_fn"]
    return not _hooked(mlp) and all(
        type(part) is nn.Linear and part.bias is None and type(part.weight) is nn.Parameter and not _hooked(part)
        for part in parts.values()
    )


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, gate_weight, up_weight, down_weight, dtype):
        with torch.autocast("cpu", enabled=False):
            narrow = [tensor.to(dtype) for tensor in (inputs, gate_weight, up_weight, down_weight)]
            x, to_gate, to_up, to_down = narrow
            gate = x @ to_gate.t()  # (rows, inner)
            up = x @ to_up.t()  # (rows, inner)
            inner = torch.empty_like(gate)
            for block in _blocks(gate):
                torch.mul(functional.silu(gate[block]), up[block], out=inner[block])
            ctx.save_for_backward(gate, up, *narrow)
            ctx.parameters = gate_weight, up_weight, down_weight
            ctx.input_dtype, ctx.in_place = inputs.dtype, in_place()
            return inner @ to_down.t()  # (rows, hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        gate, up, x, to_gate, to_up, to_down = ctx.saved_tensors
        for_gate, for_up, for_down = ctx.parameters
        grad_output = grad_output.to(x.dtype)
        grad_up = (
            grad_output @ to_down
        )  # (rows, inner); so far the gradient of the inner product, replaced block by block
        grad_gate, inner = torch.empty_like(gate), torch.empty_like(gate)
        for block in _blocks(gate):
            grad, activated = grad_up[block], functional.silu(gate[block])
            torch.mul(activated, up[block], out=inner[block])
            torch.ops.aten.silu_backward.grad_input(grad * up[block], gate[block], grad_input=grad_gate[block])
            grad.mul_(activated)
        wanted = ctx.needs_input_grad
        grads = [
            add_gradient(weight, left.t(), right, ctx.in_place) if wants else None
            for weight, left, right, wants in (
                (for_gate, grad_gate, x, wanted[1]),
                (for_up, grad_up, x, wanted[2]),
                (for_down, grad_output, inner, wanted[3]),
            )
        ]
        grad_inputs = None
        if wanted[0]:
            if x.dtype == torch.float32:
                grad_inputs = torch.mm(grad_up, to_up).addmm_(grad_gate, to_gate)
            else:  # as autograd adds them: each rounded by itself
                grad_inputs = (grad_up @ to_up).add_(grad_gate @ to_gate).to(ctx.input_dtype)
        return grad_inputs, *grads, None


def _blocks(rows: Tensor) -> list[slice]:
    """Slices of rows whose arrays stay in the cache."""
    size = max(BLOCK_BYTES // (rows.shape[1] * rows.element_size()), 1)
    return [slice(start, start + size) for start in range(0, len(rows), size)]
