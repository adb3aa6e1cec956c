"""Stand-ins for the models of the paper's table: a small tokenizer, and GPT-2 configs of three sizes to train.

    python -m downstream.standins --texts web.txt wiki.txt --output_dir DIR     DIR/small, DIR/large, DIR/xl

Each folder holds a config and the tokenizer, which is all that `train_base --from_scratch` reads. They keep the order
of the real ones in width and depth. Trains no model itself: `scripts/standins.sh` does that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.cli import command, flag, parse
from utils.errors import InputError

END = "<|endoftext|>"
# (width, layers, attention heads)
SIZES = {"small": (64, 2, 2), "large": (96, 3, 3), "xl": (128, 4, 4)}


@dataclass
class StandInArguments:
    """Which text the tokenizer is made from, and how large it is."""

    texts: list[str] = flag([], "text files, UTF-8")
    output_dir: str = flag("results/standins/configs", "folder of the configs")
    vocabulary: int = flag(4000, "tokens of the tokenizer")
    positions: int = flag(128, "longest window of the models")


def main() -> None:
    (arguments,) = parse(StandInArguments, description=__doc__.split("\n")[0])
    if not arguments.texts:
        raise InputError("--texts: expected one or more text files")
    for path in arguments.texts:
        if not Path(path).is_file():
            raise InputError(f"--texts {path}: no such file")
    from transformers import GPT2Config

    from utils.cli import say
    from utils.legacy import atomic_folder

    output = Path(arguments.output_dir)
    tokenizer = byte_pair_tokenizer(arguments.texts, arguments.vocabulary, arguments.positions)
    for name, (width, layers, heads) in SIZES.items():
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=arguments.positions,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            # GPT-2's 0.02 at its width of 768: narrower models with it take many epochs to begin learning.
            initializer_range=0.02 * (768 / width) ** 0.5,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        )
        with atomic_folder(output / name) as folder:
            config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    say(f"stand-ins: {', '.join(SIZES)} in {output}, a tokenizer of {len(tokenizer)} tokens")


def byte_pair_tokenizer(texts: list[str], vocabulary: int, positions: int) -> Any:
    """A byte-level BPE tokenizer like GPT-2's, trained on the files `texts`."""
    from tokenizers import ByteLevelBPETokenizer, Tokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train(texts, vocabulary, min_frequency=0, show_progress=False, special_tokens=[END])
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END)
    tokenizer = Tokenizer.from_str(trained.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=positions, **special)


if __name__ == "__main__":
    command(main)()
