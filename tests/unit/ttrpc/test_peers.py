"""Peers that are slow, silent, or wrong: what they cost, and whom."""

import asyncio
import contextlib
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.ttrpc.echo import ECHO, EchoHandler, Text, calling, serving
from ttrpc import Client, Code, ConnectionClosed, ProtocolError, Server, StatusError, TtrpcError
from ttrpc.framing import (
    DATA,
    MAX_MESSAGE_BYTES,
    NO_DATA,
    REMOTE_CLOSED,
    REMOTE_OPEN,
    REQUEST,
    RESPONSE,
    Frame,
    encode,
    read_frame,
)
from ttrpc.inbox import CONNECTION_BYTES, STREAM_BYTES, STREAM_MESSAGES, Budget, Inbox
from ttrpc.request_pb2 import Request, Response

MIB = 1 << 20


def envelope(method: str, message: Any = None) -> bytes:
    payload = b"" if message is None else message.SerializeToString()
    return Request(service="tests.echo.Echo", method=method, payload=payload).SerializeToString()


def answer(message: Any) -> bytes:
    return Response(payload=message.SerializeToString()).SerializeToString()


async def until(condition: Callable[[], object]) -> None:
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen in 30 s")


class Raw:
    """One end of a connection, as frames."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, stream_id: int, type_: int, flags: int = 0, payload: bytes = b"") -> None:
        self.writer.write(encode(stream_id, type_, flags, payload))

    async def receive(self) -> Frame | None:
        return await read_frame(self.reader)

    async def refusal(self, stream_id: int) -> tuple[Code, str]:
        frame = await self.receive()
        assert frame is not None
        assert (frame.stream_id, frame.type) == (stream_id, RESPONSE)
        status = Response.FromString(frame.payload).status
        return Code(status.code), status.message


@contextlib.asynccontextmanager
async def raw_client(handler: EchoHandler | None = None) -> AsyncIterator[tuple[Raw, Server, Any]]:
    """A server on one end of a socket pair, the test as its client on the other."""
    async with asyncio.timeout(60):
        ours, theirs = socket.socketpair()
        server = Server()
        server.register(ECHO, handler or EchoHandler())
        reader, writer = await asyncio.open_connection(sock=theirs)
        serving = asyncio.create_task(server.serve_connection(reader, writer))
        raw = Raw(*await asyncio.open_connection(sock=ours))
        try:
            yield raw, server, writer.transport
        finally:
            raw.writer.transport.abort()
            await serving


@contextlib.asynccontextmanager
async def raw_server() -> AsyncIterator[tuple[Client, Raw]]:
    """A client on one end of a socket pair, the test as its server on the other."""
    async with asyncio.timeout(60):
        ours, theirs = socket.socketpair()
        client = Client(*await asyncio.open_connection(sock=ours))
        raw = Raw(*await asyncio.open_connection(sock=theirs))
        try:
            yield client, raw
        finally:
            await client.close()
            raw.writer.transport.abort()


# The server's peer


def test_large_answers_to_a_client_that_never_reads_wait_in_their_handlers() -> None:
    class Large(EchoHandler):
        running = 0

        async def say(self, request: Any, context: object) -> Any:
            self.running += 1
            return Text(data=bytes(MIB))

    async def body() -> None:
        handler = Large()
        async with raw_client(handler) as (raw, _, transport):
            for number in range(1, 400, 2):
                raw.send(number, REQUEST, 0, envelope("Say"))
            await raw.writer.drain()
            await until(lambda: handler.running > 0)
            await asyncio.sleep(0.3)
            assert transport.get_write_buffer_size() <= 2 * MIB

            # When it reads after all, it gets them all.
            got = set()
            for _ in range(200):
                frame = await raw.receive()
                assert frame is not None
                assert len(frame.payload) > MIB
                got.add(frame.stream_id)
            assert got == set(range(1, 400, 2))

    asyncio.run(body())


def test_oversized_frame_is_answered_and_never_held() -> None:
    async def body() -> None:
        async with raw_client() as (raw, _, _):
            piece = bytes(64 << 10)
            size = 15 * MIB
            tracemalloc.start()
            try:
                raw.writer.write(size.to_bytes(4, "big") + (1).to_bytes(4, "big") + bytes([REQUEST, 0]))
                for _ in range(size // len(piece)):
                    raw.writer.write(piece)
                    await raw.writer.drain()
                code, text = await raw.refusal(1)
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            assert code is Code.RESOURCE_EXHAUSTED
            assert text == f"message length {size} exceed maximum message size of {MAX_MESSAGE_BYTES}"
            assert peak < 8 * MIB
            raw.send(3, REQUEST, 0, envelope("Say", Text(text="on")))
            frame = await raw.receive()
            assert frame is not None
            assert frame.payload == answer(Text(text="on"))

    asyncio.run(body())


def test_stream_that_its_handler_does_not_read_is_bounded_and_ended() -> None:
    async def body() -> None:
        ended = asyncio.Event()

        class Deaf(EchoHandler):
            async def join(self, requests: Any, context: object) -> Any:
                try:
                    await asyncio.sleep(3600)
                finally:
                    ended.set()

        async with raw_client(Deaf()) as (raw, server, _):
            raw.send(1, REQUEST, REMOTE_OPEN, envelope("Join"))
            for _ in range(2):
                raw.send(1, DATA, 0, Text(data=bytes(4 * MIB - 100)).SerializeToString())
            await raw.writer.drain()
            (connection,) = server._connections
            await until(lambda: connection._budget.used >= 7 * MIB)
            raw.send(1, DATA, 0, Text(data=bytes(MIB)).SerializeToString())
            # The call behind it waits for a second, not for ever.
            raw.send(3, REQUEST, 0, envelope("Say", Text(text="on")))
            assert (await raw.refusal(1))[0] is Code.RESOURCE_EXHAUSTED
            await ended.wait()
            frame = await raw.receive()
            assert frame is not None
            assert (frame.stream_id, frame.payload) == (3, answer(Text(text="on")))
            await until(lambda: not connection.tasks)
            assert connection._budget.used == 0

    asyncio.run(body())


def test_a_slow_reader_of_a_stream_gets_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ttrpc.inbox._FULL_S", 60)

    async def body() -> None:
        class Slow(EchoHandler):
            async def join(self, requests: AsyncIterator[Any], context: object) -> Any:
                count = 0
                async for _ in requests:
                    count += 1
                    if count % 20 == 0:
                        await asyncio.sleep(0.05)
                return Text(text=str(count))

        async with raw_client(Slow()) as (raw, _, _):
            raw.send(1, REQUEST, REMOTE_OPEN, envelope("Join"))
            for _ in range(500):
                raw.send(1, DATA, 0, Text(data=bytes(1000)).SerializeToString())
                await raw.writer.drain()
            raw.send(1, DATA, REMOTE_CLOSED | NO_DATA)
            frame = await raw.receive()
            assert frame is not None
            assert frame.payload == answer(Text(text="500"))

    asyncio.run(body())


def test_a_reader_that_makes_room_as_the_second_ends_is_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # With no time at all the reader has made room when it is over, and the writer has not gone on yet.
    monkeypatch.setattr("ttrpc.inbox._FULL_S", 0)

    async def body() -> None:
        inbox: Inbox[int] = Inbox(Budget())
        for number in range(STREAM_MESSAGES):
            assert await inbox.put(number, 1)
        assert await asyncio.gather(inbox.put(STREAM_MESSAGES, 1), inbox.get()) == [True, 0]
        assert [await inbox.get() for _ in range(STREAM_MESSAGES)] == list(range(1, STREAM_MESSAGES + 1))

    asyncio.run(body())


def test_who_serves_a_connection_is_told_whether_anything_was_asked() -> None:
    async def asked(*frames: tuple[int, int, int, bytes]) -> bool:
        ours, theirs = socket.socketpair()
        server = Server()
        server.register(ECHO, EchoHandler())
        serving = asyncio.create_task(server.serve_connection(*await asyncio.open_connection(sock=theirs)))
        raw = Raw(*await asyncio.open_connection(sock=ours))
        for frame in frames:
            raw.send(*frame)
        raw.writer.write_eof()
        answer = await serving
        raw.writer.close()
        return answer

    async def body() -> None:
        assert not await asked()
        assert not await asked((1, DATA, 0, b""))
        assert await asked((1, REQUEST, 0, envelope("Say")))
        assert await asked((1, REQUEST, 0, envelope("None")))

    asyncio.run(body())


def test_number_and_bytes_of_calls_on_a_connection_are_bounded() -> None:
    async def body() -> None:
        async with raw_client() as (raw, _, _):
            for number in range(1, 2 * 4096, 2):
                raw.send(number, REQUEST, 0, envelope("Sleep"))
            raw.send(9001, REQUEST, 0, envelope("Sleep"))
            code, text = await raw.refusal(9001)
            assert code is Code.RESOURCE_EXHAUSTED
            assert "4096 calls" in text
        async with raw_client() as (raw, _, _):
            large = envelope("Sleep", Text(data=bytes(4 * MIB - 100)))
            for number in range(1, 100, 2):
                raw.send(number, REQUEST, 0, large)
                await raw.writer.drain()
            for number in range(2 * (CONNECTION_BYTES // len(large)) + 1, 100, 2):
                assert (await raw.refusal(number))[0] is Code.RESOURCE_EXHAUSTED

    asyncio.run(body())


@pytest.mark.parametrize(
    ("frames", "stream_id", "code", "text"),
    [
        ([(2, REQUEST, 0, envelope("Say"))], 2, Code.INVALID_ARGUMENT, "StreamID must be odd"),
        ([(1, DATA, 0, b"")], 1, Code.INVALID_ARGUMENT, "StreamID is no longer active"),
        ([(1, REQUEST, 0, b"\xff")], 1, Code.INVALID_ARGUMENT, "unmarshal request error"),
        ([(1, REQUEST, 0, envelope("None"))], 1, Code.UNIMPLEMENTED, "method None"),
        (
            [(1, REQUEST, 0, Request(service="no.Such", method="Say").SerializeToString())],
            1,
            Code.UNIMPLEMENTED,
            "service no.Such",
        ),
        (
            [
                (
                    1,
                    REQUEST,
                    0,
                    Request(service="tests.echo.Echo", method="Say", payload=b"\xff").SerializeToString(),
                )
            ],
            1,
            Code.INVALID_ARGUMENT,
            "unmarshal request error",
        ),
        (
            [(1, REQUEST, 0, envelope("Sleep")), (1, DATA, 0, b"")],
            1,
            Code.INVALID_ARGUMENT,
            "the client of Sleep does not stream",
        ),
        (
            [(1, REQUEST, 0, envelope("Sleep")), (1, REQUEST, 0, envelope("Say"))],
            1,
            Code.INVALID_ARGUMENT,
            "StreamID cannot be re-used and must increment",
        ),
        (
            [
                (1, REQUEST, REMOTE_OPEN, envelope("Chat")),
                (1, DATA, REMOTE_CLOSED | NO_DATA, b""),
                (1, DATA, 0, b""),
            ],
            1,
            Code.INVALID_ARGUMENT,
            "stream closed",
        ),
        (
            [(1, REQUEST, REMOTE_OPEN, envelope("Chat")), (1, DATA, 0, b"\xff")],
            1,
            Code.INVALID_ARGUMENT,
            "unmarshal request error",
        ),
    ],
)
def test_a_wrong_frame_ends_its_stream_only(
    frames: list[tuple[int, int, int, bytes]], stream_id: int, code: Code, text: str
) -> None:
    async def body() -> None:
        async with raw_client() as (raw, _, _):
            for frame in frames:
                raw.send(*frame)
            got_code, got_text = await raw.refusal(stream_id)
            assert got_code is code
            assert text in got_text
            raw.send(9, 77, 0, b"of a later version, ignored")
            raw.send(11, REQUEST, 0, envelope("Say", Text(text="on")))
            frame = await raw.receive()
            assert frame is not None
            assert (frame.stream_id, frame.payload) == (11, answer(Text(text="on")))

    asyncio.run(body())


def test_the_last_data_may_close_the_stream_too() -> None:
    async def body() -> None:
        async with raw_client() as (raw, _, _):
            raw.send(1, REQUEST, REMOTE_OPEN, envelope("Join", Text(text="a")))
            raw.send(1, DATA, NO_DATA)
            raw.send(1, DATA, REMOTE_CLOSED, Text(text="b").SerializeToString())
            frame = await raw.receive()
            assert frame is not None
            assert frame.payload == answer(Text(text="ab"))

    asyncio.run(body())


def test_shutdown_does_not_wait_for_a_client_that_never_reads() -> None:
    async def body() -> None:
        async with raw_client() as (raw, server, transport):
            raw.send(1, REQUEST, 0, envelope("Say", Text(data=bytes(3 * MIB))))
            await raw.writer.drain()
            await until(transport.get_write_buffer_size)
            await server.shutdown(0.1)
            assert not server._connections

    asyncio.run(body())


def test_shutdown_lets_a_client_read_its_answer() -> None:
    async def body() -> None:
        async with raw_client() as (raw, server, transport):
            raw.send(1, REQUEST, 0, envelope("Say", Text(data=bytes(3 * MIB))))
            await raw.writer.drain()
            await until(transport.get_write_buffer_size)
            stopping = asyncio.create_task(server.shutdown(30))
            await asyncio.sleep(0.05)
            frame = await raw.receive()
            assert frame is not None
            assert len(frame.payload) > 3 * MIB
            assert await raw.receive() is None
            await stopping

    asyncio.run(body())


# The client's peer


def test_client_that_is_closed_at_once_is_closed() -> None:
    async def body() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            client = Client(*await asyncio.open_connection(sock=ours))
            await client.close()
            assert client.closed
            await client.wait_closed()
            theirs.setblocking(False)
            async with asyncio.timeout(30):
                assert await asyncio.get_running_loop().sock_recv(theirs, 1) == b""

    asyncio.run(body())


def test_calls_to_a_server_that_never_reads_time_out_and_are_not_kept() -> None:
    async def body() -> None:
        async with raw_server() as (client, _):
            echo = client.service(ECHO)
            for _ in range(20):
                with pytest.raises(StatusError, match=r"no answer to tests.echo.Echo.Say within 0.02 s"):
                    await echo.say(Text(data=bytes(MIB)), timeout_s=0.02)
            assert client._writer.transport.get_write_buffer_size() <= 2 * MIB  # type: ignore[attr-defined]
            assert not client._unary

    asyncio.run(body())


def test_stream_has_a_deadline_and_can_be_forgotten() -> None:
    async def body() -> None:
        async with raw_server() as (client, raw):
            echo = client.service(ECHO)
            chat = await echo.chat(timeout_s=0.05)
            with pytest.raises(StatusError) as late:
                await chat.receive()
            assert late.value.code is Code.DEADLINE_EXCEEDED
            assert await chat.receive() is None

            forgotten = await echo.chat()
            forgotten.close()
            for _ in range(500):
                raw.send(3, DATA, 0, b"")
            call = asyncio.create_task(echo.say(Text()))
            await asyncio.sleep(0)
            raw.send(5, RESPONSE, 0, answer(Text(text="on")))
            assert (await call).text == "on"
            with pytest.raises(ProtocolError, match="sending side is closed"):
                await forgotten.send(Text())
            assert not client._streams

    asyncio.run(body())


@pytest.mark.parametrize(
    ("frame", "error", "text"),
    [
        ((DATA, 0, b""), ProtocolError, "frame of type 3"),
        ((9, 0, b""), ProtocolError, "frame of type 9"),
        ((RESPONSE, 0, b"\xff"), ProtocolError, "does not decode"),
        ((RESPONSE, 0, Response(payload=b"\xff").SerializeToString()), ProtocolError, "does not decode"),
        ((RESPONSE, 0, bytes(5 * MIB)), StatusError, "exceed maximum message size"),
    ],
)
@pytest.mark.parametrize("method", ["say", "join"])
def test_a_wrong_answer_is_its_calls_error_only(
    method: str, frame: tuple[int, int, bytes], error: type[Exception], text: str
) -> None:
    async def body() -> None:
        async with raw_server() as (client, raw):
            echo = client.service(ECHO)

            async def ask(stream_id: int, *frame: Any) -> Any:
                if method == "say":
                    call = asyncio.create_task(echo.say(Text()))
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
                else:
                    call = (await echo.join()).receive()
                raw.send(stream_id, *frame)
                return await call

            raw.send(2, RESPONSE, 0, b"on a stream that nobody opened")
            with pytest.raises(error, match=text):
                await ask(1, *frame)
            assert (await ask(3, RESPONSE, 0, answer(Text(text="on")))).text == "on"

    asyncio.run(body())


def test_ends_of_a_streaming_answer() -> None:
    """Data with the closing flag, the flag alone, the empty response that PROTOCOL.md speaks of, an error."""

    async def body() -> None:
        async with raw_server() as (client, raw):
            echo = client.service(ECHO)
            message = Text(text="m").SerializeToString()
            for number, (end, expected) in enumerate(
                [
                    ((DATA, REMOTE_CLOSED, message), ["m", "m"]),
                    ((DATA, REMOTE_CLOSED | NO_DATA, b""), ["m"]),
                    ((RESPONSE, 0, b""), ["m"]),
                    ((RESPONSE, 0, answer(Text(text="last"))), ["m", "last"]),
                ]
            ):
                stream = await echo.count(Text())
                raw.send(2 * number + 1, DATA, 0, message)
                raw.send(2 * number + 1, DATA, NO_DATA)
                raw.send(2 * number + 1, *end)
                assert [m.text async for m in stream] == expected
            assert not client._streams

    asyncio.run(body())


def test_unread_streams_hold_no_more_than_their_share() -> None:
    async def body() -> None:
        async with raw_server() as (client, raw):
            stream = await client.service(ECHO).count(Text())
            payload = Text(data=bytes(3 * MIB)).SerializeToString()
            for _ in range(4):
                raw.send(1, DATA, 0, payload)
                await raw.writer.drain()
            received = 0
            await asyncio.sleep(1.5)
            with pytest.raises(StatusError, match="not read"):
                while await stream.receive():
                    received += 1
            assert received == STREAM_BYTES // len(payload)
            assert client._budget.used == 0

    asyncio.run(body())


def test_reason_of_a_broken_connection_is_told() -> None:
    async def body() -> None:
        async with raw_server() as (client, raw):
            call = asyncio.create_task(client.service(ECHO).say(Text()))
            await asyncio.sleep(0)
            raw.writer.write(b"HTTP/1.1 400 Bad Request\r\n")
            with pytest.raises(ConnectionClosed, match="reserved first byte of a frame is 0x48"):
                await call
            with pytest.raises(ConnectionClosed, match="0x48"):
                await client.service(ECHO).say(Text())

    asyncio.run(body())


_frames = st.builds(
    encode,
    st.integers(0, 8),
    st.integers(0, 4),
    st.integers(0, 7),
    st.one_of(
        st.binary(max_size=64),
        st.builds(lambda text: answer(Text(text=text)), st.text(max_size=5)),
        st.builds(lambda code: Response(status={"code": code}).SerializeToString(), st.integers(-9, 20)),
    ),
)


@settings(max_examples=150)
@given(st.lists(st.one_of(_frames, st.binary(max_size=40)), max_size=10))
def test_whatever_a_server_sends_every_call_ends_with_our_errors(pieces: list[bytes]) -> None:
    async def body() -> None:
        async with raw_server() as (client, raw):
            echo = client.service(ECHO)
            call = asyncio.create_task(echo.say(Text()))
            counting, chat = await echo.count(Text()), await echo.chat()
            raw.writer.write(b"".join(pieces))
            raw.writer.write_eof()
            for end in (call, counting.receive(), chat.receive()):
                with contextlib.suppress(TtrpcError):
                    await end
            await client.wait_closed()
            for stream in (counting, chat):
                with contextlib.suppress(TtrpcError):
                    while await stream.receive():
                        pass
            assert not client._unary
            assert not client._streams
            assert client._budget.used == 0

    asyncio.run(body())


# Handlers


def test_what_a_handler_awaits_and_another_cancels_is_answered(tmp_path: Path) -> None:
    class Handler(EchoHandler):
        async def say(self, request: Any, context: object) -> Any:
            other = asyncio.create_task(asyncio.sleep(3600))
            other.cancel()
            await other

    async def body() -> None:
        async with serving(tmp_path / "s") as (server, _):
            server._services.clear()
            server.register(ECHO, Handler())
            client = await Client.connect(tmp_path / "s")
            with pytest.raises(StatusError) as caught:
                await client.service(ECHO).say(Text(), timeout_s=30)
            assert caught.value.code is Code.CANCELLED
            await client.close()

    asyncio.run(body())


def test_a_handlers_own_timeout_keeps_its_text_and_details_arrive(tmp_path: Path) -> None:
    from google.protobuf.any_pb2 import Any as AnyMessage

    class Handler(EchoHandler):
        async def say(self, request: Any, context: object) -> Any:
            raise TimeoutError("crun did not answer")

        async def refuse(self, request: Any, context: object) -> Any:
            raise StatusError(Code.NOT_FOUND, "x", [AnyMessage(type_url="type/of.it", value=b"detail")])

    async def body() -> None:
        async with serving(tmp_path / "s") as (server, _):
            server._services.clear()
            server.register(ECHO, Handler())
            client = await Client.connect(tmp_path / "s")
            with pytest.raises(StatusError, match="crun did not answer"):
                await client.service(ECHO).say(Text(), timeout_s=30)
            with pytest.raises(StatusError) as caught:
                await client.service(ECHO).refuse(Text())
            (detail,) = caught.value.details
            assert (detail.type_url, detail.value) == ("type/of.it", b"detail")
            await client.close()

    asyncio.run(body())


def test_map_error_that_fails_itself_still_answers(tmp_path: Path) -> None:
    class Handler(EchoHandler):
        async def say(self, request: Any, context: object) -> Any:
            raise RuntimeError("the first")

    def map_error(error: Exception) -> StatusError:
        raise AssertionError("the second")

    async def body() -> None:
        async with serving(tmp_path / "s", map_error=map_error) as (server, _):
            server._services.clear()
            server.register(ECHO, Handler())
            client = await Client.connect(tmp_path / "s")
            with pytest.raises(StatusError, match="the first"):
                await client.service(ECHO).say(Text(), timeout_s=30)
            await client.close()

    asyncio.run(body())


def test_a_thousand_tasks_send_whole_frames_on_one_connection(tmp_path: Path) -> None:
    async def body() -> None:
        async with calling(tmp_path / "s") as (echo, _, _):
            sizes = [(number * 7919) % 200_000 for number in range(1000)]
            answers = await asyncio.gather(*(echo.say(Text(data=bytes(size))) for size in sizes))
            assert [len(a.data) for a in answers] == sizes

    asyncio.run(body())


def test_importing_ttrpc_imports_little() -> None:
    program = "import sys, ttrpc, ttrpc.chardev; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    for heavy in (
        "grpc",
        "email",
        "http",
        "xml",
        "tomllib",
        "importlib.metadata",
        "secrets",
        "pathlib.types",
    ):
        assert heavy not in modules
    assert {
        name for name in modules if name.split(".")[0] in ("shim", "agent_client", "virtcontainers")
    } == set()
