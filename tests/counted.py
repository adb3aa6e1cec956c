"""Kernels and bytes of a training step on a GPU, counted with tensors that have no data.

    PYTHONPATH=. python tests/counted.py        the paper's memory for GPT2-large: 54 layers of 1,280, 16,384 rows

Every operation but views and allocations counts as a kernel that reads its inputs and writes its outputs once; products count
as kernels, and their bytes apart. CUDA's autocast runs powers and norms in float32, which the CPU's does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config

from models.stack import memory_class
from utils import cal_loss

PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm}
FLOAT32 = {torch.pow, torch.Tensor.pow, torch.nn.functional.layer_norm}
SPARSE = {torch.ops.aten.index_add_, torch.ops.aten.gather, torch.ops.aten.index}
NO_KERNEL = ("empty", "new_empty", "empty_like", "detach", "lift_fresh", "_local_scalar_dense")


def tensors_in(values: Any) -> list[torch.Tensor]:
    return list({id(each): each for each in tree_leaves(values) if isinstance(each, torch.Tensor)}.values())


@dataclass
class Count(TorchDispatchMode):
    kernels: int = 0
    bytes: int = 0
    product_bytes: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if func.namespace == "aten" and not func.is_view and packet._qualified_op_name.split("::")[-1] not in NO_KERNEL:
            inputs, results = tensors_in((args, kwargs)), tensors_in(result)
            if packet in SPARSE:  # they touch as much of the large tensor as the small one has
                inputs = [each for each in inputs if each is not max(inputs, key=lambda one: one.nbytes)]
                results = [min((*inputs, *results), key=lambda one: one.nbytes)] * 2
            # What is written in place is read too.
            moved = sum(each.nbytes for each in (*inputs, *results))
            self.kernels += 1
            self.bytes += moved * (packet not in PRODUCTS)
            self.product_bytes += moved * (packet in PRODUCTS)
        return result


class CudaRules(TorchFunctionMode):
    """Operations that CUDA's autocast runs in float32."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in FLOAT32:
            args = tuple(each.float() if isinstance(each, torch.Tensor) else each for each in args)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Count]:
    count = Count()
    with torch.autocast("cpu", torch.bfloat16), CudaRules(), count:
        yield count


def count_block(rows: int, width: int, gelu: torch.nn.Module | None = None) -> Count:
    """Forward and backward of one of GPT-2's blocks; `gelu` in place of its own."""
    config = GPT2Config(n_embd=width, n_layer=1, n_head=1, resid_pdrop=0.0)
    block = memory_class(config)(config).blocks[0].train()
    if gelu is not None:
        block.mlp.act = gelu
    with FakeTensorMode(allow_non_fake_inputs=True):
        hidden = torch.empty(rows, width, requires_grad=True)
        with counted() as count:
            block(hidden).sum().backward()
    return count


def wide_product(total: Any, left: Any, right: Any, factor: float) -> None:
    torch.addmm(total, left, right, out_dtype=total.dtype, alpha=factor, out=total)


def count_loss(rows: int, width: int, vocabulary: int, entries: int, chunk_bytes: int) -> Count:
    """Loss and both gradients of `rows` rows on a GPU, with `entries` target entries a row."""
    size = max(chunk_bytes // (2 * vocabulary), 1)
    bounds = [*range(0, rows, size), rows]
    put = {"device": "meta"}
    hidden, weight = torch.empty(rows, width, dtype=torch.bfloat16, **put), torch.empty(vocabulary, width, **put)
    label, id_cnt = (torch.empty(rows, dtype=torch.int64, **put) for _ in range(2))
    token_id, prob = (torch.empty(rows * entries, dtype=dtype, **put) for dtype in (torch.int32, torch.half))
    targets = label, id_cnt, token_id, prob, 0.5, rows
    ends = bounds, [bound * entries for bound in bounds]
    add = wide_product if getattr(cal_loss, "WIDE_SUMS", False) else cal_loss._add_product  # as on a GPU
    patches = (
        mock.patch("torch.autocast", lambda *_, **__: nullcontext()),
        mock.patch.object(cal_loss, "_add_product", add),
    )
    with patches[0], patches[1], (count := Count()):
        cal_loss._chunked(hidden, weight, targets, ends, torch.bfloat16, True, True)
    return count


def main() -> None:
    from transformers.activations import NewGELUActivation

    rows, width, layers, vocabulary = 16384, 1280, 54, 50257
    blocks = {"GPT-2's GELU as transformers has it": NewGELUActivation(), "as one kernel": None}
    print("| | kernels | GB, products' | GB, others' |\n| --- | --- | --- | --- |")
    for name, gelu in blocks.items():
        count = count_block(rows, width, gelu)
        kernels, products, others = (layers * each for each in (count.kernels, count.product_bytes, count.bytes))
        print(f"| {layers} blocks, {name} | {kernels:,} | {products / 1e9:,.0f} | {others / 1e9:,.0f} |")
    for size in (256 << 20, 1 << 30):
        count = count_loss(rows, width, vocabulary, 128, size)
        figures = f"{count.kernels:,} | {count.product_bytes / 1e9:,.0f} | {count.bytes / 1e9:,.0f}"
        print(f"| loss and head, chunks of {size >> 20} MiB | {figures} |")


if __name__ == "__main__":
    main()
