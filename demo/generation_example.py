"""Continue a prompt with the base alone and with base + MLP memory, side by side as they come.

    python -m demo.generation_example                     the memory that scripts/quickstart.sh trained
    python -m demo.generation_example --preset mistral    Mistral-7B-v0.3 and its published Wikipedia memory
    python -m demo.generation_example --model_name_or_path BASE --knn_generator_path MEMORY --prompt "…" --lmbda 0.25

On a terminal of 80 columns or more the two stand in two columns, else one after the other.
"""

from __future__ import annotations

if __package__ in (None, ""):
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import os
import re
import sys
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from typing import Any

from demo.pair import PairArguments, Sampling, choose_pair, open_pair, short_name
from utils.cli import command, parse
from utils.results import lambda_text

SMALLEST_WIDTH, LARGEST_WIDTH = 80, 160  # columns of a terminal on which two texts stand side by side; of both together


def main() -> None:
    arguments, sampling = parse(PairArguments, Sampling, description=__doc__.split("\n")[0])
    pair = choose_pair(arguments)
    sampling.check()
    from rich.console import Console

    from demo.streams import BASE, JOINT, RunningText, encode_prompt, side_by_side

    joint, tokenizer = open_pair(pair, arguments)
    input_ids, remark = encode_prompt(joint, tokenizer, pair.prompt, sampling)
    if remark:
        print(remark, file=sys.stderr, flush=True)
    names = {
        BASE: f"base: {short_name(pair.base)}",
        JOINT: f"base + memory: {short_name(pair.memory)}, lambda {lambda_text(pair.lmbda)}, temperature {pair.knn_temp:g}",
    }
    texts = {side: RunningText(tokenizer, input_ids[0].tolist()) for side in names}
    sys.stdout.reconfigure(errors="replace")  # what its encoding cannot write
    screen = Console()
    columns = screen.is_terminal and not screen.is_dumb_terminal and screen.width >= SMALLEST_WIDTH
    pieces = side_by_side(joint, tokenizer, input_ids, sampling, in_turn=columns)
    try:
        print(f"{printable(pair.prompt)}\n", flush=True)
        if columns:
            show_columns(screen, pieces, texts, names)
        else:
            show_in_turn(pieces, texts, names)
    except BrokenPipeError:
        # The reader is gone (`| head`): end without a complaint, also when Python flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def printable(text: str) -> str:
    """`text` with nothing in it that a terminal would obey: control characters become a dot, all but line ends."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", "·", text.replace("\r", "").replace("\t", "    "))


def show_columns(
    screen: Any, pieces: Iterator[tuple[str, list[int]]], texts: dict[str, Any], names: dict[str, str]
) -> None:
    """Draw both texts side by side, again for each token; at the end they are shown whole, however long."""
    from rich import box
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    def table(*, ended: bool = False) -> Table:
        shown = Table(box=box.MINIMAL, show_header=False, show_edge=False, width=min(screen.width, LARGEST_WIDTH))
        for _ in names:
            shown.add_column(ratio=1)
        shown.add_row(*(Text(name, style="bold") for name in names.values()), end_section=True)
        shown.add_row(*(Text(printable(text.text(ended=ended))) for text in texts.values()))
        return shown

    with Live(table(), console=screen, auto_refresh=False) as live:
        for side, tokens in pieces:
            texts[side].tokens += tokens
            live.update(table(), refresh=True)
        live.update(table(ended=True), refresh=True)


def show_in_turn(pieces: Iterator[tuple[str, list[int]]], texts: dict[str, Any], names: dict[str, str]) -> None:
    """Print all of the base's text under its name, then all of the other's, each as it comes."""
    for side, own in groupby(pieces, key=itemgetter(0)):
        print(f"[{names[side]}]")
        shown = 0
        for _, tokens in own:
            texts[side].tokens += tokens
            text = printable(texts[side].text())
            print(text[shown:], end="", flush=True)
            shown = len(text)
        print(printable(texts[side].text(ended=True))[shown:], end="\n\n", flush=True)


if __name__ == "__main__":
    command(main)()
