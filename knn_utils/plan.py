"""What a corpus of a given size takes: rows, bytes, floating-point operations and hours of each stage.

Arithmetic alone: knows nothing of files, models or this machine. Byte counts follow from the file formats and are
exact but for what is marked; times divide counted work by rates, which are measured elsewhere or assumed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from utils.units import size_text, time_text

TRAINING_KEYS = 1_000_000
KMEANS_ROUNDS = 10
# Bytes of a weight while it is trained: itself, its gradient, and Adam's two averages, float32 each.
TRAINED_WEIGHT_BYTES = 16


@dataclass
class Rates:
    """What one process does in a second, and where the numbers come from.

    forward_flops: of the base, running over windows. train_flops: of the memory, forward and backward.
    lookups: table look-ups of product quantisation while lists are scanned (codes · code_size).
    hits: neighbours turned into distributions. disk: bytes read or written, by all processes together.
    """

    forward_flops: float
    train_flops: float
    lookups: float
    hits: float
    disk: float
    origin: str = "assumed"


@dataclass
class Sizes:
    """What is to be planned. `dim`: width of the hidden states, `vocab`: tokens."""

    tokens: int
    dim: int
    vocab: int
    base_parameters: int
    layers: int
    intermediate: int
    gated: bool
    k: int
    entries_per_row: float
    block_size: int = 1024
    stride: int = 512
    ncentroids: int = 4096
    code_size: int = 64
    probe: int = 32
    epochs: int = 50
    windows_per_step: int = 128
    micro_rows: int = 16384
    processes: int = 8
    sharded: bool = False
    logprob: bool = False


@dataclass
class Stage:
    """One stage of the plan: rows made, bytes kept, bytes read and written on the way, bytes of memory of a process.

    `seconds` (None without rates): of computing or of the disk, whichever takes longer, since they go on together.
    `bound` says which.
    """

    name: str
    rows: int
    bytes: int
    seconds: float | None = None
    what: str = ""
    memory: int = 0
    traffic: int = 0
    bound: str = ""

    def takes(self, computing: float, rates: Rates) -> None:
        """Set how long it takes where computing takes so long."""
        moving = self.traffic / rates.disk
        self.seconds, self.bound = max((computing, "computing"), (moving, "disk"))


@dataclass
class Plan:
    """All stages, with the sizes and rates they follow from."""

    sizes: Sizes
    rates: Rates | None
    stages: list[Stage] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(stage.bytes for stage in self.stages)

    @property
    def seconds(self) -> float | None:
        return None if self.rates is None else sum(stage.seconds or 0.0 for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        return {
            "sizes": asdict(self.sizes),
            "rates": None if self.rates is None else asdict(self.rates),
            "memory_parameters": memory_parameters(self.sizes),
            "stages": [asdict(stage) for stage in self.stages],
            "bytes": self.bytes,
            "seconds": self.seconds,
        }


def datastore_rows(sizes: Sizes) -> int:
    """Rows: one for each token that follows another in its window. Where windows do not overlap, the first of each
    window has nothing before it."""
    if sizes.stride == sizes.block_size:
        return sizes.tokens - sizes.tokens // sizes.block_size
    return sizes.tokens


def window_count(sizes: Sizes) -> int:
    return -(-sizes.tokens // sizes.stride)


def windows_bytes(sizes: Sizes) -> int:
    """input_ids and labels int32, attention_mask int8, dstore_range two int64."""
    return window_count(sizes) * (sizes.block_size * 9 + 16)


def datastore_bytes(rows: int, dim: int, logprob: bool = False) -> int:
    """keys float16, vals int32, and with `logprob` a float32."""
    return rows * (2 * dim + 4 + (4 if logprob else 0))


def index_bytes(rows: int, dim: int, code_size: int, ncentroids: int) -> int:
    """An IVFPQ index: a code and an int64 number for each row, the centroids, the 256 entries of each sub-quantiser."""
    return rows * (code_size + 8) + ncentroids * dim * 4 + 256 * dim * 4


def targets_bytes(rows: int, entries_per_row: float) -> int:
    """id_cnt, label and distance, two int32 offsets, and for each entry an int32 token and a float16 probability."""
    return round(rows * (4 + 4 + 4 + 8 + entries_per_row * 6))


def memory_parameters(sizes: Sizes) -> int:
    """Weights of a memory: its blocks (a gated MLP has three matrices, GPT-2's two with biases), norms and head."""
    matrices = (3 if sizes.gated else 2) * sizes.dim * sizes.intermediate
    rest = sizes.dim if sizes.gated else 3 * sizes.dim + sizes.intermediate
    final = sizes.dim if sizes.gated else 2 * sizes.dim
    return sizes.layers * (matrices + rest) + final + sizes.vocab * sizes.dim


def training_memory(sizes: Sizes) -> int:
    """Bytes on a process while it trains: weights, gradients and Adam's averages (shared out where sharded), what
    the exchange of gradients buffers, activations of a micro-batch in bf16, and a chunk of logits."""
    weights = memory_parameters(sizes) * TRAINED_WEIGHT_BYTES
    if sizes.sharded:
        weights //= sizes.processes
    elif sizes.processes > 1:
        weights += memory_parameters(sizes) * 4
    width = (3 if sizes.gated else 2) * sizes.intermediate + 3 * sizes.dim
    activations = sizes.micro_rows * sizes.layers * width * 2
    head = sizes.micro_rows * sizes.dim * 8 + sizes.vocab * sizes.dim * 4 + (512 << 20)
    return weights + activations + head


def checkpoint_bytes(sizes: Sizes) -> int:
    """A run's folder at its end: the memory of every epoch, and the optimizer's moments to continue from."""
    weights = memory_parameters(sizes) * 4
    return weights * sizes.epochs + weights * 2


def make_plan(sizes: Sizes, rates: Rates | None = None) -> Plan:
    """The stages from windows to a trained memory."""
    rows, shares = datastore_rows(sizes), sizes.processes
    keys = datastore_bytes(rows, sizes.dim, sizes.logprob)
    index = index_bytes(rows, sizes.dim, sizes.code_size, sizes.ncentroids)
    targets = targets_bytes(rows, sizes.entries_per_row)
    parameters = memory_parameters(sizes)
    fed = window_count(sizes) * sizes.block_size
    scanned = rows / sizes.ncentroids * sizes.probe
    steps = -(-window_count(sizes) // sizes.windows_per_step) * sizes.epochs
    share = -(-index // shares)

    windows = Stage("windows", window_count(sizes), windows_bytes(sizes), what="one process, minutes")
    embed = Stage("datastore", rows, keys, what=f"{fed:,} tokens through the base")
    embed.memory, embed.traffic = sizes.base_parameters * 2, keys + windows.bytes
    build = Stage("index", rows, index, what=f"IVF{sizes.ncentroids},PQ{sizes.code_size}")
    build.memory, build.traffic = share, keys + index
    search = Stage("kNN targets", rows, targets)
    search.what = f"{scanned:,.0f} codes scanned for a row, {sizes.entries_per_row:g} entries kept"
    search.memory, search.traffic = share, keys + targets
    train = Stage("memory", rows * sizes.epochs, checkpoint_bytes(sizes))
    train.what = f"{parameters / 1e6:,.0f}M weights, {sizes.epochs} epochs, {steps:,} steps"
    train.memory, train.traffic = training_memory(sizes), (keys + targets) * sizes.epochs

    if rates is not None:
        embed.takes(2.0 * sizes.base_parameters * fed / rates.forward_flops / shares, rates)
        assigning = 2.0 * sizes.dim * (sizes.ncentroids + 256)
        sample = min(rows, TRAINING_KEYS) * KMEANS_ROUNDS  # on one process
        build.takes(assigning * (sample + rows / shares) / rates.forward_flops, rates)
        coarse = 2.0 * sizes.ncentroids * sizes.dim / rates.forward_flops
        row = scanned * sizes.code_size / rates.lookups + sizes.k / rates.hits + coarse
        search.takes(rows * row / shares, rates)
        train.takes(6.0 * parameters * rows * sizes.epochs / rates.train_flops / shares, rates)
    return Plan(sizes, rates, [windows, embed, build, search, train])


def plan_text(plan: Plan) -> str:
    """The plan as a Markdown table."""
    lines = [
        "| stage | rows | on disk | memory of a process | time | what |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for stage in plan.stages:
        memory = size_text(stage.memory) if stage.memory else "–"
        took = time_text(stage.seconds) + (" (disk)" if stage.bound == "disk" else "")
        lines.append(f"| {stage.name} | {stage.rows:,} | {size_text(stage.bytes)} | {memory} | {took} | {stage.what} |")
    lines.append(f"| all | | {size_text(plan.bytes)} | | {time_text(plan.seconds)} | |")
    return "\n".join(lines)
