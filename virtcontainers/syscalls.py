"""System calls that Python has not, and the oldest of today's libcs neither: by their numbers.

Those of 2019 on are the same on all architectures.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

_OPEN_TREE, _MOVE_MOUNT, _OPENAT2, _MOUNT_SETATTR = 428, 429, 437, 442

_AT_EMPTY_PATH = 0x1000  # <fcntl.h>
_AT_RECURSIVE = 0x8000
_OPEN_TREE_CLONE = 1  # <linux/mount.h>
_MOVE_MOUNT_EMPTY_PATHS = 0x4 | 0x40
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR_NOSYMFOLLOW = 0x200000

RESOLVE_NO_XDEV = 0x1  # <linux/openat2.h>
RESOLVE_NO_MAGICLINKS = 0x2
RESOLVE_NO_SYMLINKS = 0x4
RESOLVE_BENEATH = 0x8
RESOLVE_IN_ROOT = 0x10

_RACES = 100
"""How often somebody may rename meanwhile; each time the kernel looks whether the way still leads inside."""


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def call(number: int, *arguments: object) -> int:
    """syscall(2). Raises OSError."""
    result: int = _libc().syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def openat2(directory: int, path: str, flags: int, resolve: int) -> int:
    """A new descriptor, close-on-exec. Raises OSError: EXDEV or ELOOP for a path that `resolve` forbids."""
    how = (ctypes.c_uint64 * 3)(flags | os.O_CLOEXEC, 0, resolve)
    arguments = (directory, os.fsencode(path), ctypes.byref(how), ctypes.c_size_t(ctypes.sizeof(how)))
    for _ in range(_RACES):
        try:
            return call(_OPENAT2, *arguments)
        except BlockingIOError:
            pass
    return call(_OPENAT2, *arguments)


@contextmanager
def closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def opened(path: Path, flags: int = os.O_PATH) -> Iterator[int]:
    with closing(os.open(path, flags | os.O_CLOEXEC)) as fd:
        yield fd


def fd_path(fd: int) -> Path:
    """For calls that want a path: to what `fd` is, wherever that is by now."""
    return Path(f"/proc/self/fd/{fd}")


@contextmanager
def mount_tree(source: int, *, recursive: bool) -> Iterator[int]:
    """A copy of what is mounted at `source`, in no place yet; it goes unless it is moved to one."""
    flags = _OPEN_TREE_CLONE | _AT_EMPTY_PATH | os.O_CLOEXEC | (_AT_RECURSIVE if recursive else 0)
    with closing(call(_OPEN_TREE, source, b"", ctypes.c_uint(flags))) as tree:
        yield tree


def set_attributes(tree: int, attributes: int, propagation: int) -> None:
    """MOUNT_ATTR_* to set and the MS_* of its propagation, of all mounts in `tree`. Needs Linux 5.12, or 5.14
    for MOUNT_ATTR_NOSYMFOLLOW."""
    data = (ctypes.c_uint64 * 4)(attributes, 0, propagation, 0)
    flags = ctypes.c_uint(_AT_EMPTY_PATH | _AT_RECURSIVE)
    call(_MOUNT_SETATTR, tree, b"", flags, ctypes.byref(data), ctypes.c_size_t(ctypes.sizeof(data)))


def move_mount(tree: int, target: int) -> None:
    """Mount it at `target`, which is open."""
    call(_MOVE_MOUNT, tree, b"", target, b"", ctypes.c_uint(_MOVE_MOUNT_EMPTY_PATHS))
