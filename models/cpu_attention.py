"""Causal attention in bfloat16 on a CPU, by blocks of queries as two batched products and a softmax.

On processors that multiply bfloat16 in vectors but not in tiles, torch's fused attention computes its products in
float32, and is as slow as in float32. Products of a block of queries with all keys up to its end go as fast as those of
the linear layers. Scores are rounded to bfloat16, the softmax is float32: the roundings of transformers' "eager"
attention. Knows nothing of models.
"""

from __future__ import annotations

import contextlib
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

BLOCK_QUERIES = 128


def quick_attention(device: torch.device) -> contextlib.AbstractContextManager:
    """A context for forward passes on `device`, in which attention takes the blocks of this module where they are quicker.

    That is: causal attention of whole texts in bfloat16, without a mask, a gradient or dropout, on such a processor.
    """
    return _Blocks() if device.type == "cpu" and blocks_are_quicker() else contextlib.nullcontext()


class _Blocks(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and _fits(*args, **kwargs):
            return causal_attention(*args, kwargs.get("scale"))
        return func(*args, **kwargs)


@cache
def blocks_are_quicker() -> bool:
    """Whether this processor has bfloat16 products of vectors (AVX512_BF16) and none of tiles (AMX)."""
    ask = getattr(torch.cpu, "get_capabilities", dict)
    found = ask()
    return bool(found.get("avx512_bf16")) and not found.get("amx_tile")


def _fits(*args: Any, is_causal: bool = False, attn_mask: Any = None, dropout_p: float = 0.0, **_: Any) -> bool:
    if len(args) != 3 or not is_causal or attn_mask is not None or dropout_p:
        return False
    query, key, value = args
    return (
        query.dim() == 4
        and all(part.device.type == "cpu" and part.dtype == torch.bfloat16 for part in args)
        and query.shape[2] == key.shape[2] > BLOCK_QUERIES
        and key.shape == value.shape
        and query.shape[1] % key.shape[1] == 0
        and not (torch.is_grad_enabled() and any(part.requires_grad for part in args))
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
