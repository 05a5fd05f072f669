"""System calls that Python 3.11 has no function for. All raise OSError."""

from __future__ import annotations

import ctypes
import os

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_SYNCHRONOUS = 0x10
MS_REMOUNT = 0x20
MS_MANDLOCK = 0x40
MS_DIRSYNC = 0x80
MS_NOATIME = 0x400
MS_NODIRATIME = 0x800
MS_BIND = 0x1000
MS_MOVE = 0x2000
MS_REC = 0x4000
MS_SILENT = 0x8000
MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MS_RELATIME = 1 << 21
MS_STRICTATIME = 1 << 24
MS_LAZYTIME = 1 << 25

MNT_DETACH = 2
CLONE_NEWPID = 0x20000000

_PR_SET_CHILD_SUBREAPER = 36
_RB_POWER_OFF = 0x4321FEDC
_MODULE_INIT_COMPRESSED_FILE = 4

_SYS_FINIT_MODULE = {"x86_64": 313, "aarch64": 273}

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, *names: str) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), *names[:1], *((None, names[1]) if len(names) > 1 else ()))
    return result


def mount(source: str, target: str, fstype: str, flags: int = 0, data: str = "") -> None:
    _checked(
        _libc.mount(
            os.fsencode(source),
            os.fsencode(target),
            fstype.encode(),
            ctypes.c_ulong(flags),
            os.fsencode(data) if data else None,
        ),
        source,
        target,
    )


def umount(target: str, flags: int = 0) -> None:
    _checked(_libc.umount2(os.fsencode(target), flags), target)


def unshare(flags: int) -> None:
    _checked(_libc.unshare(flags))


def setns(fd: int, kind: int) -> None:
    _checked(_libc.setns(fd, kind))


def set_child_subreaper() -> None:
    """Orphans of children become ours, as they do without asking when we are PID 1."""
    _checked(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))


def finit_module(path: str, parameters: str = "") -> None:
    """Load one module file; those it depends on must be loaded already."""
    flags = 0 if path.endswith(".ko") else _MODULE_INIT_COMPRESSED_FILE
    number = _SYS_FINIT_MODULE[os.uname().machine]
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _checked(_libc.syscall(number, fd, parameters.encode(), flags), path)
    finally:
        os.close(fd)


def swapon(path: str) -> None:
    _checked(_libc.swapon(os.fsencode(path), 0), path)


def power_off() -> None:
    """Write everything back and switch the machine off; does not return when we are PID 1."""
    os.sync()
    _checked(_libc.reboot(ctypes.c_int(_RB_POWER_OFF)))
