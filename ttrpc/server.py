"""The side that answers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from ttrpc import framing
from ttrpc.errors import Code, ProtocolError, StatusError
from ttrpc.framing import DATA, NO_DATA, REMOTE_CLOSED, REQUEST, RESPONSE, Frame
from ttrpc.naming import snake_case
from ttrpc.request_pb2 import Request, Response

log = logging.getLogger(__name__)

MapError = Callable[[Exception], StatusError | None]

_MAX_STREAMS = 4096
_MAX_PENDING_BYTES = 64 << 20
_STREAM_MESSAGES = 64
_STREAM_FULL_S = 1.0


class Context:
    """What a handler may know of its call. Its task is cancelled when the connection ends."""

    def __init__(self, metadata: dict[str, list[str]], timeout_s: float | None, connection: object) -> None:
        self.metadata = metadata
        self.timeout_s = timeout_s
        self.connection = connection
        """The same object for every call of one connection."""


class Server:
    """Services of protobuf, each with a handler object, on any number of connections.

    A handler has a coroutine per unary method, named in snake_case, `async def method(request, context)`.
    Where the client streams, `request` is an async iterator; where the server streams, the method is an
    async generator. A method that the handler does not have is answered UNIMPLEMENTED. A StatusError is
    answered as it is; any other exception goes through `map_error`, and when that returns None it is logged
    with its traceback and answered UNKNOWN with its text.
    """

    def __init__(
        self, *, max_message_bytes: int = framing.MAX_MESSAGE_BYTES, map_error: MapError | None = None
    ) -> None:
        self.max_message_bytes = max_message_bytes
        self._map_error = map_error
        self._services: dict[str, tuple[ServiceDescriptor, object]] = {}
        self._connections: set[_Connection] = set()
        self._stopped = asyncio.Event()
        self._draining = False

    def register(self, service: ServiceDescriptor, handler: object, *, name: str | None = None) -> None:
        """`name` replaces the service's full name on the wire. Raises ValueError when it is taken."""
        name = name or service.full_name
        if name in self._services:
            raise ValueError(f"service {name} is registered already")
        self._services[name] = (service, handler)

    async def serve(self, sock: socket.socket) -> None:
        """Accept on a listening socket until `shutdown`. The socket is closed then."""
        listener = await asyncio.start_unix_server(self.serve_connection, sock=sock, limit=framing.READ_LIMIT)
        try:
            await self._stopped.wait()
        finally:
            listener.close()

    async def serve_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Returns when the connection has ended and its handlers with it."""
        connection = _Connection(self, reader, writer)
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)

    async def shutdown(self, grace_s: float) -> None:
        """Refuse what is new, give what runs `grace_s`, then end every connection; idempotent."""
        self._draining = True
        running = {task for connection in self._connections for task in connection.tasks}
        running.discard(asyncio.current_task())
        if running:
            await asyncio.wait(running, timeout=grace_s)
        self._stopped.set()
        for connection in list(self._connections):
            connection.close()

    def _find(self, request: Request) -> tuple[MethodDescriptor, Callable[..., Any]]:
        if self._draining:
            raise StatusError(Code.UNAVAILABLE, "the server is shutting down")
        if request.service not in self._services:
            raise StatusError(Code.UNIMPLEMENTED, f"service {request.service}")
        service, handler = self._services[request.service]
        method = service.methods_by_name.get(request.method)
        function = getattr(handler, snake_case(request.method), None) if method else None
        if method is None or function is None:
            raise StatusError(Code.UNIMPLEMENTED, f"method {request.method}")
        return method, function

    def _status(self, error: Exception, request: Request) -> StatusError:
        if isinstance(error, StatusError):
            return error
        if isinstance(error, TimeoutError):
            return StatusError(Code.DEADLINE_EXCEEDED, "context deadline exceeded")
        mapped = self._map_error(error) if self._map_error else None
        if mapped is None:
            log.error("%s/%s failed", request.service, request.method, exc_info=error)
            mapped = StatusError(Code.UNKNOWN, str(error) or type(error).__name__)
        return mapped


class _Connection:
    def __init__(self, server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.tasks: set[asyncio.Task[None]] = set()
        self._server = server
        self._reader = reader
        self._writer = writer
        self._last_id = 0
        self._incoming: dict[int, _Incoming] = {}
        self._pending_bytes = 0

    def close(self) -> None:
        self._writer.close()
        # What is buffered for a peer that does not read would keep the connection open.
        self._reader.feed_eof()

    async def run(self) -> None:
        try:
            while (
                frame := await framing.read_frame(self._reader, self._server.max_message_bytes)
            ) is not None:
                await self._dispatch(frame)
                # A peer that does not read its answers is not read either: its answers stay bounded.
                await self._writer.drain()
        except ProtocolError as error:
            log.warning("ttrpc: connection ended: %s", error)
        except OSError as error:
            log.debug("ttrpc: connection ended: %s", error)
        finally:
            for task in self.tasks:
                task.cancel()
            if self.tasks:
                await asyncio.wait(self.tasks)
            self._writer.close()

    async def _dispatch(self, frame: Frame) -> None:
        try:
            frame.check_size(self._server.max_message_bytes)
            if frame.stream_id % 2 != 1:
                raise StatusError(Code.INVALID_ARGUMENT, "StreamID must be odd for client initiated streams")
            if frame.type == REQUEST:
                self._open(frame)
            elif frame.type == DATA:
                await self._data(frame)
            else:
                log.debug("ttrpc: frame of type %d ignored", frame.type)
        except StatusError as status:
            self._respond(frame.stream_id, status)

    def _open(self, frame: Frame) -> None:
        if frame.stream_id <= self._last_id:
            raise StatusError(Code.INVALID_ARGUMENT, "StreamID cannot be re-used and must increment")
        self._last_id = frame.stream_id
        try:
            request = Request.FromString(frame.payload)
        except DecodeError as error:
            raise StatusError(Code.INVALID_ARGUMENT, f"unmarshal request error: {error}") from None
        size = len(frame.payload)
        if len(self.tasks) >= _MAX_STREAMS or (
            self.tasks and self._pending_bytes + size > _MAX_PENDING_BYTES
        ):
            raise StatusError(
                Code.RESOURCE_EXHAUSTED,
                f"{len(self.tasks)} streams with {self._pending_bytes} bytes are open on this connection",
            )
        method, function = self._server._find(request)
        incoming = None
        if method.client_streaming:
            incoming = self._incoming[frame.stream_id] = _Incoming(method)
            if request.payload:
                incoming.put_first(request.payload)
        self._pending_bytes += size
        task = asyncio.create_task(self._answer(frame.stream_id, request, method, function, incoming))
        self.tasks.add(task)

        def done(task: asyncio.Task[None]) -> None:
            self.tasks.discard(task)
            self._pending_bytes -= size
            self._incoming.pop(frame.stream_id, None)

        task.add_done_callback(done)

    async def _data(self, frame: Frame) -> None:
        incoming = self._incoming.get(frame.stream_id)
        if incoming is None:
            raise StatusError(Code.INVALID_ARGUMENT, "StreamID is no longer active")
        if not frame.flags & NO_DATA:
            await incoming.put(frame.payload)
        if frame.flags & REMOTE_CLOSED:
            await incoming.put(None)

    async def _answer(
        self,
        stream_id: int,
        request: Request,
        method: MethodDescriptor,
        function: Callable[..., Any],
        incoming: _Incoming | None,
    ) -> None:
        timeout_s = request.timeout_nano / 1e9 if request.timeout_nano else None
        try:
            metadata: dict[str, list[str]] = {}
            for pair in request.metadata:
                metadata.setdefault(pair.key, []).append(pair.value)
            context = Context(metadata, timeout_s, self)
            argument = incoming if incoming is not None else _parse(method, request.payload)
            async with asyncio.timeout(timeout_s):
                if method.server_streaming:
                    async with contextlib.aclosing(function(argument, context)) as messages:
                        async for message in messages:
                            await self._send(stream_id, DATA, 0, message.SerializeToString())
                    await self._send(stream_id, DATA, REMOTE_CLOSED | NO_DATA, b"")
                    return
                answer: Message = await function(argument, context)
            payload = Response(payload=answer.SerializeToString()).SerializeToString()
            await self._send(stream_id, RESPONSE, 0, payload)
        except Exception as error:
            self._respond(stream_id, self._server._status(error, request))

    async def _send(self, stream_id: int, type_: int, flags: int, payload: bytes) -> None:
        self._writer.write(framing.encode(stream_id, type_, flags, payload, self._server.max_message_bytes))
        try:
            await self._writer.drain()
        except OSError as error:
            # Not the handler's: the connection is lost, and with it the answer.
            log.debug("ttrpc: answer on stream %d lost: %s", stream_id, error)

    def _respond(self, stream_id: int, status: StatusError) -> None:
        response = Response()
        response.status.code = status.code
        # An error's text must not itself be too long to be told.
        response.status.message = status.message[:65536]
        self._writer.write(framing.encode(stream_id, RESPONSE, 0, response.SerializeToString()))


class _Incoming:
    """What a client streams, as the handler's async iterator."""

    def __init__(self, method: MethodDescriptor) -> None:
        self._method = method
        self._payloads: asyncio.Queue[bytes | None] = asyncio.Queue(_STREAM_MESSAGES)
        self._closed = False

    def put_first(self, payload: bytes) -> None:
        self._payloads.put_nowait(payload)

    async def put(self, payload: bytes | None) -> None:
        """ttrpc has no flow control: a handler that does not read for a second loses the stream."""
        if self._closed:
            raise StatusError(Code.INVALID_ARGUMENT, "data handling error: the stream is closed")
        self._closed = payload is None
        try:
            async with asyncio.timeout(_STREAM_FULL_S):
                await self._payloads.put(payload)
        except TimeoutError:
            raise StatusError(Code.RESOURCE_EXHAUSTED, "data handling error: the stream is full") from None

    def __aiter__(self) -> AsyncIterator[Message]:
        return self

    async def __anext__(self) -> Message:
        payload = await self._payloads.get()
        if payload is None:
            raise StopAsyncIteration
        return _parse(self._method, payload)


def _parse(method: MethodDescriptor, payload: bytes) -> Message:
    try:
        return GetMessageClass(method.input_type).FromString(payload)
    except DecodeError as error:
        raise StatusError(Code.INVALID_ARGUMENT, f"unmarshal request error: {error}") from None
