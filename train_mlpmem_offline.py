"""Train an MLP memory from stored hidden states: kNN targets and the student's datastore in, memory out.

    python -m train_mlpmem_offline --model_name_or_path BASE --dataset_name WINDOWS \\
        --knn_save_path TARGETS --knn_dstore_path DATASTORE --output_dir OUTPUT
"""

from __future__ import annotations

from dataclasses import dataclass

from training.arguments import TrainerArguments
from utils.cli import command, parse, required
from utils.unused_flags import TRAINERS


@dataclass
class OfflineArguments:
    """The offline trainer's own flag."""

    knn_dstore_path: str = required("the student's own datastore of the training split")


def main() -> None:
    arguments, offline = parse(
        TrainerArguments, OfflineArguments, description="Train an MLP memory offline.", unused=TRAINERS
    )
    arguments.check()
    from training.rows import OfflineRows
    from training.trainer import train_memory

    def make_rows(windows, config, open_base):
        return OfflineRows(windows, config, arguments, offline.knn_dstore_path)

    train_memory(arguments, make_rows)


if __name__ == "__main__":
    command(main, training=True)()
