"""One socket that is handed every TCP connection to a loopback address of a network namespace.

By a BPF program where the kernel looks for a listening socket (BPF_PROG_TYPE_SK_LOOKUP, Linux 5.9). Numbers
and layouts are those of linux/bpf.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import socket
import struct
import threading
from collections.abc import Iterator

from virtcontainers.errors import KataError

_SYS_BPF = {"x86_64": 321, "aarch64": 280}
_BPF_MAP_CREATE = 0
_BPF_MAP_UPDATE_ELEM = 2
_BPF_PROG_LOAD = 5
_BPF_LINK_CREATE = 28
_BPF_MAP_TYPE_SOCKMAP = 15
_BPF_PROG_TYPE_SK_LOOKUP = 30
_BPF_SK_LOOKUP = 36
_ATTRIBUTES_BYTES = 128
_LOG_BYTES = 16 << 10
_NAME = b"kata_py"

_CLONE_NEWNET = 0x40000000
_BACKLOG = 128

# Instructions: code, destination, source, offset or a label to jump to, immediate value.
_Instruction = tuple[int, int, int, int | str, int]
_MOVE, _MOVE_VALUE, _ADD_VALUE, _OR = 0xBF, 0xB7, 0x07, 0x4F
_LOAD_BYTE, _LOAD_WORD, _STORE_WORD_VALUE, _LOAD_MAP = 0x71, 0x61, 0x62, 0x18
_JUMP, _JUMP_EQUAL, _JUMP_NOT_EQUAL, _CALL, _EXIT = 0x05, 0x15, 0x55, 0x85, 0x95
_PSEUDO_MAP_FD = 1
_MAP_LOOKUP_ELEM, _SK_RELEASE, _SK_ASSIGN = 1, 86, 124
_SK_PASS = 1

# struct bpf_sk_lookup
_FAMILY, _PROTOCOL, _LOCAL_IP4, _LOCAL_IP6 = 8, 12, 40, 44


def _program(sockets: int) -> bytes:
    """`sockets` is the map's descriptor."""
    one = int.from_bytes(b"\0\0\0\1", "little" if struct.pack("=H", 1)[0] else "big")
    lines: list[_Instruction | str] = [
        (_MOVE, 6, 1, 0, 0),
        (_LOAD_WORD, 1, 6, _PROTOCOL, 0),
        (_JUMP_NOT_EQUAL, 1, 0, "pass", socket.IPPROTO_TCP),
        (_LOAD_WORD, 1, 6, _FAMILY, 0),
        (_JUMP_EQUAL, 1, 0, "ipv6", socket.AF_INET6),
        (_LOAD_BYTE, 1, 6, _LOCAL_IP4, 0),
        (_JUMP_NOT_EQUAL, 1, 0, "pass", 127),
        (_JUMP, 0, 0, "ours", 0),
        "ipv6",
        (_LOAD_WORD, 1, 6, _LOCAL_IP6, 0),
        (_LOAD_WORD, 2, 6, _LOCAL_IP6 + 4, 0),
        (_OR, 1, 2, 0, 0),
        (_LOAD_WORD, 2, 6, _LOCAL_IP6 + 8, 0),
        (_OR, 1, 2, 0, 0),
        (_JUMP_NOT_EQUAL, 1, 0, "pass", 0),
        (_LOAD_WORD, 1, 6, _LOCAL_IP6 + 12, 0),
        (_JUMP_NOT_EQUAL, 1, 0, "pass", one),
        "ours",
        (_STORE_WORD_VALUE, 10, 0, -4, 0),
        (_LOAD_MAP, 1, _PSEUDO_MAP_FD, 0, sockets),
        (0, 0, 0, 0, 0),
        (_MOVE, 2, 10, 0, 0),
        (_ADD_VALUE, 2, 0, 0, -4),
        (_CALL, 0, 0, 0, _MAP_LOOKUP_ELEM),
        (_JUMP_EQUAL, 0, 0, "pass", 0),
        (_MOVE, 7, 0, 0, 0),
        (_MOVE, 1, 6, 0, 0),
        (_MOVE, 2, 7, 0, 0),
        (_MOVE_VALUE, 3, 0, 0, 0),
        (_CALL, 0, 0, 0, _SK_ASSIGN),
        (_MOVE, 1, 7, 0, 0),
        (_CALL, 0, 0, 0, _SK_RELEASE),
        "pass",
        (_MOVE_VALUE, 0, 0, 0, _SK_PASS),
        (_EXIT, 0, 0, 0, 0),
    ]
    labels: dict[str, int] = {}
    instructions: list[_Instruction] = []
    for line in lines:
        if isinstance(line, str):
            labels[line] = len(instructions)
        else:
            instructions.append(line)
    code = b""
    for number, (operation, destination, source, offset, value) in enumerate(instructions):
        if isinstance(offset, str):
            offset = labels[offset] - number - 1
        code += struct.pack("=BBhi", operation, source << 4 | destination, offset, value)
    return code


class Listener:
    """The socket, and what hands it its connections; which port each was for is its own `getsockname()`.

    It comes before sockets that listen there themselves. Nothing of it outlives the process.
    """

    def __init__(self, namespace: int) -> None:
        """`namespace` is a descriptor of the network namespace. Raises KataError."""
        with contextlib.ExitStack() as stack:
            self.socket = stack.enter_context(_listen_in(namespace))
            sockets = _bpf("BPF_MAP_CREATE", _BPF_MAP_CREATE, "=5I", _BPF_MAP_TYPE_SOCKMAP, 4, 8, 1, 0)
            with _closing(sockets):
                key, value = _buffer("=I", 0), _buffer("=Q", self.socket.fileno())
                arguments = sockets, ctypes.addressof(key), ctypes.addressof(value), 0
                _bpf("BPF_MAP_UPDATE_ELEM", _BPF_MAP_UPDATE_ELEM, "=I4xQQQ", *arguments)
                program = _load(_program(sockets))
            with _closing(program):
                arguments = program, namespace, _BPF_SK_LOOKUP, 0
                self._link = _bpf("BPF_LINK_CREATE", _BPF_LINK_CREATE, "=4I", *arguments)
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


def _load(code: bytes) -> int:
    log = ctypes.create_string_buffer(_LOG_BYTES)
    instructions, license_ = ctypes.create_string_buffer(code), ctypes.create_string_buffer(b"Apache-2.0")
    arguments = (
        *(_BPF_PROG_TYPE_SK_LOOKUP, len(code) // 8),
        *(ctypes.addressof(instructions), ctypes.addressof(license_)),
        *(1, _LOG_BYTES, ctypes.addressof(log)),
        *(0, 0, _NAME, 0, _BPF_SK_LOOKUP),
    )
    try:
        return _bpf("BPF_PROG_LOAD", _BPF_PROG_LOAD, "=IIQQIIQII16sII", *arguments)
    except KataError as error:
        said = log.value.decode(errors="replace").strip()
        raise KataError(f"{error}: {said}" if said else str(error)) from error


def _bpf(name: str, command: int, layout: str, *arguments: int | bytes) -> int:
    attributes = ctypes.create_string_buffer(struct.pack(layout, *arguments), _ATTRIBUTES_BYTES)
    number = _SYS_BPF.get(platform.machine())
    if number is None:
        raise KataError(f"bpf({name}): its number on {platform.machine()} is not known")
    result = ctypes.CDLL(None, use_errno=True).syscall(number, command, attributes, _ATTRIBUTES_BYTES)
    if result < 0:
        raise KataError(f"bpf({name}): {os.strerror(ctypes.get_errno())}")
    return int(result)


def _buffer(layout: str, value: int) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(struct.pack(layout, value))


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(fd)
