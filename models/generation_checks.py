"""What `generate` refuses before it starts: prompts that are empty or too long, sampling settings out of range.

Knows shapes and numbers only; nothing of models or tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

# setting: (test, what is expected)
SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (lambda value: math.isfinite(value) and value > 0, "a number above 0 (greedy: do_sample=False)"),
    "top_p": (lambda value: 0 < value <= 1, "a number above 0, at most 1"),
    "top_k": (lambda value: value >= 0 and value == int(value), "a whole number from 0 (0: no limit)"),
    "min_p": (lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "typical_p": (lambda value: 0 < value <= 1, "a number above 0, at most 1"),
    "repetition_penalty": (lambda value: math.isfinite(value) and value > 0, "a number above 0"),
    "num_beams": (lambda value: value >= 1, "a whole number from 1"),
    "num_return_sequences": (lambda value: value >= 1, "a whole number from 1"),
    "max_new_tokens": (lambda value: value >= 1, "a whole number from 1"),
    "min_new_tokens": (lambda value: value >= 0, "a whole number from 0"),
}


def check_settings(settings: dict[str, Any]) -> None:
    """Raises ValueError naming the first setting that is out of range, the value and what is expected."""
    for name, (good, expected) in SETTINGS.items():
        value = settings.get(name)
        if value is None:
            continue
        try:
            fine = good(value)
        except (TypeError, ValueError):
            fine = False
        if not fine:
            raise ValueError(f"{name} {value}: expected {expected}")


def check_prompts(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, context: int | None) -> int:
    """The longest prompt's length in tokens, of `input_ids` (batch, time) without its padding.

    Raises ValueError naming, in one line, the rows that are empty and those longer than `context` tokens.
    """
    if input_ids.ndim != 2:
        raise ValueError(f"prompts of shape {tuple(input_ids.shape)}: expected token ids (batch, time)")
    lengths = torch.full((input_ids.shape[0],), input_ids.shape[1])
    if attention_mask is not None and attention_mask.shape == input_ids.shape:
        lengths = attention_mask.sum(-1).cpu()
    empty = [row for row, length in enumerate(lengths.tolist()) if length == 0]
    long = [row for row, length in enumerate(lengths.tolist()) if context is not None and length > context]
    complaints = []
    if empty:
        complaints.append(f"prompt {_rows(empty)}: empty, expected at least one token (the tokenizer's BOS will do)")
    if long:
        complaints.append(
            f"prompt {_rows(long)}: {int(lengths.max())} tokens, longer than the context of {context}; shorten it"
        )
    if complaints:
        raise ValueError("; ".join(complaints))
    return int(lengths.max()) if len(lengths) else 0


def _rows(rows: list[int], most: int = 5) -> str:
    return ", ".join(map(str, rows[:most])) + (f" and {len(rows) - most} more" if len(rows) > most else "")
