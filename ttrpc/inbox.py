"""What has arrived for a stream and is not read yet."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

from ttrpc.framing import MAX_MESSAGE_BYTES

Item = TypeVar("Item")

STREAM_MESSAGES = 64
STREAM_BYTES = 2 * MAX_MESSAGE_BYTES
CONNECTION_BYTES = 64 << 20

_FULL_S = 1.0


class Budget:
    """The bytes that all streams of one connection hold together."""

    def __init__(self) -> None:
        self.used = 0
        self.freed = asyncio.Event()

    def fits(self, size: int) -> bool:
        # What comes alone is taken whatever its size: framing has bounded it.
        return not self.used or self.used + size <= CONNECTION_BYTES

    def take(self, size: int) -> None:
        self.used += size

    def free(self, size: int) -> None:
        self.used -= size
        self.freed.set()


class Inbox(Generic[Item]):
    """The messages of one stream, from the connection's receiving task to the stream's reader.

    ttrpc has no flow control. When an inbox is full the whole connection is not read, which is the only
    backpressure there is, but only for a second, as in Go: the reader may be waiting for something that
    comes behind on the same connection.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._items: deque[tuple[Item, int]] = deque()
        self._bytes = 0
        self._arrived = asyncio.Event()
        self.ended = False
        self._error: Exception | None = None

    async def put(self, item: Item, size: int) -> bool:
        """False when there was no room for a second. After `end` or `close` the item is dropped."""
        if not self._has_room(size):
            try:
                async with asyncio.timeout(_FULL_S):
                    while not self.ended and not self._has_room(size):
                        self._budget.freed.clear()
                        await self._budget.freed.wait()
            except TimeoutError:
                # When all stands still, the second may be over before a reader has had any of it.
                if not self.ended and not self._has_room(size):
                    return False
        if not self.ended:
            self._items.append((item, size))
            self._bytes += size
            self._budget.take(size)
            self._arrived.set()
        return True

    def _has_room(self, size: int) -> bool:
        if len(self._items) >= STREAM_MESSAGES or (self._bytes and self._bytes + size > STREAM_BYTES):
            return False
        return self._budget.fits(size)

    async def get(self) -> Item | None:
        """The next item; after the last one None, or the error that `end` was given."""
        while not self._items:
            if self.ended:
                if self._error is not None:
                    raise self._error
                return None
            self._arrived.clear()
            await self._arrived.wait()
        item, size = self._items.popleft()
        self._bytes -= size
        self._budget.free(size)
        return item

    def end(self, error: Exception | None = None) -> None:
        """Nothing more will come; what is here can still be read. Only the first end counts."""
        if not self.ended:
            self.ended = True
            self._error = error
            self._arrived.set()
            self._budget.freed.set()

    def close(self) -> None:
        """Nothing more will be read."""
        self.end()
        self._items.clear()
        self._budget.free(self._bytes)
        self._bytes = 0
