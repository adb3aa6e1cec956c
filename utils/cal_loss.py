"""The training loss: a memory learns the retriever's distribution (KL) and the next token (CE) at once.

For a row with logits z, label y and the retriever's sparse distribution p the loss is
alpha · Σ p·(log p − log_softmax(z)) + (1 − alpha) · (−log_softmax(z)[y]). With the combined target
q = alpha·p + (1 − alpha)·onehot(y) it equals alpha·Σ p·log p + c·logsumexp(z) − Σ q·z, where c = Σ q, and its
gradient in z is c·softmax(z) − q. So one sparse target serves both parts and nothing of size rows × vocabulary
needs to be kept.

`sparse_distillation_loss` takes logits and says it plainly, autograd finds its gradient; `fused_linear_distillation_loss`
takes hidden states and the head's weight, and computes loss and gradients chunk of rows by chunk of rows. The trainers
take either (`--loss plain|fused`).

Targets are ragged: `id_cnt` entries for each row, laid end to end in `token_id` and `prob`. Both losses are means over
ROWS: a row with label -100 has no cross-entropy and one with `id_cnt` 0 no divergence, but the divisor counts both.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from utils.errors import InputError

IGNORED_LABEL = -100

CHUNK_BYTES = 256 << 20  # of logits
# Every chunk reads and writes the head's whole gradient once: with fewer rows that traffic outweighs the products.
MINIMUM_CHUNK_ROWS = 128
# Low-precision products join the float32 gradient of the head in blocks of rows.
BLOCK_BYTES, MINIMUM_BLOCK_ROWS = 16 << 20, 256


@dataclass(frozen=True)
class _Targets:
    """Checked targets on the device of the hidden states, cut into chunks of rows."""

    labels: Tensor  # (rows,) int64, -100: none
    id_cnt: Tensor  # (rows,) int64
    token_id: Tensor  # (entries,) int32 or int64
    prob: Tensor  # (entries,) any float
    alpha: float
    divisor: float  # of sums over rows
    row_bounds: list[int]  # chunk i holds rows row_bounds[i] … row_bounds[i + 1]
    entry_bounds: list[int]  # and the entries entry_bounds[i] … entry_bounds[i + 1]


def sparse_distillation_loss(
    logits: Tensor,
    labels: Tensor,
    id_cnt: Tensor,
    token_id: Tensor,
    prob: Tensor,
    alpha: float,
    *,
    num_rows: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss from logits, by autograd: the readable form. It keeps all logits and their log-softmax.

    Args:
        logits: (..., vocabulary), any float dtype; the softmax is taken in at least float32.
        labels: (...) integer, -100 where there is none.
        id_cnt: (...) integer, the number of target entries of each row.
        token_id: (entries,) integer, the rows' tokens laid end to end.
        prob: (entries,) float, their probabilities as stored (not renormalised); 0 contributes 0.
        alpha: weight of the divergence, from 0 to 1.
        num_rows: divisor of the sums over rows, default: the number of rows here. Micro-batches that give the rows
            of the whole step add up to its mean. With DDP or FSDP, which average gradients over processes, give
            the rows of all processes divided by the number of processes.

    Returns:
        (total, kl, ce), scalars, means over rows: total = alpha · kl + (1 − alpha) · ce. `kl` and `ce` are detached.

    Raises:
        InputError: shapes that do not fit, token ids or labels outside the vocabulary, a `num_rows` that is not positive.
    """
    vocabulary = logits.shape[-1]
    logits = logits.reshape(-1, vocabulary)  # (rows, vocabulary)
    rows = logits.shape[0]
    targets = _check_targets(logits, vocabulary, labels, id_cnt, token_id, prob, alpha, num_rows, [0, rows])

    log_probs = logits.to(_accurate(logits.dtype)).log_softmax(-1).reshape(-1)  # (rows · vocabulary,)
    row_start = torch.arange(rows, device=logits.device) * vocabulary
    # (entries,): the student's log-probability of each entry's token
    entry_start = row_start.repeat_interleave(targets.id_cnt, output_size=len(targets.token_id))
    entry_log_probs = log_probs[entry_start + targets.token_id]
    p = targets.prob.to(log_probs.dtype)
    kl = (torch.xlogy(p, p) - p * entry_log_probs).sum() / targets.divisor

    labelled = targets.labels != IGNORED_LABEL
    ce = -log_probs[row_start + targets.labels.clamp_min(0)].where(labelled, 0.0).sum() / targets.divisor
    return alpha * kl + (1 - alpha) * ce, kl.detach(), ce.detach()


# Dynamo must not trace the chunk loop: a compiled module calls it eagerly, at the price of one graph break.
@torch.compiler.disable
def fused_linear_distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    id_cnt: Tensor,
    token_id: Tensor,
    prob: Tensor,
    alpha: float,
    chunk_size: int | None = None,
    *,
    num_rows: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Head and loss together, never holding more than a chunk of logits.

    Equals `sparse_distillation_loss(hidden @ weight.T, …)`. The gradients of hidden states and head are computed
    in the forward pass, while a chunk's probabilities are at hand; backward only hands them over. Memory beyond
    the inputs: both gradients and one chunk of logits (two on an accelerator); without gradients only the chunk.

    Under autocast the three matrix products run in autocast's dtype; otherwise in the promoted dtype of `hidden`
    and `weight`. Sums, normalisers and the head's gradient are float32 (float64 for float64 input).

    Args:
        hidden: (..., hidden) float, the memory's last hidden states, all positions predicting a token.
        weight: (vocabulary, hidden) float, the head's weight; a plain tensor, as FSDP has it inside a forward pass.
        labels, id_cnt, token_id, prob, alpha, num_rows: as in `sparse_distillation_loss`; moved to the device of
            `hidden` if they lie elsewhere. No gradient flows into them.
        chunk_size: rows to a chunk; default: as many as fit CHUNK_BYTES of logits, at least MINIMUM_CHUNK_ROWS.

    Returns:
        (total, kl, ce) as `sparse_distillation_loss`; `total` is differentiable once (no second derivatives).

    Raises:
        InputError: as `sparse_distillation_loss`, and for a chunk size that is not positive.
    """
    if weight.ndim != 2 or hidden.ndim < 2 or hidden.shape[-1] != weight.shape[-1]:
        raise InputError(
            f"hidden states {tuple(hidden.shape)} and head {tuple(weight.shape)} do not fit together; "
            "expected (…, hidden) and (vocabulary, hidden)"
        )
    hidden = hidden.reshape(-1, hidden.shape[-1])  # (rows, hidden)
    rows, vocabulary = hidden.shape[0], weight.shape[0]

    product_dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(hidden.device.type) and product_dtype != torch.float64:
        product_dtype = torch.get_autocast_dtype(hidden.device.type)
    row_bounds = _row_bounds(rows, vocabulary * product_dtype.itemsize, chunk_size)
    targets = _check_targets(hidden, vocabulary, labels, id_cnt, token_id, prob, alpha, num_rows, row_bounds)

    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _FusedLinearDistillation.apply(hidden, weight, targets, product_dtype)
    with torch.no_grad():
        return _chunked(hidden, weight, targets, product_dtype, False, False)[:3]


class _FusedLinearDistillation(torch.autograd.Function):
    """Hands the gradients that `_chunked` computed to autograd."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, product_dtype):
        needed = ctx.needs_input_grad[:2]
        *losses, grad_hidden, grad_weight = _chunked(hidden, weight, targets, product_dtype, *needed)
        # As saved tensors they are freed as soon as backward is through, so that a first gradient of the head
        # becomes `weight.grad` itself instead of being copied there.
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(*losses[1:])
        ctx.set_materialize_grads(False)
        return tuple(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, _grad_kl, _grad_ce):
        if grad_total is None:
            return (None,) * 4
        # Not in place: with retain_graph the saved gradients are asked for again. On a CPU the usual factor 1
        # costs nothing; elsewhere looking at it would stop the queue.
        unscaled = grad_total.device.type == "cpu" and grad_total.item() == 1.0
        gradients = (
            None if gradient is None else (gradient if unscaled else gradient * grad_total).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*gradients, None, None)


def _chunked(
    hidden: Tensor, weight: Tensor, targets: _Targets, product_dtype: torch.dtype, want_hidden: bool, want_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(total, kl, ce, gradient of hidden or None, gradient of weight or None), both gradients in float32 or float64."""
    (rows, width), vocabulary = hidden.shape, weight.shape[0]
    device, accurate = hidden.device, _accurate(product_dtype)
    alpha, divisor = targets.alpha, targets.divisor
    largest = max((stop - start for start, stop in itertools.pairwise(targets.row_bounds)), default=0)

    with torch.autocast(device.type, enabled=False):
        head = weight.to(product_dtype)
        buffer = torch.empty(largest, vocabulary, dtype=product_dtype, device=device)
        grad_hidden = torch.empty(rows, width, dtype=accurate, device=device) if want_hidden else None
        grad_weight = torch.zeros(vocabulary, width, dtype=accurate, device=device) if want_weight else None
        kl, ce = (torch.zeros((), dtype=accurate, device=device) for _ in range(2))
        chunks = zip(itertools.pairwise(targets.row_bounds), itertools.pairwise(targets.entry_bounds), strict=True)
        for (start, stop), (first, last) in chunks:
            count = stop - start
            inputs = hidden[start:stop].to(product_dtype)  # (count, hidden)
            logits = torch.mm(inputs, head.t(), out=buffer[:count])  # (count, vocabulary)

            entry_row = torch.arange(count, device=device).repeat_interleave(
                targets.id_cnt[start:stop], output_size=last - first
            )  # (last - first,)
            entry_position = entry_row * vocabulary + targets.token_id[first:last]
            entry_logit = logits.view(-1)[entry_position].to(accurate)
            p = targets.prob[first:last].to(accurate)
            label = targets.labels[start:stop]
            labelled, label = (label != IGNORED_LABEL).to(accurate), label.clamp_min(0)  # (count,) each
            label_logit = logits.gather(1, label[:, None]).squeeze(1).to(accurate)

            probs, log_normaliser = _softmax(logits, accurate)  # (count, vocabulary), (count,)
            kl += (torch.xlogy(p, p) + p * (log_normaliser[entry_row] - entry_logit)).sum()
            ce += (labelled * (log_normaliser - label_logit)).sum()
            if not (want_hidden or want_weight):
                continue

            # The gradient in the logits is c·(softmax − q/c)/divisor. What stands before the bracket is taken to the
            # narrow factors of the products, which saves a pass over the chunk and keeps it in half precision's range.
            mass = torch.zeros_like(labelled).index_add_(0, entry_row, p)
            c = alpha * mass + (1 - alpha) * labelled  # (count,), 0 only where q is 0
            # A quotient of two numbers of one size: the inverse of a c below 3e-39 would be infinite in float32.
            nonzero = torch.where(c == 0, 1.0, c)
            flat = probs.view(-1)
            flat.index_add_(0, entry_position, (-alpha * p / nonzero[entry_row]).to(probs.dtype))
            label_position = torch.arange(count, device=device) * vocabulary + label
            flat.index_add_(0, label_position, ((alpha - 1) * labelled / nonzero).to(probs.dtype))
            residual = probs.to(product_dtype)  # (count, vocabulary): softmax − q/c

            if want_hidden:
                torch.mul(torch.mm(residual, head), (c / divisor)[:, None], out=grad_hidden[start:stop])
            if want_weight:
                weighted = (hidden[start:stop] * c[:, None]).to(product_dtype)  # (count, hidden)
                _add_product(grad_weight, residual.t(), weighted, 1 / divisor)

        kl /= divisor
        ce /= divisor
        return alpha * kl + (1 - alpha) * ce, kl, ce, grad_hidden, grad_weight


def _softmax(logits: Tensor, accurate: torch.dtype) -> tuple[Tensor, Tensor]:
    """Probabilities (count, vocabulary), in place on a CPU, and the logsumexp of each row (count,): the largest logit
    less its log-probability, so that no exponential is computed twice."""
    largest = logits.amax(-1).to(accurate)  # (count,)
    if logits.device.type == "cpu" and logits.dtype != torch.float16:
        # The CPU kernel computes in float32 whatever it stores, and has read a row's maximum before it writes the row.
        probs = torch.softmax(logits, -1, out=logits)
    else:
        probs = logits.softmax(-1, dtype=accurate)
    return probs, largest - probs.amax(-1).to(accurate).log()


def _add_product(total: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
    """total (m, n) += factor · left (m, k) @ right (k, n); low-precision products are summed in `total`'s dtype."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=factor)
        return
    block = max(BLOCK_BYTES // (total.shape[1] * total.element_size()), MINIMUM_BLOCK_ROWS)
    for start in range(0, total.shape[0], block):
        total[start : start + block].add_(torch.mm(left[start : start + block], right), alpha=factor)


def _row_bounds(rows: int, row_bytes: int, chunk_size: int | None) -> list[int]:
    """Bounds of chunks of nearly equal size. Raises InputError for a chunk size below 1."""
    if chunk_size is None:
        chunk_size = max(CHUNK_BYTES // row_bytes, MINIMUM_CHUNK_ROWS)
        chunk_size = max(math.ceil(rows / math.ceil(rows / chunk_size)), 1) if rows else 1
    elif chunk_size < 1:
        raise InputError(f"chunk_size {chunk_size}: expected a number of rows above 0")
    return [*range(0, rows, chunk_size), rows]


def _check_targets(
    like: Tensor,
    vocabulary: int,
    labels: Tensor,
    id_cnt: Tensor,
    token_id: Tensor,
    prob: Tensor,
    alpha: float,
    num_rows: float | None,
    row_bounds: list[int],
) -> _Targets:
    """Targets for the rows of `like` (rows, …), on its device. Raises InputError if they do not fit.

    An id beyond the vocabulary would address another row. Targets that lie on the CPU are checked there.
    """
    if not 0.0 <= alpha <= 1.0:
        raise InputError(f"alpha {alpha}: expected a number from 0 to 1")
    if num_rows is not None and not num_rows > 0:
        raise InputError(f"num_rows {num_rows}: expected a number above 0")
    rows = like.shape[0]
    labels, id_cnt = labels.reshape(-1), id_cnt.reshape(-1)
    if len(labels) != rows or len(id_cnt) != rows or token_id.ndim != 1 or token_id.shape != prob.shape:
        raise InputError(
            f"targets do not fit {rows} rows: {len(labels)} labels, {len(id_cnt)} id_cnt, token_id "
            f"{tuple(token_id.shape)}, prob {tuple(prob.shape)}; expected one label and id_cnt for each row"
        )
    ends = nn.functional.pad(id_cnt.cumsum(0), (1, 0))  # (rows + 1,)
    zero = ends[:1]
    extremes = [
        torch.stack(torch.aminmax(values if values.numel() else zero)).long()
        for values in (id_cnt, token_id, labels.masked_fill(labels == IGNORED_LABEL, 0))
    ]
    bounds = ends[torch.tensor(row_bounds, device=ends.device)]
    fewest, _, lowest, highest, lowest_label, highest_label, *bounds = torch.cat([*extremes, bounds]).tolist()
    if fewest < 0 or bounds[-1] != len(token_id):
        raise InputError(f"id_cnt adds up to {bounds[-1]}, but there are {len(token_id)} target entries")
    if lowest < 0 or highest >= vocabulary:
        raise InputError(f"target token ids reach from {lowest} to {highest}; expected 0 to {vocabulary - 1}")
    if lowest_label < 0 or highest_label >= vocabulary:
        reach = f"labels reach from {lowest_label} to {highest_label}"
        raise InputError(f"{reach}; expected 0 to {vocabulary - 1}, or {IGNORED_LABEL}")
    # Widened where they go to: a CPU's copies would not be pinned, and a GPU would wait for them.
    labels, id_cnt, token_id, prob = (
        each.to(like.device, non_blocking=True) for each in (labels, id_cnt, token_id, prob)
    )
    return _Targets(
        labels.long(), id_cnt.long(), token_id, prob, alpha, float(num_rows or rows or 1), row_bounds, bounds
    )


def _accurate(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums and normalisers: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)
