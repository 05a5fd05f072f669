"""Streams between real processes and real fifos, files and loggers."""

import asyncio
import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import shim.stdio
from shim.stdio import ProcessIO, Stdio
from tests.unit.descriptors import open_descriptors
from tests.unit.shim.local_sandbox import LocalProcess, LocalSandbox, until
from virtcontainers.errors import InvalidArgumentError, KataError, NotFoundError

TIMEOUT_S = 120
MIB = 1 << 20


class Client:
    """What containerd's client does with the other ends of the fifos, each in a thread."""

    def __init__(self, directory: Path, *, terminal: bool = False) -> None:
        self.paths = {name: directory / name for name in ("stdin", "stdout", "stderr")}
        for path in self.paths.values():
            os.mkfifo(path)
        self.stdio = Stdio(
            str(self.paths["stdin"]),
            str(self.paths["stdout"]),
            "" if terminal else str(self.paths["stderr"]),
            terminal,
        )
        self.received = {"stdout": b"", "stderr": b""}
        self.reading: set[str] = set()
        self._threads: list[threading.Thread] = []

    def read(self, *names: str, pause_s: float = 0.0) -> None:
        def copy(name: str) -> None:
            with self.paths[name].open("rb", buffering=0) as fifo:
                self.reading.add(name)
                while data := fifo.read(65536):
                    self.received[name] += data
                    time.sleep(pause_s)

        self._start(*(lambda name=name: copy(name) for name in names))

    def write(self, data: bytes) -> None:
        def copy() -> None:
            with self.paths["stdin"].open("wb") as fifo:
                fifo.write(data)

        self._start(copy)

    def _start(self, *targets: Callable[[], None]) -> None:
        for target in targets:
            self._threads.append(threading.Thread(target=target, daemon=True))
            self._threads[-1].start()

    async def done(self) -> None:
        for thread in self._threads:
            await asyncio.to_thread(thread.join, TIMEOUT_S)
            assert not thread.is_alive(), "a client's stream did not end"


async def spawn(*command: str, terminal: bool = False) -> LocalProcess:
    process = LocalProcess(LocalSandbox("s"), "p", {"args": command, "terminal": terminal})
    await process.spawn()
    return process


def run(body: Callable[[], Awaitable[Any]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await body()

    asyncio.run(main())


def test_megabytes_through_cat_come_back_whole(tmp_path: Path) -> None:
    async def body() -> None:
        client, data = Client(tmp_path), os.urandom(5 * MIB)
        client.read("stdout", "stderr")
        client.write(data)
        io = await ProcessIO.open(client.stdio, "default", "p")
        process = await spawn("sh", "-c", "cat; echo end >&2")
        io.start(process)
        # Released before its writer has come, stdin would end at once.
        await until(lambda: client.received["stdout"])
        io.release_stdin()
        assert await process.wait() == 0
        await io.drain(TIMEOUT_S)
        await client.done()
        await io.close()
        assert hashlib.sha256(client.received["stdout"]).digest() == hashlib.sha256(data).digest()
        assert client.received["stderr"] == b"end\n"

    run(body)


def test_output_that_cannot_be_written_holds_nobody_up(caplog: pytest.LogCaptureFixture) -> None:
    """On a disk that is full, say."""

    async def body() -> None:
        io = await ProcessIO.open(Stdio("", "file:///dev/full", "", False), "default", "p")
        process = await spawn("head", "-c", str(MIB), "/dev/zero")
        io.start(process)
        assert await process.wait() == 0
        await io.drain(TIMEOUT_S)
        await io.close()
        lost = [each.getMessage() for each in caplog.records if "output is lost" in each.getMessage()]
        assert lost == ["output is lost: [Errno 28] No space left on device"]

    run(body)


def test_a_client_that_goes_is_not_the_end_of_stdin(tmp_path: Path) -> None:
    async def body() -> None:
        client = Client(tmp_path)
        client.read("stdout")
        io = await ProcessIO.open(client.stdio, "default", "p")
        process = await spawn("cat")
        io.start(process)
        for line in (b"first\n", b"second\n"):
            await asyncio.to_thread(client.paths["stdin"].write_bytes, line)
        await until(lambda: client.received["stdout"] == b"first\nsecond\n")
        assert process.process.returncode is None
        io.release_stdin()
        assert await process.wait() == 0
        await io.close()

    run(body)


def test_without_stdin_a_process_reads_the_end(tmp_path: Path) -> None:
    async def body() -> None:
        io = await ProcessIO.open(Stdio("", "", "", False), "default", "p")
        # More than a pipe takes: what nobody asked for is read all the same.
        process = await spawn("sh", "-c", "cat; head -c 1000000 /dev/zero; head -c 1000000 /dev/zero >&2")
        io.start(process)
        assert await process.wait() == 0
        await io.close()

    run(body)


def test_a_slow_reader_holds_up_its_own_stream_only(tmp_path: Path) -> None:
    async def body() -> None:
        client = Client(tmp_path)
        # Nobody reads stdout, but it is open.
        reader = os.open(client.paths["stdout"], os.O_RDONLY | os.O_NONBLOCK)
        client.read("stderr")
        io = await ProcessIO.open(client.stdio, "default", "p")
        process = await spawn("sh", "-c", "head -c 1000000 /dev/zero & echo free >&2; wait")
        io.start(process)
        await until(lambda: client.received["stderr"] == b"free\n")
        await asyncio.sleep(0.2)
        assert process.process.returncode is None, "who holds megabytes that nobody reads?"
        os.set_blocking(reader, True)
        size = 0
        while size < 1_000_000:
            size += len(await asyncio.to_thread(os.read, reader, 65536))
        assert await process.wait() == 0
        await io.close()
        os.close(reader)

    run(body)


def test_a_vanished_reader_does_not_stop_the_process_and_may_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shim.stdio, "READER_PATIENCE_S", 0.2)

    async def body() -> None:
        client = Client(tmp_path)
        reader = os.open(client.paths["stdout"], os.O_RDONLY | os.O_NONBLOCK)
        io = await ProcessIO.open(client.stdio, "default", "p")
        process = await spawn("sh", "-c", "head -c 1000000 /dev/zero; echo >&2; cat")
        os.close(reader)
        # Before it is given up in its turn.
        err = await asyncio.to_thread(client.paths["stderr"].open, "rb", 0)
        io.start(process)
        assert await asyncio.to_thread(err.read, 1) == b"\n", "the process waits for a reader"
        reader = os.open(client.paths["stdout"], os.O_RDONLY | os.O_NONBLOCK)
        await process.write_stdin(b"back\n")
        seen = b""
        while not seen.endswith(b"back\n"):
            await asyncio.sleep(0.01)
            with contextlib.suppress(BlockingIOError):
                seen += os.read(reader, 1 << 20)
        await process.close_stdin()
        assert await process.wait() == 0
        await io.close()
        os.close(reader)
        err.close()

    run(body)


def test_output_from_before_the_reader_came_is_not_lost(tmp_path: Path) -> None:
    async def body() -> None:
        client = Client(tmp_path)
        io = await ProcessIO.open(client.stdio, "default", "p")
        process = await spawn("echo", "early")
        io.start(process)
        assert await process.wait() == 0
        await asyncio.sleep(0.2)
        client.read("stdout")
        await io.drain(TIMEOUT_S)
        await client.done()
        await io.close()
        assert client.received["stdout"] == b"early\n"

    run(body)


def test_draining_ends_when_somebody_else_holds_the_output(tmp_path: Path) -> None:
    async def body() -> None:
        client = Client(tmp_path)
        client.read("stdout", "stderr")
        io = await ProcessIO.open(client.stdio, "default", "p")
        process = await spawn("sh", "-c", "sleep 1000 & echo done")
        io.start(process)
        # Whoever opens a fifo after its writer has gone waits for another.
        await until(lambda: client.received["stdout"] == b"done\n" and "stderr" in client.reading)
        await io.drain(0.5)
        await io.close()
        await client.done()
        process.abandon()

    run(body)


class SilentProcess(LocalProcess):
    """In a guest that stands still before it hands out the end."""

    is_read: asyncio.Event
    goes_on: asyncio.Event

    async def read_stdout(self, size: int) -> bytes:
        data = await super().read_stdout(size)
        self.is_read.set()
        await self.goes_on.wait()
        return data


def test_the_silence_of_a_guest_that_stands_still_is_not_the_end(tmp_path: Path) -> None:
    async def body() -> None:
        path = tmp_path / "log"
        io = await ProcessIO.open(Stdio("", f"file://{path}", "", False), "default", "p")
        process = SilentProcess(LocalSandbox("s"), "p", {"args": ["echo", "late"]})
        process.is_read, process.goes_on = asyncio.Event(), asyncio.Event()
        await process.spawn()
        io.start(process)  # type: ignore[arg-type]
        assert await process.wait() == 0
        await process.is_read.wait()

        async def answers() -> None:
            process.goes_on.set()

        await io.drain(0.05, answers)
        await io.close()
        assert path.read_text() == "late\n"

    run(body)


def test_a_terminal_has_one_stream(tmp_path: Path) -> None:
    async def body() -> None:
        client = Client(tmp_path, terminal=True)
        client.read("stdout")
        io = await ProcessIO.open(client.stdio, "default", "p")
        process = await spawn("echo", "text", terminal=True)
        io.start(process)
        await io.drain(TIMEOUT_S)
        await client.done()
        await io.close()
        await process.process.wait()
        assert client.received["stdout"] == b"text\n"

    run(body)


def test_a_file_takes_both_streams_and_keeps_what_it_has(tmp_path: Path) -> None:
    async def body() -> None:
        path = tmp_path / "new directory" / "log"
        for text in ("first", "second"):
            uri = f"file://{path}".replace(" ", "%20")
            io = await ProcessIO.open(Stdio("", uri, uri, False), "default", "p")
            process = await spawn("sh", "-c", f"echo {text}; echo {text} >&2")
            io.start(process)
            await io.drain(TIMEOUT_S)
            await io.close()
        assert path.read_text().split() == ["first"] * 2 + ["second"] * 2

    run(body)


LOGGER = """#!/bin/sh
{ready}
cat <&4 >{directory}/stderr &
cat <&3 >{directory}/stdout
wait
echo "$CONTAINER_NAMESPACE $CONTAINER_ID $*" >{directory}/environment
ls /proc/self/fd >{directory}/fds
"""


def logger(directory: Path, ready: str) -> str:
    path = directory / "logger"
    path.write_text(LOGGER.format(ready=ready, directory=directory))
    path.chmod(0o755)
    return str(path)


def inheritable(fd: int) -> bool:
    try:
        return os.get_inheritable(fd)
    except OSError:  # the directory's own
        return False


@pytest.mark.parametrize(("scheme", "ready"), [("binary", "exec 5>&-"), ("binary-v2", "echo >&5; exec 5>&-")])
def test_a_logging_binary_gets_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, ready: str
) -> None:
    monkeypatch.setattr(shim.stdio, "LOGGER_READY_S", TIMEOUT_S)
    monkeypatch.setattr(shim.stdio, "LOGGER_END_S", TIMEOUT_S)

    async def body() -> None:
        uri = f"{scheme}://{logger(tmp_path, ready)}?one=1&flag="
        io = await ProcessIO.open(Stdio("", uri, uri, False), "default", "c1")
        process = await spawn("sh", "-c", "seq 100000; echo err >&2")
        io.start(process)
        assert await process.wait() == 0
        await io.drain(TIMEOUT_S)
        await io.close()
        assert (tmp_path / "stdout").read_text().split() == [str(n) for n in range(1, 100001)]
        assert (tmp_path / "stderr").read_text() == "err\n"
        assert (tmp_path / "environment").read_text() == "default c1 one 1 flag \n"
        # 5 is the directory that ls reads; whoever runs the tests may leave us some of theirs.
        foreign = {fd for fd in open_descriptors() if inheritable(fd)}
        assert {int(fd) for fd in (tmp_path / "fds").read_text().split()} - foreign <= {0, 1, 2, 3, 4, 5}

    run(body)


def test_a_logging_binary_that_dies_does_not_stop_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shim.stdio, "LOGGER_READY_S", TIMEOUT_S)

    async def body() -> None:
        uri = f"binary://{logger(tmp_path, 'exit 1')}"
        io = await ProcessIO.open(Stdio("", uri, uri, False), "default", "c1")
        process = await spawn("head", "-c", "1000000", "/dev/zero")
        io.start(process)
        assert await process.wait() == 0
        await io.close()

    run(body)


def test_a_logging_binary_that_is_never_ready_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shim.stdio, "LOGGER_READY_S", 0.2)

    async def body() -> None:
        before = open_descriptors()
        for scheme, ready in (("binary", "exec sleep 1000"), ("binary-v2", "exit 0")):
            uri = f"{scheme}://{logger(tmp_path, ready)}"
            with pytest.raises(KataError, match="logger"):
                await ProcessIO.open(Stdio("", uri, uri, False), "default", "c1")
        assert open_descriptors() <= before

    run(body)


@pytest.mark.parametrize(
    ("stdio", "kind", "named"),
    [
        (Stdio("", "/no/such/fifo", "", False), NotFoundError, "stdout /no/such/fifo"),
        (Stdio("/no/such/fifo", "", "", False), NotFoundError, "stdin /no/such/fifo"),
        (Stdio("", "binary:///no/such/logger", "", False), InvalidArgumentError, "/no/such/logger"),
        (Stdio("", "npipe:////./pipe", "", False), InvalidArgumentError, "npipe"),
    ],
)
def test_what_cannot_be_opened_is_named(stdio: Stdio, kind: type[KataError], named: str) -> None:
    async def body() -> None:
        before = open_descriptors()
        with pytest.raises(kind, match=named):
            await ProcessIO.open(stdio, "default", "c1")
        assert open_descriptors() <= before

    run(body)
