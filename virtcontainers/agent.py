"""What the sandbox asks of the agent, after Kata's `kata_agent.go`: requests built, errors translated, every
call bounded in time unless it waits for a container."""

from __future__ import annotations

import contextlib
import logging
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from agent_client.client import CHECK_TIMEOUT_S, AgentClient
from agent_client.protocols import agent_pb2, csi_pb2, health_pb2, oci_json, types_pb2
from ttrpc import Code, ConnectionClosed, StatusError, TtrpcError
from virtcontainers import errors
from virtcontainers.config import (
    GUEST_SANDBOX_DIR,
    GUEST_SHARED_DIR,
    MOUNT_GUEST_TAG,
    AgentConfig,
    HypervisorConfig,
    OCISpec,
    SharedFS,
)

log = logging.getLogger(__name__)

_MAX_HOSTNAME_BYTES = 64

_COPY_PIECE_BYTES = 1 << 20
"""Kata's; a message has at most 4 MiB."""

_ERRORS: Mapping[Code, type[errors.KataError]] = {
    Code.NOT_FOUND: errors.NotFoundError,
    Code.ALREADY_EXISTS: errors.AlreadyExistsError,
    Code.INVALID_ARGUMENT: errors.InvalidArgumentError,
    Code.FAILED_PRECONDITION: errors.FailedPreconditionError,
    Code.UNIMPLEMENTED: errors.UnimplementedError,
    Code.DEADLINE_EXCEEDED: errors.DeadlineExceededError,
    Code.UNAVAILABLE: errors.UnavailableError,
}


@contextlib.contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn ttrpc's errors into ours; the agent's own text stays, behind what was asked of it."""
    try:
        yield
    except StatusError as error:
        raise _ERRORS.get(error.code, errors.KataError)(f"agent: {what}: {error.message}") from error
    except ConnectionClosed as error:
        raise errors.UnavailableError(f"agent: {what}: the machine's agent is gone") from error
    except TtrpcError as error:
        raise errors.KataError(f"agent: {what}: {error}") from error


class KataAgent:
    """The agent of one machine. Every method raises KataError's classes and nothing of ttrpc's."""

    def __init__(self, client: AgentClient) -> None:
        self.client = client
        self.details = agent_pb2.GuestDetailsResponse()

    @property
    def supports_seccomp(self) -> bool:
        return self.details.agent_details.supports_seccomp

    @property
    def storage_handlers(self) -> Sequence[str]:
        """The drivers of storages that it has."""
        return self.details.agent_details.storage_handlers

    @property
    def keeps_output(self) -> bool:
        """Whether output can still be read after the exit was asked for: a feature of our agent."""
        return "keeps-output" in self.details.agent_details.extra_features

    @property
    def forwards_ports(self) -> bool:
        """Whether `client.forward` connects into the machine: a feature of our agent."""
        return "port-forward" in self.details.agent_details.extra_features

    async def check(self, timeout_s: float = CHECK_TIMEOUT_S) -> None:
        with translated("Check"):
            await self.client.check(health_pb2.CheckRequest(), timeout_s=timeout_s)

    async def get_guest_details(self) -> None:
        """Fill `details`: the memory block size, and what the agent can do."""
        with translated("GetGuestDetails"):
            request = agent_pb2.GuestDetailsRequest(mem_block_size=True, mem_hotplug_probe=True)
            self.details = await self.client.get_guest_details(request)

    async def reseed_random_dev(self, data: bytes) -> None:
        with translated("ReseedRandomDev"):
            await self.client.reseed_random_dev(agent_pb2.ReseedRandomDevRequest(data=data))

    async def set_guest_date_time(self, unix_ns: int) -> None:
        request = agent_pb2.SetGuestDateTimeRequest(Sec=unix_ns // 10**9, Usec=unix_ns // 1000 % 10**6)
        with translated("SetGuestDateTime"):
            await self.client.set_guest_date_time(request)

    async def online_cpu_mem(self, nb_cpus: int, *, cpu_only: bool, timeout_s: float) -> None:
        """Put to use what was plugged in; 0 for `nb_cpus`, which counts all, leaves the CPUs."""
        request = agent_pb2.OnlineCPUMemRequest(wait=True, nb_cpus=nb_cpus, cpu_only=cpu_only)
        with translated("OnlineCPUMem"):
            await self.client.online_cpu_mem(request, timeout_s=timeout_s)

    async def get_metrics(self, timeout_s: float) -> str:
        """In Prometheus' text format."""
        with translated("GetMetrics"):
            return (await self.client.get_metrics(agent_pb2.GetMetricsRequest(), timeout_s=timeout_s)).metrics

    async def set_policy(self, policy: str) -> None:
        with translated("SetPolicy"):
            await self.client.set_policy(agent_pb2.SetPolicyRequest(policy=policy))

    async def create_sandbox(
        self,
        sandbox_id: str,
        *,
        hostname: str,
        dns: list[str],
        sandbox_pidns: bool,
        shm_size_bytes: int,
        hypervisor: HypervisorConfig,
        config: AgentConfig,
    ) -> None:
        modules = [m.split() for m in config.kernel_modules if m.strip()]
        request = agent_pb2.CreateSandboxRequest(
            sandbox_id=sandbox_id,
            hostname=hostname.encode()[:_MAX_HOSTNAME_BYTES].decode(errors="ignore"),
            dns=dns,
            storages=_sandbox_storages(hypervisor, shm_size_bytes),
            sandbox_pidns=sandbox_pidns,
            guest_hook_path=hypervisor.guest_hook_path,
            kernel_modules=[agent_pb2.KernelModule(name=m[0], parameters=m[1:]) for m in modules],
        )
        with translated("CreateSandbox"):
            await self.client.create_sandbox(request)

    async def update_interface(self, interface: types_pb2.Interface) -> None:
        """Waits for the interface: it may have been plugged in just now."""
        with translated(f"UpdateInterface {interface.name}"):
            await self.client.update_interface(agent_pb2.UpdateInterfaceRequest(interface=interface))

    async def update_routes(self, routes: Sequence[types_pb2.Route]) -> None:
        """These are all there are afterwards, beside those that the guest's kernel makes itself."""
        request = agent_pb2.UpdateRoutesRequest(routes=agent_pb2.Routes(Routes=routes))
        with translated("UpdateRoutes"):
            await self.client.update_routes(request)

    async def add_arp_neighbors(self, neighbors: Sequence[types_pb2.ARPNeighbor]) -> None:
        """Those without a state are permanent."""
        request = agent_pb2.AddARPNeighborsRequest(neighbors=agent_pb2.ARPNeighbors(ARPNeighbors=neighbors))
        with translated("AddARPNeighbors"):
            await self.client.add_arp_neighbors(request)

    async def list_interfaces(self) -> list[types_pb2.Interface]:
        with translated("ListInterfaces"):
            return list((await self.client.list_interfaces(agent_pb2.ListInterfacesRequest())).Interfaces)

    async def list_routes(self) -> list[types_pb2.Route]:
        """The kernel's own too."""
        with translated("ListRoutes"):
            return list((await self.client.list_routes(agent_pb2.ListRoutesRequest())).Routes)

    async def get_ip_tables(self, *, is_ipv6: bool) -> bytes:
        """As `iptables-save` tells them."""
        request = agent_pb2.GetIPTablesRequest(is_ipv6=is_ipv6)
        with translated("GetIPTables"):
            return (await self.client.get_ip_tables(request)).data

    async def set_ip_tables(self, data: bytes, *, is_ipv6: bool) -> None:
        """For `iptables-restore`; when it refuses them, there are those of before."""
        request = agent_pb2.SetIPTablesRequest(is_ipv6=is_ipv6, data=data)
        with translated("SetIPTables"):
            await self.client.set_ip_tables(request)

    async def destroy_sandbox(self, timeout_s: float) -> None:
        with translated("DestroySandbox"):
            await self.client.destroy_sandbox(agent_pb2.DestroySandboxRequest(), timeout_s=timeout_s)

    async def create_container(
        self,
        container_id: str,
        spec: OCISpec,
        *,
        sandbox_pidns: bool,
        timeout_s: float,
        storages: Sequence[agent_pb2.Storage] = (),
        devices: Sequence[agent_pb2.Device] = (),
    ) -> None:
        request = agent_pb2.CreateContainerRequest(
            container_id=container_id,
            exec_id=container_id,
            OCI=oci_json.spec_from_json(spec),
            storages=storages,
            devices=devices,
            sandbox_pidns=sandbox_pidns,
        )
        with translated(f"CreateContainer {container_id}"):
            await self.client.create_container(request, timeout_s=timeout_s)

    async def start_container(self, container_id: str) -> None:
        request = agent_pb2.StartContainerRequest(container_id=container_id)
        with translated(f"StartContainer {container_id}"):
            await self.client.start_container(request)

    async def remove_container(self, container_id: str) -> None:
        request = agent_pb2.RemoveContainerRequest(container_id=container_id)
        with translated(f"RemoveContainer {container_id}"):
            await self.client.remove_container(request)

    async def exec_process(self, container_id: str, exec_id: str, process: dict[str, Any]) -> None:
        request = agent_pb2.ExecProcessRequest(
            container_id=container_id, exec_id=exec_id, process=oci_json.process_from_json(process)
        )
        with translated(f"ExecProcess {container_id}/{exec_id}"):
            await self.client.exec_process(request)

    async def signal_process(self, container_id: str, exec_id: str, signal: int) -> None:
        """An empty `exec_id` signals every process of the container."""
        request = agent_pb2.SignalProcessRequest(container_id=container_id, exec_id=exec_id, signal=signal)
        with translated(f"SignalProcess {container_id}/{exec_id or 'all'}"):
            await self.client.signal_process(request)

    async def wait_process(self, container_id: str, exec_id: str) -> int:
        request = agent_pb2.WaitProcessRequest(container_id=container_id, exec_id=exec_id)
        with translated(f"WaitProcess {container_id}/{exec_id}"):
            response = await self.client.wait_process(request)
        return response.status

    async def update_container(self, container_id: str, resources: dict[str, Any]) -> None:
        request = agent_pb2.UpdateContainerRequest(
            container_id=container_id, resources=oci_json.resources_from_json(resources)
        )
        with translated(f"UpdateContainer {container_id}"):
            await self.client.update_container(request)

    async def stats_container(self, container_id: str) -> agent_pb2.StatsContainerResponse:
        request = agent_pb2.StatsContainerRequest(container_id=container_id)
        with translated(f"StatsContainer {container_id}"):
            return await self.client.stats_container(request)

    async def pause_container(self, container_id: str) -> None:
        request = agent_pb2.PauseContainerRequest(container_id=container_id)
        with translated(f"PauseContainer {container_id}"):
            await self.client.pause_container(request)

    async def resume_container(self, container_id: str) -> None:
        request = agent_pb2.ResumeContainerRequest(container_id=container_id)
        with translated(f"ResumeContainer {container_id}"):
            await self.client.resume_container(request)

    async def read_stream(self, container_id: str, exec_id: str, size: int, *, stderr: bool) -> bytes:
        """At most `size` bytes; b"" at the end of the stream, which agents tell by an error, and when the
        machine is gone."""
        request = agent_pb2.ReadStreamRequest(container_id=container_id, exec_id=exec_id, len=size)
        read = self.client.read_stderr if stderr else self.client.read_stdout
        try:
            return (await read(request)).data
        except StatusError as error:
            if "eof" not in error.message.lower():
                log.debug("stream of %s/%s ended: %s", container_id, exec_id, error.message)
            return b""
        except ConnectionClosed:
            return b""

    async def write_stdin(self, container_id: str, exec_id: str, data: bytes) -> int:
        request = agent_pb2.WriteStreamRequest(container_id=container_id, exec_id=exec_id, data=data)
        with translated(f"WriteStdin {container_id}/{exec_id}"):
            return (await self.client.write_stdin(request)).len

    async def close_stdin(self, container_id: str, exec_id: str) -> None:
        request = agent_pb2.CloseStdinRequest(container_id=container_id, exec_id=exec_id)
        with translated(f"CloseStdin {container_id}/{exec_id}"):
            await self.client.close_stdin(request)

    async def tty_win_resize(self, container_id: str, exec_id: str, width: int, height: int) -> None:
        request = agent_pb2.TtyWinResizeRequest(
            container_id=container_id, exec_id=exec_id, row=height, column=width
        )
        with translated(f"TtyWinResize {container_id}/{exec_id}"):
            await self.client.tty_win_resize(request)

    async def update_ephemeral_mounts(self, storages: Sequence[agent_pb2.Storage]) -> None:
        """Set sizes of tmpfs anew; an old agent of Kata's cannot, which is logged."""
        request = agent_pb2.UpdateEphemeralMountsRequest(storages=storages)
        try:
            with translated("UpdateEphemeralMounts"):
                await self.client.update_ephemeral_mounts(request)
        except errors.UnimplementedError as error:
            log.warning("volumes in memory keep the size the guest gives them: %s", error)

    async def copy_file(self, path: str, data: bytes, *, mode: int, uid: int, gid: int) -> None:
        """Make a file, a directory or a symbolic link, by the type in `mode`, in the place of what has the
        path already; `data` is what is in the file, or what the link says."""
        for offset in range(0, len(data) or 1, _COPY_PIECE_BYTES):
            request = agent_pb2.CopyFileRequest(
                path=path,
                file_size=len(data) if stat.S_ISREG(mode) else 0,
                file_mode=mode,
                dir_mode=0o750,
                uid=uid,
                gid=gid,
                offset=offset,
                data=data[offset : offset + _COPY_PIECE_BYTES],
            )
            with translated(f"CopyFile {path}"):
                await self.client.copy_file(request)

    async def get_volume_stats(self, guest_path: str) -> csi_pb2.VolumeStatsResponse:
        request = agent_pb2.VolumeStatsRequest(volume_guest_path=guest_path)
        with translated(f"GetVolumeStats {guest_path}"):
            return await self.client.get_volume_stats(request)

    async def resize_volume(self, guest_path: str, size_bytes: int) -> None:
        request = agent_pb2.ResizeVolumeRequest(volume_guest_path=guest_path, size=size_bytes)
        with translated(f"ResizeVolume {guest_path}"):
            await self.client.resize_volume(request)

    async def get_oom_event(self) -> str:
        """The id of the next container that ran out of memory; waits for it."""
        with translated("GetOOMEvent"):
            return (await self.client.get_oom_event(agent_pb2.GetOOMEventRequest())).container_id


def _sandbox_storages(hypervisor: HypervisorConfig, shm_size_bytes: int) -> list[agent_pb2.Storage]:
    storages = []
    if hypervisor.shared_fs is SharedFS.VIRTIO_FS:
        dax = hypervisor.virtio_fs_cache_size_mib and hypervisor.virtio_fs_cache not in ("never", "metadata")
        storages.append(
            agent_pb2.Storage(
                driver="virtio-fs",
                source=MOUNT_GUEST_TAG,
                fstype="virtiofs",
                options=["dax"] if dax else [],
                mount_point=GUEST_SHARED_DIR,
            )
        )
    elif hypervisor.shared_fs is SharedFS.VIRTIO_9P:
        options = f"trans=virtio,version=9p2000.L,cache=mmap,msize={hypervisor.msize_9p}"
        storages.append(
            agent_pb2.Storage(
                driver="9p",
                source=MOUNT_GUEST_TAG,
                fstype="9p",
                options=[options, "nodev"],
                mount_point=GUEST_SHARED_DIR,
            )
        )
    if shm_size_bytes:
        storages.append(
            agent_pb2.Storage(
                driver="ephemeral",
                source="shm",
                fstype="tmpfs",
                options=["noexec", "nosuid", "nodev", "mode=1777", f"size={shm_size_bytes}"],
                mount_point=GUEST_SANDBOX_DIR + "shm",
            )
        )
    return storages
