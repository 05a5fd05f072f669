"""What the builder wants to know of an ELF file: the libraries it needs, and a kernel module's
information."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

_DT_NULL = 0
_DT_NEEDED = 1
_SHT_DYNAMIC = 6


class ElfError(Exception):
    """Not a 64-bit little-endian ELF file, or a library it needs is nowhere."""


def _sections(data: bytes) -> list[tuple[str, int, bytes, int]]:
    """(name, type, content, linked section's number) of each section."""
    if data[:6] != b"\x7fELF\x02\x01":
        raise ElfError("not a 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", data, 0x28)
    entry_size, count, names_index = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQII", data, table + number * entry_size) for number in range(count)]

    def content(number: int) -> bytes:
        _, kind, _, _, offset, size, _, _ = headers[number]
        return b"" if kind == 8 else data[offset : offset + size]  # 8: SHT_NOBITS, nothing in the file

    names = content(names_index) if count else b""
    return [
        (_string(names, name), kind, content(number), link)
        for number, (name, kind, _, _, _, _, link, _) in enumerate(headers)
    ]


def _string(table: bytes, offset: int) -> str:
    return table[offset : table.index(b"\0", offset)].decode()


def needed(data: bytes) -> list[str]:
    """Names of the libraries (DT_NEEDED) in the file's order; none for a static executable."""
    sections = _sections(data)
    libraries = []
    for _, kind, content, link in sections:
        if kind != _SHT_DYNAMIC:
            continue
        strings = sections[link][2]
        for tag, value in struct.iter_unpack("<QQ", content):
            if tag == _DT_NULL:
                break
            if tag == _DT_NEEDED:
                libraries.append(_string(strings, value))
    return libraries


def module_information(data: bytes) -> dict[str, list[str]]:
    """The key=value pairs of a kernel module's .modinfo section, e.g. depends, alias, softdep, name."""
    information: dict[str, list[str]] = {}
    for name, _, content, _ in _sections(data):
        if name == ".modinfo":
            for pair in filter(None, content.split(b"\0")):
                key, _, value = pair.decode(errors="replace").partition("=")
                information.setdefault(key, []).append(value)
    return information


def library_closure(
    programs: Mapping[str, bytes], directories: Iterable[Path], also: Iterable[str] = ()
) -> dict[str, Path]:
    """Every library that the programs (what to call them in an error -> content) need, those in `also`, and
    what these need in turn: by the name under which the dynamic linker will look for it. The first directory
    that has it wins.

    ElfError names the library that is in none of the directories, and who needs it.
    """
    directories = list(directories)
    found: dict[str, Path] = {}
    waiting = [(name, library) for name, data in programs.items() for library in needed(data)]
    waiting += [("the image", library) for library in also]
    while waiting:
        user, library = waiting.pop()
        if library in found:
            continue
        candidates = [directory / library for directory in directories if (directory / library).is_file()]
        if not candidates:
            places = ", ".join(map(str, directories))
            raise ElfError(f"{user} needs {library}, which is in none of {places}")
        found[library] = candidates[0]
        waiting += [(library, other) for other in needed(candidates[0].read_bytes())]
    return dict(sorted(found.items()))
