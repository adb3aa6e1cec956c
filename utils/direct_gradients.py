"""Gradients of weights that are added where they are kept, without an array of their own.

Autograd makes each gradient of a weight anew and then adds it to `weight.grad`. Where a step has several backward
passes that costs an array of the weight's size and three trips to memory. Functions that compute such a gradient by a
matrix product can add the product in place instead, while `gradients_in_place` allows it: where nothing else waits for
the gradient to pass through autograd (no DDP, no FSDP, no gradient scaler).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor

_allowed = False


def in_place() -> bool:
    """Whether gradients may be added in place now."""
    return _allowed


@contextlib.contextmanager
def gradients_in_place(allowed: bool = True) -> Iterator[None]:
    """Allow it inside the block."""
    global _allowed
    before, _allowed = _allowed, allowed
    try:
        yield
    finally:
        _allowed = before


def add_gradient(weight: Tensor, left: Tensor, right: Tensor, allowed: bool) -> Tensor | None:
    """The product left (m, k) @ right (k, n), a gradient of `weight` (m, n): returned in its dtype, or, where `allowed`
    and `weight` has a gradient, added there, and None."""
    if not allowed or weight.grad is None:
        return (left @ right).to(weight.dtype)
    if weight.grad.dtype == left.dtype:
        weight.grad.addmm_(left, right)
    else:
        weight.grad.add_(left @ right)
    return None
