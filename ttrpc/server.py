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
from ttrpc.inbox import Budget, Inbox
from ttrpc.naming import snake_case
from ttrpc.request_pb2 import Request, Response

log = logging.getLogger(__name__)

MapError = Callable[[Exception], StatusError | None]

_MAX_STREAMS = 4096
_MAX_TEXT = 64 << 10


class Context:
    """What a handler may know of its call. Its task is cancelled when the connection ends."""

    def __init__(self, metadata: dict[str, list[str]], timeout_s: float | None, connection: object) -> None:
        self.metadata = metadata
        self.timeout_s = timeout_s
        """What the caller gave; the handler is cancelled after it. None: for as long as it takes."""
        self.connection = connection
        """The same object for every call of one connection."""


class Server:
    """Services of protobuf, each with a handler object, on any number of connections.

    A handler has a coroutine per unary method, named in snake_case, `async def method(request, context)`.
    Where the client streams, `request` is an async iterator; where the server streams, the method is an
    async generator. A method that the handler does not have is answered UNIMPLEMENTED. A StatusError is
    answered as it is; any other exception goes through `map_error`, and when that returns None it is logged
    with its traceback and answered UNKNOWN with its text.

    A connection whose peer does not read its answers is not read either. At most 4096 calls run on one, with
    64 MiB of requests; one more is answered RESOURCE_EXHAUSTED.
    """

    def __init__(
        self, *, max_message_bytes: int = framing.MAX_MESSAGE_BYTES, map_error: MapError | None = None
    ) -> None:
        self.max_message_bytes = max_message_bytes
        self._map_error = map_error
        self._services: dict[str, tuple[ServiceDescriptor, object]] = {}
        self._connections: set[_Connection] = set()
        self._stopped = asyncio.Event()

    def register(self, service: ServiceDescriptor, handler: object, *, name: str | None = None) -> None:
        """`name` replaces the service's full name on the wire. Raises ValueError when it is taken."""
        name = name or service.full_name
        if name in self._services:
            raise ValueError(f"service {name} is registered already")
        self._services[name] = (service, handler)

    async def serve(self, sock: socket.socket) -> None:
        """Accept on a listening socket until `shutdown`. The socket is closed then."""

        async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self.serve_connection(reader, writer)

        listener = await asyncio.start_unix_server(accepted, sock=sock, limit=framing.READ_LIMIT)
        try:
            await self._stopped.wait()
        finally:
            listener.close()

    async def serve_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Returns when the connection has ended and its handlers with it: whether anything was asked."""
        connection = _Connection(self, reader, writer)
        if self._stopped.is_set():
            connection.abort()
            return False
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)
            connection.ended.set()
        return connection.was_asked

    async def shutdown(self, grace_s: float) -> None:
        """Accept no connection and no call any more, give what runs `grace_s` to be answered, then end every
        connection; returns when their handlers have ended. Idempotent. A handler must not await it: it is
        waited for.
        """
        self._stopped.set()
        deadline = asyncio.get_running_loop().time() + grace_s
        running = {task for connection in self._connections for task in connection.tasks}
        if running:
            await asyncio.wait(running, timeout=grace_s)
        connections = list(self._connections)
        for connection in connections:
            connection.close()
        try:
            async with asyncio.timeout_at(deadline):
                for connection in connections:
                    await connection.ended.wait()
        except TimeoutError:
            for connection in connections:
                connection.abort()
            for connection in connections:
                await connection.ended.wait()

    def _find(self, request: Request) -> tuple[MethodDescriptor, Callable[..., Any]]:
        if self._stopped.is_set():
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
        try:
            mapped = self._map_error(error) if self._map_error else None
        except Exception:
            log.exception("map_error failed")
            mapped = None
        if mapped is None:
            log.error("%s/%s failed", request.service, request.method, exc_info=error)
            mapped = StatusError(Code.UNKNOWN, str(error) or type(error).__name__)
        return mapped


class _Call:
    """A stream whose answer is not sent yet."""

    def __init__(self, request: Request, method: MethodDescriptor, function: Callable[..., Any]) -> None:
        self.request = request
        self.method = method
        self.function = function
        self.task: asyncio.Task[None]
        self.inbox: Inbox[bytes] | None = None


class _Connection:
    def __init__(self, server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.tasks: set[asyncio.Task[None]] = set()
        self.ended = asyncio.Event()
        self._server = server
        self._reader = reader
        self._writer = writer
        self._sending = asyncio.Lock()
        self._last_id = 0
        self._calls: dict[int, _Call] = {}
        self._budget = Budget()

    @property
    def was_asked(self) -> bool:
        return self._last_id > 0

    def close(self) -> None:
        """End it when the answers are out."""
        self._writer.close()

    def abort(self) -> None:
        framing.abort(self._writer)

    async def run(self) -> None:
        try:
            while (
                frame := await framing.read_frame(self._reader, self._server.max_message_bytes)
            ) is not None:
                await self._dispatch(frame)
                # A peer that does not read its answers is not read either: its answers stay bounded.
                await self._writer.drain()
        except ProtocolError as error:
            log.warning("connection on %s ended: %s", framing.peer_name(self._writer), error)
        except OSError as error:
            log.debug("connection on %s ended: %s", framing.peer_name(self._writer), error)
        finally:
            self.abort()
            for task in self.tasks:
                task.cancel()
            if self.tasks:
                await asyncio.wait(self.tasks)

    async def _dispatch(self, frame: Frame) -> None:
        try:
            framing.check_size(frame.oversized, self._server.max_message_bytes)
            if frame.stream_id % 2 != 1:
                raise StatusError(Code.INVALID_ARGUMENT, "StreamID must be odd for client initiated streams")
            if frame.type == REQUEST:
                self._open(frame)
            elif frame.type == DATA:
                await self._data(frame)
            else:
                log.debug("frame of type %d ignored", frame.type)
        except StatusError as status:
            # It is the stream's only answer: what was at work on another has no one to tell.
            if (call := self._calls.pop(frame.stream_id, None)) is not None:
                call.task.cancel()
            with contextlib.suppress(OSError):
                await self._send(frame.stream_id, RESPONSE, 0, _refusal(status))

    def _open(self, frame: Frame) -> None:
        stream_id, size = frame.stream_id, len(frame.payload)
        if stream_id <= self._last_id:
            raise StatusError(Code.INVALID_ARGUMENT, "StreamID cannot be re-used and must increment")
        self._last_id = stream_id
        try:
            request = Request.FromString(frame.payload)
        except DecodeError as error:
            raise StatusError(Code.INVALID_ARGUMENT, f"unmarshal request error: {error}") from None
        if len(self.tasks) >= _MAX_STREAMS or not self._budget.fits(size):
            raise StatusError(
                Code.RESOURCE_EXHAUSTED,
                f"{len(self.tasks)} calls with {self._budget.used} bytes are open on this connection",
            )
        call = _Call(request, *self._server._find(request))
        if call.method.client_streaming:
            call.inbox = Inbox(self._budget)
        self._calls[stream_id] = call
        self._budget.take(size)
        call.task = asyncio.create_task(self._answer(stream_id, call))
        self.tasks.add(call.task)

        def done(task: asyncio.Task[None]) -> None:
            self.tasks.discard(task)
            self._budget.free(size)
            if call.inbox is not None:
                call.inbox.close()
            if self._calls.get(stream_id) is call:
                del self._calls[stream_id]

        call.task.add_done_callback(done)

    async def _data(self, frame: Frame) -> None:
        call = self._calls.get(frame.stream_id)
        if call is None:
            raise StatusError(Code.INVALID_ARGUMENT, "StreamID is no longer active")
        if not frame.flags & NO_DATA:
            if call.inbox is None:
                raise StatusError(Code.INVALID_ARGUMENT, f"the client of {call.method.name} does not stream")
            if call.inbox.ended:
                raise StatusError(Code.INVALID_ARGUMENT, "data handling error: ttrpc: stream closed")
            if not await call.inbox.put(frame.payload, len(frame.payload)):
                raise StatusError(Code.RESOURCE_EXHAUSTED, "data handling error: ttrpc: stream buffer full")
        if frame.flags & REMOTE_CLOSED and call.inbox is not None:
            call.inbox.end()

    async def _answer(self, stream_id: int, call: _Call) -> None:
        request = call.request
        timeout_s = request.timeout_nano / 1e9 if request.timeout_nano else None
        deadline = asyncio.timeout(timeout_s)
        try:
            metadata: dict[str, list[str]] = {}
            for pair in request.metadata:
                metadata.setdefault(pair.key, []).append(pair.value)
            context = Context(metadata, timeout_s, self)
            argument: Any
            if call.inbox is None:
                argument = _parse(call.method, request.payload)
            else:
                argument = _Requests(call.method, request.payload, call.inbox)
            async with deadline:
                if call.method.server_streaming:
                    async with contextlib.aclosing(call.function(argument, context)) as messages:
                        async for message in messages:
                            payload = message.SerializeToString()
                            framing.check_size(len(payload), self._server.max_message_bytes)
                            await self._reply(stream_id, call, DATA, 0, payload)
                    last = DATA, REMOTE_CLOSED | NO_DATA, b""
                else:
                    answer: Message = await call.function(argument, context)
                    payload = Response(payload=answer.SerializeToString()).SerializeToString()
                    framing.check_size(len(payload), self._server.max_message_bytes)
                    last = RESPONSE, 0, payload
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Not ours: the handler awaited something that somebody else cancelled.
            last = RESPONSE, 0, _refusal(StatusError(Code.CANCELLED, "context canceled"))
        except Exception as error:
            if isinstance(error, TimeoutError) and deadline.expired():
                error = StatusError(Code.DEADLINE_EXCEEDED, "context deadline exceeded")
            last = RESPONSE, 0, _refusal(self._server._status(error, request))
        await self._reply(stream_id, call, *last)

    async def _reply(self, stream_id: int, call: _Call, type_: int, flags: int, payload: bytes) -> None:
        if self._calls.get(stream_id) is not call:
            return
        try:
            await self._send(stream_id, type_, flags, payload)
        except OSError as error:
            # Not the handler's: the connection is lost, and with it the answer.
            log.debug("answer on stream %d lost: %s", stream_id, error)

    async def _send(self, stream_id: int, type_: int, flags: int, payload: bytes) -> None:
        async with self._sending:
            await self._writer.drain()
            framing.write_frame(self._writer, stream_id, type_, flags, payload)


class _Requests:
    """What a client streams, as the handler's async iterator."""

    def __init__(self, method: MethodDescriptor, first: bytes, inbox: Inbox[bytes]) -> None:
        self._method = method
        self._first = first
        self._inbox = inbox

    def __aiter__(self) -> AsyncIterator[Message]:
        return self

    async def __anext__(self) -> Message:
        payload: bytes | None
        if self._first:
            payload, self._first = self._first, b""
        else:
            payload = await self._inbox.get()
        if payload is None:
            raise StopAsyncIteration
        return _parse(self._method, payload)


def _refusal(status: StatusError) -> bytes:
    response = Response()
    response.status.code = status.code
    # An error must not itself be too long to be told.
    response.status.message = status.message[:_MAX_TEXT]
    for detail in status.details:
        response.status.details.add(type_url=detail.type_url, value=detail.value)
    if response.ByteSize() > framing.MAX_MESSAGE_BYTES:
        del response.status.details[:]
    return response.SerializeToString()


def _parse(method: MethodDescriptor, payload: bytes) -> Message:
    try:
        return GetMessageClass(method.input_type).FromString(payload)
    except DecodeError as error:
        raise StatusError(Code.INVALID_ARGUMENT, f"unmarshal request error: {error}") from None
