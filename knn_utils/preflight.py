"""Before a long job: do the files fit each other, do disk and memory suffice, and what will each stage take.

    python -m knn_utils.preflight --tokens 103000000 --model_name_or_path gpt2-large --layers 54
    python -m knn_utils.preflight --dataset_name WINDOWS --dstore_path DATASTORE --index_path INDEX \\
        --knn_save_path TARGETS --knn_generator_path MEMORY --model_name_or_path BASE

Whatever files are named are checked against each other; sizes that the flags leave open come from them. Times follow from
--device_tflops and its like. Nothing is written.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from knn_utils import planner
from knn_utils.planner import Rates, Sizes, Stage, make_plan, plan_text, total
from utils.cli import command, flag, parse
from utils.errors import InputError, one_line
from utils.legacy import check_made, sha256_file
from utils.loading import BaseArguments
from utils.units import size_text

# Blocks of kNN targets, and rows of each, whose entries are counted.
ENTRY_BLOCKS, ENTRY_ROWS = 8, 1024
KNOWN_INDEX = re.compile(r"(OPQ[0-9]+,)?(IVF[1-9][0-9]*,)?(Flat|PQ[1-9][0-9]*)")
# No size or rate is as large.
TOO_LARGE = 1e18
# Families whose MLP has two matrices and no gate.
PLAIN = ("gpt2", "gpt_bigcode", "gpt_neo", "gptj", "gpt_neox", "opt", "bloom", "phi", "falcon")
# What the files state, in the words of a message.
STATED = {
    "rows": "{} rows",
    "dim": "hidden states {} wide",
    "layer": "hidden states of block {}",
    "vocab": "a vocabulary of {} tokens",
    "dataset": "windows with the checksum {}",
}


@dataclass
class PreflightArguments(Sizes):
    """Flags of preflight: the sizes that are planned, files, and rates."""

    model_name_or_path: str | None = flag(
        None, "base model (folder or hub name); its config is read, with --verify its weights"
    )
    trust_remote_code: bool = flag(False, "run the code in the model's repository")
    dataset_name: str | None = flag(None, "windows folder")
    dataset_split_name: str = flag("train", "split of the windows")
    dstore_path: str | None = flag(None, "datastore")
    index_path: str | None = flag(None, "index")
    knn_save_path: str | None = flag(None, "kNN targets")
    knn_generator_path: str | None = flag(None, "memory")
    layer_position: int | None = flag(None, "block that everything should have been captured at; default: any, but one")
    verify: bool = flag(
        False,
        "also compare the checksums of datastore, index and kNN targets, which reads all of them, and the model's weights",
    )
    output_dir: str | None = flag(None, "folder that the stages will write to: its disk has to suffice")
    device_memory_gb: float | None = flag(None, "memory of each device, to be compared; default: this machine's GPU's")
    device_tflops: float | None = flag(
        None, "assumed rate of a device in matrix products, TFLOP/s as reached in practice, not the data sheet's"
    )
    lookups_per_second: float = flag(2e11, "with --device_tflops, assumed: PQ table look-ups of a device")
    hits_per_second: float = flag(2e8, "with --device_tflops, assumed: neighbours of a device made into distributions")
    disk_gb_per_second: float = flag(2.0, "assumed: what all processes together read or write, GB/s")
    json: bool = flag(False, "print JSON in place of text")


class Chain:
    """What the named files state, which must be the same in all of them, and lines on what was found in agreement."""

    def __init__(self, layer_position: int | None) -> None:
        self.facts: list[str] = []
        self.config: Any = None
        self.tokenizer: Any = None
        self.windows: Any = None
        self.entries_per_row: float | None = None
        self._stated: dict[str, tuple[Any, str]] = {}
        self.state("--layer_position", layer=layer_position)

    def state(self, path: object, **facts: Any) -> None:
        """Take down what a file states. Raises InputError where a file before it states otherwise."""
        for name, value in facts.items():
            if value is None:
                continue
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
    plan, text, stages = None, "", []
    if arguments.tokens is not None or (chain.windows is not None and chain.config is not None):
        sizes = sizes_of(arguments, chain)
        rates = rates_of(arguments)
        stages = make_plan(sizes, rates)
        plan = {"sizes": asdict(sizes), "rates": rates and asdict(rates), "stages": list(map(asdict, stages))}
        plan |= total(stages) | {"memory_parameters": planner.memory_parameters(sizes)}
        text = f"\n\n{plan_text(stages)}\n\n{origin_of(rates, sizes)}"
    facts = json.dumps({"checks": chain.facts, "plan": plan}, indent=2) if arguments.json else "\n".join(chain.facts)
    print(facts if arguments.json else facts + text)
    if stages:
        # After the plan, which shows what is too large.
        print("\n".join(check_machine(arguments, stages)), file=sys.stderr if arguments.json else sys.stdout)


def check_arguments(arguments: PreflightArguments) -> None:
    """Refuse what is wrong whatever the files are. Raises InputError."""
    for name, value in vars(arguments).items():
        if (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and name != "layer_position"
            and not 0 < value < TOO_LARGE
        ):
            raise InputError(f"--{name} {value}: expected a number above 0 and below {TOO_LARGE:g}")
    if arguments.tokens is None and not any(getattr(arguments, name) for name in FILES):
        raise InputError("nothing to do: give --tokens for a plan, or files to check (--dstore_path, …)")


# Files against each other, in the order of the stages


def look_at_model(arguments: PreflightArguments, chain: Chain) -> None:
    from transformers import AutoConfig

    from models.stack import vocabulary_size
    from utils.loading import from_pretrained, load_tokenizer

    path, remote = arguments.model_name_or_path, {"trust_remote_code": arguments.trust_remote_code}
    whole = from_pretrained(AutoConfig.from_pretrained, path, "--model_name_or_path", **remote)
    chain.config = config = whole.get_text_config()
    chain.tokenizer = tokenizer = load_tokenizer(path, **remote)
    vocab = vocabulary_size(tokenizer) if tokenizer is not None else config.vocab_size
    chain.state(path, vocab=vocab, dim=config.hidden_size)
    chain.facts.append(f"model {path}: {config.model_type}, {config.hidden_size} wide, {vocab} tokens")


def look_at_windows(arguments: PreflightArguments, chain: Chain) -> None:
    from utils.evaluation import check_token_ids, count_rows
    from utils.loading import check_windows, load_windows, windows_fingerprint

    path = f"{arguments.dataset_name} ({arguments.dataset_split_name})"
    chain.windows = load_windows(arguments.dataset_name, arguments.dataset_split_name)
    if chain.config is not None:
        check_windows(arguments.dataset_name, chain.windows, chain.config, chain.tokenizer)
    if chain.stated("vocab") is not None:
        check_token_ids(chain.windows, chain.stated("vocab"), arguments.dataset_name)
    chain.state(path, rows=int(count_rows(chain.windows).sum()), dataset=windows_fingerprint(chain.windows))
    chain.facts.append(f"windows {path}: {len(chain.windows)} windows, {chain.stated('rows')} rows")


def stated_by(settings: dict[str, Any]) -> dict[str, Any]:
    """What the settings that made a file state."""
    return {"layer": settings.get("layer_position"), "dataset": settings.get("dataset")}


def look_at_datastore(arguments: PreflightArguments, chain: Chain) -> None:
    from knn_utils.datastore import Datastore

    store = Datastore.open(arguments.dstore_path, verify=arguments.verify)
    chain.state(store.path, rows=store.rows, dim=store.dim, **stated_by(store.settings))
    if arguments.verify and arguments.model_name_or_path:
        base = BaseArguments(arguments.model_name_or_path, trust_remote_code=arguments.trust_remote_code)
        check_made(store.path, store.settings, model=base.fingerprint(store.settings))
    chain.facts.append(f"datastore {store.path}: {store.rows} rows of {store.dim}, as expected")


def look_at_index(arguments: PreflightArguments, chain: Chain) -> None:
    from knn_utils.datastore import Datastore
    from knn_utils.faiss_files import find_index
    from knn_utils.search import KNNSearcher

    path = arguments.index_path
    files = find_index(path)
    record = files.record
    if arguments.dstore_path:  # which it is compared with
        KNNSearcher(path, probe=arguments.probe, datastore=Datastore.open(arguments.dstore_path))
    if record is None:
        compared = "compared by a few of its rows" if arguments.dstore_path else "not compared"
        chain.facts.append(f"index {path}: without a record, {compared}")
        return
    chain.state(path, dim=record["dim"], **stated_by(record["datastore"]["settings"]))
    for shard, recorded in zip(files.shards, record["shards"], strict=True):
        if arguments.verify and sha256_file(shard.path) != recorded["sha256"]:
            raise InputError(f"{shard.path}: does not match its checksum, a byte was changed; build it again")
    size = size_text(sum(shard.bytes for shard in files.shards))
    chain.facts.append(f"index {path}: {record['rows']} rows, {len(files.shards)} files, {size}")


def look_at_targets(arguments: PreflightArguments, chain: Chain) -> None:
    from knn_utils.datastore import KNNTargets

    targets = KNNTargets.open(arguments.knn_save_path, verify=arguments.verify)
    chain.state(targets.path, rows=targets.rows, **stated_by(targets.settings))
    # Of a few blocks of rows, spread over the data.
    starts = {targets.rows * part // ENTRY_BLOCKS for part in range(ENTRY_BLOCKS)}
    counts = [targets.read(start, min(start + ENTRY_ROWS, targets.rows)).id_cnt for start in starts]
    chain.entries_per_row = float(sum(count.sum() for count in counts) / sum(map(len, counts)))
    entries = f"{chain.entries_per_row:.1f} entries each"
    chain.facts.append(f"kNN targets {targets.path}: {targets.rows} rows, {entries}, as expected")


def look_at_memory(arguments: PreflightArguments, chain: Chain) -> None:
    from models.stack import find_memory, read_memory_config

    path = arguments.knn_generator_path
    try:
        config = read_memory_config(find_memory(path))
    except ValueError as error:
        raise InputError(f"--knn_generator_path {path}: {one_line(error)}") from None
    chain.state(path, dim=config.hidden_size, vocab=config.vocab_size)
    chain.facts.append(f"memory {path}: {config.num_hidden_layers} layers of {config.hidden_size}, fits")


# By the flag that names the files.
LOOKS = {
    "model_name_or_path": look_at_model,
    "dataset_name": look_at_windows,
    "dstore_path": look_at_datastore,
    "index_path": look_at_index,
    "knn_save_path": look_at_targets,
    "knn_generator_path": look_at_memory,
}
# Those of the plan's stages, in their order.
FILES = tuple(LOOKS)[1:]


# The plan


def sizes_of(arguments: PreflightArguments, chain: Chain) -> Sizes:
    """The sizes of the flags, with what they leave open taken from the files and the model. Raises InputError."""
    sizes = Sizes(**{item.name: getattr(arguments, item.name) for item in fields(Sizes)})
    config, windows = chain.config, chain.windows
    sizes.dim, sizes.vocab = sizes.dim or chain.stated("dim"), sizes.vocab or chain.stated("vocab")
    if sizes.base_parameters is None and config is not None:
        sizes.base_parameters = count_parameters(config)
    for name in ("dim", "vocab", "base_parameters"):
        if getattr(sizes, name) is None:
            raise InputError(f"--{name}: is needed for the plan, or --model_name_or_path")
    check_factory(sizes)
    if sizes.gated is None:
        sizes.gated = config is not None and config.model_type not in PLAIN
    own_width = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    sizes.intermediate = sizes.intermediate or own_width or 4 * sizes.dim
    if windows is not None:
        sizes.block_size = sizes.block_size or len(windows[0]["input_ids"])
        if sizes.tokens is None:
            sizes.tokens = chain.stated("rows")
            sizes.stride = sizes.stride or max(1, -(-sizes.tokens // len(windows)))
    sizes.block_size = sizes.block_size or planner.BLOCK_SIZE
    sizes.stride = min(sizes.stride or planner.STRIDE, sizes.block_size)
    if sizes.entries_per_row is None:
        sizes.entries_per_row = chain.entries_per_row or sizes.k / 8
        origin = "measured on --knn_save_path" if chain.entries_per_row else "assumed (k/8)"
        chain.facts.append(
            f"entries of a row's target: {sizes.entries_per_row:.1f}, {origin}; --entries_per_row changes it"
        )
    return sizes


def check_factory(sizes: Sizes) -> None:
    """Refuse an --index_factory whose bytes are not known here, or that FAISS cannot build. Raises InputError."""
    from knn_utils.faiss_files import check_faiss
    from knn_utils.index_training import make_index

    factory = sizes.index_factory
    if factory and not KNOWN_INDEX.fullmatch(factory):
        raise InputError(
            f"--index_factory {factory}: a plan knows the sizes of Flat, IVF4096,Flat and IVF4096,PQ64 only"
        )
    if factory:
        check_faiss()
        make_index(factory, sizes.dim, seed=1)


def rates_of(arguments: PreflightArguments) -> Rates | None:
    """The rates of the flags; None for a plan without times."""
    if not arguments.device_tflops:
        return None
    disk = arguments.disk_gb_per_second * 1e9
    return Rates(arguments.device_tflops * 1e12, arguments.lookups_per_second, arguments.hits_per_second, disk)


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
        return f"{origin} No times: give --device_tflops."
    return (
        f"{origin} Times are estimates from assumed rates: {rates.flops / 1e12:.3g} TFLOP/s in base and memory, "
        f"search {rates.lookups:.3g} look-ups/s and {rates.hits:.3g} hits/s of each of {sizes.processes} processes; "
        f"disk {size_text(rates.disk)}/s for all of them."
    )


# This machine


def check_machine(arguments: PreflightArguments, stages: list[Stage]) -> list[str]:
    """Lines on disk and device memory. Raises InputError where they do not suffice."""
    needed = sum(stage.bytes for stage, name in zip(stages, FILES, strict=True) if getattr(arguments, name) is None)
    facts = [f"disk: {size_text(needed)} needed; name --output_dir to compare it with what is free"]
    if arguments.output_dir is not None:
        folder = Path(arguments.output_dir).absolute()
        free = shutil.disk_usage(next(each for each in (folder, *folder.parents) if each.is_dir())).free
        if needed > free:
            raise InputError(
                f"--output_dir {arguments.output_dir}: the plan needs {size_text(needed)} of disk, {size_text(free)} "
                "are free; free some, name another disk, or train online (no datastore of the student)"
            )
        facts = [f"disk of {arguments.output_dir}: {size_text(needed)} needed, {size_text(free)} free"]
    memory, source = device_memory(arguments)
    if memory is None:
        return facts
    needed, largest = max((stage.least or stage.memory, stage.name) for stage in stages)
    if needed > memory:
        raise InputError(
            f"{largest}: needs about {size_text(needed)} on each device, {source} has {size_text(memory)}; "
            "use more processes, or --sharded (FSDP)"
        )
    fewer = ", training with fewer rows at once" if any(stage.memory > memory for stage in stages) else ""
    return [*facts, f"memory of a device: {size_text(memory)} ({source}), enough for every stage{fewer}"]


def device_memory(arguments: PreflightArguments) -> tuple[int | None, str]:
    """Bytes of memory of one device, and whose. None where this machine has no GPU."""
    if arguments.device_memory_gb is not None:
        return int(arguments.device_memory_gb * 1e9), "--device_memory_gb"
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name(0)
    return None, ""


if __name__ == "__main__":
    main()
