"""The whole chain on 1, 2 and 3 processes of the CPU: are the files, the perplexities and the losses the same?

    python -m benchmarks.process_counts                                    SmolLM2-135M and Wikipedia, about 15 minutes
    python -m benchmarks.process_counts --model MODEL --text TEXT --output DIR

For each number of processes every stage is started with `accelerate launch` in a folder of its own: datastore, index
(one shard for each process), kNN targets, training, perplexity of the base and of base + memory. Then a table: the
checksum of all rows, the perplexities, the largest difference of a loss at any step. Ends with an error where they are
not the same. Stages that are complete are not run again, so an interrupted run continues. Knows nothing of how the
stages work.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.cli import flag, parse
from utils.errors import InputError, command, one_line

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = Path("dataset/embedded")
CONFIG = ROOT / "accelerate_config" / "cpu.yaml"
WIKI_SEPARATOR = r"\n?</doc>\n*|<doc [^>]*>\n"
TOLERANCE = 1e-4
LOSSES = ("loss", "kl", "ce")


@dataclass
class ProcessCountArguments:
    """Which processes, on what."""

    model: str | None = flag(None, "folder of the base model; default: SmolLM2-135M of utils.embedded_default")
    text: str | None = flag(None, "text file; default: the Wikipedia articles of utils.embedded_default")
    output: str = flag("results/process_counts", "folder of everything, with results.json")
    counts: list[int] = flag([1, 2, 3], "numbers of processes")
    documents: int = flag(40, "documents of the text, split into train, validation and test")
    document_separator: str = flag(WIKI_SEPARATOR, "regular expression between documents of the text")
    min_document_characters: int = flag(500, "documents of fewer characters are left out")
    max_document_characters: int = flag(1200, "paragraphs that begin within so many characters of a document")
    block_size: int = flag(256, "tokens of a window")
    windows_per_step: int = flag(6, "windows of a training step, all processes together: divisible by each count")
    epochs: int = flag(1, "epochs of training")
    memory_layers: int = flag(2, "layers of the memory")
    k: int = flag(64, "neighbours")
    index_factory: str = flag("IVF16,Flat", "index")
    threads: int = flag(1, "threads of each process, the same for every count")


@command
def main() -> None:
    """Entry point of `python -m benchmarks.process_counts`."""
    (arguments,) = parse(ProcessCountArguments, description="The chain on 1, 2 and 3 processes, compared.")
    for name, value in vars(arguments).items():
        if isinstance(value, int) and value < 1:
            raise InputError(f"--{name} {value}: expected 1 or more")
    for count in arguments.counts:
        if count < 1 or arguments.windows_per_step % count:
            raise InputError(f"--counts {count}: expected a divisor of --windows_per_step {arguments.windows_per_step}")
    from utils.files import ensure_folder, write_json

    output = ensure_folder(arguments.output).resolve()
    model, text = inputs(arguments)
    windows = output / "windows"
    run(
        output / "windows.log",
        arguments.threads,
        *("-m", "utils.preprocess_dataset", "--dataset_name", text, "--tokenizer_path", model),
        *("--output_dir", windows, "--block_size", arguments.block_size, "--stride", arguments.block_size),
        *("--max_documents", arguments.documents, "--document_separator", arguments.document_separator),
        *("--min_document_characters", arguments.min_document_characters),
        *("--max_document_characters", arguments.max_document_characters),
        *("--validation_fraction", 0.2, "--test_fraction", 0.2),
    )
    print(sizes_of(windows), flush=True)
    found = {count: chain(arguments, count, model, windows, output / str(count)) for count in arguments.counts}
    differences = compare(found)
    write_json(output / "results.json", {"counts": {str(key): value for key, value in found.items()}, **differences})
    print(table(found, differences))
    if not differences["same"]:
        raise InputError(f"{output}: the numbers of processes do not give the same; see the table")


def inputs(arguments: ProcessCountArguments) -> tuple[Path, Path]:
    """Model and text; the embedded ones are fetched where none are named."""
    model, text = arguments.model, arguments.text
    if model is None or text is None:
        if not (EMBEDDED / "model" / "config.json").exists() or not (EMBEDDED / "wiki.txt").exists():
            subprocess.run([sys.executable, "-m", "utils.embedded_default", "--output_dir", EMBEDDED], check=True)
        model, text = model or str(EMBEDDED / "model"), text or str(EMBEDDED / "wiki.txt")
    for name, path in (("--model", model), ("--text", text)):
        if not Path(path).exists():
            raise InputError(f"{name} {path}: no such file or folder")
    return Path(model).resolve(), Path(text).resolve()


def sizes_of(windows: Path) -> str:
    from utils.files import read_json

    summary = read_json(windows / "dstore_summary.json")
    rows = ", ".join(f"{split} {figures['dstore_size']}" for split, figures in summary.items())
    return f"rows: {rows}"


def chain(arguments: ProcessCountArguments, count: int, model: Path, windows: Path, folder: Path) -> dict[str, Any]:
    """Every stage on `count` processes in `folder`; returns checksums, perplexities, losses and seconds."""
    from utils.files import ensure_folder

    ensure_folder(folder)
    base = ("--model_name_or_path", model, "--dataset_name", windows, "--report_to", "none")
    index, targets, memory = folder / "train.index", folder / "targets", folder / "memory"

    def embed(split: str, *more: object) -> tuple[object, ...]:
        flags = ("--do_eval", "--eval_subset", split, "--save_knnlm_dstore", "--dstore_dir", folder / "dstore")
        return ("train_base", *base, *flags, "--per_device_eval_batch_size", 4, "--output_dir", folder / "tmp", *more)

    seconds = {}

    def stage(name: str, module: str, *flags: object) -> None:
        start = time.perf_counter()
        launch(folder / f"{name}.log", count, arguments.threads, module, *flags)
        seconds[name] = round(time.perf_counter() - start, 1)
        print(f"{count} processes: {name}, {seconds[name]} s", flush=True)

    stage("datastore", *embed("train"))
    stage("validation_datastore", *embed("validation", "--save_logprob"))
    train, validation = (
        next((folder / "dstore").glob(f"dstore_*_{split}_*.arrow")) for split in ("train", "validation")
    )
    built = ("--dstore_path", train, "--index_path", index, "--index_factory", arguments.index_factory)
    stage("index", "knn_utils.build_index", *built)
    stage(
        *("targets", "knn_utils.saveKNNMulti", "--dstore_path", train, "--index_path", index),
        *("--output_path", targets, "--k", arguments.k, "--knn_temp", 16, "--probe", 4, "--ignore_first", "True"),
        *("--part_rows", 512),
    )
    stage(
        *("training", "train_mlpmem_offline", *base, "--knn_save_path", targets, "--knn_dstore_path", train),
        *("--validation_dstore_path", validation, "--output_dir", memory, "--memory_layers", arguments.memory_layers),
        *("--num_train_epochs", arguments.epochs, "--learning_rate", 5e-4, "--seed", 42, "--logging_steps", 1),
        *("--per_device_train_batch_size", arguments.windows_per_step // count, "--mixed_precision", "no"),
        *("--init_lm_head",),
    )
    scored = ("--per_device_eval_batch_size", 2)
    stage("base", "train_base", *base, *scored, "--do_eval", "--eval_subset", "test", "--output_dir", folder / "base")
    stage(
        *("joint", "evaluate_joint", *base, *scored, "--do_test", "--output_dir", folder / "joint"),
        *("--knn_generator_path", memory / f"epoch_{arguments.epochs}", "--lmbda", 0.25, "--knn_temp", 1),
    )
    return outcome(folder, train, targets, memory) | {"seconds": seconds}


def outcome(folder: Path, train: Path, targets: Path, memory: Path) -> dict[str, Any]:
    """What the stages of one count left: checksums over all rows, perplexities, the losses of every step."""
    from knn_utils.datastore import Datastore, KNNTargets
    from knn_utils.faiss_files import find_index
    from utils.files import read_json

    store, rows = Datastore.open(train, verify=True), KNNTargets.open(targets, verify=True)
    digests = hashlib.sha256(), hashlib.sha256()
    for start in range(0, store.rows, 1 << 16):
        stop = min(start + (1 << 16), store.rows)
        for digest, arrays in (
            (digests[0], (store.keys(start, stop), store.vals(start, stop))),
            (digests[1], vars(rows.read(start, stop)).values()),
        ):
            for array in arrays:
                if array is not None:
                    digest.update(array.tobytes())
    record = read_json(memory / "training.json")
    return {
        "rows": store.rows,
        "target_rows": rows.rows,
        "shards": len(find_index(folder / "train.index").shards),
        "datastore": digests[0].hexdigest(),
        "targets": digests[1].hexdigest(),
        "losses": [{name: entry[name] for name in LOSSES} for entry in record["log"] if "loss" in entry],
        "validation": [entry["validation"] for entry in record["log"] if "validation" in entry],
        "base": {key: read_json(folder / "base" / "results.json")[key] for key in ("tokens", "perplexity")},
        "joint": {key: read_json(folder / "joint" / "results.json")[key] for key in ("tokens", "perplexity")},
    }


def launch(log: Path, count: int, threads: int, module: str, *flags: object) -> None:
    """`accelerate launch` of a stage on `count` processes."""
    start = ("-m", "accelerate.commands.launch", "--config_file", CONFIG, "--num_processes", count)
    run(log, threads, *start, "--main_process_port", 0, "-m", module, *flags)


def run(log: Path, threads: int, *words: object) -> None:
    """`python …` from the repository's root with its output in `log`. Raises InputError when it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("error:")]
        raise InputError(f"{log}: the stage failed, {one_line(lines[0] if lines else 'see its end')}")


def compare(found: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The largest relative differences from the first count, and whether all is the same."""
    first, *others = found.values()
    perplexity = loss = 0.0
    same = True
    for other in others:
        same &= all(first[name] == other[name] for name in ("rows", "target_rows", "datastore", "targets")) and all(
            first[name]["tokens"] == other[name]["tokens"] for name in ("base", "joint")
        )
        pairs = [(first[name]["perplexity"], other[name]["perplexity"]) for name in ("base", "joint")]
        pairs += [
            (mine["joint_perplexity"], theirs["joint_perplexity"])
            for mine, theirs in zip(first["validation"], other["validation"], strict=True)
        ]
        perplexity = max(perplexity, *(abs(here - there) / abs(here) for here, there in pairs))
        steps = zip(first["losses"], other["losses"], strict=True)
        loss = max(loss, *(abs(here[name] - there[name]) / abs(here[name]) for here, there in steps for name in LOSSES))
    same &= perplexity <= TOLERANCE and loss <= TOLERANCE
    return {"same": same, "perplexity_difference": perplexity, "loss_difference": loss}


def table(found: dict[int, dict[str, Any]], differences: dict[str, Any]) -> str:
    """The comparison as a Markdown table and two lines."""
    lines = [
        "| processes | datastore rows, SHA-256 | target rows, SHA-256 | index shards | base perplexity "
        "| base + memory | last loss | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for count, one in found.items():
        lines.append(
            f"| {count} | {one['rows']}, {one['datastore'][:16]}… | {one['target_rows']}, {one['targets'][:16]}… "
            f"| {one['shards']} | {one['base']['perplexity']:.6f} ({one['base']['tokens']} tokens) "
            f"| {one['joint']['perplexity']:.6f} | {one['losses'][-1]['loss']:.6f} | {sum(one['seconds'].values()):.0f} |"
        )
    steps = len(next(iter(found.values()))["losses"])
    lines.append(
        f"largest relative difference: perplexity {differences['perplexity_difference']:.1e}, "
        f"loss over {steps} steps {differences['loss_difference']:.1e}"
    )
    lines.append("the same" if differences["same"] else "NOT the same")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
