"""Cleaning a pod up in a process that did not make it, from what is persisted.

For containerd's `delete` after the shim died.
"""

from __future__ import annotations

import logging
from pathlib import Path

from virtcontainers import direct_volume, mount, persist
from virtcontainers.errors import KataError, NotFoundError
from virtcontainers.fs_share import FilesystemShare

log = logging.getLogger(__name__)


async def cleanup(sandbox_id: str, container_id: str) -> None:
    """Take one container, or with the sandbox's own id the whole pod, off the host; idempotent.

    The pod's machine is ended in both cases, unless a shim that is alive still owns it. Raises KataError,
    after having tried everything, with the first thing that would not go: the pod is then known as before.
    """
    try:
        state = persist.load(sandbox_id)
    except NotFoundError as error:
        log.info("%s", error, extra={"sandbox": sandbox_id})
        state = persist.SandboxState(id=sandbox_id, shim_pid=0)
    failures: list[KataError] = []
    if state.hypervisor and (container_id == sandbox_id or not _is_shim(state.shim_pid, sandbox_id)):
        from virtcontainers.hypervisor.qemu import Qemu

        try:
            await Qemu.cleanup(state.hypervisor)
        except KataError as error:
            failures.append(error)
    if container_id == sandbox_id and state.network:
        from virtcontainers.network import network

        try:
            await network.cleanup(state.network)
        except KataError as error:
            failures.append(error)
    for id_, rootfs in state.rootfs.items():
        if container_id in (id_, sandbox_id):
            try:
                mount.unmount_below(Path(rootfs))
            except KataError as error:
                failures.append(error)
    share = FilesystemShare(sandbox_id)
    try:
        if container_id == sandbox_id:
            share.cleanup()
        else:
            share.unshare_files(container_id)
            share.unshare_container(container_id)
    except KataError as error:
        failures.append(error)
    if container_id == sandbox_id and state.cgroups:
        # Last: one that is busy takes its time, of which containerd leaves little.
        from virtcontainers.resource_control import ResourceController

        for path in reversed(state.cgroups):
            try:
                ResourceController(path).delete()
            except KataError as error:
                failures.append(error)
    if failures:
        raise failures[0]
    if container_id == sandbox_id:
        forget(sandbox_id)


def _is_shim(pid: int, sandbox_id: str) -> bool:
    """Whether the pid is still the pod's shim: pids are used again, by others' shims, too."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"containerd-shim-kata-py" in command and f"-id\0{sandbox_id}\0".encode() in command


def forget(sandbox_id: str) -> None:
    """Remove what is persisted of a sandbox of which nothing else is left. Idempotent."""
    direct_volume.forget_sandbox_id(sandbox_id)
    persist.destroy(sandbox_id)
