"""Our ttrpc against containerd's own, in Go: built here from the Go module proxy, both ways round."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, empty_pb2
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message_factory import GetMessageClass

from ttrpc import Client, Code, ConnectionClosed, Context, Server, StatusError
from ttrpc.framing import MAX_MESSAGE_BYTES

SOURCE = Path(__file__).parent / "ttrpc_go"


def _streaming() -> Any:
    """The service of the Go module's integration/streaming/test.proto."""
    file = descriptor_pb2.FileDescriptorProto(
        name="ttrpc_go.proto",
        package="ttrpc.integration.streaming",
        syntax="proto3",
        dependency=["google/protobuf/empty.proto"],
    )
    fields = {"EchoPayload": {"seq": 13, "msg": 9}, "Part": {"add": 5}, "Sum": {"sum": 5, "num": 5}}
    for name, types in fields.items():
        message = file.message_type.add(name=name)
        for number, (field, type_) in enumerate(types.items(), 1):
            message.field.add(name=field, number=number, type=type_, label=1)
    service = file.service.add(name="Streaming")
    for name, takes, answers, client, server in (
        ("Echo", "EchoPayload", "EchoPayload", False, False),
        ("EchoStream", "EchoPayload", "EchoPayload", True, True),
        ("SumStream", "Part", "Sum", True, False),
        ("DivideStream", "Sum", "Part", False, True),
        ("EchoNull", "EchoPayload", "Empty", True, False),
        ("EchoNullStream", "EchoPayload", "Empty", True, True),
        ("EmptyPayloadStream", "Empty", "EchoPayload", False, True),
        ("Missing", "Empty", "Empty", False, False),
    ):
        package = {"Empty": ".google.protobuf."}
        service.method.add(
            name=name,
            input_type=package.get(takes, ".ttrpc.integration.streaming.") + takes,
            output_type=package.get(answers, ".ttrpc.integration.streaming.") + answers,
            client_streaming=client,
            server_streaming=server,
        )
    pool = descriptor_pool.DescriptorPool()
    empty = descriptor_pb2.FileDescriptorProto()
    empty_pb2.DESCRIPTOR.CopyToProto(empty)
    pool.Add(empty)
    pool.Add(file)
    return pool.FindServiceByName("ttrpc.integration.streaming.Streaming")


STREAMING = _streaming()
_methods = STREAMING.methods_by_name
EchoPayload: Any = GetMessageClass(_methods["Echo"].input_type)
Part: Any = GetMessageClass(_methods["SumStream"].input_type)
Sum: Any = GetMessageClass(_methods["SumStream"].output_type)
Nothing: Any = GetMessageClass(_methods["EchoNull"].output_type)


@pytest.fixture(scope="session")
def go_peer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("go") is None:
        pytest.skip("no go on PATH to build containerd's ttrpc with")
    directory = tmp_path_factory.mktemp("ttrpc_go")
    for name in ("go.mod", "go.sum", "main.go"):
        shutil.copy(SOURCE / name, directory)
    for command in (["go", "mod", "download"], ["go", "build", "-o", "peer", "."]):
        built = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=600)
        if built.returncode and command[1] == "mod":
            pytest.skip(f"containerd's ttrpc could not be downloaded: {built.stderr.strip()[-300:]}")
        assert built.returncode == 0, built.stderr
    return directory / "peer"


@contextlib.asynccontextmanager
async def go_server(peer: Path, path: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(peer, "serve", path, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert await process.stdout.readline() == b"serving\n"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def calling(peer: Path, path: Path) -> AsyncIterator[tuple[Any, asyncio.subprocess.Process]]:
    async with asyncio.timeout(120), go_server(peer, path) as process:
        client = await Client.connect(path)
        try:
            yield client.service(STREAMING), process
        finally:
            await client.close()


async def refusal(call: Any) -> StatusError:
    with pytest.raises(StatusError) as caught:
        await call
    return caught.value


def test_unary_calls_to_go(go_peer: Path, tmp_path: Path) -> None:
    async def body() -> None:
        async with calling(go_peer, tmp_path / "s") as (go, process):
            assert (await go.echo(EchoPayload(seq=3, msg="hello"))).msg == "hello"
            assert (await go.echo(EchoPayload())) == EchoPayload()
            large = EchoPayload(msg="x" * (MAX_MESSAGE_BYTES - 100))
            assert (await go.echo(large)) == large
            told = await go.echo(EchoPayload(msg="metadata"), metadata={"a": ["1", "2"], "b": ["x"]})
            assert told.msg == "a=1+2 b=x"
            assert (await go.echo(EchoPayload(msg="timeout"), timeout_s=40)).seq == 40
            assert (await go.echo(EchoPayload(msg="timeout"))).msg == "none"

            error = await refusal(go.echo(EchoPayload(msg="refuse")))
            assert (error.code, error.message) == (Code.FAILED_PRECONDITION, "not now")
            error = await refusal(go.missing(Nothing()))
            assert (error.code, error.message) == (Code.UNIMPLEMENTED, "method Missing")
            error = await refusal(go.echo(EchoPayload(msg="x" * (5 << 20))))
            assert error.code is Code.RESOURCE_EXHAUSTED
            error = await refusal(go.echo(EchoPayload(msg="sleep"), timeout_s=0.1))
            assert error.code is Code.DEADLINE_EXCEEDED
            assert process.stdout is not None
            assert await process.stdout.readline() == b"sleeper: context deadline exceeded\n"

            answers = await asyncio.gather(*(go.echo(EchoPayload(seq=n)) for n in range(200)))
            assert [answer.seq for answer in answers] == list(range(200))

    asyncio.run(body())


def test_streams_to_go(go_peer: Path, tmp_path: Path) -> None:
    async def body() -> None:
        async with calling(go_peer, tmp_path / "s") as (go, _):
            first, second = await go.echo_stream(), await go.echo_stream()
            for number in range(50):
                await first.send(EchoPayload(seq=number))
                await second.send(EchoPayload(seq=number + 100))
            assert [(await second.receive()).seq for _ in range(50)] == list(range(101, 151))
            assert [(await first.receive()).seq for _ in range(50)] == list(range(1, 51))
            await first.close_send()
            assert await first.receive() is None
            await second.send(EchoPayload(msg="refuse"))
            error = await refusal(second.receive())
            assert (error.code, error.message) == (Code.DATA_LOSS, "enough")

            sums = await go.sum_stream()
            for number in range(101):
                await sums.send(Part(add=number))
            await sums.close_send()
            assert await sums.receive() == Sum(sum=5050, num=101)
            assert await sums.receive() is None

            assert [part.add async for part in await go.divide_stream(Sum(sum=60, num=4))] == [15] * 4

            null = await go.echo_null()
            await null.send(EchoPayload(seq=1))
            await null.close_send()
            assert await null.receive() == Nothing()

            nulls = await go.echo_null_stream()
            for _ in range(3):
                await nulls.send(EchoPayload())
                assert await nulls.receive() == Nothing()
            await nulls.close_send()
            assert await nulls.receive() is None

            assert [m.seq async for m in await go.empty_payload_stream(Nothing())] == [0, 1, 2]

    asyncio.run(body())


def test_go_that_is_killed_ends_calls_and_streams(go_peer: Path, tmp_path: Path) -> None:
    async def body() -> None:
        async with calling(go_peer, tmp_path / "s") as (go, process):
            stream = await go.echo_stream()
            call = asyncio.create_task(go.echo(EchoPayload(msg="sleep")))
            await stream.send(EchoPayload())
            await stream.receive()
            process.kill()
            with pytest.raises(ConnectionClosed):
                await call
            with pytest.raises(ConnectionClosed):
                await stream.receive()

    asyncio.run(body())


class Handler:
    def __init__(self) -> None:
        self.woken = asyncio.Event()

    async def echo(self, request: Any, context: Context) -> Any:
        match request.msg:
            case "refuse":
                raise StatusError(Code.FAILED_PRECONDITION, "not now")
            case "crash":
                raise KeyError("lost")
            case "big":
                return EchoPayload(msg="x" * request.seq)
            case "metadata":
                # Go sends a map's keys in any order.
                return EchoPayload(msg=str(dict(sorted(context.metadata.items()))))
            case "timeout":
                assert context.timeout_s is not None
                return EchoPayload(seq=math.ceil(context.timeout_s))
            case "sleep":
                try:
                    await asyncio.sleep(3600)
                finally:
                    self.woken.set()
        return request

    async def echo_stream(self, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        async for request in requests:
            if request.msg == "refuse":
                raise StatusError(Code.DATA_LOSS, "enough")
            yield EchoPayload(seq=request.seq + 1)

    async def sum_stream(self, requests: AsyncIterator[Any], context: Context) -> Any:
        adds = [request.add async for request in requests]
        return Sum(sum=sum(adds), num=len(adds))

    async def divide_stream(self, request: Any, context: Context) -> AsyncIterator[Any]:
        for _ in range(request.num):
            yield Part(add=request.sum // request.num)

    async def echo_null(self, requests: AsyncIterator[Any], context: Context) -> Any:
        async for _ in requests:
            pass
        return Empty()

    async def echo_null_stream(self, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        async for _ in requests:
            yield Empty()

    async def empty_payload_stream(self, request: Any, context: Context) -> AsyncIterator[Any]:
        for seq in range(3):
            yield EchoPayload(seq=seq)


def test_go_calls_us(go_peer: Path, tmp_path: Path) -> None:
    async def body() -> list[dict[str, Any]]:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        listener.setblocking(False)
        server, handler = Server(), Handler()
        server.register(STREAMING, handler)
        serving = asyncio.create_task(server.serve(listener))
        async with asyncio.timeout(120):
            process = await asyncio.create_subprocess_exec(
                go_peer, "call", tmp_path / "s", stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            out, err = await process.communicate()
            assert process.returncode == 0, err.decode()
            await handler.woken.wait()
            await server.shutdown(0)
            await serving
        return [json.loads(line) for line in out.splitlines()]

    answers = {line.pop("what"): line for line in asyncio.run(body())}
    limit = f"exceed maximum message size of {MAX_MESSAGE_BYTES}"
    for what in ("answer over the limit", "request over the limit"):
        assert answers[what].pop("error").endswith(limit)
    # Go's own deadline or our answer, whichever is first; Go's has no code.
    assert answers.pop("sleep")["error"] == "context deadline exceeded"

    def answer(value: Any) -> dict[str, Any]:
        return {"answer": value}

    def refused(code: str, **error: str) -> dict[str, Any]:
        return {"answer": None, "code": code, **error}

    assert answers == {
        "echo": answer(12),
        "echo empty": answer(0),
        "echo 1 MiB": answer(1 << 20),
        "refuse": refused("FailedPrecondition", error="not now"),
        "crash": refused("Unknown", error="'lost'"),
        "answer over the limit": refused("ResourceExhausted"),
        "request over the limit": refused("ResourceExhausted"),
        "metadata": answer("{'a': ['1', '2'], 'b': ['x']}"),
        "timeout": answer(60),
        "unknown method": refused("Unimplemented", error="method Nothing"),
        "unknown service": refused("Unimplemented", error="service no.Such"),
        "two streams side by side": answer([n for n in range(1, 51) for _ in range(2)]),
        "end of stream": answer(True),
        "stream refused": refused("DataLoss", error="enough"),
        "sum": answer([5050, 101]),
        "end of parts": answer(True),
        "divide": answer([15] * 4),
        "empty messages both ways": answer("ok"),
        "empty answer to a stream": answer("ok"),
        "stream of an empty request": answer(3),
    }
