"""Write base and memory as one folder that opens wherever transformers is installed.

    python -m models.export BASE MEMORY FOLDER --lmbda 0.5 --knn_temp 1 --include_base --results results/joint/results.json

`AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)` opens it: the code that it needs lies in it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn


def main(words: list[str] | None = None) -> None:
    described = {"prog": "python -m models.export", "description": __doc__.split("\n")[0]}
    parser = argparse.ArgumentParser(**described, allow_abbrev=False)
    parser.error = _refuse
    parser.add_argument("base", help="the base model: a folder or a hub name")
    parser.add_argument("memory", help="its memory: a folder or a hub name")
    parser.add_argument("folder", help="the folder to write")
    parser.add_argument(
        "--lmbda",
        type=_weight,
        help="weight of the memory: 0 to 1, or adaptive where the memory has a gate (default: its own, else 0.25)",
    )
    parser.add_argument("--knn_temp", type=float, help="temperature of the memory (default: the memory's own, else 1)")
    parser.add_argument(
        "--layer_position", type=int, help="the block that the memory reads (default: its own, else -1)"
    )
    parser.add_argument("--include_base", action="store_true", help="copy the base's weights into the folder")
    parser.add_argument(
        "--results", nargs="+", default=[], help="results.json files of evaluations, for the model card"
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that lies beside the base")
    arguments = parser.parse_args(words)
    try:
        export(**vars(arguments))
    except (OSError, ValueError) as error:
        _refuse(str(error))


def _refuse(told: str) -> NoReturn:
    print(f"error: {' '.join(told.split())}", file=sys.stderr)
    sys.exit(2)


def _weight(word: str) -> float | str:
    try:
        return word if word == "adaptive" else float(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r}: expected a number from 0 to 1, or adaptive") from None


def export(base: str, memory: str, folder: str, *, include_base: bool, results: list[str], **settings: Any) -> None:
    """Write `folder`. Raises ValueError where something is not there or does not fit, before anything is written."""
    from transformers.utils import logging

    from .mlpMemory import MLPMemory

    rows = [_read_rows(Path(path)) for path in results]
    logging.disable_progress_bar()
    try:
        joint = MLPMemory.from_pretrained(base, memory, **settings)
    except OSError as error:  # transformers' own, which may not say of what
        raise ValueError(f"{base}: cannot be loaded ({error})") from None
    joint.save_pretrained(
        folder, include_base=include_base, base_reference=base, results=[row for each in rows for row in each]
    )
    print(f"{folder}: AutoModelForCausalLM.from_pretrained opens it with trust_remote_code=True")
    if os.path.isdir(base) and not include_base:
        print(f"it looks for the base in {os.path.abspath(base)}; --include_base makes it a folder that travels")


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The measured rows of a results.json."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--results {path}: is no JSON ({error})") from None
    rows = read if isinstance(read, list) else [read]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"--results {path}: expected one result or a list of them")
    return rows


if __name__ == "__main__":
    main()
