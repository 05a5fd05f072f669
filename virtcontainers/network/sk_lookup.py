"""One socket that is handed every TCP connection to a loopback address of a network namespace.

By a BPF program where the kernel looks for a listening socket (BPF_PROG_TYPE_SK_LOOKUP, Linux 5.9).
Numbers and layouts are those of linux/bpf.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
import threading

from virtcontainers import bpf
from virtcontainers.bpf import Command
from virtcontainers.errors import KataError
from virtcontainers.syscalls import closing

_BPF_MAP_TYPE_SOCKMAP = 15
_BPF_PROG_TYPE_SK_LOOKUP = 30
_BPF_SK_LOOKUP = 36

_CLONE_NEWNET = 0x40000000
_BACKLOG = 128

_MAP_LOOKUP_ELEM, _SK_RELEASE, _SK_ASSIGN = 1, 86, 124
_SK_PASS = 1

# struct bpf_sk_lookup
_FAMILY, _PROTOCOL, _LOCAL_IP4, _LOCAL_IP6 = 8, 12, 40, 44


def _program(sockets: int) -> bytes:
    """`sockets` is the map's descriptor."""
    one = int.from_bytes(b"\0\0\0\1", "little" if struct.pack("=H", 1)[0] else "big")
    lines: list[bpf.Instruction | str] = [
        (bpf.MOVE, 6, 1, 0, 0),
        (bpf.LOAD_WORD, 1, 6, _PROTOCOL, 0),
        (bpf.JUMP_NOT_EQUAL, 1, 0, "pass", socket.IPPROTO_TCP),
        (bpf.LOAD_WORD, 1, 6, _FAMILY, 0),
        (bpf.JUMP_EQUAL, 1, 0, "ipv6", socket.AF_INET6),
        (bpf.LOAD_BYTE, 1, 6, _LOCAL_IP4, 0),
        (bpf.JUMP_NOT_EQUAL, 1, 0, "pass", 127),
        (bpf.JUMP, 0, 0, "ours", 0),
        "ipv6",
        (bpf.LOAD_WORD, 1, 6, _LOCAL_IP6, 0),
        (bpf.LOAD_WORD, 2, 6, _LOCAL_IP6 + 4, 0),
        (bpf.OR, 1, 2, 0, 0),
        (bpf.LOAD_WORD, 2, 6, _LOCAL_IP6 + 8, 0),
        (bpf.OR, 1, 2, 0, 0),
        (bpf.JUMP_NOT_EQUAL, 1, 0, "pass", 0),
        (bpf.LOAD_WORD, 1, 6, _LOCAL_IP6 + 12, 0),
        (bpf.JUMP_NOT_EQUAL, 1, 0, "pass", one),
        "ours",
        (bpf.STORE_WORD_VALUE, 10, 0, -4, 0),
        (bpf.LOAD_MAP, 1, bpf.PSEUDO_MAP_FD, 0, sockets),
        (0, 0, 0, 0, 0),
        (bpf.MOVE, 2, 10, 0, 0),
        (bpf.ADD_VALUE, 2, 0, 0, -4),
        (bpf.CALL, 0, 0, 0, _MAP_LOOKUP_ELEM),
        (bpf.JUMP_EQUAL, 0, 0, "pass", 0),
        (bpf.MOVE, 7, 0, 0, 0),
        (bpf.MOVE, 1, 6, 0, 0),
        (bpf.MOVE, 2, 7, 0, 0),
        (bpf.MOVE_VALUE, 3, 0, 0, 0),
        (bpf.CALL, 0, 0, 0, _SK_ASSIGN),
        (bpf.MOVE, 1, 7, 0, 0),
        (bpf.CALL, 0, 0, 0, _SK_RELEASE),
        "pass",
        (bpf.MOVE_VALUE, 0, 0, 0, _SK_PASS),
        (bpf.EXIT, 0, 0, 0, 0),
    ]
    return bpf.assemble(lines)


class Listener:
    """The socket, and what hands it its connections; which port each was for is its own `getsockname()`.

    It comes before sockets that listen there themselves. Nothing of it outlives the process.
    """

    def __init__(self, namespace: int) -> None:
        """`namespace` is a descriptor of the network namespace. Raises KataError."""
        with contextlib.ExitStack() as stack:
            self.socket = stack.enter_context(_listen_in(namespace))
            with closing(
                bpf.syscall(Command.BPF_MAP_CREATE, "=5I", _BPF_MAP_TYPE_SOCKMAP, 4, 8, 1, 0)
            ) as sockets:
                key, value = _buffer("=I", 0), _buffer("=Q", self.socket.fileno())
                arguments = sockets, ctypes.addressof(key), ctypes.addressof(value), 0
                bpf.syscall(Command.BPF_MAP_UPDATE_ELEM, "=I4xQQQ", *arguments)
                program = bpf.load_program(_BPF_PROG_TYPE_SK_LOOKUP, _program(sockets), _BPF_SK_LOOKUP)
            with closing(program):
                arguments = program, namespace, _BPF_SK_LOOKUP, 0
                self._link = bpf.syscall(Command.BPF_LINK_CREATE, "=4I", *arguments)
            stack.pop_all()

    def close(self) -> None:
        """Idempotent. The socket is its server's to close, if it has one."""
        if self._link >= 0:
            os.close(self._link)
            self._link = -1
        self.socket.close()


def _listen_in(namespace: int) -> socket.socket:
    """A socket belongs to the namespace of the thread that made it: to this one's, it has no other use."""
    result: list[socket.socket | OSError] = []

    def make() -> None:
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(namespace, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            result.append(_listen())
        except OSError as error:
            result.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if isinstance(result[0], OSError):
        raise KataError(f"listening in a network namespace: {result[0].strerror}") from result[0]
    return result[0]


def _listen() -> socket.socket:
    """Of both families, where the host has IPv6."""
    try:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        address = "::ffff:127.0.0.1"
    except OSError:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        address = "127.0.0.1"
    try:
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind((address, 0))
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def _buffer(layout: str, value: int) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(struct.pack(layout, value))
