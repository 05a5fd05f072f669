"""The call by hand, against gRPC's own server, and against servers that are none."""

import asyncio
import contextlib
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from virtcontainers.errors import DeadlineExceededError, KataError, UnavailableError
from virtcontainers.factory import grpc_unary
from virtcontainers.factory.grpc_unary import ANSWER_LIMIT_BYTES, GrpcStatusError, call_unary

Handler = Callable[[bytes, Any], Awaitable[bytes]]


@contextlib.asynccontextmanager
async def served(path: Path, handler: Handler) -> AsyncIterator[None]:
    server = grpc.aio.server()
    methods = {"Method": grpc.unary_unary_rpc_method_handler(handler)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a.Service", methods),))
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    try:
        yield
    finally:
        await server.stop(0)


async def call(path: Path, request: bytes = b"", *, method: str = "Method", timeout_s: float = 60) -> bytes:
    return await call_unary(path, f"/a.Service/{method}", request, timeout_s=timeout_s)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.sock"


@pytest.mark.parametrize("size", [0, 1, 5000, ANSWER_LIMIT_BYTES - 5], ids=str)
def test_an_answer(path: Path, size: int) -> None:
    async def handler(request: bytes, context: Any) -> bytes:
        return request + bytes(size - len(request))

    async def body() -> None:
        async with served(path, handler):
            assert await call(path, b"ab"[:size]) == b"ab"[:size] + bytes(max(0, size - 2))

    asyncio.run(body())


@pytest.mark.parametrize("message", ["no machine is ready", "ü 100 %\n" * 30, ""])
def test_a_refusal(path: Path, message: str) -> None:
    async def handler(request: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, message)
        raise AssertionError

    async def body() -> None:
        async with served(path, handler):
            with pytest.raises(GrpcStatusError) as failure:
                await call(path)
        assert failure.value.code == "RESOURCE_EXHAUSTED"
        told = message or "the server does not say why"
        assert str(failure.value) == f"{path}: Method: {told} (RESOURCE_EXHAUSTED)"

    asyncio.run(body())


def test_a_method_that_is_not_there(path: Path) -> None:
    async def handler(request: bytes, context: Any) -> bytes:
        return b""

    async def body() -> None:
        async with served(path, handler):
            with pytest.raises(GrpcStatusError) as failure:
                await call(path, method="Other")
        assert failure.value.code == "UNIMPLEMENTED"

    asyncio.run(body())


def test_nobody_serves(path: Path) -> None:
    with pytest.raises(UnavailableError, match=rf"{path}: Method: nobody serves it: No such file"):
        asyncio.run(call(path))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    with pytest.raises(UnavailableError, match=rf"{path}: Method: nobody serves it: Connection refused"):
        asyncio.run(call(path))


def test_a_server_that_hangs(path: Path) -> None:
    async def handler(request: bytes, context: Any) -> bytes:
        await asyncio.sleep(600)
        return b""

    async def body() -> None:
        async with served(path, handler):
            with pytest.raises(DeadlineExceededError, match=rf"{path}: Method: no answer within 0.3 s"):
                await call(path, timeout_s=0.3)

    asyncio.run(body())


@pytest.mark.parametrize("size", [ANSWER_LIMIT_BYTES + 1, 1 << 20], ids=str)
def test_an_answer_that_is_too_large(path: Path, size: int) -> None:
    async def handler(request: bytes, context: Any) -> bytes:
        return bytes(size)

    async def body() -> None:
        async with served(path, handler):
            with pytest.raises(KataError, match=f"found {size} bytes, expected at most {ANSWER_LIMIT_BYTES}"):
                await call(path)

    asyncio.run(body())


# -- servers that are none


async def answer_of(path: Path, answer: bytes) -> bytes:
    """What is made of `answer`, whatever was asked."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await reader.read(10_000)
        writer.close()

    path.unlink(missing_ok=True)
    async with await asyncio.start_unix_server(serve, path):
        return await call(path)


def frame(kind: int, flags: int, payload: bytes, stream: int = 1) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def literal(name: bytes, value: bytes) -> bytes:
    return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value


DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
STATUS_200, STATUS_404 = b"\x88", b"\x8d"
OK = literal(b"grpc-status", b"0")


def test_every_kind_of_frame_may_come(path: Path) -> None:
    answer = b"".join(
        (
            frame(SETTINGS, 0, b"", 0),
            frame(SETTINGS, 1, b"", 0),
            frame(WINDOW_UPDATE, 0, bytes(4), 0),
            frame(PING, 0, bytes(8), 0),
            frame(0x42, 0, b"unknown"),
            frame(HEADERS, 0x8 | 0x20, b"\x03" + bytes(5) + b"\x20" + STATUS_200 + bytes(3)),
            frame(CONTINUATION, 0x4, literal(b"a", b"b")),
            frame(DATA, 0x8, b"\x02" + struct.pack(">BI", 0, 3) + b"a" + bytes(2)),
            frame(GOAWAY, 0, struct.pack(">II", 1, 0), 0),
            frame(DATA, 0, b"bc"),
            frame(HEADERS, 0x1, OK[:5]),
            frame(CONTINUATION, 0x4, OK[5:]),
        )
    )
    assert asyncio.run(answer_of(path, answer)) == b"abc"


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "found a frame of 4740180 bytes"),
        (frame(HEADERS, 0x5, STATUS_404), "found HTTP status 404"),
        (frame(HEADERS, 0x5, OK), "found HTTP status None"),
        (frame(HEADERS, 0x5, STATUS_200), "found no status"),
        (frame(HEADERS, 0x5, STATUS_200 + literal(b"grpc-status", b"x")), "found no status"),
        (frame(HEADERS, 0x5, STATUS_200 + OK), "found a message of 0 bytes that is none"),
        (frame(HEADERS, 0x5, STATUS_200 + OK[:-1]), "headers that cannot be read"),
        (frame(HEADERS, 0x5, b"\xff\xff\xff\xff\xff"), "headers that cannot be read: a number above"),
        (frame(HEADERS, 0x5, b"\xbe"), "headers that cannot be read: index 62"),
        (frame(HEADERS, 0x5, b"\x80"), "headers that cannot be read: index 0"),
        (frame(DATA, 0x8, b"\x01"), "found a frame of padding"),
        (frame(HEADERS, 0, bytes(16000)) + frame(CONTINUATION, 0, bytes(16000)), "found headers of more"),
        (frame(DATA, 0, struct.pack(">BI", 0, 1 << 31)), "found 2147483648 bytes, expected at most"),
        (frame(RST_STREAM, 0, bytes(4)), "the server refuses the call"),
        (frame(GOAWAY, 0, bytes(8), 0), "the server refuses the call"),
        (b"", "the server ended the connection"),
        (frame(HEADERS, 0x5, STATUS_200 + OK)[:12], "the server ended the connection"),
    ],
    ids=range(17),
)
def test_what_is_no_answer_is_an_error_that_names_the_socket(
    path: Path, answer: bytes, sentence: str
) -> None:
    with pytest.raises(KataError, match=f"^{path}: Method: ") as failure:
        asyncio.run(answer_of(path, answer))
    assert sentence in str(failure.value)


def test_a_refusal_in_huffman_code_is_a_refusal(path: Path) -> None:
    coded = b"\x00\x0cgrpc-message\x81\x1f"
    answer = frame(HEADERS, 0x5, STATUS_200 + literal(b"grpc-status", b"8") + coded)
    with pytest.raises(GrpcStatusError, match=r"the server does not say why \(RESOURCE_EXHAUSTED\)"):
        asyncio.run(answer_of(path, answer))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.builds(frame, st.integers(0, 10), st.integers(0, 63), st.binary(max_size=40)), max_size=6))
def test_no_bytes_break_it(path: Path, frames: list[bytes]) -> None:
    with contextlib.suppress(KataError):
        asyncio.run(answer_of(path, b"".join(frames)))


def test_a_pod_never_pays_for_the_library() -> None:
    script = "import sys, virtcontainers.factory.grpccache; print('grpc' in sys.modules)"
    repo = Path(grpc_unary.__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", script], cwd=repo, capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
