"""The distillation loss: golden numbers, equality of the plain and the fused form, precision, memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from utils.cal_loss import fused_linear_distillation_loss, sample_vocabulary, sparse_distillation_loss

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"
VOCABULARY, WIDTH = 53, 8


def ragged_targets(counts: list[int], vocabulary: int = VOCABULARY, seed: int = 0) -> tuple[Tensor, ...]:
    """(labels, id_cnt, token_id, prob) with the dtypes of the kNN-target files; the first label of four is -100."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(vocabulary, (len(counts),), generator=generator)
    labels[::4] = -100
    token_id = [torch.randperm(vocabulary, generator=generator)[:count] for count in counts]
    prob = [torch.rand(count, generator=generator).softmax(0) if count else torch.zeros(0) for count in counts]
    for values in prob:
        values[3:4] = 0.0  # what float16 makes of a probability below 3e-8
    id_cnt = torch.tensor(counts, dtype=torch.int32)
    return labels, id_cnt, torch.cat(token_id).int(), torch.cat(prob).half()


def head_inputs(rows: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> tuple[Tensor, Tensor]:
    """(hidden, weight), leaves that want a gradient."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return hidden.requires_grad_(), weight.requires_grad_()


COUNTS = [5, 0, 1, 9, 53, 2, 0, 7, 4, 4, 1]


def run_both(hidden: Tensor, weight: Tensor, targets: tuple[Tensor, ...], alpha: float, **how) -> list[list[Tensor]]:
    """[losses and gradients] of the plain form, then of the fused form."""
    results = []
    for fused in (False, True):
        hidden.grad = weight.grad = None
        if fused:
            losses = fused_linear_distillation_loss(hidden, weight, *targets, alpha, **how)
        else:
            losses = sparse_distillation_loss(F.linear(hidden, weight), *targets, alpha, num_rows=how.get("num_rows"))
        losses[0].backward()
        results.append([*(loss.detach() for loss in losses), hidden.grad, weight.grad])
    return results


def assert_same(found: list[Tensor], expected: list[Tensor], **tolerance) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, check_dtype=False, **tolerance)


@pytest.mark.unit
@pytest.mark.parametrize("alpha", [0.5, 0.2, 1.0])
@pytest.mark.parametrize("fused", [False, True])
def test_losses_and_gradient_equal_the_originals(alpha, fused):
    golden = load_file(GOLDEN / "loss.safetensors")
    logits = golden["logits"].requires_grad_()
    targets = golden["labels"], golden["id_cnt"], golden["token_id"], golden["prob"], alpha
    if fused:
        total, kl, ce = fused_linear_distillation_loss(logits, torch.eye(logits.shape[1]), *targets)
    else:
        total, kl, ce = sparse_distillation_loss(logits, *targets)
    total.backward()
    expected = {0.5: 5.6839189529418945, 0.2: 6.32424259185791, 1.0: 4.616713047027588}
    assert total.item() == pytest.approx(expected[alpha], abs=1e-4)
    assert kl.item() == pytest.approx(4.616713047027588, abs=1e-4)
    assert ce.item() == pytest.approx(6.751124858856201, abs=1e-4)
    torch.testing.assert_close(logits.grad, golden[f"grad_alpha{alpha}"], atol=1e-4, rtol=0)


@pytest.mark.unit
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
def test_fused_equals_plain_whatever_the_chunks(alpha, chunk_rows, monkeypatch):
    monkeypatch.setattr("utils.cal_loss.CHUNK_BYTES", 0)
    monkeypatch.setattr("utils.cal_loss.MINIMUM_CHUNK_ROWS", chunk_rows)
    plain, fused = run_both(*head_inputs(len(COUNTS)), ragged_targets(COUNTS), alpha, num_rows=7)
    assert_same(fused, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.unit
# The smallest numbers of float64 and float32, and around the number whose inverse is infinite in float32.
@pytest.mark.parametrize("alpha", [5e-324, 1.5e-45, 2.9e-39, 1e-20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_vanishing_weight_of_a_row_gives_the_plain_gradient(dtype, alpha):
    hidden, weight = head_inputs(2, dtype)
    targets = torch.tensor([-100, 3]), torch.tensor([2, 1]), torch.tensor([1, 2, 3]), torch.tensor([0.25, 0.5, 1.0])
    plain, fused = run_both(hidden, weight, targets, alpha)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6 if dtype == torch.float32 else 0.02
    assert_same(fused, plain, atol=tolerance, rtol=tolerance)
    assert fused[3][0].abs().max() <= 10 * alpha


# hidden states, weights, autocast's dtype
@pytest.mark.unit
@pytest.mark.parametrize(
    ("hidden_dtype", "dtype", "autocast"),
    [
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, None),
        (torch.float32, torch.bfloat16, None),
        (torch.float16, torch.float16, None),
    ],
)
def test_in_half_precision_losses_are_float32(hidden_dtype, dtype, autocast):
    hidden, weight = head_inputs(len(COUNTS))
    targets = ragged_targets(COUNTS)
    plain, _ = run_both(hidden, weight, targets, 0.3)
    hidden = hidden.detach().to(hidden_dtype).requires_grad_()
    weight = weight.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        losses = fused_linear_distillation_loss(hidden, weight, *targets, 0.3)
    losses[0].backward()
    assert (losses[0].dtype, hidden.grad.dtype, weight.grad.dtype) == (torch.float32, hidden_dtype, dtype)
    assert_same([x.detach() for x in losses], plain[:3], rtol=0.02, atol=0)
    for found, expected in ((hidden.grad, plain[3]), (weight.grad, plain[4])):
        assert (found - expected).norm() / expected.norm() < 0.02


PEAK_MEMORY = """
import torch
from pathlib import Path
from utils import cal_loss
from utils.cal_loss import fused_linear_distillation_loss
cal_loss.CHUNK_BYTES, cal_loss.MINIMUM_CHUNK_ROWS = 0, 32
torch.set_num_threads(1)
rows, vocabulary, width, chunk = 512, 32768, 256, 32

def status(name):
    return next(int(l.split()[1]) / 1024 for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(name))

hidden = torch.randn(rows, width).requires_grad_()
weight = (torch.randn(vocabulary, width) * 0.05).requires_grad_()
targets = torch.randint(vocabulary, (rows,)), torch.full((rows,), 4), torch.randint(vocabulary, (4 * rows,)), torch.full((4 * rows,), 0.25)

def loss(count):
    return fused_linear_distillation_loss(hidden[:count], weight, *(x[:count * (len(x) // rows)] for x in targets), 0.5)[0]

def peak(run):
    run()
    hidden.grad = weight.grad = None
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    run()
    return status("VmHWM") - before

loss(chunk).backward()
with torch.no_grad():
    print(peak(lambda: loss(rows)))
print(peak(lambda: loss(rows).backward()))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's record of peak memory")
def test_memory_is_one_chunk_and_in_training_one_gradient_more():
    run = subprocess.run([sys.executable, "-c", PEAK_MEMORY], cwd=ROOT, capture_output=True, text=True, check=True)
    evaluation, training = map(float, run.stdout.split())
    chunk, head, whole_logits = 4, 32, 64  # MiB
    assert evaluation < chunk + 16 < whole_logits
    assert training < head + chunk + 16 < 2 * head


@pytest.mark.unit
def test_targets_that_do_not_add_up_are_refused():
    hidden, weight = head_inputs(3)
    targets = torch.tensor([1, -100, 2]), torch.tensor([1, 1, 2]), torch.tensor([4, 5, 6]), torch.ones(3)
    for loss in (
        lambda: fused_linear_distillation_loss(hidden, weight, *targets, 0.5),
        lambda: sparse_distillation_loss(hidden @ weight.T, *targets, 0.5),
    ):
        with pytest.raises(ValueError, match="4"):
            loss()


@pytest.mark.unit
@pytest.mark.parametrize("loss", [sparse_distillation_loss, fused_linear_distillation_loss])
def test_all_others_sampled_are_the_whole_vocabulary(loss):
    hidden, weight = head_inputs(len(COUNTS))
    labels, id_cnt, token_id, prob = ragged_targets([2, 0, 1, 3, 4, 2, 0, 1, 2, 0, 1])
    found = []
    for others in (None, VOCABULARY):
        hidden.grad = weight.grad = None
        inputs = hidden, weight, labels, token_id
        states, head, label, tokens = inputs if others is None else sample_vocabulary(*inputs, others)
        given = (states @ head.T,) if loss is sparse_distillation_loss else (states, head)
        losses = loss(*given, label, id_cnt, tokens, prob, 0.3)
        losses[0].backward()
        found.append([*(each.detach() for each in losses), hidden.grad, weight.grad])
    assert_same(found[1], found[0], atol=1e-6, rtol=1e-6)


@pytest.mark.unit
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sampled_others_stand_for_the_rest_of_the_vocabulary(dtype):
    torch.manual_seed(4)
    hidden, weight = head_inputs(6, dtype)
    labels, token_id = torch.tensor([3, -100, 7, 7, 9, 20]), torch.tensor([3, 11, 9], dtype=torch.int32)
    whole, sums = (hidden @ weight.T).detach().double(), []
    for _ in range(1500):
        states, head, label, tokens = sample_vocabulary(hidden, weight, labels, token_id, 20)
        logits = (states.double() @ head.T.double()).detach()  # (6, 6 + 20): token 0 stands in for no label
        sums.append(logits.exp().sum(-1))
    torch.testing.assert_close(torch.stack(sums).mean(0), whole.exp().sum(-1), rtol=0.05, atol=0)
    torch.testing.assert_close(logits[:, tokens], whole[:, token_id.long()], rtol=0.02, atol=0.02)
    assert label[1] == -100 and label[2] == label[3] and tokens[0] == label[0]
    states.float().mm(head.float().T).logsumexp(-1).sum().backward()
    assert hidden.grad.any() and int(weight.grad.any(-1).sum()) == len(head) == 26
