"""Ways to the agent inside a machine, and dialling them while the machine still boots."""

from __future__ import annotations

import asyncio
import errno
import socket
from asyncio import StreamReader, StreamWriter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

AGENT_PORT = 1024
"""The vsock port every Kata agent listens on."""

_FIRST_PAUSE_S = 0.001
_LONGEST_PAUSE_S = 0.1

_HANDSHAKE_TIMEOUT_S = 10.0
"""One hvsock handshake. A guest kernel that is just coming up can lose it for good; Kata waits as long."""

_BUFFER_BYTES = 256 << 10

_HOPELESS_ERRNOS = {
    errno.EACCES,
    errno.EAFNOSUPPORT,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.ENOTSOCK,
    errno.EPERM,
    errno.EPROTONOSUPPORT,
}

T = TypeVar("T")


@dataclass(frozen=True)
class VsockAddress:
    """The host kernel's vsock; `cid` is the machine's context id."""

    cid: int
    port: int = AGENT_PORT

    def __str__(self) -> str:
        return f"vsock://{self.cid}:{self.port}"


@dataclass(frozen=True)
class HybridVsockAddress:
    """A unix socket before the guest's vsock, as Firecracker and vhost-device-vsock have it."""

    path: Path
    port: int = AGENT_PORT

    def __str__(self) -> str:
        return f"hvsock://{self.path}:{self.port}"


@dataclass(frozen=True)
class SerialAddress:
    """The unix socket of the QEMU chardev behind the guest's virtio-serial port `agent.channel.0`."""

    path: Path

    def __str__(self) -> str:
        return f"serial://{self.path}"


AgentAddress = VsockAddress | HybridVsockAddress | SerialAddress


class AgentDialFailed(Exception):
    """The agent cannot be reached, and trying again would not help: no vsock on this host, no permission."""

    def __init__(self, address: AgentAddress, message: str) -> None:
        super().__init__(f"agent at {address}: {message}")
        self.address = address


class AgentDialTimeout(AgentDialFailed):
    """The agent did not answer in time; `__cause__` is the last attempt's error."""


async def dial(address: AgentAddress, *, timeout_s: float) -> tuple[StreamReader, StreamWriter]:
    """A byte stream to the agent, as soon as there is one.

    Something answers at the other end with `serial` (the agent) and `vsock` (the guest's kernel); with
    `hvsock` it may be the device only, and the stream end at once.

    Raises AgentDialTimeout and AgentDialFailed; nothing is left open then.
    """
    return await keep_trying(
        address, lambda remaining_s: dial_once(address, remaining_s), timeout_s=timeout_s
    )


async def keep_trying(
    address: AgentAddress,
    attempt: Callable[[float], Awaitable[T]],
    *,
    timeout_s: float,
    transient: tuple[type[Exception], ...] = (OSError, EOFError),
) -> T:
    """The first success of `attempt`, which gets the seconds left and is cancelled after them.

    A boot is what usually passes here, and is measured: so the pauses start short.
    """
    clock = asyncio.get_running_loop().time
    deadline = clock() + timeout_s
    pause_s = _FIRST_PAUSE_S
    cause: Exception | None = None
    while (remaining_s := deadline - clock()) > 0:
        try:
            async with asyncio.timeout(remaining_s):
                return await attempt(remaining_s)
        except transient as error:
            if _is_hopeless(error):
                raise AgentDialFailed(address, str(error)) from error
            # Being cut off by the deadline says less than what went wrong before.
            if cause is None or not isinstance(error, TimeoutError):
                cause = error
        await asyncio.sleep(min(pause_s, max(0.0, deadline - clock())))
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    last = f"; last: {cause}" if str(cause or "") else ""
    raise AgentDialTimeout(address, f"no answer within {timeout_s:g} s{last}") from cause


async def dial_once(address: AgentAddress, timeout_s: float) -> tuple[StreamReader, StreamWriter]:
    """One attempt. Raises OSError or EOFError."""
    match address:
        case VsockAddress():
            return await _dial_vsock(address)
        case HybridVsockAddress():
            return await _dial_hybrid_vsock(address, min(timeout_s, _HANDSHAKE_TIMEOUT_S))
        case SerialAddress():
            return await _dial_serial(address, timeout_s)


async def _dial_vsock(address: VsockAddress) -> tuple[StreamReader, StreamWriter]:
    sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        # The kernel gives up by itself after 2 s, when the guest has no driver yet.
        await asyncio.get_running_loop().sock_connect(sock, (address.cid, address.port))
        return await asyncio.open_connection(sock=sock, limit=_BUFFER_BYTES)
    except BaseException:
        sock.close()
        raise


async def _dial_hybrid_vsock(
    address: HybridVsockAddress, timeout_s: float
) -> tuple[StreamReader, StreamWriter]:
    reader, writer = await asyncio.open_unix_connection(address.path, limit=_BUFFER_BYTES)
    with _aborted_on_failure(writer):
        connect = f"CONNECT {address.port}"
        writer.write(f"{connect}\n".encode())
        try:
            async with asyncio.timeout(timeout_s):
                answer = await reader.readuntil(b"\n")
        except asyncio.IncompleteReadError:
            raise ConnectionError(f"the guest does not listen on vsock port {address.port}") from None
        except asyncio.LimitOverrunError:
            raise ConnectionError(f"{connect} was answered with a line without an end") from None
        except TimeoutError:
            raise TimeoutError(f"{connect} was not answered") from None
        if not answer.startswith(b"OK"):
            raise ConnectionError(f"{connect} was answered with {answer[:40]!r}, expected OK")
    return reader, writer


async def _dial_serial(address: SerialAddress, timeout_s: float) -> tuple[StreamReader, StreamWriter]:
    from ttrpc.chardev import connect_chardev

    reader, writer = await asyncio.open_unix_connection(address.path, limit=_BUFFER_BYTES)
    with _aborted_on_failure(writer):
        return await connect_chardev(reader, writer, timeout_s=timeout_s)


@contextmanager
def _aborted_on_failure(writer: StreamWriter) -> Iterator[None]:
    try:
        yield
    except BaseException:
        writer.transport.abort()
        raise


def _is_hopeless(error: Exception) -> bool:
    if type(error) is OSError and error.errno is None:
        return True  # "AF_UNIX path too long", which is Python's own
    return isinstance(error, OSError) and error.errno in _HOPELESS_ERRNOS
