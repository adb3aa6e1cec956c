"""Continue a prompt with the base alone and with base + MLP memory, side by side as they come.

    python -m demo.generation_example                     the memory that scripts/quickstart.sh trained
    python -m demo.generation_example --preset mistral    Mistral-7B-v0.3 and its published Wikipedia memory
    python -m demo.generation_example --model_name_or_path BASE --knn_generator_path MEMORY --prompt "…" --lmbda 0.25

On a terminal of 80 columns or more the two stand in two columns, else one after the other. Knows nothing of how
tokens are made or drawn.
"""

from __future__ import annotations

if __package__ in (None, ""):
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from demo.opening import PairArguments, choose_pair, open_pair, short_name
from utils.cli import flag, parse
from utils.errors import InputError, command, one_line


@dataclass
class SamplingArguments:
    """How tokens are chosen."""

    max_new_tokens: int = flag(40, "new tokens at most")
    temperature: float = flag(0.0, "sampling temperature; 0 takes the most probable token each time")
    top_p: float = flag(1.0, "sample from the most probable tokens that reach this probability together")
    num_beams: int = flag(1, "beams of a beam search; above 1 nothing is shown before it ends")
    seed: int = flag(42, "random seed of both continuations")


def main() -> None:
    pair_arguments, sampling_arguments = parse(PairArguments, SamplingArguments, description=__doc__.split("\n")[0])
    pair = choose_pair(pair_arguments)
    from demo.streams import Sampling, encode_prompt, padding_token

    sampling = Sampling(**vars(sampling_arguments)).check()
    joint, tokenizer = open_pair(pair, pair_arguments)
    input_ids, remark = encode_prompt(joint, tokenizer, pair.prompt, sampling)
    pad_token_id, padding_remark = padding_token(tokenizer)
    for line in filter(None, (padding_remark, remark)):
        print(line, file=sys.stderr, flush=True)

    import torch

    from demo.columns import leave_broken_pipe, printable, write_anything

    write_anything(sys.stdout)
    names = (
        f"base: {short_name(pair.base)}",
        f"base + memory: {short_name(pair.memory)}, lambda {pair.lmbda:g}, temperature {pair.knn_temp:g}",
    )
    try:
        print(f"{printable(pair.prompt)}\n", flush=True)
        show(joint, tokenizer, input_ids, sampling, pad_token_id, names)
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"--max_new_tokens {sampling.max_new_tokens}: out of memory ({one_line(error, 160)})"
        ) from None
    except BrokenPipeError:
        leave_broken_pipe()


def show(joint: Any, tokenizer: Any, input_ids: Any, sampling: Any, pad_token_id: int, names: tuple[str, str]) -> None:
    """Print both continuations of `input_ids` (1, time) while they are made, the way stdout allows."""
    from demo.columns import Columns, columns_fit
    from demo.streams import BASE, JOINT, RunningText, side_by_side

    running = {side: RunningText(tokenizer, input_ids[0].tolist()) for side in (BASE, JOINT)}
    size = columns_fit(sys.stdout)
    pieces = side_by_side(joint, input_ids, sampling, pad_token_id, in_turn=size is not None)
    if size is None:
        one_below_the_other(pieces, running, dict(zip((BASE, JOINT), names, strict=True)))
        return
    columns = Columns(sys.stdout, names, width=size.columns, height=size.lines)
    for side, tokens in pieces:
        running[side].add(tokens)
        columns.update((running[BASE].text(), running[JOINT].text()), (False, False))
    columns.update((running[BASE].text(ended=True), running[JOINT].text(ended=True)), (True, True))


def one_below_the_other(
    pieces: Iterable[tuple[str, list[int]]], running: dict[str, Any], names: dict[str, str]
) -> None:
    """Print all of the base's text under its name, then all of the other's, each as it comes."""
    from demo.columns import printable

    current, shown = "", 0

    def write_rest(*, ended: bool) -> int:
        text = printable(running[current].text(ended=ended))
        print(text[shown:], end="\n\n" if ended else "", flush=True)
        return len(text)

    for side, tokens in pieces:
        if side != current:
            if current:
                write_rest(ended=True)
            print(f"[{names[side]}]")
            current, shown = side, 0
        running[side].add(tokens)
        shown = write_rest(ended=False)
    if current:
        write_rest(ended=True)


if __name__ == "__main__":
    command(main)()
