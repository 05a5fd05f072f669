"""Mount options as OCI and Kata write them, and the mounts of this machine."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable

from guest.agent import linux

_FLAGS = {
    "ro": linux.MS_RDONLY,
    "nosuid": linux.MS_NOSUID,
    "nodev": linux.MS_NODEV,
    "noexec": linux.MS_NOEXEC,
    "sync": linux.MS_SYNCHRONOUS,
    "remount": linux.MS_REMOUNT,
    "mand": linux.MS_MANDLOCK,
    "dirsync": linux.MS_DIRSYNC,
    "noatime": linux.MS_NOATIME,
    "nodiratime": linux.MS_NODIRATIME,
    "bind": linux.MS_BIND,
    "rbind": linux.MS_BIND | linux.MS_REC,
    "silent": linux.MS_SILENT,
    "relatime": linux.MS_RELATIME,
    "strictatime": linux.MS_STRICTATIME,
    "lazytime": linux.MS_LAZYTIME,
}
_CLEARING_FLAGS = {
    "rw": linux.MS_RDONLY,
    "suid": linux.MS_NOSUID,
    "dev": linux.MS_NODEV,
    "exec": linux.MS_NOEXEC,
    "async": linux.MS_SYNCHRONOUS,
    "nomand": linux.MS_MANDLOCK,
    "atime": linux.MS_NOATIME,
    "diratime": linux.MS_NODIRATIME,
    "loud": linux.MS_SILENT,
    "norelatime": linux.MS_RELATIME,
    "nostrictatime": linux.MS_STRICTATIME,
    "nolazytime": linux.MS_LAZYTIME,
    "defaults": 0,
}
_PROPAGATION = {
    "private": linux.MS_PRIVATE,
    "rprivate": linux.MS_PRIVATE | linux.MS_REC,
    "slave": linux.MS_SLAVE,
    "rslave": linux.MS_SLAVE | linux.MS_REC,
    "shared": linux.MS_SHARED,
    "rshared": linux.MS_SHARED | linux.MS_REC,
    "unbindable": linux.MS_UNBINDABLE,
    "runbindable": linux.MS_UNBINDABLE | linux.MS_REC,
}


_LATE_MODULES = {
    ("9p", errno.EINVAL): "9pnet_virtio",
    ("9p", errno.EPROTONOSUPPORT): "9pnet_virtio",
}
"""What a file system says when a module that it needs besides its own is not there."""


def parse_options(options: Iterable[str]) -> tuple[int, str, list[int]]:
    """Flags of mount(2), its data string, and the propagation changes that need a call of their own.

    Kata's own markers (io.katacontainers.*) are no file system's options and are left out.
    """
    flags, data, propagation = 0, [], []
    for option in options:
        if option in _FLAGS:
            flags |= _FLAGS[option]
        elif option in _CLEARING_FLAGS:
            flags &= ~_CLEARING_FLAGS[option]
        elif option in _PROPAGATION:
            propagation.append(_PROPAGATION[option])
        elif option and not option.startswith("io.katacontainers."):
            data.append(option)
    return flags, ",".join(data), propagation


def mount(source: str, target: str, fstype: str, options: Iterable[str] = ()) -> None:
    """Mount, making `target` (a file for the bind of a file). Raises OSError naming both."""
    flags, data, propagation = parse_options(options)
    if fstype == "bind":
        flags |= linux.MS_BIND
    if flags & linux.MS_BIND and not stat.S_ISDIR(os.stat(source).st_mode):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "a"):
            pass
    else:
        os.makedirs(target, exist_ok=True)
    try:
        linux.mount(source, target, fstype, flags, data)
    except OSError as error:
        module = fstype if error.errno == errno.ENODEV else _LATE_MODULES.get((fstype, error.errno or 0))
        if module is None:
            raise
        # The kernel has sent modprobe for the file system, which takes a module for loaded that another is
        # still loading. The kernel itself waits for the other.
        from guest.agent.modules import load_module

        load_module(module)
        linux.mount(source, target, fstype, flags, data)
    if flags & linux.MS_BIND and flags & ~(linux.MS_BIND | linux.MS_REC):
        # A bind takes no other flags until it is remounted.
        linux.mount(source, target, fstype, (flags & ~linux.MS_REC) | linux.MS_REMOUNT)
    for change in propagation:
        linux.mount("none", target, "", change)


def mounts() -> list[tuple[str, str, str]]:
    """(mount point, root within the file system, fstype) of every mount, oldest first."""
    result = []
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            # Names are bytes, with octal escapes for what would end them.
            fields = os.fsdecode(line.rstrip(b"\n")).split(" ")
            point = fields[4]
            if "\\" in point:
                for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
                    point = point.replace(code, char)
            result.append((point, fields[3], fields[fields.index("-", 6) + 1]))
    return result


def is_mounted(path: str) -> bool:
    path = path.rstrip("/") or "/"
    return any(point == path for point, _, _ in mounts())
