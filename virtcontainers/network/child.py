"""A short-lived process of ours in a network namespace.

A fork, and not a new interpreter: what it has in common with us is there already, and pyroute2 comes in 45
ms of CPU, where `python -IS` needs 75, and 110 when all of pyroute2 is imported. We ourselves never import
it: it is 10 MB.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import gc
import json
import logging
import os
import signal
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from virtcontainers import errors
from virtcontainers.errors import DeadlineExceededError, InvalidArgumentError, KataError

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_CLONE_NEWNET = 0x40000000  # <linux/sched.h>
_NS_GET_NSTYPE = 0xB703  # <linux/nsfs.h>
_FD_LIMIT = 1 << 30
"""Above every descriptor: the kernel closes a range in one call."""

_HEADER = struct.Struct("=II")
"""The bytes and the descriptors that follow."""
_MOST_FDS = 250
"""Of one message: SCM_MAX_FD of <net/scm.h> is 253."""
_TIMEOUT_S = 60.0
"""Only a hang is longer, also on a machine that is busy."""


def open_namespace(path: Path) -> int:
    """A descriptor of a pod's network namespace. Raises InvalidArgumentError when there is none, or it is
    the host's, or our own: nothing is ever done there."""
    what = f"network namespace {path}"
    try:
        # What is no namespace may not even open.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidArgumentError(f"{what}: {error.strerror}") from error
    if not _is_network_namespace(fd):
        os.close(fd)
        raise InvalidArgumentError(f"{what}: found something else, expected a network namespace")
    found = os.fstat(fd)
    for process in ("self", "1"):
        with contextlib.suppress(OSError):
            other = os.stat(f"/proc/{process}/ns/net")  # noqa: PTH116
            if (other.st_dev, other.st_ino) == (found.st_dev, found.st_ino):
                os.close(fd)
                raise InvalidArgumentError(
                    f"{what}: found the host's, expected the pod's own: a machine cannot be in the host's "
                    "network (hostNetwork, --net-host)"
                )
    return fd


def _is_network_namespace(fd: int) -> bool:
    try:
        return fcntl.ioctl(fd, _NS_GET_NSTYPE) == _CLONE_NEWNET
    except OSError:
        return False


class NamespaceChild:
    """Calls `netns`' functions in a namespace, one after another; end it with `close`."""

    def __init__(self, pid: int, sock: socket.socket) -> None:
        """Use `inside`."""
        self._pid = pid
        self._sock = sock

    @classmethod
    @contextlib.asynccontextmanager
    async def inside(cls, namespace: int) -> AsyncIterator[NamespaceChild]:
        """One in the namespace of this descriptor; it ends with the block."""
        child = cls._start(namespace)
        try:
            yield child
        finally:
            await child._end()

    @classmethod
    def _start(cls, namespace: int) -> NamespaceChild:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            ours.close()
            theirs.close()
            raise KataError(f"no process for the network namespace: {error.strerror}") from error
        if pid == 0:
            _become_child(parent, namespace, theirs.fileno())
        theirs.close()
        ours.setblocking(False)
        return cls(pid, ours)

    async def call(self, function: str, **arguments: Any) -> tuple[Any, list[int]]:
        """What it returns, and the descriptors, which are the caller's. Raises what it raised."""
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                loop = asyncio.get_running_loop()
                request = json.dumps({"function": function, "arguments": arguments}).encode()
                await loop.sock_sendall(self._sock, _HEADER.pack(len(request), 0) + request)
                return _answer(*await self._receive())
        except TimeoutError:
            raise DeadlineExceededError(f"network namespace: {function} took {_TIMEOUT_S:g} s") from None
        except (OSError, EOFError) as error:
            raise KataError(f"network namespace: the process for {function} ended: {error}") from error

    async def _receive(self) -> tuple[bytes, list[int]]:
        data, fds = bytearray(), list[int]()
        try:
            while True:
                with _readable(self._sock.fileno()) as readable:
                    await readable
                # Not by recv_fds: before Python 3.12 it forgets the flags.
                space = socket.CMSG_LEN(_MOST_FDS * 4)
                piece, extra, _, _ = self._sock.recvmsg(1 << 16, space, socket.MSG_CMSG_CLOEXEC)
                for _, _, numbers in extra:
                    fds += memoryview(numbers).cast("i")
                data += piece
                if not piece:
                    raise EOFError("it said nothing")
                if len(data) >= _HEADER.size:
                    size, count = _HEADER.unpack_from(data)
                    if len(data) == _HEADER.size + size and len(fds) == count:
                        return bytes(data[_HEADER.size :]), fds
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise

    async def _end(self) -> None:
        self._sock.close()
        pidfd = os.pidfd_open(self._pid)
        try:
            with _readable(pidfd) as ended:
                # It ends by itself when it sees that we have hung up, after what it is about to do.
                await asyncio.wait({ended}, timeout=_TIMEOUT_S)
        finally:
            if not ended.done():
                os.kill(self._pid, signal.SIGKILL)
            os.close(pidfd)
            os.waitpid(self._pid, 0)  # noqa: ASYNC222 # it has ended


@contextlib.contextmanager
def _readable(fd: int) -> Iterator[asyncio.Future[None]]:
    """Done when the descriptor can be read."""
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()

    def on_readable() -> None:
        if not readable.done():
            readable.set_result(None)

    loop.add_reader(fd, on_readable)
    try:
        yield readable
    finally:
        loop.remove_reader(fd)


def _answer(data: bytes, fds: list[int]) -> tuple[Any, list[int]]:
    found = json.loads(data)
    if "error" in found:
        raise getattr(errors, found["kind"], KataError)(found["error"])
    return found["result"], fds


# -- in the child


def _become_child(parent: int, namespace: int, sock: int) -> None:
    """Never returns: nothing of the parent's is to be run or taken down here."""
    try:
        gc.disable()
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the prctl
            os._exit(1)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        logging.disable(logging.CRITICAL)
        asyncio._set_running_loop(None)
        low, high = sorted((namespace, sock))
        for first, last in ((3, low), (low + 1, high), (high + 1, _FD_LIMIT)):
            os.closerange(first, last)
        refused = ctypes.get_errno() if libc.setns(namespace, _CLONE_NEWNET) else 0
        _serve(sock, refused)
        os._exit(0)
    except BaseException:
        os._exit(1)


def _serve(sock: int, refused: int) -> None:
    """`refused` is the errno of entering the namespace: an answer, as a process that has ended gives none."""
    from virtcontainers.network import netns

    for request in _requests(sock):
        try:
            if refused:
                raise KataError(f"entering the network namespace: {os.strerror(refused)}")
            result, fds = getattr(netns, request["function"])(**request["arguments"])
        except Exception as error:
            _send_error(sock, error)
            continue
        _send(sock, {"result": result}, fds)
        for fd in fds:
            os.close(fd)


def _requests(sock: int) -> Iterator[dict[str, Any]]:
    data = b""
    while True:
        while len(data) < _HEADER.size or len(data) < _HEADER.size + _HEADER.unpack_from(data)[0]:
            if not (piece := os.read(sock, 1 << 16)):
                return
            data += piece
        size, _ = _HEADER.unpack_from(data)
        yield json.loads(data[_HEADER.size : _HEADER.size + size])
        data = data[_HEADER.size + size :]


def _send_error(sock: int, error: Exception) -> None:
    text = str(error) if isinstance(error, KataError) else repr(error)
    _send(sock, {"error": text, "kind": type(error).__name__}, [])


def _send(sock: int, answer: dict[str, Any], fds: list[int]) -> None:
    text = json.dumps(answer).encode()
    data = memoryview(_HEADER.pack(len(text), len(fds)) + text)
    with socket.socket(fileno=os.dup(sock)) as connection:
        sent = socket.send_fds(connection, [data], fds) if fds else connection.send(data)
        connection.sendall(data[sent:])
