"""The tasks of one pod as containerd sees them: their states, and every event, in order.

A task is a process: a container's init, or an exec in it. What happens in the guest is virtcontainers'
business.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf.timestamp_pb2 import Timestamp

from katautils import create as katautils_create
from katautils.hooks import HookError
from katautils.oci import CRI_O_CONTAINER_TYPE
from shim.events import Publisher
from shim.protocols import events_pb2, types_pb2
from shim.protocols.task_types_pb2 import CREATED, PAUSED, PAUSING, RUNNING, STOPPED, Status
from shim.stdio import ProcessIO, Stdio
from virtcontainers import persist
from virtcontainers.config import Mount
from virtcontainers.container import Container, Process
from virtcontainers.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    KataError,
    NotFoundError,
    UnavailableError,
)
from virtcontainers.sandbox import Sandbox

log = logging.getLogger(__name__)

T = TypeVar("T")

SIGKILL = 9
SIGTERM = 15
KILLED = 128 + SIGKILL
NO_COMMAND = 127
"""A shell's status for a command that is not there."""

START_FAILED = 255

DRAIN_IDLE_S = 2.0
"""After a process has exited: how long output that does not move holds its exit back."""

NOTICED_S = 5.0
"""After the machine's end: for the processes' own ends to be noticed."""

CAUSE_S = 5.0
"""How long an exit that a broken connection makes up waits until it is known what has broken."""

EXECS_END_S = 5.0
"""How long an init's exit waits for those of its execs, which the guest has killed."""

_NO_COMMAND = re.compile(r"executable file .*not found", re.DOTALL)
"""crun's and runc's words."""


@dataclass(eq=False)
class Task:
    """One process."""

    container_id: str
    exec_id: str
    """Empty for the container's init."""
    stdio: Stdio
    spec: dict[str, Any] = field(default_factory=dict)
    """An exec's OCI process."""
    status: Status = CREATED
    io: ProcessIO | None = None
    process: Process | None = None
    exit_status: int = 0
    exited_at: Timestamp | None = None
    has_exited: asyncio.Event = field(default_factory=asyncio.Event)
    is_ending: bool = False
    """It is gone from the guest; its output may still be on the way."""
    size: tuple[int, int] | None = None
    """Asked for before there was a terminal."""
    is_stdin_released: bool = False
    watcher: asyncio.Task[None] | None = None

    @property
    def id(self) -> str:
        return self.exec_id or self.container_id

    def release_stdin(self) -> None:
        """containerd's CloseIO."""
        self.is_stdin_released = True
        if self.io is not None:
            self.io.release_stdin()

    def require(self, *statuses: Status) -> None:
        """Raise FailedPreconditionError unless the task is in one of `statuses`."""
        if self.status not in statuses or self.is_ending:
            now = "exiting" if self.is_ending and self.status != STOPPED else Status.Name(self.status).lower()
            wanted = " or ".join(Status.Name(status).lower() for status in statuses)
            raise FailedPreconditionError(f"process {self.id} is {now}, expected {wanted}")


@dataclass(eq=False)
class TaskContainer:
    """One container: its init and its execs."""

    bundle: Path
    init: Task
    container: Container | None
    """None when its command was not there: it was never made."""
    no_command: str = ""
    execs: dict[str, Task] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Of whatever changes its state."""

    @property
    def id(self) -> str:
        return self.init.container_id

    @property
    def is_cri_os(self) -> bool:
        """CRI-O hears no events: it looks for a file in the bundle."""
        return self.container is not None and CRI_O_CONTAINER_TYPE in self.container.config.annotations

    def tasks(self) -> Iterator[Task]:
        """The execs, then the init: the order of their exits."""
        yield from self.execs.values()
        yield self.init


class Pod:
    """Everything one shim serves. Errors are virtcontainers'; a state change is finished even when its caller
    goes away."""

    def __init__(self, namespace: str, publisher: Publisher) -> None:
        self._namespace = namespace
        self._publisher = publisher
        self._sandbox: Sandbox | None = None
        self._main_id = ""
        """The container whose end is the machine's."""
        self._pid = 0
        self._containers: dict[str, TaskContainer] = {}
        self._creating: set[str] = set()
        self._when_empty: Callable[[], None] | None = None
        self._create_lock = asyncio.Lock()
        self._is_closed = False
        self._watchers: set[asyncio.Task[None]] = set()
        """Of the machine."""
        self._teardown: asyncio.Task[None] | None = None
        self._management: asyncio.Server | None = None
        self._background: set[asyncio.Task[Any]] = set()

    def when_empty(self, act: Callable[[], None]) -> None:
        """Act now when there are no containers; when one is only being created, if that fails. Otherwise
        never."""
        if self._containers:
            return
        if self._creating:
            self._when_empty = act
        else:
            act()

    def pid(self, container_id: str) -> int:
        """The hypervisor's: no other process of the container is on the host."""
        self.container(container_id)
        return self._pid

    def container(self, container_id: str) -> TaskContainer:
        """Raises NotFoundError."""
        if (container := self._containers.get(container_id)) is None:
            raise NotFoundError(f"container {container_id} does not exist")
        return container

    def task(self, container_id: str, exec_id: str) -> Task:
        """Raises NotFoundError."""
        container = self.container(container_id)
        if not exec_id:
            return container.init
        if (task := container.execs.get(exec_id)) is None:
            raise NotFoundError(f"exec {exec_id} of container {container_id} does not exist")
        return task

    async def create(
        self,
        container_id: str,
        bundle: Path,
        rootfs: Sequence[types_pb2.Mount],
        stdio: Stdio,
        runtime_config_path: Path | None,
    ) -> int:
        """Make the pod's machine with its first container, or one more container in it; returns the pid."""
        if container_id in self._containers or container_id in self._creating:
            raise AlreadyExistsError(f"container {container_id} exists already")
        self._creating.add(container_id)
        try:
            async with self._create_lock:
                created = await self._create(container_id, bundle, rootfs, stdio, runtime_config_path)
            self._containers[container_id] = created
            self._when_empty = None
        finally:
            self._creating.discard(container_id)
            if self._when_empty is not None:
                self.when_empty(self._when_empty)
        self._publisher.publish(
            events_pb2.TaskCreate(
                container_id=container_id,
                bundle=str(bundle),
                rootfs=rootfs,
                io=events_pb2.TaskIO(
                    stdin=stdio.stdin, stdout=stdio.stdout, stderr=stdio.stderr, terminal=stdio.terminal
                ),
                pid=self._pid,
            )
        )
        return self._pid

    async def _create(
        self,
        container_id: str,
        bundle: Path,
        rootfs: Sequence[types_pb2.Mount],
        stdio: Stdio,
        runtime_config_path: Path | None,
    ) -> TaskContainer:
        if self._is_closed:
            raise UnavailableError(f"container {container_id}: the shim of its pod is ending")
        mounts = [
            Mount(type=mount.type, source=mount.source, options=tuple(mount.options), target=mount.target)
            for mount in rootfs
        ]
        init = Task(container_id=container_id, exec_id="", stdio=stdio)
        created = TaskContainer(bundle=bundle, init=init, container=None)
        init.io = await ProcessIO.open(stdio, self._namespace, container_id)
        try:
            if self._sandbox is not None:
                created.container = await katautils_create.create_container(
                    self._sandbox, bundle, container_id, mounts, terminal=stdio.terminal
                )
            else:
                sandbox = await katautils_create.create_sandbox(
                    bundle, container_id, mounts, runtime_config_path, terminal=stdio.terminal
                )
                created.container = sandbox.containers[container_id]
                self._adopt(sandbox, container_id)
                await self._serve_management(sandbox)
        except KataError as error:
            # A hook's words may be the same.
            if isinstance(error, HookError) or not _NO_COMMAND.search(str(error)):
                await init.io.close()
                raise
            # A user expects what a shell does: a process that says so and ends with 127.
            created.no_command = str(error)
        except BaseException:
            await init.io.close()
            raise
        return created

    def _adopt(self, sandbox: Sandbox, main_id: str) -> None:
        self._sandbox, self._main_id, self._pid = sandbox, main_id, sandbox.hypervisor_pid
        self._teardown = None
        self._watchers = {
            asyncio.create_task(self._watch_machine(sandbox)),
            asyncio.create_task(self._watch_oom(sandbox)),
        }

    async def _serve_management(self, sandbox: Sandbox) -> None:
        """For `kata-py` and Kata's tools; a pod can do without."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            from shim.management import serve

            await serve(sandbox, reader, writer)

        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with persist.management_address(sandbox.id) as address:
                listener.bind(address)
            self._management = await asyncio.start_server(serve, sock=listener)
        except OSError as error:
            listener.close()
            path = persist.management_socket(sandbox.id)
            log.warning("no management: %s: %s", path, error, extra={"sandbox": sandbox.id})

    async def start(self, container_id: str, exec_id: str) -> int:
        """Start a container's init, or an exec; returns the pid."""
        container, task = self.container(container_id), self.task(container_id, exec_id)
        await self._finish(self._start(container, task))
        return self._pid

    async def _start(self, container: TaskContainer, task: Task) -> None:
        async with container.lock:
            task.require(CREATED)
            no_command = "" if task.exec_id else container.no_command
            if not no_command:
                try:
                    await (self._start_exec if task.exec_id else self._start_init)(container, task)
                except KataError as error:
                    no_command = str(error)
                    if not _NO_COMMAND.search(no_command):
                        await self._end(container, task, START_FAILED, publish=False)
                        raise
                task.require(CREATED)  # the machine may have died meanwhile, and with it the process
            task.status = RUNNING
            self._publisher.publish(
                events_pb2.TaskExecStarted(container_id=container.id, exec_id=task.exec_id, pid=self._pid)
                if task.exec_id
                else events_pb2.TaskStart(container_id=container.id, pid=self._pid)
            )
            if no_command:
                self._spawn(self._report_no_command(container, task, no_command))
                return
            assert task.io is not None and task.process is not None
            task.io.start(task.process)
            task.watcher = self._spawn(self._watch(container, task, task.process))
            if task.size is not None:
                try:
                    await task.process.resize(*task.size)
                except KataError as error:
                    log.warning("process %s: %s", task.id, error, extra={"container": container.id})

    async def _start_init(self, container: TaskContainer, task: Task) -> None:
        assert container.container is not None
        await katautils_create.start_container(container.container)
        task.process = container.container.process

    async def _start_exec(self, container: TaskContainer, task: Task) -> None:
        container.init.require(RUNNING)
        assert container.container is not None
        task.io = await ProcessIO.open(task.stdio, self._namespace, task.exec_id)
        if task.is_stdin_released:
            task.io.release_stdin()
        task.process = await container.container.enter(task.exec_id, task.spec)

    async def _report_no_command(self, container: TaskContainer, task: Task, reason: str) -> None:
        if task.io is not None:
            await task.io.report(reason)
        await self._end(container, task, NO_COMMAND)

    async def _watch(self, container: TaskContainer, task: Task, process: Process) -> None:
        try:
            status = await process.wait()
        except KataError as error:
            log.warning("lost sight of process %s: %s", task.id, error, extra={"container": container.id})
            status = KILLED
            # Its watcher says why the machine has ended; the teardown that follows would end it first.
            await asyncio.wait(self._watchers, timeout=CAUSE_S)
        await self._end(container, task, status)

    async def _end(
        self, container: TaskContainer, task: Task, exit_status: int, *, publish: bool = True
    ) -> None:
        """The process is gone: let its output out, then tell. The second time it waits for the first."""
        if task.is_ending:
            await task.has_exited.wait()
            return
        task.is_ending = True
        exited_at = Timestamp()
        exited_at.FromNanoseconds(time.time_ns())
        if not task.exec_id:
            await self._end_execs(container)
        if task.io is not None:
            is_alive = self._sandbox is not None and not self._sandbox.is_dead
            await task.io.drain(DRAIN_IDLE_S, self._answers if is_alive else None)
            if not publish or task.process is None:
                try:
                    await task.io.close()
                except OSError as error:
                    log.warning("output of process %s: %s", task.id, error, extra={"container": container.id})
        task.status, task.exit_status, task.exited_at = STOPPED, exit_status, exited_at
        task.has_exited.set()
        if publish:
            self._publisher.publish(
                events_pb2.TaskExit(
                    container_id=container.id,
                    id=task.id,
                    pid=self._pid,
                    exit_status=exit_status,
                    exited_at=exited_at,
                )
            )
        if container.id == self._main_id and not task.exec_id and self._sandbox is not None:
            self._spawn(self._end_machine(self._sandbox, task.io))

    async def _answers(self) -> None:
        """Return when the guest answers, or is given up."""
        if self._sandbox is not None:
            with suppress(KataError):
                await self._sandbox.agent.check()

    async def _end_machine(self, sandbox: Sandbox, io: ProcessIO | None) -> None:
        """After its main container's end. What a slow reader has not taken yet is still in there."""
        if io is not None:
            await io.ended()
        if self._sandbox is sandbox:
            self._begin_teardown()

    async def _end_execs(self, container: TaskContainer) -> None:
        """The init's end is theirs too; the init's exit is the last one told."""
        watchers = [task.watcher for task in container.execs.values() if task.watcher is not None]
        if watchers:
            await asyncio.wait(watchers, timeout=EXECS_END_S)
        for task in list(container.execs.values()):
            if task.status != CREATED and not task.is_ending:
                await self._end(container, task, KILLED)

    async def exec(self, container_id: str, exec_id: str, spec: dict[str, Any], stdio: Stdio) -> None:
        """Note a process (an OCI process object) that `start` will run in the container."""
        container = self.container(container_id)
        if not exec_id:
            raise InvalidArgumentError(f"exec in container {container_id}: no exec id")
        if exec_id in container.execs:
            raise AlreadyExistsError(f"exec {exec_id} of container {container_id} exists already")
        container.init.require(RUNNING)
        container.execs[exec_id] = Task(
            container_id=container_id,
            exec_id=exec_id,
            stdio=stdio,
            spec={**spec, "terminal": stdio.terminal},
        )
        self._publisher.publish(events_pb2.TaskExecAdded(container_id=container_id, exec_id=exec_id))

    async def delete(self, container_id: str, exec_id: str) -> Task:
        """Forget a process that does not run; with a container's init the container goes, with the pod's main
        container the machine. Returns what it was."""
        container, task = self.container(container_id), self.task(container_id, exec_id)
        await self._finish(self._delete(container, task))
        return task

    async def _delete(self, container: TaskContainer, task: Task) -> None:
        async with container.lock:
            self.task(container.id, task.exec_id)  # whoever came first may have deleted it
            if task.status != CREATED and task.status != STOPPED:
                task.require(STOPPED)
            if task.exec_id:
                await self._close_io(task)
                del container.execs[task.exec_id]
                if container.container is not None:
                    container.container.processes.pop(task.exec_id, None)
                return
            if task.status == CREATED:
                await self._end(container, task, KILLED, publish=False)
            # First: what is unread goes with the container.
            for each in container.tasks():
                await self._close_io(each)
            if container.container is not None:
                if container.id == self._main_id:
                    await self._delete_sandbox()
                elif self._sandbox is not None:
                    await container.container.delete()
                await katautils_create.post_stop_hooks(container.container)
            del self._containers[container.id]
            self._publisher.publish(
                events_pb2.TaskDelete(
                    container_id=container.id,
                    pid=self._pid,
                    exit_status=task.exit_status,
                    exited_at=task.exited_at,
                )
            )

    async def _close_io(self, task: Task) -> None:
        if task.io is not None:
            await task.io.drain(DRAIN_IDLE_S)
            await task.io.close()

    async def kill(self, container_id: str, exec_id: str, signal: int, *, all_processes: bool) -> None:
        container, task = self.container(container_id), self.task(container_id, exec_id)
        if task.status == STOPPED or task.is_ending:
            raise NotFoundError(f"process {task.id}: process already finished")
        if task.status == CREATED and await self._finish(self._kill_created(container, task, signal)):
            return
        try:
            if task.exec_id:
                assert task.process is not None
                await task.process.signal(signal)
            else:
                assert container.container is not None
                await container.container.kill(signal, all_processes=all_processes)
        except (FailedPreconditionError, UnavailableError) as error:
            # It has stopped, or its machine is dead, and its watcher is about to say so.
            raise NotFoundError(f"process {task.id}: process already finished") from error

    async def _kill_created(self, container: TaskContainer, task: Task, signal: int) -> bool:
        """False when it is not created any more: its start was under way."""
        async with container.lock:
            if task.is_ending or task.status == STOPPED:
                raise NotFoundError(f"process {task.id}: process already finished")
            if task.status != CREATED:
                return False
            if task.exec_id:
                task.require(RUNNING)
            if signal not in (SIGKILL, SIGTERM):
                raise FailedPreconditionError(f"container {container.id} is created, expected running")
            if container.container is not None:
                await container.container.stop(force=True)
            await self._end(container, task, 128 + signal)
            return True

    async def pause(self, container_id: str) -> None:
        await self._finish(self._pause(self.container(container_id)))

    async def _pause(self, container: TaskContainer) -> None:
        async with container.lock:
            container.init.require(RUNNING)
            assert container.container is not None
            container.init.status = PAUSING
            try:
                await container.container.pause()
                container.init.require(PAUSING)  # it may have ended meanwhile
            except BaseException:
                if container.init.status == PAUSING:
                    container.init.status = RUNNING
                raise
            container.init.status = PAUSED
            self._publisher.publish(events_pb2.TaskPaused(container_id=container.id))

    async def resume(self, container_id: str) -> None:
        await self._finish(self._resume(self.container(container_id)))

    async def _resume(self, container: TaskContainer) -> None:
        async with container.lock:
            container.init.require(PAUSED)
            assert container.container is not None
            await container.container.resume()
            container.init.require(PAUSED)
            container.init.status = RUNNING
            self._publisher.publish(events_pb2.TaskResumed(container_id=container.id))

    async def resize(self, container_id: str, exec_id: str, width: int, height: int) -> None:
        task = self.task(container_id, exec_id)
        if task.status == CREATED:
            task.size = (width, height)
            return
        task.require(RUNNING, PAUSED)
        assert task.process is not None
        await task.process.resize(width, height)

    async def wait(self, container_id: str, exec_id: str) -> Task:
        """The process, once it has exited."""
        task = self.task(container_id, exec_id)
        await task.has_exited.wait()
        return task

    def running(self, container_id: str) -> Container:
        """The container, which is not stopped. Raises FailedPreconditionError."""
        container = self.container(container_id)
        container.init.require(CREATED, RUNNING, PAUSED, PAUSING)
        if container.container is None:
            raise FailedPreconditionError(f"container {container_id}: {container.no_command}")
        return container.container

    async def close(self) -> None:
        """End whatever there is, and publish it; nothing can be created any more."""
        # A creation that was interrupted is still being undone.
        async with self._create_lock:
            self._is_closed = True
            self._begin_teardown()
            if self._teardown is not None:
                await self._teardown
            await self._end_all(list(self._containers.values()))
            try:
                await self._delete_sandbox()
            except (KataError, OSError) as error:
                # containerd is still to hear of the ends, and to call `delete`.
                log.error("something of the pod stays: %s", error)

    async def _watch_machine(self, sandbox: Sandbox) -> None:
        try:
            reason = await sandbox.monitor()
        except KataError as error:
            reason = str(error)
        log.error("every container of the pod ends: %s", reason, extra={"sandbox": sandbox.id})
        self._begin_teardown()

    async def _end_all(self, containers: Sequence[TaskContainer]) -> None:
        """Their machine is gone, and whoever waits for a process in it is about to notice."""
        inits = [container.init for container in containers]
        with suppress(TimeoutError):
            async with asyncio.timeout(NOTICED_S):
                await asyncio.gather(*(init.has_exited.wait() for init in inits if init.watcher))
        await asyncio.gather(*(self._end(container, container.init, KILLED) for container in containers))

    async def _watch_oom(self, sandbox: Sandbox) -> None:
        while True:
            try:
                container_id = await sandbox.wait_oom()
            except UnavailableError:
                return
            except KataError as error:
                log.warning("no news of the guest's memory: %s", error, extra={"sandbox": sandbox.id})
                await asyncio.sleep(1)
                continue
            log.warning("out of memory", extra={"sandbox": sandbox.id, "container": container_id})
            self._publisher.publish(events_pb2.TaskOOM(container_id=container_id))
            container = self._containers.get(container_id)
            if container is not None and container.is_cri_os:
                with suppress(OSError):
                    (container.bundle / "oom").touch()

    def _begin_teardown(self) -> None:
        """End the machine; what is on the host stays for `delete`."""
        if self._sandbox is None or self._teardown is not None:
            return
        for watcher in self._watchers:
            watcher.cancel()
        if self._management is not None:
            self._management.close()
        self._teardown = self._spawn(self._stop(self._sandbox))

    async def _stop(self, sandbox: Sandbox) -> None:
        try:
            await sandbox.stop()
        except (KataError, OSError) as error:
            log.error("the machine did not end: %s", error, extra={"sandbox": sandbox.id})
        finally:
            # Nobody waits for one that never started. Those to come are of another machine.
            self._spawn(self._end_all(list(self._containers.values())))

    async def _delete_sandbox(self) -> None:
        self._begin_teardown()
        if self._teardown is not None:
            await self._teardown
        if self._sandbox is not None:
            await self._sandbox.delete()
            self._sandbox = None

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def _finish(self, work: Coroutine[Any, Any, T]) -> T:
        """To its end, whatever becomes of the caller: containerd may go and come back meanwhile."""
        return await asyncio.shield(self._spawn(work))
