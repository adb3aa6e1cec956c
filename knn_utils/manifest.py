"""Which Arrow files make up a datastore or kNN targets, in which order, and what their manifest says.

Readers take our folder of parts, one stream file, a folder of loose shards, and a folder saved by `datasets`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.errors import InputError
from utils.files import read_json

FORMAT = "mlpmemory-parts"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
KINDS = {"datastore": "a datastore", "knn_targets": "kNN targets"}

_SHARD_OF = re.compile(r".*-[0-9]+-of-(?P<total>[0-9]+)\.arrow")


@dataclass(frozen=True)
class Part:
    """One Arrow file of an output. `rows` and `sha256` are None where nothing recorded them."""

    path: Path
    rows: int | None = None
    sha256: str | None = None


def part_name(number: int) -> str:
    """File name of part `number`."""
    return f"part-{number:05d}.arrow"


def record_name(number: int) -> str:
    """Name of the file that says part `number` is finished, while the whole is not."""
    return f"part-{number:05d}.json"


def plan_parts(rows: int, rows_per_part: int, existing: Sequence[int] = ()) -> list[int]:
    """Row counts of the parts for `rows` rows: the `existing` ones first, then parts of `rows_per_part`, a short last.

    Raises InputError when there are fewer rows than the existing parts hold.
    """
    left = rows - sum(existing)
    if left < 0:
        raise InputError(f"{rows} rows cannot follow parts that hold {sum(existing)}")
    return [*existing, *(min(rows_per_part, left - start) for start in range(0, left, rows_per_part))]


def plan_of(manifest: dict) -> list[int]:
    """Rows of each part that a manifest plans, whether the part is there or not."""
    return manifest["part_rows"] if "part_rows" in manifest else [part["rows"] for part in manifest["parts"]]


def read_manifest(folder: str | os.PathLike, kind: str) -> dict:
    """The manifest of an output folder.

    Keys: `kind`, `complete`, `rows`, `columns`, `settings` (what made the rows), `info`, `history` (of extensions),
    `parts` (a record {"file", "rows", "bytes", "sha256"} each; while incomplete those of earlier runs) and, while
    incomplete, `part_rows`. Raises InputError for anything else, and for an output of another kind.
    """
    path = Path(folder) / MANIFEST_NAME
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path}: is not a manifest of this project (no format {FORMAT!r}); name another folder")
    if manifest["format_version"] != FORMAT_VERSION:
        raise InputError(
            f"{path}: format version {manifest['format_version']}, this program reads {FORMAT_VERSION}; "
            "use the newer program"
        )
    if manifest["kind"] != kind:
        held = KINDS.get(manifest["kind"], manifest["kind"])
        raise InputError(f"{folder}: holds {held}, expected {KINDS[kind]}; name another folder")
    return manifest


def find_parts(path: str | os.PathLike, kind: str) -> tuple[list[Part], dict | None]:
    """The Arrow files that stand for the datastore or kNN targets at `path`, in row order, and the manifest if any.

    `path` is one file, a folder with a manifest, a `datasets.save_to_disk` folder (order of `state.json`) or a folder
    of shards (order of the numbers in their names). Raises InputError when something is missing, when a folder is
    incomplete, when a file has another size than recorded, and when files are not the shards of one table.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; expected {KINDS[kind]}")
    if not path.is_dir():
        return [Part(path)], None
    if (path / MANIFEST_NAME).exists():
        manifest = read_manifest(path, kind)
        return _recorded_parts(path, manifest), manifest
    if (path / "state.json").exists():
        return [Part(path / entry["filename"]) for entry in read_json(path / "state.json")["_data_files"]], None
    if (path / "dataset_dict.json").exists():
        splits = ", ".join(sorted(item.name for item in path.iterdir() if item.is_dir()))
        raise InputError(f"{path}: holds several splits ({splits}); name one of them")
    return _loose_shards(path, kind), None


def part_sizes(folder: Path) -> dict[str, int]:
    """Name and size of each file of a part that is in the folder."""
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if entry.name.startswith("part-")}


def _recorded_parts(folder: Path, manifest: dict) -> list[Part]:
    sizes, plan = part_sizes(folder), plan_of(manifest)
    if not manifest["complete"]:
        done = sum(part_name(number) in sizes for number in range(len(plan)))
        raise InputError(
            f"{folder}: is incomplete, {done} of {len(plan)} parts are there; "
            "run the command that makes it again, it continues"
        )
    for record in manifest["parts"]:
        found = sizes.get(record["file"])
        if found != record["bytes"]:
            there = "is missing" if found is None else f"has {found} bytes"
            raise InputError(
                f"{folder / record['file']}: {there}, the manifest records {record['bytes']} bytes; "
                "run the command that made it again, which writes this part anew"
            )
    return [Part(folder / record["file"], record["rows"], record["sha256"]) for record in manifest["parts"]]


def _loose_shards(folder: Path, kind: str) -> list[Part]:
    """Arrow files of a folder that nothing describes: shards of one table if their names differ in numbers only."""
    names = [item.name for item in folder.glob("[!.]*.arrow") if item.is_file()]
    if not names:
        inside = sorted(item.name for item in folder.iterdir() if item.is_dir() and not item.name.startswith("."))
        hint = f"it has the folders {', '.join(inside[:5])}: name one of them" if inside else "it was never written"
        raise InputError(f"{folder}: no Arrow file in it, expected {KINDS[kind]}; {hint}")
    if len({re.sub(r"[0-9]+", "#", name) for name in names}) > 1:
        shown = ", ".join(sorted(names)[:4])
        raise InputError(f"{folder}: its Arrow files are not the shards of one table ({shown}); name one of them")
    numbered = _SHARD_OF.fullmatch(names[0])
    if numbered and len(names) != int(numbered["total"]):
        raise InputError(f"{folder}: {len(names)} of {int(numbered['total'])} shards are there; fetch the missing ones")
    names.sort(key=lambda name: [int(number) for number in re.findall(r"[0-9]+", name)])
    return [Part(folder / name) for name in names]
