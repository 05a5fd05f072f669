"""The streams of a process, between the guest and what containerd names: fifos, a file, a logging binary.

Every stream is its own task: one that is slow holds up nobody else.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import stat
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from virtcontainers.errors import DeadlineExceededError, InvalidArgumentError, KataError, NotFoundError

if TYPE_CHECKING:
    from virtcontainers.container import Process

log = logging.getLogger(__name__)

T = TypeVar("T")

CHUNK_BYTES = 64 << 10
"""Of one read: what a pipe in the guest holds."""

READER_PATIENCE_S = 10.0
"""How long a fifo without a reader is waited for: containerd needs less for a restart."""

LOGGER_READY_S = 10.0
LOGGER_END_S = 12.0
"""As in containerd's own shim: a logger has ten seconds to flush, and two to notice."""


@dataclass(frozen=True)
class Stdio:
    """What containerd says of a process's streams: paths of fifos, URIs, or nothing."""

    stdin: str
    stdout: str
    stderr: str
    terminal: bool


class Sink:
    """Where output goes. A slow reader is waited for; what nobody reads is discarded.

    With `patience_s`, for a fifo: a reader that is not there has so long to come (back), and from then on the
    process goes on without one until there is one again.
    """

    def __init__(self, fd: int, *, patience_s: float = 0.0) -> None:
        self._fd = fd
        self._patience_s = patience_s
        self._give_up_at: float | None = None
        self.written = 0
        """Bytes, whoever has read them."""

    async def write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                count = os.write(self._fd, rest)
            except BlockingIOError:
                await _ready(self._fd, write=True)
                continue
            except BrokenPipeError:
                now = asyncio.get_running_loop().time()
                if self._give_up_at is None:
                    self._give_up_at = now + self._patience_s
                if now >= self._give_up_at:
                    return
                await asyncio.sleep(0.05)
                continue
            self._give_up_at = None
            self.written += count
            rest = rest[count:]

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Source:
    """The stdin fifo. We are one of its writers until `release`: a client that goes away is not the end."""

    def __init__(self, path: Path) -> None:
        with ExitStack() as undo:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            undo.callback(os.close, self._fd)
            self._own_writer = -1
            if stat.S_ISFIFO(os.fstat(self._fd).st_mode):
                self._own_writer = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
            undo.pop_all()

    async def read(self) -> bytes:
        """b"" once it is released and the last writer has closed it."""
        while True:
            try:
                return os.read(self._fd, CHUNK_BYTES)
            except BlockingIOError:
                await _ready(self._fd, write=False)

    def release(self) -> None:
        """Idempotent."""
        if self._own_writer >= 0:
            os.close(self._own_writer)
            self._own_writer = -1

    def close(self) -> None:
        """Idempotent."""
        self.release()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class ProcessIO:
    """The streams of one process: opened, then `start`ed when the guest has the process, then closed."""

    def __init__(
        self, stdin: Source | None, stdout: Sink, stderr: Sink | None, logger: Logger | None = None
    ) -> None:
        """`stderr` is None with a terminal."""
        self._stdin = stdin
        self._stdout = stdout
        self._stderr = stderr
        self._logger = logger
        self._read = 0
        self._unanswered = 0
        """Reads that the guest has not answered."""
        self._outputs: set[asyncio.Task[None]] = set()
        self._input: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, stdio: Stdio, namespace: str, process_id: str) -> ProcessIO:
        """Raises KataError for what cannot be opened; nothing is left open then."""
        with ExitStack() as undo:
            stdin = None
            if stdio.stdin:
                stdin = _open(Source, stdio.stdin, "stdin")
                undo.callback(stdin.close)
            scheme = stdio.stdout.partition("://")[0] if "://" in stdio.stdout else "fifo"
            logger = stderr = None
            if scheme in ("binary", "binary-v2"):
                logger = await Logger.start(stdio.stdout, namespace, process_id)
                stdout, stderr = logger.stdout, logger.stderr
                if stdio.terminal:
                    stderr.close()
            elif scheme in ("fifo", "file"):
                opener = _open_file if scheme == "file" else _open_output
                stdout = _open(opener, stdio.stdout or os.devnull, "stdout")
                undo.callback(stdout.close)
                if not stdio.terminal:
                    # As in containerd's own shim, a file takes both.
                    second = stdio.stdout if scheme == "file" else stdio.stderr
                    stderr = _open(opener, second or os.devnull, "stderr")
            else:
                raise InvalidArgumentError(
                    f"stdout {stdio.stdout}: scheme {scheme!r}, expected fifo, file, binary or binary-v2"
                )
            undo.pop_all()
        return cls(stdin, stdout, None if stdio.terminal else stderr, logger)

    def start(self, process: Process) -> None:
        outputs = [(process.read_stdout, self._stdout)]
        if self._stderr is not None:
            outputs.append((process.read_stderr, self._stderr))
        self._outputs = {asyncio.create_task(self._copy_output(read, sink)) for read, sink in outputs}
        if self._stdin is not None:
            self._input = asyncio.create_task(self._copy_input(self._stdin, process))
        elif not process.terminal:
            # Nobody will ever write: reading gives the end, as it does from runc's /dev/null.
            self._input = asyncio.create_task(_close_stdin(process))

    def release_stdin(self) -> None:
        """containerd's CloseIO: the end comes when the last client has closed the fifo too."""
        if self._stdin is not None:
            self._stdin.release()

    async def report(self, reason: str) -> None:
        """Tell the reader why there was no process."""
        newline = "\n" if self._stderr is not None else "\r\n"
        with suppress(TimeoutError):
            async with asyncio.timeout(READER_PATIENCE_S):
                await (self._stderr or self._stdout).write((reason + newline).encode())

    async def drain(self, idle_s: float, answers: Callable[[], Awaitable[None]] | None = None) -> None:
        """Return when the output has ended and is written, or when for `idle_s` no byte of it has moved.

        For a process that has exited: somebody else may have inherited its output, or nobody may read it.
        With `answers`, which returns once the guest has answered something, a guest that stands still is no
        such reason: what counts is `idle_s` after its answer.
        """
        is_asked = False
        while pending := {task for task in self._outputs if not task.done()}:
            moved = self._moved
            await asyncio.wait(pending, timeout=idle_s)
            if moved != self._moved:
                is_asked = False
            elif is_asked or answers is None or not self._unanswered:
                return
            else:
                await answers()
                is_asked = True

    async def ended(self) -> None:
        """Return when the output has ended and is written, or is cut."""
        if self._outputs:
            await asyncio.wait(self._outputs)

    async def close(self) -> None:
        """Cut what still flows; what was written stays readable. Idempotent."""
        tasks = {*self._outputs, *([self._input] if self._input else [])}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for stream in (self._stdin, self._stdout, self._stderr):
            if stream is not None:
                stream.close()
        if self._logger is not None:
            await self._logger.end()

    @property
    def _moved(self) -> int:
        return self._read + self._stdout.written + (self._stderr.written if self._stderr else 0)

    async def _copy_output(self, read: Callable[[int], Awaitable[bytes]], sink: Sink) -> None:
        """To its end, also where it cannot be written: a process whose output nobody reads stands still."""
        is_told = False
        try:
            while data := await self._ask(read):
                self._read += len(data)
                try:
                    await sink.write(data)
                except OSError as error:
                    if not is_told:
                        log.warning("output is lost: %s", error)
                    is_told = True
        except (KataError, OSError) as error:
            log.warning("output ends early: %s", error)
        finally:
            sink.close()

    async def _ask(self, read: Callable[[int], Awaitable[bytes]]) -> bytes:
        self._unanswered += 1
        try:
            return await read(CHUNK_BYTES)
        finally:
            self._unanswered -= 1

    async def _copy_input(self, source: Source, process: Process) -> None:
        try:
            while data := await source.read():
                rest = memoryview(data)
                while rest:
                    rest = rest[await process.write_stdin(bytes(rest)) :]
        except (KataError, OSError) as error:
            log.debug("input ends early: %s", error)
        finally:
            # Its writers must not wait for a process that reads no more.
            source.close()
        await _close_stdin(process)


async def _close_stdin(process: Process) -> None:
    try:
        await process.close_stdin()
    except KataError as error:
        log.debug("stdin is not closed: %s", error)


class Logger:
    """A logging binary of containerd's `binary://`: it reads two pipes of ours, on its fds 3 and 4."""

    def __init__(self, name: str, pid: int, stdout: Sink, stderr: Sink) -> None:
        self._name = name
        self._pid: int | None = pid
        self.stdout = stdout
        self.stderr = stderr

    @classmethod
    async def start(cls, uri: str, namespace: str, process_id: str) -> Logger:
        """Start it and wait until it says, on its fd 5, that it is ready.

        `binary-v2://` wants a byte there; to `binary://` the end is enough. Raises KataError.
        """
        from urllib.parse import parse_qs, urlsplit

        name = str(_path(uri))
        command = [name]
        for key, values in parse_qs(urlsplit(uri).query, keep_blank_values=True).items():
            command += [key, values[0]]
        environment = {"CONTAINER_ID": process_id, "CONTAINER_NAMESPACE": namespace}
        with ExitStack() as undo, ExitStack() as temporary:
            (out, stdout), (err, stderr), (ready_read, ready) = _pipe(), _pipe(), _pipe()
            sinks = Sink(stdout), Sink(stderr)
            for sink in sinks:
                undo.callback(sink.close)
            temporary.callback(os.close, ready_read)
            with ExitStack() as given:
                for fd in (out, err, ready):
                    given.callback(os.close, fd)
                null = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in (0, 1, 2)]
                numbered = [
                    (os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate((out, err, ready), 3)
                ]
                try:
                    pid = _spawn(name, command, environment, [*null, *numbered])
                except OSError as error:
                    raise InvalidArgumentError(f"logging binary {name}: {error.strerror}") from error
            os.set_blocking(stdout, False)
            os.set_blocking(stderr, False)
            logger = cls(name, pid, *sinks)
            try:
                async with asyncio.timeout(LOGGER_READY_S):
                    await _ready(ready_read, write=False)
                if not os.read(ready_read, 1) and uri.startswith("binary-v2://"):
                    raise KataError(f"logging binary {name} ended before it was ready")
            except BaseException as error:
                os.kill(pid, signal.SIGKILL)
                _reap(pid)
                if isinstance(error, TimeoutError):
                    raise DeadlineExceededError(
                        f"logging binary {name} was not ready within {LOGGER_READY_S:g} s"
                    ) from None
                raise
            undo.pop_all()
        return logger

    async def end(self) -> None:
        """Wait for the logger, whose pipes are closed; end it when it will not. Idempotent."""
        if self._pid is None:
            return
        pid, self._pid = self._pid, None
        pidfd = os.pidfd_open(pid)
        try:
            for timeout_s, signum in ((LOGGER_END_S - 10, signal.SIGTERM), (10, signal.SIGKILL)):
                try:
                    async with asyncio.timeout(timeout_s):
                        await _ready(pidfd, write=False)
                    break
                except TimeoutError:
                    log.warning("logging binary %s does not end: %s", self._name, signum.name)
                    os.kill(pid, signum)
            _reap(pid)
        finally:
            os.close(pidfd)


def _spawn(name: str, command: list[str], environment: dict[str, str], actions: list[Any]) -> int:
    return os.posix_spawn(name, command, environment, file_actions=actions)


def _reap(pid: int) -> None:
    """A child that has exited, or is about to."""
    os.waitpid(pid, 0)


def _pipe() -> tuple[int, int]:
    """Both ends above the numbers that a logger gets."""
    ends = []
    for end in os.pipe():
        ends.append(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10))
        os.close(end)
    return ends[0], ends[1]


async def _ready(fd: int, *, write: bool) -> None:
    """Wait until the fd can be read, or written."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    add, remove = (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)

    def set_ready() -> None:
        if not ready.done():
            ready.set_result(None)

    add(fd, set_ready)
    try:
        await ready
    finally:
        remove(fd)


def _path(uri: str) -> Path:
    if "://" not in uri:
        return Path(uri)
    from urllib.parse import unquote, urlsplit

    return Path(unquote(urlsplit(uri).path))


def _open(opener: Callable[[Path], T], uri: str, what: str) -> T:
    path = _path(uri)
    try:
        return opener(path)
    except FileNotFoundError as error:
        raise NotFoundError(f"{what} {path} does not exist") from error
    except OSError as error:
        raise InvalidArgumentError(f"{what} {path}: {error.strerror}") from error


def _open_file(path: Path) -> Sink:
    path.parent.mkdir(parents=True, exist_ok=True)
    return Sink(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644))


def _open_output(path: Path) -> Sink:
    if not stat.S_ISFIFO(path.stat().st_mode):
        return Sink(os.open(path, os.O_WRONLY | os.O_APPEND))
    # Without a reader O_WRONLY alone is refused, and a client that is about to read waits for a writer.
    reader = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        return Sink(os.open(path, os.O_WRONLY | os.O_NONBLOCK), patience_s=READER_PATIENCE_S)
    finally:
        os.close(reader)
