"""The stdio of a process in a container: pipes or a terminal, read and written as the other side allows.

The kernel's buffer is the only one: what the host does not read stays in the pipe, where it outlives the
host's connection, and stops the container when the pipe is full.
"""

from __future__ import annotations

import asyncio
import errno
import os

MAX_READ_BYTES = 1 << 20

DRAIN_S = 0.5
"""How long a stream of a process that has ended may be silent before it counts as ended too, though a process
it left behind still holds it open. Kata's agent waits as long."""


def _wake(waiter: asyncio.Future[bool], value: bool) -> None:
    if not waiter.done():
        waiter.set_result(value)


class OutputStream:
    """The reading end of a pipe, or a terminal's master side. Owns the fd."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._lock = asyncio.Lock()
        self._waiter: asyncio.Future[bool] | None = None

    @property
    def is_closed(self) -> bool:
        return self._fd < 0

    async def read(self, size: int, exited: asyncio.Future[int]) -> bytes:
        """Wait for output and return at most `size` bytes; b"" at the end. A cancelled read takes nothing."""
        if size <= 0:
            return b""
        async with self._lock:
            while self._fd >= 0:
                try:
                    data = os.read(self._fd, min(size, MAX_READ_BYTES))
                except BlockingIOError:
                    if await self._readable(exited):
                        continue
                    return b""
                except OSError as error:
                    # How a terminal says that its last user has gone.
                    if error.errno != errno.EIO:
                        raise
                    data = b""
                if not data:
                    self.close()
                return data
            return b""

    async def _readable(self, exited: asyncio.Future[int]) -> bool:
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[bool] = loop.create_future()
        timers: list[asyncio.TimerHandle] = []

        def drain(_: asyncio.Future[int]) -> None:
            timers.append(loop.call_later(DRAIN_S, _wake, waiter, False))

        self._waiter = waiter
        loop.add_reader(self._fd, _wake, waiter, True)
        exited.add_done_callback(drain)
        try:
            return await waiter
        finally:
            self._waiter = None
            exited.remove_done_callback(drain)
            for timer in timers:
                timer.cancel()
            if self._fd >= 0:
                loop.remove_reader(self._fd)

    def close(self) -> None:
        """What is unread is lost; a waiting read ends. Idempotent."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        if self._waiter is not None:
            asyncio.get_running_loop().remove_reader(fd)
            _wake(self._waiter, False)
        os.close(fd)


class InputStream:
    """The writing end of a pipe, or a terminal's master side. Owns the fd."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._lock = asyncio.Lock()
        self._waiter: asyncio.Future[bool] | None = None
        self._closing = False
        self._writers = 0

    async def write(self, data: bytes) -> None:
        """Write all of `data`, waiting as long as the container does not read; writers take turns.

        Raises BrokenPipeError when the other side is closed, or this one was.
        """
        if self._closing:
            raise BrokenPipeError(errno.EPIPE, "stdin is closed")
        self._writers += 1
        try:
            async with self._lock:
                view = memoryview(data)
                while view:
                    if self._fd < 0:
                        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
                    try:
                        view = view[os.write(self._fd, view) :]
                    except BlockingIOError:
                        await self._writable()
        finally:
            self._writers -= 1
            if self._closing and not self._writers:
                self.close()

    async def _writable(self) -> None:
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        loop.add_writer(self._fd, _wake, self._waiter, True)
        try:
            await self._waiter
        finally:
            self._waiter = None
            if self._fd >= 0:
                loop.remove_writer(self._fd)

    def close_when_written(self) -> None:
        """Close as soon as the writes under way are done; does not wait for them."""
        self._closing = True
        if not self._writers:
            self.close()

    def close(self) -> None:
        """A waiting write fails. Idempotent."""
        self._closing = True
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        if self._waiter is not None:
            asyncio.get_running_loop().remove_writer(fd)
            _wake(self._waiter, False)
        os.close(fd)
