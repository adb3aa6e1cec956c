"""Artefacts: what one stage writes and the next one reads, and the one protocol by which they are written.

An artefact is a folder, or a single file (an index, a gate, results). Its `made.json`, in the folder or beside the file, is written
last and says what it is; the SHA-256 of that text is its id. Before that the text lies in `making.json`, by which an
interrupted command recognises its own work. Units of work are files `part-00000.arrow` …: a unit is done if its name
exists, and rank r of n makes every n-th. What the original or the hub published has neither; it is read as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from utils.errors import InputError, one_line
from utils.files import atomic, ensure_folder, finite, lock_folder, read_json, remove, sync

COMPLETE, BEGUN = "made.json", "making.json"
SINGLE_FILES = (".index", ".safetensors", ".json")  # artefacts of one file


@dataclass(frozen=True)
class Made:
    """What an artefact is: kind, the settings that decide its content, rows, the ids of what it was made from. `text` is
    the content of made.json, `id` its SHA-256."""

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    rows: int | None = None
    made_from: dict[str, str | None] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return json.dumps(finite(asdict(self)), indent=1, sort_keys=True, default=str) + "\n"

    @property
    def id(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def record_path(path: str | os.PathLike, name: str = COMPLETE) -> Path:
    """Where the record of the artefact at `path` lies: in the folder, or beside the single file."""
    path = Path(path)
    return path.with_name(f"{path.name}.{name}") if path.suffix in SINGLE_FILES else path / name


def read_made(path: str | os.PathLike, name: str = COMPLETE) -> Made | None:
    """The record of the artefact at `path`; None where there is none. Raises InputError for a damaged one."""
    record = record_path(path, name)
    if not record.is_file():
        return None
    try:
        return Made(**read_json(record))
    except TypeError:
        raise InputError(f"{record}: is not the record of an artefact; make {path} again") from None


def require(path: str | os.PathLike, made: Made | None, **expected: Any) -> None:
    """Refuse the artefact at `path` if it was made from something else than `expected`.

    Names are those in `made_from` or in `settings`; None on either side is not compared. Raises InputError naming both values.
    """
    for name, here in expected.items():
        there = made and made.made_from.get(name, made.settings.get(name))
        if there is not None and here is not None and there != here:
            raise InputError(
                f"{path}: was made with {name} {str(there)[:12]}, but {name} {str(here)[:12]} is given; name files of the "
                "same base, block and windows"
            )


@dataclass
class Making:
    """An artefact that is being made by all processes of a run. `done`: it was complete already."""

    path: Path
    made: Made
    done: bool
    state: Any = None
    lock: Any = None

    def part(self, number: int, suffix: str = ".arrow") -> Path:
        return self.path / f"part-{number:05d}{suffix}"

    def own_parts(self, count: int, suffix: str = ".arrow") -> list[int]:
        """The units, of `count`, that this process still has to make."""
        rank, processes = (self.state.process_index, self.state.num_processes) if self.state else (0, 1)
        return [number for number in range(rank, count, processes) if not self.part(number, suffix).exists()]

    def finish(self) -> Made:
        """Wait for all processes, then declare the artefact complete (a collective call). Returns its record."""
        if self.state:
            self.state.wait_for_everyone()
        if not self.done and (self.state is None or self.state.is_main_process):
            os.replace(record_path(self.path, BEGUN), record_path(self.path))
            sync(record_path(self.path).parent, deep=False)
        if self.state:
            self.state.wait_for_everyone()
        self.close()
        return self.made

    def close(self) -> None:
        if self.lock:
            self.lock.close()


def begin(path: str | os.PathLike, made: Made, *, overwrite: bool = False, state: Any = None) -> Making:
    """Begin or continue to make the artefact at `path` (a collective call of the processes in accelerate's `state`).

    A complete artefact of the same record is `done`, one that was begun with the same record is continued; `overwrite`
    deletes what is complete and what has another record. Raises InputError for an artefact of other settings, a foreign
    file, and another run that is writing there.
    """
    path, lock = Path(path), None
    if state is None or state.is_main_process:
        is_file = path.suffix in SINGLE_FILES
        folder = ensure_folder(path.parent if is_file else path)
        lock = lock_folder(folder, f".{path.name}.lock" if is_file else ".lock")
        complete, begun = read_made(path), read_made(path, BEGUN)
        there = complete or begun
        items = [path] if is_file else sorted(item for item in folder.iterdir() if not item.name.startswith("."))
        problem = None
        if there and there.text != made.text:
            problem = f"was made with other settings ({differences(there, made)})"
        elif there is None and any(item.exists() for item in items):
            problem = f"holds other files ({items[0].name})"
        if problem and not overwrite:
            lock.close()
            raise InputError(f"{path}: {problem}; choose another path, or --overwrite")
        if overwrite and (complete or not there or there.text != made.text):
            own = items if there else [item for item in items if item.name.startswith("part-")]
            for item in (record_path(path), record_path(path, BEGUN), *own):  # the records first
                remove(item)
            complete = None
        if not complete:
            with atomic(record_path(path, BEGUN)) as temporary:
                temporary.write_text(made.text, encoding="utf-8")
    if state:
        state.wait_for_everyone()
    return Making(path, made, record_path(path).exists(), state, lock)


def differences(before: Made, now: Made) -> str:
    """What differs between two records, as one line."""
    there, here = ({"kind": each.kind, "rows": each.rows, **each.settings, **each.made_from} for each in (before, now))
    names = sorted(name for name in there.keys() | here.keys() if str(there.get(name)) != str(here.get(name)))
    return one_line("; ".join(f"{name}: {there.get(name)} there, {here.get(name)} now" for name in names), 400)
