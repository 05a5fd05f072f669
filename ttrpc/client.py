"""The side that calls."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from ttrpc import framing
from ttrpc.errors import Code, ConnectionClosed, ProtocolError, StatusError
from ttrpc.framing import DATA, NO_DATA, REMOTE_CLOSED, REMOTE_OPEN, REQUEST, RESPONSE, Frame
from ttrpc.inbox import Budget, Inbox
from ttrpc.naming import snake_case
from ttrpc.request_pb2 import KeyValue, Request, Response

log = logging.getLogger(__name__)

Metadata = Mapping[str, Sequence[str]]


class Client:
    """One connection. Calls may run at the same time, each in a stream of its own.

    After `close`, or when the peer ends the connection, every call raises ConnectionClosed. While the peer
    does not read, a call waits before it hands over its bytes: what is buffered for the peer is one message.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._sending = asyncio.Lock()
        self._next_id = 1
        self._unary: dict[int, asyncio.Future[Frame]] = {}
        self._streams: dict[int, ClientStream] = {}
        self._budget = Budget()
        self._ended = asyncio.Event()
        self._reason = "the connection is closed"
        self._receiver = asyncio.create_task(self._receive())
        # Not a `finally` of the task: one that is cancelled before it has run has none.
        self._receiver.add_done_callback(self._end)

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
        """End the connection and every call on it; what the peer has not taken is lost. Idempotent."""
        self._receiver.cancel()
        await self._ended.wait()

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
        over 4 MiB in either direction; ConnectionClosed; ProtocolError for an answer that is none.
        """
        envelope = _envelope(method, request, timeout_s, metadata)
        answer: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        stream_id = 0
        try:
            async with asyncio.timeout(timeout_s):
                async with self._sending:
                    await self._writable()
                    stream_id = self._open(0, envelope)
                    self._unary[stream_id] = answer
                frame = await answer
        except TimeoutError:
            raise _late(method, timeout_s) from None
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

        `timeout_s` is for the whole stream, here and at the peer. Raises StatusError, ConnectionClosed.
        """
        envelope = _envelope(method, request, timeout_s, metadata)
        try:
            async with asyncio.timeout(timeout_s), self._sending:
                await self._writable()
                stream_id = self._open(REMOTE_OPEN if method.client_streaming else REMOTE_CLOSED, envelope)
        except TimeoutError:
            raise _late(method, timeout_s) from None
        stream = self._streams[stream_id] = ClientStream(self, method, stream_id, timeout_s)
        return stream

    def _open(self, flags: int, envelope: bytes) -> int:
        """The id is taken and the frame written in one go: ids must increase on the wire."""
        stream_id = self._next_id
        self._next_id += 2
        framing.write_frame(self._writer, stream_id, REQUEST, flags, envelope)
        return stream_id

    async def _send_data(self, stream_id: int, flags: int, payload: bytes) -> None:
        async with self._sending:
            await self._writable()
            framing.write_frame(self._writer, stream_id, DATA, flags, payload)

    async def _writable(self) -> None:
        """To be awaited by the holder of `_sending`, who may then write one frame."""
        if not self.closed:
            try:
                await self._writer.drain()
            except OSError as error:
                raise ConnectionClosed(f"the connection ended: {error}") from error
        if self.closed:
            raise ConnectionClosed(self._reason)

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
            self._reason = "the peer closed the connection"
        except ProtocolError as error:
            self._reason = f"the connection ended: {error}"
            log.warning("connection with %s ended: %s", framing.peer_name(self._writer), error)
        except OSError as error:
            self._reason = f"the connection ended: {error}"
            log.debug("connection with %s ended: %s", framing.peer_name(self._writer), error)

    def _end(self, receiver: asyncio.Task[None]) -> None:
        if not receiver.cancelled() and (error := receiver.exception()) is not None:
            log.error("connection with %s ended", framing.peer_name(self._writer), exc_info=error)
        self._ended.set()
        framing.abort(self._writer)
        for answer in self._unary.values():
            if not answer.done():
                answer.set_exception(ConnectionClosed(self._reason))
        for stream in self._streams.values():
            stream._inbox.end(ConnectionClosed(self._reason))
        self._streams.clear()


class ClientStream:
    """The caller's end of a streaming method. One that is not read to its end wants `close`."""

    def __init__(
        self, client: Client, method: MethodDescriptor, stream_id: int, timeout_s: float | None
    ) -> None:
        self._client = client
        self._method = method
        self._id = stream_id
        self._timeout_s = timeout_s
        self._deadline = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        self._inbox = Inbox[Frame](client._budget)
        self._local_closed = not method.client_streaming
        self._remote_closed = False

    async def send(self, message: Message) -> None:
        """Waits while the peer does not read. Raises ProtocolError when the sending side is closed: by
        `close_send`, by the end of the stream, or because the method's client does not stream;
        StatusError(DEADLINE_EXCEEDED); ConnectionClosed.
        """
        if self._local_closed:
            raise ProtocolError(f"{self._method.full_name}: the sending side is closed")
        payload = message.SerializeToString()
        framing.check_size(len(payload))
        await self._send(0, payload)

    async def close_send(self) -> None:
        """No more will be sent; idempotent."""
        if not self._local_closed:
            self._local_closed = True
            await self._send(REMOTE_CLOSED | NO_DATA, b"")

    async def _send(self, flags: int, payload: bytes) -> None:
        try:
            async with asyncio.timeout_at(self._deadline):
                await self._client._send_data(self._id, flags, payload)
        except TimeoutError:
            raise _late(self._method, self._timeout_s) from None

    async def receive(self) -> Message | None:
        """The next message, None at the end. Raises StatusError, ConnectionClosed, ProtocolError; after any
        of these the stream has ended."""
        if self._remote_closed:
            return None
        try:
            async with asyncio.timeout_at(self._deadline):
                frame = await self._inbox.get()
        except TimeoutError:
            self.close()
            raise _late(self._method, self._timeout_s) from None
        except (StatusError, ConnectionClosed):
            self.close()
            raise
        if frame is None:
            self.close()
            return None
        try:
            return self._message(frame)
        except (StatusError, ProtocolError):
            self.close()
            raise

    def _message(self, frame: Frame) -> Message | None:
        framing.check_size(frame.oversized)
        method = self._method
        if frame.type == RESPONSE:
            self.close()
            response = _response(method, frame)
            # The empty response that finishes a stream is not a message of it.
            return (
                _parse(method, response.payload) if response.payload or not method.server_streaming else None
            )
        if frame.type != DATA or not method.server_streaming:
            raise ProtocolError(f"{method.full_name}: frame of type {frame.type} in answer")
        if frame.flags & REMOTE_CLOSED:
            self.close()
        return None if frame.flags & NO_DATA else _parse(method, frame.payload)

    def __aiter__(self) -> AsyncIterator[Message]:
        return self

    async def __anext__(self) -> Message:
        if (message := await self.receive()) is None:
            raise StopAsyncIteration
        return message

    def close(self) -> None:
        """Forget the stream: nothing more is sent or received on it. The peer is not told, ttrpc has no way
        to. Idempotent."""
        self._local_closed = self._remote_closed = True
        self._client._streams.pop(self._id, None)
        self._inbox.close()

    async def _deliver(self, frame: Frame) -> None:
        if frame.type == DATA and frame.flags & (NO_DATA | REMOTE_CLOSED) == NO_DATA:
            return
        if not await self._inbox.put(frame, len(frame.payload)):
            self._client._streams.pop(self._id, None)
            error = StatusError(Code.RESOURCE_EXHAUSTED, "the stream is full: its messages are not read")
            self._inbox.end(error)


class Stub:
    """A service's methods as attributes in snake_case: `await stub.method(request)`, which answers the
    response of a unary method, the ClientStream of another."""

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
    if metadata:
        for key, values in metadata.items():
            envelope.metadata.extend(KeyValue(key=key, value=value) for value in values)
    data = envelope.SerializeToString()
    framing.check_size(len(data))
    return data


def _late(method: MethodDescriptor, timeout_s: float | None) -> StatusError:
    return StatusError(Code.DEADLINE_EXCEEDED, f"no answer to {method.full_name} within {timeout_s:g} s")


def _answer(method: MethodDescriptor, frame: Frame) -> Message:
    framing.check_size(frame.oversized)
    if frame.type != RESPONSE:
        raise ProtocolError(f"{method.full_name}: frame of type {frame.type} in answer to a unary call")
    return _parse(method, _response(method, frame).payload)


def _response(method: MethodDescriptor, frame: Frame) -> Response:
    try:
        response = Response.FromString(frame.payload)
    except DecodeError as error:
        raise ProtocolError(f"{method.full_name}: the response does not decode: {error}") from None
    if response.status.code:
        status = response.status
        raise StatusError(Code(status.code), status.message, status.details)
    return response


def _parse(method: MethodDescriptor, payload: bytes) -> Message:
    try:
        return GetMessageClass(method.output_type).FromString(payload)
    except DecodeError as error:
        raise ProtocolError(f"{method.full_name}: the answer does not decode: {error}") from None
