"""The paper's WikiText-103 table: what it takes (`--step plan`) and what came out (`--step table`).

Reads sizes from configs and window counts where they are there already, else takes the published ones; reads the
stages' results.json. Runs no stage itself: `scripts/reproduce_wikitext103.sh` does.
"""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.cli import flag, parse
from utils.errors import InputError, command
from utils.units import size_text, time_text

# Tokens of WikiText-103 (raw) under GPT-2's tokenizer, for an estimate before the windows are there.
PUBLISHED_TOKENS = {"train": 117_900_000, "validation": 247_000, "test": 283_000}
PUBLISHED_BLOCK, PUBLISHED_STRIDE = 1024, 512
GB = 1e9
# Share of its matrix-product speed that a device reaches in these stages.
EFFICIENCY = 0.4
# Table look-ups of a product quantiser per second: a CPU core, a GPU.
LOOKUPS_CPU, LOOKUPS_GPU = 1e9, 5e12
# A GPU to reckon with where there is none (an A100: dense bfloat16, in practice).
GPU_SPEED = 2e14


@dataclass
class ReproductionArguments:
    """The models, the windows and the training that the estimate and the table are about."""

    step: str = flag("plan", "plan: print the estimate; table: print the table and write results.json")
    vanilla: str = flag("openai-community/gpt2-large", "GPT-2 large")
    large: str = flag("Rubin-Wei/gpt2-large-finetuned-wikitext103", "fine-tuned GPT-2 large")
    xl: str = flag("Clover-Hill/gpt2-xl-finetuned-wikitext103", "fine-tuned GPT-2 XL, the teacher")
    small_vanilla: str = flag("", "a smaller GPT-2, for a further row of the table")
    small: str = flag("", "the same, fine-tuned")
    memory: str = flag("Rubin-Wei/MLPMemory-gpt2-large", "the memory")
    windows: str = flag("results/wikitext103/work/windows", "windows folder, there or to be made")
    train: int = flag(0, "1: the memory is trained here")
    standins: int = flag(0, "1: the models are stand-ins, which the table says")
    k: int = flag(1024, "neighbours of a row")
    probe: int = flag(32, "inverted lists searched")
    ncentroids: int = flag(4096, "inverted lists")
    code_size: int = flag(64, "bytes of a compressed key")
    index_factory: str = flag("", "FAISS factory string in place of the two")
    epochs: int = flag(50, "passes over the data")
    base_model_name: str = flag("large", "preset of the memory's layer count")
    memory_layers: int = flag(0, "layers of the memory; 0: the preset's")
    output_dir: str = flag("results/wikitext103", "folder of work/, results.json and table.md")


@dataclass(frozen=True)
class Row:
    """A row of the table: the flag that names its model, its stage, its names in plan and table, and the paper's figure."""

    flag: str
    stage: str
    label: str
    name: str
    published: float | None


BASES = (
    Row("small_vanilla", "small_vanilla", "small vanilla", "GPT2-small-vanilla", None),
    Row("small", "small_finetuned", "small fine-tuned", "GPT2-small-finetuned", None),
    Row("vanilla", "large_vanilla", "large vanilla", "GPT2-large-vanilla", 15.80),
    Row("large", "large_finetuned", "large fine-tuned", "GPT2-large-finetuned", 10.42),
    Row("xl", "xl_finetuned", "XL fine-tuned", "GPT2-xl-finetuned", 10.16),
)
JOINT = Row("memory", "large_memory", "large + memory", "GPT2-large-finetuned + MLPMem", 9.58)


def bases_of(arguments: ReproductionArguments) -> list[tuple[Row, str]]:
    """The table's base models that have a name, with it."""
    return [(row, name) for row in BASES if (name := getattr(arguments, row.flag))]


@dataclass(frozen=True)
class Size:
    """A model in numbers: parameters, those that a token is multiplied with, width, vocabulary."""

    parameters: int
    active: int
    width: int
    vocabulary: int
    layers: int
    source: str


@dataclass(frozen=True)
class Cost:
    """What a stage takes: bytes on disk, bytes of device memory, seconds."""

    stage: str
    disk: float
    memory: float
    seconds: float


def published_config(name: str) -> Any:
    """GPT-2's config of the size that a model's name tells, for models that are not on this machine yet."""
    from transformers import GPT2Config

    sizes = {"xl": (48, 25, 1600), "large": (36, 20, 1280), "medium": (24, 16, 1024)}
    layers, heads, width = next((size for key, size in sizes.items() if key in name.lower()), (12, 12, 768))
    return GPT2Config(n_layer=layers, n_head=heads, n_embd=width)


def base_size(name: str) -> Size:
    """The size of a base model, counted from its config without loading weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config, source = AutoConfig.from_pretrained(name, local_files_only=True), "its config"
    except (OSError, ValueError):
        config, source = published_config(name), "published sizes"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(weight.numel() for weight in model.parameters())
    looked_up = {model.get_input_embeddings().weight, getattr(model.base_model, "wpe", model.lm_head).weight}
    multiplied = total - sum(weight.numel() for weight in looked_up) + model.lm_head.weight.numel()
    return Size(total, multiplied, config.hidden_size, config.vocab_size, config.num_hidden_layers, source)


def memory_size(arguments: ReproductionArguments, base: Size) -> Size:
    """The size of the memory: counted from its config where it is there, else that of the preset for this base."""
    import torch
    from transformers import AutoConfig

    from models import memory_class
    from training.arguments import PRESETS

    try:
        config, source = AutoConfig.from_pretrained(arguments.memory, local_files_only=True), "its config"
    except (OSError, ValueError):
        try:
            config, source = AutoConfig.from_pretrained(arguments.large, local_files_only=True), "the base's config"
        except (OSError, ValueError):
            config, source = published_config(arguments.large), "published sizes"
        config.num_hidden_layers = arguments.memory_layers or PRESETS[arguments.base_model_name].layers
    with torch.device("meta"):
        memory = memory_class(config)(config)
    total = sum(weight.numel() for weight in memory.parameters())
    return Size(total, total, base.width, base.vocabulary, config.num_hidden_layers, source)


@dataclass(frozen=True)
class Split:
    """A split in numbers: datastore rows, windows, tokens of a window."""

    rows: int
    windows: int
    block: int


def split_sizes(path: Path) -> tuple[dict[str, Split], str]:
    """Rows and windows of each split, and where the numbers come from."""
    if not (path / "dstore_summary.json").exists():
        sizes = {
            name: Split(tokens, math.ceil(tokens / PUBLISHED_STRIDE), PUBLISHED_BLOCK)
            for name, tokens in PUBLISHED_TOKENS.items()
        }
        return sizes, "WikiText-103 with GPT-2's tokenizer"
    from utils.files import read_json
    from utils.loading import load_windows

    sizes = {}
    for name, entry in read_json(path / "dstore_summary.json").items():
        windows = load_windows(path, name)
        sizes[name] = Split(entry["dstore_size"], len(windows), len(windows[0]["input_ids"]))
    return sizes, str(path)


def device_speed() -> tuple[float, str]:
    """Operations per second in matrix products, measured on this machine's GPU; else on its CPU."""
    import torch

    from utils.loading import default_device

    device = default_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    fastest = math.inf
    for _ in range(4):
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        fastest = min(fastest, time.perf_counter() - started)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "the CPU"
    return 2 * size**3 / fastest, f"{name}, {2 * size**3 / fastest / 1e12:.2g} TFLOPS measured in matrix products"


def costs(arguments: ReproductionArguments, splits: dict[str, Split], speed: float, gpu: bool) -> list[Cost]:
    """What each stage takes, on one device, in the order of the script."""
    bases = {row.label: base_size(name) for row, name in bases_of(arguments)}
    student, teacher = base_size(arguments.large), base_size(arguments.xl)
    memory = memory_size(arguments, student)
    rate = speed * EFFICIENCY
    tokens = {name: split.windows * split.block for name, split in splits.items()}
    test, train = splits["test"], splits["train"]

    def forward(size: Size, count: int) -> float:
        return 2 * size.active * count / rate

    def scoring(size: Size) -> float:
        return 4 * size.parameters + 4096 * size.vocabulary * 12

    found = [Cost("windows", sum(tokens.values()) * 9, 0, sum(tokens.values()) / 1e6)]
    found += [
        Cost(f"evaluate {name}", 4 * s.parameters, scoring(s), forward(s, tokens["test"])) for name, s in bases.items()
    ]
    if arguments.train:
        key = 2 * teacher.width + 4
        flat = re.search(r"Flat", arguments.index_factory)
        entry = 4 * teacher.width if flat else arguments.code_size + 8
        lists = re.search(r"IVF(\d+)", arguments.index_factory)
        share = min(1.0, arguments.probe / (int(lists[1]) if lists else arguments.ncentroids))
        if arguments.index_factory == "Flat":
            share = 1.0
        per_row = train.rows * share * (teacher.width if flat else arguments.code_size)
        lookups = rate / 2 if flat else LOOKUPS_GPU if gpu else LOOKUPS_CPU
        batch = 16384 if gpu else 1024
        activations = batch * (memory.layers * 10 * student.width * 2)
        found += [
            Cost(
                "datastore of the teacher", train.rows * key, 4 * teacher.parameters, forward(teacher, tokens["train"])
            ),
            Cost(
                "index",
                train.rows * entry,
                train.rows * entry,
                train.rows * teacher.width * 2 * arguments.ncentroids / rate,
            ),
            # Fewer where several neighbours share a token, as most do.
            Cost(
                "kNN targets (at most)",
                train.rows * (8 + 6 * arguments.k),
                train.rows * entry,
                train.rows * per_row / lookups,
            ),
            Cost(
                "datastore of the student",
                train.rows * (2 * student.width + 4),
                4 * student.parameters,
                forward(student, tokens["train"]),
            ),
            Cost(
                f"train the memory, {arguments.epochs} epochs",
                4 * memory.parameters * (arguments.epochs + 2),
                16 * memory.parameters + activations,
                3 * forward(memory, train.rows) * arguments.epochs,
            ),
        ]
    both = forward(student, tokens["test"]) + forward(memory, test.rows)
    found.append(Cost(f"evaluate {JOINT.label}", 4 * memory.parameters, scoring(student) + 4 * memory.parameters, both))
    return found


def plan(arguments: ReproductionArguments) -> str:
    """The estimate as Markdown: a row for each stage, a sum, and what it rests on."""
    import torch

    splits, source = split_sizes(Path(arguments.windows))
    missing = {"train", "test"} - splits.keys()
    if missing:
        raise InputError(f"--windows {arguments.windows}: has no split {min(missing)}")
    gpu = torch.cuda.is_available()
    speed, device = device_speed()
    found = costs(arguments, splits, speed, gpu)
    lines = [
        "",
        "| stage | disk | device memory | time on this machine | on one large GPU |",
        "| --- | --- | --- | --- | --- |",
    ]
    other = costs(arguments, splits, GPU_SPEED, True)
    lines += [
        f"| {cost.stage} | {size_text(cost.disk)} | {size_text(cost.memory)} | {time_text(cost.seconds)} | {time_text(fast.seconds)} |"
        for cost, fast in zip(found, other, strict=True)
    ]
    totals = sum(cost.disk for cost in found), max(cost.memory for cost in found), sum(cost.seconds for cost in found)
    lines.append(
        f"| **all** | {size_text(totals[0])} | {size_text(totals[1])} at most | {time_text(totals[2])} "
        f"| {time_text(sum(cost.seconds for cost in other))} |"
    )
    free = free_bytes(Path(arguments.output_dir))
    lines += [
        "",
        f"An estimate. Windows: {source}, {splits['train'].rows} rows to train on, {splits['test'].rows} to test. "
        f"Device: {device}. Large GPU: {GPU_SPEED / 1e12:g} TFLOPS; with n of them about 1/n of the time, but for the "
        f"index. Free disk: {size_text(free)}.",
    ]
    if totals[0] > free:
        lines.append(
            f"More than is free by {size_text(totals[0] - free)}: choose another OUTPUT, or a smaller K or corpus."
        )
    return "\n".join(lines)


def free_bytes(folder: Path) -> float:
    """Free bytes of the disk that `folder` is, or will be, on."""
    import shutil

    while not folder.exists():
        folder = folder.parent
    return float(shutil.disk_usage(folder).free)


def table(arguments: ReproductionArguments) -> tuple[str, dict[str, Any]]:
    """(Markdown, results): measured beside published perplexity, from the stages' results.json. Raises InputError."""
    from utils.files import read_json

    work = Path(arguments.output_dir) / "work"
    sizes = {row: millions(base_size(name)) for row, name in bases_of(arguments)}
    student = base_size(arguments.large)
    sizes[JOINT] = f"{millions(student)} + {millions(memory_size(arguments, student))}"
    rows = []
    for row in sizes:
        result = read_json(work / row.stage / "results.json")
        rows.append(
            {
                "model": row.name,
                "parameters": sizes[row],
                "published": row.published,
                "measured": result["perplexity"],
                "tokens": result["tokens"],
                "path": result["memory"] or result["model"],
                "lmbda": result["lmbda"],
                "knn_temp": result["knn_temp"],
            }
        )
    counts = {row["tokens"] for row in rows}
    if len(counts) > 1:
        raise InputError(
            f"{work}: the stages scored {sorted(counts)} tokens, expected one number; remove {work / 'done'}"
        )
    title = "Stand-ins: tiny models, trained here, in the places of the paper's." if arguments.standins else ""
    lines = [title, ""] if title else []
    lines += ["| Model | #Params | PPL published | PPL measured |", "| --- | --- | --- | --- |"]
    lines += [f"| {row['model']} | {row['parameters']} | {published(row)} | {row['measured']:.2f} |" for row in rows]
    last = rows[-1]
    lines += [
        "",
        f"Subword perplexity, token-weighted, over {last['tokens']} test tokens; memory at lambda {last['lmbda']:g}, "
        f"temperature {last['knn_temp']:g}, {'trained here' if arguments.train else 'as published'}.",
    ]
    return "\n".join(lines), {"rows": rows, "standins": bool(arguments.standins), "trained_here": bool(arguments.train)}


def millions(size: Size) -> str:
    return f"{size.parameters / 1e6:.4g}M"


def published(row: dict[str, Any]) -> str:
    return "–" if row["published"] is None else f"{row['published']:.2f}"


def main() -> None:
    (arguments,) = parse(ReproductionArguments, description=__doc__.split("\n")[0])
    from utils.loading import quiet_libraries

    quiet_libraries()
    if arguments.step == "plan":
        print(plan(arguments), flush=True)
        return
    if arguments.step != "table":
        raise InputError(f"--step {arguments.step}: expected plan or table")
    from utils.evaluation import versions
    from utils.files import atomic_file, write_json

    text, results = table(arguments)
    output = Path(arguments.output_dir)
    with atomic_file(output / "table.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    write_json(output / "results.json", {**results, "versions": versions()})
    print(f"\n{text}\n\n{output / 'table.md'}, {output / 'results.json'}", flush=True)


if __name__ == "__main__":
    command(main)()
