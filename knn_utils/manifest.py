"""Which Arrow files stand for a datastore or kNN targets: a folder of parts with its manifest, one stream, loose shards,
or a folder saved by `datasets`. parts.py writes the folders."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from utils.errors import InputError
from utils.files import read_json

FORMAT = ["mlpmemory-parts", 1]
MANIFEST_NAME = "manifest.json"
KINDS = {"datastore": "a datastore", "knn_targets": "kNN targets"}


@dataclass(frozen=True)
class Part:
    """One Arrow file of an output. `rows` and `sha256` are None where nothing recorded them."""

    path: Path
    rows: int | None = None
    sha256: str | None = None


def part_name(number: int, suffix: str = ".arrow") -> str:
    """File name of part `number`; with `.json`, of its record, which is there until the manifest is complete."""
    return f"part-{number:05d}{suffix}"


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
    if not isinstance(manifest, dict) or [manifest.get(key) for key in ("format", "format_version")] != FORMAT:
        raise InputError(f"{path}: is no manifest that this program reads (format {FORMAT}); name another folder")
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
        raise InputError(f"{path}: holds several splits; name one of them, such as {path}/train")
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
        if (found := sizes.get(record["file"])) != record["bytes"]:
            raise InputError(
                f"{folder / record['file']}: has {found or 'no'} bytes, the manifest records {record['bytes']}; "
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
        raise InputError(f"{folder}: its Arrow files are not the shards of one table; name one of them")
    numbered = re.fullmatch(r".*-[0-9]+-of-([0-9]+)\.arrow", names[0])
    if numbered and len(names) != int(numbered[1]):
        raise InputError(f"{folder}: {len(names)} of {int(numbered[1])} shards are there; fetch the missing ones")
    names.sort(key=lambda name: [int(number) for number in re.findall(r"[0-9]+", name)])
    return [Part(folder / name) for name in names]
