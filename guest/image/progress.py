"""How far the build is: one live line on a terminal, one plain line a step otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


class Progress:
    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self.stream = stream
        self.live = stream.isatty()
        self.title = ""

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        start = time.monotonic()
        self.title = title
        if self.live:
            self.stream.write(f"\r\x1b[K  ...   {title}")
            self.stream.flush()
        try:
            yield
        except BaseException:
            self._end(f"failed {title}")
            raise
        self._end(f"ok     {title} ({time.monotonic() - start:.1f}s)")

    def _end(self, line: str) -> None:
        self.stream.write(f"\r\x1b[K  {line}\n" if self.live else f"  {line}\n")
        self.stream.flush()

    def detail(self, text: str) -> None:
        """Beside the title of the running step; only a terminal shows it."""
        if self.live:
            self.stream.write(f"\r\x1b[K  ...   {self.title}: {text}")
            self.stream.flush()

    def say(self, text: str) -> None:
        self._end(text)
