"""Perplexity of base + MLP memory, for every combination of lambda and temperature in one pass over the data.

    python -m evaluate_joint --do_test --model_name_or_path BASE --knn_generator_path MEMORY \\
        --dataset_name WINDOWS --dataset_split_name test --lmbda 0.25 --knn_temp 1
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from utils.cli import command, flag, parse
from utils.errors import InputError, check_grid
from utils.loading import BaseArguments


@dataclass
class JointArguments(BaseArguments):
    """Which base, which memory, which windows, which mixture."""

    do_test: bool = flag(False, "score the split: the command's only job, so it is done without the flag too")
    knn_generator_path: str | None = flag(None, "the memory: a folder or a hub name")
    dataset_name: str | None = flag(None, "windows folder made by utils/preprocess_dataset.py")
    dataset_split_name: str = flag("test", "split to score")
    per_device_eval_batch_size: int = flag(8, "windows that a process scores at a time")
    max_eval_samples: int | None = flag(None, "use this many windows at most")
    output_dir: str = flag("tmp", "folder of results.json")
    knn_temp: list[float] = flag([1.0], "temperature of the memory, one or several values")
    lmbda: list[float] = flag([0.25], "weight of the memory, one or several values")
    choose_on: str | None = flag(None, "results.json of another split: its best lambda and temperature are used")
    dstore_path: str | None = flag(None, "score this datastore (made with --save_logprob) in place of running the base")
    bf16: bool = flag(False, "short for --torch_dtype bfloat16")
    fp16: bool = flag(False, "short for --torch_dtype float16")
    report_to: str = flag("none", "accepted for the original's command line; nothing is reported")

    def check(self) -> None:
        """Refuse what cannot work before anything is loaded. Raises InputError."""
        if not self.dstore_path:
            self.require_base()
        for name in ("knn_generator_path", "dataset_name"):
            if getattr(self, name) is None:
                raise InputError(f"--{name}: is required")
        check_grid(self.lmbda, self.knn_temp)


def main() -> None:
    (arguments,) = parse(JointArguments, description=__doc__.split("\n")[0])
    if arguments.choose_on:
        from utils.results import chosen

        arguments.lmbda, arguments.knn_temp = chosen(arguments.choose_on)
    arguments.check()
    from utils.cli import say
    from utils.loading import quiet_libraries

    quiet_libraries()
    if arguments.report_to != "none":
        say(f"--report_to {arguments.report_to}: nothing is reported, the figures go to results.json")
    evaluate(arguments)


def evaluate(arguments: JointArguments) -> None:
    """Score the split, print its perplexities and write them to results.json."""
    import torch

    from utils.evaluation import MixtureScore, label_log_probabilities
    from utils.loading import load_windows
    from utils.results import report_scores

    started = time.time()
    dtype = arguments.dtype(bf16=arguments.bf16, fp16=arguments.fp16)
    windows = load_windows(arguments.dataset_name, arguments.dataset_split_name, arguments.max_eval_samples)
    memory, scored_rows = open_memory_and_rows(arguments, windows, dtype)
    weight = memory.lm_head.weight
    score = MixtureScore(arguments.lmbda, arguments.knn_temp)
    with torch.inference_mode():
        for hidden, base, labels in scored_rows:
            read = memory.hidden(hidden.to(weight.device, weight.dtype))  # (rows, hidden)
            other = label_log_probabilities(read, weight, labels.to(weight.device), arguments.knn_temp)
            score.add(base, other.to(base.device))
    report_scores(
        score,
        "base + memory",
        arguments.output_dir,
        started,
        model=str(arguments.model_name_or_path),
        memory=str(arguments.knn_generator_path),
        dataset=str(arguments.dataset_name),
        split=arguments.dataset_split_name,
        dtype=str(dtype).removeprefix("torch."),
    )


def open_memory_and_rows(
    arguments: JointArguments, windows: Any, dtype: Any
) -> tuple[Any, Iterator[tuple[Any, Any, Any]]]:
    """The memory; and (hidden states, base log-probabilities, labels) by batch, from the base or a stored datastore."""
    path, layer = arguments.knn_generator_path, arguments.layer_position
    if arguments.dstore_path:
        from knn_utils.datastore import open_scored_datastore, stored_rows
        from utils.evaluation import count_rows
        from utils.loading import default_device, open_memory

        memory = open_memory(path, dtype=dtype, device=default_device())
        belongs = {"rows": int(count_rows(windows).sum()), "dim": memory.input_dim, "layer_position": layer}
        return memory, stored_rows(open_scored_datastore(arguments.dstore_path, **belongs))
    from utils.evaluation import Scorer, check_token_ids

    base = arguments.open_base(arguments.open_tokenizer(), dtype=dtype)
    memory = arguments.open_memory_of(base, path, dtype=dtype)
    check_token_ids(windows, base.get_input_embeddings().weight.shape[0], arguments.dataset_name)
    split, size = arguments.dataset_split_name, arguments.per_device_eval_batch_size
    return memory, Scorer(base, layer).batches(windows, size, description=f"score {split}")


if __name__ == "__main__":
    command(main)()
