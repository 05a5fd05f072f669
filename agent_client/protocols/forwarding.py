"""A TCP connection carried in the chunks of our PortForward service; both ends do the same."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import deque
from collections.abc import AsyncIterable, Awaitable, Callable
from typing import Any

from agent_client.protocols.port_forward_pb2 import Chunk

WINDOW_BYTES = 256 << 10
_CHUNK_BYTES = 32 << 10


class Broken(Exception):
    """A connection did not end as its ends wanted it to: it is to be reset."""


def reset(writer: asyncio.StreamWriter) -> None:
    """End a connection so that its peer cannot take it for whole."""
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class Carrier:
    """One end. Its socket is for the caller to close.

    With `idle_after_end_s` the connection is given up when its socket has ended and nothing comes for it for
    so long: one that was closed, and one that was only shut down for writing, look the same.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        send: Callable[[Chunk], Awaitable[None]],
        *,
        idle_after_end_s: float | None = None,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._send = send
        self._idle_s = idle_after_end_s
        self._window = WINDOW_BYTES
        """How much may be sent now."""
        self._window_grew = asyncio.Event()
        self._waiting: deque[bytes] = deque()
        """For the socket to take."""
        self._waiting_bytes = 0
        self._arrived = asyncio.Event()
        self._has_ended = self._other_has_ended = self._other_is_gone = False

    async def run(self, chunks: AsyncIterable[Chunk]) -> None:
        """Until both directions have ended. Raises Broken, and what `chunks` and `send` do."""
        receiving: asyncio.Future[Any] = asyncio.create_task(self._receive(chunks))
        moving = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]
        both: asyncio.Future[Any] = asyncio.gather(*moving)
        try:
            done, _ = await asyncio.wait({receiving, both}, return_when=asyncio.FIRST_COMPLETED)
            if receiving in done:
                receiving.result()
            await both
        except OSError as error:
            raise Broken(str(error)) from error
        finally:
            for task in (receiving, *moving):
                task.cancel()
            await asyncio.gather(receiving, *moving, both, return_exceptions=True)

    async def _receive(self, chunks: AsyncIterable[Chunk]) -> None:
        async for chunk in chunks:
            if chunk.reset:
                raise Broken("it was reset at the other end")
            if chunk.taken > WINDOW_BYTES - self._window:
                raise Broken("the other end has taken more than was sent")
            self._window += chunk.taken
            self._window_grew.set()
            self._waiting_bytes += len(chunk.data)
            if self._waiting_bytes > WINDOW_BYTES or (chunk.data and self._other_has_ended):
                raise Broken("the other end has sent more than it may")
            if chunk.data:
                self._waiting.append(chunk.data)
            self._other_has_ended = self._other_has_ended or chunk.end
            self._arrived.set()
        self._other_is_gone = True
        if not (self._has_ended and self._other_has_ended):
            raise Broken("the other end is gone")

    async def _read(self) -> None:
        while True:
            while not self._window:
                self._window_grew.clear()
                await self._window_grew.wait()
            data = await self._reader.read(min(self._window, _CHUNK_BYTES))
            if not data:
                # Before it is sent: the answer to it may be that the other end is gone.
                self._has_ended = True
                await self._send(Chunk(end=True))
                self._arrived.set()
                return
            self._window -= len(data)
            await self._send(Chunk(data=data))

    async def _write(self) -> None:
        while True:
            while not self._waiting:
                if self._other_has_ended:
                    self._writer.write_eof()
                    return
                self._arrived.clear()
                await self._wait_arrived()
            data = self._waiting.popleft()
            self._writer.write(data)
            await self._writer.drain()
            self._waiting_bytes -= len(data)
            if not self._other_is_gone:
                await self._send(Chunk(taken=len(data)))

    async def _wait_arrived(self) -> None:
        try:
            async with asyncio.timeout(self._idle_s if self._has_ended else None):
                await self._arrived.wait()
        except TimeoutError:
            raise Broken(f"nothing came for {self._idle_s:g} s after its end") from None
