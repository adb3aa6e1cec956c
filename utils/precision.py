"""Print the precision to compute in: python -m utils.precision auto|float32|bfloat16|float16."""

from __future__ import annotations

import sys

from utils.cli import command


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return
    from utils.loading import resolve_dtype

    print(str(resolve_dtype(sys.argv[1])).removeprefix("torch."))


if __name__ == "__main__":
    command(main)()
