"""Where a memory's training begins: the base's head and final norm, or nearly the base model itself.

The third start, random numbers, is what a stack's constructor gives.

The start from the base. Let h be the residual stream before the captured block's MLP, x = norm(h) the captured state,
with norm(h) = w ⊙ h/rms(h) (for a LayerNorm: w ⊙ (h - mean(h))/std(h) + b). The base goes on to
head(norm_f(h + MLP(x))). The memory sees x only, but x - b is w ⊙ h up to a factor, so its first block computes

    x + [w/r ⊙ MLP(x) - b]  =  w/r ⊙ (h + MLP(x)),     r the typical rms(h),

where the bracket is the base's MLP with its output projection scaled by w/r and its bias lowered by b. The later blocks
begin as the identity (their output projection is zero). The final norm then divides w out again: its weight is
g/w · c, g the weight of norm_f and c the typical rms(w ⊙ y)/rms(y) of y = h + MLP(x). The head is the base's.
A LayerNorm takes its mean off: before the MLP that is already in x; the MLP's output is centred in its projection; what
the memory's final norm takes off instead, the mean of w ⊙ y, is put back into its bias at its typical value.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .capture import HiddenCapture, captured_block, captured_module, final_norm, is_norm, logit_scale

# A norm weight below this share of the typical one carries no signal that could be divided out again.
SMALLEST_WEIGHT = 1e-3


@dataclass
class Affine:
    """What a norm does to its normalised input: `weight` ⊙ · + `bias`, both (hidden,) float32 on the CPU;
    `centred`: it takes the mean off."""

    weight: torch.Tensor
    bias: torch.Tensor
    centred: bool

    def centre(self, values: torch.Tensor) -> torch.Tensor:
        """`values` (…, hidden) without their mean, where this norm takes it off."""
        return values - values.mean(-1, keepdim=True) if self.centred else values

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """RMS over the last dimension, of the centred values where this norm centres: (…, hidden) → (…)."""
        return self.centre(values).square().mean(-1).sqrt()


@dataclass
class BaseScale:
    """What `measure_scale` finds around the captured block; sizes are medians over the positions of a small sample.

    `before`: what the norm before the MLP does (nothing where the family has none there); `hidden_rms`: of the residual
    stream h that enters it (its standard deviation where the norm centres; 1 without a norm: x is h itself);
    `input_rms`, `input_mean`: of x; `final_ratio`: rms(w ⊙ y)/rms(y), and `final_mean`: mean(w ⊙ y)/std(w ⊙ y), of the
    block's output y; `output_gain` (hidden,): how much of the MLP's output reaches the residual stream, 1 unless the
    family scales or normalises it on the way.
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
    """Give `memory` the base's head and final norm, in place. Raises ValueError when their shapes differ.

    Where the family multiplies its logits by a constant after the head, the memory's head takes the constant in.
    """
    head, norm = base.get_output_embeddings().weight, final_norm(base)
    _check_same_shape("head", memory.lm_head.weight, head)
    memory.lm_head.weight.copy_(head)
    memory.lm_head.weight.mul_(logit_scale(base))
    for name, value in memory.final_norm.named_parameters():
        source = dict(norm.named_parameters()).get(name)
        if source is None:
            raise ValueError(f"the base's final norm has no {name}; its family is not the memory's")
        _check_same_shape("final norm", value, source)
        value.copy_(source)


@torch.no_grad()
def init_from_base(memory: nn.Module, base: nn.Module, scale: BaseScale, layer_position: int = -1) -> None:
    """Set `memory` to be nearly the base model itself, in place (the module's docstring says how).

    `scale`: of the same block, from `measure_scale`. Raises ValueError when the shapes differ (another family, hidden
    size or intermediate size) or the family's MLP has no output projection.
    """
    if not scale.hidden_rms > 0:
        raise ValueError(f"hidden_rms {scale.hidden_rms:g}: expected a number above 0")
    if memory.embedding_transform is not None:
        raise ValueError("a memory with an embedding_transform does not start from the base: the widths differ")
    init_lm_head(memory, base)
    weight = _away_from_zero(scale.before.weight)
    after = _affine(final_norm(base))

    first, *others = memory.blocks
    source = captured_module(base, layer_position)
    for (name, value), original in zip(first.mlp.named_parameters(), source.parameters(), strict=True):
        _check_same_shape(f"MLP's {name}", value, original)
        value.copy_(original)
    output_scale = scale.output_gain * weight / scale.hidden_rms
    _shape_output(_output_projection(first.mlp, len(weight)), output_scale, -scale.before.bias, after.centred)
    for block in others:
        projection = _output_projection(block.mlp, len(weight))
        projection.weight.zero_()
        if projection.bias is not None:
            projection.bias.zero_()

    # The first norm hands x through: it multiplies by what it has divided by.
    _set_affine(first.norm, torch.full_like(weight, scale.input_rms), torch.full_like(weight, scale.input_mean))
    back = after.weight / weight * scale.final_ratio
    _set_affine(memory.final_norm, back, after.bias + back * scale.final_mean)


@torch.no_grad()
def measure_scale(
    base: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, layer_position: int = -1
) -> BaseScale:
    """Typical sizes around the captured block over `input_ids` (batch, time): a few hundred tokens of real text do."""
    block = captured_block(base, layer_position)
    passed: dict[nn.Module, tuple[torch.Tensor | None, torch.Tensor]] = {}  # module: (input, output)

    def keep(module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
        passed[module] = (args[0] if args else None, output[0] if isinstance(output, tuple) else output)

    norms = [child for child in block.children() if is_norm(child)]
    handles = [module.register_forward_hook(keep) for module in (*norms, block.mlp, block)]
    try:
        with HiddenCapture(block.mlp) as capture:
            base(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=1)
            captured = capture.take()
    finally:
        for handle in handles:
            handle.remove()
    # The norm before the MLP is the one whose output the MLP receives.
    norm = next((each for each in norms if each in passed and passed[each][1] is captured), None)
    tensors = (captured if norm is None else passed[norm][0], captured, passed[block.mlp][1], passed[block][1])
    rows = slice(None) if attention_mask is None else attention_mask.bool().to(captured.device)
    hidden, captured, mlp_output, output = (each[rows].flatten(0, -2).float().cpu() for each in tensors)
    # each (tokens, hidden)

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
    """Read a norm's weight and bias by what it does to known vectors: families store weight or 1 + weight."""
    parameter = next(norm.parameters(), None)
    probe = copy.deepcopy(norm).float().cpu()
    width = parameter.shape[0] if parameter is not None else norm.normalized_shape[0]
    signs = torch.ones(width)  # mean square 1 …
    signs[1::2] = -1  # … and, for an even width, mean 0
    up, down, level = probe(signs), probe(-signs), probe(torch.ones_like(signs))
    bias = (up + down) / 2
    return Affine((up - down) / 2 * signs, bias, bool(torch.allclose(level, bias, atol=1e-3)))


def _set_affine(norm: nn.Module, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Make a norm multiply by `weight` and add `bias`, as far as it has parameters for it."""
    stored = getattr(norm, "weight", None)
    if stored is None:
        return
    offset = (_affine(norm).weight - stored.float().cpu()).round()  # 1 where the family stores weight - 1
    stored.copy_(weight - offset)
    if getattr(norm, "bias", None) is not None:
        norm.bias.copy_(bias)


def _away_from_zero(weight: torch.Tensor) -> torch.Tensor:
    floor = SMALLEST_WEIGHT * weight.square().mean().sqrt()
    return torch.where(weight.abs() < floor, torch.where(weight < 0, -floor, floor), weight)


def drop_neurons(memory: nn.Module, rate: float) -> None:
    """Dropout in the memory's MLPs: in training, what enters an output projection is zeroed with probability `rate`.

    Raises ValueError when the family's MLP has no output projection.
    """

    def drop(projection: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (nn.functional.dropout(args[0], rate, projection.training),)

    for block in memory.blocks:
        _output_projection(block.mlp, memory.config.hidden_size).register_forward_pre_hook(drop)


def _output_projection(mlp: nn.Module, width: int) -> nn.Module:
    """The linear layer that gives an MLP's output (…, width): its last. Raises ValueError when it has none."""
    layers = [module for module in mlp.modules() if isinstance(module, (nn.Linear, Conv1D))]
    last = layers[-1] if layers else None
    if last is None or (last.nf if isinstance(last, Conv1D) else last.out_features) != width:
        raise ValueError(f"{type(mlp).__name__} has no linear output projection; start from the head or at random")
    return last


def _shape_output(projection: nn.Module, scale: torch.Tensor, shift: torch.Tensor, centred: bool) -> None:
    """Centre a projection's output if asked, scale it by `scale` (hidden,) and, where it has a bias, add `shift`."""
    transposed = isinstance(projection, Conv1D)  # Conv1D keeps (inner, hidden), Linear (hidden, inner)
    weight = projection.weight.t() if transposed else projection.weight  # (hidden, inner)
    values = weight.float()
    if centred:
        values = values - values.mean(0, keepdim=True)
    scale = scale.to(values.device)
    weight.copy_(values * scale.unsqueeze(-1))
    if projection.bias is not None:
        bias = projection.bias.float()
        bias = bias - bias.mean() if centred else bias
        projection.bias.copy_(bias * scale + shift.to(values.device))


def _check_same_shape(what: str, memory: torch.Tensor, base: torch.Tensor) -> None:
    if memory.shape != base.shape:
        raise ValueError(
            f"the memory's {what} has shape {tuple(memory.shape)}, the base's {tuple(base.shape)}; "
            "make the memory from the base's own config, or start at random"
        )
