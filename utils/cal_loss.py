"""The training loss: a memory learns the retriever's distribution (KL) and the next token (CE) at once.

For a row with logits z, label y and the retriever's sparse distribution p the loss is
alpha · Σ p·(log p − log_softmax(z)) + (1 − alpha) · (−log_softmax(z)[y]). With the combined target
q = alpha·p + (1 − alpha)·onehot(y) it equals alpha·Σ p·log p + c·logsumexp(z) − Σ q·z, where c = Σ q; its gradient in z
is c·softmax(z) − q. So one sparse target serves both parts, and no tensor of rows × vocabulary is kept.

`sparse_distillation_loss` takes logits and leaves the gradient to autograd; `fused_linear_distillation_loss` takes the input
and the weight of the head, and computes loss and gradients chunk of rows by chunk of rows (`--loss plain|fused`).

Targets are ragged: `id_cnt` entries for each row, laid end to end in `token_id` and `prob`. Both losses are means over
ROWS: a row with label -100 has no cross-entropy and one with `id_cnt` 0 no divergence, but the divisor counts both.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

IGNORED_LABEL = -100
# Of logits. Every chunk reads and writes the head's whole gradient: with fewer rows, this traffic outweighs the matmuls.
CHUNK_BYTES, GPU_CHUNK_BYTES = 256 << 20, 1 << 30
MINIMUM_CHUNK_ROWS = 128
# On a CPU low-precision products are added to the float32 gradient of the head in blocks of rows.
BLOCK_BYTES, MINIMUM_BLOCK_ROWS = 16 << 20, 256
# Whether torch (2.8 or newer) has a product of low-precision matrices that is added to a float32 one, for GPUs.
WIDE_SUMS = "dtype_out" in torch.ops.aten.addmm.overloads()


def _on_device(device, labels, id_cnt, token_id, prob) -> tuple[Tensor, ...]:
    """The targets on `device`: labels and id_cnt (rows,) int64, token_id (entries,) integer, prob (entries,) float.

    Raises ValueError where id_cnt does not add up to the number of entries.
    """
    if (total := int(id_cnt.sum())) != len(token_id):
        raise ValueError(f"id_cnt adds up to {total}, but there are {len(token_id)} target entries")
    # Widened on the device: a widened copy in the host's memory would not be pinned.
    moved = (each.to(device, non_blocking=True) for each in (labels.reshape(-1), id_cnt.reshape(-1), token_id, prob))
    labels, id_cnt, token_id, prob = moved
    return labels.long(), id_cnt.long(), token_id, prob


def sample_vocabulary(
    hidden: Tensor, weight: Tensor, labels: Tensor, token_id: Tensor, others: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs of either loss over a part of the vocabulary: the tokens of labels and targets, and `others` sampled ones.

    The others are drawn uniformly, without replacement, from the `rest` of the vocabulary, with the CPU's generator. Each
    logit of theirs gets + log(rest / others), so that the expected sum of exponentials is that of the whole vocabulary.

    Args:
        hidden, weight: (rows, hidden) and (vocabulary, hidden), as in `fused_linear_distillation_loss`.
        labels, token_id: (rows,) and (entries,) integer on the CPU, as in `sparse_distillation_loss`.

    Returns:
        (hidden, weight, labels, token_id) with the selected rows of `weight` and token ids that number them. Both tensors
        are eight columns wider: the product of these columns is the term above.
    """
    used = torch.zeros(len(weight), dtype=torch.bool)
    used[labels.long().clamp_min(0)] = used[token_id.long()] = True
    rest = used.logical_not().nonzero()[:, 0]
    sampled = rest[torch.randperm(len(rest))[:others]]
    selected = torch.cat([used.nonzero()[:, 0], sampled])
    position = torch.zeros(len(weight), dtype=torch.int64)
    position[selected] = torch.arange(len(selected))
    columns = torch.zeros(len(selected), 8)  # eight keep rows aligned, and two of them the term exact in bfloat16
    if len(sampled):
        term = torch.tensor(math.log(len(rest) / len(sampled)))
        columns[-len(sampled) :, 0] = term.bfloat16()
        columns[-len(sampled) :, 1] = term - term.bfloat16()
    labels = position[labels.long().clamp_min(0)].where(labels != IGNORED_LABEL, IGNORED_LABEL)
    weight = torch.cat([weight[selected.to(weight.device)], columns.to(weight)], 1)
    return nn.functional.pad(hidden, (0, 8), value=1.0), weight, labels, position[token_id.long()]


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
    """The readable form: loss from logits, gradient by autograd. Keeps all logits and their log-softmax.

    Ids are not checked here: one outside the vocabulary would address another row (`training.rows` checks them).

    Args:
        logits: (..., vocabulary), any float dtype; the softmax is taken in at least float32.
        labels: (...) integer in [0, vocabulary), -100 where there is none.
        id_cnt: (...) integer, the number of target entries of each row.
        token_id: (entries,) integer in [0, vocabulary), the rows' tokens laid end to end.
        prob: (entries,) float, their probabilities as stored (not renormalised); 0 contributes 0.
        alpha: weight of the divergence, from 0 to 1.
        num_rows: divisor of the sums over rows, default: the number of rows here. Micro-batches that give the rows
            of the whole step add up to its mean.

    Returns:
        (total, kl, ce), scalars, means over rows: total = alpha · kl + (1 − alpha) · ce. `kl` and `ce` are detached.
    """
    vocabulary = logits.shape[-1]
    logits = logits.reshape(-1, vocabulary)  # (rows, vocabulary)
    labels, id_cnt, token_id, prob = _on_device(logits.device, labels, id_cnt, token_id, prob)
    divisor = num_rows or len(labels) or 1

    log_probs = (
        logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1).reshape(-1)
    )  # (rows · vocabulary,)
    row_start = torch.arange(len(logits), device=logits.device) * vocabulary
    # (entries,): the student's log-probability of each entry's token
    entry_start = row_start.repeat_interleave(id_cnt, output_size=len(token_id))
    entry_log_probs = log_probs[entry_start + token_id]
    p = prob.to(log_probs.dtype)
    kl = (torch.xlogy(p, p) - p * entry_log_probs).sum() / divisor

    label_log_probs = log_probs[row_start + labels.clamp_min(0)]  # (rows,)
    ce = -label_log_probs.where(labels != IGNORED_LABEL, 0.0).sum() / divisor
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
    *,
    num_rows: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Head and loss together, never holding more than a chunk of logits.

    Equals `sparse_distillation_loss(hidden @ weight.T, …)`. The forward pass computes both gradients from each chunk's
    probabilities, the backward pass returns them. Memory: both gradients and one chunk of logits (two on a GPU).

    Under autocast the three matrix products run in autocast's dtype; otherwise in the promoted dtype of `hidden`
    and `weight`. Sums, normalisers and the head's gradient are float32 (float64 for float64 input).

    Args:
        hidden: (..., hidden) float, the memory's last hidden states, all positions predicting a token.
        weight: (vocabulary, hidden) float, the head's weight; a plain tensor, as FSDP has it inside a forward pass.
        labels, id_cnt, token_id, prob, alpha, num_rows: as in `sparse_distillation_loss`; moved to the device of
            `hidden` if they lie elsewhere. No gradient flows into them.

    Returns:
        (total, kl, ce) as `sparse_distillation_loss`; `total` is differentiable once (no second derivatives).
    """
    hidden = hidden.reshape(-1, hidden.shape[-1])  # (rows, hidden)
    rows, vocabulary = hidden.shape[0], weight.shape[0]

    product_dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(hidden.device.type) and product_dtype != torch.float64:
        product_dtype = torch.get_autocast_dtype(hidden.device.type)
    # Before the targets go to the GPU, which would make the host wait for these numbers.
    row_bounds = _row_bounds(rows, vocabulary * product_dtype.itemsize, chunk_bytes(hidden.device))
    ends = nn.functional.pad(id_cnt.reshape(-1).cumsum(0), (1, 0))  # (rows + 1,)
    bounds = row_bounds, ends[row_bounds].tolist()
    targets = *_on_device(hidden.device, labels, id_cnt, token_id, prob), alpha, num_rows or rows or 1

    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _FusedLinearDistillation.apply(hidden, weight, targets, bounds, product_dtype)
    with torch.no_grad():
        return _chunked(hidden, weight, targets, bounds, product_dtype, False, False)[:3]


class _FusedLinearDistillation(torch.autograd.Function):
    """Passes the gradients that `_chunked` computed to autograd."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, bounds, product_dtype):
        needed = ctx.needs_input_grad[:2]
        *losses, grad_hidden, grad_weight = _chunked(hidden, weight, targets, bounds, product_dtype, *needed)
        # Saved tensors are freed at the end of backward, so the first gradient of the head becomes `weight.grad`
        # without a copy.
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(*losses[1:])
        ctx.set_materialize_grads(False)
        return tuple(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, _grad_kl, _grad_ce):
        if grad_total is None:
            return (None,) * 5
        # Not in place: with retain_graph the saved gradients are used again. On a CPU the usual factor 1 is skipped;
        # on a GPU reading it would wait for the queue.
        unscaled = grad_total.device.type == "cpu" and grad_total.item() == 1.0
        gradients = (
            None if gradient is None else (gradient if unscaled else gradient * grad_total).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*gradients, None, None, None)


def _chunked(hidden, weight, targets, bounds, product_dtype, want_hidden, want_weight) -> tuple[Tensor | None, ...]:
    """(total, kl, ce, gradient of hidden or None, gradient of weight or None), both gradients in float32 or float64.

    `targets`: as `_on_device` returns them, with alpha and the divisor; `bounds`: of the chunks, in rows and in entries.
    """
    (rows, width), vocabulary = hidden.shape, weight.shape[0]
    device, accurate = hidden.device, torch.promote_types(product_dtype, torch.float32)
    labels, id_cnt, token_id, prob, alpha, divisor = targets
    row_bounds, entry_bounds = bounds
    largest = max((stop - start for start, stop in itertools.pairwise(row_bounds)), default=0)

    with torch.autocast(device.type, enabled=False):
        head = weight.to(product_dtype)
        buffer = torch.empty(largest, vocabulary, dtype=product_dtype, device=device)
        grad_hidden = torch.empty(rows, width, dtype=accurate, device=device) if want_hidden else None
        grad_weight = torch.zeros(vocabulary, width, dtype=accurate, device=device) if want_weight else None
        kl, ce = (torch.zeros((), dtype=accurate, device=device) for _ in range(2))
        chunks = zip(itertools.pairwise(row_bounds), itertools.pairwise(entry_bounds), strict=True)
        for (start, stop), (first, last) in chunks:
            count = stop - start
            inputs = hidden[start:stop].to(product_dtype)  # (count, hidden)
            logits = torch.mm(inputs, head.t(), out=buffer[:count])  # (count, vocabulary)

            entry_row = torch.arange(count, device=device).repeat_interleave(
                id_cnt[start:stop], output_size=last - first
            )  # (last - first,)
            entry_position = entry_row * vocabulary + token_id[first:last]
            entry_logit = logits.view(-1)[entry_position].to(accurate)
            p = prob[first:last].to(accurate)
            label = labels[start:stop]
            labelled, label = (label != IGNORED_LABEL).to(accurate), label.clamp_min(0)  # (count,) each
            label_logit = logits.gather(1, label[:, None]).squeeze(1).to(accurate)

            probs, log_normaliser = _softmax(logits, accurate)  # (count, vocabulary), (count,)
            kl += (torch.xlogy(p, p) + p * (log_normaliser[entry_row] - entry_logit)).sum()
            ce += (labelled * (log_normaliser - label_logit)).sum()
            if not (want_hidden or want_weight):
                continue

            # The gradient in the logits is c·(softmax − q/c)/divisor. The factor c/divisor is applied to the narrow
            # factors of the products: one pass over the chunk less, and no overflow in half precision.
            mass = torch.zeros_like(labelled).index_add_(0, entry_row, p)
            c = alpha * mass + (1 - alpha) * labelled  # (count,), 0 only where q is 0
            # Divide by c: the inverse of a c below 3e-39 would be infinite in float32.
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
    minus its log-probability, so that each exponential is computed once."""
    largest = logits.amax(-1).to(accurate)  # (count,)
    if logits.dtype == torch.float16:  # small probabilities need a wider range
        probs = logits.softmax(-1, dtype=accurate)
    else:
        # The kernels compute in float32 whatever they store; a CPU's has read a row's maximum before it writes the row.
        probs = torch.softmax(logits, -1, out=logits if logits.device.type == "cpu" else None)
    return probs, largest - probs.amax(-1).to(accurate).log()


def _add_product(total: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
    """total (m, n) += factor · left (m, k) @ right (k, n); low-precision products are summed in `total`'s dtype."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=factor)
        return
    if total.is_cuda and WIDE_SUMS:
        torch.addmm(total, left, right, out_dtype=total.dtype, alpha=factor, out=total)
        return
    block = max(BLOCK_BYTES // (total.shape[1] * total.element_size()), MINIMUM_BLOCK_ROWS)
    for part, rows in zip(total.split(block), left.split(block), strict=True):
        part.add_(torch.mm(rows, right), alpha=factor)


def chunk_bytes(device: torch.device) -> int:
    """The size of a chunk of logits: on a GPU a 64th of its memory, within bounds."""
    if device.type != "cuda":
        return CHUNK_BYTES
    return min(max(torch.cuda.get_device_properties(device).total_memory // 64, CHUNK_BYTES), GPU_CHUNK_BYTES)


def _row_bounds(rows: int, row_bytes: int, most: int) -> list[int]:
    """Bounds of nearly equal chunks of at most `most` bytes."""
    chunks = math.ceil(rows / max(most // row_bytes, MINIMUM_CHUNK_ROWS))
    return [*range(0, rows, math.ceil(rows / max(chunks, 1)) or 1), rows]
