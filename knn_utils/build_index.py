"""Datastore in, FAISS index out: trained once, then filled row by row, over squared L2 (the original's IVFPQ by
default, any FAISS factory string with --index_factory).

One process writes one index file; several (`accelerate launch`), or --num_shards, write a folder of shards, each the
work of one process. Beside it go the values of the indexed rows (`{subset}_vals.npy`) and a record of what made it.
An interrupted build continues; a complete one is left alone; --extend adds the rows that a datastore has grown by.
"""

from __future__ import annotations

if __package__ in (None, ""):
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import re
from dataclasses import dataclass
from pathlib import Path

from utils.cli import flag, parse, required
from utils.errors import InputError, command

# FAISS asks for this many points per centroid.
LEAST_POINTS = 39
# Of a sub-quantiser, in any use; what asks for more is left to FAISS to refuse.
MOST_CENTROIDS = 1 << 16


@dataclass
class BuildArguments:
    """Flags of build_index."""

    dstore_path: str = required("datastore whose keys are indexed: a folder or an Arrow stream of train_base")
    index_path: str | None = flag(None, "the index to write; default {subset}_{dim}.index beside the datastore")
    ncentroids: int = flag(4096, "inverted lists; lowered to what the number of rows supports")
    code_size: int = flag(32, "bytes of a compressed key (sub-quantisers of 8 bits); must divide the keys' width")
    probe: int = flag(8, "inverted lists searched where a search does not say otherwise")
    index_factory: str | None = flag(
        None, "FAISS factory string in place of --ncentroids and --code_size: Flat, IVF512,Flat, IVF4096,PQ64, …"
    )
    num_keys_to_add_at_a_time: int = flag(500_000, "keys added before the next look at whether to save a long build")
    seed: int = flag(1, "seed of the training sample and of the clustering")
    num_shards: int | None = flag(None, "index files that share the rows; default one for each process")
    layer_position: int | None = flag(None, "refuse a datastore that was captured at another block")
    knn_gpu: bool = flag(False, "train and add on the GPU where FAISS has one")
    extend: bool = flag(False, "add the rows that the datastore has grown by to the index, without training again")
    overwrite: bool = flag(False, "replace an index that is there")


@command
def main() -> None:
    """Entry point of `python -m knn_utils.build_index`."""
    (arguments,) = parse(BuildArguments, description="Build a FAISS index over the keys of a datastore.")
    for name in ("num_keys_to_add_at_a_time", "probe", "ncentroids", "code_size", "num_shards"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: expected 1 or more")
    from knn_utils.datastore import Datastore
    from knn_utils.index_build import IndexBuild
    from utils.made_with import check_layer

    path = Path(arguments.dstore_path)
    datastore = Datastore.open(path)
    check_layer(datastore.settings, path, arguments.layer_position)
    index_path, values_path = default_names(path, arguments.index_path)
    factory, remarks = ("", []) if arguments.extend else choose_factory(arguments, datastore.rows, datastore.dim)
    # What the request was, not what became of it: a datastore that grows must not look like a changed request.
    settings = {"index_factory": arguments.index_factory, "seed": arguments.seed}
    if not arguments.index_factory:
        settings |= {"ncentroids": arguments.ncentroids, "code_size": arguments.code_size}
    IndexBuild(
        datastore,
        index_path,
        values_path,
        factory=factory,
        remarks=remarks,
        settings=settings,
        seed=arguments.seed,
        probe=arguments.probe,
        keys_at_a_time=arguments.num_keys_to_add_at_a_time,
        num_shards=arguments.num_shards,
        gpu=arguments.knn_gpu,
        extend=arguments.extend,
        overwrite=arguments.overwrite,
    ).run()


def default_names(dstore_path: Path, index_path: str | None) -> tuple[Path, Path]:
    """(index, values): the original's `{subset}_{dim}.index` and our `{subset}_vals.npy` beside it.

    Subset and width are those in the datastore's name `dstore_{model_type}_{subset}_{dim}.arrow`; a datastore of
    another name lends its own.
    """
    stem = dstore_path.name.removesuffix(".arrow")
    match = re.fullmatch(r"dstore_.+_(?P<subset>[^_]+)_(?P<dim>[0-9]+)", stem)
    subset, name = (match["subset"], f"{match['subset']}_{match['dim']}") if match else (stem, stem)
    index = Path(index_path) if index_path else dstore_path.parent / f"{name}.index"
    if index.suffix != ".index":
        raise InputError(f"--index_path {index}: expected a name that ends in .index")
    return index, index.parent / f"{subset}_vals.npy"


def choose_factory(arguments: BuildArguments, rows: int, dim: int) -> tuple[str, list[str]]:
    """The factory string that `rows` keys of width `dim` support, and what there is to say about the choice.

    Raises:
        InputError: --code_size does not divide the width.
    """
    remarks: list[str] = []
    if arguments.index_factory:
        factory = arguments.index_factory
    else:
        if dim % arguments.code_size:
            sizes = ", ".join(str(size) for size in range(1, min(dim, 256) + 1) if dim % size == 0)
            raise InputError(
                f"--code_size {arguments.code_size}: does not divide the keys' width {dim}; give one of {sizes}"
            )
        factory = f"IVF{arguments.ncentroids},PQ{arguments.code_size}"
    needed = quantiser_centroids(factory)
    if rows < needed <= MOST_CENTROIDS:
        remarks.append(
            f"{rows} keys are too few for product quantisation, which needs {needed}: "
            f"exact index (Flat) instead of {factory}"
        )
        return "Flat", remarks
    most = max(rows // LEAST_POINTS, 1)

    def lowered(match: re.Match[str]) -> str:
        wanted = int(match[1])
        if wanted <= most:
            return match[0]
        remarks.append(
            f"centroids lowered from {wanted} to {most}: {rows} keys, and each centroid needs {LEAST_POINTS}"
        )
        return f"IVF{most}"

    factory = re.sub(r"\bIVF([0-9]+)", lowered, factory)
    if rows < needed * LEAST_POINTS:
        remarks.append(
            f"{rows} keys train the product quantiser, {needed * LEAST_POINTS} would do it well; "
            "at this size --index_factory Flat is exact and fast"
        )
    return factory, remarks


def quantiser_centroids(factory: str) -> int:
    """Centroids that each sub-quantiser of a factory string has: 2 to the bits in PQ64x4, 256 for PQ64, 0 without."""
    match = re.search(r"\bPQ[0-9]+(?:x([0-9]{1,2}))?", factory)
    return 1 << int(match[1] or 8) if match else 0


if __name__ == "__main__":
    main()
