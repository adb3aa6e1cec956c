"""Perplexity of base + MLP memory, for every combination of lambda and temperature in one pass over the data.

    python -m evaluate_joint --do_test --model_name_or_path BASE --knn_generator_path MEMORY \\
        --dataset_name WINDOWS --dataset_split_name test --lmbda 0.25 --knn_temp 1
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from knn_utils.scored_rows import scored_rows
from utils.cli import command, flag, parse
from utils.errors import InputError, check_at_least
from utils.results import ADAPTIVE, ScoreArguments


@dataclass
class JointArguments(ScoreArguments):
    """Which base, which memory, which windows, which mixture."""

    do_test: bool = flag(False, "score the split: the command's only job, so it is done without the flag too")
    knn_generator_path: str | None = flag(None, "the memory: a folder or a hub name")
    dataset_split_name: str = flag("test", "split to score")
    per_device_eval_batch_size: int = flag(8, "windows that a process scores at a time")
    output_dir: str = flag("tmp", "folder of results.json")
    bf16: bool = flag(False, "short for --torch_dtype bfloat16")
    fp16: bool = flag(False, "short for --torch_dtype float16")
    report_to: str = flag("none", "accepted for the original's command line; nothing is reported")


def main() -> None:
    (arguments,) = parse(JointArguments, description=__doc__.split("\n")[0])
    arguments.check_scored(knn=False)
    check_at_least(1, arguments, "per_device_eval_batch_size")
    if ADAPTIVE in arguments.lmbda and arguments.dstore_path:
        raise InputError(f"--lmbda {ADAPTIVE}: the gate reads the base's whole distribution; leave --dstore_path out")
    if arguments.knn_generator_path is None:
        raise InputError("--knn_generator_path: is required")
    from utils.cli import say
    from utils.loading import quiet_libraries

    quiet_libraries()
    if arguments.report_to != "none":
        say(f"--report_to {arguments.report_to}: nothing is reported, the figures go to results.json")
    evaluate(arguments)


def evaluate(arguments: JointArguments) -> None:
    """Score the split, print its perplexities and write them to results.json."""
    import torch

    from utils.evaluation import MixtureScore, check_token_ids, label_log_probabilities
    from utils.gating import GateScore
    from utils.loading import check_windows, load_windows
    from utils.memories import open_joint, open_memory_of
    from utils.results import report_scores

    started = time.time()
    dtype = arguments.dtype(bf16=arguments.bf16, fp16=arguments.fp16)
    windows = load_windows(arguments.dataset_name, arguments.dataset_split_name, arguments.max_eval_samples)
    split, batch_size, base = arguments.dataset_split_name, arguments.per_device_eval_batch_size, None
    if not arguments.dstore_path:
        tokenizer = arguments.open_tokenizer()
        base = arguments.open_base(tokenizer, dtype=dtype)
        check_windows(arguments.dataset_name, windows, base.config, tokenizer)
    score = MixtureScore([value for value in arguments.lmbda if value != ADAPTIVE], arguments.knn_temp)
    if ADAPTIVE in arguments.lmbda:
        joint = open_joint(arguments, arguments.knn_generator_path, base, ADAPTIVE, dtype=dtype)
        memory, adaptive = joint.knn_generator, GateScore(joint)
        check_token_ids(windows, base.get_input_embeddings().weight.shape[0], arguments.dataset_name)
        rows = adaptive.batches(windows, batch_size, f"score {split}")
    else:
        memory, adaptive = open_memory_of(arguments, arguments.knn_generator_path, base, dtype=dtype), None
        rows = scored_rows(base, windows, arguments, split, batch_size, memory.input_dim)
    weight = memory.lm_head.weight
    with torch.inference_mode():
        for hidden, logprob, labels in rows:
            if not score.lmbda:
                score.add(logprob, None)
                continue
            read = memory.hidden(hidden.to(weight.device, weight.dtype))  # (rows, hidden)
            other = label_log_probabilities(read, weight, labels.to(weight.device), arguments.knn_temp)
            score.add(logprob, other.to(logprob.device))
    report_scores(
        score,
        "base + memory",
        arguments.output_dir,
        started,
        adaptive=adaptive and adaptive.result(),
        model=str(arguments.model_name_or_path),
        memory=str(arguments.knn_generator_path),
        dataset=str(arguments.dataset_name),
        split=split,
        dtype=str(dtype).removeprefix("torch."),
    )


if __name__ == "__main__":
    command(main)()
