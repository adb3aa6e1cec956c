"""Perplexity of base + MLP memory, for every combination of lambda and temperature in one pass over the data.

    python -m evaluate_joint --do_test --model_name_or_path BASE --knn_generator_path MEMORY \\
        --dataset_name WINDOWS --dataset_split_name test --lmbda 0.25 --knn_temp 1
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from utils.cli import check_grid, flag, parse
from utils.errors import InputError, command


@dataclass
class JointArguments:
    """Which base, which memory, which windows, which mixture."""

    do_test: bool = flag(
        False, "score --dataset_split_name (the command's only job, so it is done without the flag too)"
    )
    model_name_or_path: str | None = flag(None, "folder or hub name of the base model")
    tokenizer_name: str | None = flag(None, "tokenizer to use instead of the model's own")
    knn_generator_path: str | None = flag(None, "the memory's folder or hub name")
    dataset_name: str | None = flag(None, "windows folder made by utils/preprocess_dataset.py")
    dataset_split_name: str = flag("test", "split to score")
    per_device_eval_batch_size: int = flag(8, "windows that a process scores at a time")
    max_eval_samples: int | None = flag(None, "use this many windows at most")
    output_dir: str = flag("tmp", "folder of results.json")
    knn_temp: list[float] = flag([1.0], "temperature of the memory, one or several values")
    lmbda: list[float] = flag([0.25], "weight of the memory, one or several values")
    choose_on: str | None = flag(
        None, "results.json of the same command on another split: its best lambda and temperature are used"
    )
    layer_position: int = flag(-1, "decoder block whose MLP input is the memory's input (0 = first, -1 = last)")
    dstore_path: str | None = flag(
        None, "score from this datastore of the split (made with --save_logprob) instead of running the base"
    )
    torch_dtype: str | None = flag(None, "float32 (default), bfloat16, float16, or auto")
    bf16: bool = flag(False, "short for --torch_dtype bfloat16")
    fp16: bool = flag(False, "short for --torch_dtype float16")
    device_map: str | None = flag(None, "accelerate's placement over several devices, for example auto")
    load_in_4bit: bool = flag(False, "quantise the base to 4 bits (needs bitsandbytes)")
    load_in_8bit: bool = flag(False, "quantise the base to 8 bits (needs bitsandbytes)")
    trust_remote_code: bool = flag(False, "run the code in the model's repository")
    report_to: str = flag("none", "accepted for the original's command line; nothing is reported")


def main() -> None:
    (arguments,) = parse(JointArguments, description=__doc__.split("\n")[0])
    for name in ("model_name_or_path", "knn_generator_path", "dataset_name"):
        if getattr(arguments, name) is None and not (name == "model_name_or_path" and arguments.dstore_path):
            raise InputError(f"--{name}: is required")
    lmbda, knn_temp = arguments.lmbda, arguments.knn_temp
    if arguments.choose_on:
        from utils.evaluation import chosen

        lmbda, knn_temp = chosen(arguments.choose_on)
    check_grid(lmbda, knn_temp)
    from utils.evaluation import write_results
    from utils.loading import say

    if arguments.report_to != "none":
        say(f"--report_to {arguments.report_to}: nothing is reported, the figures go to results.json")
    started = time.time()
    results = evaluate(arguments, lmbda, knn_temp)
    from accelerate import PartialState

    if PartialState().is_main_process:
        write_results(arguments.output_dir, results, started)


def evaluate(arguments: JointArguments, lmbda: list[float], knn_temp: list[float]) -> dict[str, Any]:
    """Score the split; returns what goes into results.json."""
    import torch

    from utils.evaluation import MixtureScore, best_line, label_log_probabilities
    from utils.loading import default_device, load_windows, open_memory, quiet_libraries, resolve_dtype, say

    quiet_libraries()
    dtype = resolve_dtype(arguments.torch_dtype, bf16=arguments.bf16, fp16=arguments.fp16)
    windows = load_windows(arguments.dataset_name, arguments.dataset_split_name)
    if arguments.max_eval_samples is not None:
        windows = windows.select(range(min(arguments.max_eval_samples, len(windows))))
    memory = open_memory(arguments.knn_generator_path, dtype=dtype, device=default_device())
    weight = memory.lm_head.weight
    score = MixtureScore(lmbda, knn_temp)
    with torch.inference_mode():
        for hidden, base, labels in rows(arguments, windows, memory, dtype):
            other = label_log_probabilities(
                memory.hidden(hidden.to(weight.device, weight.dtype)), weight, labels.to(weight.device), knn_temp
            )
            score.add(base, other.to(base.device))
    score.reduce()
    tokens = int(score.tokens.item())
    if tokens == 0:
        raise InputError(f"--dataset_name {arguments.dataset_name}: split {arguments.dataset_split_name} is empty")
    best = score.best()
    say(f"base: perplexity {score.base_perplexity():.4f} ({tokens} tokens, token-weighted)")
    say(best_line("base + memory", best, tokens))
    return {
        **best,
        "base_perplexity": score.base_perplexity(),
        "tokens": tokens,
        "grid": score.grid(),
        "model": str(arguments.model_name_or_path),
        "memory": str(arguments.knn_generator_path),
        "dataset": str(arguments.dataset_name),
        "split": arguments.dataset_split_name,
        "dtype": str(dtype).removeprefix("torch."),
    }


def rows(arguments: JointArguments, windows: Any, memory: Any, dtype: Any) -> Iterator[tuple[Any, Any, Any]]:
    """(hidden states, base log-probabilities, labels) by batch: from the base, or from a stored datastore."""
    from utils.base_model import load_base, load_tokenizer
    from utils.evaluation import Scorer, check_token_ids
    from utils.loading import check_pair

    if arguments.dstore_path:
        from knn_utils.datastore import count_rows, open_scored_datastore, stored_rows

        expected = int(count_rows(windows).sum())
        return stored_rows(
            open_scored_datastore(
                arguments.dstore_path, rows=expected, dim=memory.input_dim, layer_position=arguments.layer_position
            )
        )
    base = load_base(
        arguments.model_name_or_path,
        tokenizer=load_tokenizer(
            arguments.tokenizer_name or arguments.model_name_or_path, trust_remote_code=arguments.trust_remote_code
        ),
        dtype=dtype,
        device_map=arguments.device_map,
        load_in_4bit=arguments.load_in_4bit,
        load_in_8bit=arguments.load_in_8bit,
        trust_remote_code=arguments.trust_remote_code,
    )
    check_pair(base, memory, arguments.knn_generator_path)
    check_token_ids(windows, base.get_input_embeddings().weight.shape[0], arguments.dataset_name)
    scorer = Scorer(base, arguments.layer_position)
    return scorer.batches(
        windows, arguments.per_device_eval_batch_size, description=f"score {arguments.dataset_split_name}"
    )


if __name__ == "__main__":
    command(main)()
