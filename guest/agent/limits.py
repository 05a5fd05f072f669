"""How many tasks and files a machine may have. The kernel's own numbers are for the little memory that it
booted with, and for its oldest programs."""

from __future__ import annotations

import contextlib
import logging
import os

from guest.agent.cgroup import CGROUP_PARENT

log = logging.getLogger(__name__)

_FILES = 1 << 20
"""Of a process. More than the kernel's default of fs.nr_open nobody can have."""
_SYSCTLS = (("fs/file-max", (1 << 63) - 1), ("kernel/pid_max", 1 << 22))
"""As systemd sets them."""
_BYTES_A_TASK = 128 << 10
"""Linux's own measure, of eight times a task's stack."""
_OUR_TASKS = 256
_OUR_TASKS_A_CPU = 16
"""What containers leave to the agent, to crun, and to the kernel, which has some threads on each CPU."""


def raise_limits() -> None:
    """Of this process, so that containers inherit them, and of the machine."""
    import resource

    try:
        for limit in (resource.RLIMIT_NPROC, resource.RLIMIT_SIGPENDING):
            resource.setrlimit(limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_NOFILE, (_FILES, _FILES))
        for name, value in _SYSCTLS:
            _write(f"/proc/sys/{name}", value)
    except OSError as error:
        log.warning("limits: %s", error)
    fit_to_machine()


def fit_to_machine() -> None:
    """As many tasks as there is memory for, and never fewer than there were."""
    try:
        with open("/proc/meminfo") as file:
            total = int(file.readline().split()[1]) << 10
        with open("/proc/sys/kernel/threads-max") as file:
            most = int(file.read())
        if total // _BYTES_A_TASK > most:
            most = total // _BYTES_A_TASK
            _write("/proc/sys/kernel/threads-max", most)
        containers = f"/sys/fs/cgroup{CGROUP_PARENT}"
        with contextlib.suppress(FileExistsError):
            os.mkdir(containers)
        _write(f"{containers}/pids.max", most - _OUR_TASKS - _OUR_TASKS_A_CPU * (os.cpu_count() or 1))
    except OSError as error:
        log.warning("limits: %s", error)


def _write(path: str, value: int) -> None:
    with open(path, "w") as file:
        file.write(str(value))
