"""A pod: one machine and the containers in it, after Kata's `sandbox.go`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from virtcontainers import cleanup, mount, persist
from virtcontainers.agent import KataAgent
from virtcontainers.config import GUEST_SHARED_DIR, RUN_VC, ContainerConfig, SandboxConfig
from virtcontainers.container import Container, ContainerState
from virtcontainers.device.disks import GuestVolume
from virtcontainers.device.manager import DeviceManager
from virtcontainers.device_cgroup import DeviceRule, device_rules, sandbox_rules
from virtcontainers.errors import (
    AlreadyExistsError,
    InvalidArgumentError,
    KataError,
    NotFoundError,
    UnavailableError,
    UnimplementedError,
)
from virtcontainers.fs_share import FilesystemShare
from virtcontainers.hypervisor.base import Hypervisor, vm_dir
from virtcontainers.hypervisor.process import find_processes
from virtcontainers.network.network import Network
from virtcontainers.resource_control import PodCgroups, ResourceStats, parse_cpus, pin_thread
from virtcontainers.resources import cpuset, wanted_memory_mib, wanted_vcpus
from virtcontainers.vm import VM, VMConfig
from virtcontainers.volumes import LOCAL

if TYPE_CHECKING:
    from agent_client.protocols import csi_pb2
    from virtcontainers.factory import Factory
    from virtcontainers.network.port_forward import PortForward

log = logging.getLogger(__name__)

T = TypeVar("T")

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
"""As containerd's identifiers: ids become names of files."""

_FACTORYS = re.compile(r"template|(?:template|cache)-[0-9a-f]{12}")
"""In the folder of the pods' machines these are the factory's: its template, and its own machines."""

_RESOLV_CONF_LIMIT_BYTES = 64 << 10
_KILL_TIMEOUT_S = 10.0
_CHECK_TIMEOUT_S = 5.0
_DESTROY_TIMEOUT_S = 10.0
_DEATH_TIMEOUT_S = 3.0
_UNPLUG_TIMEOUT_S = 5.0

Hook = Callable[["Sandbox"], Awaitable[None]]


async def create_sandbox(config: SandboxConfig, factory: Factory, *, prestart: Hook | None = None) -> Sandbox:
    """Make the pod's machine and create its first container, `sandbox.containers[config.container.id]`.

    `prestart` is awaited when the machine runs and before the agent hears of the sandbox. Whatever fails,
    all is undone: nothing of the pod is left on the host. Raises KataError's classes.
    """
    _check_id("sandbox", config.id)
    if _FACTORYS.fullmatch(config.id) or vm_dir(RUN_VC, config.id) == config.factory.template_path:
        raise InvalidArgumentError(
            f"sandbox id {config.id!r}: found a name of the VM factory's in {RUN_VC / 'vm'}, expected another"
        )
    if persist.sandbox_dir(config.id).exists():
        raise AlreadyExistsError(f"sandbox {config.id} exists already: {persist.sandbox_dir(config.id)}")
    sandbox = Sandbox(config, factory)
    sandbox._first_container.disks.require_root()
    try:
        await sandbox._start(prestart)
    except BaseException:
        try:
            await asyncio.shield(sandbox.delete())
        except (KataError, OSError) as left:
            sandbox._log.warning("something of the pod stays: %s", left)
        raise
    return sandbox


def _check_id(what: str, value: str) -> None:
    if not _ID.fullmatch(value):
        raise InvalidArgumentError(f"{what} id {value!r}: expected letters, digits, '_', '.' and '-'")


class Sandbox:
    """One pod, owned by the process that made it."""

    agent: KataAgent
    """There once `create_sandbox` has returned, and in its `prestart`."""

    def __init__(self, config: SandboxConfig, factory: Factory) -> None:
        self.id = config.id
        self.config = config
        self.containers: dict[str, Container] = {}
        self.fs_share = FilesystemShare(config.id)
        self.is_dead = False
        """The machine or its agent is gone: nothing more is asked of them."""
        self._death = ""
        """Why it is dead, once that is known."""
        self._factory = factory
        self._vm: VM | None = None
        self._machine_watch: asyncio.Task[None] | None = None
        self._state = persist.SandboxState(id=config.id, shim_pid=os.getpid())
        self._log = logging.LoggerAdapter(log, {"sandbox": config.id})
        self._deleting = asyncio.Lock()
        self._deleted = False
        spec = config.container.spec
        self._cgroups = PodCgroups(
            config.id,
            spec.get("linux", {}).get("cgroupsPath") or "",
            sandbox_cgroup_only=config.sandbox_cgroup_only,
        )
        self.devices = DeviceManager(config.id, self._devices_allowed)
        self.is_ending = False
        """The machine is about to be ended: nothing is unplugged any more."""
        self.network = Network(
            config.network,
            config.hypervisor,
            sandbox_id=config.id,
            on_planned=self._save_network,
            allowed=self._allowed,
        )
        self._port_forward: PortForward | None = None
        self._pinned = False
        self._resizing = asyncio.Lock()
        self._shared = asyncio.Event()
        """Set when the share is there for containers to be added."""
        self._first_container = Container(self, config.container)

    def _devices_allowed(self, paths: Iterable[Path]) -> contextlib.AbstractContextManager[None]:
        """For this process to open: QEMU opens no disk itself."""
        return self._allowed(device_rules(paths))

    def _allowed(self, rules: Iterable[DeviceRule]) -> contextlib.AbstractContextManager[None]:
        if self._cgroups.overhead is not None:
            return contextlib.nullcontext()  # this process is not in the filtered cgroup
        return self._cgroups.sandbox.devices_allowed(rules)

    @property
    def local_dir(self) -> str:
        """In the guest, on the disk of the first container's root, as in Kata: volumes of the pod's own."""
        first = self._first_container
        return f"{first.disks.root or f'{GUEST_SHARED_DIR}{first.id}/rootfs'}/{LOCAL}"

    @property
    def hypervisor(self) -> Hypervisor:
        """Raises UnavailableError when there is no machine."""
        if self._vm is None:
            raise UnavailableError(f"sandbox {self.id} has no machine")
        return self._vm.hypervisor

    @property
    def hypervisor_pid(self) -> int:
        """QEMU's pid. Raises UnavailableError when there is no machine."""
        return self.hypervisor.pid

    @property
    def memory_mib(self) -> int:
        """What the machine has. Raises UnavailableError when there is none."""
        return self.hypervisor.memory_mib

    async def _start(self, prestart: Hook | None) -> None:
        config = self.config
        _check_id("container", config.container.id)
        container = self._first_container
        self.containers[container.id] = container
        self._state.cgroups = self._cgroups.paths
        self.save()
        self._cgroups.enter(
            sandbox_rules(
                container.resources.get("devices") or [],
                sandbox_cgroup_only=config.sandbox_cgroup_only,
                debug=config.hypervisor.enable_debug,
                others=[Path(config.hypervisor.entropy_source)],
            )
        )
        self._cgroups.sandbox.update_cpuset(*cpuset([container.resources]))
        self.network.start()
        machine = asyncio.create_task(self._get_vm())
        try:
            # The machine starts meanwhile: QEMU is a process of its own.
            shared = asyncio.create_task(self._shared.wait())
            await asyncio.wait({machine, shared}, return_when=asyncio.FIRST_COMPLETED)
            shared.cancel()
            if self._shared.is_set():
                self.fs_share.share_sandbox_bind_mounts(config.sandbox_bind_mounts)
                self._share(container)
        except BaseException:
            machine.cancel()
            await asyncio.wait({machine})
            raise
        await machine
        async with self._told_of_death():
            await self._set_up_guest(container, prestart)

    def _share(self, container: Container) -> None:
        # Of some snapshotters the root is a block device.
        with self._devices_allowed(Path(entry.source) for entry in container.config.rootfs.mounts):
            container.share()

    async def _set_up_guest(self, container: Container, prestart: Hook | None) -> None:
        config = self.config
        if prestart is not None:
            await prestart(self)
        if config.agent.policy:
            # Before anything else is asked: an agent that cannot enforce it gets no pod.
            await self.agent.set_policy(config.agent.policy)
        await _together(
            self.agent.get_guest_details(),
            self.agent.create_sandbox(
                self.id,
                hostname=config.hostname or self.id,
                dns=list(config.network.dns) or _dns(container),
                sandbox_pidns=config.sandbox_pidns,
                shm_size_bytes=config.shm_size_bytes,
                hypervisor=config.hypervisor,
                config=config.agent,
            ),
            self._attach_network(),
        )
        await self.update_resources()
        # While the guest is at work: no port is asked for before.
        await _together(container.create(), self._forward_ports())

    async def _attach_network(self) -> None:
        assert self._vm is not None
        await self.network.attach(self._vm.hypervisor, self.agent)
        # What hooks have done since.
        await self.network.settle()

    async def _forward_ports(self) -> None:
        """What does not work is logged: the pod can do without."""
        if (namespace := self.network.namespace) is None:
            return
        if not self.agent.forwards_ports:
            self._log.info("the guest's agent has no port-forward: the pod's localhost will refuse it")
            return
        from virtcontainers.network.port_forward import PortForward

        try:
            self._port_forward = PortForward(namespace, self.agent, sandbox_id=self.id)
            await self._port_forward.start()
        except KataError as error:
            self._log.warning("the pod's localhost will refuse port-forward: %s", error)

    async def _stop_forwarding(self) -> None:
        if self._port_forward is not None:
            await self._port_forward.close()

    async def _get_vm(self) -> None:
        def on_planned(persisted: dict[str, Any], share_of: str | None = None) -> None:
            self._state.hypervisor = persisted
            self.save()
            if self._shared.is_set():
                return  # a machine that was planned before has failed
            if share_of is None:
                self.fs_share.prepare()
            else:
                self.fs_share.take_over(share_of)
            self._shared.set()

        self._vm = await self._factory.get_vm(
            self.id,
            VMConfig(hypervisor=self.config.hypervisor, agent=self.config.agent),
            shared_path=self.fs_share.shared_path,
            on_planned=on_planned,
        )
        self.agent = KataAgent(self._vm.agent)
        self._machine_watch = asyncio.create_task(self._watch_machine())
        if self._vm.id != self.id:
            # The cache's server has started it, in a cgroup of its own.
            self._cgroups.add_processes(find_processes(self._vm.hypervisor.directory))

    async def create_container(self, config: ContainerConfig) -> Container:
        """Add a container: to the list, then the machine is fitted to the list, then the agent creates it.

        In this order because a container whose creation itself needs memory would not survive the other one.
        When any of it fails, the container leaves the list again and nothing of it stays.
        """
        _check_id("container", config.id)
        self._require_alive()
        if self.is_ending:
            raise UnavailableError(f"container {config.id}: sandbox {self.id} is being ended")
        if config.id in self.containers:
            raise AlreadyExistsError(f"container {config.id} exists already in sandbox {self.id}")
        container = Container(self, config)
        self.containers[config.id] = container
        try:
            self.save()
            self._share(container)
            await self.update_resources()
            async with self._told_of_death():
                await container.create()
        except BaseException:
            await asyncio.shield(self._roll_back(container))
            raise
        return container

    async def _roll_back(self, container: Container) -> None:
        try:
            await container.cleanup()
        except KataError as error:
            # Why there is anything to undo is what the caller is told.
            self._log.error(
                "of container %s, which was not created, something stays: %s", container.id, error
            )
        finally:
            self.remove_container(container)

    def remove_container(self, container: Container) -> None:
        """Take a container that is gone from the guest and the host off the list; the CPUs that it alone had
        are the pod's no longer."""
        self.containers.pop(container.id, None)
        if not self._deleted:
            self.save()
            self.release_cpus()

    def release_cpus(self) -> None:
        """After a container asks for others than before. What fails is logged: the pod keeps more then."""
        if self._vm is None or self.is_ending or self.is_dead:
            return
        try:
            self._control_cpus()
        except KataError as error:
            self._log.warning("the pod's CPUs on the host are not those of its containers: %s", error)

    def _asked(self) -> list[dict[str, Any]]:
        return [c.resources for c in self.containers.values() if c.state is not ContainerState.STOPPED]

    async def update_resources(self) -> None:
        """Fit the machine to what its containers ask for, after Kata's `updateResources`: in steps, and with
        all of it in use when this returns.

        What is too much stays: Kata's runtime takes vCPUs back, and memory only from a virtio-mem device.
        With `static_resource_mgmt` it keeps its size. Raises KataError's classes; the machine is then as
        large as it was, or a part of the way larger.
        """
        assert self._vm is not None
        async with self._resizing:
            try:
                if not self.config.static_resource_mgmt:
                    async with self._told_of_death():
                        await self._resize(self._asked())
            except BaseException:
                # Of a part of the way: what was plugged stays, and is the pod's.
                with contextlib.suppress(KataError):
                    self._constrain()
                raise
            self._constrain()
            self._control_cpus()

    @contextlib.asynccontextmanager
    async def _told_of_death(self) -> AsyncIterator[None]:
        """Who fails because the machine has died, or was ended because the pod was given up, says why."""
        try:
            yield
        except KataError as error:
            if isinstance(error, UnavailableError):
                await self._find_death()
            if self._death:
                raise UnavailableError(f"sandbox {self.id} is dead: {self._death}") from error
            if self.is_ending:
                raise UnavailableError(f"sandbox {self.id} is being ended") from error
            raise

    async def while_alive(self, work: Coroutine[Any, Any, T]) -> T:
        """Its result; for what would not notice the machine's death itself. It is cancelled when that comes
        first: raises UnavailableError, with why."""
        assert self._machine_watch is not None
        task = asyncio.create_task(work)
        async with self._told_of_death():
            try:
                await asyncio.wait({task, self._machine_watch}, return_when=asyncio.FIRST_COMPLETED)
                if not task.done():
                    raise UnavailableError("its machine has ended")
                return task.result()
            finally:
                task.cancel()
                await asyncio.wait({task})

    def _constrain(self) -> None:
        assert self._vm is not None
        self._cgroups.constrain(list(self._vm.hypervisor.get_thread_ids().values()))

    async def _resize(self, asked: list[dict[str, Any]]) -> None:
        assert self._vm is not None
        hypervisor, defaults = self._vm.hypervisor, self.config.hypervisor
        await self._vm.find_size()
        vcpus = wanted_vcpus(defaults.default_vcpus, asked) - hypervisor.vcpus
        memory_mib = wanted_memory_mib(defaults.default_memory_mib, asked) - hypervisor.memory_mib
        # Memory can be refused, vCPUs are as many as there may be: who is refused has got nothing.
        if memory_mib > 0:
            await self._vm.add_memory(memory_mib)
        if vcpus > 0:
            await self._vm.add_cpus(vcpus)
        # Also what an earlier container has plugged and then not waited for.
        await self._vm.online_cpu_memory()
        if memory_mib > 0:
            for container in self.containers.values():
                await container.size_tmpfs()
        if vcpus < 0:
            await hypervisor.hotunplug_vcpus(-vcpus, timeout_s=_UNPLUG_TIMEOUT_S)
        if memory_mib < 0 and defaults.enable_virtio_mem:
            await hypervisor.hotunplug_memory(-memory_mib, timeout_s=_UNPLUG_TIMEOUT_S)

    def _control_cpus(self) -> None:
        """Hold the machine to the pod's CPUs on the host."""
        assert self._vm is not None
        threads = self._vm.hypervisor.get_thread_ids()
        cpus, mems = cpuset(self._asked())
        self._cgroups.sandbox.update_cpuset(cpus, mems)
        if not self.config.enable_vcpus_pinning:
            return
        allowed = parse_cpus(cpus)
        # One for each, or none: pinned are vCPUs that have a CPU of their own.
        pinned = len(allowed) == len(threads)
        for number, index in enumerate(sorted(threads)):
            if pinned:
                pin_thread(threads[index], [allowed[number]])
            elif self._pinned:
                pin_thread(threads[index], allowed or list(os.sched_getaffinity(0)))
        self._pinned = pinned

    def stats(self) -> ResourceStats:
        """What the pod as a whole has used on the host: the machine, its daemons and this process."""
        return self._cgroups.stat()

    def _require_alive(self) -> None:
        if self.is_dead or self._vm is None:
            why = f": {self._death}" if self._death else ""
            raise UnavailableError(f"sandbox {self.id}: its machine is gone{why}")

    async def monitor(self) -> str:
        """Return when the machine or its agent has died, with a sentence that says why.

        From then on nothing more is asked of them: streams end, waits raise UnavailableError.
        """
        self._require_alive()
        assert self._machine_watch is not None
        silence = asyncio.create_task(self._watch_agent())
        try:
            await asyncio.wait({self._machine_watch, silence}, return_when=asyncio.FIRST_COMPLETED)
            if not await self._find_death():
                await self._set_dead(await silence)
        finally:
            silence.cancel()
        await self._stop_forwarding()
        await self.network.close()
        return self._death

    async def _watch_machine(self) -> None:
        """Whoever waits for a guest that has lost its virtiofsd would else wait until a timeout."""
        await self._set_dead(await self.hypervisor.wait_dead())

    async def _find_death(self) -> str:
        """Why it is dead; "" while it lives. The end of a connection is seen before the death that caused
        it, which is waited for."""
        if not self._death and self._machine_watch is not None:
            await asyncio.wait({self._machine_watch}, timeout=_DEATH_TIMEOUT_S)
        return self._death

    async def _set_dead(self, reason: str) -> None:
        if self._death:
            return
        assert self._vm is not None
        self.is_dead, self._death = True, reason
        # Some agents end the machine with the sandbox.
        self._log.log(logging.INFO if self.is_ending else logging.ERROR, "the pod is dead: %s", reason)
        await self._vm.agent.close()

    async def _watch_agent(self) -> str:
        while True:
            await asyncio.sleep(self.config.check_interval_s)
            try:
                await self.agent.check()
            except KataError as error:
                return str(error)

    def _guest_volume(self, device: str) -> GuestVolume:
        for container in self.containers.values():
            if (found := container.disks.guest_volumes.get(device)) is not None:
                return found
        raise NotFoundError(f"sandbox {self.id} has no volume that is block device {device}")

    async def guest_volume_stats(self, device: str) -> csi_pb2.VolumeStatsResponse:
        """Of the file system on a direct volume; `device` is its mount info's. Raises KataError's classes."""
        return await self.agent.get_volume_stats(self._guest_volume(device).mount_point)

    async def resize_guest_volume(self, device: str, size_bytes: int) -> None:
        """Fit the machine's disk, and the file system on it, to a device that has grown to `size_bytes`; an
        image file grows with it. Raises KataError's classes."""
        volume = self._guest_volume(device)
        if volume.device.plugged is not None:
            try:
                await self.hypervisor.resize_block(volume.device.plugged, size_bytes)
            except InvalidArgumentError as error:
                raise InvalidArgumentError(f"volume on {device}: {error}") from error
        await self.agent.resize_volume(volume.mount_point, size_bytes)

    async def wait_oom(self) -> str:
        """The id of the next container in which the guest's kernel killed for memory. Waits for ever on an
        agent that does not tell. Raises UnavailableError when the machine dies."""
        try:
            return await self.agent.get_oom_event()
        except UnimplementedError:
            never: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            return await never

    async def stop(self) -> None:
        """End the containers, the sandbox in the guest and the machine; idempotent.

        What the guest refuses, or is too late with, is logged: the machine is ended all the same.
        """
        self.is_ending = True
        if self._vm is None:
            return
        if not self.is_dead:
            try:
                await self._end_guest()
            except KataError as error:
                self._log.warning("the guest did not end the sandbox: %s", error)
        self.is_dead = True
        if self._machine_watch is not None:
            self._machine_watch.cancel()
        await self._stop_forwarding()
        await self.network.close()
        await self._vm.stop()

    async def _end_guest(self) -> None:
        """Raises KataError when the guest does not answer, or refuses."""
        try:
            async with asyncio.timeout(_KILL_TIMEOUT_S):
                await asyncio.gather(*(c.stop(force=True) for c in self.containers.values()))
        except TimeoutError:
            self._log.warning("not all containers have ended within %g s", _KILL_TIMEOUT_S)
            # One that answers no more would be waited for at every step.
            await self.agent.check(_CHECK_TIMEOUT_S)
        for failure in await asyncio.gather(
            *(c.cleanup() for c in self.containers.values()), return_exceptions=True
        ):
            if failure is not None:
                self._log.warning("of a container something stays: %s", failure)
        # Not a courtesy: it unmounts the share, and with it writes back what the guest has cached.
        await self.agent.destroy_sandbox(_DESTROY_TIMEOUT_S)

    async def delete(self) -> None:
        """Stop, and take everything off the host; idempotent.

        Raises KataError for a machine that would not end; else, after having tried all the rest, for what
        would not go. It is known until it goes, by another call or by `virtcontainers.cleanup`.
        """
        async with self._deleting:
            if self._deleted:
                return
            await self.stop()
            # All is tried, the last first, whatever fails.
            async with contextlib.AsyncExitStack() as rest:
                rest.callback(self.fs_share.cleanup)
                rest.callback(self._cgroups.delete)
                rest.push_async_callback(self._delete_network)
                for container in self.containers.values():
                    if container.is_root_mounted:
                        # A container undoes what it did once, and then no more.
                        rest.callback(mount.unmount_below, container.config.rootfs.target)
                    rest.push_async_callback(container.cleanup)
            cleanup.forget(self.id)
            self._deleted = True

    async def _delete_network(self) -> None:
        try:
            await self.network.delete()
        except KataError as error:
            self._log.warning("the network namespace is not as it was: %s", error)

    def _save_network(self, planned: dict[str, Any]) -> None:
        self._state.network = planned
        self.save()

    def save(self) -> None:
        """Persist what `virtcontainers.cleanup` would need."""
        self._state.rootfs = {
            c.id: str(c.config.rootfs.target) for c in self.containers.values() if c.is_root_mounted
        }
        persist.store(self._state)


async def _together(*works: Coroutine[Any, Any, None]) -> None:
    """The first failure ends the others: what they do would come after it was undone."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def _dns(container: Container) -> list[str]:
    """The lines of the resolv.conf that containerd mounts into the container, as Kata sends them."""
    for entry in container.config.spec.get("mounts") or []:
        if entry["destination"] == "/etc/resolv.conf" and entry.get("source"):
            try:
                text = _read_small(Path(entry["source"]))
            except (OSError, ValueError) as error:
                raise InvalidArgumentError(f"{entry['source']} of /etc/resolv.conf: {error}") from error
            return [line for line in text.splitlines() if line.strip()]
    return []


def _read_small(path: Path) -> str:
    """Of a file that a guest may have written. Raises OSError, and ValueError for what is no small text."""
    # What is no file may not even open.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("found no regular file, expected one")
        data = file.read(_RESOLV_CONF_LIMIT_BYTES + 1)
    if len(data) > _RESOLV_CONF_LIMIT_BYTES:
        raise ValueError(f"found more than {_RESOLV_CONF_LIMIT_BYTES} bytes")
    return data.decode()
