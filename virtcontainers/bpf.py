"""Small BPF programs, written as instructions and loaded by bpf(2). Numbers and layouts are those of
linux/bpf.h."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Sequence
from enum import IntEnum

from virtcontainers import syscalls
from virtcontainers.errors import KataError

_SYS_BPF = {"x86_64": 321, "aarch64": 280}
_ATTRIBUTES_BYTES = 128
_LOG_BYTES = 16 << 10
_LOAD_LAYOUT = "=IIQQIIQII16sII"
_NAME = b"kata_py"
_INTERRUPTIONS = 5
"""How many are borne: the verifier gives up when a signal is pending."""


class Command(IntEnum):
    BPF_MAP_CREATE = 0
    BPF_MAP_UPDATE_ELEM = 2
    BPF_PROG_LOAD = 5
    BPF_PROG_ATTACH = 8
    BPF_PROG_DETACH = 9
    BPF_LINK_CREATE = 28


Instruction = tuple[int, int, int, int | str, int]
"""Code, destination, source, offset or a label to jump to, immediate value."""

MOVE, MOVE_VALUE, ADD_VALUE, AND_VALUE, SHIFT_RIGHT, OR = 0xBF, 0xB7, 0x07, 0x57, 0x77, 0x4F
LOAD_BYTE, LOAD_WORD, STORE_WORD_VALUE, LOAD_MAP = 0x71, 0x61, 0x62, 0x18
JUMP, JUMP_EQUAL, JUMP_NOT_EQUAL, CALL, EXIT = 0x05, 0x15, 0x55, 0x85, 0x95
PSEUDO_MAP_FD = 1


class BPFError(KataError):
    """The kernel refuses a command."""

    def __init__(self, command: Command, number: int, verifier_log: str = "") -> None:
        text = f"bpf({command.name}): {os.strerror(number)}"
        super().__init__(f"{text}: {verifier_log}" if verifier_log else text)
        self.errno = number
        self.verifier_log = verifier_log
        """What is wrong with the program; "" when it is not that."""


def assemble(lines: Sequence[Instruction | str]) -> bytes:
    """A program of `lines`, among which strings are labels."""
    labels: dict[str, int] = {}
    instructions: list[Instruction] = []
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


def load_program(kind: int, code: bytes, attach_type: int) -> int:
    """A descriptor of the program, close-on-exec. Raises BPFError."""
    try:
        return _load(kind, code, attach_type, None)
    except BPFError as error:
        refused = error
    # Not at once: where the log has no room for all that is said of a good program, it is refused.
    log = ctypes.create_string_buffer(_LOG_BYTES)
    try:
        return _load(kind, code, attach_type, log)
    except BPFError:
        said = log.value.decode(errors="replace").strip()
        raise BPFError(Command.BPF_PROG_LOAD, refused.errno, said) from refused


def _load(kind: int, code: bytes, attach_type: int, log: ctypes.Array[ctypes.c_char] | None) -> int:
    instructions, license_ = ctypes.create_string_buffer(code), ctypes.create_string_buffer(b"Apache-2.0")
    arguments = (
        *(kind, len(code) // 8),
        *(ctypes.addressof(instructions), ctypes.addressof(license_)),
        *((1, _LOG_BYTES, ctypes.addressof(log)) if log is not None else (0, 0, 0)),
        *(0, 0, _NAME, 0, attach_type),
    )
    for _ in range(_INTERRUPTIONS):
        try:
            return syscall(Command.BPF_PROG_LOAD, _LOAD_LAYOUT, *arguments)
        except BPFError as error:
            if error.errno != errno.EAGAIN:
                raise
    return syscall(Command.BPF_PROG_LOAD, _LOAD_LAYOUT, *arguments)


def syscall(command: Command, layout: str, *arguments: int | bytes) -> int:
    """bpf(2) with `arguments` in the `layout` of its union. Raises BPFError."""
    attributes = ctypes.create_string_buffer(struct.pack(layout, *arguments), _ATTRIBUTES_BYTES)
    number = _SYS_BPF.get(os.uname().machine)
    if number is None:
        raise BPFError(command, errno.ENOSYS)
    try:
        return syscalls.call(number, command.value, attributes, _ATTRIBUTES_BYTES)
    except OSError as error:
        raise BPFError(command, error.errno or 0) from None
