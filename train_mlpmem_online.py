"""Train an MLP memory with the frozen base in the loop: kNN targets and windows in, memory out.

    python -m train_mlpmem_online --model_name_or_path BASE --dataset_name WINDOWS \\
        --knn_save_path TARGETS --output_dir OUTPUT
"""

from __future__ import annotations

from dataclasses import dataclass

from training.arguments import TrainerArguments
from utils.cli import command, flag, parse
from utils.unused_flags import TRAINERS


@dataclass
class OnlineArguments:
    """The online trainer's own flags."""

    base_batch_size: int = flag(8, "windows that the base reads at a time")
    round_hidden_states: bool = flag(False, "round the hidden states to float16, as a datastore does")


def main() -> None:
    arguments, online = parse(
        TrainerArguments, OnlineArguments, description="Train an MLP memory online.", unused=TRAINERS
    )
    arguments.check()
    from training.online import OnlineRows
    from training.trainer import train_memory

    def make_rows(windows, config, open_base):
        return OnlineRows(windows, config, arguments, open_base(), online.base_batch_size, online.round_hidden_states)

    train_memory(arguments, make_rows, subfolder="knn_generator")


if __name__ == "__main__":
    command(main, training=True)()
