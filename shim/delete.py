"""`delete`: containerd cannot reach the shim of a container; take what it left off the host.

It is also called after every ordinary end, when there is nothing: then nothing is imported.
"""

from __future__ import annotations

import os
import time
from select import POLLIN, poll

from shim.main import NAME, Flags
from shim.start import SIGKILL, StartError, answers, leave_out_modules, pod_of
from shim.wire import encode

KILLED = 128 + 9
SIGTERM = 15
SHIM_END_MS = 2000
"""containerd gives the whole of `delete` five seconds."""

_POD_DIRECTORIES = (
    "/run/vc/sbs",
    "/run/vc/vm",
    "/run/kata-containers/shared/sandboxes",
)
"""virtcontainers' places, each with a directory per pod."""


def delete(flags: Flags) -> int:
    """Clean up, then a DeleteResponse on stdout. What fails is raised after everything was tried."""
    bundle = flags.bundle or os.getcwd()
    try:
        sandbox_id = pod_of(bundle) or flags.id
    except StartError as error:
        # A bundle that was never whole: no container can have been made of it.
        os.write(2, f"{error}\n".encode())
        sandbox_id = flags.id
    path = socket_of(bundle)
    shim_is_alive = bool(path) and answers(path)
    pid = 0
    rootfs = f"{bundle}/rootfs"
    # One container of a pod whose shim goes on has been deleted by that, unless its root says otherwise.
    is_deleted = shim_is_alive and sandbox_id != flags.id and not os.path.ismount(rootfs)
    if shim_is_alive and sandbox_id == flags.id:
        # containerd has given it up: nobody would ever end it.
        end_shim(bundle, flags.id)
    if path and (not shim_is_alive or sandbox_id == flags.id):
        # One that answered may have been dying: of a pod that is over, the socket goes in any case.
        try:
            os.unlink(path)
        except OSError:
            pass
    if not is_deleted and any(os.path.lexists(f"{directory}/{sandbox_id}") for directory in _POD_DIRECTORIES):
        leave_out_modules()
        from shim.cleanup import clean_up

        pid = clean_up(sandbox_id, flags.id)
    if os.path.ismount(rootfs):
        from pathlib import Path

        from virtcontainers.mount import unmount_below

        unmount_below(Path(rootfs))
    os.write(1, response(pid))
    return 0


def response(pid: int) -> bytes:
    """containerd.task.v2.DeleteResponse of a process that was killed now."""
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    exited_at = encode(1, seconds) + encode(2, nanoseconds)
    return encode(1, pid) + encode(2, KILLED) + encode(3, exited_at)


def end_shim(bundle: str, sandbox_id: str) -> None:
    """Let the pod's shim end the pod; by force when that takes it too long."""
    from _signal import pidfd_send_signal  # type: ignore[import-not-found] # as signal does, without enum

    try:
        with open(f"{bundle}/shim.pid") as file:
            pid = int(file.read())
        pidfd = os.pidfd_open(pid)
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            command = file.read()
    except (OSError, ValueError):
        return
    # Pids are used again.
    if NAME.encode() not in command or f"-id\0{sandbox_id}\0".encode() not in command:
        return
    for signal in (SIGTERM, SIGKILL):
        try:
            pidfd_send_signal(pidfd, signal)
        except ProcessLookupError:
            return
        end = poll()
        end.register(pidfd, POLLIN)
        if end.poll(SHIM_END_MS):
            return


def socket_of(bundle: str) -> str:
    """Where the pod's shim listens, or did: the other containers of a pod may still have theirs."""
    try:
        with open(f"{bundle}/address") as file:
            return file.read().removeprefix("unix://")
    except OSError:
        return ""
