"""mount(2) and umount2(2), and what is mounted where.

Python has neither call; a process for each would cost more than the mounts themselves, so libc is called.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from virtcontainers import syscalls
from virtcontainers.config import Mount
from virtcontainers.errors import KataError
from virtcontainers.loop import loop_device

# <sys/mount.h>
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_SYNCHRONOUS = 16
MS_REMOUNT = 32
MS_MANDLOCK = 64
MS_DIRSYNC = 128
MS_NOSYMFOLLOW = 256
MS_NOATIME = 1024
MS_NODIRATIME = 2048
MS_BIND = 4096
MS_REC = 16384
MS_SILENT = 32768
MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MS_RELATIME = 1 << 21
MS_STRICTATIME = 1 << 24
MS_LAZYTIME = 1 << 25
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

# Option -> (set?, flag), as mount(8) and containerd's mount package read fstab options.
_FLAGS = {
    "async": (False, MS_SYNCHRONOUS),
    "atime": (False, MS_NOATIME),
    "bind": (True, MS_BIND),
    "defaults": (True, 0),
    "dev": (False, MS_NODEV),
    "diratime": (False, MS_NODIRATIME),
    "dirsync": (True, MS_DIRSYNC),
    "exec": (False, MS_NOEXEC),
    "mand": (True, MS_MANDLOCK),
    "noatime": (True, MS_NOATIME),
    "nodev": (True, MS_NODEV),
    "nodiratime": (True, MS_NODIRATIME),
    "noexec": (True, MS_NOEXEC),
    "nomand": (False, MS_MANDLOCK),
    "norelatime": (False, MS_RELATIME),
    "nostrictatime": (False, MS_STRICTATIME),
    "nosuid": (True, MS_NOSUID),
    "nosymfollow": (True, MS_NOSYMFOLLOW),
    "rbind": (True, MS_BIND | MS_REC),
    "relatime": (True, MS_RELATIME),
    "remount": (True, MS_REMOUNT),
    "ro": (True, MS_RDONLY),
    "rw": (False, MS_RDONLY),
    "strictatime": (True, MS_STRICTATIME),
    "suid": (False, MS_NOSUID),
    "sync": (True, MS_SYNCHRONOUS),
}
_PROPAGATION = {
    "private": MS_PRIVATE,
    "rprivate": MS_PRIVATE | MS_REC,
    "shared": MS_SHARED,
    "rshared": MS_SHARED | MS_REC,
    "slave": MS_SLAVE,
    "rslave": MS_SLAVE | MS_REC,
    "unbindable": MS_UNBINDABLE,
    "runbindable": MS_UNBINDABLE | MS_REC,
}
# What a remount of a bind has to repeat, or the kernel refuses to drop a locked flag: statvfs f_flag -> MS_*.
_STATVFS_FLAGS = {
    os.ST_RDONLY: MS_RDONLY,
    os.ST_NOSUID: MS_NOSUID,
    os.ST_NODEV: MS_NODEV,
    os.ST_NOEXEC: MS_NOEXEC,
    os.ST_NOATIME: MS_NOATIME,
    os.ST_NODIRATIME: MS_NODIRATIME,
    os.ST_RELATIME: MS_RELATIME,
}


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call_mount(source: str, target: str, fstype: str, flags: int, data: str) -> int:
    """Return errno, 0 for success."""
    ok = _libc().mount(
        os.fsencode(source),
        os.fsencode(target),
        os.fsencode(fstype) if fstype else None,
        ctypes.c_ulong(flags),
        os.fsencode(data) if data else None,
    )
    return ctypes.get_errno() if ok != 0 else 0


def _check(error: int, what: str) -> None:
    if error:
        raise KataError(f"{what}: {os.strerror(error)}")


def mount(
    source: Path | str,
    target: Path,
    fstype: str = "",
    flags: int = 0,
    data: str = "",
    *,
    name: Path | None = None,
) -> None:
    """mount(2). Raises KataError naming source, target (or `name` in its place) and the kernel's reason."""
    error = _call_mount(str(source), str(target), fstype, flags, data)
    kind = fstype or ("bind" if flags & MS_BIND else "propagation")
    _check(error, f"mount {source or 'none'} on {name or target} ({kind}{', ' + data if data else ''})")


def unmount(target: Path) -> None:
    """Detach the topmost mount of `target`, never following a symlink; nothing mounted there is no error.

    Lazy on purpose: a guest that still holds a file open must not keep the pod's mounts on the host.
    """
    if _libc().umount2(os.fsencode(str(target)), MNT_DETACH | UMOUNT_NOFOLLOW) != 0:
        error = ctypes.get_errno()
        if error not in (errno.EINVAL, errno.ENOENT):
            _check(error, f"unmount {target}")


def parse_options(options: Sequence[str]) -> tuple[int, list[int], str]:
    """Split fstab options into (flags, propagation changes to make afterwards, data)."""
    flags, propagation, data = 0, [], []
    for option in options:
        if option in _FLAGS:
            on, flag = _FLAGS[option]
            flags = flags | flag if on else flags & ~flag
        elif option in _PROPAGATION:
            propagation.append(_PROPAGATION[option])
        elif option:
            data.append(option)
    return flags, propagation, ",".join(data)


def mount_all(mounts: Sequence[Mount], root: Path) -> None:
    """Mount containerd's list of mounts on `root`, in order; when one fails, those before it are undone.

    A target is looked up as in the container, with `root` for its root: its symlinks are the image's or a
    guest's.
    Raises KataError with the mount that failed.
    """
    for entry in mounts:
        try:
            _mount_one(entry, root)
        except BaseException:
            unmount_below(root)
            raise


def _mount_one(entry: Mount, root: Path) -> None:
    if "loop" in entry.options:
        options = tuple(option for option in entry.options if option != "loop")
        with loop_device(Path(entry.source), readonly="ro" in options) as device:
            _mount_one(replace(entry, source=str(device), options=options), root)
        return
    flags, propagation, data = parse_options(entry.options)
    fstype = "" if flags & MS_BIND else entry.type
    with _target(root, entry.target, make=True) as target:
        if len(data) >= os.sysconf("SC_PAGE_SIZE") and entry.type == "overlay":
            _mount_long_overlay(entry, target, flags, name=root)
        else:
            mount(entry.source, target, fstype, flags, data, name=root / entry.target.lstrip("/"))
    # Opened anew: what was open is below the mount.
    with _target(root, entry.target) as target:
        # The kernel ignores every flag but MS_REC of a new bind; they take a remount.
        if flags & MS_BIND and flags & ~(MS_BIND | MS_REC):
            _remount_bind(target, flags & ~(MS_BIND | MS_REC))
        for change in propagation:
            mount("", target, flags=change)


@contextlib.contextmanager
def _target(root: Path, below: str, *, make: bool = False) -> Iterator[Path]:
    """The directory `below` in `root`, open: a path to it that leads nowhere else, whatever is renamed."""
    names = [name for name in below.split("/") if name]
    flags, resolve = os.O_PATH | os.O_DIRECTORY, syscalls.RESOLVE_IN_ROOT
    try:
        with contextlib.ExitStack() as stack:
            root_fd = fd = stack.enter_context(syscalls.opened(root, flags))
            for path in itertools.accumulate(names, "{}/{}".format):
                try:
                    child = syscalls.openat2(root_fd, path, flags, resolve)
                except FileNotFoundError:
                    if not make:
                        raise
                    os.mkdir(path.rpartition("/")[2], dir_fd=fd)
                    child = syscalls.openat2(root_fd, path, flags, resolve)
                stack.callback(os.close, child)
                fd = child
            yield syscalls.fd_path(fd)
    except OSError as error:
        raise KataError(f"mount target {below!r} in {root}: {error.strerror}") from error


def _mount_long_overlay(entry: Mount, target: Path, flags: int, *, name: Path) -> None:
    """An image of many layers needs more than the page that mount(2) takes as data: mount from a child whose
    working directory is the layers' common parent, with relative names."""
    lower_option = next(o for o in entry.options if o.startswith("lowerdir="))
    lowers = lower_option.removeprefix("lowerdir=").split(":")
    parent = os.path.commonpath(lowers)
    relative = ":".join(os.path.relpath(lower, parent) for lower in lowers)
    short = replace(
        entry, options=tuple(f"lowerdir={relative}" if o is lower_option else o for o in entry.options)
    )
    _, _, data = parse_options(short.options)
    pid = os.fork()
    if pid == 0:
        try:
            os.chdir(parent)
            os._exit(_call_mount(entry.source, str(target), entry.type, flags, data))
        except BaseException:
            os._exit(errno.EIO)
    _, status = os.waitpid(pid, 0)
    _check(os.waitstatus_to_exitcode(status), f"mount overlay of {len(lowers)} layers on {name}")


def _remount_bind(target: Path, flags: int) -> None:
    current = os.statvfs(target).f_flag
    kept = 0
    for st_flag, ms_flag in _STATVFS_FLAGS.items():
        if current & st_flag:
            kept |= ms_flag
    mount("", target, flags=MS_REMOUNT | MS_BIND | kept | flags)


def bind_mount(
    source: Path,
    target: Path,
    *,
    readonly: bool = False,
    recursive: bool = False,
    slave: bool = False,
    attributes: int = 0,
    guests: GuestsPart | None = None,
) -> None:
    """Bind `source` on `target` (made as file or directory if absent). What is mounted below one of them
    later does not come to the other; with `slave` it does from a source that is shared, without `attributes`.

    Read-only and other `attributes` (MOUNT_ATTR_*) hold for all that is mounted in it, and from the
    beginning, so that its copies at other places have them, too. Somebody hostile may rename below
    `source` meanwhile, and, in its `guests` part, on the way to it, see `open_source`.
    On failure `target` is not mounted; a target made stays. Raises KataError.
    """
    attributes |= syscalls.MOUNT_ATTR_RDONLY if readonly else 0
    with contextlib.ExitStack() as stack:
        try:
            opened = stack.enter_context(open_source(source, guests))
            is_directory = stat.S_ISDIR(os.fstat(opened).st_mode)
        except OSError as error:
            raise KataError(f"bind mount source {source}: {error.strerror}") from error
        try:
            make_mountpoint(target, is_directory=is_directory)
            place = stack.enter_context(syscalls.opened(target, os.O_PATH | os.O_NOFOLLOW))
            tree = stack.enter_context(syscalls.mount_tree(opened, recursive=recursive))
            # Before it has a place: where its parent has copies, it has some from then on, made as it is.
            syscalls.set_attributes(tree, attributes, MS_SLAVE if slave else MS_PRIVATE)
            syscalls.move_mount(tree, place)
        except OSError as error:
            raise KataError(f"bind mount {source} on {target}: {error.strerror}") from error


class GuestsPart(NamedTuple):
    """Where the way to a path enters a folder that a guest may write, and the rest of the way, which may have
    symlinks of the guest's in it."""

    folder: Path
    way: str


@contextlib.contextmanager
def open_source(source: Path, guests: GuestsPart | None) -> Iterator[int]:
    """An O_PATH descriptor. Raises OSError, also for a way that leads out of the guest's folder."""
    if guests is None:
        with syscalls.opened(source) as opened:
            yield opened
        return
    resolve = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_MAGICLINKS
    try:
        with syscalls.opened(guests.folder) as directory:
            opened = syscalls.openat2(directory, guests.way or ".", os.O_PATH, resolve)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; a guest can write in {guests.folder}") from error
    with syscalls.closing(opened):
        yield opened


def make_mountpoint(target: Path, *, is_directory: bool) -> None:
    """Make `target` a directory or an empty file. Raises OSError."""
    if is_directory:
        target.mkdir(parents=True, exist_ok=True, mode=0o750)
    else:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        target.touch(mode=0o600, exist_ok=True)


class MountInfo(NamedTuple):
    """One line of proc_pid_mountinfo(5)."""

    mount_point: Path
    fstype: str
    options: tuple[str, ...]
    """Of the file system, not of this mount of it."""


def mounts_below(path: Path) -> list[Path]:
    """Mount points at or below `path`, in the order they were mounted; one entry per mount."""
    prefix = str(path).rstrip("/")
    points = (entry.mount_point for entry in _mounts())
    return [point for point in points if str(point) == prefix or str(point).startswith(prefix + "/")]


def mounted_at(path: Path) -> MountInfo | None:
    """What is mounted at `path`; None when nothing is."""
    resolved = path.resolve()
    # The last that was mounted there hides the others.
    return ([None, *(entry for entry in _mounts() if entry.mount_point == resolved)])[-1]


def mounted_type(path: Path) -> str:
    """The type of the file system that is mounted at `path`; "" when none is."""
    found = mounted_at(path)
    return found.fstype if found else ""


def _mounts() -> Iterator[MountInfo]:
    # Split as the kernel joined it: a name may have whatever else str.split and str.splitlines split at.
    for line in os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).split("\n")[:-1]:
        left, _, right = line.partition(" - ")
        name = left.split(" ", 5)[4]
        if "\\" in name:
            for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
                name = name.replace(code, char)
        fstype, _source, options = right.split(" ", 2)
        yield MountInfo(Path(name), fstype, tuple(options.split(",")))


def unmount_below(path: Path) -> None:
    """Unmount everything at and below `path`, with all that is mounted in it.

    Only what is mounted outermost is named to the kernel: the way to a mount within another may lead through
    symlinks of a guest's by now.
    """
    while found := mounts_below(path):
        for point in found:
            if not any(other in point.parents for other in found):
                unmount(point)
        if mounts_below(path) == found:
            raise KataError(f"{path}: does not go: still mounted at {', '.join(map(str, found[:3]))}")


def remove_mountpoints(path: Path) -> None:
    """Remove a tree of mount points: directories, and empty files that were bound over.

    Never deletes content, and never enters a mount or a symlink: a file with bytes in it, a mount that is
    still there or anything else ends it with KataError.
    Call after `unmount_below`. A missing path is no error, and neither is another process that does the same.
    """
    left = mounts_below(path)
    if left:
        raise KataError(f"{path} is not removed: still mounted at {', '.join(map(str, left[:3]))}")
    try:
        with syscalls.opened(path.parent) as parent:
            _remove(parent, path.name, path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise KataError(f"{path} is not removed: {error.strerror}") from error


def _remove(parent: int, name: str, path: Path) -> None:
    """Raises OSError, and KataError for what is not to be removed."""
    resolve = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_XDEV
    with contextlib.suppress(FileNotFoundError):
        found = os.stat(name, dir_fd=parent, follow_symlinks=False)
        if not stat.S_ISDIR(found.st_mode):
            if found.st_size or not stat.S_ISREG(found.st_mode):
                raise KataError(f"{path} is not removed: it has content")
            os.unlink(name, dir_fd=parent)
            return
        directory = syscalls.openat2(parent, name, os.O_RDONLY | os.O_DIRECTORY, resolve)
        try:
            for child in os.listdir(directory):  # noqa: PTH208
                _remove(directory, child, path / child)
        finally:
            os.close(directory)
        os.rmdir(name, dir_fd=parent)
