"""The QEMU driver."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
import socket
import subprocess
from collections.abc import Collection, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from agent_client.transports import AgentAddress, HybridVsockAddress, SerialAddress, VsockAddress
from virtcontainers.config import (
    MAX_SOCKET_PATH_BYTES,
    RUN_VC,
    Accel,
    AgentConfig,
    AgentTransport,
    HypervisorConfig,
    SharedFS,
)
from virtcontainers.errors import FailedPreconditionError, InvalidArgumentError
from virtcontainers.hypervisor import capabilities, hotplug_net
from virtcontainers.hypervisor.accel import decide_accel
from virtcontainers.hypervisor.base import (
    BootTimeout,
    Hypervisor,
    HypervisorError,
    NetDevice,
    Persisted,
    QMPClosed,
    QMPFailed,
    QMPTimeout,
    RestoreFailed,
    VMState,
    vm_dir,
)
from virtcontainers.hypervisor.capabilities import Capability
from virtcontainers.hypervisor.hotplug import Hotplug
from virtcontainers.hypervisor.hotplug_block import BlockDrive, BlockHotplug, PluggedDrive
from virtcontainers.hypervisor.logs import ConsoleLog, with_tail
from virtcontainers.hypervisor.memory_file import copy_extents
from virtcontainers.hypervisor.process import MachineProcess, end_processes
from virtcontainers.hypervisor.qemu_cmdline import (
    BRIDGE_SLOTS,
    HOTPLUG_PORTS,
    BridgeSlot,
    MachineFiles,
    QemuCommandLine,
    copies_memory,
    plan,
    shares_memory,
    virtio_fs_device,
)
from virtcontainers.hypervisor.qmp import COMMAND_TIMEOUT_S, QMP
from virtcontainers.hypervisor.vhost_vsock import (
    VHOST_DEVICE_VSOCK,
    GuestCID,
    connected,
    find_context_id,
    find_vhost_device_vsock,
    resolve_transport,
    unread_bytes,
    vhost_device_vsock_argv,
)
from virtcontainers.hypervisor.virtiofsd import Virtiofsd, detect_flavour, find_virtiofsd

log = logging.getLogger(__name__)

T = TypeVar("T")

MACHINE_TYPE = "q35"
_MIGRATION_TIMEOUT_S = 30.0
_UNPLUG_TIMEOUT_S = 30.0
_HELP_TIMEOUT_S = 30.0
_TAKE_BACK_TIMEOUT_S = 5.0
"""The guest refuses at once, or is at work already; nobody's container waits for it."""
_PLUGGED_POLL_S = 0.01
_VSOCK = "vsock0"
_VSOCK_SOCKET = "vsock"
_VHOST_DEVICE_VSOCK = "vhost-device-vsock"
_SHARE = "fs0"
_LAST_WORDS_TIMEOUT_S = 1.0
_DAEMONS_END_TIMEOUT_S = 0.2
_QEMUS_END_TIMEOUT_S = 2.5
"""Of a QEMU that its daemon has seen end: its memory is given back first. Less than who asks why waits."""
_CONSOLE_TAIL_LINES = 30
"""A panic's reason stands above its trace of some 20 lines."""
# CPU#0\nRAX=... RIP=ffffffff81c01220 RFL=00000046 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=0
_REGISTERS = re.compile(r"CPU#(\d+).*?[RE]IP=([0-9a-f]+) [RE]FL=([0-9a-f]+).*?HLT=([01])", re.DOTALL)
_INTERRUPT_FLAG = 0x200


class Qemu(Hypervisor):
    """One QEMU, with its virtiofsd and vhost-device-vsock; they die with the process that started them,
    unless they `outlives_us`.

    `shared_path` is exported to the guest, tag kataShared, in the way of `shared_fs`; None: nothing is.
    """

    def __init__(
        self,
        vm_id: str,
        config: HypervisorConfig,
        agent: AgentConfig,
        *,
        shared_path: Path | None,
        run_vc: Path = RUN_VC,
        outlives_us: bool = False,
    ) -> None:
        self.id = vm_id
        self.config = config
        self.directory = vm_dir(run_vc, vm_id)
        self.files = MachineFiles(directory=self.directory)
        self._agent = agent
        self._shared_path = shared_path
        self._run_vc = run_vc
        self._outlives_us = outlives_us
        self._others: dict[str, int] | None = None
        """The pids of a machine that another process has started, QEMU's first."""
        self._link: Path | None = None
        # Into a port: it is to be taken out again.
        self._plugs_hvsock = config.boot_from_template or config.boot_to_be_template or outlives_us
        self._vsock_port = ""
        self._vsock_connection: socket.socket | None = None
        """QEMU's to vhost-device-vsock, until the agent may be dialled."""
        self._log = logging.LoggerAdapter(log, {"sandbox": vm_id})
        self._command_line: QemuCommandLine | None = None
        self._transport = AgentTransport.AUTO
        self._guest_cid: GuestCID | None = None
        self._virtiofsd: Path | None = None
        self._vhost_device_vsock: Path | None = None
        self._qemu: MachineProcess | None = None
        self._daemons: list[MachineProcess] = []
        self._qmp: QMP | None = None
        self._console: ConsoleLog | None = None
        self._thread_ids: dict[int, int] = {}
        self._memory_mib = config.default_memory_mib
        self._hotplug: Hotplug | None = None
        self._block_hotplug: BlockHotplug | None = None
        self._free_ports = [f"rp{number}" for number in range(HOTPLUG_PORTS + config.pcie_root_port)]
        self._net_slots: dict[str, BridgeSlot] = {}
        self._free_slots = [
            BridgeSlot(bridge, slot) for bridge in range(config.default_bridges) for slot in BRIDGE_SLOTS
        ]

    # -- planning

    def create_vm(self) -> None:
        self.require(VMState.NEW)
        config = self.config
        if config.machine_type != MACHINE_TYPE:
            raise InvalidArgumentError(f'machine_type "{config.machine_type}": expected "{MACHINE_TYPE}"')
        _require_program("QEMU", "path", config.path)
        if config.kernel is None:
            raise InvalidArgumentError("no guest kernel: set kernel in [hypervisor.qemu]")
        _require_file("guest kernel", "kernel", config.kernel)
        if (config.initrd is None) == (config.image is None):
            found = "both are" if config.initrd else "neither is"
            raise InvalidArgumentError(f"one of initrd and image is needed in [hypervisor.qemu], {found} set")
        if config.initrd is not None:
            _require_file("guest initrd", "initrd", config.initrd)
        if config.image is not None:
            _require_file("guest image", "image", config.image)
        if config.firmware is not None:
            _require_file("firmware", "firmware", config.firmware)
        _require("entropy source", "entropy_source", Path(config.entropy_source))
        if self._shared_path is not None and config.shared_fs is SharedFS.VIRTIO_FS:
            self._virtiofsd = find_virtiofsd(config)
            if config.virtio_fs_cache_size_mib:
                _require_dax(config)
        decision = decide_accel(config.accel)
        if decision.accel is Accel.TCG:
            self._log.warning("the machine is emulated (TCG), which is slow: %s", decision.reason)
        self._transport = resolve_transport(self._agent.transport)
        if self._transport is AgentTransport.HVSOCK:
            self._vhost_device_vsock = find_vhost_device_vsock(VHOST_DEVICE_VSOCK)
        if self._transport is AgentTransport.VSOCK:
            # No trace on the host but the open descriptor, which ends with us or with stop_vm.
            self._guest_cid = find_context_id()
        self._command_line = plan(
            config,
            self._agent,
            self.files,
            name=f"sandbox-{self.id}",
            accel=decision.accel,
            transport=self._transport,
            guest_cid=self._guest_cid.cid if self._guest_cid else None,
            shared_path=self._shared_path,
            host_memory_mib=host_memory_mib(),
            plugs_hvsock=self._plugs_hvsock,
        )
        self._require_addressable()
        self.state = VMState.CREATED

    def _require_addressable(self) -> None:
        """Raise InvalidArgumentError for an id that makes the path of a socket longer than an address."""
        sockets = [self.files.qmp_socket]
        if self._transport is not AgentTransport.VSOCK:
            sockets.append(self.files.agent_socket)
        if self._virtiofsd is not None:
            sockets.append(self.files.virtiofsd_socket)
        if self._vhost_device_vsock is not None:
            sockets.append(self.files.vhost_vsock_socket)
        longest = max(sockets, key=lambda path: len(os.fsencode(path)))
        if (size := len(os.fsencode(longest))) > MAX_SOCKET_PATH_BYTES:
            raise InvalidArgumentError(
                f"id {self.id!r} is {size - MAX_SOCKET_PATH_BYTES} bytes too long: found a socket's path of "
                f"{size} bytes, {longest}, expected at most {MAX_SOCKET_PATH_BYTES}"
            )

    @property
    def command_line(self) -> QemuCommandLine:
        """Valid from CREATED on."""
        if self._command_line is None:
            raise HypervisorError("the machine is new, expected created")
        return self._command_line

    @property
    def agent_address(self) -> AgentAddress:
        self._require_planned()
        match self._transport:
            case AgentTransport.VSOCK:
                assert self._guest_cid is not None
                return VsockAddress(self._guest_cid.cid)
            case AgentTransport.HVSOCK:
                return HybridVsockAddress(self.files.agent_socket)
            case _:
                return SerialAddress(self.files.agent_socket)

    def save(self) -> Persisted:
        self._require_planned()
        persisted = {"type": "qemu", "id": self.id, "directory": str(self.directory)}
        return persisted | ({"link": str(self._link)} if self._link else {})

    def _require_planned(self) -> None:
        if self.state is VMState.NEW:
            raise HypervisorError("the machine is new, expected created")

    # -- starting and stopping

    async def start_vm(self, timeout_s: float) -> None:
        self.require(VMState.CREATED)
        try:
            await self._start(asyncio.get_running_loop().time() + timeout_s)
        except BaseException:
            await asyncio.shield(self.stop_vm())
            raise

    async def _start(self, deadline: float) -> None:
        clock = asyncio.get_running_loop().time
        started_at = clock()
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        await self._start_daemons(deadline)
        self._console = ConsoleLog(self.files.console_log)
        with ExitStack() as stack:
            # The sockets listen before QEMU exists: whoever connects waits for it instead of trying again.
            fds = {"qmp": stack.enter_context(_listening(self.files.qmp_socket)).fileno()}
            if self._transport is AgentTransport.SERIAL:
                fds["agent"] = stack.enter_context(_listening(self.files.agent_socket)).fileno()
            if self._guest_cid is not None:
                fds["vhost"] = self._guest_cid.vhost_fd
            if self._vsock_connection is not None:
                fds["vsock"] = self._vsock_connection.fileno()
            memory_fd = self._own_memory(stack) if self._copies_memory else -1
            fds["memory"] = memory_fd
            khz = None
            if self.command_line.calibrates_tsc:
                from virtcontainers.hypervisor.tsc import tsc_khz

                khz = await tsc_khz()
            argv = self.command_line.argv(fds, tsc_khz=khz)
            self._log.debug("starting %s", argv)
            self._qemu = MachineProcess.start(
                "qemu",
                argv,
                directory=self.directory,
                stdout=self._console.write_fd,
                pass_fds=[fd for fd in fds.values() if fd >= 0],
                outlives_us=self._outlives_us,
                capabilities=capabilities.QEMU,
                own_network=True,
            )
            if memory_fd >= 0:
                # While QEMU starts: it looks into the memory only when it takes the devices' state.
                await self._copy_memory(memory_fd)
        self._console.started()
        self._release_guest_cid()
        try:
            self._qmp = await QMP.connect(self.files.qmp_socket, timeout_s=max(0.0, deadline - clock()))
        except HypervisorError as error:
            raise await self._start_failure(error) from error
        if self.config.boot_from_template:
            await self._restore(max(0.0, deadline - clock()))
        try:
            if self._plugs_hvsock:
                await self._plug_hvsock()
            if self.config.boot_from_template:
                await self._plug_share()
            await self._find_vcpus()
        except QMPClosed as error:
            raise await self._start_failure(error) from error
        self.state = VMState.PAUSED if self.config.boot_from_template else VMState.RUNNING
        self._log.debug("QEMU (pid %d) runs after %.0f ms", self._qemu.pid, 1000 * (clock() - started_at))

    async def _restore(self, timeout_s: float) -> None:
        assert self._qmp is not None and self._qemu is not None
        assert self.config.devices_state_path is not None
        try:
            await self._qmp.migrate_incoming(self.config.devices_state_path, timeout_s=timeout_s)
        except QMPFailed as error:
            with contextlib.suppress(TimeoutError):
                # It ends by itself when it cannot make anything of the state.
                async with asyncio.timeout(_LAST_WORDS_TIMEOUT_S):
                    await self._qemu.wait()
            # Whoever does not answer in time may do so of any state.
            innocent = self.was_killed or isinstance(error, QMPTimeout)
            kind = HypervisorError if innocent else RestoreFailed
            raise kind(with_tail(str(error), self._qemu.log)) from error

    @property
    def _copies_memory(self) -> bool:
        return copies_memory(self.config, self._transport, self._shared_path)

    def _own_memory(self, stack: ExitStack) -> int:
        fd = os.memfd_create("kata-py-memory", os.MFD_CLOEXEC)
        stack.callback(os.close, fd)
        os.ftruncate(fd, self.config.default_memory_mib << 20)
        return fd

    async def _copy_memory(self, target: int) -> None:
        assert self.config.memory_path is not None
        clock = asyncio.get_running_loop().time
        started_at, copied = clock(), 0
        try:
            source = os.open(self.config.memory_path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                for sent in copy_extents(source, target):
                    copied += sent
                    await asyncio.sleep(0)
            finally:
                os.close(source)
        except OSError as error:
            raise HypervisorError(f"memory of the template, {self.config.memory_path}: {error}") from error
        self._log.info(
            "the machine has a copy of the template's memory, which a vhost-user daemon needs shared: "
            "%d MiB in %.0f ms",
            copied >> 20,
            1000 * (clock() - started_at),
        )

    async def _plug_hvsock(self) -> None:
        if self._vsock_connection is None:
            return
        await self.monitor.send_fd(_VSOCK_SOCKET, self._vsock_connection.fileno())
        await self._add_socket(_VSOCK_SOCKET, {"type": "fd", "data": {"str": _VSOCK_SOCKET}})
        self._vsock_port = self.take_port()
        device = {"driver": "vhost-user-vsock-pci", "id": _VSOCK, "chardev": _VSOCK_SOCKET}
        await self.monitor.execute("device_add", {**device, "bus": self._vsock_port})

    async def _plug_share(self) -> None:
        """It cannot be saved, and therefore no template has it."""
        if self._virtiofsd is None:
            return
        path = str(self.files.virtiofsd_socket)
        await self._add_socket("fs", {"type": "unix", "data": {"path": path}})
        device = {"driver": "vhost-user-fs-pci", "id": _SHARE, **virtio_fs_device(self.config, "fs")}
        await self.monitor.execute("device_add", {**device, "bus": self.take_port()})

    async def wait_plugged(self, timeout_s: float) -> None:
        """Return when the guest drives the share that was plugged into it. Raises BootTimeout."""
        if self._virtiofsd is not None and self.config.boot_from_template:
            await self._wait_driven(_SHARE, timeout_s)

    async def wait_dialable(self, timeout_s: float) -> None:
        """Return when the agent's address may be dialled. Raises BootTimeout.

        vhost-device-vsock's worker ends, without a word, when somebody dials while QEMU gives it the memory
        and the rings; nobody is ever answered then. So it is to have read all that QEMU has sent before.
        """
        if self._vsock_connection is None:
            return
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout_s
        await self._wait_driven(_VSOCK, timeout_s)
        while unread := unread_bytes(self._vsock_connection):
            if clock() > deadline:
                raise BootTimeout(f"vhost-device-vsock has not read {unread} bytes within {timeout_s:g} s")
            await asyncio.sleep(_PLUGGED_POLL_S)
        # To do what it has read takes it a moment more.
        await asyncio.sleep(_PLUGGED_POLL_S)
        self._close_vsock_connection()

    def _close_vsock_connection(self) -> None:
        if self._vsock_connection is not None:
            self._vsock_connection.close()
            self._vsock_connection = None

    async def _wait_driven(self, device_id: str, timeout_s: float) -> None:
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout_s
        while True:
            try:
                device = {"path": f"/machine/peripheral/{device_id}/virtio-backend"}
                found = await self.monitor.execute("x-query-virtio-status", device)
            except QMPFailed as error:
                self._log.debug("not known whether the guest drives %s: %s", device_id, error)
                return  # a QEMU of before 7.2; our agent waits for it, too
            statuses = found["status"]["statuses"]
            if any("DRIVER_OK" in status for status in statuses):
                return
            if clock() > deadline:
                raise BootTimeout(
                    f"the guest does not drive {found['name']} within {timeout_s:g} s: "
                    f"found status {statuses}"
                )
            await asyncio.sleep(_PLUGGED_POLL_S)

    async def _add_socket(self, chardev: str, address: dict[str, object]) -> None:
        backend = {"type": "socket", "data": {"addr": address, "server": False}}
        await self.monitor.execute("chardev-add", {"id": chardev, "backend": backend})

    async def unplug_hvsock(self) -> None:
        """Rid a running machine, to which nobody is connected, of the device of hvsock and its daemon.

        It cannot be saved; and who continues a paused machine that he has not made could not tell when it
        may be dialled, see `wait_dialable`. `attach` gives it new ones.
        """
        self.require(VMState.RUNNING)
        if self._transport is not AgentTransport.HVSOCK:
            return
        await self.monitor.unplug(_VSOCK, timeout_s=_UNPLUG_TIMEOUT_S)
        deadline = asyncio.get_running_loop().time() + _UNPLUG_TIMEOUT_S
        while True:
            try:
                await self.monitor.execute("chardev-remove", {"id": _VSOCK_SOCKET})
                break
            except QMPFailed:
                # Busy for a moment: the device is not listed any more before QEMU has taken it apart.
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(_PLUGGED_POLL_S)
        self._free_ports.insert(0, self._vsock_port)
        daemon = next(daemon for daemon in self._daemons if daemon.name == _VHOST_DEVICE_VSOCK)
        self._daemons.remove(daemon)
        await daemon.terminate()
        for path in (self.files.vhost_vsock_socket, self.files.agent_socket):
            path.unlink(missing_ok=True)

    def take_port(self) -> str:
        """An empty pcie-root-port, for a device to be plugged in. Raises HypervisorError."""
        if not self._free_ports:
            ports = HOTPLUG_PORTS + self.config.pcie_root_port
            raise HypervisorError(
                f"all {ports} pcie-root-ports are used (pcie_root_port in [hypervisor.qemu])"
            )
        return self._free_ports.pop(0)

    def take_slot(self) -> BridgeSlot:
        """A free slot of a PCI bridge, for a device that needs no PCIe. Raises HypervisorError."""
        if not self._free_slots:
            slots = self.config.default_bridges * len(BRIDGE_SLOTS)
            raise HypervisorError(
                f"all {slots} slots of the PCI bridges are used (default_bridges in [hypervisor.qemu])"
            )
        return self._free_slots.pop(0)

    def give_back_slot(self, slot: BridgeSlot) -> None:
        """Once what was in it has gone."""
        self._free_slots.append(slot)

    async def _start_daemons(self, deadline: float) -> None:
        if self._virtiofsd is not None:
            assert self._shared_path is not None
            daemon = Virtiofsd(
                path=self._virtiofsd,
                flavour=detect_flavour(self._virtiofsd),
                shared_path=self._shared_path,
                cache=self.config.virtio_fs_cache,
                extra_args=self.config.virtio_fs_extra_args,
            )
            with _listening(self.files.virtiofsd_socket) as listener:
                fd = listener.fileno()
                self._start_daemon("virtiofsd", daemon.argv(fd), fd, kept=daemon.capabilities)
        await self._start_vhost_device_vsock(deadline)

    async def _start_vhost_device_vsock(self, deadline: float) -> None:
        if self._vhost_device_vsock is None:
            return
        argv = vhost_device_vsock_argv(
            self._vhost_device_vsock,
            socket_path=self.files.vhost_vsock_socket,
            uds_path=self.files.agent_socket,
        )
        process = self._start_daemon(_VHOST_DEVICE_VSOCK, argv)
        # It takes no descriptor: it listens when it listens.
        while (connection := connected(self.files.vhost_vsock_socket)) is None:
            if not process.running:
                raise HypervisorError(await process.wait_with_tail())
            if asyncio.get_running_loop().time() > deadline:
                raise BootTimeout(with_tail("vhost-device-vsock does not listen", process.log))
            await asyncio.sleep(0.002)
        self._vsock_connection = connection

    def _start_daemon(
        self,
        name: str,
        argv: list[str],
        *pass_fds: int,
        kept: Collection[Capability] | None = frozenset(),
    ) -> MachineProcess:
        process = MachineProcess.start(
            name,
            argv,
            directory=self.directory,
            pass_fds=pass_fds,
            outlives_us=self._outlives_us,
            capabilities=kept,
        )
        self._daemons.append(process)
        return process

    async def _start_failure(self, error: HypervisorError) -> HypervisorError:
        """Why QMP does not answer: as a rule because somebody died, who said why in his log, or on the
        console when it was the guest."""
        assert self._qemu is not None
        with contextlib.suppress(TimeoutError):
            # QMP's end is seen before the death that caused it.
            async with asyncio.timeout(_LAST_WORDS_TIMEOUT_S):
                await self._qemu.wait()
        with contextlib.suppress(TimeoutError):
            # And QEMU's before the daemon's that it died of.
            async with asyncio.timeout(_DAEMONS_END_TIMEOUT_S):
                for daemon in self._daemons:
                    await daemon.wait()
        dead = [process for process in (*self._daemons, self._qemu) if not process.running]
        # A daemon that failed comes first: QEMU only died of it. One that ended well died of QEMU.
        if dead := [process for process in dead if not process.ended_well] or dead:
            reasons = [await process.wait_with_tail() for process in dead]
            told = f"{self.config.path} did not start: " + "\n".join(reasons)
            return HypervisorError(self.with_console_tail(told))
        return BootTimeout(self.with_console_tail(with_tail(str(error), self._qemu.log)))

    async def stop_vm(self) -> None:
        self.state = VMState.STOPPED
        self._release_guest_cid()
        self._close_vsock_connection()
        qmp, self._qmp = self._qmp, None  # closing it twice at a time is an error
        if qmp is not None:
            await qmp.close()
        if self._qemu is not None:
            await self._qemu.terminate()
        await asyncio.gather(*(daemon.terminate() for daemon in self._daemons))
        if self._console is not None:
            self._console.close()
        if self._daemons or self._others is not None:
            # What they have forked, and all of them when they were not attached to.
            await end_processes(self.directory)
        remove_directory(self.directory, self._link)

    def _release_guest_cid(self) -> None:
        """From QEMU's start on, QEMU holds it."""
        if self._guest_cid is not None and self._guest_cid.vhost_fd >= 0:
            os.close(self._guest_cid.vhost_fd)
            self._guest_cid = GuestCID(self._guest_cid.cid, -1)

    @classmethod
    async def cleanup(cls, persisted: Persisted) -> None:
        directory = Path(persisted["directory"])
        await end_processes(directory)
        remove_directory(directory, Path(persisted["link"]) if "link" in persisted else None)

    # -- from one process to another

    def to_grpc(self) -> dict[str, Any]:
        """Plain JSON: all that `from_grpc` needs."""
        self.require(VMState.PAUSED)
        assert self._qemu is not None
        return {
            "boot_from_template": self.config.boot_from_template,
            "transport": self._transport.value,
            "guest_cid": self._guest_cid.cid if self._guest_cid else None,
            "pids": {process.name: process.pid for process in (self._qemu, *self._daemons)},
            "thread_ids": list(self._thread_ids.items()),
            "free_ports": self._free_ports,
        }

    @classmethod
    def from_grpc(
        cls,
        vm_id: str,
        found: dict[str, Any],
        config: HypervisorConfig,
        agent: AgentConfig,
        *,
        shared_path: Path | None,
        run_vc: Path = RUN_VC,
    ) -> Qemu:
        """A paused machine of another process, in state CREATED until `attach`. `stop_vm` ends it from now
        on. Raises what a dict raises that does not come from `to_grpc`, and InvalidArgumentError when its
        daemon is missing."""
        config = replace(config, boot_from_template=bool(found["boot_from_template"]))
        machine = cls(vm_id, config, agent, shared_path=shared_path, run_vc=run_vc)
        machine._transport = AgentTransport(found["transport"])
        if machine._transport is AgentTransport.VSOCK:
            machine._guest_cid = GuestCID(int(found["guest_cid"]), -1)
        if machine._transport is AgentTransport.HVSOCK:
            machine._vhost_device_vsock = find_vhost_device_vsock(VHOST_DEVICE_VSOCK)
        pids = found["pids"]
        machine._others = {"qemu": int(pids["qemu"])} | {str(name): int(pids[name]) for name in pids}
        machine._thread_ids = {int(index): int(thread) for index, thread in found["thread_ids"]}
        machine._free_ports = [str(port) for port in found["free_ports"]]
        machine.state = VMState.CREATED
        return machine

    def assign_sandbox(self, sandbox_id: str) -> None:
        """Before `attach`: its directory is to be found under the sandbox's name, too, as a link."""
        self._link = vm_dir(self._run_vc, sandbox_id)

    async def attach(self, timeout_s: float) -> None:
        """Take a machine over that its process has let go of with `detach`: CREATED -> PAUSED.

        Raises HypervisorError; what there is is for `stop_vm` then.
        """
        self.require(VMState.CREATED)
        assert self._others is not None
        self._qemu, *self._daemons = (
            MachineProcess.adopt(name, pid, directory=self.directory) for name, pid in self._others.items()
        )
        try:
            if self._link is not None:
                with contextlib.suppress(FileNotFoundError):
                    self._link.readlink()  # of a pod of that name that was not cleaned up
                    self._link.unlink()
                self._link.symlink_to(self.directory.name)
            self._console = ConsoleLog(self.files.console_log, writer=self._qemu.pid)
        except OSError as error:
            raise HypervisorError(f"the machine in {self.directory}: {error}") from error
        self._qmp = await QMP.connect(self.files.qmp_socket, timeout_s=timeout_s)
        await self._start_vhost_device_vsock(asyncio.get_running_loop().time() + timeout_s)
        await self._plug_hvsock()
        self.state = VMState.PAUSED

    async def detach(self) -> None:
        """Let go of a paused machine without hvsock, for another process to `attach` to it. Idempotent.

        Here it can still be watched (`wait_dead`) and ended (`stop_vm`).
        """
        self.require(VMState.PAUSED)
        qmp, self._qmp = self._qmp, None
        if qmp is not None:
            await qmp.close()
        if self._console is not None:
            self._console.drain()
            self._console.close()

    # -- growing

    @property
    def vcpus(self) -> int:
        return len(self._thread_ids) or self.config.default_vcpus

    @property
    def memory_mib(self) -> int:
        return self._memory_mib

    async def hotplug_vcpus(self, count: int) -> int:
        return await self._resize(self._plugger.add_vcpus(count))

    async def hotunplug_vcpus(self, count: int, *, timeout_s: float = _TAKE_BACK_TIMEOUT_S) -> int:
        if decide_accel(self.config.accel).accel is Accel.TCG:
            # QEMU 7.2 was seen to die of a corrupted heap at the next thing that was plugged.
            self._log.warning("vCPUs stay, %d too many: an emulated machine (TCG) can lose none", count)
            return 0
        return await self._resize(self._plugger.remove_vcpus(count, timeout_s=timeout_s))

    async def plan_hotplug_memory(self, mib: int, block_mib: int) -> list[int]:
        return await self._plugger.plan_memory(self.memory_mib, mib, block_mib)

    async def hotplug_memory(self, mib: int) -> None:
        await self._resize(self._plugger.add_memory(self.memory_mib, mib))

    async def memory_not_taken(self) -> str:
        return await self._plugger.memory_not_taken()

    async def hotunplug_memory(self, mib: int, *, timeout_s: float = _TAKE_BACK_TIMEOUT_S) -> int:
        return await self._resize(self._plugger.remove_memory(mib, timeout_s=timeout_s))

    async def _resize(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            result = await work
        except BaseException:
            # A part of it may be done; a QEMU that does not answer has cost its timeout already.
            with contextlib.suppress(QMPFailed):
                await self.find_size(timeout_s=_LAST_WORDS_TIMEOUT_S)
            raise
        await self.find_size()
        return result

    async def find_size(self, *, timeout_s: float = COMMAND_TIMEOUT_S) -> None:
        await self._find_vcpus(timeout_s=timeout_s)
        self._memory_mib = await self._plugger.memory_mib(timeout_s=timeout_s)

    @property
    def _plugger(self) -> Hotplug:
        self.require(VMState.RUNNING)
        if self._hotplug is None:
            self._hotplug = Hotplug(
                self.monitor,
                self.config,
                shared=shares_memory(self.config, self._transport, self._shared_path),
                maximum_mib=self.config.default_maxmemory_mib or host_memory_mib(),
                take_port=self.take_port,
                logger=self._log,
            )
        return self._hotplug

    # -- block devices

    async def hotplug_block(self, drive: BlockDrive) -> PluggedDrive:
        return await self._block_plugger.add(drive)

    async def hotunplug_block(self, plugged: PluggedDrive, *, timeout_s: float) -> None:
        await self._block_plugger.remove(plugged, timeout_s=timeout_s)

    async def resize_block(self, plugged: PluggedDrive, size_bytes: int) -> None:
        await self._block_plugger.resize(plugged, size_bytes)

    @property
    def _block_plugger(self) -> BlockHotplug:
        self.require(VMState.RUNNING)
        if self._block_hotplug is None:
            self._block_hotplug = BlockHotplug(
                self.monitor,
                self.config,
                take_slot=self.take_slot,
                give_back_slot=self.give_back_slot,
                logger=self._log,
            )
        return self._block_hotplug

    async def _find_vcpus(self, *, timeout_s: float = COMMAND_TIMEOUT_S) -> None:
        cpus = await self.monitor.execute("query-cpus-fast", timeout_s=timeout_s)
        self._thread_ids = {cpu["cpu-index"]: cpu["thread-id"] for cpu in cpus}

    # -- network cards

    async def hotplug_net(self, device: NetDevice) -> str:
        self.require(VMState.RUNNING)
        slot = self.take_slot()
        try:
            await hotplug_net.plug(self.monitor, device, slot)
        except BaseException:
            self.give_back_slot(slot)
            raise
        self._net_slots[device.tap] = slot
        return slot.pci_path

    async def hotunplug_net(self, tap: str, *, timeout_s: float) -> None:
        self.require(VMState.RUNNING)
        await hotplug_net.unplug(self.monitor, tap, timeout_s=timeout_s)
        self.give_back_slot(self._net_slots.pop(tap))

    # -- running

    async def pause_vm(self) -> None:
        self.require(VMState.RUNNING)
        await self.monitor.execute("stop")
        self.state = VMState.PAUSED

    async def resume_vm(self) -> None:
        self.require(VMState.PAUSED)
        await self.monitor.execute("cont")
        self.state = VMState.RUNNING

    async def save_vm(self) -> None:
        self.require(VMState.PAUSED)
        if not self.config.boot_to_be_template or self.config.devices_state_path is None:
            raise FailedPreconditionError("the machine was not booted to be a template: it cannot be saved")
        await self.monitor.migrate(self.config.devices_state_path, timeout_s=_MIGRATION_TIMEOUT_S)

    async def wait_dead(self) -> str:
        if self._qemu is None:
            raise HypervisorError(f"the machine is {self.state.value}, expected running")
        processes = [self._qemu, *self._daemons]
        waits = [asyncio.create_task(process.wait()) for process in processes]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        dead = next(process for process in processes if not process.running)
        if dead.ended_well:
            # It may only be seen before QEMU, of which it has ended.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_QEMUS_END_TIMEOUT_S):
                    await self._qemu.wait()
            if not self._qemu.running:
                dead = self._qemu
        reason = await dead.wait_with_tail()
        return self.with_console_tail(reason) if dead is self._qemu else reason

    @property
    def was_killed(self) -> bool:
        processes = [self._qemu, *self._daemons] if self._qemu else self._daemons
        return any(process.was_killed for process in processes)

    def with_console_tail(self, message: str) -> str:
        """`message`, and below it what the guest said last on its console."""
        if self._console is not None:
            self._console.drain()
        return with_tail(message, self.files.console_log, lines=_CONSOLE_TAIL_LINES)

    async def describe_vcpus(self) -> str:
        """Where each vCPU is, in words, for when a guest says nothing."""
        try:
            # No command but the human monitor's shows registers.
            registers = await self.monitor.execute(
                "human-monitor-command",
                {"command-line": "info registers -a"},
                timeout_s=_LAST_WORDS_TIMEOUT_S,
            )
        except HypervisorError as error:
            return str(error)
        return ", ".join(
            f"vCPU {number} {'halted' if halted == '1' else 'running'} at {address}"
            + ("" if int(flags, 16) & _INTERRUPT_FLAG else " with interrupts off")
            for number, address, flags, halted in _REGISTERS.findall(registers)
        )

    @property
    def pid(self) -> int:
        self.require(VMState.RUNNING, VMState.PAUSED)
        assert self._qemu is not None
        return self._qemu.pid

    def get_pids(self) -> list[int]:
        processes = [self._qemu] if self._qemu is not None else []
        return [process.pid for process in (*processes, *self._daemons) if process.running]

    def get_thread_ids(self) -> dict[int, int]:
        return dict(self._thread_ids)

    @property
    def monitor(self) -> QMP:
        """Raises HypervisorError: a machine may be ended while it is being changed."""
        if self._qmp is None:
            raise HypervisorError(f"the machine is {self.state.value}, expected one with a monitor")
        return self._qmp


@contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    """A listening socket; the path stays when it is closed here, for those who were given it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as listener:
        try:
            path.unlink(missing_ok=True)
            listener.bind(str(path))
        except OSError as error:
            raise HypervisorError(f"socket {path}: {error}") from error
        listener.listen(1)
        yield listener


def _require(what: str, key: str, path: Path) -> None:
    if not path.exists():
        raise InvalidArgumentError(f"{what} {path} ({key} in [hypervisor.qemu]) does not exist")


def _require_file(what: str, key: str, path: Path) -> None:
    _require(what, key, path)
    if not path.is_file():
        raise InvalidArgumentError(f"{what} {path} ({key} in [hypervisor.qemu]) is not a file")
    if path.stat().st_size == 0:
        raise InvalidArgumentError(f"{what} {path} ({key} in [hypervisor.qemu]) is empty: 0 bytes")


def _require_program(what: str, key: str, path: Path) -> None:
    _require_file(what, key, path)
    if not os.access(path, os.X_OK):
        raise InvalidArgumentError(f"{what} {path} ({key} in [hypervisor.qemu]) is not executable")


def _require_dax(config: HypervisorConfig) -> None:
    """Raise InvalidArgumentError unless QEMU has virtiofs' DAX window, which no release of it has."""
    command = [str(config.path), "-device", "vhost-user-fs-pci,help"]
    try:
        found = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_HELP_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise HypervisorError(f"QEMU {config.path}: {error}") from error
    if b"cache-size=" not in found.stdout:
        raise InvalidArgumentError(
            f"virtio_fs_cache_size in [hypervisor.qemu]: found {config.virtio_fs_cache_size_mib}, "
            f"expected 0: vhost-user-fs-pci of {config.path} has no cache-size"
        )


def host_memory_mib(meminfo: Path = Path("/proc/meminfo")) -> int:
    first = meminfo.read_text().split("\n", 1)[0]  # "MemTotal:       24683984 kB"
    return int(first.split()[1]) // 1024


def remove_directory(directory: Path, link: Path | None = None) -> None:
    """With the sockets and logs in it, and the link to it; idempotent, also while another process does the
    same."""
    if link is not None:
        with contextlib.suppress(OSError):
            if link.readlink().name == directory.name:
                link.unlink()
    with contextlib.suppress(FileNotFoundError):
        while True:
            for entry in list(directory.iterdir()):
                entry.unlink(missing_ok=True)
            try:
                directory.rmdir()
                return
            except OSError as error:
                # The cache's server may have taken it for a machine that nobody owns just when `owner` went.
                if error.errno != errno.ENOTEMPTY:
                    raise
