"""Forward passes without gradient on a CPU, where torch's own choice of kernels is not the quickest.

Attention in bfloat16: where a processor multiplies bfloat16 in vectors but not in tiles, torch's fused attention computes
its products in float32 and is as slow as in float32. Here a block of queries meets all keys up to its end in two batched
products and a softmax, which go as fast as the linear layers. Scores are rounded to bfloat16, the softmax is float32:
the roundings of transformers' "eager" attention.

Linear layers in float32: torch takes MKL for them, which leaves AVX-512 unused on AMD's processors; oneDNN does not.
Tensors in its layout go through oneDNN; the copies cost less than they gain.

Knows nothing of models.
"""

from __future__ import annotations

import contextlib
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

BLOCK_QUERIES = 128
# Smaller products are not worth the copies, larger ones would take much memory for them.
LEAST_ROWS = 256
MOST_BYTES = 256 << 20


def quick_forward(device: torch.device) -> contextlib.AbstractContextManager:
    """A context for forward passes on `device`: the ways of this module are taken where they are quicker.

    That is on the processors named above, where no gradient is wanted: causal attention of whole texts in bfloat16
    without mask or dropout, and linear layers of many rows in float32. Everything else stays as it is.
    """
    here = device.type == "cpu" and (attention_blocks_are_quicker() or onednn_is_quicker())
    return _QuickForward() if here else contextlib.nullcontext()


class _QuickForward(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is linear and not kwargs and onednn_is_quicker() and _linear_fits(*args):
            return onednn_linear(*args)
        if func is torch.addmm and len(args) == 3 and not kwargs and onednn_is_quicker():  # GPT-2's linear layers
            bias, inputs, weight = args
            if bias.dim() == 1 and _linear_fits(inputs, weight.t(), bias):
                return onednn_linear(inputs, weight.t(), bias)
        if func is scaled_dot_product_attention and attention_blocks_are_quicker() and _attention_fits(*args, **kwargs):
            return causal_attention(*args, kwargs.get("scale"))
        return func(*args, **kwargs)


@cache
def _capabilities() -> dict[str, Any]:
    return dict(getattr(torch.cpu, "get_capabilities", dict)())  # an older torch does not tell


def attention_blocks_are_quicker() -> bool:
    """Whether this processor has bfloat16 products of vectors (AVX512_BF16) and none of tiles (AMX)."""
    return bool(_capabilities().get("avx512_bf16")) and not _capabilities().get("amx_tile")


def onednn_is_quicker() -> bool:
    """Whether this is an AMD processor with AVX-512, and torch has both libraries."""
    amd = str(_capabilities().get("cpu_name", "")).startswith("AMD") and bool(_capabilities().get("avx512_f"))
    return amd and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


def _plain(*tensors: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether all are ordinary dense tensors of `dtype` on the CPU: no quantised, sharded or traced ones."""
    return all(
        tensor is None
        or (
            type(tensor) in (Tensor, torch.nn.Parameter)
            and (tensor.device.type, tensor.dtype, tensor.layout) == ("cpu", dtype, torch.strided)
        )
        for tensor in tensors
    )


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _linear_fits(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    rows = inputs.numel() // max(inputs.shape[-1], 1)
    widest = max(weight.shape)
    return (
        _plain(inputs, weight, bias, dtype=torch.float32)
        and weight.dim() == 2
        and rows >= LEAST_ROWS
        and rows * widest * 4 <= MOST_BYTES
        and not torch.is_autocast_enabled("cpu")
        and not _wants_gradient(inputs, weight, bias)
    )


def onednn_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """inputs weightᵀ + bias by oneDNN: (…, in), (out, in), (out,) → (…, out), float32."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    found = linear(rows.to_mkldnn(), weight.to_mkldnn()).to_dense()  # (rows, out)
    if bias is not None:
        found += bias
    return found.view(*inputs.shape[:-1], weight.shape[0])


def _attention_fits(
    *args: Any, is_causal: bool = False, attn_mask: Any = None, dropout_p: float = 0.0, **_: Any
) -> bool:
    if len(args) != 3 or not is_causal or attn_mask is not None or dropout_p:
        return False
    query, key, value = args
    return (
        _plain(*args, dtype=torch.bfloat16)
        and query.dim() == 4
        and query.shape[2] == key.shape[2] > BLOCK_QUERIES
        and key.shape == value.shape
        and query.shape[1] % key.shape[1] == 0
        and not _wants_gradient(*args)
    )


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale · query keyᵀ + causal mask) value, in the arguments' dtype.

    Args:
        query: (batch, heads, time, width); key, value: (batch, groups, time, width), `heads` a multiple of `groups`.
        scale: of the scores; by default width ** -0.5.

    Returns:
        (batch, heads, time, width), laid out in memory as (batch, time, heads, width).
    """
    batch, heads, time, width = query.shape
    groups = key.shape[1]
    each = heads // groups  # heads that share their keys
    scale = width**-0.5 if scale is None else scale
    query = query.reshape(batch * groups, each, time, width)
    key, value = key.reshape(batch * groups, time, width), value.reshape(batch * groups, time, width)
    out = query.new_empty(batch, time, heads, width)
    hidden = torch.ones(BLOCK_QUERIES, BLOCK_QUERIES, dtype=torch.bool).triu(1)  # later keys of the block itself
    for start in range(0, time, BLOCK_QUERIES):
        stop = min(start + BLOCK_QUERIES, time)
        count = stop - start
        asked = query[:, :, start:stop].reshape(batch * groups, each * count, width)
        seen = key[:, :stop].transpose(1, 2)  # (batch · groups, width, stop)
        scores = torch.baddbmm(query.new_empty(()), asked, seen, beta=0, alpha=scale)
        scores = scores.view(batch * groups, each, count, stop)
        scores[..., start:].masked_fill_(hidden[:count, :count], float("-inf"))
        weights = torch.softmax(scores, dim=-1).view(batch * groups, each * count, stop)
        found = torch.bmm(weights, value[:, :stop])  # (batch · groups, each · count, width)
        out[:, start:stop] = found.view(batch, heads, count, width).transpose(1, 2)
    return out.transpose(1, 2)
