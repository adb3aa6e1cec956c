"""Which files make up a datastore or a set of kNN targets, and do they match what was recorded.

Knows names, sizes, checksums and `manifest.json`; knows nothing of Arrow, of rows' contents or of who writes.
A manifest is data from outside: every field is checked before it is used, and no name in it leaves the folder.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import InputError
from utils.files import read_json, sha256_file

FORMAT = "mlpmemory-parts"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
KINDS = {"datastore": "a datastore", "knn_targets": "kNN targets"}

_PART_NAME = re.compile(r"part-[0-9]{5,12}\.arrow")
_RECORD_NAME = re.compile(r"part-[0-9]{5,12}\.json")
_SHARD_OF = re.compile(r"(?P<stem>.*)-(?P<number>[0-9]{1,9})-of-(?P<total>[0-9]{1,9})\.arrow")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Larger JSON is no manifest of ours: a million parts take about 200 MB.
_JSON_LIMIT = 256 << 20
# An Arrow row of either kind takes at least its int32 columns; more rows than this in a file is a lie.
_LEAST_ROW_BYTES = 4


@dataclass(frozen=True)
class Part:
    """One Arrow file of an output. `rows`, `bytes` and `sha256` are None where nothing recorded them."""

    path: Path
    rows: int | None = None
    bytes: int | None = None
    sha256: str | None = None


def part_name(number: int) -> str:
    """File name of part `number`."""
    return f"part-{number:05d}.arrow"


def record_name(number: int) -> str:
    """Name of the file that says part `number` is finished, while the whole is not."""
    return f"part-{number:05d}.json"


def is_own_file(name: str) -> bool:
    """Whether a file name in an output folder is one that this format writes (parts, records, manifest)."""
    return name == MANIFEST_NAME or bool(_PART_NAME.fullmatch(name) or _RECORD_NAME.fullmatch(name))


def plan_parts(rows: int, rows_per_part: int, existing: list[int] | None = None) -> list[int]:
    """Row counts of the parts for `rows` rows: the `existing` ones first, then parts of `rows_per_part`, a short last.

    Raises InputError when there are fewer rows than the existing parts hold.
    """
    parts = list(existing or [])
    left = rows - sum(parts)
    if left < 0 or rows_per_part < 1:
        raise InputError(f"{rows} rows cannot follow parts that hold {sum(parts)} (rows per part: {rows_per_part})")
    return parts + [min(rows_per_part, left - start) for start in range(0, left, rows_per_part)]


def existing_part_rows(path: str | os.PathLike, kind: str) -> list[int] | None:
    """The plan (rows of each part) of the output at `path`, complete or not; None when there is none.

    What a growing corpus needs: further parts follow these. Raises InputError for a damaged manifest or another kind.
    """
    folder = Path(path)
    if not (folder / MANIFEST_NAME).is_file():
        return None
    return plan_of(read_manifest(folder, kind))


def plan_of(manifest: dict) -> list[int]:
    """Rows of each part, from a checked manifest."""
    return list(manifest["part_rows"]) if "part_rows" in manifest else [part["rows"] for part in manifest["parts"]]


def read_bounded_json(path: Path) -> Any:
    """JSON of a file of ordinary size. Raises InputError for anything else."""
    require_file(path)
    if path.stat().st_size > _JSON_LIMIT:
        raise InputError(f"{path}: {path.stat().st_size} bytes, too large to be a manifest; make the output again")
    try:
        return read_json(path)
    except InputError:
        raise
    except (ValueError, MemoryError) as error:
        # json refuses integers of thousands of digits with a plain ValueError
        raise InputError(f"{path}: is not readable JSON ({error}); make the output again") from None


def require_file(path: Path) -> int:
    """Size in bytes of a regular file. Raises InputError for what is missing or is a pipe, a device or a folder."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no such file; make it again or correct the path") from None
    except ValueError as error:
        raise InputError(f"{str(path)!r}: is no path ({error})") from None
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path}: is not a regular file; expected an Arrow or JSON file")
    return found.st_size


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def check_record(record: Any, source: str) -> dict:
    """A part's record {"file", "rows", "bytes", "sha256"}, checked. Raises InputError naming `source`."""

    def refuse(what: str) -> InputError:
        return InputError(f"{source}: {what}; the manifest is damaged: delete the folder and make the output again")

    if not isinstance(record, dict):
        raise refuse("a part's record is not a JSON object")
    name, rows, size, digest = (record.get(key) for key in ("file", "rows", "bytes", "sha256"))
    if not (isinstance(name, str) and _PART_NAME.fullmatch(name)):
        raise refuse(f"part file name {str(name)[:80]!r}, expected a plain name such as part-00000.arrow")
    if not (_is_count(rows) and _is_count(size)):
        raise refuse(f"{name} has rows {str(rows)[:40]!r} and bytes {str(size)[:40]!r}, expected whole numbers")
    if rows * _LEAST_ROW_BYTES > size:
        raise refuse(f"{name} claims {rows} rows in {size} bytes")
    if not (isinstance(digest, str) and _SHA256.fullmatch(digest)):
        raise refuse(f"{name} has no SHA-256")
    return {"file": name, "rows": rows, "bytes": size, "sha256": digest}


def read_manifest(folder: Path, kind: str | None = None) -> dict:
    """The manifest of an output folder, every field checked.

    Returns a dict with `kind`, `complete`, `rows`, `parts` (a record or None for each part), `part_rows` (only while
    incomplete), `columns`, `settings`, `info`, `history`. Raises InputError in one line for anything unexpected, and
    when `kind` is given and the folder holds the other kind.
    """
    path = Path(folder) / MANIFEST_NAME
    manifest = read_bounded_json(path)

    def refuse(what: str) -> InputError:
        return InputError(f"{path}: {what}; the manifest is damaged: delete the folder and make the output again")

    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path}: is not a manifest of this project (no format {FORMAT!r}); name another folder")
    if manifest.get("format_version") != FORMAT_VERSION:
        found = str(manifest.get("format_version"))[:40]
        raise InputError(f"{path}: format version {found}, this program reads {FORMAT_VERSION}; use the newer program")
    if not isinstance(manifest.get("kind"), str) or manifest["kind"] not in KINDS:
        raise refuse(f"kind {str(manifest.get('kind'))[:40]!r}, expected one of {', '.join(KINDS)}")
    if kind is not None and manifest["kind"] != kind:
        raise InputError(f"{folder}: holds {KINDS[manifest['kind']]}, expected {KINDS[kind]}; name another folder")
    if not isinstance(manifest.get("complete"), bool):
        raise refuse("'complete' is not true or false")
    for key, expected in (("settings", dict), ("info", dict), ("history", list), ("columns", list)):
        if not isinstance(manifest.setdefault(key, expected()), expected):
            raise refuse(f"{key!r} is of the wrong type")
    if not isinstance(manifest.get("parts"), list):
        raise refuse("'parts' is not a list")
    records = [None if part is None else check_record(part, str(path)) for part in manifest["parts"]]
    names = [record["file"] for record in records if record]
    if len(set(names)) < len(names):
        raise refuse("a part is listed twice")
    if manifest["complete"]:
        manifest.pop("part_rows", None)
        if None in records:
            raise refuse("it is complete but lacks the record of a part")
        plan = [record["rows"] for record in records]
    else:
        plan = manifest.get("part_rows")
        if not (isinstance(plan, list) and all(_is_count(rows) and rows > 0 for rows in plan)):
            raise refuse("'part_rows' is not a list of whole numbers above 0")
        if len(records) > len(plan):
            raise refuse("it records more parts than it plans")
        records += [None] * (len(plan) - len(records))
    if not _is_count(manifest.get("rows")) or sum(plan) != manifest["rows"]:
        raise refuse(f"{str(manifest.get('rows'))[:40]} rows do not equal the sum of the parts, {sum(plan)}")
    manifest["parts"] = records
    return manifest


def find_parts(path: str | os.PathLike, kind: str) -> tuple[list[Part], dict | None]:
    """The Arrow files that stand for the datastore or kNN targets at `path`, in row order, and our manifest if any.

    `path` is one file, a folder with a manifest, a `datasets.save_to_disk` folder (order of `state.json`) or a folder
    of shards (order of the numbers in their names). Raises InputError in one line when something is missing, when a
    folder is incomplete, when a file's size is not the recorded one, and when files do not belong together.
    """
    path = Path(path)
    try:
        is_folder = path.is_dir()
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)[:200]!r}: is no path ({error})") from None
    if not is_folder:
        if not os.path.lexists(path):
            raise InputError(f"{path}: no such file or folder; expected {KINDS[kind]}")
        require_file(path)
        return [Part(path)], None
    if os.path.lexists(path / MANIFEST_NAME):
        manifest = read_manifest(path, kind)
        return _recorded_parts(path, manifest), manifest
    if os.path.lexists(path / "state.json"):
        return _saved_dataset_parts(path), None
    if os.path.lexists(path / "dataset_dict.json"):
        splits = sorted(item.name for item in path.iterdir() if (item / "state.json").is_file())
        raise InputError(f"{path}: holds several splits ({', '.join(splits)}); name one, such as {path}/train")
    return _loose_shards(path, kind), None


def _recorded_parts(folder: Path, manifest: dict) -> list[Part]:
    if not manifest["complete"]:
        done = sum(
            record is not None or (folder / record_name(number)).is_file()
            for number, record in enumerate(manifest["parts"])
        )
        raise InputError(
            f"{folder}: is incomplete, {done} of {len(manifest['parts'])} parts are there; "
            "run the command that makes it again, it continues"
        )
    parts = []
    for record in manifest["parts"]:
        part = Part(folder / record["file"], record["rows"], record["bytes"], record["sha256"])
        size = require_file(part.path)
        if size != part.bytes:
            raise InputError(
                f"{part.path}: {size} bytes, the manifest records {part.bytes}: truncated or replaced; "
                "run the command that made it again, it writes this part anew"
            )
        parts.append(part)
    return parts


def _saved_dataset_parts(folder: Path) -> list[Part]:
    """Shards of a `datasets.save_to_disk` folder, in the order of its state file."""
    state = read_bounded_json(folder / "state.json")
    entries = state.get("_data_files") if isinstance(state, dict) else None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{folder}/state.json: names no data files; expected a folder saved by `datasets`")
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
    for name in names:
        if not isinstance(name, str) or name != os.path.basename(name) or not name.endswith(".arrow") or "\0" in name:
            raise InputError(
                f"{folder}/state.json: data file {str(name)[:80]!r}, expected a plain name ending in .arrow"
            )
    if len(set(names)) < len(names):
        raise InputError(f"{folder}/state.json: names a data file twice; save the data set again")
    for name in names:
        require_file(folder / name)
    return [Part(folder / name) for name in names]


def _loose_shards(folder: Path, kind: str) -> list[Part]:
    """Arrow files of a folder that nothing describes: shards of one table if their names differ in numbers only."""
    names = [
        item.name
        for item in folder.iterdir()
        if item.name.endswith(".arrow") and not item.name.startswith(".") and item.is_file()
    ]
    if not names:
        hint = "its files are missing or it was never written"
        folders = sorted(item.name for item in folder.iterdir() if item.is_dir() and not item.name.startswith("."))
        if folders:
            hint = f"it has the folders {', '.join(folders[:5])}: name one of them"
        raise InputError(f"{folder}: no Arrow file in it, expected {KINDS[kind]}; {hint}")
    if len({re.sub(r"[0-9]+", "#", name) for name in names}) > 1:
        shown = ", ".join(sorted(names)[:4])
        raise InputError(f"{folder}: its Arrow files are not the shards of one table ({shown}); name one of them")
    names.sort(key=lambda name: [int(number) for number in re.findall(r"[0-9]{1,18}", name)])
    matches = [_SHARD_OF.fullmatch(name) for name in names]
    if all(matches):
        total = max(int(match["total"]) for match in matches)
        if len(names) != total or len({(match["stem"], int(match["number"])) for match in matches}) != total:
            raise InputError(f"{folder}: {len(names)} of {total} shards are there; fetch the missing ones")
    return [Part(folder / name) for name in names]


def verify_parts(parts: list[Part]) -> None:
    """Compare the recorded checksums with the files, reading all of them. Raises InputError naming the first bad part."""
    for part in parts:
        if part.sha256 is not None and sha256_file(part.path) != part.sha256:
            raise InputError(
                f"{part.path}: does not match its checksum, a byte was changed; "
                "run the command that made it again, it writes this part anew"
            )
