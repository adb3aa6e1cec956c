"""One JSON line for each answered row, written so that an interrupted run loses no finished line."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.errors import InputError
from utils.files import read_json, write_json
from utils.legacy import remove_temporary, require_same


class Predictions:
    """`predictions.jsonl` in a folder, continued after its last complete line; `settings.json` says what made it.

    Args:
        folder: of the file; whoever writes there holds its lock.
        settings: what the lines depend on, JSON values; compared with those of an earlier run.
        overwrite: disregard what the folder holds of an earlier run, and delete it at `begin`.

    Raises:
        InputError: the folder holds lines made with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.folder, self.path, self.settings_path = folder, folder / "predictions.jsonl", folder / "settings.json"
        self.settings, self.overwrite = dict(settings), overwrite
        remove_temporary(folder)
        self.lines = [] if overwrite else self._read()

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        remedy = "choose another --output_dir or add --overwrite"
        require_same(self.path, read_json(self.settings_path), self.settings, remedy)
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            # Not splitlines: JSON text may hold other line separators than the newline.
            lines = [json.loads(line) for line in whole.split(b"\n")[:-1]]
        except ValueError:
            raise InputError(f"{self.path}: holds a damaged line; add --overwrite to answer all rows again") from None
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))
        return lines

    def begin(self) -> None:
        """Record the settings, before the first line is written; with `overwrite` what was there goes only now."""
        if self.overwrite:
            for path in (self.folder / "results.json", self.settings_path, self.path):
                path.unlink(missing_ok=True)
        write_json(self.settings_path, self.settings)

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write `lines` durably: after this call a power cut does not lose them."""
        text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self.lines.extend(map(dict, lines))
