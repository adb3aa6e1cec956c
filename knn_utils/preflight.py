"""Before a long job: do the files fit each other, do disk and memory suffice, and what will each stage take.

    python -m knn_utils.preflight --tokens 103000000 --model_name_or_path gpt2-large --layers 54
    python -m knn_utils.preflight --dataset_name WINDOWS --dstore_path DATASTORE --index_path INDEX \\
        --knn_save_path TARGETS --knn_generator_path MEMORY --model_name_or_path BASE

Whatever files are named are checked against each other; sizes that the flags leave open come from them. Times are
measured on this machine with --measure, or follow from --device_tflops and its like; the plan says which. Nothing is
kept: measuring writes a file to see how fast the disk is, and deletes it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.cli import flag, parse
from utils.errors import InputError, command, one_line

# Rows that are read for each comparison of labels, in so many blocks spread over the data.
CHECKED_BLOCKS, CHECKED_WINDOWS = 8, 64


@dataclass
class PreflightArguments:
    """Flags of preflight."""

    model_name_or_path: str | None = flag(None, "base model (folder or hub name); its config alone is read")
    trust_remote_code: bool = flag(False, "run the code in the model's repository")
    dataset_name: str | None = flag(None, "windows folder")
    dataset_split_name: str = flag("train", "split of the windows")
    dstore_path: str | None = flag(None, "datastore")
    index_path: str | None = flag(None, "index")
    knn_save_path: str | None = flag(None, "kNN targets")
    knn_generator_path: str | None = flag(None, "memory")
    layer_position: int | None = flag(None, "block that everything should have been captured at; default: any, but one")
    output_dir: str | None = flag(None, "folder that the stages will write to: its disk has to suffice")
    tokens: int | None = flag(None, "tokens of the corpus; default: the windows'")
    dim: int | None = flag(None, "width of the hidden states; default: the files' or the model's")
    vocab: int | None = flag(None, "tokens of the vocabulary; default: the model's")
    base_parameters: float | None = flag(None, "weights of the base; default: counted from its config")
    layers: int = flag(8, "layers of the memory")
    intermediate: int | None = flag(None, "width within the memory's MLPs; default: the model's, else 4 times --dim")
    gated: bool | None = flag(None, "MLPs with a gate, as Llama's; default: the model's, else false")
    k: int = flag(1024, "neighbours of a row")
    entries_per_row: float | None = flag(
        None, "entries of a row's kNN target; default: measured from --knn_save_path, else assumed to be k/8"
    )
    block_size: int | None = flag(None, "tokens of a window; default: the windows', else 1024")
    stride: int | None = flag(None, "tokens from one window to the next; default: the windows', else 512")
    ncentroids: int = flag(4096, "inverted lists of the index")
    code_size: int = flag(64, "bytes of a row in the index")
    probe: int = flag(32, "inverted lists searched")
    num_train_epochs: int = flag(50, "epochs of training")
    windows_per_step: int = flag(128, "windows of a step, all processes together")
    micro_batch_rows: int = flag(16384, "rows that go through the memory at once")
    processes: int = flag(8, "processes, each with a device of its own")
    sharded: bool = flag(False, "weights and optimizer are sharded over the processes (FSDP)")
    device_memory_gb: float | None = flag(None, "memory of each device, to be compared; default: this machine's")
    measure: str | None = flag(None, "model to measure rates with on this machine: a few windows, searches and steps")
    device_tflops: float | None = flag(
        None, "assumed rate of a device in matrix products, TFLOP/s as reached in practice, not the data sheet's"
    )
    lookups_per_second: float = flag(2e11, "with --device_tflops, assumed: PQ table look-ups of a device")
    hits_per_second: float = flag(2e8, "with --device_tflops, assumed: neighbours of a device made into distributions")
    disk_gb_per_second: float = flag(
        2.0, "with --device_tflops, assumed: what all processes together read or write, GB/s"
    )
    json: bool = flag(False, "print JSON in place of text")


@dataclass
class Opened:
    """What the named files are, and what was found in agreement."""

    facts: list[str] = field(default_factory=list)
    config: Any = None
    windows: Any = None
    rows: int | None = None
    rows_of: str = ""
    dim: int | None = None
    layer: int | None = None
    vocab: int | None = None
    entries_per_row: float | None = None

    def same_rows(self, path: object, rows: int) -> None:
        if self.rows is None:
            self.rows, self.rows_of = rows, str(path)
        elif self.rows != rows:
            raise InputError(
                f"{path}: holds {rows} rows, but {self.rows_of} {self.rows}; make it from the same windows"
            )

    def same_dim(self, path: object, dim: int) -> None:
        if self.dim is None:
            self.dim = dim
        elif self.dim != dim:
            raise InputError(f"{path}: is {dim} wide, but the model and the files before it {self.dim}")

    def same_layer(self, path: object, layer: Any) -> None:
        if not isinstance(layer, int):
            return
        if self.layer is None:
            self.layer = layer
        elif self.layer != layer:
            raise InputError(
                f"{path}: was made from hidden states of block {layer}, but the files before it, or --layer_position, "
                f"say {self.layer}"
            )

    def check_tokens(self, path: object, tokens: Any) -> None:
        if self.vocab is not None and len(tokens) and not (tokens.min() >= 0 and tokens.max() < self.vocab):
            raise InputError(f"{path}: holds token id {tokens.max()}, but the vocabulary has {self.vocab} tokens")


@command
def main() -> None:
    """Entry point of `python -m knn_utils.preflight`."""
    (arguments,) = parse(PreflightArguments, description=__doc__.split("\n")[0])
    check_arguments(arguments)
    from utils.loading import quiet_libraries

    quiet_libraries()
    opened = open_files(arguments)
    plan = None
    if arguments.tokens is not None or (opened.windows is not None and opened.config is not None):
        plan = make_plan_of(arguments, opened)
    if arguments.json:
        print(json.dumps({"checks": opened.facts, "plan": None if plan is None else plan.as_dict()}, indent=2))
    else:
        for fact in opened.facts:
            print(fact)
        if plan is not None:
            print_plan(plan)
    if plan is not None:
        # After the plan, which shows what is too large.
        for fact in check_machine(arguments, plan):
            print(fact, file=sys.stderr if arguments.json else sys.stdout)


def check_arguments(arguments: PreflightArguments) -> None:
    """Refuse what is wrong whatever the files are. Raises InputError."""
    for name, value in vars(arguments).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "layer_position" and value <= 0:
            raise InputError(f"--{name} {value:g}: expected a number above 0")
    if arguments.measure and arguments.device_tflops:
        raise InputError("--measure and --device_tflops: expected one of them, measured or assumed")
    files = ("dataset_name", "dstore_path", "index_path", "knn_save_path", "knn_generator_path")
    if arguments.tokens is None and not any(getattr(arguments, name) for name in files):
        raise InputError(
            "nothing to do: give --tokens for a plan, or files to check (--dataset_name, --dstore_path, …)"
        )


# Files against each other


def open_files(arguments: PreflightArguments) -> Opened:
    """Open what is named, in the order of the stages, and compare each with those before. Raises InputError."""
    opened = Opened(layer=arguments.layer_position)
    if arguments.model_name_or_path:
        open_model(arguments.model_name_or_path, opened, arguments.trust_remote_code)
    if arguments.dataset_name:
        open_windows(arguments, opened)
    if arguments.dstore_path:
        open_datastore(arguments.dstore_path, opened)
    if arguments.index_path:
        open_index(arguments, opened)
    if arguments.knn_save_path:
        open_targets(arguments, opened)
    if arguments.knn_generator_path:
        open_memory_config(arguments.knn_generator_path, opened)
    return opened


def open_model(path: str, opened: Opened, trust_remote_code: bool) -> None:
    from transformers import AutoConfig

    from utils.base_model import from_pretrained, load_tokenizer

    remote = {"trust_remote_code": trust_remote_code}
    config = from_pretrained(AutoConfig.from_pretrained, path, "--model_name_or_path", **remote)
    opened.config = config.get_text_config()
    tokenizer = load_tokenizer(path, **remote)
    opened.vocab = len(tokenizer) if tokenizer is not None else opened.config.vocab_size
    opened.same_dim(path, opened.config.hidden_size)
    opened.facts.append(f"model {path}: {opened.config.model_type}, {opened.dim} wide, {opened.vocab} tokens")


def open_windows(arguments: PreflightArguments, opened: Opened) -> None:
    from knn_utils.datastore import count_rows
    from utils.evaluation import check_token_ids
    from utils.loading import load_windows

    path = f"{arguments.dataset_name} ({arguments.dataset_split_name})"
    opened.windows = load_windows(arguments.dataset_name, arguments.dataset_split_name)
    if opened.vocab is not None:
        check_token_ids(opened.windows, opened.vocab, arguments.dataset_name)
    opened.same_rows(path, int(count_rows(opened.windows).sum()))
    opened.facts.append(f"windows {path}: {len(opened.windows)} windows, {opened.rows} rows")


def sampled_windows(opened: Opened) -> list[tuple[int, int, int, int]]:
    """Blocks of windows spread over the data: (first, past-last, their first row, past-last row)."""
    import numpy as np

    from knn_utils.datastore import count_rows

    counts = count_rows(opened.windows)
    ends = np.cumsum(counts)
    blocks = []
    for start in np.unique(np.linspace(0, max(len(counts) - CHECKED_WINDOWS, 0), CHECKED_BLOCKS).astype(int)):
        stop = min(start + CHECKED_WINDOWS, len(counts))
        blocks.append((int(start), int(stop), int(ends[start] - counts[start]), int(ends[stop - 1])))
    return blocks


def check_labels(path: object, opened: Opened, read: Any) -> None:
    """Compare labels that `read(start, stop)` gives with the windows', on blocks spread over the data."""
    import numpy as np

    from utils.evaluation import window_values

    if opened.windows is None:
        return
    for first, last, start, stop in sampled_windows(opened):
        differ = np.flatnonzero(window_values(opened.windows, first, last) != read(start, stop))
        if len(differ):
            raise InputError(
                f"{path}: row {start + int(differ[0])} has another label than the windows; made from others"
            )


def open_datastore(path: str, opened: Opened) -> None:
    from knn_utils.datastore import Datastore

    store = Datastore.open(path)
    opened.same_rows(path, store.rows)
    opened.same_dim(path, store.dim)
    opened.same_layer(path, store.settings.get("layer_position"))
    check_labels(path, opened, store.vals)
    opened.check_tokens(path, store.vals(0, min(store.rows, 1 << 20)))
    opened.facts.append(f"datastore {path}: {store.rows} rows of {store.dim}, as expected")


def open_index(arguments: PreflightArguments, opened: Opened) -> None:
    from knn_utils.faiss_files import find_index, same_rows

    path = arguments.index_path
    files = find_index(path)
    if files.record is None:
        opened.facts.append(f"index {path}: without a record, not compared")
        return
    opened.same_dim(path, files.record["dim"])
    opened.same_layer(path, files.record["datastore"].get("settings", {}).get("layer_position"))
    if arguments.dstore_path:
        from knn_utils.datastore import Datastore

        opened.same_rows(path, files.record["rows"])
        if not same_rows(files.record["datastore"].get("fingerprint"), Datastore.open(arguments.dstore_path)):
            raise InputError(f"{path}: was built from other rows than {arguments.dstore_path}; build it again")
    size = sum(shard.bytes or 0 for shard in files.shards)
    opened.facts.append(f"index {path}: {files.record['rows']} rows, {len(files.shards)} files, {size} bytes")


def open_targets(arguments: PreflightArguments, opened: Opened) -> None:
    import numpy as np

    from knn_utils.datastore import KNNTargets

    path = arguments.knn_save_path
    targets = KNNTargets.open(path)
    opened.same_rows(path, targets.rows)
    opened.same_layer(path, targets.settings.get("layer_position"))
    check_labels(path, opened, targets.labels)
    counts = []
    for start in np.unique(np.linspace(0, max(targets.rows - 1024, 0), CHECKED_BLOCKS).astype(int)):
        rows = targets.read(int(start), min(int(start) + 1024, targets.rows))
        opened.check_tokens(path, rows.token_id)
        counts.append(rows.id_cnt)
    opened.entries_per_row = float(np.concatenate(counts).mean())
    opened.facts.append(
        f"kNN targets {path}: {targets.rows} rows, {opened.entries_per_row:.1f} entries each, as expected"
    )


def open_memory_config(path: str, opened: Opened) -> None:
    from models.stack import find_memory, read_memory_config

    try:
        config = read_memory_config(find_memory(path))
    except ValueError as error:
        raise InputError(f"--knn_generator_path {path}: {one_line(error)}") from None
    opened.same_dim(path, config.hidden_size)
    if opened.vocab is not None and config.vocab_size != opened.vocab:
        raise InputError(f"{path}: has a vocabulary of {config.vocab_size} tokens, the base {opened.vocab}")
    opened.facts.append(f"memory {path}: {config.num_hidden_layers} layers of {config.hidden_size}, fits")


# The plan


def make_plan_of(arguments: PreflightArguments, opened: Opened) -> Any:
    """The plan of the flags, with what they leave open taken from the files and the model."""
    from knn_utils.plan import Rates, Sizes, make_plan

    config = opened.config
    dim, vocab = arguments.dim or opened.dim, arguments.vocab or opened.vocab
    for name, value in (("dim", dim), ("vocab", vocab)):
        if value is None:
            raise InputError(f"--{name}: is needed for the plan, or --model_name_or_path")
    gated = arguments.gated if arguments.gated is not None else config is not None and not is_plain(config)
    own_width = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    block_size, stride, tokens = arguments.block_size, arguments.stride, arguments.tokens
    if opened.windows is not None:
        block_size = block_size or len(opened.windows[0]["input_ids"])
        if tokens is None:
            tokens = opened.rows
            stride = stride or max(1, min(block_size, -(-opened.rows // len(opened.windows))))
    block_size = block_size or 1024
    parameters = arguments.base_parameters
    if parameters is None and config is not None:
        parameters = count_parameters(config)
    if parameters is None:
        raise InputError("--base_parameters: is needed for the plan, or --model_name_or_path")
    sizes = Sizes(
        tokens=tokens,
        dim=dim,
        vocab=vocab,
        base_parameters=int(parameters),
        layers=arguments.layers,
        intermediate=arguments.intermediate or own_width or 4 * dim,
        gated=gated,
        k=arguments.k,
        entries_per_row=arguments.entries_per_row or opened.entries_per_row or arguments.k / 8,
        block_size=block_size,
        stride=min(stride or 512, block_size),
        ncentroids=arguments.ncentroids,
        code_size=arguments.code_size,
        probe=arguments.probe,
        epochs=arguments.num_train_epochs,
        windows_per_step=arguments.windows_per_step,
        micro_rows=arguments.micro_batch_rows,
        processes=arguments.processes,
        sharded=arguments.sharded,
    )
    if arguments.entries_per_row is None:
        measured = opened.entries_per_row is not None
        opened.facts.append(
            f"entries of a row's target: {sizes.entries_per_row:.1f}, "
            + ("measured on --knn_save_path" if measured else "assumed (k/8); name targets or --entries_per_row")
        )
    rates = None
    if arguments.measure:
        from knn_utils.measure import measure_rates

        rates = measure_rates(arguments.measure, sizes, arguments.output_dir or ".", arguments.trust_remote_code)
    elif arguments.device_tflops:
        speed = arguments.device_tflops * 1e12
        disk = arguments.disk_gb_per_second * 1e9
        rates = Rates(speed, speed, arguments.lookups_per_second, arguments.hits_per_second, disk, "assumed")
    return make_plan(sizes, rates)


def is_plain(config: Any) -> bool:
    """Whether a family's MLP has two matrices and no gate, as GPT-2's."""
    return config.model_type in ("gpt2", "gpt_bigcode", "gpt_neo", "gptj", "gpt_neox", "opt", "bloom", "phi", "falcon")


def count_parameters(config: Any) -> int:
    """Weights of the base, from its config alone."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(weight.numel() for weight in model.parameters())


# This machine


def check_machine(arguments: PreflightArguments, plan: Any) -> list[str]:
    """Lines on disk and device memory. Raises InputError where they do not suffice."""
    from utils.units import size_text

    needed, facts = sum(stage.bytes for stage in plan.stages if not is_made(arguments, stage.name)), []
    if arguments.output_dir is None:
        facts.append(f"disk: {size_text(needed)} needed; name --output_dir to compare it with what is free")
    else:
        folder = Path(arguments.output_dir).absolute()
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise InputError(
                f"--output_dir {arguments.output_dir}: the plan needs {size_text(needed)} of disk, {size_text(free)} "
                "are free; free some, name another disk, or train online (no datastore of the student)"
            )
        facts.append(f"disk of {arguments.output_dir}: {size_text(needed)} needed, {size_text(free)} free")
    memory, source = device_memory(arguments)
    for stage in plan.stages:
        if stage.memory and memory is not None and stage.memory > memory:
            raise InputError(
                f"{stage.name}: needs about {size_text(stage.memory)} on each device, {source} has {size_text(memory)}; "
                "use more processes, --sharded (FSDP), or fewer --micro_batch_rows"
            )
    if memory is not None:
        facts.append(f"memory of a device: {size_text(memory)} ({source}), enough for every stage")
    return facts


def is_made(arguments: PreflightArguments, stage: str) -> bool:
    """Whether the files of a stage are there already."""
    files = {
        "windows": arguments.dataset_name,
        "datastore": arguments.dstore_path,
        "index": arguments.index_path,
        "kNN targets": arguments.knn_save_path,
        "memory": arguments.knn_generator_path,
    }
    return files[stage] is not None


def device_memory(arguments: PreflightArguments) -> tuple[int | None, str]:
    """Bytes of memory of one device, and whose. None where the devices are not this machine's."""
    if arguments.device_memory_gb is not None:
        return int(arguments.device_memory_gb * 1e9), "--device_memory_gb"
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name(0)
    if arguments.measure:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // arguments.processes, "this machine's share"
    return None, ""


def print_plan(plan: Any) -> None:
    from knn_utils.plan import plan_text
    from utils.units import size_text

    print()
    print(plan_text(plan))
    print()
    print("Rows and bytes follow from the file formats. ", end="")
    if plan.rates is None:
        print("No times: give --measure MODEL or --device_tflops.")
        return
    rates = plan.rates
    print(
        f"Times are estimates from rates {rates.origin}: base {rates.forward_flops / 1e12:.3g} TFLOP/s, training "
        f"{rates.train_flops / 1e12:.3g} TFLOP/s, search {rates.lookups:.3g} look-ups/s and {rates.hits:.3g} hits/s of "
        f"each of {plan.sizes.processes} processes; disk {size_text(rates.disk)}/s for all of them."
    )


if __name__ == "__main__":
    main()
