"""Files of guest memory on tmpfs: how much they hold, and their copies.

Most of a small guest's memory is never written, and a file on tmpfs costs nothing where it has a hole.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from functools import cache

PAGE_BYTES = 4096
_CHUNK_BYTES = 4 << 20

_FALLOC_FL_KEEP_SIZE = 0x1  # <linux/falloc.h>
_FALLOC_FL_PUNCH_HOLE = 0x2


def allocated_bytes(fd: int) -> int:
    """What the file costs the host."""
    return os.fstat(fd).st_blocks * 512  # stat(2): always this unit


def data_extents(fd: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of what is not a hole. Raises OSError."""
    size = os.fstat(fd).st_size
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:  # ENXIO: a hole up to the end
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end - start


def copy_extents(source: int, target: int) -> Iterator[int]:
    """Copy what is not a hole into the file `target`, of the same size and empty.

    Yields after each piece of some milliseconds how many bytes it had: others may want to run. Raises
    OSError.
    """
    for start, length in data_extents(source):
        os.lseek(target, start, os.SEEK_SET)
        end = start + length
        while start < end:
            sent = os.sendfile(target, source, start, min(_CHUNK_BYTES, end - start))
            if sent == 0:
                raise OSError(f"the file ends at {start}, expected {end}")
            start += sent
            yield sent


def punch_zeros(fd: int) -> int:
    """Make holes of the pages that are zero; returns how many bytes that freed. Raises OSError.

    Nobody else may write meanwhile.
    """
    before = allocated_bytes(fd)
    zeros = bytes(PAGE_BYTES)
    for start, length in list(data_extents(fd)):
        end = start + length
        for chunk_start in range(start, end, _CHUNK_BYTES):
            chunk = os.pread(fd, min(_CHUNK_BYTES, end - chunk_start), chunk_start)
            hole_start = None
            for offset in range(0, len(chunk), PAGE_BYTES):
                is_zero = chunk[offset : offset + PAGE_BYTES] == zeros
                if is_zero and hole_start is None:
                    hole_start = offset
                elif not is_zero and hole_start is not None:
                    _punch(fd, chunk_start + hole_start, offset - hole_start)
                    hole_start = None
            if hole_start is not None:
                _punch(fd, chunk_start + hole_start, len(chunk) - hole_start)
    return before - allocated_bytes(fd)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _punch(fd: int, offset: int, length: int) -> None:
    mode = _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE
    if _libc().fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
