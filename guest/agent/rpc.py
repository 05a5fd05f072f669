"""Kata's AgentService and Health. What has no method here is answered Unimplemented by the server."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from google.protobuf.empty_pb2 import Empty

from agent_client.protocols import agent_pb2, csi_pb2, health_pb2, oci_json, port_forward_pb2, types_pb2
from guest.agent import VERSION, copy_file, hotplug, storage
from guest.agent.limits import fit_to_machine
from guest.agent.sandbox import Sandbox
from guest.agent.threads import in_thread
from ttrpc import Code, StatusError

log = logging.getLogger(__name__)

_API_VERSION = "0.0.1"
_POWER_OFF_DELAY_S = 2.0

_RNDADDTOENTCNT = 0x40045201
_RNDRESEEDCRNG = 0x5207

T = TypeVar("T")


async def _whole(work: Coroutine[Any, Any, T]) -> T:
    """Do all of it, though the host that asked may disconnect half-way: nothing half-made stays."""
    return await asyncio.shield(asyncio.ensure_future(work))


class AgentService:
    """`context` is the server's and not used."""

    def __init__(self, sandbox: Sandbox, *, is_init: bool) -> None:
        self._sandbox = sandbox
        self._is_init = is_init

    # The sandbox

    async def create_sandbox(self, request: agent_pb2.CreateSandboxRequest, context: object) -> Empty:
        await _whole(self._sandbox.create(request))
        return Empty()

    async def destroy_sandbox(self, request: agent_pb2.DestroySandboxRequest, context: object) -> Empty:
        await _whole(self._sandbox.destroy())
        if self._is_init:
            from guest.agent import linux

            # The machine has no more use; a host that has not ended it by then has forgotten it.
            asyncio.get_running_loop().call_later(_POWER_OFF_DELAY_S, linux.power_off)
        return Empty()

    async def get_guest_details(
        self, request: agent_pb2.GuestDetailsRequest, context: object
    ) -> agent_pb2.GuestDetailsResponse:
        details = agent_pb2.AgentDetails(
            version=VERSION,
            init_daemon=self._is_init,
            storage_handlers=storage.HANDLERS,
            supports_seccomp=os.path.exists("/proc/sys/kernel/seccomp"),
            # The host need not read all output before it asks for the exit, as with Kata's agent; and it can
            # reach the pod's ports by a service of ours.
            extra_features=["keeps-output", "port-forward"],
        )
        return agent_pb2.GuestDetailsResponse(
            agent_details=details,
            mem_block_size_bytes=hotplug.memory_block_size() if request.mem_block_size else 0,
            support_mem_hotplug_probe=request.mem_hotplug_probe and hotplug.has_memory_probe(),
        )

    async def online_cpu_mem(self, request: agent_pb2.OnlineCPUMemRequest, context: object) -> Empty:
        if request.nb_cpus:
            await hotplug.online_cpus(request.nb_cpus)
        if not request.cpu_only:
            await hotplug.online_memory()
        if self._is_init:
            fit_to_machine()
        return Empty()

    async def get_metrics(self, request: agent_pb2.GetMetricsRequest, context: object) -> agent_pb2.Metrics:
        from guest.agent.metrics import metrics

        return agent_pb2.Metrics(metrics=metrics())

    async def mem_hotplug_by_probe(
        self, request: agent_pb2.MemHotplugByProbeRequest, context: object
    ) -> Empty:
        hotplug.probe_memory(list(request.memHotplugProbeAddr))
        return Empty()

    async def reseed_random_dev(self, request: agent_pb2.ReseedRandomDevRequest, context: object) -> Empty:
        """Afterwards no bytes come from what was known before: a clone is no twin."""
        if not request.data:
            raise StatusError(Code.INVALID_ARGUMENT, "missing entropy data")
        import fcntl
        import struct

        fd = os.open("/dev/random", os.O_RDWR | os.O_CLOEXEC)
        try:
            os.write(fd, request.data)
            fcntl.ioctl(fd, _RNDADDTOENTCNT, struct.pack("i", len(request.data)))
            fcntl.ioctl(fd, _RNDRESEEDCRNG)
        finally:
            os.close(fd)
        return Empty()

    async def set_guest_date_time(self, request: agent_pb2.SetGuestDateTimeRequest, context: object) -> Empty:
        time.clock_settime_ns(time.CLOCK_REALTIME, (request.Sec * 1_000_000 + request.Usec) * 1000)
        return Empty()

    async def copy_file(self, request: agent_pb2.CopyFileRequest, context: object) -> Empty:
        copy_file.copy_file(request)
        return Empty()

    async def get_oom_event(
        self, request: agent_pb2.GetOOMEventRequest, context: object
    ) -> agent_pb2.OOMEvent:
        return agent_pb2.OOMEvent(container_id=await self._sandbox.oom_event())

    async def update_ephemeral_mounts(
        self, request: agent_pb2.UpdateEphemeralMountsRequest, context: object
    ) -> Empty:
        storage.remount_ephemeral(request.storages)
        return Empty()

    async def remove_stale_virtiofs_share_mounts(
        self, request: agent_pb2.RemoveStaleVirtiofsShareMountsRequest, context: object
    ) -> Empty:
        await in_thread(storage.refresh_shares)
        return Empty()

    async def get_volume_stats(
        self, request: agent_pb2.VolumeStatsRequest, context: object
    ) -> csi_pb2.VolumeStatsResponse:
        found = await in_thread(os.statvfs, request.volume_guest_path)
        usage = csi_pb2.VolumeUsage
        return csi_pb2.VolumeStatsResponse(
            usage=[
                usage(
                    unit=usage.BYTES,
                    total=found.f_blocks * found.f_frsize,
                    available=found.f_bfree * found.f_frsize,
                    used=(found.f_blocks - found.f_bfree) * found.f_frsize,
                ),
                usage(
                    unit=usage.INODES,
                    total=found.f_files,
                    available=found.f_ffree,
                    used=found.f_files - found.f_ffree,
                ),
            ],
            volume_condition=csi_pb2.VolumeCondition(abnormal=False, message="OK"),
        )

    async def resize_volume(self, request: agent_pb2.ResizeVolumeRequest, context: object) -> Empty:
        from guest.agent.resize import grow

        await _whole(grow(request.volume_guest_path, request.size))
        return Empty()

    async def add_swap_path(self, request: agent_pb2.AddSwapPathRequest, context: object) -> Empty:
        from guest.agent import linux

        linux.swapon(request.path)
        return Empty()

    # The network. Under --listen it is this process's: of the host's namespace, unless it was given its own.

    async def update_interface(
        self, request: agent_pb2.UpdateInterfaceRequest, context: object
    ) -> types_pb2.Interface:
        from guest.agent import network

        await _whole(network.update_interface(request.interface))
        return request.interface

    async def list_interfaces(
        self, request: agent_pb2.ListInterfacesRequest, context: object
    ) -> agent_pb2.Interfaces:
        from guest.agent import network

        return agent_pb2.Interfaces(Interfaces=network.list_interfaces())

    async def update_routes(
        self, request: agent_pb2.UpdateRoutesRequest, context: object
    ) -> agent_pb2.Routes:
        from guest.agent import network

        return agent_pb2.Routes(Routes=network.update_routes(request.routes.Routes))

    async def list_routes(self, request: agent_pb2.ListRoutesRequest, context: object) -> agent_pb2.Routes:
        from guest.agent import network

        return agent_pb2.Routes(Routes=network.list_routes())

    async def add_arp_neighbors(self, request: agent_pb2.AddARPNeighborsRequest, context: object) -> Empty:
        from guest.agent import network

        network.add_arp_neighbors(request.neighbors.ARPNeighbors)
        return Empty()

    async def get_ip_tables(
        self, request: agent_pb2.GetIPTablesRequest, context: object
    ) -> agent_pb2.GetIPTablesResponse:
        from guest.agent.iptables import get_rules

        rules = await get_rules(self._sandbox.reaper, ipv6=request.is_ipv6)
        return agent_pb2.GetIPTablesResponse(data=rules)

    async def set_ip_tables(
        self, request: agent_pb2.SetIPTablesRequest, context: object
    ) -> agent_pb2.SetIPTablesResponse:
        from guest.agent.iptables import set_rules

        said = await _whole(set_rules(self._sandbox.reaper, request.data, ipv6=request.is_ipv6))
        return agent_pb2.SetIPTablesResponse(data=said)

    # Containers

    async def create_container(self, request: agent_pb2.CreateContainerRequest, context: object) -> Empty:
        await _whole(self._sandbox.create_container(request))
        return Empty()

    async def start_container(self, request: agent_pb2.StartContainerRequest, context: object) -> Empty:
        await _whole(self._sandbox.container(request.container_id).start())
        return Empty()

    async def remove_container(self, request: agent_pb2.RemoveContainerRequest, context: object) -> Empty:
        """With a timeout (seconds) the answer is DEADLINE_EXCEEDED after it, and the removal goes on."""
        removal = _whole(self._sandbox.remove_container(request.container_id))
        try:
            await asyncio.wait_for(removal, request.timeout or None)
        except TimeoutError:
            raise StatusError(
                Code.DEADLINE_EXCEEDED,
                f"container {request.container_id} is not removed after {request.timeout} s",
            ) from None
        return Empty()

    async def update_container(self, request: agent_pb2.UpdateContainerRequest, context: object) -> Empty:
        container = self._sandbox.container(request.container_id)
        if request.HasField("resources"):
            await _whole(container.update(oci_json.resources_to_json(request.resources)))
        return Empty()

    async def stats_container(
        self, request: agent_pb2.StatsContainerRequest, context: object
    ) -> agent_pb2.StatsContainerResponse:
        container = self._sandbox.container(request.container_id)
        return agent_pb2.StatsContainerResponse(
            cgroup_stats=container.cgroup.stats(), network_stats=_network_stats()
        )

    async def pause_container(self, request: agent_pb2.PauseContainerRequest, context: object) -> Empty:
        await _whole(self._sandbox.container(request.container_id).set_paused(True))
        return Empty()

    async def resume_container(self, request: agent_pb2.ResumeContainerRequest, context: object) -> Empty:
        await _whole(self._sandbox.container(request.container_id).set_paused(False))
        return Empty()

    # Processes

    async def exec_process(self, request: agent_pb2.ExecProcessRequest, context: object) -> Empty:
        container = self._sandbox.container(request.container_id)
        if not request.exec_id or not request.HasField("process"):
            raise StatusError(Code.INVALID_ARGUMENT, "an exec needs an exec_id and a process")
        await _whole(container.exec(request.exec_id, oci_json.process_to_json(request.process)))
        return Empty()

    async def signal_process(self, request: agent_pb2.SignalProcessRequest, context: object) -> Empty:
        container = self._sandbox.container(request.container_id)
        process = container.process(request.exec_id)
        if not request.exec_id:
            container.signal_all(request.signal)
        elif process is container.init:
            container.signal_init(request.signal)
        else:
            process.signal(request.signal)
        return Empty()

    async def wait_process(
        self, request: agent_pb2.WaitProcessRequest, context: object
    ) -> agent_pb2.WaitProcessResponse:
        """Can be asked any number of times, until the container is removed."""
        process = self._sandbox.container(request.container_id).process(request.exec_id)
        return agent_pb2.WaitProcessResponse(status=await process.wait())

    async def write_stdin(
        self, request: agent_pb2.WriteStreamRequest, context: object
    ) -> agent_pb2.WriteStreamResponse:
        """All of the data, as long as that takes; none is how Kata's newer runtime closes it."""
        process = self._sandbox.container(request.container_id).process(request.exec_id)
        if request.data:
            await process.stdin.write(request.data)
        elif process.terminal is None:
            process.stdin.close_when_written()
        return agent_pb2.WriteStreamResponse(len=len(request.data))

    async def read_stdout(
        self, request: agent_pb2.ReadStreamRequest, context: object
    ) -> agent_pb2.ReadStreamResponse:
        """No data is the end of the stream."""
        process = self._sandbox.container(request.container_id).process(request.exec_id)
        return agent_pb2.ReadStreamResponse(data=await process.stdout.read(request.len, process.exited))

    async def read_stderr(
        self, request: agent_pb2.ReadStreamRequest, context: object
    ) -> agent_pb2.ReadStreamResponse:
        """As `read_stdout`; ended from the start for a process with a terminal."""
        process = self._sandbox.container(request.container_id).process(request.exec_id)
        data = await process.stderr.read(request.len, process.exited) if process.stderr else b""
        return agent_pb2.ReadStreamResponse(data=data)

    async def close_stdin(self, request: agent_pb2.CloseStdinRequest, context: object) -> Empty:
        """A terminal stays open: it is the process's stdout too."""
        process = self._sandbox.container(request.container_id).process(request.exec_id)
        if process.terminal is None:
            process.stdin.close_when_written()
        return Empty()

    async def tty_win_resize(self, request: agent_pb2.TtyWinResizeRequest, context: object) -> Empty:
        process = self._sandbox.container(request.container_id).process(request.exec_id)
        process.resize(request.row, request.column)
        return Empty()


class HealthService:
    async def check(
        self, request: health_pb2.CheckRequest, context: object
    ) -> health_pb2.HealthCheckResponse:
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    async def version(
        self, request: health_pb2.CheckRequest, context: object
    ) -> health_pb2.VersionCheckResponse:
        return health_pb2.VersionCheckResponse(grpc_version=_API_VERSION, agent_version=VERSION)


class PortForwardService:
    def forward(
        self, chunks: AsyncIterator[port_forward_pb2.Chunk], context: object
    ) -> AsyncIterator[port_forward_pb2.Chunk]:
        from guest.agent.port_forward import forward

        return forward(chunks)


def map_error(error: Exception) -> StatusError | None:
    """What the kernel says is an answer, not a fault of the agent."""
    if isinstance(error, OSError):
        return StatusError(Code.INTERNAL, str(error))
    if isinstance(error, ValueError):
        return StatusError(Code.INVALID_ARGUMENT, str(error))
    return None


def _network_stats() -> list[agent_pb2.NetworkStats]:
    """The machine's interfaces: its containers share them."""
    stats = []
    with open("/proc/net/dev") as file:
        for line in file.readlines()[2:]:
            name, _, counters = line.partition(":")
            values = [int(value) for value in counters.split()]
            if name.strip() != "lo":
                stats.append(
                    agent_pb2.NetworkStats(
                        name=name.strip(),
                        rx_bytes=values[0],
                        rx_packets=values[1],
                        rx_errors=values[2],
                        rx_dropped=values[3],
                        tx_bytes=values[8],
                        tx_packets=values[9],
                        tx_errors=values[10],
                        tx_dropped=values[11],
                    )
                )
    return stats
