"""Memories of parts of the quickstart's text: put together, and of a fixed size for more and more text.

    python -m benchmarks.memories --parts 2 4                                             # results/memories
    SIZE=full OUTPUT=results/full bash scripts/quickstart.sh
    python -m benchmarks.memories --quickstart results/full --shares 0.2 0.5 1 --output_dir results/shares

A part is a run of the training articles, a share so many of them, evenly spread; each has the quickstart's held-out articles and
is made by scripts/quickstart.sh. `--parts`: a table of each part's memory alone, of all together and of one memory of all
text. `--shares`: `benchmarks.compare` for each, a table, and a plot of what grows and what is lost with the number of tokens.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.page import line
from benchmarks.setting import ROOT
from utils.cli import command, flag, parse, say
from utils.errors import InputError
from utils.files import ensure_folder, read_json, write_json

WEB_BYTES = 45_000  # of the quickstart's web text
METHODS = ("base", "knnlm", "knnlm_adaptive", "lora", "memory_adaptive")


@dataclass
class MemoriesArguments:
    """Which quickstart, which parts."""

    quickstart: str = flag("results/quickstart", "folder of a finished quickstart")
    output_dir: str = flag("results/memories", "folder of results.json, table.md, plot.png and the parts' quickstarts")
    parts: list[int] = flag([], "numbers of parts whose memories are put together")
    shares: list[float] = flag([], "shares of the training articles, for memories of the same size")
    lora_epochs: int = flag(1, "with --shares: epochs of LoRA, of which the best state on validation counts")


def main() -> None:
    (arguments,) = parse(MemoriesArguments, description=__doc__.split("\n")[0])
    work, output = Path(arguments.quickstart).resolve() / "work", ensure_folder(Path(arguments.output_dir).resolve())
    if not (work / "windows" / "raw" / "train.jsonl").exists():
        raise InputError(f"--quickstart {arguments.quickstart}: is not finished; run scripts/quickstart.sh")
    results: dict[str, Any] = {"parts": {}, "shares": {}}
    for count in arguments.parts:
        results["parts"][count] = together(work, output, count)
    for share in arguments.shares:
        results["shares"][share] = compared(work, output, share, arguments.lora_epochs)
    write_json(output / "results.json", results)
    text = "\n\n".join(
        [*map(parts_table, results["parts"].values()), *([shares_table(results["shares"])] * bool(arguments.shares))]
    )
    (output / "table.md").write_text(text + "\n", encoding="utf-8")
    if arguments.shares:
        plot(results["shares"], output / "plot.png")
    say(f"\n{text}\n\n{output / 'results.json'}, {output / 'table.md'}")


def run(*words: object, **environment: str) -> None:
    """Run a command in the repository's root. Raises InputError if it fails."""
    if subprocess.run(
        list(map(str, words)), cwd=ROOT, env=os.environ | environment, stdin=subprocess.DEVNULL
    ).returncode:
        raise InputError(f"{words[1]} failed; see its error above")


def quickstart_of(work: Path, folder: Path, articles: list[str]) -> Path:
    """The work folder of a quickstart, in `folder`, with these training articles (lines of a .jsonl file)."""
    text = ensure_folder(folder / "text")
    for split in ("validation", "test"):
        (text / f"{split}.jsonl").write_bytes((work / "windows" / "raw" / f"{split}.jsonl").read_bytes())
    (text / "train.jsonl").write_text("\n".join(articles) + "\n", encoding="utf-8")
    model = read_json(work / "joint_test" / "results.json")["model"]
    run(
        "bash",
        "scripts/quickstart.sh",
        TEXT=str(text),
        MODEL=str(Path(model).resolve()),
        OUTPUT=str(folder),
        FINETUNE="0",
    )
    return folder / "work"


def training_articles(work: Path) -> list[str]:
    return (work / "windows" / "raw" / "train.jsonl").read_text(encoding="utf-8").splitlines()


def memory_of(work: Path) -> Path:
    return work / "memory" / read_json(work / "memory" / "training.json")["checkpoint"]


def measured(
    output: Path, work: Path, memories: list[Path], windows: dict[str, Path], articles: dict[int, Path]
) -> dict[str, Any]:
    """Perplexity of each of `windows`, and the beginnings of each of `articles` that are continued, by lambda per token."""
    model = ("--model_name_or_path", read_json(work / "joint_test" / "results.json")["model"], "--torch_dtype")
    model = (*model, read_json(work / "joint_test" / "results.json")["dtype"], "--knn_generator_path", *memories)
    found: dict[str, Any] = {"base": {}, "recalled": {}, "recalled_base": {}}
    for name, folder in windows.items():
        split = "train" if name == "web" else "test"
        scored = (
            "--dataset_name",
            folder,
            "--dataset_split_name",
            split,
            "--lmbda",
            "adaptive",
            "--output_dir",
            output,
        )
        run(sys.executable, "-m", "evaluate_joint", *model, *scored)
        result = read_json(output / "results.json")
        found[name], found["base"][name] = result["perplexity"], result["base_perplexity"]
    for number, path in articles.items():
        cases = ("--articles", path, "--answer_words", 1, "--max_cases", 300, "--lmbda", "adaptive")
        run(sys.executable, "-m", "downstream.recall", *model, *cases, "--output_dir", output)
        result = read_json(output / "results.json")
        found["recalled"][number], found["recalled_base"][number] = result["recall_memory"], result["recall_base"]
    return found


def web_windows(work: Path, output: Path) -> Path:
    """Windows (split train) of the first WEB_BYTES of the quickstart's web text, made where they are missing."""
    text, windows = output / "web.txt", output / "web"
    text.write_bytes((work / "embedded" / "web.txt").read_bytes()[:WEB_BYTES])
    if not windows.exists():
        cut = ("--output_dir", windows, "--block_size", 512, "--stride", 512, "--group_rows")
        model = read_json(work / "joint_test" / "results.json")["model"]
        run(sys.executable, "utils/preprocess_dataset.py", "--dataset_name", text, "--tokenizer_path", model, *cut)
    return windows


def together(work: Path, output: Path, count: int) -> dict[str, Any]:
    """Figures of `count` parts' memories, each alone and all together, and of one memory of the whole text."""
    articles, web = training_articles(work), web_windows(work, output)
    ends = [len(articles) * n // count for n in range(count + 1)]
    works = [
        quickstart_of(work, output / f"part-{n}-of-{count}", articles[ends[n - 1] : ends[n]])
        for n in range(1, count + 1)
    ]
    memories, windows = [memory_of(each) for each in works], {"held_out": work / "windows", "web": web}
    texts = {n: each.parent / "text" / "train.jsonl" for n, each in enumerate(works, 1)}
    chosen = {f"part {n}": ([memory], {n: texts[n]}) for n, memory in enumerate(memories, 1)}
    chosen |= {"together": (memories, texts), "one memory of all": ([memory_of(work)], texts)}
    scratch = ensure_folder(output / "scratch")
    return {name: measured(scratch, work, which, windows, asked) for name, (which, asked) in chosen.items()}


def parts_table(found: dict[str, Any]) -> str:
    """Rows: the base, each memory alone, all together, one of the whole text."""
    whole = found["one memory of all"]
    parts = list(whole["recalled"])
    rows = {"none (base)": {**whole["base"], "recalled": whole["recalled_base"]}, **found}
    header = ["memory", "held-out articles", *(f"beginnings of part {n}" for n in parts), "web text"]
    lines = [line(*header), line(*["---"] * len(header))]
    for name, row in rows.items():
        shares = [f"{row['recalled'][n]:.1%}" if n in row["recalled"] else "–" for n in parts]
        lines.append(line(name, f"{row['held_out']:.2f}", *shares, f"{row['web']:.2f}"))
    return "\n".join(lines)


def compared(work: Path, output: Path, share: float, lora_epochs: int) -> dict[str, Any]:
    """The records of `benchmarks.compare` for a quickstart with `share` of the training articles."""
    articles = training_articles(work)
    count = max(round(share * len(articles)), 1)
    chosen = [articles[int(number * len(articles) / count)] for number in range(count)]
    folder = output / f"share-{share:g}"
    part = work if share == 1 else quickstart_of(work, folder, chosen)
    flags = ("--work", part, "--output_dir", folder / "compare", "--methods", *METHODS, "--lora_epochs", lora_epochs)
    web = (
        "--web_text",
        work / "embedded" / "web.txt",
        "--answer_words",
        1,
        "--max_cases",
        200,
        "--max_eval_tokens",
        5120,
    )
    run(sys.executable, "-m", "benchmarks.compare", *flags, *web)
    return read_json(folder / "compare" / "results.json")


def shares_table(results: dict[float, Any]) -> str:
    """A row for each share and method."""
    header = ("training tokens", "method", "held-out articles", "beginnings continued", "on disk", "ms per token")
    rows = []
    for found in results.values():
        for name in METHODS:
            record = found["methods"][name]
            figures = record["held_out"]["perplexity"], record["facts"]["accuracy"], record["bytes"] / 1e6
            speed = 1000 / record["speed"]["tokens_per_second"]
            tokens = f"{found['description']['train_tokens']:,}"
            rows.append(
                line(
                    tokens,
                    record["title"],
                    *(
                        text.format(value)
                        for text, value in zip(("{:.2f}", "{:.1%}", "{:.1f} MB"), figures, strict=True)
                    ),
                    f"{speed:.1f}",
                )
            )
    return "\n".join([line(*header), line(*["---"] * len(header)), *rows])


def plot(results: dict[float, Any], path: Path) -> None:
    """Size, held-out perplexity and beginnings continued, by the number of training tokens."""
    from utils.plots import figure_of, save_figure

    figure, axes = figure_of(3)
    tokens = [found["description"]["train_tokens"] for found in results.values()]
    for number, name in enumerate(METHODS):
        records = [found["methods"][name] for found in results.values()]
        style = {"marker": "o", "color": f"C{number}", "label": records[0]["title"]}
        axes[0].plot(tokens, [record["bytes"] / 1e6 for record in records], **style)
        axes[1].plot(tokens, [record["held_out"]["perplexity"] for record in records], **style)
        axes[2].plot(tokens, [100 * record["facts"]["accuracy"] for record in records], **style)
    for each, label in zip(
        axes, ("MB on disk", "perplexity, held-out articles", "% of beginnings continued"), strict=True
    ):
        each.set(xlabel="training tokens", ylabel=label)
        each.set_xlim(left=0)
        each.set_ylim(bottom=None if "perplexity" in label else 0)
    axes[1].legend(fontsize=7)
    save_figure(figure, path)


if __name__ == "__main__":
    command(main)()
