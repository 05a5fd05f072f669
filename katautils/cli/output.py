"""Aligned, coloured tables for a terminal, plain lines for a pipe."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple


class Colour(StrEnum):
    """SGR parameters."""

    RED = "31"
    GREEN = "32"
    YELLOW = "33"
    BOLD = "1"
    DIM = "2"


class Cell(NamedTuple):
    text: str
    colour: Colour | None = None


def is_terminal() -> bool:
    return sys.stdout.isatty()


def colour(cell: Cell) -> str:
    """Without colours where NO_COLOR is set (no-color.org), or the terminal has none."""
    if cell.colour is None or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return cell.text
    return f"\033[{cell.colour}m{cell.text}\033[0m"


def print_table(rows: Sequence[Sequence[Cell]]) -> None:
    """Columns as wide as they need to be; the last one is wrapped into the terminal's width."""
    if not rows:
        return
    import textwrap

    widths = [max(len(row[column].text) for row in rows) for column in range(len(rows[0]) - 1)]
    margin = sum(widths) + 2 * len(widths)
    width = max(shutil.get_terminal_size().columns - margin, 30)
    for row in rows:
        heads = [colour(cell) + " " * (w - len(cell.text)) for cell, w in zip(row, widths, strict=False)]
        last = row[-1]
        lines = [
            line
            for paragraph in last.text.splitlines() or [""]
            for line in textwrap.wrap(paragraph, width, break_on_hyphens=False) or [""]
        ]
        for number, line in enumerate(lines):
            head = "".join(f"{h}  " for h in heads) if number == 0 else " " * margin
            print((head + colour(Cell(line, last.colour))).rstrip())
