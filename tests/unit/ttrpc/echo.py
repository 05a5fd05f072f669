"""A service with all four kinds of methods, made without protoc, and its handler."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.message_factory import GetMessageClass

from ttrpc import Client, Code, Context, Server, StatusError


def _service() -> Any:
    file = descriptor_pb2.FileDescriptorProto(
        name="tests/unit/ttrpc/echo.proto", package="tests.echo", syntax="proto3"
    )
    message = file.message_type.add(name="Text")
    message.field.add(name="text", number=1, type=9, label=1)
    message.field.add(name="data", number=2, type=12, label=1)
    service = file.service.add(name="Echo")
    for name, client, server in (
        ("Say", False, False),
        ("Refuse", False, False),
        ("Sleep", False, False),
        ("Tell", False, False),
        ("Missing", False, False),
        ("Count", False, True),
        ("Join", True, False),
        ("Chat", True, True),
    ):
        service.method.add(
            name=name,
            input_type=".tests.echo.Text",
            output_type=".tests.echo.Text",
            client_streaming=client,
            server_streaming=server,
        )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool.FindServiceByName("tests.echo.Echo")


ECHO = _service()
Text: Any = GetMessageClass(ECHO.methods_by_name["Say"].input_type)


class EchoHandler:
    """`sleeping` is set when a handler sleeps, `cancelled` when one was cancelled in its sleep."""

    def __init__(self) -> None:
        self.cancelled = asyncio.Event()
        self.sleeping = asyncio.Event()

    async def say(self, request: Any, context: Context) -> Any:
        return request

    async def refuse(self, request: Any, context: Context) -> Any:
        raise StatusError(Code.FAILED_PRECONDITION, request.text)

    async def tell(self, request: Any, context: Context) -> Any:
        return Text(text=f"{sorted(context.metadata.items())} {context.timeout_s}")

    async def sleep(self, request: Any, context: Context) -> Any:
        self.sleeping.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def count(self, request: Any, context: Context) -> AsyncIterator[Any]:
        for number in range(int(request.text)):
            yield Text(text=str(number))
        if request.data:
            raise StatusError(Code.DATA_LOSS, "counted wrong")

    async def join(self, requests: AsyncIterator[Any], context: Context) -> Any:
        return Text(text="".join([request.text async for request in requests]))

    async def chat(self, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        async for request in requests:
            yield Text(text=request.text.upper())


@contextlib.asynccontextmanager
async def serving(path: Path, **options: Any) -> AsyncIterator[tuple[Server, EchoHandler]]:
    """A server with the echo service on the unix socket `path`."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    listener.setblocking(False)
    server, handler = Server(**options), EchoHandler()
    server.register(ECHO, handler)
    task = asyncio.create_task(server.serve(listener))
    try:
        yield server, handler
    finally:
        await server.shutdown(0)
        await task


@contextlib.asynccontextmanager
async def calling(path: Path, **options: Any) -> AsyncIterator[tuple[Any, EchoHandler, Client]]:
    """A stub, connected to such a server."""
    async with serving(path, **options) as (_, handler):
        client = await Client.connect(path)
        try:
            yield client.service(ECHO), handler, client
        finally:
            await client.close()
