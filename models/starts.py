"""Initial weights of a memory: the base's head and final norm, or close to the base model itself; and neuron dropout.

Initialization from the base. Let h be the residual stream before the captured block's MLP, x = norm(h) the captured
state, with norm(h) = w ⊙ h/rms(h) (for a LayerNorm: w ⊙ (h - mean(h))/std(h) + b). The base goes on to
head(norm_f(h + MLP(x))). The memory sees only x, but x - b is w ⊙ h up to a factor, so its first block computes

    x + [w/r ⊙ MLP(x) - b]  =  w/r ⊙ (h + MLP(x)),     r the typical rms(h),

where the bracket is the base's MLP with its output projection scaled by w/r and its bias lowered by b. The later blocks
start as the identity (their output projection is zero). The final norm then divides by w: its weight is g/w · c, g the
weight of norm_f and c the typical rms(w ⊙ y)/rms(y) of y = h + MLP(x). The head is the base's.
A LayerNorm subtracts its mean: before the MLP, x has mean 0 already; the MLP's output is centred in its projection; the
mean of w ⊙ y, which the memory's final norm subtracts in addition, is restored in its bias at its typical value.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .capture import captured_block, captured_module, final_norm, is_norm, logit_scale

SMALLEST_WEIGHT = 1e-3  # norm weights are divided by: smaller ones, relative to their RMS, are raised to this


@dataclass
class Affine:
    """A norm: `weight` ⊙ normalized input + `bias`, each (hidden,) float32, CPU; `centred`: it subtracts the mean."""

    weight: torch.Tensor
    bias: torch.Tensor
    centred: bool

    def centre(self, values: torch.Tensor) -> torch.Tensor:
        """`values` (…, hidden), minus their mean if this norm subtracts it."""
        return values - values.mean(-1, keepdim=True) if self.centred else values

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """RMS of the values as `centre` gives them: (…, hidden) → (…)."""
        return self.centre(values).square().mean(-1).sqrt()


@dataclass
class BaseScale:
    """Typical sizes around the captured block, from `measure_scale`: medians over the positions of a small sample.

    `before`: the norm before the MLP (identity if the family has none). `hidden_rms`: of its input h, the residual
    stream (1 without a norm). `input_rms`, `input_mean`: of x. `final_ratio`: rms(w ⊙ y)/rms(y), and `final_mean`:
    mean(w ⊙ y)/std(w ⊙ y), of the block's output y. `output_gain` (hidden,): how much of the MLP's output reaches the
    residual stream; 1 unless the family scales or normalizes it.
    """

    before: Affine
    hidden_rms: float
    input_rms: float
    input_mean: float
    final_ratio: float
    final_mean: float
    output_gain: torch.Tensor


@torch.no_grad()
def init_lm_head(memory: nn.Module, base: nn.Module) -> None:
    """Copy the base's head (unless the memory is tied to it) and final norm. Raises ValueError when shapes differ.

    If the family multiplies its logits by a constant after the head, the memory's own head absorbs it.
    """
    if not memory.tied:
        _copy("head", memory.lm_head.weight, base.get_output_embeddings().weight)
        memory.lm_head.weight.mul_(logit_scale(base))
    source = dict(final_norm(base).named_parameters())
    for name, value in memory.final_norm.named_parameters():
        _copy("final norm", value, source[name])


@torch.no_grad()
def init_from_base(memory: nn.Module, base: nn.Module, scale: BaseScale, layer_position: int = -1) -> None:
    """Initialize `memory` from the base's MLP, final norm and head, in place (see the module's docstring).

    `scale`: of the same block, from `measure_scale`. Raises ValueError when shapes differ (another family, hidden or
    intermediate size) or the family's MLP has no output projection.
    """
    init_lm_head(memory, base)
    weight = _away_from_zero(scale.before.weight)
    after = _affine(final_norm(base))

    first, *others = memory.blocks
    source = captured_module(base, layer_position)
    for (name, value), original in zip(first.mlp.named_parameters(), source.parameters(), strict=True):
        _copy(f"MLP's {name}", value, original)
    output_scale = scale.output_gain * weight / scale.hidden_rms
    _shape_output(_output_projection(first.mlp, len(weight)), output_scale, -scale.before.bias, after.centred)
    for block in others:
        projection = _output_projection(block.mlp, len(weight))
        projection.weight.zero_()
        if projection.bias is not None:
            projection.bias.zero_()

    # The first norm is the identity: it multiplies by what it divides by.
    _set_affine(first.norm, torch.full_like(weight, scale.input_rms), torch.full_like(weight, scale.input_mean))
    back = after.weight / weight * scale.final_ratio
    _set_affine(memory.final_norm, back, after.bias + back * scale.final_mean)


@torch.no_grad()
def measure_scale(base: nn.Module, input_ids: torch.Tensor, layer_position: int = -1) -> BaseScale:
    """Typical sizes around the captured block over `input_ids` (batch, time); a few hundred tokens suffice."""
    block = captured_block(base, layer_position)
    passed: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}  # module: (input, output)

    def keep(module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
        passed[module] = (args[0], output[0] if isinstance(output, tuple) else output)

    norms = [child for child in block.children() if is_norm(child)]
    handles = [module.register_forward_hook(keep) for module in (*norms, block.mlp, block)]
    base(input_ids=input_ids, use_cache=False, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    captured, mlp_output = passed[block.mlp]
    # The norm before the MLP is the one whose output the MLP receives.
    norm = next((each for each in norms if each in passed and passed[each][1] is captured), None)
    tensors = (captured if norm is None else passed[norm][0], captured, mlp_output, passed[block][1])
    hidden, captured, mlp_output, output = (each.flatten(0, -2).float().cpu() for each in tensors)  # (tokens, hidden)
    width = hidden.shape[-1]
    before = _affine(norm) if norm is not None else Affine(torch.ones(width), torch.zeros(width), centred=False)
    after = _affine(final_norm(base))
    weighted = _away_from_zero(before.weight) * after.centre(output)
    return BaseScale(
        before=before,
        hidden_rms=before.spread(hidden).median().item() if norm is not None else 1.0,
        input_rms=after.spread(captured).median().item(),
        input_mean=captured.mean(-1).median().item(),
        final_ratio=(after.spread(weighted) / after.spread(output)).median().item(),
        final_mean=(weighted.mean(-1) / after.spread(weighted)).median().item() if after.centred else 0.0,
        output_gain=((output - hidden) * mlp_output).sum(0) / mlp_output.square().sum(0).clamp(min=1e-12),
    )


def _affine(norm: nn.Module) -> Affine:
    """Weight and bias of a norm, from its outputs for known inputs: some families store weight - 1."""
    parameter = next(norm.parameters(), None)
    norm = copy.deepcopy(norm).float().cpu()
    width = parameter.shape[0] if parameter is not None else norm.normalized_shape[0]
    signs = torch.ones(width)  # mean square 1 …
    signs[1::2] = -1  # … and, for an even width, mean 0
    up, down, level = norm(signs), norm(-signs), norm(torch.ones_like(signs))
    bias = (up + down) / 2
    return Affine((up - down) / 2 * signs, bias, bool(torch.allclose(level, bias, atol=1e-3)))


def _set_affine(norm: nn.Module, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Make a norm multiply by `weight` and add `bias`, if it has parameters for them."""
    if getattr(norm, "weight", None) is not None:
        offset = (_affine(norm).weight - norm.weight.float().cpu()).round()  # 1 if the family stores weight - 1
        norm.weight.copy_(weight - offset)
    if getattr(norm, "bias", None) is not None:
        norm.bias.copy_(bias)


def _away_from_zero(weight: torch.Tensor) -> torch.Tensor:
    floor = SMALLEST_WEIGHT * weight.square().mean().sqrt()
    return torch.where(weight.abs() < floor, torch.where(weight < 0, -floor, floor), weight)


def drop_neurons(memory: nn.Module, rate: float) -> None:
    """Dropout in the memory's MLPs, in training: zero the inputs of output projections with probability `rate`.

    Raises ValueError when the family's MLP has no output projection.
    """

    def drop(projection: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (nn.functional.dropout(args[0], rate, projection.training),)

    for block in memory.blocks:
        _output_projection(block.mlp, memory.config.hidden_size).register_forward_pre_hook(drop)


def _output_projection(mlp: nn.Module, width: int) -> nn.Module:
    """The last linear layer of an MLP, which gives its output (…, width). Raises ValueError when there is none."""
    layers = [module for module in mlp.modules() if isinstance(module, (nn.Linear, Conv1D))]
    last = layers[-1] if layers else None
    if last is None or (last.nf if isinstance(last, Conv1D) else last.out_features) != width:
        raise ValueError(f"{type(mlp).__name__} has no linear output projection")
    return last


def _shape_output(projection: nn.Module, scale: torch.Tensor, shift: torch.Tensor, centred: bool) -> None:
    """Centre a projection's output if asked, scale it by `scale` (hidden,) and, if it has a bias, add `shift`."""
    weight = projection.weight.t() if isinstance(projection, Conv1D) else projection.weight  # (hidden, inner)
    scale, shift = scale.to(weight.device), shift.to(weight.device)
    values = weight.float()
    if centred:
        values = values - values.mean(0)
    weight.copy_(values * scale.unsqueeze(-1))
    if projection.bias is not None:
        bias = projection.bias.float()
        bias = bias - bias.mean() if centred else bias
        projection.bias.copy_(bias * scale + shift)


def _copy(what: str, target: torch.Tensor, source: torch.Tensor) -> None:
    if target.shape != source.shape:
        raise ValueError(
            f"the memory's {what} has shape {tuple(target.shape)}, the base's {tuple(source.shape)}; "
            "make the memory from the base's own config, or initialize it at random"
        )
    target.copy_(source)
