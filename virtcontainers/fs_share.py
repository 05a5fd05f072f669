"""What the guest sees of the host: `/run/kata-containers/shared/sandboxes/<sandbox>`, after Kata's layout.

`mounts/` takes the bind mounts, one a container root or volume. `shared/` is what 9p or virtio-fs exports: a
read-only slave of `mounts`, so that the guest can neither make nor rename anything at its top.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from virtcontainers import mount
from virtcontainers.config import GUEST_SHARED_DIR, SHARED_SANDBOXES, RootFs
from virtcontainers.errors import KataError
from virtcontainers.syscalls import (
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_NOSYMFOLLOW,
)

_NAME_LIMIT_BYTES = 255
"""NAME_MAX of <linux/limits.h>."""

_ATTRIBUTES = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC | MOUNT_ATTR_NOSYMFOLLOW
"""Of all that is shared, on the host alone. The guest's root makes symlinks, device nodes and setuid programs
as any root does, and its kernel deals with them. Who serves them here, by these mounts, cannot follow, open
or execute them."""


_LINKS_LIMIT = 40
"""MAXSYMLINKS of <linux/namei.h>: the kernel follows no more either."""

WATCHABLE = "watchable"
_SANDBOX_MOUNTS = "sandbox-mounts"


def shared_name(container_id: str, destination: str) -> str:
    """Kata's name for a container's file in the share, which its policies know; the end of a long one is cut
    to what a file system takes."""
    name = f"{container_id}-{secrets.token_hex(8)}-{Path(destination).name or 'root'}"
    return os.fsencode(name)[:_NAME_LIMIT_BYTES].decode(errors="ignore")


@dataclass(frozen=True)
class FilesystemShare:
    """The share of one sandbox. Everything it does is undone by `cleanup`, in any process."""

    sandbox_id: str

    @property
    def root(self) -> Path:
        return SHARED_SANDBOXES / self.sandbox_id

    @property
    def shared_path(self) -> Path:
        """The directory that the hypervisor exports with the tag kataShared."""
        return self.root / "shared"

    @property
    def _mounts(self) -> Path:
        return self.root / "mounts"

    def prepare(self) -> None:
        """Make the tree and its two mounts. Raises KataError; what was made then is for `cleanup`."""
        for directory in (self.shared_path, self._mounts):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        # The host's / may be private: mounts reach `shared` only from a mount that is itself shared.
        mount.mount(self._mounts, self._mounts, flags=mount.MS_BIND)
        mount.mount("", self._mounts, flags=mount.MS_PRIVATE)
        mount.mount("", self._mounts, flags=mount.MS_SHARED)
        mount.mount(self._mounts, self.shared_path, flags=mount.MS_BIND)
        mount.mount("", self.shared_path, flags=mount.MS_SLAVE)
        mount.mount("", self.shared_path, flags=mount.MS_REMOUNT | mount.MS_BIND | mount.MS_RDONLY)

    def take_over(self, vm_id: str) -> None:
        """Make the share that was prepared for a machine this sandbox's. Raises KataError.

        The mounts in it and whoever exports them go along: nobody needs the name any more.
        """
        source = FilesystemShare(vm_id).root
        try:
            source.rename(self.root)
        except OSError as error:
            raise KataError(f"{source} does not become {self.root}: {error.strerror}") from error

    def share_root_filesystem(self, container_id: str, rootfs: RootFs) -> str:
        """Mount the container's root on the host and share it; returns its path in the guest."""
        rootfs.target.mkdir(parents=True, exist_ok=True)
        mount.mount_all(rootfs.mounts, rootfs.target)
        target = self._mounts / container_id / "rootfs"
        mount.bind_mount(rootfs.target, target, recursive=True, attributes=_ATTRIBUTES)
        return f"{GUEST_SHARED_DIR}{container_id}/rootfs"

    def unshare_root_filesystem(self, container_id: str, rootfs: RootFs) -> None:
        """Idempotent. The target itself is containerd's and stays."""
        try:
            self.unshare_container(container_id)
        finally:
            if rootfs.mounts:
                mount.unmount_below(rootfs.target)

    def unshare_container(self, container_id: str) -> None:
        """Take the container's root back out of the share; idempotent."""
        self._unshare(self._mounts / container_id)

    def share_sandbox_bind_mounts(self, sources: Sequence[str]) -> None:
        """Share `sandbox_bind_mounts`, read-only, as `sandbox-mounts/NAME`: for the guest itself."""
        guests = GuestFolders()
        for source in map(Path, sources):
            name = f"{_SANDBOX_MOUNTS}/{source.resolve().name}"
            self._share(source, name, readonly=True, slave=False, guests=guests)

    def share_file(
        self,
        container_id: str,
        source: Path,
        destination: str,
        *,
        readonly: bool,
        slave: bool = False,
        guests: GuestFolders | None = None,
    ) -> str:
        """Share one bind mount's source, file or directory with all that is mounted in it, with `slave` also
        later; returns its path in the guest. Read-only is enforced here, on the host, not left to the guest,
        for all but what is mounted later. `guests` are for what is shared at one go."""
        name = shared_name(container_id, destination)
        self._share(source, name, readonly=readonly, slave=slave, guests=guests or GuestFolders())
        return GUEST_SHARED_DIR + name

    def _share(self, source: Path, name: str, *, readonly: bool, slave: bool, guests: GuestFolders) -> None:
        target = self._mounts / name
        mount.bind_mount(
            source,
            target,
            readonly=readonly,
            recursive=True,
            slave=slave,
            attributes=_ATTRIBUTES,
            guests=guests.part(source),
        )
        if not readonly and target.is_dir():
            guests.forget()

    def make_watchable_directory(self) -> None:
        """Where the guest mounts its copies of what it watches; it cannot make it, its share is read-only."""
        (self._mounts / WATCHABLE).mkdir(exist_ok=True, mode=0o750)

    def unshare_files(self, container_id: str) -> None:
        """Take back everything of one container that `share_file` gave; idempotent."""
        # Not a bare prefix: "web" must not take what belongs to "web-1".
        ours = re.compile(re.escape(container_id) + r"-[0-9a-f]{16}-")
        with contextlib.suppress(FileNotFoundError):
            for entry in list(self._mounts.iterdir()):
                if ours.match(entry.name):
                    self._unshare(entry)

    def _unshare(self, path: Path) -> None:
        # The copy in `shared` first: an unmount does not reach a copy that has mounts of its own in it.
        mount.unmount_below(self.shared_path / path.name)
        _take_down(path)

    def cleanup(self) -> None:
        """Unmount and remove the whole share; idempotent. Raises KataError rather than delete anything
        through a mount that would not go."""
        mount.unmount_below(self.shared_path)
        mount.unmount_below(self.root)
        mount.remove_mountpoints(self.root)


class GuestFolders:
    """The folders that guests may write, of this pod or of another, as they are when it is first asked."""

    def __init__(self) -> None:
        self._known: set[tuple[int, int]] | None = None

    def forget(self) -> None:
        """There are more, to be found when it is asked again."""
        self._known = None

    def part(self, source: Path) -> mount.GuestsPart | None:
        """Of the way to `source`, from the outermost of the folders on. None: the way, with the host's own
        symlinks on it, comes to none."""
        if self._known is None:
            self._known = set(_writable_by_guests())
        folder, rest = Path("/"), list(source.parts[1:])
        links = 0
        with contextlib.suppress(OSError):
            while _identity(folder) not in self._known:
                if not rest:
                    return None
                name = rest.pop(0)
                if name == "..":
                    folder = folder.parent
                    continue
                below = folder / name
                if not below.is_symlink():
                    folder = below
                    continue
                if (links := links + 1) > _LINKS_LIMIT:
                    return None
                target = below.readlink()
                folder = Path("/") if target.is_absolute() else folder
                rest[:0] = target.parts[1:] if target.is_absolute() else target.parts
            return mount.GuestsPart(folder, "/".join(rest))
        return None


def _writable_by_guests() -> Iterator[tuple[int, int]]:
    for point in mount.mounts_below(SHARED_SANDBOXES):
        # The others are copies of these.
        if point.relative_to(SHARED_SANDBOXES).parts[1:2] == ("mounts",):
            with contextlib.suppress(OSError):
                # A file that the pod's containers share, /etc/hosts, leads nowhere.
                if point.is_dir() and not os.statvfs(point).f_flag & os.ST_RDONLY:
                    yield _identity(point)


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _take_down(path: Path) -> None:
    mount.unmount_below(path)
    mount.remove_mountpoints(path)
