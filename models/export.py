"""Write base and memory as one folder that opens wherever transformers is installed.

    python -m models.export BASE MEMORY [MEMORY …] FOLDER --lmbda 0.5 --include_base --results results/joint/results.json

`AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)` opens it with the code that is copied into it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any


def main(words: list[str] | None = None) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without Unicode
    parser = argparse.ArgumentParser(
        prog="python -m models.export", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("base", help="the base model: a folder or a hub name")
    parser.add_argument("memory", nargs="+", help="its memory, or several: folders or hub names")
    parser.add_argument("folder", help="the folder to write")
    parser.add_argument(
        "--lmbda",
        type=parse_lambda,
        help="weight of the memory: 0 to 1, one for each of several (0.2,0.1), or adaptive if the memory has a gate "
        "(default: the memory's, else 0.25)",
    )
    parser.add_argument(
        "--memory_temp",
        "--knn_temp",
        type=float,
        help="softmax temperature of the memory (default: the memory's own, else 1)",
    )
    parser.add_argument(
        "--layer_position", type=int, help="decoder block that the memory reads (default: the memory's own, else -1)"
    )
    parser.add_argument("--include_base", action="store_true", help="copy the base's weights into the folder")
    parser.add_argument(
        "--results", nargs="+", type=Path, default=[], help="results.json files of evaluations, for the model card"
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that lies beside the base")
    try:
        export(**vars(parser.parse_args(words)))
    except (OSError, ValueError, ImportError, NotImplementedError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def parse_lambda(word: str) -> float | list[float] | str:
    if word == "adaptive":
        return word
    return [float(each) for each in word.split(",")] if "," in word else float(word)


def export(
    base: str,
    memory: list[str],
    folder: str,
    *,
    memory_temp: float | None,
    include_base: bool,
    results: list[Path],
    **settings: Any,
) -> None:
    """Write `folder`. Raises ValueError, before anything is written, where base and memory do not fit each other."""
    from transformers.utils import logging

    from .mlpMemory import MLPMemory

    read = [json.loads(path.read_text(encoding="utf-8")) for path in results]
    rows = [row for each in read for row in (each if isinstance(each, list) else [each])]
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    joint = MLPMemory.from_pretrained(base, memory if len(memory) > 1 else memory[0], knn_temp=memory_temp, **settings)
    joint.save_pretrained(folder, include_base=include_base or None, results=rows)
    print(f"{folder}: AutoModelForCausalLM.from_pretrained opens it with trust_remote_code=True")
    if os.path.isdir(base) and not include_base:
        print(f"its base stays in {os.path.abspath(base)}; --include_base copies it into the folder")


if __name__ == "__main__":
    main()
