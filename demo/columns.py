"""Two texts that grow, on a terminal: side by side in two columns, or one below the other under their names.

Knows characters and widths; nothing of models or tokens.
"""

from __future__ import annotations

import os
import sys
import unicodedata
from itertools import zip_longest
from typing import TextIO

SMALLEST_WIDTH = 80  # columns of a terminal from which on two texts stand side by side
LARGEST_WIDTH = 160


def printable(text: str) -> str:
    """`text` with nothing in it that a terminal would obey: control characters become a dot, all but line ends."""
    text = text.replace("\r", "").replace("\t", "    ")
    return "".join(
        "·" if character != "\n" and unicodedata.category(character) == "Cc" else character for character in text
    )


def character_width(character: str) -> int:
    """Columns that a character takes on a terminal: 2 for wide ones, 0 for combining ones."""
    if unicodedata.combining(character) or unicodedata.category(character) in ("Cf", "Me", "Mn"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def text_width(text: str) -> int:
    return sum(map(character_width, text))


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns, broken at blanks where there are any.

    A longer text has the same lines but its last: a line that has one after it does not change any more.
    """
    return [line for part in text.split("\n") for line in _wrap_line(part, width)]


def _wrap_line(text: str, width: int) -> list[str]:
    lines, line, used, last_blank = [], "", 0, -1
    for character in text:
        taken = character_width(character)
        if used + taken > width and character == " ":
            # The blank that does not fit ends the line and is not shown.
            lines.append(line)
            line, used, last_blank = "", 0, -1
            continue
        while line and used + taken > width:
            head, rest = (line[:last_blank], line[last_blank + 1 :]) if last_blank > 0 else (line, "")
            lines.append(head)
            line, used, last_blank = rest, text_width(rest), -1
        if character == " ":
            last_blank = len(line)
        line, used = line + character, used + taken
    return [*lines, line]


class Columns:
    """Two texts side by side, redrawn as they grow.

    Rows that neither text can change any more are left alone, so that they scroll away; only the rows below are drawn
    again. Of those, no more are shown than the terminal has lines: what is below them comes when there is room.
    """

    def __init__(self, out: TextIO, titles: tuple[str, str], *, width: int, height: int) -> None:
        bar = "│" if can_write(out, "│") else "|"
        self._out, self._bar = out, f" {bar} "
        self._column = (min(width, LARGEST_WIDTH) - 1 - len(self._bar)) // 2
        self._height = max(height - 1, 2)
        self._settled = self._drawn = 0
        for pair in zip_longest(*(wrap(title, self._column) for title in titles), fillvalue=""):
            self._row(*pair)
        rule = "─" if can_write(out, "─") else "-"
        self._row(rule * self._column, rule * self._column)

    def update(self, texts: tuple[str, str], ended: tuple[bool, bool]) -> None:
        """Show the texts as they are now; `ended` says which of them are complete."""
        left, right = (wrap(printable(text), self._column) for text in texts)
        final = [len(lines) if done else len(lines) - 1 for lines, done in zip((left, right), ended, strict=True)]
        rows = list(zip_longest(left, right, fillvalue=""))
        settled = len(rows) if all(ended) else min(n for n, done in zip(final, ended, strict=True) if not done)
        if self._drawn:
            self._out.write(f"\x1b[{self._drawn}A\x1b[J")
        for row in rows[self._settled : settled]:
            self._row(*row)
        self._settled = max(settled, self._settled)
        shown = rows[self._settled : self._settled + self._height]
        for row in shown:
            self._row(*row)
        self._drawn = len(shown)
        self._out.flush()

    def _row(self, left: str, right: str) -> None:
        padding = " " * (self._column - text_width(left))
        self._out.write(f"{left}{padding}{self._bar}{right}".rstrip() + "\n")


def can_write(out: TextIO, text: str) -> bool:
    """Whether `out` can encode `text`."""
    try:
        text.encode(getattr(out, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def columns_fit(out: TextIO) -> os.terminal_size | None:
    """The size of the terminal that `out` is, when two columns fit on it; None otherwise."""
    if not out.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        return None
    try:
        size = os.get_terminal_size(out.fileno())
    except OSError:
        return None
    return size if size.columns >= SMALLEST_WIDTH and size.lines >= 4 else None


def write_anything(out: TextIO) -> None:
    """Let `out` replace what its encoding cannot write, in place of failing."""
    if hasattr(out, "reconfigure"):
        out.reconfigure(errors="replace")


def leave_broken_pipe() -> None:
    """The reader of stdout is gone (`| head`): end without a complaint, also when Python flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
