"""What one process of this machine does in a second: measured on a few windows, searches and training steps.

Random tokens stand for text, the model's own hidden states for keys. Knows nothing of plans or files.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from knn_utils.plan import Rates, Sizes

WINDOWS, WINDOW_TOKENS = 4, 256
# Keys of the measured index, its lists and the queries: small enough for seconds, large enough that scanning counts.
KEYS, LISTS, QUERIES = 40_000, 64, 256
TRAINING_ROWS, MOST_WEIGHTS = 512, 60_000_000
DISK_BYTES = 64 << 20


def timed(work: Callable[[], Any], rounds: int = 3) -> float:
    """Seconds of the fastest of several rounds, after one that is not counted."""
    work()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def measure_rates(model: str, sizes: Sizes, folder: str | Path, trust_remote_code: bool = False) -> Rates:
    """Rates of this process. `model` is loaded; index and memory are made in the shape of `sizes`, but smaller.

    `folder`: where the disk is measured. Raises InputError when the model cannot be loaded.
    """
    import torch

    from models.capture import hidden_states
    from utils.base_model import load_base, load_tokenizer

    remote = {"trust_remote_code": trust_remote_code}
    base = load_base(model, tokenizer=load_tokenizer(model, **remote), **remote)
    device = base.get_input_embeddings().weight.device
    vocabulary = base.get_input_embeddings().weight.shape[0]
    parameters = sum(weight.numel() for weight in base.parameters())
    limit = getattr(base.config, "max_position_embeddings", WINDOW_TOKENS) or WINDOW_TOKENS
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (WINDOWS, min(WINDOW_TOKENS, limit)), generator=generator).to(device)

    def embed() -> Any:
        with torch.inference_mode():
            return hidden_states(base, ids)

    forward = 2.0 * parameters * ids.numel() / timed(lambda: embed().cpu())
    keys = embed().reshape(-1, base.config.hidden_size).float().cpu().numpy()
    lookups, hits = measure_search(keys, sizes)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    training, disk = measure_training(sizes, device), measure_disk(Path(folder))
    return Rates(forward, training, lookups, hits, disk, f"measured here with {model} on {where}")


def measure_disk(folder: Path) -> float:
    """Bytes per second that reach the disk of `folder` (written and synced)."""
    while not folder.is_dir():
        folder = folder.parent
    block = np.random.default_rng(0).bytes(DISK_BYTES)

    def write() -> None:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(block)
            file.flush()
            os.fsync(file.fileno())

    return DISK_BYTES / timed(write)


def measure_search(keys: np.ndarray, sizes: Sizes) -> tuple[float, float]:
    """PQ look-ups per second of scanning, and hits per second of making distributions."""
    import faiss

    from knn_utils.distribution import aggregate

    random = np.random.default_rng(0)
    dim = keys.shape[1]
    code = next(size for size in range(min(sizes.code_size, dim), 0, -1) if dim % size == 0)
    spread = keys[random.integers(0, len(keys), KEYS)] + random.normal(0, keys.std() * 0.1, (KEYS, dim))
    spread = np.ascontiguousarray(spread, dtype=np.float32)
    quantizer = faiss.IndexFlatL2(dim)
    index = faiss.IndexIVFPQ(quantizer, dim, LISTS, code, 8)
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
    took = timed(lambda: aggregate(distances.copy(), tokens.copy(), knn_temp=16.0, threshold=1e-8))
    return lookups, QUERIES * k / took


def measure_training(sizes: Sizes, device: Any) -> float:
    """FLOP/s of forward, backward and optimizer of a memory as wide as the planned one, with fewer layers."""
    import torch
    from transformers import AutoConfig

    from models import memory_class
    from training.rows import Rows
    from training.trainer import MemoryWithLoss

    family = "llama" if sizes.gated else "gpt2"
    vocabulary = min(sizes.vocab, max(1024, MOST_WEIGHTS // (2 * sizes.dim)))
    block = (3 if sizes.gated else 2) * sizes.dim * sizes.intermediate
    layers = max(1, min(sizes.layers, (MOST_WEIGHTS // 2) // block))
    widths = {"intermediate_size": sizes.intermediate} if sizes.gated else {"n_inner": sizes.intermediate}
    config = AutoConfig.for_model(
        family, vocab_size=vocabulary, hidden_size=sizes.dim, num_hidden_layers=layers, num_attention_heads=1, **widths
    )
    module = MemoryWithLoss(memory_class(config)(config), 0.5).to(device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    count = max(1, min(round(sizes.entries_per_row), vocabulary))
    rows = Rows(
        torch.randn(TRAINING_ROWS, sizes.dim),
        torch.randint(0, vocabulary, (TRAINING_ROWS,), dtype=torch.int32),
        torch.full((TRAINING_ROWS,), count, dtype=torch.int32),
        torch.randint(0, vocabulary, (TRAINING_ROWS * count,), dtype=torch.int32),
        torch.full((TRAINING_ROWS * count,), 1.0 / count).half(),
    ).to(device)

    def step() -> None:
        module(rows, TRAINING_ROWS)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    parameters = sum(weight.numel() for weight in module.parameters())
    return 6.0 * parameters * TRAINING_ROWS / timed(step, rounds=2)
