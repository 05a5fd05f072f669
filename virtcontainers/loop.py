"""Loop devices, for image files that are mounted on the host: losetup's `--find` in two system calls.

Each goes by itself with its last user, so that whoever unmounts, or dies before it has mounted, leaves none.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from virtcontainers.errors import KataError

# <linux/loop.h>
_LOOP_CONFIGURE = 0x4C0A
_LOOP_CTL_GET_FREE = 0x4C82
_LO_FLAGS_READ_ONLY = 1
_LO_FLAGS_AUTOCLEAR = 4

_CONFIG = struct.Struct("=II 5Q 4I 64s 64s 32s 2Q 8Q")
"""struct loop_config: fd, block size, struct loop_info64, reserved."""

_ATTEMPTS = 64


@contextlib.contextmanager
def loop_device(image: Path, *, readonly: bool) -> Iterator[Path]:
    """A loop device of the file, for as long as this lasts and then as it is mounted. Raises KataError."""
    try:
        backing = os.open(image, (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC)
        try:
            path, fd = _configure(image, backing, readonly=readonly)
        finally:
            os.close(backing)
    except OSError as error:
        raise KataError(f"loop device of {image}: {error.strerror}") from error
    try:
        yield path
    finally:
        os.close(fd)


def _configure(image: Path, backing: int, *, readonly: bool) -> tuple[Path, int]:
    flags = _LO_FLAGS_AUTOCLEAR | (_LO_FLAGS_READ_ONLY if readonly else 0)
    name = os.fsencode(image)[:63]
    config = _CONFIG.pack(backing, 0, *[0] * 5, *[0] * 3, flags, name, b"", b"", *[0] * 10)
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for attempt in range(_ATTEMPTS):
            path = Path(f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}")
            fd = os.open(path, (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC)
            try:
                fcntl.ioctl(fd, _LOOP_CONFIGURE, config)
                return path, fd
            except OSError as error:
                os.close(fd)
                # Somebody else was told of the same free one.
                if error.errno != errno.EBUSY or attempt == _ATTEMPTS - 1:
                    raise
    finally:
        os.close(control)
    raise AssertionError("unreachable")
