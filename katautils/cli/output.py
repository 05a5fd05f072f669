"""Aligned, coloured tables and progress for a terminal, plain lines for a pipe."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple, Self


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


def _is_dumb() -> bool:
    return os.environ.get("TERM") == "dumb"


def colour(cell: Cell) -> str:
    """Without colours in a pipe, where NO_COLOR is set (no-color.org), or the terminal has none."""
    if cell.colour is None or not is_terminal() or os.environ.get("NO_COLOR") or _is_dumb():
        return cell.text
    return f"\033[{cell.colour}m{cell.text}\033[0m"


def mib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):.1f} MiB"


def local_time(seconds: float) -> str:
    """Of seconds since the epoch."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def print_table(rows: Sequence[Sequence[Cell]]) -> None:
    """Columns as wide as they need to be; the last one is wrapped into the terminal's width, if it is one."""
    if not rows:
        return
    import textwrap

    widths = [max(len(row[column].text) for row in rows) for column in range(len(rows[0]) - 1)]
    margin = sum(widths) + 2 * len(widths)
    width = max(shutil.get_terminal_size().columns - margin, 30) if is_terminal() else sys.maxsize
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


class Progress:
    """The steps of something slow.

    On a terminal: one line with the time since the start and the step, rewritten in place, gone at the end.
    In a pipe: a line for each step, once it has ended, with the time that it took.
    """

    _REWRITTEN_EVERY_S = 0.1

    def __init__(self) -> None:
        self._in_place = is_terminal() and not _is_dumb()
        self._started_at = time.monotonic()
        self._step = ""
        self._step_at = self._started_at
        self._lock = threading.Lock()
        self._ended = threading.Event()
        # A thread, and not a task: some steps keep the event loop from running.
        self._thread = threading.Thread(target=self._rewrite, daemon=True)

    def __enter__(self) -> Self:
        if self._in_place:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.step("")
        self._ended.set()
        if self._in_place:
            self._thread.join()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started_at

    def step(self, step: str) -> None:
        """The last one has ended, and this one begins; "": none does."""
        with self._lock:
            now = time.monotonic()
            if self._step and not self._in_place:
                print(f"{self._step} ... {now - self._step_at:.1f} s", flush=True)
            self._step, self._step_at = step, now
            self._draw()

    def close(self, line: str) -> None:
        """The steps have ended, with this line on stdout."""
        self.step("")
        with self._lock:
            print(line, flush=True)

    def say(self, line: str) -> None:
        """A line on stderr that stays, above the one that does not."""
        with self._lock:
            self._clear()
            print(line, file=sys.stderr, flush=True)
            self._draw()

    def _rewrite(self) -> None:
        while not self._ended.wait(self._REWRITTEN_EVERY_S):
            with self._lock:
                self._draw()

    def _draw(self) -> None:
        self._clear()
        if self._in_place and self._step:
            line = f"{self.elapsed_s:5.1f} s  {self._step}"
            # A line that fills the terminal would be wrapped, and then not be rewritten as a whole.
            print(line[: shutil.get_terminal_size().columns - 1], end="", flush=True)

    def _clear(self) -> None:
        if self._in_place:
            print("\r\033[K", end="", flush=True)
