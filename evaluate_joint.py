"""Perplexity of base + MLP memory, for every combination of lambda and temperature in one pass over the data.

    python -m evaluate_joint --do_test --model_name_or_path BASE --knn_generator_path MEMORY \\
        --dataset_name WINDOWS --dataset_split_name test --lmbda 0.25 --memory_temp 1
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from utils.cli import command, flag, parse, required, say
from utils.errors import InputError, check_at_least
from utils.results import ADAPTIVE, ScoreArguments


@dataclass(kw_only=True)
class JointArguments(ScoreArguments):
    """Which base, which memory, which windows, which mixture."""

    temperature_name = "memory_temp"

    do_test: bool = flag(False, "score the split; the command does so without this flag too")
    knn_generator_path: str = required("the memory: a folder or a hub name")
    memory_temp: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={"help": "temperature of the memory's softmax, one or several", "aliases": ["--knn_temp"]},
    )
    dataset_split_name: str = flag("test", "split to score")
    per_device_eval_batch_size: int = flag(8, "windows per batch and process")
    output_dir: str = flag("tmp", "folder of results.json")
    bf16: bool = flag(False, "short for --torch_dtype bfloat16")
    fp16: bool = flag(False, "short for --torch_dtype float16")
    report_to: str = flag("none", "accepted for the original's command line, and ignored")


def main() -> None:
    (arguments,) = parse(JointArguments, description=__doc__.split("\n")[0])
    arguments.require_base()
    arguments.check_scored()
    check_at_least(1, arguments, "per_device_eval_batch_size")
    if ADAPTIVE in arguments.lmbda and arguments.dstore_path:
        raise InputError(f"--lmbda {ADAPTIVE}: the gate needs the base's whole distribution; leave --dstore_path out")
    if arguments.report_to != "none":
        say(f"--report_to {arguments.report_to}: ignored here: results go to results.json")
    evaluate(arguments)


def evaluate(arguments: JointArguments) -> None:
    """Score the split, print its perplexities and write them to results.json."""
    import torch

    from knn_utils.scored_rows import check_token_ids, filled, gate_rows, scored_rows
    from utils.evaluation import MixtureScore, label_log_probabilities
    from utils.loading import check_windows, load_windows, made_id, quiet_libraries
    from utils.memories import open_joint, open_memory_of
    from utils.results import report_scores

    quiet_libraries()
    started, split, batch_size = time.time(), arguments.dataset_split_name, arguments.per_device_eval_batch_size
    windows = load_windows(arguments.dataset_name, split, arguments.max_eval_samples)
    dtype, path, gate = arguments.dtype(bf16=arguments.bf16, fp16=arguments.fp16), arguments.knn_generator_path, None
    score = MixtureScore([value for value in arguments.lmbda if value != ADAPTIVE], arguments.memory_temp)
    if arguments.dstore_path:
        base, memory = None, open_memory_of(arguments, path, dtype=dtype)
    else:
        tokenizer = arguments.open_tokenizer()
        base = arguments.open_base(tokenizer, dtype=dtype)
        check_windows(arguments.dataset_name, windows, base.config, tokenizer)
        joint = open_joint(arguments, path, base, ADAPTIVE if ADAPTIVE in arguments.lmbda else 0.0, dtype=dtype)
        memory, gate = joint.knn_generator, joint.gate
    if gate:
        check_token_ids(windows, base.get_input_embeddings().weight.shape[0], arguments.dataset_name)
        rows = gate_rows(joint, gate, windows, batch_size, f"score {split}")
    else:
        rows = scored_rows(base, windows, arguments, split, batch_size, memory.input_dim)
    weight = memory.lm_head.weight
    with torch.inference_mode():
        for hidden, scored, labels in rows:
            other = None
            if score.lmbda:
                read = memory.hidden(filled(hidden.to(weight.device, memory.dtype)))  # (filled rows, hidden)
                ids = filled(labels.to(weight.device))
                other = label_log_probabilities(read, weight, ids, arguments.memory_temp)[: len(labels)]
            score.add(scored.base if gate else scored, other)
            if gate:
                score.add_adaptive(*scored.mixture(gate))
    about = {"model": arguments.model_name_or_path, "memory": path, "dataset": arguments.dataset_name, "split": split}
    about["dtype"] = str(dtype).removeprefix("torch.")
    made_from = {"base": arguments.base_id(), "memory": made_id(memory.name_or_path)}
    made_from["windows"] = made_id(arguments.dataset_name)
    mixture = {"mixture": "base + memory", "adaptive": {"memory_temp": gate.memory_temp} if gate else None}
    report_scores(score, arguments.output_dir, about, made_from, **mixture, started=started)


if __name__ == "__main__":
    command(main)()
