"""The one place that knows where a decoder keeps its blocks and their `.mlp`, and what it does to its logits.

The captured hidden state x is the INPUT of the `.mlp` module of one decoder block (after that block's pre-MLP norm):
the key of the datastore and the input of the memory (paper section 3). Blocks are found by structure, not by a
table of family names.
"""

from __future__ import annotations

import contextlib
import threading
import weakref

import torch
from torch import nn


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of `model`: its one `nn.ModuleList` whose members all have an `.mlp` module.

    Raises ValueError when there is none (a family whose blocks keep their MLP elsewhere) or more than one
    (a model with several decoders, or a multi-modal wrapper).
    """
    found = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and all(isinstance(getattr(block, "mlp", None), nn.Module) for block in module)
    ]
    if len(found) == 1:
        return found[0]
    name = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
    what = f"{len(found)} lists of blocks have an .mlp module" if found else "its decoder blocks have no .mlp module"
    raise ValueError(
        f"model family '{name}': {what}, so there is no one hidden state to capture and no memory stack for it; use a "
        "plain decoder whose blocks have one (gpt2, llama, mistral, qwen2, …)"
    )


def captured_module(model: nn.Module, layer_position: int = -1) -> nn.Module:
    """The `.mlp` of decoder block `layer_position` (negative: counted from the last block).

    Raises ValueError when the position is outside the model, or the model has no such blocks.
    """
    return captured_block(model, layer_position).mlp


def captured_block(model: nn.Module, layer_position: int = -1) -> nn.Module:
    """Decoder block `layer_position` of `model`; raises as `captured_module` does."""
    blocks = decoder_blocks(model)
    if not -len(blocks) <= layer_position < len(blocks):
        raise ValueError(
            f"layer_position {layer_position}: the model has {len(blocks)} blocks; "
            f"expected a number from {-len(blocks)} to {len(blocks) - 1}"
        )
    return blocks[layer_position]


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last decoder block and the head: the last norm that stands beside the blocks.

    Raises ValueError when there is none.
    """
    blocks = decoder_blocks(model)
    body = next(module for module in model.modules() if any(child is blocks for child in module.children()))
    norms = [child for child in body.children() if is_norm(child)]
    if not norms:
        raise ValueError(f"{type(body).__name__}: no norm beside its decoder blocks, so there is no memory stack")
    return norms[-1]


def is_norm(module: nn.Module) -> bool:
    """Whether `module` is a normalisation layer: families name theirs LayerNorm or RMSNorm with a prefix."""
    return "norm" in type(module).__name__.lower()


class HiddenCapture:
    """A pre-forward hook that keeps a module's input, such as that of one block's `.mlp`, in `.hidden` (batch, time, hidden).

    It is on until its `with` block ends. Only forward passes of the thread that made it are captured, so
    a base model shared between threads (one generating alone, one with its memory) does not mix them up.
    """

    def __init__(self, module: nn.Module) -> None:
        self.hidden: torch.Tensor | None = None
        self._thread = threading.get_ident()
        self._handle = module.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if threading.get_ident() == self._thread:
            self.hidden = args[0] if args else next(iter(kwargs.values()))
            self._with_gradient = torch.is_grad_enabled()

    def take(self) -> torch.Tensor:
        """The captured hidden states, handed over (the capture forgets them). Raises RuntimeError if none were seen, or
        if they are without the gradient that is wanted: reentrant checkpointing runs a block without one."""
        hidden, self.hidden = self.hidden, None
        if hidden is None:
            raise RuntimeError("the captured module did not run in this forward pass")
        if torch.is_grad_enabled() and not self._with_gradient:
            raise RuntimeError(
                "the captured hidden state has no gradient, because the base's blocks run under reentrant gradient "
                'checkpointing: enable it with {"use_reentrant": False}, or run under torch.no_grad()'
            )
        return hidden

    def __enter__(self) -> HiddenCapture:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


class _CapturedError(Exception):
    """Ends a forward pass once the captured input is known. Never leaves this module."""


class _LastCapture(HiddenCapture):
    """Captures, then ends the pass: neither the module nor anything after it is computed."""

    def _keep(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        super()._keep(module, args, kwargs)
        if self.hidden is not None:
            raise _CapturedError

    def run(self, model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Run `model` up to the captured input and return it."""
        with contextlib.suppress(_CapturedError):
            model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return self.take()


@torch.no_grad()
def hidden_states(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, layer_position: int = -1
) -> torch.Tensor:
    """Captured hidden states (batch, time, hidden) of `input_ids` (batch, time), in the model's dtype, without gradient.

    The values are those of a full forward pass, but the pass ends at the captured input: no MLP of that block, no
    later block, no head, no logits, no cache. Raises ValueError as `captured_module` does.
    """
    with _LastCapture(captured_module(model, layer_position)) as capture:
        return capture.run(model, input_ids, attention_mask)


def hidden_and_head_input(
    base: nn.Module,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    layer_position: int = -1,
    attention_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One pass of the base up to its head: captured hidden states and the head's input, at the selected positions.

    `positions` is a boolean mask (batch, time) with n true entries; both results are (n, hidden), in row order. The
    head is left to `base_logits`, which can be called with a block of these rows at a time.
    """
    block, head = captured_module(base, layer_position), base.get_output_embeddings()
    with HiddenCapture(block) as capture, _LastCapture(head) as end:
        head_input = end.run(base, input_ids, attention_mask)  # (batch, time, hidden)
        hidden = capture.take()  # (batch, time, hidden)
    return hidden[positions.to(hidden.device)], head_input[positions.to(head_input.device)]


def base_logits(base: nn.Module, head_input: torch.Tensor) -> torch.Tensor:
    """The base's logits (…, vocabulary) from its head's input (…, hidden): the head, then the family's scale and cap.

    Raises ValueError as `logit_scale` does.
    """
    logits, scale = base.get_output_embeddings()(head_input), logit_scale(base)
    return _capped(logits if scale == 1.0 else logits.float() * scale, base)


_scales: weakref.WeakKeyDictionary[nn.Module, float] = weakref.WeakKeyDictionary()


@torch.no_grad()
def logit_scale(base: nn.Module) -> float:
    """The constant by which a family multiplies its head's output (1 for most), before it caps its logits if it does.

    Configs name it in several ways, one name for contrary things; so it is measured, once for each model. Raises
    ValueError when the logits are no such function of the head's output.
    """
    if base not in _scales:
        head, embeddings = base.get_output_embeddings(), base.get_input_embeddings().weight
        ids = torch.arange(8, device=embeddings.device).remainder(len(embeddings)).unsqueeze(0)
        with HiddenCapture(head) as capture:
            logits = base(input_ids=ids, use_cache=False).logits.float()
            raw = head(capture.take()).float().to(logits.device)  # a base may be spread over devices
        # Loosely: a model in bfloat16 rounds its logits to 0.4%.
        close = {"rtol": 0.02, "atol": 0.02 * logits.abs().max().item()}
        scale = 1.0
        if not torch.allclose(_capped(raw, base), logits, **close):
            scale = ((logits * raw).sum() / raw.square().sum()).item()
            if not torch.allclose(_capped(raw * scale, base), logits, **close):
                raise ValueError(f"model family '{base.config.model_type}': what it does to its logits is unknown")
        _scales[base] = scale
    return _scales[base]


def _capped(logits: torch.Tensor, base: nn.Module) -> torch.Tensor:
    """cap · tanh(logits / cap), where the family caps its logits so."""
    cap = getattr(base.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits.float() / cap) * cap
