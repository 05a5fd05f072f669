"""The pod: its containers, storages and shared namespaces."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import os
import signal
import socket
from typing import Any

from agent_client.protocols import agent_pb2, oci_json
from guest.agent import copy_file, linux
from guest.agent.cgroup import CGROUP_PARENT, Cgroup, OOMWatcher
from guest.agent.container import Container, Crun
from guest.agent.device import add_devices
from guest.agent.mount import mounts
from guest.agent.reaper import Reaper
from guest.agent.spec import GuestNamespaces, find_hooks, guest_spec
from guest.agent.storage import Storages, disks
from guest.agent.threads import in_thread
from ttrpc import Code, StatusError

log = logging.getLogger(__name__)

RUN_DIRECTORY = "/run/kata-agent"
_OOM_EVENTS_KEPT = 100
_PAUSE_COMMAND = ("/bin/busybox", "sleep", "2147483647")
_KILL_AGAIN_S = 0.05
_PAUSE_ENDS_S = 5.0


class Sandbox:
    """One per machine, from the agent's start on; it outlives the host's connections."""

    def __init__(self, reaper: Reaper) -> None:
        self.id = ""
        self._created = False
        self.containers: dict[str, Container] = {}
        self._storages = Storages()
        self._container_mounts: dict[str, list[str]] = {}
        self._crun = Crun(reaper, RUN_DIRECTORY)
        self.reaper = reaper
        self._hooks: dict[str, list[dict[str, Any]]] = {}
        self._wants_pause = False
        self._pause: tuple[int, asyncio.Future[int]] | None = None
        """The process that holds the shared PID namespace, and its exit to come."""
        self._shared_pid_namespace: str | None = None
        self._creating: dict[str, asyncio.Event] = {}
        """Set when it has ended, in one way or the other."""
        self._oom = OOMWatcher(self._add_oom_event)
        self._oom_events: collections.deque[str] = collections.deque(maxlen=_OOM_EVENTS_KEPT)
        self._oom_added = asyncio.Event()
        # The last is the one that hides the others.
        hierarchies = [point for point, root, fstype in mounts() if fstype == "cgroup2" and root == "/"]
        self._cgroup_root = hierarchies[-1] if hierarchies else "/sys/fs/cgroup"

    def prepare(self) -> None:
        """For the first container, before there is one. Raises OSError."""
        self._crun.prepare()

    async def create(self, request: agent_pb2.CreateSandboxRequest) -> None:
        """Can be called again: a host that lost the answer of its first call asks so."""
        if self._created and request.sandbox_id != self.id:
            raise StatusError(Code.ALREADY_EXISTS, f"this machine is sandbox {self.id}'s")
        for module in request.kernel_modules:
            from guest.agent.modules import load_module

            load_module(module.name, module.parameters)
        if request.hostname:
            socket.sethostname(request.hostname)
        if not self._created:
            await self._storages.add(request.storages, None)
        if request.guest_hook_path:
            self._hooks = find_hooks(request.guest_hook_path)
        if request.dns:
            with open("/etc/resolv.conf", "w") as file:
                file.writelines(f"{line}\n" for line in request.dns)
        self._wants_pause = request.sandbox_pidns
        self.id = request.sandbox_id
        self._created = True

    async def destroy(self) -> None:
        """Every container and mount; errors are logged."""
        # All at once: what one does to the machine keeps none of the others.
        for container in self.containers.values():
            container.cgroup.signal(signal.SIGKILL)
        for container_id in list(self.containers):
            try:
                await self.remove_container(container_id)
            except (OSError, StatusError) as error:
                log.warning("not removed: %s", error, extra={"container": container_id})
        pause = self._pause
        if pause is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pause[0], signal.SIGKILL)
        await self._storages.release_all()
        await in_thread(os.sync)
        if pause is not None:
            # Nobody is to join its namespace while it ends. Last: it ends after all that are in it, of which
            # one may hang.
            await asyncio.wait({pause[1]}, timeout=_PAUSE_ENDS_S)

    def container(self, container_id: str) -> Container:
        """Raises StatusError (NOT_FOUND)."""
        try:
            return self.containers[container_id]
        except KeyError:
            raise StatusError(Code.NOT_FOUND, f"container {container_id!r} does not exist") from None

    async def create_container(self, request: agent_pb2.CreateContainerRequest) -> None:
        """Raises StatusError; nothing is left of the container then."""
        container_id = request.container_id
        if not container_id or "/" in container_id or container_id in (".", ".."):
            raise StatusError(Code.INVALID_ARGUMENT, f"{container_id!r} is no container id")
        if container_id in self.containers or container_id in self._creating:
            raise StatusError(Code.ALREADY_EXISTS, f"container {container_id} exists already")
        ended = self._creating[container_id] = asyncio.Event()
        try:
            await self._create_container(request)
        finally:
            del self._creating[container_id]
            ended.set()

    async def _create_container(self, request: agent_pb2.CreateContainerRequest) -> None:
        container_id = request.container_id
        spec = oci_json.spec_to_json(request.OCI)
        bundle = f"{RUN_DIRECTORY}/bundles/{container_id}"
        cgroup_path = f"{CGROUP_PARENT}/{container_id}"
        container = Container(
            self._crun,
            container_id,
            bundle=bundle,
            cgroup=self._cgroup(container_id),
        )
        await add_devices(list(request.devices), spec)
        storages: list[str] = []
        try:
            storages = await self._storages.add(request.storages, bundle)
            # Late: meanwhile it may have come, or ended.
            pid_namespace = await self._pid_namespace(container_id) if request.sandbox_pidns else None
            try:
                prepared = guest_spec(
                    spec,
                    cgroup_path=cgroup_path,
                    namespaces=GuestNamespaces(
                        network=f"/proc/{os.getpid()}/ns/net",
                        ipc=f"/proc/{os.getpid()}/ns/ipc",
                        uts=f"/proc/{os.getpid()}/ns/uts",
                        pid=pid_namespace,
                    ),
                    hooks=self._hooks,
                    disks=disks(request.storages),
                )
            except ValueError as error:
                raise StatusError(Code.INVALID_ARGUMENT, str(error)) from error
            try:
                await container.create(prepared, owns_pid_namespace=pid_namespace is None)
            except StatusError as error:
                if pid_namespace in (None, self._shared_pid_namespace):
                    raise
                reason = f"the PID namespace that container {container_id} was to share has ended: {error}"
                raise StatusError(Code.FAILED_PRECONDITION, reason) from error
        except BaseException:
            await self._storages.release(storages, bundle)
            container.remove_files()
            copy_file.remove_copies(container_id)
            raise
        if not self.containers and self._shared_pid_namespace is None:
            # Who shares a PID namespace without a pause process shares the first container's.
            self._share_pid_namespace(container.init.pid, container.init.exited)
        self.containers[container_id] = container
        self._container_mounts[container_id] = storages
        self._oom.add(container_id, container.cgroup)
        # Before those who wait for the exit hear of it: it is the reason.
        container.init.exited.add_done_callback(lambda _: self._oom.check(container_id))

    def _cgroup(self, container_id: str) -> Cgroup:
        return Cgroup(f"{self._cgroup_root.rstrip('/')}{CGROUP_PARENT}/{container_id}")

    async def remove_container(self, container_id: str) -> None:
        """Also one whose creation is under way, for which the host has no more patience: it is cut short.

        Raises StatusError (NOT_FOUND) when there is none, then.
        """
        while (ended := self._creating.get(container_id)) is not None:
            self._cgroup(container_id).signal(signal.SIGKILL)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), _KILL_AGAIN_S)
        if container_id not in self.containers:
            # They come before the container does, which then may not have come.
            copy_file.remove_copies(container_id)
        container = self.container(container_id)
        async with container.removal:
            if self.containers.get(container_id) is not container:
                return  # another call has removed it
            await container.stop()
            self._oom.remove(container_id)
            await self._storages.release(self._container_mounts.get(container_id, []), container.bundle)
            self._container_mounts.pop(container_id, None)
            container.remove_files()
            copy_file.remove_copies(container_id)
            del self.containers[container_id]

    async def _pid_namespace(self, container_id: str) -> str | None:
        """The namespace to join; None when the container about to be made is the one to be joined."""
        if self._wants_pause and self._pause is None:
            pid = self._start_pause()
            exited = self.reaper.watch(pid)
            self._pause = pid, exited
            exited.add_done_callback(self._pause_ended)
            self._share_pid_namespace(pid, exited)
        if self._shared_pid_namespace is None:
            # One that came earlier may bring it, and one that goes leave it to us.
            for other, ended in list(self._creating.items()):
                if other == container_id:
                    break
                await ended.wait()
            for container in list(self.containers.values()):
                if container.removal.locked():
                    async with container.removal:
                        pass
        if self._shared_pid_namespace is None and self.containers:
            raise StatusError(Code.FAILED_PRECONDITION, "the sandbox has no PID namespace to share")
        return self._shared_pid_namespace

    def _share_pid_namespace(self, pid: int, exited: asyncio.Future[int]) -> None:
        """Others join that of this process, which is its first: it ends with it, and then the pid may come to
        mean another."""
        self._shared_pid_namespace = path = f"/proc/{pid}/ns/pid"

        def end(_: asyncio.Future[int]) -> None:
            if self._shared_pid_namespace == path:
                self._shared_pid_namespace = None

        exited.add_done_callback(end)

    def _pause_ended(self, _: asyncio.Future[int]) -> None:
        self._pause = None

    @staticmethod
    def _start_pause() -> int:
        """A process that does nothing but hold a PID namespace and let the kernel reap its orphans."""
        own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        try:
            # Children are born into the new namespace until we return; no other is started meanwhile.
            linux.unshare(linux.CLONE_NEWPID)
            try:
                pid = os.fork()
                if pid == 0:
                    try:
                        signal.set_wakeup_fd(-1)
                        # Inherited by the program: a parent that ignores it has no zombies.
                        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
                        os.setsid()
                        os.execv(_PAUSE_COMMAND[0], _PAUSE_COMMAND)
                    finally:
                        os._exit(127)
                return pid
            finally:
                linux.setns(own, linux.CLONE_NEWPID)
        finally:
            os.close(own)

    def _add_oom_event(self, container_id: str) -> None:
        log.warning("a process was killed for memory", extra={"container": container_id})
        self._oom_events.append(container_id)
        self._oom_added.set()

    async def oom_event(self) -> str:
        """Wait for the next container that ran out of memory. A cancelled wait loses no event."""
        while not self._oom_events:
            self._oom_added.clear()
            await self._oom_added.wait()
        return self._oom_events.popleft()
