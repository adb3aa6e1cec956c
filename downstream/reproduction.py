"""The paper's WikiText-103 table: what it takes (`--step plan`) and what came out (`--step table`).

Reads sizes from configs and window counts where they are there already, else takes the published ones; reads the
stages' results.json. Runs no stage itself: `scripts/reproduce_wikitext103.sh` does.
"""

from __future__ import annotations

import math
import re
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from knn_utils.planner import RATES, Rates, Sizes, Stage, make_plan
from utils.cli import flag, parse
from utils.errors import InputError, command
from utils.units import size_text, time_text

# Tokens of WikiText-103 (raw) under GPT-2's tokenizer, for an estimate before the windows are there.
PUBLISHED_TOKENS = {"train": 117_900_000, "validation": 247_000, "test": 283_000}
PUBLISHED_BLOCK, PUBLISHED_STRIDE = 1024, 512
# Share of its matrix-product speed that a device reaches in these stages.
EFFICIENCY = 0.4


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
    memory_layers: int = flag(0, "layers of the memory; 0: those of the paper, half as many again as the base's")
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
    """The size of the memory: counted from its config where it is there, else from the base's with other layers."""
    import torch
    from transformers import AutoConfig

    from models import memory_class

    try:
        config, source = AutoConfig.from_pretrained(arguments.memory, local_files_only=True), "its config"
    except (OSError, ValueError):
        try:
            config, source = AutoConfig.from_pretrained(arguments.large, local_files_only=True), "the base's config"
        except (OSError, ValueError):
            config, source = published_config(arguments.large), "published sizes"
        config.num_hidden_layers = arguments.memory_layers or base.layers * 3 // 2
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


def rates_here() -> tuple[Rates, str]:
    """Rates of this machine, its speed in matrix products measured, the others assumed; and how that was."""
    import torch

    from utils.loading import default_device

    device = default_device()
    on_gpu = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if on_gpu else (1024, torch.float32)
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    fastest = math.inf
    for _ in range(4):
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        fastest = min(fastest, time.perf_counter() - started)
    speed, name = 2 * size**3 / fastest, torch.cuda.get_device_name() if on_gpu else "the CPU"
    said = f"{name}, {speed / 1e12:.2g} TFLOPS measured in matrix products"
    return replace(RATES["gpu" if on_gpu else "cpu"], flops=speed * EFFICIENCY), said


def sizes_of(arguments: ReproductionArguments, base: Size, memory: Size, split: Split) -> Sizes:
    """The planner's sizes where `base` writes the datastore of `split`, on one device."""
    lists = re.search(r"IVF(\d+)", arguments.index_factory)
    whole = arguments.index_factory == "Flat"
    return Sizes(
        tokens=split.rows,
        dim=base.width,
        vocab=base.vocabulary,
        base_parameters=base.active,
        layers=memory.layers,
        intermediate=4 * base.width,
        gated=False,
        k=arguments.k,
        entries_per_row=arguments.k / 8,
        block_size=split.block,
        stride=max(1, -(-split.rows // split.windows)),
        ncentroids=1 if whole else int(lists[1]) if lists else arguments.ncentroids,
        code_size=arguments.code_size,
        flat="Flat" in arguments.index_factory,
        probe=arguments.probe,
        epochs=arguments.epochs,
        processes=1,
    )


def stages(arguments: ReproductionArguments, splits: dict[str, Split], rates: Rates) -> list[Stage]:
    """What each stage takes, on one device, in the order of the script."""
    student, teacher = base_size(arguments.large), base_size(arguments.xl)
    memory = memory_size(arguments, student)
    train, test = splits["train"], splits["test"]
    tokens = test.windows * test.block

    def evaluation(name: str, size: Size, more: int = 0, work: float = 0.0) -> Stage:
        needed = 4 * size.parameters + 4096 * size.vocabulary * 12 + more
        stage = Stage(f"evaluate {name}", test.rows, more or 4 * size.parameters, memory=needed)
        stage.takes(2.0 * size.active * tokens / rates.flops + work, rates)
        return stage

    taught, learned = (make_plan(sizes_of(arguments, size, memory, train), rates).stages for size in (teacher, student))
    found = [taught[0], *(evaluation(row.label, base_size(name)) for row, name in bases_of(arguments))]
    if arguments.train:
        found += [replace(taught[1], name="datastore of the teacher"), *taught[2:4]]
        found += [replace(learned[1], name="datastore of the student")]
        found += [replace(learned[4], name=f"train the memory, {arguments.epochs} epochs")]
    own = 2.0 * memory.active * test.rows / rates.flops
    return [*found, evaluation(JOINT.label, student, 4 * memory.parameters, own)]


def plan(arguments: ReproductionArguments) -> str:
    """The estimate as Markdown: a row for each stage, a sum, and what it rests on."""
    splits, source = split_sizes(Path(arguments.windows))
    missing = {"train", "test"} - splits.keys()
    if missing:
        raise InputError(f"--windows {arguments.windows}: has no split {min(missing)}")
    rates, device = rates_here()
    here, there = (stages(arguments, splits, each) for each in (rates, RATES["gpu"]))
    lines = [
        "",
        "| stage | disk | device memory | time on this machine | on one large GPU |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {slow.name} | {size_text(slow.bytes)} | {size_text(slow.memory)} | {time_text(slow.seconds)} "
        f"| {time_text(fast.seconds)} |"
        for slow, fast in zip(here, there, strict=True)
    ]
    needed, largest = sum(stage.bytes for stage in here), max(stage.memory for stage in here)
    seconds = [sum(stage.seconds or 0.0 for stage in each) for each in (here, there)]
    lines.append(
        f"| **all** | {size_text(needed)} | {size_text(largest)} at most | {time_text(seconds[0])} "
        f"| {time_text(seconds[1])} |"
    )
    folder = Path(arguments.output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    lines += [
        "",
        f"An estimate. Windows: {source}, {splits['train'].rows} rows to train on, {splits['test'].rows} to test. "
        f"Device: {device}. Large GPU: {RATES['gpu'].flops / 1e12:g} TFLOPS; with n of them about 1/n of the time, but "
        f"for the index. Free disk: {size_text(free)}.",
    ]
    if needed > free:
        lines.append(
            f"More than is free by {size_text(needed - free)}: choose another OUTPUT, or a smaller K or corpus."
        )
    return "\n".join(lines)


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
