"""Resource requirements: rows, disk, memory and time of each stage for given sizes (formulas: docs/scale.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from utils.cli import command, flag, parse, required
from utils.units import size_text, time_text

TRAINING_KEYS, KMEANS_ROUNDS = 1_000_000, 10  # of an index
# Families whose MLP has two matrices and no gate.
PLAIN = ("gpt2", "gpt_bigcode", "gpt_neo", "gptj", "gpt_neox", "opt", "bloom", "phi", "falcon")


@dataclass
class Sizes:
    """Sizes of a corpus, a base, an index and a memory, and assumed rates."""

    tokens: int = required("tokens of the corpus, one datastore row each")
    model_name_or_path: str | None = flag(None, "take the base's sizes from the config of this folder or hub name")
    hidden: int = flag(1280, "width of the hidden states")
    vocabulary: int = flag(50257, "tokens of the vocabulary")
    base_parameters: float = flag(774e6, "parameters of the base")
    intermediate: int | None = flag(None, "width inside the MLPs; default: 4 times --hidden")
    gated: bool = flag(False, "MLPs with a gate, as in Llama")
    layers: int = flag(54, "layers of the memory")
    block_size: int = flag(1024, "tokens of a window")
    stride: int = flag(512, "tokens from one window to the next")
    ncentroids: int = flag(4096, "inverted lists of the index")
    code_size: int = flag(64, "bytes of a row in the index")
    probe: int = flag(32, "inverted lists searched")
    k: int = flag(1024, "neighbours of a row")
    entries_per_row: float | None = flag(None, "entries of a row's kNN target; default: k/8")
    num_train_epochs: int = flag(50, "epochs of training")
    micro_batch_rows: int = flag(16384, "rows of a training micro-batch")
    processes: int = flag(8, "processes, each with a GPU")
    device_tflops: float = flag(100.0, "assumed: TFLOP/s of a GPU in practice")
    lookups_per_second: float = flag(2e11, "assumed: PQ table look-ups of a GPU per second")
    disk_gb_per_second: float = flag(2.0, "assumed: GB/s read or written by all processes together")


def count_parameters(config: Any) -> int:
    """Parameters of the base with this config; no weights are read."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(weight.numel() for weight in model.parameters())


def read_config(sizes: Sizes) -> None:
    """Take hidden, vocabulary, intermediate, gated and base_parameters from the base's config."""
    from transformers import AutoConfig

    from utils.loading import from_pretrained

    config = from_pretrained(AutoConfig.from_pretrained, sizes.model_name_or_path, "--model_name_or_path")
    sizes.base_parameters, text = count_parameters(config), config.get_text_config()
    sizes.hidden, sizes.vocabulary, sizes.gated = text.hidden_size, text.vocab_size, text.model_type not in PLAIN
    sizes.intermediate = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None)


def memory_parameters(sizes: Sizes) -> int:
    """Parameters of a memory: per layer the MLP (with biases where it has no gate) and a norm; a final norm; the head."""
    hidden, inner = sizes.hidden, sizes.intermediate or 4 * sizes.hidden
    layer = 3 * hidden * inner + hidden if sizes.gated else 2 * hidden * inner + inner + 3 * hidden
    return sizes.layers * layer + (1 if sizes.gated else 2) * hidden + sizes.vocabulary * hidden


def training_memory(sizes: Sizes) -> int:
    """Bytes of a GPU while it trains in bf16 without sharding."""
    hidden, inner = sizes.hidden, sizes.intermediate or 4 * sizes.hidden
    weights = memory_parameters(sizes) * (16 if sizes.processes == 1 else 20)  # float32, gradient, AdamW; DDP's buffers
    kept = 8 * inner + 13 * hidden if sizes.gated else 4 * inner + 9 * hidden  # per row and layer, for backward
    head = sizes.micro_batch_rows * hidden * 8 + sizes.vocabulary * hidden * 4 + (2 << 30)
    return weights + sizes.micro_batch_rows * sizes.layers * kept + head


def make_table(sizes: Sizes) -> list[tuple[str, int, float, float, float | None]]:
    """For each stage: (name, rows, bytes on disk, bytes of memory of a process, seconds or None)."""
    rows, hidden, nlist, epochs = sizes.tokens, sizes.hidden, sizes.ncentroids, sizes.num_train_epochs
    count, flops, disk = sizes.processes, sizes.device_tflops * 1e12, sizes.disk_gb_per_second * 1e9
    windows = -(-rows // sizes.stride)
    corpus = windows * (sizes.block_size * 9 + 16)
    store = rows * (2 * hidden + 4)
    index = rows * (sizes.code_size + 8) + (nlist + 256) * hidden * 4
    targets = rows * (20 + 6 * (sizes.k / 8 if sizes.entries_per_row is None else sizes.entries_per_row))
    parameters = memory_parameters(sizes)
    checkpoints = 4 * parameters * (epochs + 2)  # one an epoch, and AdamW's moments
    # A stage takes as long as its computing or its reading and writing, whichever is longer.
    embed = 2 * sizes.base_parameters * windows * sizes.block_size / flops / count
    train_index = 2 * hidden * (nlist + 256) * (min(rows, TRAINING_KEYS) * KMEANS_ROUNDS + rows / count) / flops
    scan = rows / nlist * min(sizes.probe, nlist) * sizes.code_size / sizes.lookups_per_second
    search = rows * (scan + 2 * nlist * hidden / flops) / count
    train = 6 * parameters * rows * epochs / flops / count
    return [
        ("windows", windows, corpus, 0, None),
        ("datastore", rows, store, 2 * sizes.base_parameters, max(embed, (store + corpus) / disk)),
        ("index", rows, index, index, max(train_index, (store + index) / disk)),
        ("kNN targets", rows, targets, index, max(search, (store + targets) / disk)),
        ("memory", rows, checkpoints, training_memory(sizes), max(train, (store + targets) * epochs / disk)),
    ]


@command
def main() -> None:
    (sizes,) = parse(Sizes, description=__doc__)
    if sizes.model_name_or_path:
        read_config(sizes)
    print("| stage | rows | disk | memory of a process | time |\n| --- | --- | --- | --- | --- |")
    for name, rows, size, memory, seconds in make_table(sizes):
        print(f"| {name} | {rows:,} | {size_text(size)} | {size_text(memory)} | {time_text(seconds)} |")
    print("Disk follows from the file formats; times follow from the assumed rates.")


if __name__ == "__main__":
    main()
