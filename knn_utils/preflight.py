"""Before a long job: do the files fit each other, do disk and memory suffice, and what will each stage take.

    python -m knn_utils.preflight --tokens 103000000 --model_name_or_path gpt2-large --layers 54
    python -m knn_utils.preflight --dataset_name WINDOWS --dstore_path DATASTORE --index_path INDEX \\
        --knn_save_path TARGETS --knn_generator_path MEMORY --model_name_or_path BASE

Whatever files are named are checked against each other; sizes that the flags leave open come from them. Times are
measured on this machine with --measure, or follow from --device_tflops and its like; the plan says which. Nothing is
written.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from knn_utils.planner import (
    BLOCK_SIZE,
    RATES,
    STRIDE,
    Rates,
    Sizes,
    Stage,
    make_plan,
    measure_rates,
    memory_parameters,
    plan_text,
    total,
)
from utils.cli import command, flag, parse
from utils.errors import InputError, one_line
from utils.files import sha256_file
from utils.units import size_text

# Blocks of kNN targets, and rows of each, whose entries are counted.
ENTRY_BLOCKS, ENTRY_ROWS = 8, 1024
# The stages of the plan, and the flags that name their files.
FILES = {
    "windows": "dataset_name",
    "datastore": "dstore_path",
    "index": "index_path",
    "kNN targets": "knn_save_path",
    "memory": "knn_generator_path",
}
# What the files state, in the words of a message.
STATED = {
    "rows": "{} rows",
    "dim": "hidden states {} wide",
    "layer": "hidden states of block {}",
    "vocab": "a vocabulary of {} tokens",
}


@dataclass
class PreflightArguments(Sizes):
    """Flags of preflight: the sizes that are planned, files, and rates."""

    model_name_or_path: str | None = flag(None, "base model (folder or hub name); its config alone is read")
    trust_remote_code: bool = flag(False, "run the code in the model's repository")
    dataset_name: str | None = flag(None, "windows folder")
    dataset_split_name: str = flag("train", "split of the windows")
    dstore_path: str | None = flag(None, "datastore")
    index_path: str | None = flag(None, "index")
    knn_save_path: str | None = flag(None, "kNN targets")
    knn_generator_path: str | None = flag(None, "memory")
    layer_position: int | None = flag(None, "block that everything should have been captured at; default: any, but one")
    verify: bool = flag(
        False, "also compare the checksums of datastore, index and kNN targets, which reads all of them"
    )
    output_dir: str | None = flag(None, "folder that the stages will write to: its disk has to suffice")
    device_memory_gb: float | None = flag(None, "memory of each device, to be compared; default: this machine's")
    measure: str | None = flag(None, "model to measure rates with on this machine: a few windows and searches")
    device_tflops: float | None = flag(
        None, "assumed rate of a device in matrix products, TFLOP/s as reached in practice, not the data sheet's"
    )
    lookups_per_second: float = flag(
        RATES["gpu"].lookups, "with --device_tflops, assumed: PQ table look-ups of a device"
    )
    hits_per_second: float = flag(
        RATES["gpu"].hits, "with --device_tflops, assumed: neighbours of a device made into distributions"
    )
    disk_gb_per_second: float = flag(
        RATES["gpu"].disk / 1e9, "assumed: what all processes together read or write, GB/s"
    )
    json: bool = flag(False, "print JSON in place of text")


class Chain:
    """What the named files state, which must be the same in all of them, and lines on what was found in agreement."""

    def __init__(self, layer_position: int | None) -> None:
        self.facts: list[str] = []
        self.config: Any = None
        self.windows: Any = None
        self.entries_per_row: float | None = None
        self._stated: dict[str, tuple[Any, str]] = {}
        self.state("layer", layer_position, "--layer_position")

    def state(self, name: str, value: Any, path: object) -> None:
        """Take down what a file states. Raises InputError where a file before it states otherwise."""
        if value is None:
            return
        known, source = self._stated.setdefault(name, (value, str(path)))
        if value != known:
            there, here = STATED[name].format(known), STATED[name].format(value)
            raise InputError(f"{path}: {here}, but {there} in {source}; name files that were made from each other")

    def stated(self, name: str) -> Any:
        """What the files state, None where none does."""
        return self._stated.get(name, (None, ""))[0]


@command
def main() -> None:
    """Entry point of `python -m knn_utils.preflight`."""
    (arguments,) = parse(PreflightArguments, description=__doc__.split("\n")[0])
    check_arguments(arguments)
    from utils.loading import quiet_libraries

    quiet_libraries()
    chain = Chain(arguments.layer_position)
    for name, look in LOOKS.items():
        if getattr(arguments, name):
            look(arguments, chain)
    described, stages = None, []
    if arguments.tokens is not None or (chain.windows is not None and chain.config is not None):
        sizes = sizes_of(arguments, chain)
        rates = rates_of(arguments, sizes)
        stages = make_plan(sizes, rates)
        totals = total(stages) | {"memory_parameters": memory_parameters(sizes)}
        described = {
            "sizes": asdict(sizes),
            "rates": rates and asdict(rates),
            "stages": list(map(asdict, stages)),
        } | totals
    if arguments.json:
        print(json.dumps({"checks": chain.facts, "plan": described}, indent=2))
    else:
        print("\n".join(chain.facts))
        if stages:
            print(f"\n{plan_text(stages)}\n\n{origin_of(rates, sizes)}")
    if stages:
        # After the plan, which shows what is too large.
        for fact in check_machine(arguments, stages):
            print(fact, file=sys.stderr if arguments.json else sys.stdout)


def check_arguments(arguments: PreflightArguments) -> None:
    """Refuse what is wrong whatever the files are. Raises InputError."""
    for name, value in vars(arguments).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "layer_position" and value <= 0:
            raise InputError(f"--{name} {value:g}: expected a number above 0")
    if arguments.measure and arguments.device_tflops:
        raise InputError("--measure and --device_tflops: expected one of them, measured or assumed")
    if arguments.tokens is None and not any(getattr(arguments, name) for name in FILES.values()):
        raise InputError(
            "nothing to do: give --tokens for a plan, or files to check (--dataset_name, --dstore_path, …)"
        )


# Files against each other, in the order of the stages


def look_at_model(arguments: PreflightArguments, chain: Chain) -> None:
    from transformers import AutoConfig

    from utils.loading import from_pretrained, load_tokenizer

    path, remote = arguments.model_name_or_path, {"trust_remote_code": arguments.trust_remote_code}
    config = from_pretrained(AutoConfig.from_pretrained, path, "--model_name_or_path", **remote)
    chain.config = config.get_text_config()
    tokenizer = load_tokenizer(path, **remote)
    chain.state("vocab", len(tokenizer) if tokenizer is not None else chain.config.vocab_size, path)
    chain.state("dim", chain.config.hidden_size, path)
    width, vocab = chain.stated("dim"), chain.stated("vocab")
    chain.facts.append(f"model {path}: {chain.config.model_type}, {width} wide, {vocab} tokens")


def look_at_windows(arguments: PreflightArguments, chain: Chain) -> None:
    from utils.evaluation import check_token_ids, count_rows
    from utils.loading import load_windows

    path = f"{arguments.dataset_name} ({arguments.dataset_split_name})"
    chain.windows = load_windows(arguments.dataset_name, arguments.dataset_split_name)
    if chain.stated("vocab") is not None:
        check_token_ids(chain.windows, chain.stated("vocab"), arguments.dataset_name)
    chain.state("rows", int(count_rows(chain.windows).sum()), path)
    chain.facts.append(f"windows {path}: {len(chain.windows)} windows, {chain.stated('rows')} rows")


def look_at_datastore(arguments: PreflightArguments, chain: Chain) -> None:
    from knn_utils.datastore import Datastore

    path = arguments.dstore_path
    store = Datastore.open(path, verify=arguments.verify)
    chain.state("rows", store.rows, path)
    chain.state("dim", store.dim, path)
    chain.state("layer", store.settings.get("layer_position"), path)
    chain.facts.append(f"datastore {path}: {store.rows} rows of {store.dim}, as expected")


def look_at_index(arguments: PreflightArguments, chain: Chain) -> None:
    from knn_utils.datastore import Datastore
    from knn_utils.faiss_files import find_index, same_rows

    path = arguments.index_path
    files = find_index(path)
    if files.record is None:
        chain.facts.append(f"index {path}: without a record, not compared")
        return
    made_from = files.record["datastore"]
    chain.state("dim", files.record["dim"], path)
    chain.state("layer", made_from["settings"].get("layer_position"), path)
    if arguments.dstore_path:
        chain.state("rows", files.record["rows"], path)
        if not same_rows(made_from.get("fingerprint"), Datastore.open(arguments.dstore_path)):
            raise InputError(f"{path}: was built from other rows than {arguments.dstore_path}; build it again")
    for shard, recorded in zip(files.shards, files.record["shards"], strict=True):
        if arguments.verify and sha256_file(shard.path) != recorded["sha256"]:
            raise InputError(f"{shard.path}: does not match its checksum, a byte was changed; build it again")
    size = size_text(sum(shard.bytes for shard in files.shards))
    chain.facts.append(f"index {path}: {files.record['rows']} rows, {len(files.shards)} files, {size}")


def look_at_targets(arguments: PreflightArguments, chain: Chain) -> None:
    import numpy as np

    from knn_utils.datastore import KNNTargets

    path = arguments.knn_save_path
    targets = KNNTargets.open(path, verify=arguments.verify)
    chain.state("rows", targets.rows, path)
    chain.state("layer", targets.settings.get("layer_position"), path)
    # Of a few blocks of rows, spread over the data.
    starts = {targets.rows * part // ENTRY_BLOCKS for part in range(ENTRY_BLOCKS)}
    counts = [targets.read(start, min(start + ENTRY_ROWS, targets.rows)).id_cnt for start in starts]
    chain.entries_per_row = float(np.concatenate(counts).mean())
    chain.facts.append(
        f"kNN targets {path}: {targets.rows} rows, {chain.entries_per_row:.1f} entries each, as expected"
    )


def look_at_memory(arguments: PreflightArguments, chain: Chain) -> None:
    from models.stack import find_memory, read_memory_config

    path = arguments.knn_generator_path
    try:
        config = read_memory_config(find_memory(path))
    except ValueError as error:
        raise InputError(f"--knn_generator_path {path}: {one_line(error)}") from None
    chain.state("dim", config.hidden_size, path)
    chain.state("vocab", config.vocab_size, path)
    chain.facts.append(f"memory {path}: {config.num_hidden_layers} layers of {config.hidden_size}, fits")


LOOKS = {
    "model_name_or_path": look_at_model,
    "dataset_name": look_at_windows,
    "dstore_path": look_at_datastore,
    "index_path": look_at_index,
    "knn_save_path": look_at_targets,
    "knn_generator_path": look_at_memory,
}


# The plan


def sizes_of(arguments: PreflightArguments, chain: Chain) -> Sizes:
    """The sizes of the flags, with what they leave open taken from the files and the model. Raises InputError."""
    config, windows = chain.config, chain.windows
    dim, parameters = arguments.dim or chain.stated("dim"), arguments.base_parameters
    if parameters is None and config is not None:
        parameters = count_parameters(config)
    vocab = arguments.vocab or chain.stated("vocab")
    for name, value in (("dim", dim), ("vocab", vocab), ("base_parameters", parameters)):
        if value is None:
            raise InputError(f"--{name}: is needed for the plan, or --model_name_or_path")
    gated = arguments.gated if arguments.gated is not None else config is not None and not is_plain(config)
    own_width = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    block_size, stride, tokens = arguments.block_size, arguments.stride, arguments.tokens
    if windows is not None:
        block_size = block_size or len(windows[0]["input_ids"])
        if tokens is None:
            tokens = chain.stated("rows")
            stride = stride or max(1, -(-tokens // len(windows)))
    block_size = block_size or BLOCK_SIZE
    entries = arguments.entries_per_row or chain.entries_per_row
    if arguments.entries_per_row is None:
        said = f"{entries:.1f}, measured on --knn_save_path" if entries else f"{arguments.k / 8:.1f}, assumed (k/8)"
        chain.facts.append(f"entries of a row's target: {said}; --entries_per_row changes it")
    found = {
        "tokens": tokens,
        "dim": dim,
        "vocab": vocab,
        "base_parameters": parameters,
        "intermediate": arguments.intermediate or own_width or 4 * dim,
        "gated": gated,
        "entries_per_row": entries or arguments.k / 8,
        "block_size": block_size,
        "stride": min(stride or STRIDE, block_size),
    }
    return Sizes(**{item.name: getattr(arguments, item.name) for item in fields(Sizes)} | found)


def rates_of(arguments: PreflightArguments, sizes: Sizes) -> Rates | None:
    """Measured or assumed rates, as the flags say; None for a plan without times."""
    disk = arguments.disk_gb_per_second * 1e9
    if arguments.measure:
        return measure_rates(arguments.measure, sizes, disk, arguments.trust_remote_code)
    if not arguments.device_tflops:
        return None
    return Rates(arguments.device_tflops * 1e12, arguments.lookups_per_second, arguments.hits_per_second, disk)


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


def origin_of(rates: Rates | None, sizes: Sizes) -> str:
    """Where the plan's numbers come from."""
    origin = "Rows and bytes follow from the file formats."
    if rates is None:
        return f"{origin} No times: give --measure MODEL or --device_tflops."
    return (
        f"{origin} Times are estimates from rates {rates.origin}: {rates.flops / 1e12:.3g} TFLOP/s in base and memory, "
        f"search {rates.lookups:.3g} look-ups/s and {rates.hits:.3g} hits/s of each of {sizes.processes} processes; "
        f"disk {size_text(rates.disk)}/s for all of them."
    )


# This machine


def check_machine(arguments: PreflightArguments, stages: list[Stage]) -> list[str]:
    """Lines on disk and device memory. Raises InputError where they do not suffice."""
    needed, facts = sum(stage.bytes for stage in stages if getattr(arguments, FILES[stage.name]) is None), []
    if arguments.output_dir is None:
        facts.append(f"disk: {size_text(needed)} needed; name --output_dir to compare it with what is free")
    else:
        free = shutil.disk_usage(existing(arguments.output_dir)).free
        if needed > free:
            raise InputError(
                f"--output_dir {arguments.output_dir}: the plan needs {size_text(needed)} of disk, {size_text(free)} "
                "are free; free some, name another disk, or train online (no datastore of the student)"
            )
        facts.append(f"disk of {arguments.output_dir}: {size_text(needed)} needed, {size_text(free)} free")
    memory, source = device_memory(arguments)
    if memory is None:
        return facts
    for stage in stages:
        if stage.memory > memory:
            raise InputError(
                f"{stage.name}: needs about {size_text(stage.memory)} on each device, {source} has {size_text(memory)}; "
                "use more processes, --sharded (FSDP), or fewer --micro_batch_rows"
            )
    return [*facts, f"memory of a device: {size_text(memory)} ({source}), enough for every stage"]


def existing(folder: str | Path) -> Path:
    """`folder`, or the nearest folder above it that is there."""
    folder = Path(folder).absolute()
    return folder if folder.is_dir() else existing(folder.parent)


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


if __name__ == "__main__":
    main()
