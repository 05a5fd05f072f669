"""Timeouts that end when a test says so, and not when a host has been slow."""

import asyncio
from collections.abc import Coroutine
from typing import Any, cast


class _Loop(asyncio.SelectorEventLoop):
    skipped_s = 0.0

    def time(self) -> float:
        return super().time() + self.skipped_s


def run(body: Coroutine[Any, Any, None]) -> None:
    """As `asyncio.run`, with a clock that can `skip`."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        runner.run(body)


def skip(seconds: float) -> None:
    """The clock of the running loop goes on by that: what would time out meanwhile does so now."""
    cast(_Loop, asyncio.get_running_loop()).skipped_s += seconds
