"""Kata's storages: what is mounted in the machine for the sandbox or one container."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import stat
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from agent_client.protocols import agent_pb2, types_pb2
from guest.agent import device, linux
from guest.agent.mount import is_mounted, mount, mounts
from guest.agent.threads import in_thread
from ttrpc import Code, StatusError

if TYPE_CHECKING:
    from guest.agent.watcher import Watcher

log = logging.getLogger(__name__)

_OVERLAY_RW = "io.katacontainers.fs-opt.overlay-rw"
_OVERLAY_CREATE_DIRECTORY = "io.katacontainers.volume.overlayfs.create_directory="
_FS_GID = "fsgid"

_READ_ONLY_TIMEOUT_S = 0.5
_READ_ONLY_POLL_S = 0.01

_VIRTIO_FS_TIMEOUT_S = 10.0
_VIRTIO_FS_POLL_S = 0.01
_VIRTIO_FS_DRIVER = "/sys/bus/virtio/drivers/virtiofs"

_DISKS = (device.DRIVER_BLK, device.DRIVER_BLK_MMIO, device.DRIVER_SCSI)
_MOUNTING = ("9p", "virtio-fs", "overlayfs", "bind")
HANDLERS = (
    *_MOUNTING,
    "ephemeral",
    "local",
    "watchable-bind",
    *_DISKS,
)


class _Entry:
    def __init__(self) -> None:
        self.users = 0
        self.shared = False
        self.mounted = False
        self.is_disk = False
        """A file system of ours alone, which is to be whole when the host takes the disk out."""
        self.is_ready = False
        self.lock = asyncio.Lock()
        """Held while it is mounted or unmounted: who comes meanwhile waits, and mounts it anew."""


class Storages:
    """All storages of the machine, by mount point; one that several containers name is mounted once."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._watcher: Watcher | None = None
        self._huge_pages: dict[str | None, dict[int, int]] = {}
        """Bundle -> size -> how many pages are set aside for it."""

    async def add(self, storages: Iterable[agent_pb2.Storage], bundle: str | None) -> list[str]:
        """Mount, in order, and return the mount points to `release`. On failure none of them stays.

        `bundle` is the directory of the container they are for, if they are for one.
        """
        added: list[str] = []
        try:
            for storage in storages:
                if storage.fstype == "hugetlbfs":
                    self._set_huge_pages_aside(storage, bundle)
                entry = self._entries.setdefault(storage.mount_point, _Entry())
                entry.users += 1
                added.append(storage.mount_point)
                # Two containers that come at once: the second waits for the first's disk.
                async with entry.lock:
                    if not entry.is_ready:
                        entry.shared = storage.shared
                        entry.mounted = entry.mounted or await self._mount(storage, bundle)
                        entry.is_disk = storage.driver in _DISKS and storage.fstype != "bind"
                        if storage.HasField("fs_group"):
                            # Other calls are answered while it looks at every file of a volume.
                            await in_thread(_set_ownership, storage)
                        entry.is_ready = True
        except BaseException:
            await self.release(added, bundle)
            raise
        return added

    async def release(self, mount_points: Iterable[str], bundle: str | None) -> None:
        """Unmount those nobody else uses, the last first; errors are logged."""
        for size in self._huge_pages.pop(bundle, {}):
            # What a file of the pod is still in stays until it goes.
            with contextlib.suppress(OSError):
                self._fit_huge_pages(size)
        for point in reversed(list(mount_points)):
            entry = self._entries[point]
            entry.users -= 1
            # Other containers of the pod may come for a shared one; `release_all` ends it.
            if entry.users > 0 or entry.shared:
                continue
            async with entry.lock:
                if entry.users == 0:
                    await self._unmount(point, entry)
                self._forget(point, entry)

    async def release_all(self) -> None:
        for point, entry in reversed(list(self._entries.items())):
            async with entry.lock:
                await self._unmount(point, entry)
                self._forget(point, entry)

    def _forget(self, point: str, entry: _Entry) -> None:
        """Unless somebody waits to mount it anew, or has done so."""
        if entry.users == 0 and self._entries.get(point) is entry:
            del self._entries[point]

    async def _unmount(self, point: str, entry: _Entry) -> None:
        was_mounted, entry.mounted, entry.is_ready = entry.mounted, False, False
        if self._watcher is not None:
            self._watcher.remove(point)
        if not was_mounted:
            return
        if entry.is_disk:
            await _finish_writing(point)
        try:
            linux.umount(point)
        except OSError as error:
            log.warning("unmount %s: %s; detached", point, error.strerror)
            with contextlib.suppress(OSError):
                linux.umount(point, linux.MNT_DETACH)
        with contextlib.suppress(OSError):
            (os.rmdir if os.path.isdir(point) else os.unlink)(point)

    async def _mount(self, storage: agent_pb2.Storage, bundle: str | None) -> bool:
        """Whether something was mounted that has to be unmounted."""
        source, fstype, options = storage.source, storage.fstype, list(storage.options)
        if storage.driver == "local":
            _make_local(storage.mount_point, options)
            return False
        if storage.driver == "watchable-bind":
            return await self._watch(storage)
        if storage.driver == "ephemeral":
            if fstype == "hugetlbfs":
                # Their number is limited already, and grows with every container that comes.
                options = [f"pagesize={_huge_pages(options)[0]}"]
            group = _option(options, _FS_GID)
            options = [option for option in options if not option.startswith(f"{_FS_GID}=")]
            mount(source, storage.mount_point, fstype, options)
            if group is not None:
                _give_to_group(storage.mount_point, int(group))
            return True
        if storage.driver in _DISKS:
            source = await device.block_device(storage.driver, source)
        elif storage.driver == "overlayfs":
            fstype = "overlay"
            options += self._overlay_options(storage, bundle)
        elif storage.driver not in _MOUNTING:
            raise StatusError(
                Code.INVALID_ARGUMENT,
                f"storage {storage.mount_point}: no handler for driver {storage.driver!r}, "
                f"there are {', '.join(HANDLERS)}",
            )
        if storage.driver == "bind":
            fstype = "bind"
        try:
            if fstype == "virtiofs":
                await _mount_virtio_fs(source, storage.mount_point, options)
            else:
                mount(source, storage.mount_point, fstype, options)
        except OSError as error:
            raise StatusError(
                Code.INTERNAL,
                f"mount {source} ({fstype}, {','.join(options)}) at {storage.mount_point}: {error.strerror}",
            ) from error
        return True

    async def _watch(self, storage: agent_pb2.Storage) -> bool:
        from guest.agent.watcher import Watcher

        directory = os.path.dirname(storage.mount_point)
        if directory not in self._entries:
            mount("tmpfs", directory, "tmpfs", ["nosuid", "nodev", "mode=0755"])
            self._entries[directory] = entry = _Entry()
            entry.shared = entry.mounted = True
        if self._watcher is None:
            self._watcher = Watcher()
        if await self._watcher.add(storage.source, storage.mount_point):
            return False
        mount(storage.source, storage.mount_point, "bind", [])
        return True

    def _set_huge_pages_aside(self, storage: agent_pb2.Storage, bundle: str | None) -> None:
        size, count = _huge_pages(storage.options)
        self._huge_pages.setdefault(bundle, {})[size] = count
        got, wanted = self._fit_huge_pages(size)
        if got < wanted:
            raise StatusError(
                Code.RESOURCE_EXHAUSTED, f"{got} of {wanted} huge pages of {size} bytes are free"
            )

    def _fit_huge_pages(self, size: int) -> tuple[int, int]:
        """How many there are, and how many there should be."""
        wanted = sum(pages.get(size, 0) for pages in self._huge_pages.values())
        path = f"/sys/kernel/mm/hugepages/hugepages-{size // 1024}kB/nr_hugepages"
        with open(path, "w") as file:
            file.write(str(wanted))
        with open(path) as file:
            return int(file.read()), wanted

    @staticmethod
    def _overlay_options(storage: agent_pb2.Storage, bundle: str | None) -> list[str]:
        for option in storage.driver_options:
            if option.startswith(_OVERLAY_CREATE_DIRECTORY):
                os.makedirs(option.removeprefix(_OVERLAY_CREATE_DIRECTORY), exist_ok=True)
        if _OVERLAY_RW not in storage.options:
            return []
        if bundle is None:
            raise StatusError(
                Code.INVALID_ARGUMENT, f"storage {storage.mount_point}: a writable overlay needs a container"
            )
        directories = {name: f"{bundle}/{name}" for name in ("upper", "work")}
        for path in directories.values():
            os.makedirs(path, exist_ok=True)
        return [f"{name}dir={path}" for name, path in directories.items()]


async def _finish_writing(point: str) -> None:
    """Have all of a file system on its disk. Unmounting alone does not: containers made meanwhile have a copy
    of the mount in their namespaces, and those that have ended give theirs back a moment later.

    In a thread: what is written is as much as the machine's memory holds."""
    deadline = time.monotonic() + _READ_ONLY_TIMEOUT_S
    while True:
        try:
            await in_thread(linux.mount, "none", point, "", linux.MS_REMOUNT | linux.MS_RDONLY)
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                log.warning("%s does not become read-only: %s", point, error.strerror)
                await in_thread(os.sync)
                return
        await asyncio.sleep(_READ_ONLY_POLL_S)


def disks(storages: Iterable[agent_pb2.Storage]) -> list[os.stat_result]:
    """The device nodes among what is mounted: disks that a container is given as they are."""
    return [
        os.stat(storage.mount_point)
        for storage in storages
        if storage.driver in _DISKS and storage.fstype == "bind"
    ]


async def _mount_virtio_fs(tag: str, mount_point: str, options: list[str]) -> None:
    """Wait for the device: a clone's is plugged in when the clone already runs. Raises OSError, and
    StatusError (DEADLINE_EXCEEDED) that names the tag."""
    deadline = asyncio.get_running_loop().time() + _VIRTIO_FS_TIMEOUT_S
    while True:
        # Looked for first: one that comes after a look is not to blame for the mount that fails.
        is_there = _has_virtio_fs()
        try:
            mount(tag, mount_point, "virtiofs", options)
            return
        except OSError as error:
            # What a tag is answered that no device has, and options that are refused.
            if error.errno != errno.EINVAL or is_there:
                raise
        if asyncio.get_running_loop().time() > deadline:
            raise StatusError(
                Code.DEADLINE_EXCEEDED,
                f"mount {tag} (virtiofs) at {mount_point}: "
                f"no virtio-fs device after {_VIRTIO_FS_TIMEOUT_S:g} s",
            )
        await asyncio.sleep(_VIRTIO_FS_POLL_S)


def _has_virtio_fs() -> bool:
    """Whether a device is ready; the driver's directory names its devices."""
    try:
        return any(name.startswith("virtio") for name in os.listdir(_VIRTIO_FS_DRIVER))
    except FileNotFoundError:
        return False


def remount_ephemeral(storages: Iterable[agent_pb2.Storage]) -> None:
    """Give mounted tmpfs new options, above all a new size."""
    for storage in storages:
        if storage.driver == "ephemeral" and is_mounted(storage.mount_point):
            options = [option for option in storage.options if not option.startswith(f"{_FS_GID}=")]
            mount(storage.source, storage.mount_point, storage.fstype, [*options, "remount"])


def refresh_shares() -> None:
    """Have the file server forget what is gone: looking is enough (Kata's RemoveStaleVirtiofsShareMounts)."""
    for point, _, fstype in mounts():
        if fstype in ("virtiofs", "9p"):
            with contextlib.suppress(OSError):
                os.stat(point)


def _option(options: Iterable[str], name: str) -> str | None:
    for option in options:
        key, _, value = option.partition("=")
        if key == name:
            return value
    return None


def _make_local(path: str, options: list[str]) -> None:
    os.makedirs(path, exist_ok=True)
    mode = _option(options, "mode")
    if mode is not None:
        os.chmod(path, int(mode, 8))
    group = _option(options, _FS_GID)
    if group is not None:
        _give_to_group(path, int(group))


def _give_to_group(path: str, group: int) -> None:
    os.chown(path, -1, group)
    os.chmod(path, stat.S_IMODE(os.stat(path).st_mode) | stat.S_ISGID)


def _huge_pages(options: Iterable[str]) -> tuple[int, int]:
    """Size and number. Options as Kata sends them: "pagesize=2097152,size=524288000", in bytes."""
    flat = [part for option in options for part in option.split(",")]
    page_size, size = _option(flat, "pagesize"), _option(flat, "size")
    if not page_size or not size:
        raise StatusError(Code.INVALID_ARGUMENT, f"hugetlbfs needs pagesize= and size=, found {flat}")
    return int(page_size), int(size) // int(page_size)


def _set_ownership(storage: agent_pb2.Storage) -> None:
    """fsGroup of Kubernetes: the whole volume is given to the group, readable for it and setgid."""
    group = storage.fs_group.group_id
    bits = 0o440 if "ro" in storage.options else 0o660
    root = os.stat(storage.mount_point)
    wanted = bits | 0o110 | stat.S_ISGID
    if (
        storage.fs_group.group_change_policy == types_pb2.FSGroupChangePolicy.OnRootMismatch
        and root.st_gid == group
        and root.st_mode & wanted == wanted
    ):
        return
    for directory, _, files in os.walk(storage.mount_point):
        for path in (directory, *(os.path.join(directory, name) for name in files)):
            mode = os.lstat(path).st_mode
            if stat.S_ISLNK(mode):
                continue
            os.chown(path, -1, group)
            os.chmod(path, stat.S_IMODE(mode) | bits | (0o110 | stat.S_ISGID if stat.S_ISDIR(mode) else 0))
