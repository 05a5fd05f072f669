"""A mounted file system made as large as its disk has become, by the kernel alone: no resize2fs, no
xfs_growfs is needed for that."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import struct

from guest.agent.mount import mounts
from guest.agent.threads import in_thread
from ttrpc import Code, StatusError

_SYS_DEV_BLOCK = "/sys/dev/block"
_SECTOR_BYTES = 512
_TIMEOUT_S = 10.0
_POLL_S = 0.05

# fs/ext4/ext4.h and fs/xfs/libxfs/xfs_fs.h of Linux
_EXT4_IOC_RESIZE_FS = 0x40086610
_XFS_IOC_FSGEOMETRY_V1 = 0x80705864
_XFS_IOC_FSGROWFSDATA = 0x4010586E
_XFS_GEOMETRY_V1_BYTES = 112
_XFS_BLOCK_SIZE_AT = 0
_XFS_MAX_INODES_AT = 28


async def grow(mount_point: str, size: int) -> None:
    """Make it `size` bytes, in whole blocks; a disk that is not as large is waited for.

    Raises StatusError: INVALID_ARGUMENT for another file system than ext4 and xfs, and for a smaller size;
    DEADLINE_EXCEEDED for a disk that stays too small.
    """
    fstypes = [fstype for point, _, fstype in mounts() if point == mount_point]
    if not fstypes or fstypes[-1] not in ("ext4", "xfs"):
        raise StatusError(
            Code.INVALID_ARGUMENT,
            f"{mount_point}: found {fstypes[-1] if fstypes else 'nothing'} mounted, expected ext4 or xfs",
        )
    await _wait_for_size(mount_point, size)
    fd = os.open(mount_point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if fstypes[-1] == "ext4":
            blocks = size // os.fstatvfs(fd).f_frsize
            # It writes for a while.
            await in_thread(fcntl.ioctl, fd, _EXT4_IOC_RESIZE_FS, struct.pack("=Q", blocks))
        else:
            geometry = fcntl.ioctl(fd, _XFS_IOC_FSGEOMETRY_V1, bytes(_XFS_GEOMETRY_V1_BYTES))
            (block_size,) = struct.unpack_from("=I", geometry, _XFS_BLOCK_SIZE_AT)
            (max_inodes,) = struct.unpack_from("=I", geometry, _XFS_MAX_INODES_AT)
            wanted = struct.pack("=QI4x", size // block_size, max_inodes)
            await in_thread(fcntl.ioctl, fd, _XFS_IOC_FSGROWFSDATA, wanted)
    except OSError as error:
        # EINVAL is what the kernel says to a size that is smaller than it was.
        raise StatusError(
            Code.INVALID_ARGUMENT if error.errno == errno.EINVAL else Code.INTERNAL,
            f"{mount_point} does not grow to {size} bytes: {error.strerror}",
        ) from error
    finally:
        os.close(fd)


async def _wait_for_size(mount_point: str, size: int) -> None:
    number = os.stat(mount_point).st_dev
    path = f"{_SYS_DEV_BLOCK}/{os.major(number)}:{os.minor(number)}/size"
    deadline = asyncio.get_running_loop().time() + _TIMEOUT_S
    while True:
        with open(path) as file:
            found = int(file.read()) * _SECTOR_BYTES
        if found >= size:
            return
        if asyncio.get_running_loop().time() > deadline:
            raise StatusError(
                Code.DEADLINE_EXCEEDED,
                f"{mount_point}: the disk has {found} bytes after {_TIMEOUT_S:g} s, expected {size}",
            )
        await asyncio.sleep(_POLL_S)
