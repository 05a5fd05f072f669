"""Connections over a channel that has none: a socket pair stands for the virtio port and its chardev."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.ttrpc.echo import ECHO, EchoHandler, Text
from ttrpc import Client, ConnectionClosed, Server
from ttrpc.chardev import ChardevListener, connect_chardev


@contextlib.asynccontextmanager
async def guest(end: socket.socket, listener: ChardevListener | None = None) -> AsyncIterator[EchoHandler]:
    """The guest's side on one end: a listener that serves one host after another."""
    server, handler = Server(), EchoHandler()
    server.register(ECHO, handler)
    listener = listener or ChardevListener(os.dup(end.fileno()))

    async def serve() -> None:
        while True:
            await server.serve_connection(*await listener.accept())

    task = asyncio.create_task(serve())
    try:
        yield handler
    finally:
        task.cancel()
        await asyncio.wait({task})
        listener.close()


async def connect(end: socket.socket, timeout_s: float = 30) -> Client:
    streams = await asyncio.open_connection(sock=end.dup())
    return Client(*await connect_chardev(*streams, timeout_s=timeout_s))


def run(body: Any) -> None:
    async def whole() -> None:
        host_end, guest_end = socket.socketpair()
        with host_end, guest_end:
            async with asyncio.timeout(120):
                await body(host_end, guest_end)

    asyncio.run(whole())


def test_calls_with_every_byte_come_back() -> None:
    async def body(host_end: socket.socket, guest_end: socket.socket) -> None:
        async with guest(guest_end):
            client = await connect(host_end)
            data = bytes(range(256)) * 8000
            for _ in range(3):
                assert (await client.service(ECHO).say(Text(data=data))).data == data
            await client.close()

    run(body)


def test_host_waits_for_a_guest_that_opens_its_port_late() -> None:
    async def body(host_end: socket.socket, guest_end: socket.socket) -> None:
        connecting = asyncio.create_task(connect(host_end))
        await asyncio.sleep(0.3)
        async with guest(guest_end):
            client = await connecting
            assert (await client.service(ECHO).say(Text(text="late"))).text == "late"
            await client.close()

    run(body)


def test_a_silent_guest_costs_a_timeout() -> None:
    async def body(host_end: socket.socket, guest_end: socket.socket) -> None:
        with pytest.raises(TimeoutError):
            await connect(host_end, timeout_s=0.2)

    run(body)


def test_a_new_host_ends_the_old_connection_and_sees_none_of_its_bytes() -> None:
    async def body(host_end: socket.socket, guest_end: socket.socket) -> None:
        async with guest(guest_end) as handler:
            # The old host dies in the middle of a frame, with a call running and an answer unread.
            old = await connect(host_end)
            sleeping = asyncio.create_task(old.service(ECHO).sleep(Text()))
            await handler.sleeping.wait()
            host_end.send(b"\x00\x00\x40\x00 half a frame")
            new = await connect(host_end)
            for number in range(50):
                assert (await new.service(ECHO).say(Text(text=str(number)))).text == str(number)
            await handler.cancelled.wait()
            await old.close()
            with pytest.raises(ConnectionClosed):
                await sleeping
            await new.close()

    run(body)


def test_unread_answers_of_the_old_host_are_dropped() -> None:
    async def body(host_end: socket.socket, guest_end: socket.socket) -> None:
        async with guest(guest_end):
            old = await connect(host_end)
            old._receiver.cancel()
            calls = [asyncio.create_task(old.service(ECHO).say(Text(data=bytes(300_000)))) for _ in range(10)]
            await asyncio.sleep(0.2)
            new = await connect(host_end)
            assert (await new.service(ECHO).say(Text(text="clean"))).text == "clean"
            for call in calls:
                call.cancel()
            await asyncio.wait(calls)
            await new.close()

    run(body)


def test_nonsense_before_and_between_handshakes_is_no_handshake() -> None:
    async def body(host_end: socket.socket, guest_end: socket.socket) -> None:
        async with guest(guest_end):
            host_end.send(b"noise \x7e short\n \x7e" + b"Z" * 40 + b"\x7e")
            client = await connect(host_end)
            assert (await client.service(ECHO).say(Text(text="on"))).text == "on"
            await client.close()

    run(body)


def test_closing_the_channel_ends_the_hosts_calls() -> None:
    async def body(host_end: socket.socket, guest_end: socket.socket) -> None:
        async with guest(guest_end) as handler:
            client = await connect(host_end)
            call = asyncio.create_task(client.service(ECHO).sleep(Text()))
            await handler.sleeping.wait()
            guest_end.shutdown(socket.SHUT_RDWR)
            with pytest.raises(ConnectionClosed):
                await call

    run(body)


def test_a_host_that_does_not_read_is_not_read_and_fills_nothing() -> None:
    async def body(host_end: socket.socket, guest_end: socket.socket) -> None:
        listener = ChardevListener(os.dup(guest_end.fileno()))
        async with guest(guest_end, listener):
            client = await connect(host_end)
            client._reader._transport.pause_reading()  # type: ignore[attr-defined]
            data = bytes(range(256)) * 4096
            calls = [
                asyncio.create_task(client.service(ECHO).say(Text(data=data), timeout_s=120))
                for _ in range(20)
            ]
            done, _ = await asyncio.wait(calls, timeout=1)
            assert not done
            assert len(listener._out) < 3 << 20
            assert client._writer.transport._channel._raw.get_write_buffer_size() < 3 << 20  # type: ignore[attr-defined]

            client._reader._transport.resume_reading()  # type: ignore[attr-defined]
            for answer in await asyncio.gather(*calls):
                assert answer.data == data
            await client.close()

    run(body)


_noise = st.one_of(
    st.binary(max_size=50),
    st.sampled_from([b"\x7e", b"\x7d", b"\n", b"0" * 32, b"\x7e" + b"a" * 31, b"\x7e" + b"a" * 32]),
)


@settings(max_examples=60)
@given(st.lists(_noise, max_size=6), st.lists(_noise, max_size=6))
def test_any_noise_in_the_channel_is_overcome(to_guest: list[bytes], to_host: list[bytes]) -> None:
    async def body(host_end: socket.socket, guest_end: socket.socket) -> None:
        host_end.send(b"".join(to_guest) or b"-")
        guest_end.send(b"".join(to_host) or b"-")
        async with guest(guest_end):
            client = await connect(host_end)
            data = bytes(range(256))
            assert (await client.service(ECHO).say(Text(data=data), timeout_s=30)).data == data
            await client.close()

    run(body)


def test_only_the_last_of_many_handshakes_is_answered() -> None:
    async def body(host_end: socket.socket, guest_end: socket.socket) -> None:
        host_end.sendall(b"".join(b"\x7e" + digit * 32 + b"\n" for digit in (b"1", b"2", b"3")))
        listener = ChardevListener(os.dup(guest_end.fileno()))
        await listener.accept()
        host_end.setblocking(False)
        assert host_end.recv(1024) == b"\x7e" + b"3" * 32 + b"\n"
        listener.close()

    run(body)


def test_hosts_come_and_go_and_cost_nothing_while_they_are_away(tmp_path: Path) -> None:
    """A FIFO behaves as the port: end-of-file while nobody has it open for writing."""
    path = tmp_path / "port"
    os.mkfifo(path)

    class Counting(ChardevListener):
        reads = 0

        def _readable(self) -> None:
            self.reads += 1
            super()._readable()

    async def body() -> None:
        listener = Counting(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        for host in (b"a", b"b", b"c"):
            listener.reads = 0
            await asyncio.sleep(0.2)
            assert listener.reads < 5, "it looks at each change, and not again and again"
            accepting = asyncio.create_task(listener.accept())
            with path.open("wb", buffering=0) as port:
                port.write(b"\x7e" + host * 32 + b"\n" + host)
                reader, _ = await asyncio.wait_for(accepting, 30)
            assert await asyncio.wait_for(reader.read(), 30) == host
        listener.close()

    asyncio.run(body())
