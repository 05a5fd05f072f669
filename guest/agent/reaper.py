"""One waitpid loop for all: our children's exits go to who waits for them, orphans' exits nowhere."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator, Sequence

# What Python ignores or the agent does as PID 1 must not be inherited by containers.
_DEFAULT_SIGNALS = (
    signal.SIGPIPE,
    signal.SIGXFSZ,
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGCHLD,
)


class Reaper:
    """Every process of this machine that ends is waited for here and nowhere else."""

    def __init__(self) -> None:
        self._exits: dict[int, asyncio.Future[int]] = {}
        self._unclaimed: dict[int, int] = {}
        self._holds = 0

    def start(self) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self.reap)
        self.reap()

    def reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(status)
            code = 128 - code if code < 0 else code
            future = self._exits.pop(pid, None)
            if future is not None:
                if not future.done():
                    future.set_result(code)
            elif self._holds:
                self._unclaimed[pid] = code

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Keep the exits nobody waits for yet: a container may end before crun has told us its pid."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
            if not self._holds:
                self._unclaimed.clear()

    def watch(self, pid: int) -> asyncio.Future[int]:
        """The exit status to come, 128 + signal when killed.

        Call it in the same step of the loop as the fork, or within `hold`. Await it shielded: it is shared.
        """
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        if pid in self._unclaimed:
            future.set_result(self._unclaimed.pop(pid))
        else:
            self._exits[pid] = future
        return future

    def spawn(self, path: str, argv: list[str], fds: Sequence[int]) -> asyncio.Future[int]:
        """Start a program with `fds` as its 0, 1, 2; all its signals are as a fresh process has them."""
        # vfork, not fork: no copy of our page tables.
        pid = os.posix_spawn(
            path,
            argv,
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(fds)],
            setsigmask=(),
            setsigdef=_DEFAULT_SIGNALS,
        )
        return self.watch(pid)
