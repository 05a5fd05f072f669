"""Which disk or image file is meant, and whether a machine may have it."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from virtcontainers.config import RootFs
from virtcontainers.errors import FailedPreconditionError, InvalidArgumentError
from virtcontainers.hypervisor.hotplug_block import BlockDrive
from virtcontainers.syscalls import fd_path

_SYS_DEV_BLOCK = Path("/sys/dev/block")
_LOOP = "loop"

Key = tuple[str, int, int]
"""The same for the same disk or file, whatever its path."""


@dataclass(frozen=True, kw_only=True)
class DeviceInfo:
    """A block device, or a file that is the raw image of one."""

    path: Path
    readonly: bool = False
    has_filesystem: bool = False
    """The guest mounts it: nobody else may at the same time."""


@dataclass(frozen=True, kw_only=True)
class BlockRoot:
    """A container's root that is a block device: the guest mounts it, and the host does not."""

    device: DeviceInfo
    fstype: str
    options: tuple[str, ...]


def block_root(rootfs: RootFs) -> BlockRoot | None:
    """What snapshotters with block devices give: one mount, of a device (devmapper) or, by the option
    `loop`, of an image file (blockfile). None for any other root."""
    if len(rootfs.mounts) != 1 or rootfs.mounts[0].target:
        return None
    (mount,) = rootfs.mounts
    path = Path(mount.source)
    try:
        mode = path.stat().st_mode
    except OSError:
        return None
    if not stat.S_ISBLK(mode) and not (stat.S_ISREG(mode) and _LOOP in mount.options):
        return None
    # As in Kata: a snapshot of an xfs has the same UUID as its parent, which may be mounted, too.
    options = ["nouuid"] if mount.type == "xfs" and "nouuid" not in mount.options else []
    options += [option for option in mount.options if option != _LOOP]
    readonly = "ro" in options or is_readonly(path)
    device = DeviceInfo(path=path, readonly=readonly, has_filesystem=True)
    return BlockRoot(device=device, fstype=mount.type, options=tuple(options))


def host_path(major: int, minor: int) -> Path:
    """Where the host has the block device of these numbers. Raises InvalidArgumentError.

    The path in a container's spec is the container's, and may be another's on the host.
    """
    uevent = _SYS_DEV_BLOCK / f"{major}:{minor}" / "uevent"
    try:
        words = dict(line.partition("=")[::2] for line in uevent.read_text().splitlines())
    except OSError:
        raise InvalidArgumentError(f"the host has no block device {major}:{minor}") from None
    return Path("/dev", words.get("DEVNAME", f"block/{major}:{minor}"))


def host_device(entry: Mapping[str, Any], rules: Sequence[Mapping[str, Any]]) -> DeviceInfo:
    """The block device of an entry of a spec's linux.devices; read-only when the last rule for it, of
    linux.resources.devices, allows no writing. Raises InvalidArgumentError."""
    major, minor = entry.get("major", -1), entry.get("minor", -1)
    path = host_path(major, minor)
    readonly = is_readonly(path)
    for rule in rules:
        if rule.get("type") == "b" and (rule.get("major"), rule.get("minor")) == (major, minor):
            readonly = is_readonly(path) or "w" not in (rule.get("access") or "rwm")
    return DeviceInfo(path=path, readonly=readonly)


def is_readonly(path: Path) -> bool:
    """Whether the host itself has the block device read-only."""
    try:
        kind, major, minor = key_of(path)
        return kind == "b" and (_SYS_DEV_BLOCK / f"{major}:{minor}" / "ro").read_text().strip() == "1"
    except (OSError, InvalidArgumentError):
        return False


def is_block_device(path: Path) -> bool:
    try:
        return stat.S_ISBLK(path.stat().st_mode)
    except OSError:
        return False


def key_of(path: Path) -> Key:
    """Raises InvalidArgumentError."""
    try:
        found = path.stat()
    except OSError as error:
        raise InvalidArgumentError(f"block device {path}: {error.strerror}") from error
    return _key(found)


def _key(found: os.stat_result) -> Key:
    if stat.S_ISBLK(found.st_mode):
        return "b", os.major(found.st_rdev), os.minor(found.st_rdev)
    return "f", found.st_dev, found.st_ino


@contextlib.contextmanager
def opened(device: DeviceInfo) -> Iterator[tuple[Key, BlockDrive]]:
    """The device for QEMU, and what tells it from others.

    Raises FailedPreconditionError for one that the host itself uses: mounted, swapped to, or a part of
    another device, or any partition of it. A guest and a host that both write to a disk destroy what is on
    it; the host's own disks are never given away, not even to a privileged container that lists them all.
    """
    path = device.path
    flags = (os.O_RDONLY if device.readonly else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        is_device = stat.S_ISBLK(path.stat().st_mode)
        # Of a block device: the kernel's own test for all of that, and while it is open nobody can mount it.
        fd = os.open(path, flags | (os.O_EXCL if is_device else 0))
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise FailedPreconditionError(
                f"block device {path} is in use by the host (mounted, swap, or a part of another device), "
                "expected one that nobody uses"
            ) from None
        raise InvalidArgumentError(f"block device {path}: {error.strerror}") from error
    try:
        found = os.fstat(fd)
        if is_device != stat.S_ISBLK(found.st_mode) or not (is_device or stat.S_ISREG(found.st_mode)):
            raise InvalidArgumentError(
                f"block device {path}: found {stat.filemode(found.st_mode)}, expected a device or a file"
            )
        if os.lseek(fd, 0, os.SEEK_END) == 0:
            raise InvalidArgumentError(f"block device {path}: found 0 bytes, expected a disk")
        if is_device and not device.has_filesystem:
            # Several may have a bare device, as processes of the host may.
            shared = os.open(fd_path(fd), flags)
            os.close(fd)
            fd = shared
        os.set_blocking(fd, True)
        yield (
            _key(found),
            BlockDrive(
                fd=fd, is_device=is_device, readonly=device.readonly, share_rw=not device.has_filesystem
            ),
        )
    finally:
        os.close(fd)
