"""Run a command in this process and note its time and its peak of anonymous memory.

python -m benchmarks.memory RESULT.json MODULE [flags of the module …]
"""

from __future__ import annotations

import importlib
import sys
import time


def main() -> None:
    from benchmarks.measure import AnonymousMemory
    from utils.files import write_json

    result, module, *flags = sys.argv[1:]
    sys.argv = [module, *flags]
    start = time.perf_counter()
    with AnonymousMemory() as memory:
        importlib.import_module(module).main()
    seconds = time.perf_counter() - start
    write_json(result, {"peak_bytes": memory.peak, "before_bytes": memory.before, "seconds": seconds})


if __name__ == "__main__":
    main()
