"""Files that the guest has copies of, because nothing is shared with it, kept as they are on the host.

Kata's `FilesystemShare.ShareFile` without a shared file system. What kubelet swaps, the `..data` link of a
config map, is swapped in the guest, too: new files are there before the link that names them changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from virtcontainers.agent import KataAgent
from virtcontainers.errors import KataError, UnavailableError
from virtcontainers.inotify import Inotify

MAX_FILES = 1000
MAX_BYTES = 16 << 20
"""Of one mount: the copies are in the machine's memory. A config map or a secret has at most 1 MiB."""

_KUBERNETES = frozenset(
    f"kubernetes.io~{kind}" for kind in ("configmap", "secret", "projected", "downward-api")
)
_SETTLE_S = 0.1
"""An update is several events; one look is enough for them."""
_RETRY_S = (1.0, 60.0)
_GONE = b"..gone"
"""The agent cannot delete. A link to nothing in the place of what is gone cannot be opened either."""


@dataclass(frozen=True)
class _Entry:
    """What tells a changed file."""

    mode: int
    uid: int
    gid: int
    size: int
    modified_ns: int
    inode: int
    link: bytes = b""


class CopiedFile:
    """One file or folder, its copy in the guest, and what was copied of it."""

    def __init__(self, source: Path, guest_path: str) -> None:
        """`source` may be a link; its end is copied."""
        self.source = source
        self.guest_path = guest_path
        self._copied: dict[str, _Entry] = {}

    def check(self, *, readonly: bool) -> None:
        """Raise KataError unless it is fit to be copied."""
        hint = 'expected {} with shared_fs = "none", which has copies only'
        found = self._look()
        top = found[""].mode
        if stat.S_ISDIR(top) and not readonly and self.source.parent.name not in _KUBERNETES:
            raise KataError(f"{self.source}: found a folder to write to, {hint.format('a read-only one')}")
        for name, entry in found.items():
            if not (stat.S_ISREG(entry.mode) or stat.S_ISDIR(entry.mode) or stat.S_ISLNK(entry.mode)):
                kind = _KINDS.get(stat.S_IFMT(entry.mode), "no file")
                raise KataError(
                    f"{self.source / name}: found {kind}, {hint.format('files, folders and links')}"
                )

    @property
    def folders(self) -> list[Path]:
        """Those in which a change is worth a look. A file that is mounted by itself stays what it was: the
        agent puts a new file in the place of the old one, which the container does not see."""
        top = self.source.resolve()
        return [top / name for name, entry in self._copied.items() if stat.S_ISDIR(entry.mode)]

    async def update(self, agent: KataAgent) -> None:
        """Copy what has changed. Raises KataError; the next call goes on where this one ended."""
        found = await asyncio.to_thread(self._look)
        changed = [name for name, entry in found.items() if self._copied.get(name) != entry]
        for name in sorted(changed, key=lambda name: _rank(name, found[name])):
            entry = found[name]
            await self._send(agent, name, entry, await asyncio.to_thread(self._content, name, entry))
            self._copied[name] = entry
        for name in sorted(self._copied.keys() - found.keys()):
            if name not in self._copied:
                continue  # in a folder that is gone
            old = self._copied[name]
            path = self._guest_path(name)
            await agent.copy_file(path, _GONE, mode=stat.S_IFLNK | 0o777, uid=old.uid, gid=old.gid)
            for gone in [n for n in self._copied if n == name or n.startswith(name + "/")]:
                del self._copied[gone]

    async def _send(self, agent: KataAgent, name: str, entry: _Entry, content: bytes) -> None:
        await agent.copy_file(self._guest_path(name), content, mode=entry.mode, uid=entry.uid, gid=entry.gid)

    def _guest_path(self, name: str) -> str:
        return f"{self.guest_path}/{name}" if name else self.guest_path

    def _content(self, name: str, entry: _Entry) -> bytes:
        if stat.S_ISREG(entry.mode):
            path = self.source.resolve() / name
            try:
                with path.open("rb") as file:
                    return file.read(MAX_BYTES)
            except OSError as error:
                raise KataError(f"{path}: {error.strerror}") from error
        return entry.link

    def _look(self) -> dict[str, _Entry]:
        """Name below the source -> what is there, folders before what is in them; "" is the source itself.
        Raises KataError when it is not there or too much."""
        found: dict[str, _Entry] = {}
        size = 0
        top = self.source.resolve()
        try:
            for name, status in _walk(top):
                link = os.fsencode((top / name).readlink()) if stat.S_ISLNK(status.st_mode) else b""
                size += status.st_size if stat.S_ISREG(status.st_mode) else 0
                found[name] = _Entry(
                    status.st_mode,
                    status.st_uid,
                    status.st_gid,
                    # A folder's change with what is in it, which is looked at itself.
                    *((0, 0) if stat.S_ISDIR(status.st_mode) else (status.st_size, status.st_mtime_ns)),
                    inode=0 if stat.S_ISDIR(status.st_mode) else status.st_ino,
                    link=link,
                )
                if len(found) > MAX_FILES or size > MAX_BYTES:
                    raise KataError(
                        f"{self.source}: found more than {MAX_FILES} files or {MAX_BYTES >> 20} MiB, "
                        'expected less with shared_fs = "none", which has copies only'
                    )
        except OSError as error:
            raise KataError(f"{self.source}: {error.strerror}") from error
        return found


_KINDS = {
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a character device",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}


def _walk(top: Path) -> Iterator[tuple[str, os.stat_result]]:
    """What is gone by the time it is looked at is left out, but for the top."""
    yield "", top.lstat()
    for directory, folders, files in os.walk(top):
        for name in (*folders, *files):
            path = Path(directory, name)
            with contextlib.suppress(FileNotFoundError):
                yield str(path.relative_to(top)), path.lstat()


def _rank(name: str, entry: _Entry) -> tuple[int, str]:
    """Folders, then files, then the link that makes them count, then those that lead through it."""
    if stat.S_ISDIR(entry.mode):
        return 0, name
    if not stat.S_ISLNK(entry.mode):
        return 1, name
    return (2 if Path(name).name == "..data" else 3), name


class FileWatch:
    """Keeps the copies of one container as their sources are. Costs nothing while nothing changes."""

    def __init__(
        self,
        agent: KataAgent,
        files: Sequence[CopiedFile],
        logger: logging.LoggerAdapter[logging.Logger],
    ) -> None:
        self._agent = agent
        self._files = list(files)
        self._log = logger
        self._inotify: Inotify | None = None
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Copy all, and go on watching. Raises KataError."""
        for file in self._files:
            await file.update(self._agent)
        self._files = [file for file in self._files if file.folders]
        if not self._files:
            return
        try:
            self._inotify = Inotify()
            self._watch()
        except OSError as error:
            self._log.warning("changes of copied files are not seen: inotify: %s", error)
            return
        asyncio.get_running_loop().add_reader(self._inotify.fd, self._on_event)
        # What has changed between the copy and the watch.
        self._changed.set()
        self._task = asyncio.create_task(self._run())

    def _on_event(self) -> None:
        assert self._inotify is not None
        self._inotify.drain()
        self._changed.set()

    def _watch(self) -> None:
        assert self._inotify is not None
        for file in self._files:
            for path in file.folders:
                with contextlib.suppress(FileNotFoundError):
                    self._inotify.add(path)

    async def _run(self) -> None:
        retry_s, longest_s = _RETRY_S
        while True:
            await self._changed.wait()
            await asyncio.sleep(_SETTLE_S)
            self._changed.clear()
            failures = [failure for file in self._files if (failure := await self._update(file))]
            if any(isinstance(failure, UnavailableError) for failure in failures):
                return
            try:
                self._watch()
            except OSError as error:
                self._log.warning("some changes of copied files are not seen: inotify: %s", error)
            if not failures:
                retry_s = _RETRY_S[0]
                continue
            self._log.warning("copied files are not as they are on the host: %s", failures[0])
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, longest_s)
            self._changed.set()

    async def _update(self, file: CopiedFile) -> KataError | None:
        before = file.folders
        try:
            await file.update(self._agent)
        except KataError as error:
            # A volume that is taken away before its container is no failure.
            return error if file.source.exists() else None
        if file.folders != before:
            # What came into a new folder before it was watched.
            self._changed.set()
        return None

    async def close(self) -> None:
        """Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        if self._inotify is not None:
            asyncio.get_running_loop().remove_reader(self._inotify.fd)
            self._inotify.close()
            self._inotify = None
