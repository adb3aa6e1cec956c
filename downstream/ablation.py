"""An ablation's last page: a table and a plot of what each value of one setting came to.

    python -m downstream.ablation --setting alpha --runs DIR --values 0 0.5 1 --output_dir DIR

`scripts/ablations/*.sh` run the stages; this measures nothing itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.cli import command, flag, parse, required
from utils.errors import InputError


@dataclass
class AblationArguments:
    """Which runs belong together."""

    setting: str = required("what differs between them, in words")
    runs: str = required("folder with a folder for each value: memory/, validation/ and test/ as the stages leave them")
    values: list[str] = required("the values, in the order of the table")
    output_dir: str = flag("results/ablation", "folder of table.md, plot.png and results.json")


def main() -> None:
    (arguments,) = parse(AblationArguments, description=__doc__.split("\n")[0])
    from utils.files import atomic, ensure_folder, write_json

    rows = [row(Path(arguments.runs) / value, value) for value in arguments.values]
    output = ensure_folder(arguments.output_dir)
    text = table(arguments.setting, rows)
    print(text)
    with atomic(output / "table.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    plot(arguments.setting, rows, output / "plot.png")
    write_json(output / "results.json", {"setting": arguments.setting, "rows": rows})
    print(f"\n{output / 'table.md'}, {output / 'plot.png'}, {output / 'results.json'}")


def row(run: Path, value: str) -> dict[str, Any]:
    """What one value came to, from its run's files. Raises InputError where one, or the validation in it, is missing."""
    from utils.files import read_json

    test, training = read_json(run / "test" / "results.json"), read_json(run / "memory" / "training.json")
    last = {name: entry for entry in training["log"] for name in ("loss", "validation") if name in entry}
    if "validation" not in last:
        raise InputError(f"{run / 'memory' / 'training.json'}: was not validated; train with --validation_dstore_path")
    return {
        "value": value,
        "perplexity": test["perplexity"],
        "base_perplexity": test["base_perplexity"],
        "lmbda": test["lmbda"],
        "tokens": test["tokens"],
        "memory_perplexity": last["validation"]["validation"]["memory_perplexity"],
        "kl": last["loss"]["kl"],
        "ce": last["loss"]["ce"],
        "training_seconds": training["training_seconds"],
    }


def table(setting: str, rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    from utils.results import lambda_text

    lines = [
        f"| {each['value']} | {each['perplexity']:.2f} | {100 * (each['perplexity'] / each['base_perplexity'] - 1):+.1f}% "
        f"| {lambda_text(each['lmbda'])} | {each['memory_perplexity']:.2f} | {each['kl']:.2f} | {each['ce']:.2f} "
        f"| {each['training_seconds']:.0f} |"
        for each in rows
    ]
    return f"""
Perplexity on {rows[0]["tokens"]} test tokens, base alone {rows[0]["base_perplexity"]:.2f}; lambda was chosen on the \
validation split, where the memory's own perplexity was measured; KL and cross-entropy are those of the last step.

| {setting} | base + memory | against the base | lambda | memory alone | KL | cross-entropy | training, s |
| --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(lines)}"""


def plot(setting: str, rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity over the setting's values: base + memory beside the base, and the memory alone."""
    from utils.plots import figure_of, save_figure

    figure, (joint, alone) = figure_of(2)
    values = [each["value"] for each in rows]
    joint.plot(values, [each["base_perplexity"] for each in rows], "k--", label="base")
    joint.plot(values, [each["perplexity"] for each in rows], "o-", label="base + memory")
    alone.plot(values, [each["memory_perplexity"] for each in rows], "o-", label="memory alone")
    for axes, title in ((joint, "test"), (alone, "validation")):
        axes.set(xlabel=setting, ylabel="perplexity", title=title)
        axes.legend()
    save_figure(figure, path)


if __name__ == "__main__":
    command(main)()
