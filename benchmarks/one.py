"""One stage's benchmark in a process of its own: python -m benchmarks.one STAGE SETTING.json ROWS.json"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from utils.errors import command


def main() -> None:
    from benchmarks.setting import read_setting
    from utils.allocator import keep_freed_memory
    from utils.files import write_json

    # As every command does: the stage and the bare operation it is compared with gain alike.
    keep_freed_memory()

    stage, setting, rows = sys.argv[1:]
    found = importlib.import_module(f"benchmarks.{stage}").measure(read_setting(Path(setting)))
    write_json(rows, [row.record() for row in found])


if __name__ == "__main__":
    command(main)()
