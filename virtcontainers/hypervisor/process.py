"""The processes of a machine: started so that none outlives its owner, and found again when one does."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import select
import signal
import subprocess
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from virtcontainers.hypervisor.base import HypervisorError
from virtcontainers.hypervisor.capabilities import Capability, limiter
from virtcontainers.hypervisor.logs import with_tail

MARK = "KATA_PY_VM"
"""In the environment of every process of a machine: its directory. Unlike words of a command line it cannot
be there by chance, and it stays through wrappers and forks."""

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_CLONE_NEWNET = 0x40000000  # <linux/sched.h>
_TERMINATE_TIMEOUT_S = 5.0


class MachineProcess:
    """QEMU or a daemon beside it, with a log of its own."""

    def __init__(
        self, name: str, log: Path, pid: int, pidfd: int, process: subprocess.Popen[bytes] | None
    ) -> None:
        """Use `start` or `adopt`."""
        self.name = name
        self.log = log
        self.pid = pid
        self.ended_well = False
        """It exited with status 0, as a daemon does whose QEMU has gone; or nobody knows how it ended."""
        self.was_killed = False
        """By SIGKILL: what it ran has not brought that about itself."""
        self._process = process
        loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[str] = loop.create_future()
        # A pidfd in the loop, and not asyncio's own watcher: before Python 3.12 that is a thread a process.
        self._pidfd = pidfd
        loop.add_reader(pidfd, self._on_exit)

    @classmethod
    def start(
        cls,
        name: str,
        argv: Sequence[str],
        *,
        directory: Path,
        stdout: int | None = None,
        pass_fds: Iterable[int] = (),
        outlives_us: bool = False,
        capabilities: Collection[Capability] | None = frozenset(),
        own_network: bool = False,
    ) -> MachineProcess:
        """Start `argv` for the machine of `directory`; stderr, and stdout unless given, go to its log there.

        It gets nothing of ours but `pass_fds`, under their numbers, and `capabilities` (None: all), and is
        killed when we die, unless it `outlives_us`. With `own_network` it is in a new network namespace,
        where there is nothing. Raises HypervisorError when it does not start.
        """
        log = _log_of(name, directory)
        libc = ctypes.CDLL(None)
        parent = os.getpid()
        limit = limiter(capabilities) if capabilities is not None and os.geteuid() == 0 else None

        def prepare() -> None:
            if own_network and libc.unshare(_CLONE_NEWNET) != 0:
                raise OSError  # of which nobody sees more than that it was raised here
            if not outlives_us:
                libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != parent:  # it died before the prctl
                    os._exit(1)
            if limit is not None:
                limit()

        with log.open("ab") as output:
            try:
                process = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=output if stdout is None else stdout,
                    stderr=output,
                    pass_fds=tuple(pass_fds),
                    # containerd's environment can hold secrets, and a guest might break out.
                    env={"PATH": os.defpath, MARK: str(directory)},
                    cwd="/",
                    start_new_session=True,
                    preexec_fn=prepare,
                )
            except (OSError, subprocess.SubprocessError) as error:
                raise HypervisorError(f"{argv[0]} does not start: {error}") from error
        return cls(name, log, process.pid, os.pidfd_open(process.pid), process)

    @classmethod
    def adopt(cls, name: str, pid: int, *, directory: Path) -> MachineProcess:
        """One of the machine of `directory` that somebody else has started. It is not killed when we die.

        Raises HypervisorError when there is none of that pid.
        """
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            raise HypervisorError(f"{name} (pid {pid}): {error.strerror}") from error
        # Only now: before the open the pid may have become another process's.
        if not _has_mark(pid, _mark(directory)):
            os.close(pidfd)
            raise HypervisorError(f"{name} (pid {pid}) is none of the machine in {directory}")
        return cls(name, _log_of(name, directory), pid, pidfd, None)

    def _on_exit(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        if self._process is None:
            # Only its parent can know how, and end what it has forked while its number is its own.
            self.ended_well = True
            self._ended.set_result(f"{self.name} (pid {self.pid}) ended")
            return
        # Not waited for yet, it still holds its number: what it has forked goes with it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        status = self._process.wait()
        self.ended_well = status == 0
        self.was_killed = status == -signal.SIGKILL
        how = f"exited with status {status}" if status >= 0 else f"was killed by {_signal_name(-status)}"
        self._ended.set_result(f"{self.name} (pid {self.pid}) {how}")

    @property
    def running(self) -> bool:
        return not self._ended.done()

    async def wait(self) -> str:
        """How it ended, as a sentence without its full stop."""
        return await asyncio.shield(self._ended)

    async def wait_with_tail(self) -> str:
        """How it ended, with the tail of its log."""
        return with_tail(await self.wait(), self.log)

    async def terminate(self, timeout_s: float = _TERMINATE_TIMEOUT_S) -> None:
        """SIGTERM, later SIGKILL; returns when it is gone. Idempotent."""
        if self.running:
            self._send(signal.SIGTERM)
            done, _ = await asyncio.wait({self._ended}, timeout=timeout_s)
            if not done:
                self._send(signal.SIGKILL)
        await self.wait()

    def _send(self, number: signal.Signals) -> None:
        # One that was adopted has another parent, which may have waited for it before we see its end.
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)


def _log_of(name: str, directory: Path) -> Path:
    return directory / f"{name}.log"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def find_processes(directory: Path) -> list[int]:
    """The pids of all processes of the machine of `directory`, whoever started them."""
    wanted = _mark(directory)
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if pid != os.getpid() and _has_mark(pid, wanted)]


def _mark(directory: Path) -> bytes:
    return f"{MARK}={directory}".encode()


def _has_mark(pid: int, mark: bytes) -> bool:
    try:
        return mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # gone, or not ours to look at
        return False


async def end_processes(directory: Path, timeout_s: float = _TERMINATE_TIMEOUT_S) -> None:
    """End what `find_processes` finds: SIGTERM, later SIGKILL. Raises HypervisorError when one stays."""
    mark = _mark(directory)
    kill = (signal.SIGKILL, _TERMINATE_TIMEOUT_S)
    # Twice: what one has forked between the look and its end.
    for number, patience_s in ((signal.SIGTERM, timeout_s), kill, kill):
        pidfds: dict[int, int] = {}
        try:
            for pid in find_processes(directory):
                try:
                    pidfds[pid] = os.pidfd_open(pid)
                    # Between the look and the open the pid may have become another process's.
                    if _has_mark(pid, mark):
                        signal.pidfd_send_signal(pidfds[pid], number)
                except ProcessLookupError:
                    pass
            deadline = asyncio.get_running_loop().time() + patience_s
            for pidfd in pidfds.values():
                while not select.select([pidfd], [], [], 0)[0]:
                    if asyncio.get_running_loop().time() > deadline:
                        break
                    await asyncio.sleep(0.005)
        finally:
            for pidfd in pidfds.values():
                os.close(pidfd)
        if not (left := find_processes(directory)):
            return
    raise HypervisorError(f"processes of the machine in {directory} do not end: {', '.join(map(str, left))}")
