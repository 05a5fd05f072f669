"""Client and server together, over a real socket."""

import asyncio
import gc
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.unit import clock
from tests.unit.ttrpc.echo import ECHO, Text, calling, serving
from ttrpc import Client, Code, ConnectionClosed, StatusError
from ttrpc.framing import MAX_MESSAGE_BYTES


async def status(call: Any) -> StatusError:
    with pytest.raises(StatusError) as caught:
        await call
    return caught.value


def test_unary_answer_comes_back(tmp_path: Path) -> None:
    async def body() -> None:
        async with calling(tmp_path / "s") as (echo, _, _):
            assert (await echo.say(Text(text="hello"))).text == "hello"
            assert (await echo.say(Text())).text == ""

    asyncio.run(body())


def test_error_keeps_code_and_text(tmp_path: Path) -> None:
    async def body() -> None:
        async with calling(tmp_path / "s") as (echo, _, _):
            error = await status(echo.refuse(Text(text="not now")))
            assert (error.code, error.message) == (Code.FAILED_PRECONDITION, "not now")

    asyncio.run(body())


def test_other_exception_is_unknown_or_mapped_and_no_traceback_leaves(tmp_path: Path) -> None:
    class Broken:
        async def say(self, request: Any, context: object) -> Any:
            raise KeyError("lost")

    async def body(expected: Code, **options: Any) -> None:
        async with serving(tmp_path / expected.name, **options) as (server, _):
            server.register(ECHO, Broken(), name="tests.echo.Broken")
            client = await Client.connect(tmp_path / expected.name)
            method = ECHO.methods_by_name["Say"]
            from ttrpc.request_pb2 import Request, Response

            # The registered name is the wire's; a client of the same descriptor asks for the original one.
            envelope = Request(service="tests.echo.Broken", method=method.name).SerializeToString()
            stream_id = client._open(0, envelope)
            answer = asyncio.get_running_loop().create_future()
            client._unary[stream_id] = answer
            response = Response.FromString((await answer).payload)
            assert response.status.code == expected
            assert "lost" in response.status.message
            assert "Traceback" not in response.status.message
            await client.close()

    asyncio.run(body(Code.UNKNOWN))
    asyncio.run(body(Code.NOT_FOUND, map_error=lambda e: StatusError(Code.NOT_FOUND, str(e))))


def test_unknown_method_and_service_are_unimplemented(tmp_path: Path) -> None:
    async def body() -> None:
        async with calling(tmp_path / "s") as (echo, _, _):
            error = await status(echo.missing(Text()))
            assert (error.code, error.message) == (Code.UNIMPLEMENTED, "method Missing")

    asyncio.run(body())


def test_metadata_and_timeout_reach_the_handler(tmp_path: Path) -> None:
    async def body() -> None:
        async with calling(tmp_path / "s") as (echo, _, _):
            told = await echo.tell(Text(), timeout_s=5, metadata={"a": ["1", "2"], "b": ["x"]})
            assert told.text == "[('a', ['1', '2']), ('b', ['x'])] 5.0"
            assert (await echo.tell(Text())).text == "[] None"

    asyncio.run(body())


def test_timeout_ends_call_and_handler(tmp_path: Path) -> None:
    async def body() -> None:
        async with calling(tmp_path / "s") as (echo, handler, _):
            assert (await status(echo.sleep(Text(), timeout_s=0.05))).code is Code.DEADLINE_EXCEEDED
            async with asyncio.timeout(30):
                await handler.cancelled.wait()
            assert (await echo.say(Text(text="still here"))).text == "still here"

    asyncio.run(body())


def test_calls_run_side_by_side_on_one_connection(tmp_path: Path) -> None:
    async def body() -> None:
        async with calling(tmp_path / "s") as (echo, handler, _):
            sleeping = asyncio.create_task(echo.sleep(Text()))
            await handler.sleeping.wait()
            answers = await asyncio.gather(*(echo.say(Text(text=str(n))) for n in range(500)))
            assert [a.text for a in answers] == [str(n) for n in range(500)]
            sleeping.cancel()

    asyncio.run(body())


def test_handlers_are_cancelled_when_the_client_goes(tmp_path: Path) -> None:
    async def body() -> None:
        async with serving(tmp_path / "s") as (_, handler):
            client = await Client.connect(tmp_path / "s")
            call = asyncio.create_task(client.service(ECHO).sleep(Text()))
            await handler.sleeping.wait()
            await client.close()
            with pytest.raises(ConnectionClosed):
                await call
            async with asyncio.timeout(30):
                await handler.cancelled.wait()
            with pytest.raises(ConnectionClosed):
                await client.service(ECHO).say(Text())

    asyncio.run(body())


@pytest.mark.parametrize("direction", ["request", "response"])
def test_oversized_message_is_refused_and_the_connection_goes_on(tmp_path: Path, direction: str) -> None:
    async def body() -> None:
        async with calling(tmp_path / "s") as (echo, _, _):
            # The largest message that fits goes both ways.
            size = MAX_MESSAGE_BYTES + 1 if direction == "request" else MAX_MESSAGE_BYTES - 200
            request = Text(data=bytes(size))
            if direction == "request":
                error = await status(echo.say(request))
                assert error.code is Code.RESOURCE_EXHAUSTED
                assert str(MAX_MESSAGE_BYTES) in error.message
            else:
                assert len((await echo.say(request)).data) == size
            assert (await echo.say(Text(text="on"))).text == "on"

    asyncio.run(body())


def test_server_refuses_an_oversized_frame_without_keeping_it(tmp_path: Path) -> None:
    async def body() -> None:
        async with serving(tmp_path / "s", max_message_bytes=1000) as (_, _):
            client = await Client.connect(tmp_path / "s")
            echo = client.service(ECHO)
            error = await status(echo.say(Text(data=bytes(100_000))))
            assert error.code is Code.RESOURCE_EXHAUSTED
            assert "1000" in error.message
            error = await status(echo.say(Text(data=bytes(2000))))
            assert error.code is Code.RESOURCE_EXHAUSTED
            assert (await echo.say(Text(text="on"))).text == "on"
            await client.close()

    asyncio.run(body())


def test_all_three_kinds_of_streams(tmp_path: Path) -> None:
    async def body() -> None:
        async with calling(tmp_path / "s") as (echo, _, client):
            stream = await echo.count(Text(text="200"))
            assert [m.text async for m in stream] == [str(n) for n in range(200)]

            stream = await echo.join()
            for letter in "ttrpc":
                await stream.send(Text(text=letter))
            await stream.close_send()
            assert (await stream.receive()).text == "ttrpc"
            assert await stream.receive() is None

            first, second = await echo.chat(), await echo.chat()
            await first.send(Text(text="a"))
            await second.send(Text(text="b"))
            assert (await second.receive()).text == "B"
            assert (await first.receive()).text == "A"
            for stream in (first, second):
                await stream.close_send()
                assert await stream.receive() is None
            assert not client._streams

    asyncio.run(body())


def test_an_error_ends_a_stream_after_its_messages(tmp_path: Path) -> None:
    async def body() -> None:
        async with calling(tmp_path / "s") as (echo, _, _):
            stream = await echo.count(Text(text="1", data=b"x"))
            assert (await stream.receive()).text == "0"
            assert (await status(stream.receive())).code is Code.DATA_LOSS

    asyncio.run(body())


def test_a_stream_that_nobody_reads_costs_itself_only(tmp_path: Path) -> None:
    async def body() -> None:
        async with calling(tmp_path / "s") as (echo, _, _):
            stream = await echo.count(Text(text="10000"))
            async with asyncio.timeout(60):
                assert (await echo.say(Text(text="on"))).text == "on"
            received = 0
            with pytest.raises(StatusError, match="not read"):
                while await stream.receive():
                    received += 1
            assert received < 1000

    asyncio.run(body())


def test_shutdown_lets_a_call_finish_and_refuses_new_ones(tmp_path: Path) -> None:
    async def body() -> None:
        async with serving(tmp_path / "s") as (server, handler):
            client = await Client.connect(tmp_path / "s")
            echo = client.service(ECHO)
            call = asyncio.create_task(echo.sleep(Text(), timeout_s=300))
            await handler.sleeping.wait()
            stop = asyncio.create_task(server.shutdown(600))
            await asyncio.sleep(0)
            assert (await status(echo.say(Text()))).code is Code.UNAVAILABLE
            clock.skip(300)
            assert (await status(call)).code is Code.DEADLINE_EXCEEDED
            async with asyncio.timeout(30):
                await stop
                await client.wait_closed()

    clock.run(body())


def test_a_peer_that_never_reads_is_not_read_either(tmp_path: Path) -> None:
    async def body() -> None:
        from ttrpc import framing
        from ttrpc.request_pb2 import Request

        async with serving(tmp_path / "s") as (server, _):
            _, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
            payload = Text(data=bytes(1 << 20)).SerializeToString()
            request = Request(service="tests.echo.Echo", method="Say", payload=payload).SerializeToString()
            blocked = False
            for number in range(1, 400, 2):
                writer.write(framing.encode(number, framing.REQUEST, 0, request))
                try:
                    async with asyncio.timeout(1):
                        await writer.drain()
                except TimeoutError:
                    blocked = True
                    break
            assert blocked, "200 MiB were taken from a peer that reads no answer"
            (connection,) = server._connections
            assert connection._writer.transport.get_write_buffer_size() < 80 << 20
            writer.transport.abort()
        gc.collect()

    asyncio.run(body())


def test_log_has_one_line_for_a_malformed_connection(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        async with calling(tmp_path / "s") as (echo, _, _):
            reader, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            assert await reader.read() == b""
            writer.close()
            assert (await echo.say(Text(text="on"))).text == "on"

    with caplog.at_level(logging.WARNING):
        asyncio.run(body())
    (told,) = [record.getMessage() for record in caplog.records if record.name != "asyncio"]
    assert "reserved first byte" in told
