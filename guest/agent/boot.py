"""What the kernel leaves to the first process: file systems, modules, the loopback interface."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import struct

from guest.agent.limits import raise_limits
from guest.agent.modules import load_boot_modules
from guest.agent.mount import mount

log = logging.getLogger(__name__)

# The first ones of https://systemd.io/API_FILE_SYSTEMS, with the options of Kata's agent.
_MOUNTS = (
    ("proc", "/proc", "proc", ("nosuid", "nodev", "noexec")),
    ("sysfs", "/sys", "sysfs", ("nosuid", "nodev", "noexec")),
    ("dev", "/dev", "devtmpfs", ("nosuid", "mode=755")),
    ("devpts", "/dev/pts", "devpts", ("nosuid", "noexec", "gid=5", "mode=620", "ptmxmode=666")),
    ("tmpfs", "/dev/shm", "tmpfs", ("nosuid", "nodev", "mode=1777")),
    ("tmpfs", "/run", "tmpfs", ("nosuid", "nodev", "mode=755")),
    ("tmpfs", "/tmp", "tmpfs", ("nosuid", "nodev", "mode=1777")),
    ("cgroup2", "/sys/fs/cgroup", "cgroup2", ("nosuid", "nodev", "noexec", "relatime", "nsdelegate")),
)
_LIMITED_CGROUP = "/sys/fs/cgroup/limited"
_LINKS = (
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
)
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 0x1


def boot() -> None:
    """Make a machine of a kernel. What fails is logged: better an agent to be asked than a dead machine."""
    for source, target, fstype, options in _MOUNTS:
        try:
            mount(source, target, fstype, options)
        except OSError as error:
            # An image may have mounted it before.
            if error.errno != errno.EBUSY:
                log.error("mount %s: %s", target, error.strerror)
    _limit_nobody()
    raise_limits()
    _open_standard_streams()
    for target, path in _LINKS:
        with contextlib.suppress(FileExistsError):
            os.symlink(target, path)
    load_boot_modules()
    try:
        _set_up("lo")
    except OSError as error:
        log.error("loopback: %s", error.strerror)


def _limit_nobody() -> None:
    """Make a cgroup that stays empty, with a CPU limit: with the first of each Linux patches its scheduler
    and its allocator. On more than one vCPU, as when it is the first container's, QEMU 7.2 can hang an
    emulated machine that patches what others execute (once in some 5000 times)."""
    root = os.path.dirname(_LIMITED_CGROUP)
    try:
        with open(f"{root}/cgroup.controllers") as file:
            controllers = [f"+{name}" for name in file.read().split()]
        with open(f"{root}/cgroup.subtree_control", "w") as file:
            file.write(" ".join(controllers))
        os.mkdir(_LIMITED_CGROUP)
        with open(f"{_LIMITED_CGROUP}/cpu.max", "w") as file:
            file.write("100000 100000")
    except OSError as error:
        log.warning("cgroup %s: %s", _LIMITED_CGROUP, error.strerror)


def _open_standard_streams() -> None:
    """An initrd without /dev/console starts us without any; the first files opened must not become them."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            try:
                opened = os.open("/dev/console", os.O_RDWR | os.O_NOCTTY)
            except OSError:
                opened = os.open("/dev/null", os.O_RDWR)
            if opened != fd:
                os.dup2(opened, fd)
                os.close(opened)


def _set_up(interface: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        request = fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack("16sH14x", interface.encode(), 0))
        flags = struct.unpack("16sH14x", request)[1]
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH14x", interface.encode(), flags | _IFF_UP))


def kernel_command_line(path: str = "/proc/cmdline") -> dict[str, str]:
    """Its key=value words, the last of a name; a word without "=" has an empty value."""
    try:
        with open(path) as file:
            words = file.read().split()
    except OSError:
        return {}
    return {key: value for key, _, value in (word.partition("=") for word in words)}
