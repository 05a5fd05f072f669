"""A connection carried by our PortForward service: the agent's end as it is, over ttrpc, and ours."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from typing import Any, cast

import pytest

from agent_client.protocols import port_forward_pb2
from agent_client.protocols.forwarding import WINDOW_BYTES, Broken, Carrier
from agent_client.protocols.port_forward_pb2 import Chunk
from guest.agent.rpc import PortForwardService, map_error
from ttrpc import Client, ClientStream, Code, Server, StatusError, TtrpcError

TIMEOUT_S = 60
BODY = os.urandom(1 << 20) * 3
SERVICE = port_forward_pb2.DESCRIPTOR.services_by_name["PortForward"]

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def agent() -> AsyncIterator[Callable[[], Awaitable[ClientStream]]]:
    """What opens a stream to it."""
    server = Server(map_error=map_error)
    server.register(SERVICE, PortForwardService())
    ours, theirs = socket.socketpair()
    serving = asyncio.create_task(server.serve_connection(*await asyncio.open_connection(sock=theirs)))
    client = Client(*await asyncio.open_connection(sock=ours))
    try:
        yield lambda: client.stream(SERVICE.methods_by_name["Forward"])
    finally:
        await client.close()
        await serving


@contextlib.asynccontextmanager
async def listening(serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]) -> AsyncIterator[int]:
    """Its port, on loopback."""
    sock = socket.create_server(("127.0.0.1", 0))
    # Else the kernel may make room for all that a test sends to who does not read it.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    server = await asyncio.start_server(serve, sock=sock)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def local() -> tuple[Streams, Streams]:
    """Who asks, and the socket that is carried for them."""
    one, other = socket.socketpair()
    return await asyncio.open_connection(sock=one), await asyncio.open_connection(sock=other)


async def carry(stream: ClientStream, port: int, streams: Streams, **options: Any) -> None:
    await stream.send(Chunk(port=port))
    reader, writer = streams
    await Carrier(reader, writer, stream.send, **options).run(cast(AsyncIterable[Chunk], stream))
    writer.close()


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await body()

    asyncio.run(whole())


def test_all_bytes_are_carried_both_ways_and_the_answer_may_come_after_the_end() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        digest = hashlib.sha256(await reader.read())
        writer.write(digest.digest() + BODY)
        writer.close()

    async def body() -> None:
        async with agent() as open_stream, listening(serve) as port:
            (reader, writer), carried = await local()
            carrying = asyncio.create_task(carry(await open_stream(), port, carried))
            writer.write(BODY)
            writer.write_eof()
            answer = await reader.read()
            assert answer == hashlib.sha256(BODY).digest() + BODY
            await carrying
            writer.close()

    run(body)


def test_a_port_where_nobody_listens_is_named() -> None:
    async def body() -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
            async with agent() as open_stream:
                (_, writer), carried = await local()
                with pytest.raises(StatusError, match=rf"nobody listens on port {port} in the pod") as raised:
                    await carry(await open_stream(), port, carried)
                assert raised.value.code is Code.UNAVAILABLE
                for _, each in ((None, writer), carried):
                    each.close()

    run(body)


def test_no_port_is_refused() -> None:
    async def body() -> None:
        async with agent() as open_stream:
            stream = await open_stream()
            await stream.send(Chunk(port=70000))
            with pytest.raises(StatusError, match="expected a port of 1 to 65535"):
                await stream.receive()

    run(body)


def test_who_does_not_read_is_sent_a_window_and_no_more() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(BODY)
        writer.close()

    async def body() -> None:
        async with agent() as open_stream, listening(serve) as port:
            stream = await open_stream()
            await stream.send(Chunk(port=port))
            seen = 0
            while seen < WINDOW_BYTES:
                chunk = await stream.receive()
                assert isinstance(chunk, Chunk)
                seen += len(chunk.data)
            assert seen == WINDOW_BYTES
            receiving = asyncio.create_task(stream.receive())
            await asyncio.sleep(0.3)
            assert not receiving.done()
            await stream.send(Chunk(taken=1000))
            chunk = await receiving
            assert isinstance(chunk, Chunk)
            assert len(chunk.data) == 1000
            stream.close()

    run(body)


@pytest.mark.parametrize(
    ("chunks", "sentence"),
    [
        ([Chunk(data=bytes(WINDOW_BYTES // 2))] * 60, "more than it may"),
        ([Chunk(taken=1)], "taken more than was sent"),
        ([Chunk(end=True), Chunk(data=b"x")], "more than it may"),
        ([Chunk(reset=True)], "reset at the other end"),
        ([], "the other end is gone"),
    ],
)
def test_an_end_that_does_not_keep_to_it_breaks_the_connection(chunks: list[Chunk], sentence: str) -> None:
    async def body() -> None:
        was_reset: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        has_failed = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await has_failed.wait()
            try:
                while await reader.read(1 << 16):
                    pass
            except ConnectionResetError:
                was_reset.set_result(True)
            else:
                was_reset.set_result(False)
            writer.close()

        async with agent() as open_stream, listening(serve) as port:
            stream = await open_stream()
            await stream.send(Chunk(port=port))
            with contextlib.suppress(TtrpcError):
                for chunk in chunks:
                    await stream.send(chunk)
                await stream.close_send()
            with pytest.raises(StatusError, match=sentence) as raised:
                async for _ in stream:
                    pass
            assert raised.value.code is Code.ABORTED
            has_failed.set()
            # What is not whole must not look so; but an end that was told has been passed on.
            assert await was_reset or chunks[0].end

    run(body)


def test_who_has_ended_and_hears_nothing_is_given_up() -> None:
    async def body() -> None:
        over = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            await over.wait()
            writer.close()

        async with agent() as open_stream, listening(serve) as port:
            (_, writer), carried = await local()
            carrying = asyncio.create_task(carry(await open_stream(), port, carried, idle_after_end_s=0.1))
            writer.close()
            with pytest.raises(Broken, match=r"nothing came for 0\.1 s after its end"):
                await carrying
            carried[1].close()
            over.set()

    run(body)
