"""ELF files made by hand, as small as the builder's readers allow."""

from __future__ import annotations

import struct
from collections.abc import Sequence


def elf_with_sections(sections: Sequence[tuple[str, int, bytes]]) -> bytes:
    """A relocatable 64-bit file with these sections: name, type, content."""
    named = [("", 0, b""), *sections, (".shstrtab", 3, b"")]
    names = b"".join(name.encode() + b"\0" for name, _, _ in named)
    named[-1] = (".shstrtab", 3, names)
    body = b""
    headers = b""
    name_offset = 0
    for name, kind, content in named:
        headers += struct.pack(
            "<IIQQQQIIQQ", name_offset, kind, 0, 0, 64 + len(body), len(content), 0, 0, 1, 0
        )
        name_offset += len(name) + 1
        body += content
    identification = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = identification + struct.pack(
        "<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, 64 + len(body), 0, 64, 0, 0, 64, len(named), len(named) - 1
    )
    return header + body + headers


def kernel_module(name: str, *, depends: str = "", aliases: Sequence[str] = (), softdep: str = "") -> bytes:
    pairs = [f"name={name}", f"depends={depends}", *(f"alias={alias}" for alias in aliases)]
    if softdep:
        pairs.append(f"softdep={softdep}")
    return elf_with_sections([(".modinfo", 1, b"".join(pair.encode() + b"\0" for pair in pairs))])


def kernel_with_note(name: bytes, kind: int) -> bytes:
    """An executable with one PT_NOTE segment of two notes, the second of them this one."""
    notes = struct.pack("<III", 6, 6, 1) + b"Linux\0\0\0" + b"other\0\0\0"
    notes += struct.pack("<III", len(name), 8, kind) + name + bytes(-len(name) % 4) + bytes(8)
    segment = struct.pack("<IIQQQQQQ", 4, 4, 64 + 56, 0, 0, len(notes), len(notes), 4)
    identification = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = identification + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    return header + segment + notes
