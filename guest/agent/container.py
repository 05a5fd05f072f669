"""A container and its processes: run by crun, watched and fed by us."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import json
import logging
import os
import signal
import socket
import struct
from collections.abc import Iterator
from enum import Enum
from typing import Any

from guest.agent import cgroup as cgroups
from guest.agent.mount import mounts
from guest.agent.reaper import Reaper
from guest.agent.spec import Spec, needs_crun
from guest.agent.streams import InputStream, OutputStream
from ttrpc import Code, StatusError

log = logging.getLogger(__name__)

_TIOCSWINSZ = 0x5414
_FINISHED_EXECS_KEPT = 64
"""An exec that has ended is remembered for those who ask later, but not a year's health probes."""


class Crun:
    """The OCI runtime, and the directories it is used with."""

    def __init__(self, reaper: Reaper, run_directory: str, executable: str = "/usr/bin/crun") -> None:
        self.reaper = reaper
        self.directory = run_directory
        self.root = f"{run_directory}/crun"
        os.makedirs(self.root, mode=0o700, exist_ok=True)
        self._numbers = itertools.count()
        self._executable = executable
        self._sealed = -1
        # pivot_root(2) refuses the initramfs.
        self.create_options = ["--no-pivot"] if _root_is_initramfs() else []

    def scratch(self, suffix: str) -> str:
        """A new short path: sockets' paths are limited to 107 bytes."""
        return f"{self.directory}/{next(self._numbers)}.{suffix}"

    def prepare(self) -> None:
        """What the first command waits for; `run` does it else. Raises OSError."""
        if self._sealed < 0:
            self._sealed = _sealed_copy(self._executable)

    async def run(self, *arguments: str, fds: tuple[int, int, int]) -> None:
        """Run one command of crun; raises StatusError with crun's words."""
        self.prepare()
        log_path = self.scratch("log")
        argv = ["crun", f"--root={self.root}", "--cgroup-manager=cgroupfs", f"--log={log_path}", *arguments]
        try:
            status = await self.reaper.spawn(f"/proc/self/fd/{self._sealed}", argv, fds)
            if status:
                message = _read_log(log_path) or f"crun {arguments[0]} ended with {status}"
                raise StatusError(Code.INTERNAL, message)
        except OSError as error:
            reason = f"crun {arguments[0]} cannot be started: {error.strerror}"
            raise StatusError(Code.INTERNAL, reason) from error
        finally:
            _unlink(log_path)


def _sealed_copy(path: str) -> int:
    """An executable in memory that no container can write to through /proc/PID/exe.

    crun makes itself such a copy and starts again in it unless it is one: half of the time it takes to start.
    """
    with open(path, "rb") as file:
        program = file.read()
    fd = os.memfd_create("crun", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(fd, "wb", closefd=False) as copy:
        copy.write(program)
    fcntl.fcntl(
        fd,
        fcntl.F_ADD_SEALS,
        fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE,
    )
    return fd


def _root_is_initramfs() -> bool:
    return any(point == "/" and fstype == "rootfs" for point, _, fstype in mounts())


def _read_log(path: str) -> str:
    try:
        with open(path, errors="replace") as file:
            return "; ".join(file.read().split("\n")).strip("; ")
    except OSError:
        return ""


class Process:
    """One process, running or ended, and its streams."""

    def __init__(
        self, pid: int, exited: asyncio.Future[int], fds: tuple[int, int, int], *, terminal: bool
    ) -> None:
        """Owns `fds`: what is written to its stdin, read from its stdout and its stderr; -1 for none."""
        stdin, stdout, stderr = fds
        self.pid = pid
        self.exited = exited
        self.terminal = stdout if terminal else None
        self.stdin = InputStream(stdin)
        self.stdout = OutputStream(stdout)
        self.stderr = OutputStream(stderr) if stderr >= 0 else None
        # Who is still writing must not wait for a reader that will never come.
        exited.add_done_callback(lambda _: self.stdin.close())

    async def wait(self) -> int:
        return await asyncio.shield(self.exited)

    def signal(self, number: int) -> None:
        if self.exited.done():
            # Kata's runtime looks for these words.
            raise StatusError(Code.NOT_FOUND, "ESRCH: No such process")
        os.kill(self.pid, number)

    def resize(self, rows: int, columns: int) -> None:
        if self.terminal is None:
            raise StatusError(Code.FAILED_PRECONDITION, "no tty")
        if not self.stdout.is_closed:
            fcntl.ioctl(
                self.terminal, _TIOCSWINSZ, struct.pack("HHHH", rows & 0xFFFF, columns & 0xFFFF, 0, 0)
            )

    def close(self) -> None:
        """Drop what is unread. Idempotent."""
        self.stdin.close()
        self.stdout.close()
        if self.stderr is not None:
            self.stderr.close()


class ContainerState(Enum):
    """CREATED -> RUNNING -> STOPPED; a container that never started may stop too."""

    CREATED = "created"
    RUNNING = "running"
    STOPPED = "stopped"


class Container:
    """`create` makes it, `stop` and `remove_files` take all of it back."""

    def __init__(self, crun: Crun, container_id: str, *, bundle: str, cgroup: cgroups.Cgroup) -> None:
        self._crun = crun
        self.id = container_id
        self.cgroup = cgroup
        self.frozen = False
        self.processes: dict[str, Process] = {}
        self.bundle = bundle
        self._owns_pid_namespace = True
        self._started = False
        self._poststart = False
        self._poststop = False
        self._lock = asyncio.Lock()
        self.removal = asyncio.Lock()
        """For whoever removes all of it: a host that lost patience asks again."""

    @property
    def init(self) -> Process:
        return self.processes[self.id]

    @property
    def state(self) -> ContainerState:
        if self.init.exited.done():
            return ContainerState.STOPPED
        return ContainerState.RUNNING if self._started else ContainerState.CREATED

    async def create(self, spec: Spec, *, owns_pid_namespace: bool) -> None:
        """Everything but the start of the user's program. Raises crun's words; `remove_files` then."""
        self._owns_pid_namespace = owns_pid_namespace
        self._poststart, self._poststop = needs_crun(spec, "poststart"), needs_crun(spec, "poststop")
        os.makedirs(self.bundle, exist_ok=True)
        try:
            with open(f"{self.bundle}/config.json", "w") as file:
                file.write(json.dumps(spec))
            command = ["create", *self._crun.create_options, f"--bundle={self.bundle}"]
            init = await self._launch(command, spec["process"])
        except BaseException:
            self.cgroup.signal(signal.SIGKILL)
            raise
        self.processes[self.id] = init
        if not owns_pid_namespace:
            # Else the kernel does it.
            init.exited.add_done_callback(lambda _: self.cgroup.signal(signal.SIGKILL))

    async def start(self) -> None:
        async with self._lock:
            if self.state is not ContainerState.CREATED:
                raise StatusError(
                    Code.FAILED_PRECONDITION, f"container {self.id} is {self.state.value}, not created"
                )
            self._started = True
            if self._poststart:
                with _null() as null:
                    await self._crun.run("start", self.id, fds=(null, null, null))
                return
            # What `crun start` does, without the time a process takes: the program waits for a byte in it.
            path = f"{self._crun.root}/{self.id}/exec.fifo"
            try:
                fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError as error:
                raise StatusError(
                    Code.INTERNAL, f"container {self.id} does not wait for its start: {error}"
                ) from error
            try:
                os.unlink(path)
                os.write(fd, b"\0")
            finally:
                os.close(fd)

    async def exec(self, exec_id: str, process: dict[str, Any]) -> None:
        """Start one more process. Raises crun's words when it cannot be."""
        old = self.processes.get(exec_id)
        if old is not None and not old.exited.done():
            raise StatusError(Code.ALREADY_EXISTS, f"process {exec_id} of container {self.id} exists already")
        if self.state is not ContainerState.RUNNING or self.frozen:
            state = "paused" if self.frozen else self.state.value
            raise StatusError(Code.FAILED_PRECONDITION, f"container {self.id} is {state}, not running")
        path = self._crun.scratch("json")
        process = {k: v for k, v in process.items() if k not in ("apparmorProfile", "selinuxLabel")}
        try:
            with open(path, "w") as file:
                file.write(json.dumps(process))
            started = await self._launch(["exec", "--detach", f"--process={path}"], process)
        except StatusError as error:
            # crun says what it stumbled over in a container whose first process has just been killed.
            if _has_left(self.init.pid):
                raise StatusError(Code.FAILED_PRECONDITION, f"container {self.id} ends: {error}") from error
            raise
        finally:
            os.unlink(path)
        if old is not None:
            old.close()
        self.processes[exec_id] = started
        self._forget_finished()

    def _forget_finished(self) -> None:
        finished = [i for i, p in self.processes.items() if p.exited.done() and p is not self.init]
        for exec_id in finished[:-_FINISHED_EXECS_KEPT]:
            self.processes.pop(exec_id).close()

    async def _launch(self, command: list[str], process: dict[str, Any]) -> Process:
        terminal = bool(process.get("terminal"))
        pid_path = self._crun.scratch("pid")
        command += [f"--pid-file={pid_path}"]
        with contextlib.ExitStack() as on_failure, contextlib.ExitStack() as finally_:
            null = finally_.enter_context(_null())
            if terminal:
                socket_path = self._crun.scratch("tty")
                listener = finally_.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                listener.bind(socket_path)
                finally_.callback(os.unlink, socket_path)
                listener.listen(1)
                command += [f"--console-socket={socket_path}"]
                theirs = (null, null, null)
            else:
                theirs, ours = _pipes((process.get("user") or {}).get("uid", 0), on_failure, finally_)
            finally_.callback(_unlink, pid_path)
            finally_.enter_context(self._crun.reaper.hold())
            await self._crun.run(*command, self.id, fds=theirs)
            with open(pid_path) as file:
                pid = int(file.read())
            exited = self._crun.reaper.watch(pid)
            if terminal:
                ours = _receive_terminal(listener)
            on_failure.pop_all()
            return Process(pid, exited, ours, terminal=terminal)

    def process(self, exec_id: str) -> Process:
        """Raises StatusError (NOT_FOUND). An empty id is the init process's."""
        try:
            return self.processes[exec_id or self.id]
        except KeyError:
            raise StatusError(
                Code.NOT_FOUND, f"process {exec_id!r} of container {self.id} does not exist"
            ) from None

    def signal_init(self, number: int) -> None:
        """As `Process.signal`. SIGTERM ends also an init that has no handler for it.

        The kernel drops a signal with default action for the first process of a PID namespace; Kata's agent
        sends SIGKILL instead of it, so that stopping such a container takes no grace period.
        """
        if number == signal.SIGTERM and self._owns_pid_namespace and not _handles(self.init.pid, number):
            number = signal.SIGKILL
        self.init.signal(number)

    def signal_all(self, number: int) -> None:
        if self.state is ContainerState.STOPPED and not self.cgroup.is_populated:
            raise StatusError(Code.NOT_FOUND, "ESRCH: No such process")
        self.cgroup.signal(number)

    async def set_paused(self, paused: bool) -> None:
        async with self._lock:
            if self.state is not ContainerState.RUNNING:
                raise StatusError(
                    Code.FAILED_PRECONDITION, f"container {self.id} is {self.state.value}, not running"
                )
            await self.cgroup.set_frozen(paused)
            self.frozen = paused

    async def update(self, resources: dict[str, Any]) -> None:
        path = self._crun.scratch("json")
        async with self._lock:
            try:
                with open(path, "w") as file:
                    file.write(json.dumps(resources))
                with _null() as null:
                    await self._crun.run("update", f"--resources={path}", self.id, fds=(null, null, null))
            finally:
                os.unlink(path)

    async def stop(self) -> None:
        """Kill what runs, wait until it has ended, and drop what is unread. Can be called again."""
        async with self._lock:
            self.cgroup.signal(signal.SIGKILL)
            if not self.init.exited.done():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.init.pid, signal.SIGKILL)
            await self.init.wait()
            await self.cgroup.wait_empty()
            if self._poststop:
                try:
                    with _null() as null:
                        await self._crun.run("delete", "--force", self.id, fds=(null, null, null))
                except StatusError as error:
                    log.warning("poststop hooks: %s", error, extra={"container": self.id})
            for process in self.processes.values():
                process.close()

    def remove_files(self) -> None:
        """The cgroup and all that is on disk; nothing may be mounted there any more. Idempotent."""
        with contextlib.suppress(OSError):
            self.cgroup.remove()
        _remove_tree(f"{self._crun.root}/{self.id}")
        _remove_tree(self.bundle)


def _has_left(pid: int) -> bool:
    """Whether the process has given its namespaces up: it ends, though nobody may have waited for it yet."""
    try:
        os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:
        return True
    return False


def _handles(pid: int, number: int) -> bool:
    bit = 1 << (number - 1)
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as file:
        for line in file:
            if line.startswith(("SigBlk:", "SigIgn:", "SigCgt:")) and int(line.split()[1], 16) & bit:
                return True
    return False


def _pipes(
    uid: int, on_failure: contextlib.ExitStack, finally_: contextlib.ExitStack
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """The container's ends, and ours."""
    theirs, ours = [], []
    for reads in (True, False, False):
        reading, writing = os.pipe2(os.O_CLOEXEC)
        their, our = (reading, writing) if reads else (writing, reading)
        finally_.callback(os.close, their)
        on_failure.callback(os.close, our)
        if uid:
            # That the user may open /dev/stdout.
            os.fchown(their, uid, -1)
        theirs.append(their)
        ours.append(our)
    return (theirs[0], theirs[1], theirs[2]), (ours[0], ours[1], ours[2])


def _receive_terminal(listener: socket.socket) -> tuple[int, int, int]:
    """The master side, from the connection crun has left behind; once for writing and once for reading."""
    listener.setblocking(False)
    try:
        connection, _ = listener.accept()
    except BlockingIOError:
        raise StatusError(Code.INTERNAL, "crun has sent no terminal") from None
    with connection:
        _, fds, _, _ = socket.recv_fds(connection, 4096, 1)
    os.set_inheritable(fds[0], False)
    return fcntl.fcntl(fds[0], fcntl.F_DUPFD_CLOEXEC, 0), fds[0], -1


@contextlib.contextmanager
def _null() -> Iterator[int]:
    fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _remove_tree(path: str) -> None:
    for directory, directories, files in os.walk(path, topdown=False):
        for name in files:
            os.unlink(os.path.join(directory, name))
        for name in directories:
            child = os.path.join(directory, name)
            if os.path.islink(child):
                os.unlink(child)
            else:
                with contextlib.suppress(OSError):
                    os.rmdir(child)
    with contextlib.suppress(OSError):
        os.rmdir(path)
