"""The side that calls."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from ttrpc import framing
from ttrpc.errors import Code, ConnectionClosed, ProtocolError, StatusError, TtrpcError
from ttrpc.framing import DATA, NO_DATA, REMOTE_CLOSED, REMOTE_OPEN, REQUEST, RESPONSE, Frame
from ttrpc.naming import snake_case
from ttrpc.request_pb2 import KeyValue, Request, Response

log = logging.getLogger(__name__)

Metadata = Mapping[str, Sequence[str]]

_STREAM_MESSAGES = 64
_STREAM_FULL_S = 1.0


class Client:
    """One connection. Calls may run at the same time, each in a stream of its own.

    After `close`, or when the peer ends the connection, every call raises ConnectionClosed.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._next_id = 1
        self._unary: dict[int, asyncio.Future[Frame]] = {}
        self._streams: dict[int, ClientStream] = {}
        self._ended = asyncio.Event()
        self._receiver = asyncio.create_task(self._receive())

    @classmethod
    async def connect(cls, path: str | os.PathLike[str]) -> Client:
        """Connect to a unix socket. Raises OSError."""
        return cls(*await asyncio.open_unix_connection(str(path), limit=framing.READ_LIMIT))

    @property
    def closed(self) -> bool:
        return self._ended.is_set()

    async def wait_closed(self) -> None:
        await self._ended.wait()

    async def close(self) -> None:
        """End the connection, and every call on it; idempotent."""
        self._receiver.cancel()
        await asyncio.wait({self._receiver})

    def service(self, service: ServiceDescriptor) -> Stub:
        return Stub(self, service)

    async def call(
        self,
        method: MethodDescriptor,
        request: Message,
        *,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> Message:
        """A unary call. The peer is told the timeout, and it is kept here too.

        Raises StatusError: the peer's, DEADLINE_EXCEEDED after the timeout, RESOURCE_EXHAUSTED for a message
        over 4 MiB in either direction; ConnectionClosed.
        """
        envelope = _envelope(method, request, timeout_s, metadata)
        answer: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        stream_id = self._open(envelope, 0)
        self._unary[stream_id] = answer
        try:
            async with asyncio.timeout(timeout_s):
                await self._drain()
                frame = await answer
        except TimeoutError:
            raise StatusError(
                Code.DEADLINE_EXCEEDED, f"no answer to {method.full_name} within {timeout_s:g} s"
            ) from None
        finally:
            self._unary.pop(stream_id, None)
        return _answer(method, frame)

    async def stream(
        self,
        method: MethodDescriptor,
        request: Message | None = None,
        *,
        timeout_s: float | None = None,
        metadata: Metadata | None = None,
    ) -> ClientStream:
        """Open a stream; `request` goes with a method whose client does not stream, and only there.

        `timeout_s` is for the peer, who ends the stream after it.
        """
        envelope = _envelope(method, request, timeout_s, metadata)
        stream_id = self._open(envelope, REMOTE_OPEN if method.client_streaming else REMOTE_CLOSED)
        stream = self._streams[stream_id] = ClientStream(self, method, stream_id)
        await self._drain()
        return stream

    def _open(self, envelope: bytes, flags: int) -> int:
        """Send a request frame. The id is taken and the frame written in one go: ids must increase on the
        wire."""
        stream_id = self._next_id
        self._send(stream_id, REQUEST, flags, envelope)
        self._next_id += 2
        return stream_id

    def _send(self, stream_id: int, type_: int, flags: int, payload: bytes) -> None:
        data = framing.encode(stream_id, type_, flags, payload)
        if self.closed:
            raise ConnectionClosed("the connection is closed")
        self._writer.write(data)

    async def _drain(self) -> None:
        try:
            await self._writer.drain()
        except OSError as error:
            raise ConnectionClosed(f"the connection ended: {error}") from error

    async def _receive(self) -> None:
        try:
            while (frame := await framing.read_frame(self._reader)) is not None:
                if (answer := self._unary.get(frame.stream_id)) is not None:
                    if not answer.done():
                        answer.set_result(frame)
                elif (stream := self._streams.get(frame.stream_id)) is not None:
                    await stream._deliver(frame)
                else:
                    # Its call timed out or was cancelled: ttrpc has no way to tell the peer.
                    log.debug("answer on stream %d, which nobody waits for", frame.stream_id)
        except ProtocolError as error:
            log.warning("ttrpc: connection ended: %s", error)
        except OSError as error:
            log.debug("ttrpc: connection ended: %s", error)
        finally:
            self._ended.set()
            self._writer.close()
            for answer in self._unary.values():
                if not answer.done():
                    answer.set_exception(ConnectionClosed("the connection ended before the answer"))
            for stream in self._streams.values():
                stream._fail(ConnectionClosed("the connection ended inside the stream"))
            self._unary.clear()
            self._streams.clear()


class ClientStream:
    """The caller's end of a streaming method."""

    def __init__(self, client: Client, method: MethodDescriptor, stream_id: int) -> None:
        self._client = client
        self._method = method
        self._id = stream_id
        self._frames: asyncio.Queue[Frame | None] = asyncio.Queue(_STREAM_MESSAGES)
        self._error: TtrpcError | None = None
        self._local_closed = not method.client_streaming
        self._remote_closed = False

    async def send(self, message: Message) -> None:
        """Raises ProtocolError after `close_send`, or on a method whose client does not stream."""
        if self._local_closed:
            raise ProtocolError(f"{self._method.full_name}: the sending side is closed")
        self._client._send(self._id, DATA, 0, message.SerializeToString())
        await self._client._drain()

    async def close_send(self) -> None:
        """No more will be sent; idempotent."""
        if not self._local_closed:
            self._local_closed = True
            self._client._send(self._id, DATA, REMOTE_CLOSED | NO_DATA, b"")
            await self._client._drain()

    async def receive(self) -> Message | None:
        """The next message, None at the end. Raises StatusError, ConnectionClosed."""
        if self._remote_closed:
            return None
        if self._error is not None and self._frames.empty():
            raise self._error
        frame = await self._frames.get()
        if frame is None:
            assert self._error is not None
            raise self._error
        if frame.type == RESPONSE:
            self._finish()
            return _answer(self._method, frame)
        frame.check_size(framing.MAX_MESSAGE_BYTES)
        if frame.flags & REMOTE_CLOSED:
            self._finish()
            if frame.flags & NO_DATA:
                return None
        return _parse(self._method, frame.payload)

    def __aiter__(self) -> AsyncIterator[Message]:
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[Message]:
        while (message := await self.receive()) is not None:
            yield message

    def _finish(self) -> None:
        self._remote_closed = True
        self._client._streams.pop(self._id, None)

    async def _deliver(self, frame: Frame) -> None:
        """ttrpc has no flow control: a reader that does not read for a second loses its stream, not the
        connection."""
        try:
            async with asyncio.timeout(_STREAM_FULL_S):
                await self._frames.put(frame)
        except TimeoutError:
            self._client._streams.pop(self._id, None)
            self._fail(StatusError(Code.RESOURCE_EXHAUSTED, "the stream is full: its messages are not read"))

    def _fail(self, error: TtrpcError) -> None:
        self._error = error
        with contextlib.suppress(asyncio.QueueFull):
            self._frames.put_nowait(None)


class Stub:
    """A service's methods as attributes in snake_case, for unary ones `await stub.method(request)`."""

    def __init__(self, client: Client, service: ServiceDescriptor) -> None:
        self._client = client
        self._methods = {snake_case(m.name): m for m in service.methods}

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        try:
            method = self._methods[name]
        except KeyError:
            raise AttributeError(f"no method {name!r}") from None
        invoke = (
            self._client.stream if method.client_streaming or method.server_streaming else self._client.call
        )

        def bound(*args: Any, **options: Any) -> Awaitable[Any]:
            return invoke(method, *args, **options)

        setattr(self, name, bound)
        return bound


def _envelope(
    method: MethodDescriptor, request: Message | None, timeout_s: float | None, metadata: Metadata | None
) -> bytes:
    envelope = Request(service=method.containing_service.full_name, method=method.name)
    if request is not None:
        envelope.payload = request.SerializeToString()
    if timeout_s is not None:
        # 0 would mean none.
        envelope.timeout_nano = max(1, int(timeout_s * 1e9))
    for key, values in (metadata or {}).items():
        envelope.metadata.extend(KeyValue(key=key, value=value) for value in values)
    return envelope.SerializeToString()


def _answer(method: MethodDescriptor, frame: Frame) -> Message:
    frame.check_size(framing.MAX_MESSAGE_BYTES)
    if frame.type != RESPONSE:
        raise ProtocolError(f"{method.full_name}: frame of type {frame.type} in answer to a unary call")
    try:
        response = Response.FromString(frame.payload)
    except DecodeError as error:
        raise ProtocolError(f"{method.full_name}: the response does not decode: {error}") from None
    if response.status.code:
        status = response.status
        raise StatusError(Code(status.code), status.message, status.details)
    return _parse(method, response.payload)


def _parse(method: MethodDescriptor, payload: bytes) -> Message:
    try:
        return GetMessageClass(method.output_type).FromString(payload)
    except DecodeError as error:
        raise ProtocolError(f"{method.full_name}: the answer does not decode: {error}") from None
