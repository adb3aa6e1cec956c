"""The model card of a joint model: its settings and what was measured."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .joint_config import OLDEST_MAJOR, MLPMemoryConfig

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [mlp-memory, knn-lm]
{front}---

# MLP Memory

An MLP that was pretrained to imitate a kNN retriever over its training corpus (arXiv 2508.01832). It reads a
hidden state of the base model and its next-token distribution is mixed with the base's.

| | |
| --- | --- |
| base model | {base} |
| memory | {memory} |
| hidden state | input of the `.mlp` of block {layer_position} |
| lambda (weight of the memory) | {lmbda} |
| temperature of the memory | {knn_temp:g} |

## Measured

{measured}

## Use

With transformers {oldest} or newer and nothing else; the code is in this folder, so read it before you trust it.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("this folder", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("this folder", trust_remote_code=True)
model.lmbda = 0.5  # may be changed at any time, as may model.knn_temp
```

`from_pretrained(…, base_model_name_or_path="another copy")` takes the base from elsewhere.
"""


def model_card(joint: PreTrainedModel, config: MLPMemoryConfig, included: bool) -> str:
    """Markdown with YAML front matter, from the `config` that is saved and what `joint` is; it names no local path."""
    reference = config.base_model_name_or_path
    hub_name = reference if reference and not os.path.isabs(reference) else None
    return CARD.format(
        front=f"base_model: {json.dumps(hub_name)}\n" if hub_name else "",
        base=(hub_name or _described(joint.base_lm)) + (", in `base/`" if included else ""),
        memory=_described(joint.knn_generator),
        measured=_table(config.results or ()),
        layer_position=config.layer_position,
        lmbda=config.lmbda if isinstance(config.lmbda, str) else f"{config.lmbda:g}",
        knn_temp=config.knn_temp,
        oldest=OLDEST_MAJOR,
    )


def _described(model: nn.Module) -> str:
    layers = model.config.get_text_config().num_hidden_layers
    return f"{type(model).__name__}, {layers} layers, {model.num_parameters():,} parameters"


def measured_rows(results: dict[str, Any] | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The numbers and names in one `results.json` or several; a local path becomes the name of its last folder."""
    rows = [results] if isinstance(results, dict) else results
    scalars = ({name: value for name, value in row.items() if isinstance(value, (int, float, str))} for row in rows)
    return [{name: _without_path(value) for name, value in row.items()} for row in scalars]


def _without_path(value: Any) -> Any:
    local = isinstance(value, str) and os.sep in value and (os.path.isabs(value) or os.path.exists(value))
    return os.path.basename(os.path.normpath(value)) if local else value


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of measured rows."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if not columns:
        return "Nothing was measured when this folder was written."
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(name, "")) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")
