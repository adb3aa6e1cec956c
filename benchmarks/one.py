"""One stage's benchmark in a process of its own: python -m benchmarks.one STAGE SETTING.json ROWS.json"""

from __future__ import annotations

import importlib
import sys

from utils.cli import command


def main() -> None:
    """Write the rows of a stage, at the setting in one file, into another."""
    from benchmarks.run import STAGES
    from benchmarks.setting import Setting
    from utils.files import read_json, write_json
    from utils.loading import keep_freed_memory

    # As every command does: the stage and the bare operation it is compared with gain alike.
    keep_freed_memory()
    stage, setting, rows = sys.argv[1:]
    measure = getattr(importlib.import_module(f"benchmarks.{STAGES[stage]}"), stage)
    write_json(rows, [vars(row) | {"stage": stage} for row in measure(Setting(**read_json(setting)))])


if __name__ == "__main__":
    command(main)()
