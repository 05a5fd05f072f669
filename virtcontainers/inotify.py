"""inotify(7), which Python has no module for."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

# <sys/inotify.h>
_IN_ATTRIB = 0x4
_IN_CLOSE_WRITE = 0x8
_IN_MOVED_FROM = 0x40
_IN_MOVED_TO = 0x80
_IN_CREATE = 0x100
_IN_DELETE = 0x200
_CHANGES = _IN_ATTRIB | _IN_CLOSE_WRITE | _IN_MOVED_FROM | _IN_MOVED_TO | _IN_CREATE | _IN_DELETE

_READ_BYTES = 65536


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


class Inotify:
    """Tells that something has changed, not what: who is told looks for himself."""

    def __init__(self) -> None:
        """Raises OSError: there are fs.inotify.max_user_instances of them."""
        self.fd = _checked(_libc().inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), "inotify_init1")

    def add(self, path: Path) -> None:
        """Watch a file, or a directory and what is directly in it; again is no error. Raises OSError."""
        _checked(_libc().inotify_add_watch(self.fd, os.fsencode(path), _CHANGES), str(path))

    def drain(self) -> None:
        """Forget what has happened until now."""
        try:
            while os.read(self.fd, _READ_BYTES):
                pass
        except BlockingIOError:
            pass

    def close(self) -> None:
        os.close(self.fd)


def _checked(result: int, name: str) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)
    return result
