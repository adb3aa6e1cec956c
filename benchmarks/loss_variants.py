"""Head + distillation loss + gradients, several ways in one run: time, peak memory, distance from the textbook.

    python -m benchmarks.loss_variants --rows 2048 --hidden 576 --vocab 49152 --repeats 5

The limit is the bare matrix products (logits, gradient of the hidden states, gradient of the head) into buffers
that are already there. Variants run in turn, round by round, so that a busy machine hits all of them alike. Random
hidden states, head and sparse targets: the time does not depend on their values.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.cli import flag, parse
from utils.errors import InputError, check_fraction, check_positive, command

if TYPE_CHECKING:
    from torch import Tensor

OURS = "fused, chunked (utils.cal_loss)"
DENSE = "dense target, dense logits (textbook)"
BARE = "bare products"


@dataclass
class LossVariantArguments:
    rows: int = flag(2048, "Rows (predicted tokens) of one step.")
    hidden: int = flag(576, "Width of the hidden states.")
    vocab: int = flag(49152, "Size of the vocabulary.")
    entries: int = flag(128, "Entries of each row's sparse target.")
    alpha: float = flag(0.5, "Weight of the divergence, 0 to 1.")
    repeats: int = flag(5, "Timed rounds after one round of warm-up, which also measures memory.")
    dtype: str = flag("float32", "float32, or bfloat16: autocast over float32 weights.")
    chunk_sizes: list[int] = flag([], "Further numbers of rows to a chunk to try, besides the default by bytes.")
    threads: int = flag(0, "Torch threads; 0: torch's own choice.")
    device: str = flag("cpu", "cpu or cuda.")


@dataclass
class Case:
    """One training step's tensors; the targets' rows are all of the same length."""

    hidden: Tensor  # (rows, hidden) float32, requires grad
    weight: Tensor  # (vocab, hidden) float32, requires grad
    labels: Tensor  # (rows,) int64
    id_cnt: Tensor  # (rows,) int32
    token_id: Tensor  # (rows · entries,) int32
    prob: Tensor  # (rows · entries,) float16
    alpha: float

    @property
    def targets(self) -> tuple[Any, ...]:
        return self.labels, self.id_cnt, self.token_id, self.prob, self.alpha


def make_case(arguments: LossVariantArguments) -> Case:
    """Random tensors of the asked shapes; each row's target tokens are distinct, as kNN targets are."""
    import torch

    generator = torch.Generator().manual_seed(0)
    rows, entries, vocab = arguments.rows, arguments.entries, arguments.vocab
    hidden = torch.randn(rows, arguments.hidden, generator=generator)
    weight = torch.randn(vocab, arguments.hidden, generator=generator) * 0.05
    prob = torch.rand(rows, entries, generator=generator).pow(4)
    # A stride that shares no factor with an even vocabulary gives distinct tokens without sampling each row.
    token_id = (torch.randint(vocab, (rows, 1), generator=generator) + torch.arange(entries) * 1009) % vocab
    device = arguments.device
    return Case(
        hidden=hidden.to(device).requires_grad_(),
        weight=weight.to(device).requires_grad_(),
        labels=torch.randint(vocab, (rows,), generator=generator).to(device),
        id_cnt=torch.full((rows,), entries, dtype=torch.int32, device=device),
        token_id=token_id.reshape(-1).int().to(device),
        prob=(prob / prob.sum(1, keepdim=True)).reshape(-1).half().to(device),
        alpha=arguments.alpha,
    )


def textbook_loss(case: Case) -> Tensor:
    """The original's way: a dense (rows, vocab) target, `kl_div` and `cross_entropy` over whole logits."""
    import torch
    import torch.nn.functional as F

    rows, vocab = case.hidden.shape[0], case.weight.shape[0]
    row = torch.arange(rows, device=case.hidden.device).repeat_interleave(case.id_cnt.long())
    target = torch.zeros(rows, vocab, device=case.hidden.device)
    target[row, case.token_id.long()] = case.prob.float()
    logits = F.linear(case.hidden, case.weight).float()
    kl = F.kl_div(F.log_softmax(logits, dim=-1), target, reduction="batchmean")
    return case.alpha * kl + (1 - case.alpha) * F.cross_entropy(logits, case.labels)


def sparse_reference_loss(case: Case) -> Tensor:
    """`sparse_distillation_loss`: no dense target, but whole logits under autograd."""
    import torch.nn.functional as F

    from utils.cal_loss import sparse_distillation_loss

    return sparse_distillation_loss(F.linear(case.hidden, case.weight), *case.targets)[0]


def fused_loss(case: Case, chunk_size: int | None = None) -> Tensor:
    """Our chunked function."""
    from utils.cal_loss import fused_linear_distillation_loss

    return fused_linear_distillation_loss(case.hidden, case.weight, *case.targets, chunk_size)[0]


def linear_cross_entropy_loss(case: Case, reduction: str, chunk_size: int | None = None) -> Tensor:
    """A loss standing on torch's `linear_cross_entropy`, which works by chunks of rows.

    With nll = logsumexp(z) − z[label], a row's divergence is Σ p·log p + Σp·(nll + z[label]) − Σ p·z. The sparse
    logits come from an embedding bag over the head's rows: Σ_e w_e·z[e] = hidden · Σ_e w_e·weight[e]. Rows of
    different Σp need nll row by row (reduction "none", which computes the logits again in backward); "sum" takes
    every Σp for 1, which float16 targets meet to about 1e-3. `chunk_size` None: torch's own choice.
    """
    import torch
    import torch.nn.functional as F
    from torch.nn import LinearCrossEntropyOptions

    rows = case.hidden.shape[0]
    hidden, weight = case.hidden, case.weight
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    nll = F.linear_cross_entropy(
        hidden, weight, case.labels, reduction=reduction, options=LinearCrossEntropyOptions(batch_chunk_size=chunk_size)
    )
    p = case.prob.float()
    row = torch.arange(rows, device=hidden.device).repeat_interleave(case.id_cnt.long())
    mass = torch.zeros(rows, device=hidden.device).index_add_(0, row, p)
    # One bag for each row: its target's entries with −p, and its label with Σp.
    order = torch.cat([row, torch.arange(rows, device=hidden.device)]).argsort(stable=True)
    tokens = torch.cat([case.token_id.long(), case.labels])[order]
    coefficients = torch.cat([-p, mass])[order].to(weight.dtype)
    ends = (case.id_cnt.long() + 1).cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends[:-1]])
    bag = F.embedding_bag(tokens, weight, offsets, mode="sum", per_sample_weights=coefficients)  # (rows, hidden)
    nll_sum = (nll.float() * (case.alpha * mass + 1 - case.alpha)).sum() if reduction == "none" else nll.float()
    sparse = (hidden.float() * bag.float()).sum()
    return (nll_sum + case.alpha * (torch.xlogy(p, p).sum() + sparse)) / rows


def bare_products(case: Case, dtype: str) -> Callable[[], None]:
    """The three products of head and loss, whole, into buffers made beforehand."""
    import torch

    product_dtype = getattr(torch, dtype)
    hidden, weight = case.hidden.detach().to(product_dtype), case.weight.detach().to(product_dtype)
    logits = torch.mm(hidden, weight.t())
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=grad_hidden)
        torch.mm(logits.t(), hidden, out=grad_weight)

    return run


def peak_bytes(run: Callable[[], Any], device: str) -> float:
    """Bytes that `run` takes at its peak beyond what was there before; nan where the system does not tell."""
    import torch

    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory starts again from here
    except OSError:
        run()
        return float("nan")
    before = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def variants(case: Case, arguments: LossVariantArguments) -> dict[str, Callable[[Case], Tensor]]:
    """The losses to compare, by name."""
    import torch.nn.functional as F

    from utils.cal_loss import CPU_CHUNK_BYTES

    found: dict[str, Callable[[Case], Tensor]] = {OURS: fused_loss}
    for size in arguments.chunk_sizes:
        found[f"fused, {size} rows to a chunk"] = lambda case, size=size: fused_loss(case, size)
    if hasattr(F, "linear_cross_entropy"):
        # torch chooses small chunks; in ours it is compared fairly
        ours = max(CPU_CHUNK_BYTES // (4 * arguments.vocab), 1)
        for name, reduction in (("exact", "none"), ("Σp taken for 1", "sum")):
            for size in (None, ours):
                found[f"linear_cross_entropy, {name}, chunk {size or 'auto'}"] = (
                    lambda case, reduction=reduction, size=size: linear_cross_entropy_loss(case, reduction, size)
                )
    else:
        print("torch has no linear_cross_entropy (2.13 has): its rows are left out")
    found["sparse target, dense logits (reference)"] = sparse_reference_loss
    found[DENSE] = textbook_loss
    return found


def measure(case: Case, arguments: LossVariantArguments) -> None:
    """Run everything and print the table."""
    import statistics
    import time

    import torch

    def wait() -> None:
        if arguments.device != "cpu":
            torch.cuda.synchronize()

    def step(loss: Callable[[Case], Tensor]) -> Tensor:
        case.hidden.grad = case.weight.grad = None
        with torch.autocast(arguments.device, dtype=torch.bfloat16, enabled=arguments.dtype == "bfloat16"):
            total = loss(case)
        total.backward()
        return total.detach()

    losses = variants(case, arguments)
    runs: dict[str, Callable[[], Any]] = {
        BARE: bare_products(case, arguments.dtype),
        **{name: (lambda loss=loss: step(loss)) for name, loss in losses.items()},
    }
    reference = step(losses[DENSE]), case.hidden.grad, case.weight.grad
    differences: dict[str, list[float]] = {BARE: []}
    for name, loss in losses.items():
        found = step(loss), case.hidden.grad, case.weight.grad
        differences[name] = [((a - b).norm() / b.norm()).item() for a, b in zip(found, reference, strict=True)]
    reference = found = None
    runs[BARE]()
    peaks: dict[str, float] = {}
    for name, run in runs.items():
        case.hidden.grad = case.weight.grad = None
        peaks[name] = peak_bytes(run, arguments.device)

    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.repeats):
        for name, run in runs.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            seconds[name].append(time.perf_counter() - start)

    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"\n{'variant':46s} {'median s':>9s} {'of bare':>8s} {'of ours':>8s} {'peak MB':>8s}  relative difference")
    print(f"{'':46s} {'':9s} {'':8s} {'':8s} {'':8s}  (loss, grad hidden, grad head)")
    for name in runs:
        differs = " ".join(f"{x:.0e}" for x in differences[name])
        print(
            f"{name:46s} {median[name]:9.3f} {median[name] / median[BARE]:8.2f} {median[name] / median[OURS]:8.2f} "
            f"{peaks[name] / 1e6:8.0f}  {differs}"
        )
    products = 6 * arguments.rows * arguments.hidden * arguments.vocab
    print(f"\nbare products: {products / median[BARE] / 1e9:.0f} GFLOP/s")
    print("peak MB: what a step takes beyond inputs and weights, the gradients of both included")


@command
def main() -> None:
    """Parse, measure, print."""
    (arguments,) = parse(LossVariantArguments, description="Time and memory of head + distillation loss, several ways.")
    for name in ("rows", "hidden", "vocab", "entries", "repeats", *(["threads"] if arguments.threads else [])):
        check_positive(f"--{name}", getattr(arguments, name))
    check_fraction("--alpha", arguments.alpha)
    for size in arguments.chunk_sizes:
        check_positive("--chunk_sizes", size)
    if arguments.entries > arguments.vocab:
        raise InputError(f"--entries {arguments.entries}: expected at most --vocab {arguments.vocab}")
    if arguments.dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype {arguments.dtype}: expected float32 or bfloat16")
    import torch

    if arguments.device not in ("cpu", "cuda") or (arguments.device == "cuda" and not torch.cuda.is_available()):
        raise InputError(f"--device {arguments.device}: expected cpu, or cuda on a machine that has it")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    settings = ", ".join(f"{name} {value}" for name, value in vars(arguments).items() if name != "threads")
    print(f"{settings}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    measure(make_case(arguments), arguments)


if __name__ == "__main__":
    main()
