"""Connections over a byte channel that has none: a virtio-serial port, where a host may come and go unseen.

On the wire 0x7D and 0x7E are escaped (0x7D 0x5D, 0x7D 0x5E), so that a bare 0x7E can only be the start of
a handshake: the host sends it with a nonce of 32 hex digits and a newline, whatever the channel was in the
middle of; the guest drops its connection with all that was still to send, answers the same, and a new
connection begins. The host throws away all that comes before the answer with its own nonce, so that it never
sees a byte that was meant for another.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
from typing import Any

log = logging.getLogger(__name__)

_ESCAPE = b"\x7d"
_MARK = b"\x7e"
_NONCE_BYTES = 32
_HANDSHAKE_BYTES = _NONCE_BYTES + 1

_LIMIT = 1 << 20
_PIECE = 64 << 10
# QEMU keeps what is sent until the guest has opened its port: the first handshake is hardly ever lost. One
# more only keeps a machine busy that has just been cloned, whose every step is slow.
_RETRY_FIRST_S = 0.1
_RETRY_MAX_S = 0.4
_RETRY_LATE_S = 5.0


def escape(data: bytes) -> bytes:
    return data.replace(b"\x7d", b"\x7d\x5d").replace(b"\x7e", b"\x7d\x5e")


class Unescaper:
    """Undoes `escape` piece by piece; a pair may be cut between two pieces."""

    def __init__(self) -> None:
        self._cut = b""

    def feed(self, data: bytes) -> bytes:
        data = self._cut + data
        self._cut = b""
        if _ESCAPE not in data:
            return data
        # An escape at the end waits for its second byte; it is not one itself, those are 5D and 5E.
        if data.endswith(_ESCAPE):
            data, self._cut = data[:-1], _ESCAPE
        return data.replace(b"\x7d\x5e", b"\x7e").replace(b"\x7d\x5d", b"\x7d")


class _Transport(asyncio.Transport):
    """The inner connection's transport: escapes what is written, and passes flow control through."""

    def __init__(self, channel: Any) -> None:
        super().__init__()
        self._channel = channel
        self._closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._closing:
            self._channel.send(escape(bytes(data)))

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._channel.closed(self)

    def abort(self) -> None:
        self.close()

    def get_write_buffer_size(self) -> int:
        """What is written is the channel's, which outlives the connection."""
        return 0

    def pause_reading(self) -> None:
        self._channel.pause(self)

    def resume_reading(self) -> None:
        self._channel.resume(self)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return "a serial port" if name == "peername" else default


class _Inner:
    """One connection as its user has it: a StreamReader and a StreamWriter on a `_Transport`."""

    def __init__(self, channel: Any) -> None:
        loop = asyncio.get_running_loop()
        self.reader = asyncio.StreamReader(limit=_LIMIT, loop=loop)
        self.protocol = asyncio.StreamReaderProtocol(self.reader, loop=loop)
        self.transport = _Transport(channel)
        self.protocol.connection_made(self.transport)
        self.writer = asyncio.StreamWriter(self.transport, self.protocol, self.reader, loop)
        self._unescaper = Unescaper()
        self._lost = False

    def feed(self, data: bytes) -> None:
        data = self._unescaper.feed(data)
        if data and not self._lost:
            self.protocol.data_received(data)

    def lose(self, error: Exception | None = None) -> None:
        if not self._lost:
            self._lost = True
            self.transport._closing = True
            self.protocol.connection_lost(error)


async def connect_chardev(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, timeout_s: float
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """The host's side, on the raw streams of QEMU's chardev socket, which it takes over.

    The handshake is repeated until the guest answers it: the guest may not have opened its port yet. Raises
    TimeoutError after `timeout_s`, ConnectionError when the socket closes; the raw streams are closed then.
    """
    host = _Host(writer)
    writer.transport.set_protocol(host)
    writer.transport.resume_reading()  # type: ignore[attr-defined]
    if reader.at_eof():
        host.connection_lost(None)
    try:
        async with asyncio.timeout(timeout_s):
            pause = _RETRY_FIRST_S
            while True:
                host.hail()
                done, _ = await asyncio.wait({host.answered}, timeout=pause)
                if done:
                    inner = host.answered.result()
                    return inner.reader, inner.writer
                # A guest that needs longer to answer than the next hail takes would never be in time.
                pause = min(2 * pause, _RETRY_LATE_S if host.late else _RETRY_MAX_S)
    except BaseException:
        host.answered.cancel()
        writer.transport.abort()
        raise


class _Host(asyncio.Protocol):
    def __init__(self, writer: asyncio.StreamWriter) -> None:
        # Kept: a writer that is collected closes its transport, since Python 3.12.
        self._writer = writer
        self._raw: Any = writer.transport
        self._nonces: list[bytes] = []
        self._seen = b""
        self._inner: _Inner | None = None
        self.answered: asyncio.Future[_Inner] = asyncio.get_running_loop().create_future()
        self.late = False
        """The guest has answered an earlier hail than the last."""

    def hail(self) -> None:
        """Send a handshake with a nonce of its own."""
        nonce = os.urandom(_NONCE_BYTES // 2).hex().encode()
        self._nonces.append(nonce)
        self._raw.write(_MARK + nonce + b"\n")

    def data_received(self, data: bytes) -> None:
        if self._inner is not None and _MARK not in data and not self._seen:
            self._inner.feed(data)
            return
        data = self._seen + data
        self._seen = b""
        while data:
            before, mark, rest = data.partition(_MARK)
            if self._inner is not None and before:
                self._inner.feed(before)
            if not mark:
                return
            if len(rest) < _HANDSHAKE_BYTES:
                self._seen = mark + rest
                return
            answer, data = rest[:_HANDSHAKE_BYTES], rest[_HANDSHAKE_BYTES:]
            # Only the answer to the last hail: the guest has dropped what the earlier ones began.
            if answer == self._nonces[-1] + b"\n" and not self.answered.done():
                self._inner = _Inner(self)
                self.answered.set_result(self._inner)
            self.late = True

    def connection_lost(self, error: Exception | None) -> None:
        if self._inner is not None:
            self._inner.lose(error)
        elif not self.answered.done():
            self.answered.set_exception(error or ConnectionError("the channel was closed"))

    def pause_writing(self) -> None:
        if self._inner is not None:
            self._inner.protocol.pause_writing()

    def resume_writing(self) -> None:
        if self._inner is not None:
            self._inner.protocol.resume_writing()

    def send(self, data: bytes) -> None:
        self._raw.write(data)

    def closed(self, transport: _Transport) -> None:
        self._raw.close()
        if self._raw.get_write_buffer_size():
            # A guest that does not read would keep the socket open.
            self._raw.abort()
        if self._inner is not None:
            asyncio.get_running_loop().call_soon(self._inner.lose)

    def pause(self, transport: _Transport) -> None:
        with contextlib.suppress(RuntimeError):
            self._raw.pause_reading()

    def resume(self, transport: _Transport) -> None:
        with contextlib.suppress(RuntimeError):
            self._raw.resume_reading()


class ChardevListener:
    """The guest's side: owns the nonblocking descriptor of the port, and accepts one host after another.

    While no host is there a read answers end-of-file at once and epoll reports a hang-up without end. Then
    the port is watched through an epoll of its own that tells of changes only.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._loop = asyncio.get_running_loop()
        self._accepted: asyncio.Queue[_Inner] = asyncio.Queue()
        self._inner: _Inner | None = None
        self._out = bytearray()
        self._seen = b""
        self._paused = False
        self._writing_paused = False
        os.set_blocking(fd, False)
        self._changes = select.epoll()
        self._changes.register(fd, select.EPOLLIN | select.EPOLLET)
        self._readable()

    async def accept(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The next host's connection. The one before has ended then."""
        inner = await self._accepted.get()
        while not self._accepted.empty():
            inner = self._accepted.get_nowait()
        return inner.reader, inner.writer

    def close(self) -> None:
        """End the connection and close the descriptor."""
        self._unwatch()
        self._loop.remove_reader(self._changes)
        if self._inner is not None:
            self._inner.lose()
        self._changes.close()
        os.close(self._fd)

    def _watch(self) -> None:
        self._loop.remove_reader(self._changes)
        if self._paused:
            self._loop.remove_reader(self._fd)
        else:
            self._loop.add_reader(self._fd, self._readable)
        if self._out:
            self._loop.add_writer(self._fd, self._writable)
        else:
            self._loop.remove_writer(self._fd)

    def _unwatch(self) -> None:
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)

    def _no_host(self) -> None:
        self._drop()
        self._unwatch()
        self._loop.add_reader(self._changes, self._changed)

    def _changed(self) -> None:
        # Taken before the port is read: a host that comes now is the next change.
        self._changes.poll(0)
        self._readable()

    def _drop(self) -> None:
        """End the connection with all that it still had to send."""
        self._out.clear()
        self._paused = self._writing_paused = False
        if self._inner is not None:
            self._inner.lose()
            self._inner = None

    def _readable(self) -> None:
        try:
            data = os.read(self._fd, _PIECE)
        except BlockingIOError:
            self._watch()
            return
        except OSError as error:
            log.debug("chardev: %s", error)
            data = b""
        if not data:
            self._seen = b""
            self._no_host()
            return
        self._received(data)
        self._watch()

    def _received(self, data: bytes) -> None:
        data = self._seen + data
        self._seen = b""
        before, mark, _ = data.partition(_MARK)
        if before and self._inner is not None:
            self._inner.feed(before)
        if not mark:
            return
        self._drop()
        # The last one: the host has given up those before it.
        rest = data[data.rindex(_MARK) + 1 :]
        if len(rest) < _HANDSHAKE_BYTES:
            self._seen = mark + rest
            return
        hail, data = rest[:_HANDSHAKE_BYTES], rest[_HANDSHAKE_BYTES:]
        if not hail.endswith(b"\n") or not all(c in b"0123456789abcdef" for c in hail[:-1]):
            return
        self._out += _MARK + hail
        self._inner = _Inner(self)
        self._accepted.put_nowait(self._inner)
        self._flush()
        if data:
            self._inner.feed(data)

    def _writable(self) -> None:
        before = len(self._out)
        self._flush()
        if len(self._out) == before:
            # Said to be writable and is not: a hang-up. The host is gone.
            self._no_host()
            return
        self._watch()

    def _flush(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._out:
                try:
                    sent = os.write(self._fd, memoryview(self._out)[:_PIECE])
                except BlockingIOError:
                    break
                except OSError as error:
                    log.debug("chardev: %s", error)
                    self._out.clear()
                    break
                del self._out[:sent]
        if self._writing_paused and len(self._out) <= _PIECE and self._inner is not None:
            self._writing_paused = False
            self._inner.protocol.resume_writing()

    def send(self, data: bytes) -> None:
        if not self._out:
            self._out += data
            self._flush()
            if self._out:
                self._loop.add_writer(self._fd, self._writable)
        else:
            self._out += data
        if len(self._out) > 4 * _PIECE and not self._writing_paused and self._inner is not None:
            self._writing_paused = True
            self._inner.protocol.pause_writing()

    def closed(self, transport: _Transport) -> None:
        if self._inner is not None and self._inner.transport is transport:
            self._loop.call_soon(self._inner.lose)

    def pause(self, transport: _Transport) -> None:
        if self._inner is not None and self._inner.transport is transport:
            self._paused = True
            self._loop.remove_reader(self._fd)

    def resume(self, transport: _Transport) -> None:
        if self._inner is not None and self._inner.transport is transport:
            self._paused = False
            self._watch()
