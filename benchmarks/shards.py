"""One index against shards of it: are the hits the same, and how much of the index is in each process's memory?

    python -m benchmarks.shards                        600,000 keys of width 128, three shards: some minutes
    python -m benchmarks.shards --rows 2000000 --shards 8

Keys are random around random centres. The same search (`saveKNNMulti`, all inverted lists probed, so that every page of
the index is needed) runs over one index file in one process, over its shards in one process, and over the shards in as
many processes as there are shards. Ends with an error where the targets differ.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.process_counts import launch, run
from utils.cli import flag, parse
from utils.errors import InputError, command

PART_ROWS = 1 << 16
CENTRES = 256


@dataclass
class ShardArguments:
    """Sizes of the index and the search."""

    output: str = flag("results/shards", "folder of everything, with results.json")
    rows: int = flag(600_000, "indexed keys")
    dim: int = flag(128, "width of the keys")
    queries: int = flag(2_048, "rows that are searched")
    shards: int = flag(3, "shards, and processes")
    k: int = flag(64, "neighbours")
    index_factory: str = flag("IVF64,Flat", "index")
    threads: int = flag(1, "threads of each process")
    seed: int = flag(0, "of keys and queries")


@command
def main() -> None:
    """Entry point of `python -m benchmarks.shards`."""
    (arguments,) = parse(ShardArguments, description="One index against shards of it: hits and memory.")
    for name, value in vars(arguments).items():
        if isinstance(value, int) and name != "seed" and value < 1:
            raise InputError(f"--{name} {value}: expected 1 or more")
    from utils.files import ensure_folder, write_json

    output = ensure_folder(arguments.output).resolve()
    keys, queries = output / "dstore_random_keys.arrow", output / "dstore_random_queries.arrow"
    for path, rows, seed in ((keys, arguments.rows, arguments.seed), (queries, arguments.queries, arguments.seed + 1)):
        write_random_datastore(path, rows, arguments.dim, seed)
    whole, shards = output / "whole.index", output / "shards.index"
    built = ("-m", "knn_utils.build_index", "--dstore_path", keys, "--index_factory", arguments.index_factory)
    run(output / "whole.log", arguments.threads, *built, "--index_path", whole)
    run(output / "shards.log", arguments.threads, *built, "--index_path", shards, "--num_shards", arguments.shards)
    found = [
        measure(arguments, output, queries, keys, index, processes)
        for index, processes in ((whole, 1), (shards, 1), (shards, arguments.shards))
    ]
    write_json(output / "results.json", found)
    print(table(found))
    if len({one["targets"] for one in found}) > 1:
        raise InputError(f"{output}: the searches differ; see the table")


def write_random_datastore(path: Path, rows: int, dim: int, seed: int) -> None:
    """A datastore of `rows` keys around common centres; a complete one of this size is kept."""
    import numpy as np

    from knn_utils.datastore import datastore_batch, datastore_schema
    from knn_utils.parts import PartedOutput

    plan = [min(PART_ROWS, rows - start) for start in range(0, rows, PART_ROWS)]
    output = PartedOutput(
        path,
        kind="datastore",
        settings={"dim": dim, "seed": seed, "rows": rows},
        part_rows=plan,
        schema=datastore_schema(dim),
        overwrite=False,
    )
    centres = np.random.default_rng(0).standard_normal((CENTRES, dim)) * 2
    for number in output.mine():
        random = np.random.default_rng((seed, number))
        near = centres[random.integers(0, CENTRES, plan[number])]
        batch_keys = (near + random.standard_normal(near.shape)).astype(np.float16)
        values = random.integers(0, 50_000, plan[number]).astype(np.int32)
        with output.write(number) as part:
            part.write(datastore_batch(batch_keys, values))
    if not output.complete:
        output.finish()


def measure(
    arguments: ShardArguments, output: Path, queries: Path, keys: Path, index: Path, processes: int
) -> dict[str, Any]:
    """One search: checksum of its targets, and each process's memory."""
    from knn_utils.faiss_files import find_index
    from utils.files import read_json

    name = f"{index.stem}-{processes}"
    targets, result = output / f"targets-{name}", output / f"memory-{name}"
    shutil.rmtree(targets, ignore_errors=True)
    lists = "".join(filter(str.isdigit, arguments.index_factory.split(",")[0])) or "1"
    launch(
        *(output / f"{name}.log", processes, arguments.threads, "benchmarks.index_memory", result),
        *("knn_utils.saveKNNMulti", "--dstore_path", queries, "--index_path", index, "--val_path", keys),
        *("--output_path", targets, "--k", arguments.k, "--knn_temp", 16, "--probe", lists, "--part_rows", 256),
    )
    shards = find_index(index).shards
    digest = hashlib.sha256()
    for part in sorted(targets.glob("part-*.arrow")):
        digest.update(part.read_bytes())
    return {
        "index": index.name,
        "shards": len(shards),
        "processes": processes,
        "index_bytes": sum(shard.path.stat().st_size for shard in shards),
        "targets": digest.hexdigest(),
        "memory": [read_json(f"{result}.{rank}") for rank in range(processes)],
    }


def table(found: list[dict[str, Any]]) -> str:
    """The searches as a Markdown table: megabytes of each process."""
    lines = [
        "| index files | processes | MB on disk | MB of the index resident in each process | anonymous MB of each "
        "| targets, SHA-256 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one in found:
        mapped, anonymous = (
            ", ".join(f"{figures[kind] / 1e6:.0f}" for figures in one["memory"])
            for kind in ("mapped_bytes", "anonymous_bytes")
        )
        lines.append(
            f"| {one['shards']} | {one['processes']} | {one['index_bytes'] / 1e6:.0f} | {mapped} | {anonymous} "
            f"| {one['targets'][:16]}… |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
