"""Continue a prompt with the base and with base + MLP memory, side by side.

    python -m demo.generation_example                     the memory trained by scripts/quickstart.sh
    python -m demo.generation_example --preset mistral    Mistral-7B-v0.3 with its published Wikipedia memory
    python -m demo.generation_example --model_name_or_path BASE --knn_generator_path MEMORY --prompt "…" --lmbda 0.25

A terminal shows two columns while the tokens arrive; a pipe or file gets one text after the other.
"""

from __future__ import annotations

from demo.pair import PairArguments, Sampling, choose_pair, open_pair, short_name
from utils.cli import command, parse
from utils.results import lambda_text


def main() -> None:
    arguments, sampling = parse(PairArguments, Sampling, description=__doc__.split("\n")[0])
    pair = choose_pair(arguments)
    from rich.columns import Columns
    from rich.console import Console
    from rich.live import Live
    from rich.panel import Panel
    from rich.text import Text

    from demo.streams import running_text, side_by_side

    joint, tokenizer = open_pair(pair, arguments)
    input_ids = tokenizer(pair.prompt, return_tensors="pt").input_ids
    base, memory = short_name(pair.model_name_or_path), short_name(*pair.knn_generator_path)
    names = [
        f"base: {base}",
        f"base + memory: {memory}, lambda {lambda_text(pair.lmbda)}, temperature {pair.memory_temp:g}",
    ]
    print(f"{pair.prompt}\n", flush=True)
    screen = Console()
    with Live(console=screen, auto_refresh=False, transient=not screen.is_terminal) as live:
        for made in side_by_side(joint, input_ids, sampling, pair.max_new_tokens):
            texts = [running_text(tokenizer, input_ids[0].tolist(), tokens) for tokens in made.values()]
            shown = [Text.assemble((f"{name}\n\n", "bold"), text) for name, text in zip(names, texts, strict=True)]
            columns = Columns([Panel(text, width=screen.width // 2) for text in shown], padding=0)
            live.update(columns, refresh=screen.is_terminal)
    if not screen.is_terminal:
        for name, text in zip(names, texts, strict=True):
            print(f"[{name}]\n{text}\n")


if __name__ == "__main__":
    command(main)()
