"""Run a command in this process and note how much of the index files was in its memory.

    python -m benchmarks.index_memory RESULT MODULE [flags of the module …]

Writes RESULT.0, or RESULT.RANK in a run of several processes: the peak of the resident bytes of mapped index files and
the growth of anonymous memory, sampled from /proc/self/smaps while the command runs.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import threading
from pathlib import Path

SAMPLE_SECONDS = 0.1
MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ ")


def resident_bytes(suffix: str) -> int:
    """Resident bytes of this process's mappings of files whose names end in `suffix`."""
    total, counted = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if MAPPING.match(line):
            counted = line.endswith(suffix)
        elif counted and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


class MappedMemory(threading.Thread):
    """Watches `resident_bytes`; `peak` is its largest value until `stop()`."""

    def __init__(self, suffix: str) -> None:
        super().__init__(daemon=True)
        self.suffix, self.peak = suffix, 0
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, resident_bytes(self.suffix))

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def main() -> None:
    from benchmarks.measure import AnonymousMemory
    from utils.files import write_json

    result, module, *flags = sys.argv[1:]
    command = importlib.import_module(module).main
    sys.argv = [module, *flags]
    mapped = MappedMemory(".index")
    mapped.start()
    with AnonymousMemory() as anonymous:
        command()
    mapped.stop()
    figures = {"mapped_bytes": mapped.peak, "anonymous_bytes": anonymous.peak - anonymous.before}
    write_json(f"{result}.{os.environ.get('RANK', '0')}", figures)


if __name__ == "__main__":
    main()
