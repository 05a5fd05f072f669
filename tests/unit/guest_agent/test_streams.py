from __future__ import annotations

import asyncio
import os
import signal

import pytest
from processes import wait_gone

from guest.agent.reaper import Reaper
from guest.agent.streams import DRAIN_S, InputStream, OutputStream

TIMEOUT_S = 60.0


def never() -> asyncio.Future[int]:
    return asyncio.get_running_loop().create_future()


def exited() -> asyncio.Future[int]:
    future = never()
    future.set_result(0)
    return future


def test_a_read_waits_for_output_and_ends_with_the_stream() -> None:
    async def body() -> None:
        reading, writing = os.pipe()
        stream = OutputStream(reading)
        waiting = asyncio.ensure_future(stream.read(10, never()))
        await asyncio.sleep(0)
        assert not waiting.done()
        os.write(writing, b"hello, world")
        assert await waiting == b"hello, wor"
        os.close(writing)
        assert await stream.read(10, never()) == b"ld"
        assert await stream.read(10, never()) == b""
        assert await stream.read(10, never()) == b""

    asyncio.run(asyncio.wait_for(body(), TIMEOUT_S))


def test_a_cancelled_read_takes_nothing() -> None:
    async def body() -> None:
        reading, writing = os.pipe()
        stream = OutputStream(reading)
        waiting = asyncio.ensure_future(stream.read(10, never()))
        await asyncio.sleep(0.01)
        os.write(writing, b"kept")
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert await stream.read(10, never()) == b"kept"
        stream.close()
        os.close(writing)

    asyncio.run(asyncio.wait_for(body(), TIMEOUT_S))


def test_who_holds_a_stream_of_an_ended_process_does_not_hold_its_reader() -> None:
    async def body() -> None:
        reading, writing = os.pipe()
        stream = OutputStream(reading)
        os.write(writing, b"last words")
        assert await stream.read(100, exited()) == b"last words"
        before = asyncio.get_running_loop().time()
        assert await stream.read(100, exited()) == b""
        assert asyncio.get_running_loop().time() - before >= DRAIN_S * 0.9
        stream.close()
        os.close(writing)

    asyncio.run(asyncio.wait_for(body(), TIMEOUT_S))


def test_closing_ends_a_read_that_waits() -> None:
    async def body() -> None:
        reading, writing = os.pipe()
        stream = OutputStream(reading)
        waiting = asyncio.ensure_future(stream.read(10, never()))
        await asyncio.sleep(0.01)
        stream.close()
        stream.close()
        assert await waiting == b""
        os.close(writing)

    asyncio.run(asyncio.wait_for(body(), TIMEOUT_S))


def test_writes_are_whole_and_in_order_and_the_close_comes_after_them() -> None:
    async def body() -> None:
        reading, writing = os.pipe()
        stream, back = InputStream(writing), OutputStream(reading)
        writes = [asyncio.ensure_future(stream.write(bytes([n]) * 300_000)) for n in range(3)]
        await asyncio.sleep(0.01)
        assert not any(write.done() for write in writes)
        stream.close_when_written()
        with pytest.raises(BrokenPipeError):
            await stream.write(b"too late")
        got = b""
        while piece := await back.read(1 << 16, never()):
            got += piece
        assert got == b"".join(bytes([n]) * 300_000 for n in range(3))
        await asyncio.gather(*writes)

    asyncio.run(asyncio.wait_for(body(), TIMEOUT_S))


@pytest.mark.parametrize("side", ["ours", "theirs"])
def test_a_waiting_write_fails_when_either_side_closes(side: str) -> None:
    async def body() -> None:
        reading, writing = os.pipe()
        stream = InputStream(writing)
        write = asyncio.ensure_future(stream.write(bytes(1_000_000)))
        await asyncio.sleep(0.01)
        if side == "ours":
            stream.close()
            os.close(reading)
        else:
            os.close(reading)
        with pytest.raises(BrokenPipeError):
            await write
        stream.close()

    asyncio.run(asyncio.wait_for(body(), TIMEOUT_S))


def test_the_reaper_tells_statuses_apart_and_forgets_orphans() -> None:
    async def body() -> None:
        reaper = Reaper()
        reaper.start()
        null = os.open(os.devnull, os.O_RDWR)

        async def run(script: str) -> int:
            return await reaper.spawn("/bin/sh", ["sh", "-c", script], [null, null, null])

        assert await asyncio.gather(*(run(f"exit {n}") for n in range(8))) == list(range(8))
        assert await run("kill -KILL $$") == 128 + signal.SIGKILL
        orphan = os.posix_spawn("/bin/true", ["true"], {})  # noqa: ASYNC221
        wait_gone([orphan])
        reaper.reap()
        with pytest.raises(ProcessLookupError):
            os.kill(orphan, 0)
        with reaper.hold():
            early = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 9"], {})  # noqa: ASYNC221
            assert await run("sleep 0.1") == 0
            assert await reaper.watch(early) == 9
        os.close(null)

    asyncio.run(asyncio.wait_for(body(), TIMEOUT_S))


def test_a_spawned_process_has_every_signal_as_a_fresh_one_has() -> None:
    async def body() -> None:
        reaper = Reaper()
        reaper.start()
        null = os.open(os.devnull, os.O_RDWR)
        reading, writing = os.pipe()
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            await reaper.spawn("/bin/grep", ["grep", "SigIgn", "/proc/self/status"], [null, writing, null])
        finally:
            signal.signal(signal.SIGINT, before)
        ignored = int(os.read(reading, 1000).split()[1], 16)
        # 32 and 33 are the C library's own.
        assert ignored & ~(0b11 << 31) == 0
        for fd in (null, reading, writing):
            os.close(fd)

    asyncio.run(asyncio.wait_for(body(), TIMEOUT_S))
