"""The archive that the kernel unpacks as its first root: cpio, format "newc".

See Documentation/driver-api/early-userspace/buffer-format.rst in the kernel. Entries are written from memory,
so owners, times and device nodes need neither root nor a file system that keeps them: the same entries always
give the same bytes.
"""

from __future__ import annotations

import io
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

_TRAILER = "TRAILER!!!"


@dataclass(frozen=True)
class Entry:
    """One file of the image, owned by root. `mode` carries the file type as in stat(2)."""

    path: str  # absolute
    mode: int
    data: bytes = b""  # a file's content, a symbolic link's target
    device: tuple[int, int] = (0, 0)  # major, minor


def directory(path: str, mode: int = 0o755) -> Entry:
    return Entry(path, stat.S_IFDIR | mode)


def file(path: str, data: bytes, mode: int = 0o644) -> Entry:
    return Entry(path, stat.S_IFREG | mode, data)


def symlink(path: str, target: str) -> Entry:
    return Entry(path, stat.S_IFLNK | 0o777, target.encode())


def character_device(path: str, major: int, minor: int, mode: int = 0o600) -> Entry:
    return Entry(path, stat.S_IFCHR | mode, device=(major, minor))


def pack(entries: Iterable[Entry]) -> bytes:
    """Sorted by path, missing parent directories added; ValueError for a path that occurs twice."""
    wanted: dict[str, Entry] = {}
    for entry in entries:
        if entry.path in wanted:
            raise ValueError(f"{entry.path} is in the image twice")
        wanted[entry.path] = entry
    for path in list(wanted):
        for parent in PurePosixPath(path).parents:
            wanted.setdefault(str(parent), directory(str(parent)))
    wanted.pop("/", None)

    archive = io.BytesIO()
    # In path order a directory comes before what is in it, which the kernel requires.
    for inode, path in enumerate(sorted(wanted), start=1):
        _write(archive, inode, path.removeprefix("/"), wanted[path])
    _write(archive, 0, _TRAILER, Entry("", 0))
    return archive.getvalue()


def _write(archive: io.BytesIO, inode: int, name: str, entry: Entry) -> None:
    encoded = name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(encoded), 0)
    archive.write(b"070701" + b"".join(b"%08X" % field for field in fields) + encoded)
    archive.write(bytes(-archive.tell() % 4))
    archive.write(entry.data)
    archive.write(bytes(-archive.tell() % 4))
