"""Tensors that hold their numbers on the CPU and claim a CUDA device; mixing devices raises, as CUDA does.

Forward passes only, within `claimed_devices()`. What CUDA allows is allowed: copies, a single number from the CPU, an
index from the CPU. What would make the host wait for the GPU is noted. The names with an underscore are torch's own way
to make such tensors.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
COPIES = (aten.copy_, aten._to_copy)
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
# Whose result has a size that the values decide, or is a number for the host.
READ = (aten._local_scalar_dense, aten.masked_select, aten.equal)
# What looks at the device before any operation is seen.
BY_HAND = (torch.nn.functional.scaled_dot_product_attention, torch.Tensor.__int__, torch.Tensor.__invert__)


class Claimed(torch.Tensor):
    """`numbers`, said to be on `device`."""

    @staticmethod
    def __new__(cls, numbers: torch.Tensor, device: torch.device) -> Claimed:
        layout = {"strides": numbers.stride(), "storage_offset": numbers.storage_offset(), "dtype": numbers.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, numbers.size(), device=device, **layout)

    def __init__(self, numbers: torch.Tensor, device: torch.device) -> None:
        self.numbers = numbers

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return call(func, args, kwargs or {})

    def tolist(self) -> Any:
        NOTED.waits.append("tolist")
        return self.numbers.tolist()

    def numpy(self) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy")


class Notes:
    """Of a run within `claimed_devices`: what a host would have waited for, and what was pinned, by which threads."""

    def __init__(self) -> None:
        self.waits: list[str] = []
        self.pinned: dict[int, torch.Tensor] = {}  # by the address of their memory
        self.threads: list[threading.Thread] = []

    def clear(self) -> None:
        self.__init__()


NOTED = Notes()


def pin(tensor: torch.Tensor) -> torch.Tensor:
    NOTED.pinned[tensor.untyped_storage().data_ptr()] = tensor
    NOTED.threads.append(threading.current_thread())
    return tensor


def note_wait(packet: Any, args: tuple, kwargs: dict) -> None:
    """Note an operation after which the host would go on only when the GPU has come so far."""
    first = args[0] if args else None
    source = args[1] if packet is aten.copy_ else first
    if packet in COPIES:
        goes_to = first.device if packet is aten.copy_ else torch.device(kwargs.get("device") or first.device)
        way = source.device.type, goes_to.type
        quick = kwargs.get("non_blocking") and kwargs.get("dtype") in (None, source.dtype)
        quick = quick and way[0] == "cpu" and source.untyped_storage().data_ptr() in NOTED.pinned
        waits = way == ("cuda", "cpu") and not kwargs.get("non_blocking")  # else into pinned memory, with an event
        waits = waits or (way == ("cpu", "cuda") and source.dim() > 0 and not quick)
    elif packet is aten.repeat_interleave:
        waits = isinstance(first, Claimed) and kwargs.get("output_size") is None
    elif packet is aten.index:
        waits = any(isinstance(each, Claimed) and each.dtype == torch.bool for each in tensors_in(args[1]))
    else:
        waits = packet in READ and isinstance(first, Claimed)
    if waits:
        NOTED.waits.append(str(packet))


def numbers(value: Any) -> Any:
    return value.numbers if isinstance(value, Claimed) else value


def tensors_in(*values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def common_device(name: object, tensors: list[torch.Tensor]) -> torch.device:
    found = {tensor.device for tensor in tensors if tensor.device.type != "cpu" or tensor.dim() > 0}
    if len(found) > 1:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {sorted(map(str, found))}")
    return next(iter(found), torch.device("cpu"))


def check_index(tensor: torch.Tensor, index: Any) -> torch.device:
    for each in tensors_in(index):
        if each.device.type != "cpu" and each.device != tensor.device:
            raise RuntimeError(f"an index on {each.device} into a tensor on {tensor.device}")
    return tensor.device


def call(func: Any, args: tuple, kwargs: dict) -> Any:
    """One operation on the numbers; its result claims the device that CUDA would give it."""
    tensors, target = tensors_in(args, kwargs), kwargs.get("device")
    note_wait(func._overloadpacket, args, kwargs)
    if func._overloadpacket in COPIES:
        device = tensors[0].device
    elif func._overloadpacket in INDEXING:
        device = check_index(args[0], args[1])
    else:
        device = common_device(func, tensors)
    if target is not None:
        device, kwargs = torch.device(target), {**kwargs, "device": torch.device("cpu")}
        device = torch.device("cuda", device.index or 0) if device.type == "cuda" else device
    result = func(*tree_map(numbers, args), **tree_map(numbers, kwargs))
    same = {id(numbers(tensor)): tensor for tensor in tensors}  # what was changed in place stays what it is

    def claim(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or id(value) in same:
            return same.get(id(value), value)
        return Claimed(value, device) if device.type == "cuda" else value

    return tree_map(claim, result)


def bounds(part: slice) -> tuple[Any, Any, Any]:
    return part.start, part.stop, part.step


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        # Inference mode hands over operations that are made of others, `.to` among them.
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return call(func, args, kwargs or {})


class Functions(TorchFunctionMode):
    """What Python or C++ would settle by device before any operation is seen: subscripts, and the kind of attention."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], Claimed):
            check_index(args[0], args[1])
            note_wait(aten.index, args, {})
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(slice(*map(numbers, bounds(part))) if isinstance(part, slice) else part for part in index)
            result = func(*tree_map(numbers, (args[0], index, *args[2:])))
            return Claimed(result, args[0].device) if result is not None else None
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        if func in BY_HAND:
            if func is torch.Tensor.__int__ and isinstance(args[0], Claimed):
                NOTED.waits.append("int")
            device = common_device(func.__name__, tensors_in(args, kwargs))
            result = func(*tree_map(numbers, args), **tree_map(numbers, kwargs))
            return Claimed(result, device) if device.type == "cuda" and isinstance(result, torch.Tensor) else result
        return func(*args, **kwargs)


@contextlib.contextmanager
def claimed_devices() -> Iterator[None]:
    """Within it `.to("cuda:1")` and `device="cuda"` make tensors that claim to be there."""
    NOTED.clear()
    cuda = dict.fromkeys(("Event", "current_stream", "_lazy_init"), mock.DEFAULT)
    cuda["get_device_properties"] = lambda device: SimpleNamespace(total_memory=80 << 30)
    patches = mock.patch.multiple("torch.cuda", **cuda), mock.patch.object(torch.Tensor, "pin_memory", pin)
    with patches[0], patches[1], torch.inference_mode(), Operations(), Functions():
        yield


def put(module: Any, device: object) -> Any:
    """What `module.to` does, which would make ordinary tensors of these."""
    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            setattr(part, name, torch.nn.Parameter(weight.detach().to(device), requires_grad=False))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, buffer.to(device))
    return module


class Aligned(ModelHook):
    """As accelerate places a part: its inputs come to it. The whole model's output goes back to where its input was."""

    def __init__(self, device: str | None) -> None:
        self.device = self.goes_to = device

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        if self.device is None:
            self.goes_to = tensors_in(args, kwargs)[0].device
            return args, kwargs
        return moved(args, self.device), moved(kwargs, self.device)

    def post_forward(self, module: Any, output: Any) -> Any:
        return moved(output, self.goes_to) if self.device is None else output


def moved(values: Any, device: Any) -> Any:
    return tree_map(lambda value: value.to(device) if isinstance(value, torch.Tensor) else value, values)


def spread(base: Any, head: int = 1) -> Any:
    """A base of Llama's build with two blocks as `--device_map auto` lays it over two GPUs; `head`: the head's."""
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1}
    for name, number in (places | {"lm_head": head}).items():
        add_hook_to_module(put(base.get_submodule(name), f"cuda:{number}"), Aligned(f"cuda:{number}"))
    return add_hook_to_module(base, Aligned(None))
