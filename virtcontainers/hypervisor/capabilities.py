"""What a machine's processes may do as root: whoever breaks out of the guest gets no more."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Collection
from enum import IntEnum

_PR_CAPBSET_READ = 23  # <linux/prctl.h>
_PR_CAPBSET_DROP = 24
_LINUX_CAPABILITY_VERSION_3 = 0x20080522  # <linux/capability.h>
_HIGHEST = 63
"""Of the two words that version 3 has for each set."""


class Capability(IntEnum):
    """<linux/capability.h>"""

    CHOWN = 0
    DAC_OVERRIDE = 1
    DAC_READ_SEARCH = 2
    FOWNER = 3
    FSETID = 4
    SETGID = 6
    SETUID = 7
    SETPCAP = 8
    IPC_LOCK = 14
    SYS_CHROOT = 18
    SYS_ADMIN = 21
    SYS_RESOURCE = 24
    MKNOD = 27
    SETFCAP = 31


FILES = frozenset((
    Capability.CHOWN, Capability.DAC_OVERRIDE, Capability.FOWNER, Capability.FSETID, Capability.MKNOD,
    Capability.SETFCAP,
))  # fmt: skip
"""What the root of a container does with its files."""

QEMU = FILES | {Capability.IPC_LOCK}
"""Its 9p server works with files; io_uring and VFIO lock memory. Not SYS_RESOURCE, with which a guest would
fill what a file system keeps for the host's root; not SYS_ADMIN, with which it would set trusted.* xattrs."""

VIRTIOFSD = FILES | {
    # It creates each file as the guest's user.
    *(Capability.SETUID, Capability.SETGID),
    # To build its sandbox. From these it frees itself.
    *(Capability.SYS_ADMIN, Capability.SETPCAP, Capability.SYS_RESOURCE),
}

_Header = ctypes.c_uint32 * 2
_Data = ctypes.c_uint32 * 6


def limiter(kept: Collection[Capability]) -> Callable[[], None]:
    """For a child between fork and exec: what it executes has `kept` of our capabilities and no others.

    Raises OSError there when it is not permitted.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    dropped = [number for number in range(_HIGHEST + 1) if number not in kept]

    def check(result: int) -> None:
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def limit() -> None:
        for number in dropped:
            # -1: the kernel does not know it.
            if libc.prctl(_PR_CAPBSET_READ, number, 0, 0, 0) == 1:
                check(libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0))
        # Root's exec gives what is in the bounding set, and what is inheritable beside it.
        header, data = _Header(_LINUX_CAPABILITY_VERSION_3, 0), _Data()
        check(libc.capget(header, data))
        data[2] = data[5] = 0
        check(libc.capset(header, data))

    return limit
