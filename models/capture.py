"""Locates decoder blocks and captures their MLP inputs.

The captured hidden state x is the INPUT of the `.mlp` module of one decoder block (after that block's pre-MLP norm):
the key of the datastore and the input of the memory (paper section 3). Blocks are found by structure, not by a
table of family names.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of `model`: its one `nn.ModuleList` whose members all have an `.mlp` module.

    Raises ValueError when there is none, or more than one (several decoders, multi-modal wrappers).
    """
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 0)
    found = [each for each in lists if all(isinstance(getattr(block, "mlp", None), nn.Module) for block in each)]
    if len(found) != 1:
        family = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
        raise ValueError(
            f"model family '{family}': found {len(found)} lists of decoder blocks with an .mlp module, expected one; "
            "use a plain decoder (gpt2, llama, mistral, qwen2, …)"
        )
    return found[0]


def captured_block(model: nn.Module, layer_position: int = -1) -> nn.Module:
    """Decoder block `layer_position` of `model` (negative: counted from the last block).

    Raises ValueError when the position is outside the model, or as `decoder_blocks` does.
    """
    blocks = decoder_blocks(model)
    if not -len(blocks) <= layer_position < len(blocks):
        raise ValueError(f"layer_position {layer_position}: the model has {len(blocks)} blocks")
    return blocks[layer_position]


def captured_module(model: nn.Module, layer_position: int = -1) -> nn.Module:
    """The `.mlp` of decoder block `layer_position`; raises as `captured_block` does."""
    return captured_block(model, layer_position).mlp


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last decoder block and the head: the last norm among the siblings of the blocks.

    Raises ValueError when there is none.
    """
    blocks = decoder_blocks(model)
    body = next(module for module in model.modules() if any(child is blocks for child in module.children()))
    norms = [child for child in body.children() if is_norm(child)]
    if not norms:
        raise ValueError(f"{type(body).__name__}: has no final norm beside its decoder blocks")
    return norms[-1]


def is_norm(module: nn.Module) -> bool:
    """Whether `module` is a normalization layer: their classes are named …LayerNorm or …RMSNorm."""
    return "norm" in type(module).__name__.lower()


class _CapturedError(Exception):
    """Ends a forward pass once the input is captured; `HiddenCapture` catches it."""


# Captures whose `with` block is running. A context variable is each thread's own, so other threads may use the same base;
# torch.compile cannot trace one, and traces in one thread at a time.
_running: ContextVar[tuple[_Capture, ...]] = ContextVar("captures", default=())
_running_in_trace: list[_Capture] = []


class _Capture:
    """What happens to one module's forward passes in a `with` block.

    The hooks are registered once and stay: a hook that comes and goes would break the graphs of torch.compile, and a plain
    function may be copied and pickled with the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        if _before not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_before, with_kwargs=True)
            module.register_forward_hook(_after)

    def before(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of the module's forward, the same or others."""
        return args, kwargs

    def after(self, output: torch.Tensor) -> torch.Tensor:
        """The module's output, the same or another."""
        return output

    def __enter__(self) -> Any:
        if torch.compiler.is_compiling():
            _running_in_trace.append(self)
        else:
            self._before_this = _running.set((*_running.get(), self))
        return self

    def __exit__(self, kind: type | None, *_: object) -> bool:
        if torch.compiler.is_compiling():
            _running_in_trace.pop()
        else:
            _running.reset(self._before_this)
        return kind is _CapturedError


def _captures_of(module: nn.Module) -> list[_Capture]:
    running = _running_in_trace if torch.compiler.is_compiling() else _running.get()
    return [capture for capture in running if capture.module is module]


def _before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    for capture in _captures_of(module):
        args, kwargs = capture.before(args, kwargs)
    return args, kwargs


def _after(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    for capture in _captures_of(module):
        output = capture.after(output)
    return output


class HiddenCapture(_Capture):
    """Keeps a module's input in `.hidden`, such as one block's MLP input (batch, time, hidden).

    It is active in its `with` block, in forward passes of the thread that entered it. With `stop` the pass ends there:
    neither the module nor anything after it is computed.
    """

    def __init__(self, module: nn.Module, *, stop: bool = False) -> None:
        super().__init__(module)
        self.hidden: torch.Tensor | None = None
        self._stop = stop

    def before(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        self.hidden = args[0] if args else next(iter(kwargs.values()))
        self._with_gradient = torch.is_grad_enabled()
        if self._stop:
            raise _CapturedError
        return args, kwargs

    def take(self) -> torch.Tensor:
        """Return the captured hidden states and drop the reference to them.

        Raises RuntimeError if there are none, or if they lack a gradient because of reentrant gradient checkpointing.
        """
        hidden, self.hidden = self.hidden, None
        if hidden is None:
            raise RuntimeError("the captured module did not run in this forward pass")
        if torch.is_grad_enabled() and not self._with_gradient:
            raise RuntimeError(
                "the captured hidden state has no gradient under reentrant gradient checkpointing: "
                'pass gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        return hidden


class SharedHead(_Capture):
    """In its `with` block a base's head also computes the logits of the tied memories, all in one product.

    `more` is called when the head runs, and returns hidden states of the shape of its input (batch, kept, hidden); `.logits`
    are theirs (batch, kept, vocabulary). As `HiddenCapture` it acts in the thread that entered it.
    """

    def __init__(self, head: nn.Module, more: Callable[[], list[torch.Tensor]]) -> None:
        super().__init__(head)
        self.logits: list[torch.Tensor] = []
        self._more = more

    def before(self, args: tuple[torch.Tensor], kwargs: dict) -> tuple[tuple, dict]:
        self._batch, self._turned = len(args[0]), None
        if not (more := self._more()):
            return args, kwargs
        stacked = torch.cat([args[0], *(hidden.to(args[0]) for hidden in more)])  # (batches, kept, hidden)
        # On a CPU a few float32 rows times a large matrix take a fifth of the time the other way round: the head then gets
        # no rows, and the product follows in `after`.
        few = stacked.dtype == torch.float32 and stacked.device.type == "cpu" and stacked.shape[:2].numel() <= 8
        if few and type(self.module) is nn.Linear:
            self._turned = stacked
            stacked = stacked[:0]
        return (stacked,), kwargs

    def after(self, output: torch.Tensor) -> torch.Tensor:
        head, logits = self.module, output
        if self._turned is not None:
            rows = (head.weight @ self._turned.flatten(0, 1).t()).t()  # (rows, vocabulary)
            logits = rows.contiguous().view(*self._turned.shape[:2], -1) + (0 if head.bias is None else head.bias)
        own, *self.logits = logits.split(self._batch)
        return own


@torch.no_grad()
def hidden_states(model: nn.Module, input_ids: torch.Tensor, layer_position: int = -1) -> torch.Tensor:
    """Hidden states (batch, time, hidden) of `input_ids` (batch, time), in the model's dtype, without gradient.

    That block's MLP, later blocks and the head are not computed. Raises ValueError as `captured_module` does.
    """
    with HiddenCapture(captured_module(model, layer_position), stop=True) as capture:
        model(input_ids=input_ids, use_cache=False)
    return capture.take()


def hidden_and_head_input(
    base: nn.Module, input_ids: torch.Tensor, positions: torch.Tensor, layer_position: int = -1
) -> tuple[torch.Tensor, torch.Tensor]:
    """One forward pass of the base up to its head: captured hidden states and the head's input at selected positions.

    `positions` (n,) are numbers in batch · time, on any device; both results are (n, hidden). Pass blocks of the second one
    to `base_logits`.
    """
    block, head = captured_module(base, layer_position), base.get_output_embeddings()
    with HiddenCapture(block) as capture, HiddenCapture(head, stop=True) as end:
        base(input_ids=input_ids, use_cache=False)
    hidden, head_input = capture.take(), end.take()  # (batch, time, hidden) each
    return tuple(each.flatten(0, 1)[positions.to(each.device, non_blocking=True)] for each in (hidden, head_input))


def base_logits(base: nn.Module, head_input: torch.Tensor) -> torch.Tensor:
    """The base's logits (…, vocabulary) from its head's input (…, hidden): head, then the family's scale and softcap.

    Raises ValueError as `logit_scale` does.
    """
    logits, scale = base.get_output_embeddings()(head_input), logit_scale(base)
    return _capped(logits if scale == 1.0 else logits.float() * scale, base)


_scales: weakref.WeakKeyDictionary[nn.Module, float] = weakref.WeakKeyDictionary()


@torch.no_grad()
def logit_scale(base: nn.Module) -> float:
    """The constant by which the base multiplies its head's output before the softcap (1 for most families).

    Measured once per model, since configs name it differently and some mean its inverse. Raises ValueError when the
    logits are another function of the head's output.
    """
    if base in _scales:
        return _scales[base]
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings().weight
    ids = torch.arange(8, device=embeddings.device).remainder(len(embeddings)).unsqueeze(0)
    with HiddenCapture(head) as capture:
        logits = base(input_ids=ids, use_cache=False).logits.float()
        raw = head(capture.take()).float().to(logits.device)  # a base may be spread over devices
    tolerance = 0.02 * logits.abs().nan_to_num().max().item()  # bfloat16 rounds logits to 0.4%
    for scale in (1.0, ((logits * raw).nansum() / raw.square().nansum()).item()):
        if torch.allclose(_capped(raw * scale, base), logits, rtol=0.02, atol=tolerance, equal_nan=True):
            _scales[base] = scale
            return scale
    family = base.config.model_type
    raise ValueError(f"model family '{family}': its logits are an unknown function of its head's output")


def _capped(logits: torch.Tensor, base: nn.Module) -> torch.Tensor:
    """cap · tanh(logits / cap), if the config has a cap."""
    cap = getattr(base.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits.float() / cap) * cap
