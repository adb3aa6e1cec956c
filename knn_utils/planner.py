"""What a corpus of a given size takes: rows, bytes, memory and hours of each stage, from the windows to the memory.

Bytes follow from the file formats and are exact but for what is marked. Times divide counted work by `Rates`: those of
`RATES`, the one table of assumed ones, or what `measure_rates` finds on this machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from utils.units import size_text, time_text

TRAINING_KEYS = 1_000_000
KMEANS_ROUNDS = 10
# Bytes of a weight while it is trained: itself, its gradient, and Adam's two averages, float32 each.
TRAINED_WEIGHT_BYTES = 16
# What is measured: windows and their tokens; keys, lists and queries of an index, small enough for seconds, large
# enough that scanning counts.
WINDOWS, WINDOW_TOKENS = 4, 256
KEYS, LISTS, QUERIES = 40_000, 64, 256


@dataclass(frozen=True)
class Rates:
    """What one process does in a second, and where the numbers come from.

    flops: floating-point operations in matrix products, of base and memory alike.
    lookups: table look-ups of product quantisation while lists are scanned (codes · code_size).
    hits: neighbours turned into distributions. disk: bytes read or written, by all processes together.
    """

    flops: float
    lookups: float
    hits: float
    disk: float
    origin: str = "assumed"


# As reached in practice, not on data sheets: a large GPU in bf16, and two threads of a server's CPU.
RATES = {
    "gpu": Rates(flops=1e14, lookups=2e11, hits=2e8, disk=2e9),
    "cpu": Rates(flops=2.5e11, lookups=6e9, hits=5e7, disk=1.2e9),
}


@dataclass(frozen=True)
class Sizes:
    """What is to be planned. `dim`: width of the hidden states, `vocab`: tokens, `flat`: the index keeps whole keys."""

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
    flat: bool = False
    probe: int = 32
    epochs: int = 50
    windows_per_step: int = 128
    micro_rows: int = 16384
    processes: int = 8
    sharded: bool = False


@dataclass
class Stage:
    """One stage of the plan: rows made, bytes kept, bytes read and written on the way, bytes of memory of a process.

    `seconds` (None without rates): of computing or of the disk, whichever takes longer, since they go on together.
    `bound` says which.
    """

    name: str
    rows: int
    bytes: int
    what: str = ""
    memory: int = 0
    traffic: int = 0
    seconds: float | None = None
    bound: str = ""

    def takes(self, computing: float, rates: Rates) -> None:
        """Set how long it takes where computing takes so long."""
        self.seconds, self.bound = max((computing, "computing"), (self.traffic / rates.disk, "disk"))


@dataclass
class Plan:
    """All stages, with the sizes and rates they follow from."""

    sizes: Sizes
    rates: Rates | None
    stages: list[Stage]

    @property
    def bytes(self) -> int:
        return sum(stage.bytes for stage in self.stages)

    @property
    def seconds(self) -> float | None:
        return None if self.rates is None else sum(stage.seconds or 0.0 for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        totals = {"memory_parameters": memory_parameters(self.sizes), "bytes": self.bytes, "seconds": self.seconds}
        return asdict(self) | totals


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


def datastore_bytes(rows: int, dim: int) -> int:
    """keys float16, vals int32."""
    return rows * (2 * dim + 4)


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
    keys = datastore_bytes(rows, sizes.dim)
    index_row = 4 * sizes.dim if sizes.flat else sizes.code_size
    index = index_bytes(rows, sizes.dim, index_row, sizes.ncentroids)
    targets = targets_bytes(rows, sizes.entries_per_row)
    parameters = memory_parameters(sizes)
    fed = window_count(sizes) * sizes.block_size
    scanned = rows / sizes.ncentroids * min(sizes.probe, sizes.ncentroids)
    steps = -(-window_count(sizes) // sizes.windows_per_step) * sizes.epochs
    share = -(-index // shares)

    windows = Stage("windows", window_count(sizes), windows_bytes(sizes), "one process, minutes")
    embed = Stage("datastore", rows, keys, f"{fed:,} tokens through the base", sizes.base_parameters * 2)
    embed.traffic = keys + windows.bytes
    kind = "Flat" if sizes.flat else f"PQ{sizes.code_size}"
    build = Stage("index", rows, index, f"IVF{sizes.ncentroids},{kind}", share, keys + index)
    what = f"{scanned:,.0f} codes scanned for a row, {sizes.entries_per_row:g} entries kept"
    search = Stage("kNN targets", rows, targets, what, share, keys + targets)
    what = f"{parameters / 1e6:,.0f}M weights, {sizes.epochs} epochs, {steps:,} steps"
    train = Stage("memory", rows * sizes.epochs, checkpoint_bytes(sizes), what, training_memory(sizes))
    train.traffic = (keys + targets) * sizes.epochs

    if rates is not None:
        embed.takes(2.0 * sizes.base_parameters * fed / rates.flops / shares, rates)
        assigning = 2.0 * sizes.dim * (sizes.ncentroids + 256)
        sample = min(rows, TRAINING_KEYS) * KMEANS_ROUNDS  # on one process
        build.takes(assigning * (sample + rows / shares) / rates.flops, rates)
        coarse = 2.0 * sizes.ncentroids * sizes.dim / rates.flops
        code = 2.0 * sizes.dim / rates.flops if sizes.flat else sizes.code_size / rates.lookups
        search.takes(rows * (scanned * code + sizes.k / rates.hits + coarse) / shares, rates)
        train.takes(6.0 * parameters * rows * sizes.epochs / rates.flops / shares, rates)
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


# Measuring


def timed(work: Callable[[], Any], rounds: int = 3) -> float:
    """Seconds of the fastest of several rounds, after one that is not counted."""
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def measure_rates(model: str, sizes: Sizes, disk: float, trust_remote_code: bool = False) -> Rates:
    """Rates of this process, from random tokens through `model` and searches among its hidden states in an index of
    the kind of `sizes`, but smaller. `disk` is taken as given.

    Raises InputError when the model cannot be loaded.
    """
    import torch

    from models.capture import hidden_states
    from utils.base_model import BaseArguments

    opening = BaseArguments(model_name_or_path=model, trust_remote_code=trust_remote_code)
    base = opening.open_base(opening.open_tokenizer())
    embeddings = base.get_input_embeddings().weight
    limit = getattr(base.config, "max_position_embeddings", None) or WINDOW_TOKENS
    ids = torch.randint(0, len(embeddings), (WINDOWS, min(WINDOW_TOKENS, limit))).to(embeddings.device)

    def embed() -> Any:
        with torch.inference_mode():
            return hidden_states(base, ids).cpu()

    parameters = sum(weight.numel() for weight in base.parameters())
    flops = 2.0 * parameters * ids.numel() / timed(embed)
    lookups, hits = measure_search(embed().reshape(-1, base.config.hidden_size).float().numpy(), sizes)
    on_gpu = embeddings.device.type == "cuda"
    where = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads"
    return Rates(flops, lookups, hits, disk, f"measured here with {model} on {where} (but for the disk's)")


def measure_search(keys: np.ndarray, sizes: Sizes) -> tuple[float, float]:
    """PQ look-ups per second of scanning, and hits per second of making distributions; `keys` (n, dim) float32."""
    import faiss

    from knn_utils.distribution import aggregate

    random, dim = np.random.default_rng(0), keys.shape[1]
    code = next(size for size in range(min(sizes.code_size, dim), 0, -1) if dim % size == 0)
    spread = keys[random.integers(0, len(keys), KEYS)] + random.normal(0, keys.std() * 0.1, (KEYS, dim))
    spread = np.ascontiguousarray(spread, dtype=np.float32)
    index = faiss.index_factory(dim, f"IVF{LISTS},PQ{code}")
    index.cp.max_points_per_centroid = 64
    index.pq.cp.max_points_per_centroid = 16
    index.train(spread)
    index.add(spread)
    queries, k = spread[:QUERIES], min(sizes.k, KEYS // 8)
    seconds = {}
    for probe in (LISTS // 4, LISTS):
        index.nprobe = probe
        seconds[probe] = timed(lambda: index.search(queries, k))
    # Two probes, so that what does not grow with the codes scanned (tables, the heap's start) is left out.
    scanned = KEYS * QUERIES * (1 - 0.25) * code
    lookups = scanned / max(seconds[LISTS] - seconds[LISTS // 4], 1e-9)
    distances, ids = index.search(queries, k)
    tokens = random.zipf(1.3, KEYS).clip(max=sizes.vocab - 1).astype(np.int32)[ids]
    return lookups, QUERIES * k / timed(lambda: aggregate(distances, tokens, knn_temp=16.0, threshold=1e-8))
