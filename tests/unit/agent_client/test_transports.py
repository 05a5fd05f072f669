import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent_client.transports import (
    AgentDialFailed,
    AgentDialTimeout,
    HybridVsockAddress,
    SerialAddress,
    VsockAddress,
    dial,
)
from tests.unit import clock
from tests.unit.descriptors import open_descriptors

VMADDR_CID_LOCAL = 1
LONG_S = 30.0


@asynccontextmanager
async def hybrid_vsock(path: Path, answers: list[bytes | None]) -> AsyncIterator[list[bytes]]:
    """A device on `path`: each CONNECT gets the next of `answers` (None: silence); after an OK it echoes.

    Yields the requests it has seen.
    """
    requests: list[bytes] = []
    connections: set[asyncio.StreamWriter] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.add(writer)
        requests.append(await reader.readline())
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if answer is None:
            await reader.read()
        else:
            writer.write(answer)
            if answer.startswith(b"OK"):
                while data := await reader.read(65536):
                    writer.write(data)
                    await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield requests
    finally:
        server.close()
        for writer in connections:
            writer.transport.abort()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    assert await reader.readexactly(len(data)) == data


def test_hybrid_vsock_carries_bytes_after_its_handshake(tmp_path):
    async def body():
        async with hybrid_vsock(tmp_path / "v.sock", [b"OK 1073741824\n"]) as requests:
            reader, writer = await dial(HybridVsockAddress(tmp_path / "v.sock"), timeout_s=LONG_S)
            await echo(reader, writer, b"hello")
            await echo(reader, writer, os.urandom(1 << 20))
            writer.close()
        assert requests == [b"CONNECT 1024\n"]

    asyncio.run(body())


def test_hybrid_vsock_names_the_port_of_the_address(tmp_path):
    async def body():
        async with hybrid_vsock(tmp_path / "v.sock", [b"OK 1\n"]) as requests:
            _, writer = await dial(HybridVsockAddress(tmp_path / "v.sock", port=1025), timeout_s=LONG_S)
            writer.close()
        assert requests == [b"CONNECT 1025\n"]

    asyncio.run(body())


def test_bytes_that_follow_the_answer_at_once_are_not_lost(tmp_path):
    async def body():
        async with hybrid_vsock(tmp_path / "v.sock", [b"OK 1\nfirst"]):
            reader, writer = await dial(HybridVsockAddress(tmp_path / "v.sock"), timeout_s=LONG_S)
            assert await reader.readexactly(5) == b"first"
            writer.close()

    asyncio.run(body())


def test_dial_goes_on_until_the_guest_listens(tmp_path):
    async def body():
        async with hybrid_vsock(tmp_path / "v.sock", [b"", b"", b"NO\n", b"OK 1\n"]) as requests:
            reader, writer = await dial(HybridVsockAddress(tmp_path / "v.sock"), timeout_s=LONG_S)
            await echo(reader, writer, b"at last")
            writer.close()
        assert len(requests) == 4

    asyncio.run(body())


def test_dial_goes_on_until_the_socket_is_there(tmp_path):
    async def body():
        dialling = asyncio.create_task(dial(HybridVsockAddress(tmp_path / "v.sock"), timeout_s=LONG_S))
        await asyncio.sleep(0.05)
        async with hybrid_vsock(tmp_path / "v.sock", [b"OK 1\n"]):
            reader, writer = await dialling
            await echo(reader, writer, b"hello")
            writer.close()

    asyncio.run(body())


@pytest.mark.parametrize(
    ("answer", "attempts", "cause"),
    [
        (b"", 2, "; last: the guest does not listen on vsock port 1024"),
        (b"NO 5\n", 2, r"; last: CONNECT 1024 was answered with b'NO 5\\n', expected OK"),
        (b"x" * (1 << 20), 2, "; last: CONNECT 1024 was answered with a line without an end"),
        (None, 1, ""),
    ],
)
def test_a_timeout_names_address_time_and_last_cause(tmp_path, answer, attempts, cause):
    async def body():
        async with hybrid_vsock(tmp_path / "v.sock", [answer]) as requests:
            dialling = asyncio.create_task(dial(HybridVsockAddress(tmp_path / "v.sock"), timeout_s=LONG_S))
            while len(requests) < attempts:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            clock.skip(LONG_S)
            pattern = f"^agent at hvsock://{tmp_path}/v.sock:1024: no answer within 30 s{cause}$"
            with pytest.raises(AgentDialTimeout, match=pattern):
                await dialling

    clock.run(body())


def test_a_socket_that_never_appears_is_named(tmp_path):
    async def body():
        dialling = asyncio.create_task(dial(SerialAddress(tmp_path / "v.sock"), timeout_s=LONG_S))
        await asyncio.sleep(0.01)
        clock.skip(LONG_S)
        with pytest.raises(AgentDialTimeout, match=r"v\.sock: no answer within 30 s; last: .*No such file"):
            await dialling

    clock.run(body())


def test_what_cannot_come_right_fails_at_once(tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(AgentDialFailed, match="Not a directory") as failure:
        asyncio.run(dial(SerialAddress(tmp_path / "file" / "v.sock"), timeout_s=LONG_S))
    assert not isinstance(failure.value, AgentDialTimeout)
    with pytest.raises(AgentDialFailed, match="too long"):
        asyncio.run(dial(SerialAddress(tmp_path / ("x" * 200)), timeout_s=LONG_S))


@pytest.mark.parametrize("answers", [[b""], [None], [b"NO\n"]])
def test_a_failed_dial_leaves_no_connection_open(tmp_path, answers):
    async def body():
        async with hybrid_vsock(tmp_path / "v.sock", answers):
            before = open_descriptors()
            with pytest.raises(AgentDialTimeout):
                await dial(HybridVsockAddress(tmp_path / "v.sock"), timeout_s=0.1)
            async with asyncio.timeout(LONG_S):  # for the device's side of the connections
                while not open_descriptors() <= before:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)

    asyncio.run(body())


def test_a_cancelled_dial_leaves_no_connection_open(tmp_path):
    async def body():
        async with hybrid_vsock(tmp_path / "v.sock", [None]) as requests:
            dialling = asyncio.create_task(dial(HybridVsockAddress(tmp_path / "v.sock"), timeout_s=LONG_S))
            while not requests:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            before = open_descriptors()
            dialling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await dialling
            await asyncio.sleep(0)
            assert open_descriptors() < before

    asyncio.run(body())


def test_vsock_reaches_a_listener():
    listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    try:
        listener.bind((VMADDR_CID_LOCAL, socket.VMADDR_PORT_ANY))
    except OSError as error:
        listener.close()
        pytest.skip(f"this kernel has no vsock loopback (modprobe vsock_loopback): {error}")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def body():
        _, port = listener.getsockname()
        dialling = asyncio.create_task(dial(VsockAddress(VMADDR_CID_LOCAL, port), timeout_s=LONG_S))
        await asyncio.sleep(0.02)  # refused at first
        listener.listen()
        listener.setblocking(False)
        connection, _ = await asyncio.get_running_loop().sock_accept(listener)
        peer_reader, peer_writer = await asyncio.open_connection(sock=connection)
        serving = asyncio.create_task(serve(peer_reader, peer_writer))
        reader, writer = await dialling
        await echo(reader, writer, os.urandom(1 << 20))
        writer.close()
        await serving

    with listener:
        asyncio.run(body())


def test_vsock_to_nobody_times_out():
    with pytest.raises(AgentDialTimeout, match=r"^agent at vsock://4000000000:1024: no answer within 0\.2 s"):
        asyncio.run(dial(VsockAddress(4000000000), timeout_s=0.2))
