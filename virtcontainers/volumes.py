"""What a container's bind mounts become in the guest.

A file or folder of the host is shared, or copied where nothing is shared. Kubernetes' emptyDirs, which their
path tells, are the machine's. Rules and names are Kata's, of `SetEphemeralStorageType`, `handleLocalStorage`,
`handleEphemeralStorage`, `handleHugepages` and `mountSharedDirMounts` in its Go runtime.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent_client.protocols import agent_pb2
from virtcontainers import mount
from virtcontainers.config import GUEST_SANDBOX_DIR, GUEST_SHARED_DIR, OCISpec, SandboxConfig, SharedFS
from virtcontainers.errors import InvalidArgumentError, KataError
from virtcontainers.fs_share import WATCHABLE, FilesystemShare, GuestFolders, shared_name

if TYPE_CHECKING:
    from virtcontainers.copied_files import CopiedFile

log = logging.getLogger(__name__)

EPHEMERAL, LOCAL, WATCHABLE_BIND = "ephemeral", "local", "watchable-bind"
"""Drivers of Kata's agent."""

_EPHEMERAL_DIR = GUEST_SANDBOX_DIR + "ephemeral/"
_EMPTY_DIR = "kubernetes.io~empty-dir"
_WATCHED = ("kubernetes.io~configmap", "kubernetes.io~secret")
_MAX_WATCHED_FILES = 8
"""Kata's: its agent watches no more than 16, old and new together while an update is under way."""

_UNITS = {"": 0, "k": 10, "m": 20, "g": 30}
_PAGE_SIZE_UNITS = {"KB": 10, "MB": 20, "GB": 30}


class Volumes:
    """The volumes of one container. `guest_mount` fills the rest, which the agent is to be asked for."""

    def __init__(
        self,
        container_id: str,
        spec: OCISpec,
        config: SandboxConfig,
        share: FilesystemShare,
        *,
        local_dir: str,
    ) -> None:
        self.storages: list[agent_pb2.Storage] = []
        self.tmpfs: list[agent_pb2.Storage] = []
        """Those of `storages` that have a size which may be set anew."""
        self.copied: list[CopiedFile] = []
        self._plain: dict[str, str] = {}
        """Mount point of what is watched -> the share it is watched in."""
        self._id = container_id
        self._spec = spec
        self._config = config
        self._share = share
        self._local_dir = local_dir
        self._guests = GuestFolders()

    def guest_mount(self, entry: dict[str, Any]) -> dict[str, Any]:
        """The guest's version of a bind mount. Raises InvalidArgumentError with the mount's destination."""
        destination = entry["destination"]
        guest = {**entry, "type": "bind", "options": _guest_options(entry.get("options") or [])}
        try:
            if is_empty_dir(entry["source"]) and (point := self._machine_volume(Path(entry["source"]))):
                return {**guest, "source": point}
            return {**guest, "source": self._host_volume(entry, destination)}
        except KataError as error:
            raise InvalidArgumentError(f"mount {destination} of container {self._id}: {error}") from error

    def _machine_volume(self, source: Path) -> str | None:
        """The mount point of a volume that is the machine's own; None for one that is the host's."""
        try:
            found = source.stat()
        except OSError as error:
            raise KataError(f"{source}: {error.strerror}") from error
        mounted = mount.mounted_at(source)
        # kubelet gives a volume that has an fsGroup to that group.
        group = [f"fsgid={found.st_gid}"] if found.st_gid else []
        mode = f"mode={stat.S_IMODE(found.st_mode):04o}"
        if mounted and mounted.fstype == "tmpfs":
            size = _size(_option(mounted.options, "size") or "0")
            options = [*([f"size={size}"] if size else []), mode, *group]
            storage = _ephemeral(source, "tmpfs", "tmpfs", options)
            self.tmpfs.append(storage)
        elif mounted and mounted.fstype == "hugetlbfs":
            page_size = _size(_option(mounted.options, "pagesize") or "0")
            options = [f"pagesize={page_size},size={self._huge_pages_limit(page_size)}"]
            storage = _ephemeral(source, "nodev", "hugetlbfs", options)
        elif self._config.disable_guest_empty_dir:
            return None
        else:
            storage = agent_pb2.Storage(
                driver=LOCAL,
                source=LOCAL,
                fstype=LOCAL,
                options=[mode, *group],
                mount_point=f"{self._local_dir}/{source.name}",
                shared=True,
            )
        self.storages.append(storage)
        return storage.mount_point

    def _huge_pages_limit(self, page_size: int) -> int:
        """Bytes in pages of that size that the container may have."""
        resources = self._spec.get("linux", {}).get("resources") or {}
        for entry in resources.get("hugepageLimits") or []:
            number = entry["pageSize"].rstrip("KMGB")
            unit = entry["pageSize"].removeprefix(number)
            if int(number) << _PAGE_SIZE_UNITS.get(unit, 0) == page_size and entry["limit"]:
                return int(entry["limit"])
        raise KataError(
            f"found no limit for huge pages of {page_size} bytes in linux.resources.hugepageLimits, "
            "expected how many the machine has to set aside"
        )

    def _host_volume(self, entry: dict[str, Any], destination: str) -> str:
        """Share or copy it; returns its path in the guest."""
        source, options = Path(entry["source"]), entry.get("options") or []
        readonly = bool({"ro", "rro"} & set(options))
        if self._config.hypervisor.shared_fs is SharedFS.NONE:
            from virtcontainers.copied_files import CopiedFile

            copied = CopiedFile(source, GUEST_SHARED_DIR + shared_name(self._id, destination))
            copied.check(readonly=readonly)
            self.copied.append(copied)
            return copied.guest_path
        if {"shared", "rshared"} & set(options):
            log.warning(
                "mount %s asks for propagation both ways (shared, Bidirectional): what the host mounts below "
                "%s is seen in the container, what the container mounts is not on the host",
                destination,
                source,
                extra={"sandbox": self._config.id, "container": self._id},
            )
        follows_host = bool({"slave", "rslave", "shared", "rshared"} & set(options))
        shared = self._share.share_file(
            self._id, source, destination, readonly=readonly, slave=follows_host, guests=self._guests
        )
        return self._watched(source, shared, options) if _is_watched(source) else shared

    def _watched(self, source: Path, shared: str, options: Sequence[str]) -> str:
        self._share.make_watchable_directory()
        storage = agent_pb2.Storage(
            driver=WATCHABLE_BIND,
            source=shared,
            fstype="bind",
            options=list(options),
            mount_point=f"{GUEST_SHARED_DIR}{WATCHABLE}/{shared.removeprefix(GUEST_SHARED_DIR)}",
        )
        self.storages.append(storage)
        self._plain[storage.mount_point] = shared
        return storage.mount_point

    def fit_agent(self, handlers: Sequence[str], guest_spec: OCISpec) -> None:
        """Do without a driver that the agent does not announce; `guest_spec` is changed."""
        if WATCHABLE_BIND in handlers or not self._plain:
            return
        self.storages[:] = [storage for storage in self.storages if storage.driver != WATCHABLE_BIND]
        for entry in guest_spec["mounts"]:
            entry["source"] = self._plain.get(entry["source"], entry["source"])

    def tmpfs_to_size(self, memory_mib: int, *, limited: bool) -> list[agent_pb2.Storage]:
        """What UpdateEphemeralMounts is to be asked for: volumes without a limit get the machine's whole
        memory, those with one theirs, which Kata's agent takes in this way only."""
        storages = []
        for storage in self.tmpfs:
            size = _option(storage.options, "size")
            if size is None or limited:
                resized = agent_pb2.Storage()
                resized.CopyFrom(storage)
                resized.options[:] = ["remount", f"size={size or f'{memory_mib}M'}"]
                storages.append(resized)
        return storages


def is_empty_dir(source: str) -> bool:
    """Whether the path is that of a Kubernetes emptyDir: .../volumes/kubernetes.io~empty-dir/NAME."""
    return Path(source).parent.name == _EMPTY_DIR


def _is_watched(source: Path) -> bool:
    """Whether what is there changes and is small: a config map or a secret of a few keys."""
    if source.parent.name not in _WATCHED:
        return False
    count = 0
    for directory, folders, files in os.walk(source):
        # A link to a folder is listed with the folders.
        links = [name for name in folders if Path(directory, name).is_symlink()]
        count += len(files) + len(links)
    return 0 < count <= _MAX_WATCHED_FILES


def _ephemeral(source: Path, device: str, fstype: str, options: list[str]) -> agent_pb2.Storage:
    return agent_pb2.Storage(
        driver=EPHEMERAL,
        source=device,
        fstype=fstype,
        options=options,
        mount_point=_EPHEMERAL_DIR + source.name,
        # The pod's: a container that starts again finds what the one before it wrote.
        shared=True,
    )


def _option(options: Sequence[str], name: str) -> str | None:
    return next((o.removeprefix(f"{name}=") for o in options if o.startswith(f"{name}=")), None)


def _size(text: str) -> int:
    """Bytes, of a mount option: the kernel writes "65536k" and "2M"."""
    number = text.rstrip("kKmMgG")
    return int(number) << _UNITS[text.removeprefix(number).lower()]


def _guest_options(options: Sequence[str]) -> list[str]:
    """The share is one mount in the guest: what is to hold for all mounts below it (rro) is the plain option
    there, which an older OCI runtime knows too."""
    return [option[1:] if option in _RECURSIVE else option for option in options]


# fmt: off
_RECURSIVE = frozenset({
    "ratime", "rdev", "rdiratime", "rexec", "rnoatime", "rnodev", "rnodiratime", "rnoexec", "rnorelatime",
    "rnostrictatime", "rnosuid", "rnosymfollow", "rrelatime", "rro", "rrw", "rstrictatime", "rsuid",
    "rsymfollow",
})
# fmt: on
"""Of runtime-spec's config.md#linux-mount-options."""
