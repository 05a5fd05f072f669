"""The guest's vsock: the host kernel's vhost-vsock, or vhost-device-vsock in user space (hvsock)."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import termios
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from virtcontainers.config import AgentTransport
from virtcontainers.errors import InvalidArgumentError

VHOST_VSOCK_DEVICE = Path("/dev/vhost-vsock")
VHOST_DEVICE_VSOCK = tuple(
    Path(directory, "vhost-device-vsock")
    for directory in ("/usr/local/bin", "/usr/bin", "/usr/libexec", "/usr/libexec/kata-py")
)

FIRST_CID = 3
"""0 to 2 are the hypervisor, the local machine and the host; <linux/vm_sockets.h>."""
LAST_CID = 0xFFFFFFFE
"""0xFFFFFFFF is VMADDR_CID_ANY."""

_VHOST_VSOCK_SET_GUEST_CID = 0x4008AF60  # _IOW(VHOST_VIRTIO, 0x60, __u64), <linux/vhost.h>
_CID_TRIES = 64


@dataclass(frozen=True)
class GuestCID:
    """A context id that is ours for as long as `vhost_fd` is open, here or in QEMU."""

    cid: int
    vhost_fd: int


def resolve_transport(wanted: AgentTransport, device: Path = VHOST_VSOCK_DEVICE) -> AgentTransport:
    """AUTO: VSOCK where the host's device opens, else SERIAL."""
    if wanted is not AgentTransport.AUTO:
        return wanted
    return AgentTransport.VSOCK if os.access(device, os.R_OK | os.W_OK) else AgentTransport.SERIAL


def find_context_id(device: Path = VHOST_VSOCK_DEVICE) -> GuestCID:
    """A context id nobody on this host has; the caller closes `vhost_fd`.

    Raises InvalidArgumentError when the host has no vhost-vsock, with the way out.
    """
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidArgumentError(
            f'transport "vsock" needs {device}: {error.strerror}; load the module vhost_vsock, or set '
            'transport = "serial" in [agent.kata]'
        ) from error

    def claim(cid: int) -> bool:
        try:
            fcntl.ioctl(fd, _VHOST_VSOCK_SET_GUEST_CID, struct.pack("=Q", cid))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise
        return True

    try:
        return GuestCID(choose_cid(claim), fd)
    except OSError as error:
        os.close(fd)
        raise InvalidArgumentError(f"{device} refuses a context id: {error.strerror}") from error
    except BaseException:
        os.close(fd)
        raise


def choose_cid(claim: Callable[[int], bool]) -> int:
    """The first context id that `claim` grants, tried at random.

    At random so that nobody knows the next one, and to be quick: of four thousand million, a few are taken.
    """
    for _ in range(_CID_TRIES):
        cid = int.from_bytes(os.urandom(4), "little")
        if FIRST_CID <= cid <= LAST_CID and claim(cid):
            return cid
    raise InvalidArgumentError(f"no free vsock context id in {_CID_TRIES} tries")


def find_vhost_device_vsock(candidates: Sequence[Path]) -> Path:
    """Raises InvalidArgumentError with the way out."""
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise InvalidArgumentError(
        f'transport "hvsock" needs vhost-device-vsock, and none of {", ".join(map(str, candidates))} exists: '
        'install it, or set transport = "serial" in [agent.kata]'
    )


def vhost_device_vsock_argv(path: Path, *, socket_path: Path, uds_path: Path) -> list[str]:
    """It listens on both: QEMU connects to `socket_path`, we to `uds_path`.

    The context id is never seen outside the machine: every such device is a bus of its own.
    """
    return [str(path), f"--guest-cid={FIRST_CID}", f"--socket={socket_path}", f"--uds-path={uds_path}"]


def connected(path: Path) -> socket.socket | None:
    """None when nobody listens there yet. Raises OSError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connection.connect(str(path))
    except BaseException as error:
        connection.close()
        if isinstance(error, FileNotFoundError | ConnectionRefusedError):
            return None
        raise
    return connection


def unread_bytes(connection: socket.socket) -> int:
    """What the other end has not read yet, as the kernel counts it: 0 when it has read all."""
    # unix(7): SIOCOUTQ, which is TIOCOUTQ.
    (unread,) = struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)))
    return int(unread)
