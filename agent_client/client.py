"""The agent of one machine, as an object with one method per RPC."""

from __future__ import annotations

import logging
from collections.abc import Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, Generic, Protocol, Self, TypeVar, overload

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from agent_client.protocols import agent_pb2 as pb
from agent_client.protocols import csi_pb2, health_pb2, types_pb2
from agent_client.transports import AgentAddress, dial_once, keep_trying
from ttrpc import Client, ClientStream, ConnectionClosed, TtrpcError, snake_case

log = logging.getLogger(__name__)

REQUEST_TIMEOUT_S = 60.0
"""Of a call that says nothing else, as in Kata."""

CHECK_TIMEOUT_S = 30.0
"""Of Health's calls, as in Kata."""

_CONNECT_CHECK_TIMEOUT_S = 10.0
"""Of the first Check on a new connection, before a new one is tried: hvsock's device can take a connection
that the guest never sees."""

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)
RequestIn = TypeVar("RequestIn", bound=Message, contravariant=True)
ResponseOut = TypeVar("ResponseOut", bound=Message, covariant=True)

_METHODS: dict[str, MethodDescriptor] = {
    snake_case(method.name): method
    for service in (
        pb.DESCRIPTOR.services_by_name["AgentService"],
        health_pb2.DESCRIPTOR.services_by_name["Health"],
    )
    for method in service.methods
}


class Call(Protocol[RequestIn, ResponseOut]):
    """An RPC of a connected client. `timeout_s` None: for as long as it takes; not given: the RPC's own."""

    def __call__(
        self,
        request: RequestIn,
        *,
        timeout_s: float | None = ...,
        metadata: Mapping[str, Sequence[str]] | None = ...,
    ) -> Coroutine[Any, Any, ResponseOut]: ...


class Rpc(Generic[Request, Response]):
    """Declares a method of `AgentClient`; which RPC follows from the attribute's name."""

    def __init__(self, timeout_s: float | None = REQUEST_TIMEOUT_S) -> None:
        self.timeout_s = timeout_s

    def __set_name__(self, owner: type, name: str) -> None:
        self.method = _METHODS[name]

    @overload
    def __get__(self, client: None, owner: type) -> Self: ...
    @overload
    def __get__(self, client: AgentClient, owner: type) -> Call[Request, Response]: ...
    def __get__(self, client: AgentClient | None, owner: type) -> Self | Call[Request, Response]:
        return self if client is None else partial(client.call, self.method, timeout_s=self.timeout_s)


class AgentClient:
    """A connection to an agent that has answered.

    Every RPC raises `ttrpc.StatusError` with the agent's code and text (DEADLINE_EXCEEDED when it is our
    timeout), and `ttrpc.ConnectionClosed` when the connection ends first. Calls may run side by side.
    """

    create_sandbox = Rpc[pb.CreateSandboxRequest, Empty]()
    destroy_sandbox = Rpc[pb.DestroySandboxRequest, Empty]()
    update_ephemeral_mounts = Rpc[pb.UpdateEphemeralMountsRequest, Empty]()
    remove_stale_virtiofs_share_mounts = Rpc[pb.RemoveStaleVirtiofsShareMountsRequest, Empty]()

    create_container = Rpc[pb.CreateContainerRequest, Empty]()
    start_container = Rpc[pb.StartContainerRequest, Empty]()
    pause_container = Rpc[pb.PauseContainerRequest, Empty]()
    resume_container = Rpc[pb.ResumeContainerRequest, Empty]()
    update_container = Rpc[pb.UpdateContainerRequest, Empty]()
    stats_container = Rpc[pb.StatsContainerRequest, pb.StatsContainerResponse]()
    remove_container = Rpc[pb.RemoveContainerRequest, Empty]()

    exec_process = Rpc[pb.ExecProcessRequest, Empty]()
    signal_process = Rpc[pb.SignalProcessRequest, Empty]()
    tty_win_resize = Rpc[pb.TtyWinResizeRequest, Empty]()
    close_stdin = Rpc[pb.CloseStdinRequest, Empty]()
    # A process may live for months, say nothing, and never read.
    wait_process = Rpc[pb.WaitProcessRequest, pb.WaitProcessResponse](timeout_s=None)
    write_stdin = Rpc[pb.WriteStreamRequest, pb.WriteStreamResponse](timeout_s=None)
    read_stdout = Rpc[pb.ReadStreamRequest, pb.ReadStreamResponse](timeout_s=None)
    read_stderr = Rpc[pb.ReadStreamRequest, pb.ReadStreamResponse](timeout_s=None)

    update_interface = Rpc[pb.UpdateInterfaceRequest, types_pb2.Interface]()
    update_routes = Rpc[pb.UpdateRoutesRequest, pb.Routes]()
    list_interfaces = Rpc[pb.ListInterfacesRequest, pb.Interfaces]()
    list_routes = Rpc[pb.ListRoutesRequest, pb.Routes]()
    add_arp_neighbors = Rpc[pb.AddARPNeighborsRequest, Empty]()
    get_ip_tables = Rpc[pb.GetIPTablesRequest, pb.GetIPTablesResponse]()
    set_ip_tables = Rpc[pb.SetIPTablesRequest, pb.SetIPTablesResponse]()

    online_cpu_mem = Rpc[pb.OnlineCPUMemRequest, Empty]()
    mem_hotplug_by_probe = Rpc[pb.MemHotplugByProbeRequest, Empty]()
    mem_agent_memcg_set = Rpc[pb.MemAgentMemcgConfig, Empty]()
    mem_agent_compact_set = Rpc[pb.MemAgentCompactConfig, Empty]()
    add_swap = Rpc[pb.AddSwapRequest, Empty]()
    add_swap_path = Rpc[pb.AddSwapPathRequest, Empty]()
    get_volume_stats = Rpc[pb.VolumeStatsRequest, csi_pb2.VolumeStatsResponse]()
    resize_volume = Rpc[pb.ResizeVolumeRequest, Empty]()

    get_guest_details = Rpc[pb.GuestDetailsRequest, pb.GuestDetailsResponse]()
    get_metrics = Rpc[pb.GetMetricsRequest, pb.Metrics]()
    get_oom_event = Rpc[pb.GetOOMEventRequest, pb.OOMEvent](timeout_s=None)
    get_diagnostic_data = Rpc[pb.GetDiagnosticDataRequest, pb.GetDiagnosticDataResponse]()
    reseed_random_dev = Rpc[pb.ReseedRandomDevRequest, Empty]()
    set_guest_date_time = Rpc[pb.SetGuestDateTimeRequest, Empty]()
    copy_file = Rpc[pb.CopyFileRequest, Empty]()
    set_policy = Rpc[pb.SetPolicyRequest, Empty]()

    check = Rpc[health_pb2.CheckRequest, health_pb2.HealthCheckResponse](timeout_s=CHECK_TIMEOUT_S)
    version = Rpc[health_pb2.CheckRequest, health_pb2.VersionCheckResponse](timeout_s=CHECK_TIMEOUT_S)

    def __init__(self, address: AgentAddress, connection: Client) -> None:
        """Use `connect`."""
        self.address = address
        self._connection = connection

    @classmethod
    async def connect(cls, address: AgentAddress, *, timeout_s: float) -> Self:
        """Dial until the agent has answered Health's Check.

        Raises AgentDialTimeout and AgentDialFailed; nothing is left open then.
        """
        return cls(address, await _connect(address, timeout_s))

    async def reconnect(self, *, timeout_s: float) -> None:
        """A new connection in place of this one, which is closed first: for after a restore or a loss.

        Calls that still run on the old one raise ConnectionClosed. Raises as `connect` does.
        """
        await self.close()
        self._connection = await _connect(self.address, timeout_s)

    async def call(
        self,
        method: MethodDescriptor,
        request: Message,
        *,
        timeout_s: float | None = REQUEST_TIMEOUT_S,
        metadata: Mapping[str, Sequence[str]] | None = None,
    ) -> Any:
        """What every RPC above comes to."""
        return await self._connection.call(method, request, timeout_s=timeout_s, metadata=metadata)

    async def forward(self) -> ClientStream:
        """A connection into the machine, by the PortForward service: of our agent, others are UNIMPLEMENTED
        as soon as it is used. Raises ConnectionClosed."""
        from agent_client.protocols import port_forward_pb2

        service = port_forward_pb2.DESCRIPTOR.services_by_name["PortForward"]
        return await self._connection.stream(service.methods_by_name["Forward"])

    @property
    def closed(self) -> bool:
        """Whether the connection has ended, from either side."""
        return self._connection.closed

    async def wait_closed(self) -> None:
        await self._connection.wait_closed()

    async def close(self) -> None:
        """Idempotent; calls that still run raise ConnectionClosed."""
        await self._connection.close()


async def _connect(address: AgentAddress, timeout_s: float) -> Client:
    async def attempt(remaining_s: float) -> Client:
        connection = Client(*await dial_once(address, remaining_s))
        try:
            answer = await AgentClient(address, connection).check(
                health_pb2.CheckRequest(), timeout_s=min(remaining_s, _CONNECT_CHECK_TIMEOUT_S)
            )
            if answer.status != health_pb2.HealthCheckResponse.SERVING:
                raise ConnectionClosed("the agent says that it does not serve")
        except BaseException:
            await connection.close()
            raise
        log.debug("connected to the agent at %s", address)
        return connection

    return await keep_trying(address, attempt, timeout_s=timeout_s, transient=(OSError, EOFError, TtrpcError))
