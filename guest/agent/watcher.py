"""Kata's watchable-bind: copies of shared folders in which small files change, for programs that wait for it.

A shared file system has no inotify; the copy is in a tmpfs, which has. The source is looked at twice a
second. New files are there before the link that names them, `..data` of a config map, changes, as there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterator

from guest.agent.threads import in_thread

log = logging.getLogger(__name__)

_INTERVAL_S = 0.5
"""An update is to be seen within two seconds, one of which the shared file system may take itself."""
_LOOKS = 5
"""In one go, at what is exchanged meanwhile; the next are after the interval."""
_MAX_ENTRIES = 1000
_MAX_BYTES = 16 << 20
"""Copies are in the machine's memory. Kubernetes' own volumes have 1 MiB, and twice that during an update."""

Entry = tuple[int, int, int, int, int, int, str]
"""What tells a changed file: mode, user, group, size, time, inode, and what a link says."""


class TooMuch(Exception):
    pass


class Watcher:
    """Looks at what it watches in one thread: a share whose server is silent holds up no other call."""

    def __init__(self) -> None:
        self._copies: dict[str, _Copy] = {}
        self._leaving: list[str] = []
        self._task: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()
        """Held while a thread is at work; what it may be writing to is taken away after it."""

    async def add(self, source: str, target: str) -> bool:
        """Copy, and look again from time to time, if it is small enough. Raises OSError."""
        copy = _Copy(source, target)
        try:
            await self._work(copy.update)
        except TooMuch:
            return False
        except BaseException:
            _remove(target)
            raise
        self._copies[target] = copy
        if self._task is None or self._task.done():
            self._task = asyncio.ensure_future(self._run())
        return True

    def remove(self, target: str) -> None:
        """Take the copy away, if there is one: at once, or as soon as nobody writes to it."""
        if self._copies.pop(target, None) is not None:
            self._leaving.append(target)
            if not self._lock.locked():
                self._clean_up()

    def _clean_up(self) -> None:
        while self._leaving:
            _remove(self._leaving.pop())

    async def _work(self, work: Callable[[], None]) -> None:
        async with self._lock:
            try:
                await in_thread(work)
            finally:
                self._clean_up()

    async def _run(self) -> None:
        while self._copies:
            await asyncio.sleep(_INTERVAL_S)
            await self._work(self._update)

    def _update(self) -> None:
        for copy in list(self._copies.values()):
            try:
                copy.update()
                copy.failed = ""
            except (OSError, TooMuch) as error:
                if str(error) != copy.failed:
                    log.warning("%s stays as it was: %s", copy.target, error)
                copy.failed = str(error)


class _Copy:
    def __init__(self, source: str, target: str) -> None:
        self.source = source
        self.target = target
        self.failed = ""
        self._copied: dict[str, Entry] = {}
        self._swapped = ""

    def update(self) -> None:
        """Copy what has changed, take away what is gone."""
        for _ in range(_LOOKS):
            if self._update():
                return

    def _update(self) -> bool:
        """False when kubelet has exchanged what was found before all of it was copied."""
        # All changes of kubelet's end with this link's.
        swapped = _data(self.source)
        if swapped and swapped == self._swapped:
            return True
        self._swapped = ""
        found = _look(self.source)
        if _data(self.source) != swapped:
            # It was made, or what it led to was taken away, while we looked: what was found is half of each.
            return False
        changed = [name for name in found if self._copied.get(name) != found[name]]
        gone = self._copied.keys() - found.keys()
        for name in sorted(changed, key=lambda name: _rank(name, found[name])):
            if self._place(name, found[name]):
                self._copied[name] = found[name]
            elif _data(self.source) != swapped:
                return False
        for name in sorted(gone, reverse=True):
            # With a folder that is none any more its files went; what has its name may lead elsewhere.
            folder = found.get(os.path.dirname(name))
            if folder is not None and stat.S_ISDIR(folder[0]):
                _remove(f"{self.target}/{name}")
            del self._copied[name]
        # Only when it is all over: kubelet takes old files away after the link has changed.
        if not changed and not gone:
            self._swapped = swapped
        return True

    def _place(self, name: str, entry: Entry) -> bool:
        source, target = (f"{top}/{name}" if name else top for top in (self.source, self.target))
        mode, uid, gid, *_, link = entry
        if stat.S_ISDIR(mode):
            if not os.path.isdir(target) or os.path.islink(target):
                _remove(target)
                os.makedirs(target)
            os.chown(target, uid, gid)
            os.chmod(target, stat.S_IMODE(mode))
            return True
        new = f"{self.target}/..new"
        _remove(new)
        if stat.S_ISLNK(mode):
            os.symlink(link, new)
        else:
            try:
                shutil.copyfile(source, new, follow_symlinks=False)
            except FileNotFoundError:
                return False  # the next look finds out
        os.chown(new, uid, gid, follow_symlinks=False)
        if not stat.S_ISLNK(mode):
            os.chmod(new, stat.S_IMODE(mode))
        if os.path.isdir(target) and not os.path.islink(target):
            _remove(target)
        os.rename(new, target)
        return True


def _data(source: str) -> str:
    """What kubelet's link leads to; "" without one."""
    with contextlib.suppress(OSError):
        return os.readlink(f"{source}/..data")
    return ""


def _look(source: str) -> dict[str, Entry]:
    """Name below the source -> what is there; "" is the source itself, a folder."""
    found: dict[str, Entry] = {}
    size = 0
    for name, status, link in _walk(source):
        changing = (status.st_size, status.st_mtime_ns, status.st_ino)
        if stat.S_ISDIR(status.st_mode):
            changing = (0, 0, 0)
        elif stat.S_ISREG(status.st_mode):
            size += status.st_size
        elif not stat.S_ISLNK(status.st_mode):
            continue
        found[name] = (status.st_mode, status.st_uid, status.st_gid, *changing, link)
        if len(found) > _MAX_ENTRIES or size > _MAX_BYTES:
            raise TooMuch(f"{source} has more than {_MAX_ENTRIES} files or {_MAX_BYTES} bytes")
    return found


def _walk(source: str) -> Iterator[tuple[str, os.stat_result, str]]:
    """Name, what is there, and what it says if it is a link. What is gone by the time it is looked at is left
    out."""
    yield "", os.lstat(source), ""
    for directory, folders, files in os.walk(source):
        for name in (*folders, *files):
            path = os.path.join(directory, name)
            with contextlib.suppress(FileNotFoundError):
                status = os.lstat(path)
                link = os.readlink(path) if stat.S_ISLNK(status.st_mode) else ""
                yield os.path.relpath(path, source), status, link


def _rank(name: str, entry: Entry) -> tuple[int, str]:
    """Folders, then files, then the link that makes them count, then those that lead through it."""
    if not stat.S_ISLNK(entry[0]):
        return (0 if stat.S_ISDIR(entry[0]) else 1), name
    return (2 if os.path.basename(name) == "..data" else 3), name


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
