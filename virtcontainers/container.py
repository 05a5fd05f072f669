"""A container of a sandbox, and its processes, as the host knows them; the truth is in the guest's agent."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from enum import Enum
from typing import TYPE_CHECKING, Any

from virtcontainers.config import ContainerConfig
from virtcontainers.device.disks import ContainerDisks
from virtcontainers.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    KataError,
    NotFoundError,
    UnavailableError,
)
from virtcontainers.guest_spec import guest_spec
from virtcontainers.volumes import Volumes

if TYPE_CHECKING:
    from agent_client.protocols import agent_pb2
    from virtcontainers.copied_files import CopiedFile, FileWatch
    from virtcontainers.sandbox import Sandbox

log = logging.getLogger(__name__)

SIGKILL = 9


class ContainerState(Enum):
    """CREATED -> RUNNING <-> PAUSED -> STOPPED; a container that never started may stop too."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"


class Process:
    """One process in the guest: a container's init (`id` is the container's) or an exec."""

    def __init__(self, container: Container, exec_id: str, *, terminal: bool) -> None:
        self.container = container
        self.id = exec_id
        self.terminal = terminal
        self._exit: asyncio.Task[int] | None = None
        self._stdout_ended = asyncio.Event()
        self._stderr_ended = asyncio.Event()
        if terminal:
            self._stderr_ended.set()

    @property
    def _agent_id(self) -> tuple[str, str]:
        return self.container.id, self.id

    async def read_stdout(self, size: int) -> bytes:
        """At most `size` bytes, b"" at the end: the process closed it, or the machine died."""
        data = await self.container.sandbox.agent.read_stream(*self._agent_id, size, stderr=False)
        if not data:
            self._stdout_ended.set()
        return data

    async def read_stderr(self, size: int) -> bytes:
        """As `read_stdout`; a terminal has only that one."""
        if self.terminal:
            return b""
        data = await self.container.sandbox.agent.read_stream(*self._agent_id, size, stderr=True)
        if not data:
            self._stderr_ended.set()
        return data

    async def write_stdin(self, data: bytes) -> int:
        """Write all or part; returns how much. Waits while the process does not read."""
        return await self.container.sandbox.agent.write_stdin(*self._agent_id, data)

    async def close_stdin(self) -> None:
        await self.container.sandbox.agent.close_stdin(*self._agent_id)

    async def resize(self, width: int, height: int) -> None:
        """Set the terminal's size, in characters."""
        if not self.terminal:
            raise FailedPreconditionError(f"process {self.id} has no terminal to resize")
        await self.container.sandbox.agent.tty_win_resize(*self._agent_id, width, height)

    async def signal(self, signal: int) -> None:
        await self.container.sandbox.agent.signal_process(*self._agent_id, signal)

    async def wait(self) -> int:
        """The exit status, 128 + signal when killed; any number of callers may wait, and again afterwards.

        Somebody has to read stdout and stderr to their ends meanwhile: a process with a full pipe does not
        exit. Raises UnavailableError when the machine died first.
        """
        if self._exit is None:
            self._exit = asyncio.create_task(self._wait())
        return await asyncio.shield(self._exit)

    async def _wait(self) -> int:
        agent = self.container.sandbox.agent
        if not agent.keeps_output:
            # Kata's agent throws away what is unread when it is asked for the exit.
            await self._stdout_ended.wait()
            await self._stderr_ended.wait()
        return await agent.wait_process(*self._agent_id)


class Container:
    """One container. Made by `Sandbox.create_container`, which also undoes what a failed creation left."""

    _volumes: Volumes
    """There once it is shared."""

    def __init__(self, sandbox: Sandbox, config: ContainerConfig) -> None:
        self.sandbox = sandbox
        self.config = config
        self.id = config.id
        self.state = ContainerState.CREATED
        terminal = bool(config.spec.get("process", {}).get("terminal"))
        self.process = Process(self, config.id, terminal=terminal)
        self.processes: dict[str, Process] = {}
        self.resources: dict[str, Any] = config.spec.get("linux", {}).get("resources") or {}
        self._log = logging.LoggerAdapter(log, {"sandbox": sandbox.id, "container": self.id})
        self._undo = AsyncExitStack()
        self.disks = ContainerDisks(config, sandbox.config.hypervisor)
        self._in_guest = False
        self._updating = asyncio.Lock()
        self._exit_watch: asyncio.Task[None] | None = None
        self._file_watch: FileWatch | None = None
        self._guest_spec: dict[str, Any] = {}
        self._sandbox_pidns = False

    def require(self, *states: ContainerState) -> None:
        """Raise FailedPreconditionError unless the container is in one of `states`."""
        if self.state not in states:
            wanted = " or ".join(s.value for s in states)
            raise FailedPreconditionError(f"container {self.id} is {self.state.value}, expected {wanted}")

    def share(self) -> None:
        """Mount and share the root and the volumes, and make the guest's spec of it: host side only, so
        that it can be done while the machine starts. `cleanup` undoes it."""
        sandbox, share, config = self.sandbox, self.sandbox.fs_share, self.config
        self.disks.require_root()
        if not (rootfs := self.disks.root):
            self._undo.callback(share.unshare_root_filesystem, self.id, config.rootfs)
            rootfs = share.share_root_filesystem(self.id, config.rootfs)
        self._undo.callback(share.unshare_files, self.id)
        self._volumes = Volumes(self.id, config.spec, sandbox.config, share, local_dir=sandbox.local_dir)
        self._guest_spec, self._sandbox_pidns = guest_spec(
            self.disks.take_volumes(),
            rootfs=rootfs,
            guest_mount=self._volumes.guest_mount,
            shm_size_bytes=sandbox.config.shm_size_bytes,
            pass_seccomp=not sandbox.config.disable_guest_seccomp,
        )

    @property
    def is_root_mounted(self) -> bool:
        """On the host, by us."""
        return not self.disks.root and bool(self.config.rootfs.mounts)

    async def create(self) -> None:
        """Plug in what `share` could not share, and ask the agent to create it all. On failure the caller
        runs `cleanup`."""
        if self._guest_spec["linux"].get("seccomp") and not self.sandbox.agent.supports_seccomp:
            raise FailedPreconditionError(
                f"container {self.id} has a seccomp profile and the guest's agent does not support seccomp: "
                "set disable_guest_seccomp = true in [runtime] or use a guest image that does"
            )
        self._volumes.fit_agent(self.sandbox.agent.storage_handlers, self._guest_spec)
        await self.disks.attach(self.sandbox, self._guest_spec, self._undo)
        # Set before the calls: a creation that timed out may still have happened.
        self._in_guest = True
        if self._volumes.copied:
            await self._copy_files(self._volumes.copied)
        await self.sandbox.agent.create_container(
            self.id,
            self._guest_spec,
            sandbox_pidns=self._sandbox_pidns,
            timeout_s=self.sandbox.config.create_container_timeout_s,
            storages=[*self.disks.storages, *self._volumes.storages],
            devices=self.disks.devices,
        )
        self._guest_spec = {}
        await self.size_tmpfs(limited=True)

    async def size_tmpfs(self, *, limited: bool = False) -> None:
        """Fit volumes in memory to the machine's; with `limited` also those that have a limit to theirs."""
        is_created = self._in_guest and not self._guest_spec
        if is_created and (storages := self._volumes.tmpfs_to_size(self.sandbox.memory_mib, limited=limited)):
            await self.sandbox.agent.update_ephemeral_mounts(storages)

    async def _copy_files(self, files: list[CopiedFile]) -> None:
        from virtcontainers.copied_files import FileWatch

        self._file_watch = FileWatch(self.sandbox.agent, files, self._log)
        await self._file_watch.start()

    async def start(self) -> None:
        """Raises what the agent says, "executable file not found" for one; the container is then STOPPED."""
        self.require(ContainerState.CREATED)
        # What was done to the pod's namespace since it was created: `ctr run --cni` fills it only now.
        await self.sandbox.network.settle()
        try:
            await self.sandbox.agent.start_container(self.id)
        except KataError:
            self.state = ContainerState.STOPPED
            raise
        self.state = ContainerState.RUNNING
        self._exit_watch = asyncio.create_task(self._watch_exit())

    async def _watch_exit(self) -> None:
        try:
            await self.process.wait()
        except KataError as error:
            self._log.warning("lost: %s", error)
        self.state = ContainerState.STOPPED

    async def enter(self, exec_id: str, process: dict[str, Any]) -> Process:
        """Run one more process (an OCI process object) in the container: created and started at once."""
        self.require(ContainerState.RUNNING)
        if exec_id in self.processes:
            raise AlreadyExistsError(f"process {exec_id} of container {self.id} exists already")
        entered = Process(self, exec_id, terminal=bool(process.get("terminal")))
        self.processes[exec_id] = entered
        guest_process = {k: v for k, v in process.items() if k not in ("apparmorProfile", "selinuxLabel")}
        try:
            await self.sandbox.agent.exec_process(self.id, exec_id, guest_process)
        except BaseException:
            del self.processes[exec_id]
            raise
        return entered

    async def kill(self, signal: int, *, all_processes: bool = False) -> None:
        """Signal the init process, or every process of the container."""
        self.require(ContainerState.CREATED, ContainerState.RUNNING, ContainerState.PAUSED)
        await self.sandbox.agent.signal_process(self.id, "" if all_processes else self.id, signal)

    async def pause(self) -> None:
        self.require(ContainerState.RUNNING)
        await self.sandbox.agent.pause_container(self.id)
        self.require(ContainerState.RUNNING)  # it may have ended meanwhile
        self.state = ContainerState.PAUSED

    async def resume(self) -> None:
        self.require(ContainerState.PAUSED)
        await self.sandbox.agent.resume_container(self.id)
        self.require(ContainerState.PAUSED)
        self.state = ContainerState.RUNNING

    async def update(self, resources: dict[str, Any]) -> None:
        """Set new limits (an OCI linux.resources object): the machine is fitted first, then the cgroup."""
        # The host's CPUs and memory nodes are not the guest's.
        cpu = {k: v for k, v in (resources.get("cpu") or {}).items() if k not in ("cpus", "mems")}
        others = {k: v for k, v in resources.items() if k != "cpu"}
        async with self._updating:
            self.require(ContainerState.CREATED, ContainerState.RUNNING, ContainerState.PAUSED)
            before = self.resources
            self.resources = _updated(before, resources)
            try:
                await self.sandbox.update_resources()
                await self.sandbox.agent.update_container(self.id, {**others, "cpu": cpu} if cpu else others)
            except BaseException:
                self.resources = before
                self.sandbox.release_cpus()
                raise

    async def stats(self) -> agent_pb2.StatsContainerResponse:
        return await self.sandbox.agent.stats_container(self.id)

    async def stop(self, *, force: bool = False) -> None:
        """End every process; with `force` errors of the agent are logged only. Idempotent."""
        if self.state is ContainerState.STOPPED:
            return
        try:
            if self.state is ContainerState.PAUSED:
                await self.resume()
            was_running = self.state is ContainerState.RUNNING
            await self.kill(SIGKILL, all_processes=True)
            if was_running:
                await self.process.wait()
        except NotFoundError:
            pass
        except KataError as error:
            if not force:
                raise
            self._log.warning("stopped by force: %s", error)
        self.state = ContainerState.STOPPED

    async def delete(self) -> None:
        """Remove the container from the guest and the host, and from the sandbox's list.

        Raises FailedPreconditionError while it runs.
        """
        self.require(ContainerState.CREATED, ContainerState.STOPPED)
        await self.cleanup()
        self.sandbox.remove_container(self)

    async def cleanup(self) -> None:
        """Take everything back, whatever state it is in; the guest's refusal is logged. Idempotent."""
        if self._exit_watch is not None:
            self._exit_watch.cancel()
        if self._file_watch is not None:
            # First: it would copy anew what the guest has just removed.
            await self._file_watch.close()
        if self._in_guest and not self.sandbox.is_dead:
            self._in_guest = False
            try:
                await self.sandbox.agent.remove_container(self.id)
            except (NotFoundError, UnavailableError):
                pass
            except KataError as error:
                self._log.warning("the guest did not remove it: %s", error)
        await self._undo.aclose()


def _updated(before: dict[str, Any], resources: dict[str, Any]) -> dict[str, Any]:
    """What an update does not name, or names as 0 or "", stays as it was."""
    updated = {**before, **resources}
    for kind in ("cpu", "memory"):
        named = {key: value for key, value in (resources.get(kind) or {}).items() if value}
        updated[kind] = {**(before.get(kind) or {}), **named}
    return updated
