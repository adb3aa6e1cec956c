"""What a corpus of a given size takes: rows, bytes, memory and hours of each stage, from the windows to the memory.

Bytes follow from the file formats. Times divide counted work by assumed `Rates`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from utils.cli import flag
from utils.units import size_text, time_text

BLOCK_SIZE, STRIDE = 1024, 512
TRAINING_KEYS, KMEANS_ROUNDS = 1_000_000, 10
# Bytes of a weight while it is trained: itself, its gradient, and Adam's two averages, float32 each.
TRAINED_WEIGHT_BYTES = 16


@dataclass(frozen=True)
class Rates:
    """What one process does in a second.

    flops: floating-point operations in matrix products, of base and memory alike.
    lookups: table look-ups of product quantisation while lists are scanned (codes · code_size).
    hits: neighbours turned into distributions. disk: bytes read or written, by all processes together.
    """

    flops: float
    lookups: float
    hits: float
    disk: float


@dataclass
class Sizes:
    """What is to be planned, as flags of preflight, which fills in what is None."""

    tokens: int | None = flag(None, "tokens of the corpus; default: the windows'")
    dim: int | None = flag(None, "width of the hidden states; default: the files' or the model's")
    vocab: int | None = flag(None, "tokens of the vocabulary; default: the model's")
    base_parameters: float | None = flag(None, "weights of the base; default: counted from its config")
    layers: int = flag(8, "layers of the memory")
    intermediate: int | None = flag(None, "width within the memory's MLPs; default: the model's, else 4 times --dim")
    gated: bool | None = flag(None, "MLPs with a gate, as Llama's; default: the model's, else false")
    k: int = flag(1024, "neighbours of a row")
    entries_per_row: float | None = flag(
        None, "entries of a row's kNN target; default: measured from --knn_save_path, else assumed to be k/8"
    )
    block_size: int | None = flag(None, f"tokens of a window; default: the windows', else {BLOCK_SIZE}")
    stride: int | None = flag(None, f"tokens from one window to the next; default: the windows', else {STRIDE}")
    ncentroids: int = flag(4096, "inverted lists of the index")
    code_size: int = flag(64, "bytes of a row in the index")
    index_factory: str = flag("", "FAISS factory string in place of the two: Flat, IVF4096,Flat, IVF4096,PQ64")
    probe: int = flag(32, "inverted lists searched")
    num_train_epochs: int = flag(50, "epochs of training")
    windows_per_step: int = flag(128, "windows of a step, all processes together")
    micro_batch_rows: int = flag(16384, "rows that go through the memory at once")
    processes: int = flag(8, "processes, each with a device of its own")
    sharded: bool = flag(False, "weights and optimizer are sharded over the processes (FSDP)")


@dataclass
class Stage:
    """One stage of the plan: rows made, bytes kept, bytes read and written on the way, bytes of memory of a process.

    `seconds` (None without rates): of computing or of the disk, whichever takes longer, since they go on together.
    `bound` says which. `least`: the memory of a process where there is too little, 0 where it is the same.
    """

    name: str
    rows: int
    bytes: int
    what: str = ""
    memory: int = 0
    traffic: int = 0
    seconds: float | None = None
    bound: str = ""
    least: int = 0


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
    the exchange of gradients buffers, what a micro-batch in bf16 keeps for its backward pass, and a chunk of logits."""
    weights = memory_parameters(sizes) * TRAINED_WEIGHT_BYTES
    if sizes.sharded:
        weights //= sizes.processes
    elif sizes.processes > 1:
        weights += memory_parameters(sizes) * 4
    # Llama's SwiGLU and RMSNorm; GPT-2's GELU, which is computed in steps, and LayerNorm.
    kept = 8 * sizes.intermediate + 13 * sizes.dim if sizes.gated else 10 * sizes.intermediate + 9 * sizes.dim
    activations = sizes.micro_batch_rows * sizes.layers * kept
    head = sizes.micro_batch_rows * sizes.dim * 8 + sizes.vocab * sizes.dim * 4 + (512 << 20)
    return weights + activations + head


def checkpoint_bytes(sizes: Sizes) -> int:
    """A run's folder at its end: the memory of every epoch, and the optimizer's moments to continue from."""
    weights = memory_parameters(sizes) * 4
    return weights * sizes.num_train_epochs + weights * 2


def make_plan(sizes: Sizes, rates: Rates | None = None) -> list[Stage]:
    """The stages from windows to a trained memory."""
    rows, shares, epochs = datastore_rows(sizes), sizes.processes, sizes.num_train_epochs
    factory = sizes.index_factory or f"IVF{sizes.ncentroids},PQ{sizes.code_size}"
    lists, codes = re.search(r"IVF(\d+)", factory), re.search(r"PQ(\d+)", factory)
    nlist = int(lists[1]) if lists else 1
    key_bytes = int(codes[1]) if codes else 4 * sizes.dim
    windows, keys = windows_bytes(sizes), datastore_bytes(rows, sizes.dim)
    index, targets = index_bytes(rows, sizes.dim, key_bytes, nlist), targets_bytes(rows, sizes.entries_per_row)
    parameters, fed = memory_parameters(sizes), window_count(sizes) * sizes.block_size
    scanned = rows / nlist * min(sizes.probe, nlist)
    steps = -(-window_count(sizes) // sizes.windows_per_step) * epochs
    share = -(-index // shares)
    search = f"{scanned:,.0f} codes scanned for a row, {sizes.entries_per_row:g} entries kept"
    whole = f", {size_text(index)} where a process holds the whole index" if shares > 1 else ""
    train = f"{parameters / 1e6:,.0f}M weights, {epochs} epochs, {steps:,} steps"
    read_again = (keys + targets) * epochs
    smaller = replace(sizes, micro_batch_rows=min(sizes.micro_batch_rows, 1024))  # as the trainers do by themselves
    least = training_memory(smaller)
    stages = [
        Stage("windows", window_count(sizes), windows, "one process, minutes"),
        Stage(
            "datastore", rows, keys, f"{fed:,} tokens through the base", int(sizes.base_parameters) * 2, keys + windows
        ),
        Stage("index", rows, index, factory + whole, share, keys + index),
        Stage("kNN targets", rows, targets, search + whole, share, keys + targets),
        Stage("memory", rows * epochs, checkpoint_bytes(sizes), train, training_memory(sizes), read_again, least=least),
    ]
    if rates is not None:
        sample = min(rows, TRAINING_KEYS) * KMEANS_ROUNDS  # on one process
        coarse = 2.0 * nlist * sizes.dim / rates.flops
        code = key_bytes / rates.lookups if codes else 2.0 * sizes.dim / rates.flops
        computing = (
            2.0 * sizes.base_parameters * fed / rates.flops / shares,
            2.0 * sizes.dim * (nlist + 256) * (sample + rows / shares) / rates.flops,
            rows * (scanned * code + sizes.k / rates.hits + coarse) / shares,
            6.0 * parameters * rows * epochs / rates.flops / shares,
        )
        for stage, seconds in zip(stages[1:], computing, strict=True):
            stage.seconds, stage.bound = max((seconds, "computing"), (stage.traffic / rates.disk, "disk"))
    return stages


def total(stages: list[Stage]) -> dict[str, Any]:
    """{"bytes", "seconds"} of all stages; seconds None for a plan without times."""
    timed = [stage.seconds for stage in stages if stage.seconds is not None]
    return {"bytes": sum(stage.bytes for stage in stages), "seconds": sum(timed) if timed else None}


def plan_text(stages: list[Stage]) -> str:
    """The plan as a Markdown table."""
    lines = ["| stage | rows | on disk | memory of a process | time | what |", "| --- | --- | --- | --- | --- | --- |"]
    for stage in stages:
        memory = size_text(stage.memory) if stage.memory else "–"
        took = time_text(stage.seconds) + (" (disk)" if stage.bound == "disk" else "")
        lines.append(f"| {stage.name} | {stage.rows:,} | {size_text(stage.bytes)} | {memory} | {took} | {stage.what} |")
    everything = total(stages)
    return "\n".join([*lines, f"| all | | {size_text(everything['bytes'])} | | {time_text(everything['seconds'])} | |"])
