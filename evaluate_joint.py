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
from utils.unused_flags import EVALUATE_JOINT


@dataclass(kw_only=True)
class JointArguments(ScoreArguments):
    """Which base, which memory, which windows, which mixture."""

    temperature_name = "memory_temp"

    do_test: bool = flag(False, "score the split; the command does so without this flag too")
    knn_generator_path: list[str] = required("the memory, or several: folders or hub names")
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
    (arguments,) = parse(JointArguments, description=__doc__.split("\n")[0], unused=EVALUATE_JOINT)
    arguments.require_base()
    arguments.check_scored(len(arguments.knn_generator_path))
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
    from utils.evaluation import MixtureScore, label_log_probabilities, send
    from utils.loading import check_windows, load_windows, made_id, quiet_libraries
    from utils.memories import open_joint, open_memory_of
    from utils.results import report_scores

    quiet_libraries()
    started, split, batch_size = time.time(), arguments.dataset_split_name, arguments.per_device_eval_batch_size
    windows = load_windows(arguments.dataset_name, split, arguments.max_eval_samples)
    dtype, paths, gates = arguments.dtype(bf16=arguments.bf16, fp16=arguments.fp16), arguments.knn_generator_path, []
    score = MixtureScore([value for value in arguments.lmbda if value != ADAPTIVE], arguments.memory_temp)
    if arguments.dstore_path:
        base, memories = None, [open_memory_of(arguments, path, dtype=dtype) for path in paths]
        weights = [memory.lm_head.weight for memory in memories]
    else:
        tokenizer = arguments.open_tokenizer()
        base = arguments.open_base(tokenizer, dtype=dtype)
        check_windows(arguments.dataset_name, windows, base.config, tokenizer)
        joint = open_joint(arguments, paths, base, ADAPTIVE if ADAPTIVE in arguments.lmbda else 0.0, dtype=dtype)
        memories, gates = joint.memories, joint.gates
        weights = [joint.head_of(memory).weight for memory in memories]
    if gates:
        check_token_ids(windows, base.get_input_embeddings().weight.shape[0], arguments.dataset_name)
        rows = gate_rows(joint, gates, windows, batch_size, f"score {split}")
    else:
        rows = scored_rows(base, windows, arguments, split, batch_size, memories[0].input_dim)
    with torch.inference_mode():
        for hidden, scored, labels in rows:
            others = []
            for memory, weight in zip(memories, weights, strict=True) if score.lmbda else ():
                last = memory.hidden(filled(hidden.to(memory.device, memory.dtype)))  # (filled rows, hidden)
                ids = send(filled(labels), weight.device)
                others.append(label_log_probabilities(last, weight, ids, arguments.memory_temp)[: len(labels)])
            score.add(scored.base if gates else scored, *others)
            if gates:
                score.add_adaptive(*scored.mixture(gates))
    places = [memory.name_or_path for memory in memories]
    shown = paths[0] if len(paths) == 1 else paths
    about = {"model": arguments.model_name_or_path, "memory": shown, "dataset": arguments.dataset_name, "split": split}
    about["dtype"] = str(dtype).removeprefix("torch.")
    made_from = {"base": arguments.base_id(), "memory": "+".join(filter(None, map(made_id, places))) or None}
    made_from["windows"] = made_id(arguments.dataset_name)
    adaptive = {"memory_temp": gates[0].memory_temp} if gates else None
    mixture = {"mixture": "base + memory" if len(paths) == 1 else f"base + {len(paths)} memories", "adaptive": adaptive}
    report_scores(score, arguments.output_dir, about, made_from, **mixture, started=started)


if __name__ == "__main__":
    command(main)()
