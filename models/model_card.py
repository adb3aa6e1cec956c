"""The README.md that is written beside a joint model: what it is, which base it belongs to, what was measured.

Knows the keys of a `results.json`; measures nothing itself.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.mlpMemory import MLPMemory

COLUMNS = ("dataset", "split", "perplexity", "tokens", "lmbda", "knn_temp")


def model_card(joint: MLPMemory, base: str | None, results: dict[str, Any] | list[dict[str, Any]] | None) -> str:
    """Markdown with YAML front matter. `results`: one `results.json` or several; None says that nothing was measured."""
    memory = joint.knn_generator
    parameters = sum(parameter.numel() for parameter in memory.parameters())
    front = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [mlp-memory, knn-lm]"]
    if base:
        front.append(f"base_model: {json.dumps(base)}")
    return "\n".join(
        [
            "---",
            *front,
            "---",
            "",
            "# MLP Memory",
            "",
            "An MLP that was pretrained to imitate a kNN retriever over its training corpus (arXiv 2508.01832). It reads a",
            "hidden state of the base model and its next-token distribution is mixed with the base's.",
            "",
            "| | |",
            "| --- | --- |",
            f"| base model | {base or 'included in `base/`'} |",
            f"| memory | {type(memory).__name__}, {len(memory.blocks)} layers, {parameters:,} parameters |",
            f"| hidden state | input of the `.mlp` of block {joint.layer_position} |",
            f"| lambda (weight of the memory) | {joint.lmbda:g} |",
            f"| temperature of the memory | {joint.knn_temp:g} |",
            "",
            "## Measured",
            "",
            *_results(results),
            "",
            "## Use",
            "",
            "With the project's code on the Python path:",
            "",
            "```python",
            "import models  # registers the model type",
            "from transformers import AutoModelForCausalLM",
            "",
            'model = AutoModelForCausalLM.from_pretrained("this folder")',
            "model.lmbda = 0.5  # may be changed at any time, as may model.knn_temp",
            "```",
            "",
        ]
    )


def _results(results: dict[str, Any] | list[dict[str, Any]] | None) -> list[str]:
    """A table of the measured rows; keys that no row has are left out."""
    rows = [results] if isinstance(results, dict) else list(results or ())
    columns = [name for name in COLUMNS if any(name in row for row in rows)]
    extra = [name for row in rows for name in row if name not in COLUMNS and isinstance(row[name], (int, float, str))]
    columns += list(dict.fromkeys(extra))
    if not columns:
        return ["Nothing was measured when this folder was written."]
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    for row in rows:
        lines.append("| " + " | ".join(_cell(row.get(name)) for name in columns) + " |")
    return lines


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")
