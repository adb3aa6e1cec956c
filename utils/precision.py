"""Print the precision to compute in: python -m utils.precision auto|float32|bfloat16|float16."""

from __future__ import annotations

import sys

from utils.errors import InputError, command


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return
    from utils.loading import DTYPES, resolve_dtype

    if sys.argv[1] not in ("auto", *DTYPES):
        raise InputError(f"{sys.argv[1]}: expected auto, {', '.join(DTYPES)}")
    print(str(resolve_dtype(sys.argv[1])).removeprefix("torch."))


if __name__ == "__main__":
    command(main)()
