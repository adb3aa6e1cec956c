"""The paper's WikiText-103 table: perplexity measured beside published, from the stages' results.json.

Measures nothing itself: `scripts/reproduce_wikitext103.sh` runs the stages, then this command.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.cli import command, flag, parse
from utils.errors import InputError
from utils.results import lambda_text


@dataclass
class ReproductionArguments:
    """The models of the table, and where the stages left their results."""

    vanilla: str = flag("openai-community/gpt2-large", "GPT-2 large")
    large: str = flag("Rubin-Wei/gpt2-large-finetuned-wikitext103", "fine-tuned GPT-2 large")
    xl: str = flag("Clover-Hill/gpt2-xl-finetuned-wikitext103", "fine-tuned GPT-2 XL, the teacher")
    small_vanilla: str = flag("", "a smaller GPT-2, for a further row of the table")
    small: str = flag("", "the same, fine-tuned")
    memory: str = flag("Rubin-Wei/MLPMemory-gpt2-large", "the memory")
    train: int = flag(0, "1: the memory was trained here")
    standins: int = flag(0, "1: the models are stand-ins, which the table says")
    output_dir: str = flag("results/wikitext103", "folder of work/, results.json and table.md")


# The flag that names a row's model, its stage, its name, and the paper's figure.
ROWS = (
    ("small_vanilla", "small_vanilla", "GPT2-small-vanilla", None),
    ("small", "small_finetuned", "GPT2-small-finetuned", None),
    ("vanilla", "large_vanilla", "GPT2-large-vanilla", 15.80),
    ("large", "large_finetuned", "GPT2-large-finetuned", 10.42),
    ("xl", "xl_finetuned", "GPT2-xl-finetuned", 10.16),
    ("memory", "large_memory", "GPT2-large-finetuned + MLPMem", 9.58),
)


def base_parameters(name: str) -> int:
    """The number of a base model's weights, from its config alone. Raises InputError."""
    from transformers import AutoConfig

    from knn_utils.preflight import count_parameters
    from utils.loading import from_pretrained

    return count_parameters(from_pretrained(AutoConfig.from_pretrained, name, "--model_name_or_path"))


def memory_parameters(path: str) -> int:
    """The number of a memory's weights, from its config alone. Raises InputError."""
    import torch

    from models import memory_class
    from models.stack import find_memory, read_memory_config

    try:
        config = read_memory_config(find_memory(path))
    except ValueError as error:
        raise InputError(f"--memory {path}: {error}") from None
    with torch.device("meta"):
        return sum(weight.numel() for weight in memory_class(config)(config).parameters())


def table(arguments: ReproductionArguments) -> tuple[str, dict[str, Any]]:
    """(Markdown, results): measured beside published perplexity, from the stages' results.json. Raises InputError."""
    from utils.files import read_json

    work = Path(arguments.output_dir) / "work"
    rows = []
    for flag_name, stage, name, published in ROWS:
        model = getattr(arguments, flag_name)
        if not model:
            continue
        result = read_json(work / stage / "results.json")
        sizes = f"{base_parameters(arguments.large if flag_name == 'memory' else model) / 1e6:.4g}M"
        if flag_name == "memory":
            sizes += f" + {memory_parameters(model) / 1e6:.4g}M"
        row = {"model": name, "parameters": sizes, "published": published, "measured": result["perplexity"]}
        kept = {key: result[key] for key in ("tokens", "lmbda", "knn_temp")}
        rows.append({**row, **kept, "path": result["memory"] or result["model"]})
    counts = {row["tokens"] for row in rows}
    if len(counts) > 1:
        raise InputError(f"{work}: the stages scored {sorted(counts)} tokens, expected one number; remove {work}/done")
    title = ["Stand-ins: tiny models, trained here, in the places of the paper's.", ""] if arguments.standins else []
    lines = [*title, "| Model | #Params | PPL published | PPL measured |", "| --- | --- | --- | --- |"]
    for row in rows:
        published = "–" if row["published"] is None else f"{row['published']:.2f}"
        lines.append(f"| {row['model']} | {row['parameters']} | {published} | {row['measured']:.2f} |")
    last = rows[-1]
    lines += [
        "",
        f"Subword perplexity, token-weighted, over {last['tokens']} test tokens; memory at lambda {lambda_text(last['lmbda'])}, "
        f"temperature {last['knn_temp']:g}, {'trained here' if arguments.train else 'as published'}.",
    ]
    return "\n".join(lines), {"rows": rows, "standins": bool(arguments.standins), "trained_here": bool(arguments.train)}


def main() -> None:
    (arguments,) = parse(ReproductionArguments, description=__doc__.split("\n")[0])
    from utils.files import atomic, write_json
    from utils.loading import quiet_libraries
    from utils.results import versions

    quiet_libraries()
    text, results = table(arguments)
    output = Path(arguments.output_dir)
    with atomic(output / "table.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    write_json(output / "results.json", {**results, "versions": versions()})
    print(f"\n{text}\n\n{output / 'table.md'}, {output / 'results.json'}", flush=True)


if __name__ == "__main__":
    command(main)()
