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
from virtcontainers.errors import DeadlineExceededError, KataError, UnavailableError
from virtcontainers.fs_share import GuestFolders
from virtcontainers.inotify import Inotify
from virtcontainers.mount import open_source
from virtcontainers.syscalls import RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, closing, fd_path, openat2

MAX_FILES = 1000
MAX_BYTES = 16 << 20
"""Of one mount: the copies are in the machine's memory. A config map or a secret has at most 1 MiB."""

_KUBERNETES = frozenset(
    f"kubernetes.io~{kind}" for kind in ("configmap", "secret", "projected", "downward-api")
)
_READ = os.O_RDONLY | os.O_NONBLOCK
"""What is a FIFO by now is no reason to wait."""
_SETTLE_S = 0.1
"""An update is several events; one look is enough for them."""
_RETRY_S = (1.0, 60.0)
_LOOKS = 5
"""Another pod's guest may change what is there, and without end."""
_FIRST_COPIES = 3
"""What is exchanged while it is copied is whole in the next copy."""
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
        with self._opened() as opened:
            found = self._look(opened)
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
    def folders(self) -> list[str]:
        """Names of those in which a change is worth a look. A file that is mounted by itself stays what it
        was: the agent puts a new file in the place of the old one, which the container does not see."""
        return [name for name, entry in self._copied.items() if stat.S_ISDIR(entry.mode)]

    def watch(self, inotify: Inotify) -> None:
        """What has gone is no error. Raises OSError."""
        with contextlib.suppress(KataError), self._opened() as top:
            for name in self.folders:
                with (
                    contextlib.suppress(FileNotFoundError),
                    closing(_open_below(top, name, os.O_PATH | os.O_DIRECTORY)) as folder,
                ):
                    inotify.add(fd_path(folder))

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """Raises KataError."""
        with contextlib.ExitStack() as stack:
            try:
                top = stack.enter_context(open_source(self.source, GuestFolders().part(self.source)))
            except OSError as error:
                raise KataError(f"{self.source}: {error.strerror}") from error
            yield top

    async def update(self, agent: KataAgent) -> None:
        """Copy what has changed. Raises KataError; the next call goes on where this one ended."""
        with self._opened() as top:
            await self._copy_changed(agent, top)

    async def _copy_changed(self, agent: KataAgent, top: int) -> None:
        found = await asyncio.to_thread(self._look_at_one_state, top)
        changed = [name for name, entry in found.items() if self._copied.get(name) != entry]
        for name in sorted(changed, key=lambda name: _rank(name, found[name])):
            entry = found[name]
            await self._send(agent, name, entry, await asyncio.to_thread(self._content, top, name, entry))
            self._copied[name] = entry
            if not stat.S_ISDIR(entry.mode):
                self._forget_below(name)
        for name in sorted(self._copied.keys() - found.keys()):
            if name not in self._copied:
                continue  # in a folder that is gone
            old = self._copied[name]
            path = self._guest_path(name)
            await agent.copy_file(path, _GONE, mode=stat.S_IFLNK | 0o777, uid=old.uid, gid=old.gid)
            del self._copied[name]
            self._forget_below(name)

    def _forget_below(self, name: str) -> None:
        for gone in [n for n in self._copied if n.startswith(name + "/")]:
            del self._copied[gone]

    async def _send(self, agent: KataAgent, name: str, entry: _Entry, content: bytes) -> None:
        await agent.copy_file(self._guest_path(name), content, mode=entry.mode, uid=entry.uid, gid=entry.gid)

    def _guest_path(self, name: str) -> str:
        return f"{self.guest_path}/{name}" if name else self.guest_path

    def _content(self, top: int, name: str, entry: _Entry) -> bytes:
        if not stat.S_ISREG(entry.mode):
            return entry.link
        try:
            with os.fdopen(_open_below(top, name, _READ), "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise KataError(f"{self.source / name}: has become something else than a file")
                return file.read(MAX_BYTES)
        except OSError as error:
            raise KataError(f"{self.source / name}: {error.strerror}") from error

    def _look_at_one_state(self, top: int) -> dict[str, _Entry]:
        """As `_look`, but what is there is not half of what kubelet's link led to before, half of after."""
        for _ in range(_LOOKS):
            data = _data(top)
            found = self._look(top)
            if _data(top) == data:
                return found
        raise KataError(f"{self.source}: its ..data changes faster than it can be looked at")

    def _look(self, top: int) -> dict[str, _Entry]:
        """Name below the source -> what is there, folders before what is in them; "" is the source itself.
        Raises KataError when it is not there or too much."""
        found: dict[str, _Entry] = {}
        size = 0
        try:
            for name, status, link in _walk(top):
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


def _data(top: int) -> bytes:
    """What kubelet's link leads to; empty without one."""
    with contextlib.suppress(OSError):
        return os.readlink(b"..data", dir_fd=top)
    return b""


def _walk(top: int) -> Iterator[tuple[str, os.stat_result, bytes]]:
    """Name, what is there, and what it says if it is a link: none is followed. What is gone by the time it is
    looked at is left out."""
    status = os.fstat(top)
    yield "", status, b""
    if not stat.S_ISDIR(status.st_mode):
        return
    for directory, folders, files, fd in os.fwalk(".", dir_fd=top):
        for name in (*folders, *files):
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                is_link = stat.S_ISLNK(status.st_mode)
                link = os.readlink(os.fsencode(name), dir_fd=fd) if is_link else b""
                yield str(Path(directory, name)), status, link


def _open_below(top: int, name: str, flags: int) -> int:
    """What has the name in the folder `top`, or `top` itself for "". Raises OSError, for a link on the way,
    too: a guest of another pod may write there."""
    if not name:
        return os.open(fd_path(top), flags | os.O_CLOEXEC)
    return openat2(top, name, flags, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)


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
            await self._first_copy(file)
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

    async def _first_copy(self, file: CopiedFile) -> None:
        for _ in range(_FIRST_COPIES - 1):
            try:
                await file.update(self._agent)
            except (UnavailableError, DeadlineExceededError):
                raise
            except KataError as error:
                self._log.debug("it is copied again: %s", error)
                await asyncio.sleep(_SETTLE_S)
            else:
                return
        await file.update(self._agent)

    def _on_event(self) -> None:
        assert self._inotify is not None
        self._inotify.drain()
        self._changed.set()

    def _watch(self) -> None:
        assert self._inotify is not None
        for file in self._files:
            file.watch(self._inotify)

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
