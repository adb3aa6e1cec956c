"""What made a file, compared with what is asked for now: the one place that refuses files of other settings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from utils.errors import InputError, one_line


def changes(before: Mapping[str, Any], now: Mapping[str, Any], ignored: Iterable[str] = ()) -> str:
    """What differs between two records of settings, in words; '' where nothing does.

    Values are compared as JSON holds them. Settings inside a setting are compared by themselves (`data.rows`).
    """
    there, here = (_flat(json.loads(json.dumps(each, default=str))) for each in (before, now))
    skipped = set(ignored)
    return "; ".join(
        f"{name} {_shown(there.get(name))} there, {_shown(here.get(name))} now"
        for name in sorted(there.keys() | here.keys())
        if name.split(".")[0] not in skipped and there.get(name) != here.get(name)
    )


def require_same(
    holder: object, before: Mapping[str, Any], now: Mapping[str, Any], remedy: str, ignored: Iterable[str] = ()
) -> None:
    """Refuse what was made with other settings. Raises InputError: `holder`, the differences, and the `remedy`."""
    if differing := changes(before, now, ignored):
        raise InputError(f"{holder}: was made with other settings ({one_line(differing, 400)}); {remedy}")


def check_layer(made: Mapping[str, Any], path: object, layer_position: int | None) -> None:
    """Refuse files (`made`: their recorded settings) of another block's hidden states than `layer_position`'s.

    Nothing is refused where either is None: files of the original record no block. Raises InputError.
    """
    there = made.get("layer_position")
    if None not in (there, layer_position) and there != layer_position:
        raise InputError(
            f"{path}: was made from hidden states of block {there}, but --layer_position is {layer_position}; "
            f"give --layer_position {there}"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)
