"""Command lines from dataclasses: a field is a flag, its `help` metadata the text, its default the default.

Imports no torch, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import field
from typing import Any, NoReturn

from utils.errors import EXIT_BAD_INPUT, one_line


def flag(default: Any, text: str, **metadata: Any) -> Any:
    """A dataclass field that becomes a command-line flag with `text` as its help. Lists get their own copy."""
    described = {"help": text, **metadata}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=described)
    return field(default=default, metadata=described)


def required(text: str, **metadata: Any) -> Any:
    """A dataclass field that becomes a flag which must be given."""
    return field(metadata={"help": text, **metadata})


def make_parser(dataclass_types: Sequence[type], description: str) -> Any:
    """A `HfArgumentParser` over `dataclass_types` whose errors are one line with exit status 2."""
    from transformers.hf_argparser import HfArgumentParser

    class OneLineParser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            print(f"error: {one_line(message)}; see --help", file=sys.stderr)
            raise SystemExit(EXIT_BAD_INPUT)

    return OneLineParser(list(dataclass_types), description=description, allow_abbrev=False)


def parse(*dataclass_types: type, description: str, arguments: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Parse the command line into one instance of each dataclass.

    Unknown flags, missing flags and values of the wrong type end in one line and exit status 2.
    """
    parser = make_parser(dataclass_types, description)
    try:
        *instances, unknown = parser.parse_args_into_dataclasses(
            args=arguments, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, ImportError) as error:  # transformers' own dataclass checks its values when it is made
        parser.error(str(error))
    if unknown:
        parser.error(f"unknown argument {unknown[0]}")
    return tuple(instances)


def given(name: str) -> bool:
    """Whether this process's command line has the flag `--name`."""
    return any(word == f"--{name}" or word.startswith(f"--{name}=") for word in sys.argv[1:])


def note_unused(names: Sequence[str], why: str) -> None:
    """Say in one line each that the flags among `names` on the command line have no use, and `why`."""
    from utils.loading import say

    for name in names:
        if given(name):
            say(f"--{name}: has no use {why}")
