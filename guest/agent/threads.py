"""Work that blocks: as long as a disk writes, or a share's server is silent."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


async def in_thread(function: Callable[..., T], *args: Any) -> T:
    """Call it while other calls are answered; or before all of them, when the machine has no task left for a
    thread: containers may have taken them all, which is no reason to leave one's disk unwritten.

    Not asyncio.to_thread: its pool keeps what it has found no thread for, and does it when it finds one.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def deliver(set_outcome: Callable[[Any], None], outcome: Any) -> None:
        if not done.done():
            set_outcome(outcome)

    def work() -> None:
        outcome: tuple[Callable[[Any], None], Any]
        try:
            outcome = (done.set_result, function(*args))
        except Exception as error:
            outcome = (done.set_exception, error)
        # Nobody waits when the loop is closed.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(deliver, *outcome)

    try:
        _thread.start_new_thread(work, ())
    except RuntimeError:
        return function(*args)
    return await done
