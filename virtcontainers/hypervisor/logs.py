"""The last words of a machine: its console and its daemons' logs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from pathlib import Path

CONSOLE_LIMIT_BYTES = 512 << 10

_NOT_TEXT = r"\x1b(?:\[[0-?]*[ -/]*[@-~]|c)|[^\t\n -~\u00a0-\U0010ffff]"
_TAIL_BYTES = 16 << 10


def tail(path: Path, *, lines: int = 15) -> str:
    """The last lines of a log, fit for a terminal: a guest chose some of these bytes. "" without a log."""
    try:
        with path.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = log.read().decode(errors="replace")
    except OSError:
        return ""
    kept = [line.rstrip() for line in re.sub(_NOT_TEXT, "", text).splitlines()]
    return "\n".join([line for line in kept if line][-lines:])


def with_tail(message: str, path: Path, *, lines: int = 15) -> str:
    """`message`, and below it the tail of the log if it has any."""
    last = tail(path, lines=lines)
    return f"{message}\n--- {path.name}:\n{last}" if last else message


class ConsoleLog:
    """Copies what a guest writes to its console from a pipe to a file.

    QEMU could write the file itself, but then a guest could fill the host's /run. The file holds the last
    256 to 512 KiB.
    """

    def __init__(self, path: Path, *, writer: int | None = None) -> None:
        """`writer`: a process whose stdout is such a pipe already, and whose file goes on. Raises OSError
        when it is not there."""
        self.path = path
        if writer is None:
            truncate = os.O_TRUNC
            self._read_fd, self.write_fd = os.pipe2(os.O_CLOEXEC)
        else:
            truncate = 0
            # A pipe is opened as a FIFO is: this is one more end to read from.
            self._read_fd, self.write_fd = os.open(f"/proc/{writer}/fd/1", os.O_RDONLY | os.O_CLOEXEC), -1
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | truncate | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._file).st_size
        os.set_blocking(self._read_fd, False)
        asyncio.get_running_loop().add_reader(self._read_fd, self._copy)

    def started(self) -> None:
        """Somebody else has `write_fd` now."""
        os.close(self.write_fd)
        self.write_fd = -1

    def _copy(self) -> bool:
        """Whether there may be more."""
        try:
            data = os.read(self._read_fd, 64 << 10)
        except BlockingIOError:
            return False
        if not data:
            asyncio.get_running_loop().remove_reader(self._read_fd)
            return False
        # A full /run costs the log, not the pod.
        with contextlib.suppress(OSError):
            self._append(data)
        return True

    def _append(self, data: bytes) -> None:
        if self._size + len(data) > CONSOLE_LIMIT_BYTES:
            kept = os.pread(
                self._file, CONSOLE_LIMIT_BYTES // 2, max(0, self._size - CONSOLE_LIMIT_BYTES // 2)
            )
            os.ftruncate(self._file, 0)
            self._size = os.pwrite(self._file, kept, 0)
        self._size += os.pwrite(self._file, data, self._size)

    def drain(self) -> None:
        """Take over what is in the pipe, before somebody looks at the file's end."""
        while self._read_fd >= 0 and self._copy():
            pass

    def close(self) -> None:
        """Idempotent."""
        if self._read_fd < 0:
            return
        asyncio.get_running_loop().remove_reader(self._read_fd)
        for fd in (self._read_fd, self._file, self.write_fd):
            if fd >= 0:
                os.close(fd)
        self._read_fd = self.write_fd = self._file = -1
