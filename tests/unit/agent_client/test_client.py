import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message_factory import GetMessageClass

import ttrpc
from agent_client import client as client_module
from agent_client.client import AgentClient
from agent_client.protocols import agent_pb2, health_pb2
from agent_client.transports import AgentDialTimeout, HybridVsockAddress, SerialAddress
from tests.unit import clock
from ttrpc.chardev import ChardevListener

LONG_S = 30.0
SERVICES = (
    agent_pb2.DESCRIPTOR.services_by_name["AgentService"],
    health_pb2.DESCRIPTOR.services_by_name["Health"],
)


class Agent:
    """A guest's agent as far as these tests go."""

    def __init__(self) -> None:
        self.exited = asyncio.Event()
        self.waiting = asyncio.Event()
        self.containers: list[str] = []
        self.check_answers = ["SERVING"]

    async def check(self, request: Any, context: Any) -> Any:
        answer = self.check_answers.pop(0) if len(self.check_answers) > 1 else self.check_answers[0]
        return health_pb2.HealthCheckResponse(status=answer)

    async def version(self, request: Any, context: Any) -> Any:
        return health_pb2.VersionCheckResponse(agent_version="1.2.3", grpc_version="0.0.1")

    async def create_container(self, request: Any, context: Any) -> Any:
        self.containers.append(request.container_id)
        return Empty()

    async def start_container(self, request: Any, context: Any) -> Any:
        raise ttrpc.StatusError(ttrpc.Code.NOT_FOUND, f"Invalid container id {request.container_id}")

    async def wait_process(self, request: Any, context: Any) -> Any:
        self.waiting.set()
        await self.exited.wait()
        return agent_pb2.WaitProcessResponse(status=7)

    async def read_stdout(self, request: Any, context: Any) -> Any:
        return agent_pb2.ReadStreamResponse(data=b"x" * request.len)

    async def write_stdin(self, request: Any, context: Any) -> Any:
        return agent_pb2.WriteStreamResponse(len=len(request.data))

    def server(self) -> ttrpc.Server:
        server = ttrpc.Server()
        for service in SERVICES:
            server.register(service, self)
        return server


class Machine:
    """A hybrid vsock device with an agent behind it."""

    def __init__(self, path: Path, agent: Agent) -> None:
        self.address = HybridVsockAddress(path)
        self.agent = agent
        self.listening = True
        self.refused = 0
        self.writers: set[asyncio.StreamWriter] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        await reader.readline()
        if self.listening:
            writer.write(b"OK 1\n")
            await self.agent.server().serve_connection(reader, writer)
        else:
            self.refused += 1
        writer.close()

    def kill(self) -> None:
        for writer in self.writers:
            writer.transport.abort()


@asynccontextmanager
async def machine(
    tmp_path: Path, agent: Agent | None = None, *, listening: bool = True
) -> AsyncIterator[Machine]:
    device = Machine(tmp_path / "v.sock", agent or Agent())
    device.listening = listening
    server = await asyncio.start_unix_server(device.serve, device.address.path)
    try:
        yield device
    finally:
        server.close()
        device.kill()
        await asyncio.sleep(0)


@asynccontextmanager
async def connected(device: Machine) -> AsyncIterator[AgentClient]:
    client = await AgentClient.connect(device.address, timeout_s=LONG_S)
    try:
        yield client
    finally:
        await client.close()


def test_every_rpc_of_the_agent_is_a_method_with_its_types():
    for service in SERVICES:
        for method in service.methods:
            rpc = AgentClient.__dict__[ttrpc.snake_case(method.name)]
            assert rpc.method.full_name == method.full_name
            types = rpc.__orig_class__.__args__
            assert types == (GetMessageClass(method.input_type), GetMessageClass(method.output_type)), (
                method.name
            )


def test_what_waits_for_a_process_has_no_timeout_and_the_rest_has_one():
    rpcs = {name: rpc for name, rpc in vars(AgentClient).items() if isinstance(rpc, client_module.Rpc)}

    unlimited = {name for name, rpc in rpcs.items() if rpc.timeout_s is None}

    assert unlimited == {"wait_process", "read_stdout", "read_stderr", "write_stdin", "get_oom_event"}


def test_a_connected_client_calls_the_agent(tmp_path):
    async def body():
        async with machine(tmp_path) as device, connected(device) as client:
            version = await client.version(health_pb2.CheckRequest())
            assert version.agent_version == "1.2.3"
            await client.create_container(
                agent_pb2.CreateContainerRequest(container_id="c1"), timeout_s=LONG_S
            )
            assert device.agent.containers == ["c1"]
            written = await client.write_stdin(agent_pb2.WriteStreamRequest(data=b"x" * (1 << 20)))
            assert written.len == 1 << 20

    asyncio.run(body())


def test_calls_run_side_by_side(tmp_path):
    async def body():
        async with machine(tmp_path) as device, connected(device) as client:
            waiting = asyncio.create_task(client.wait_process(agent_pb2.WaitProcessRequest(container_id="c")))
            for size in (1, 65536):
                answer = await client.read_stdout(agent_pb2.ReadStreamRequest(len=size))
                assert len(answer.data) == size
            assert not waiting.done()
            device.agent.exited.set()
            assert (await waiting).status == 7

    asyncio.run(body())


def test_the_agents_errors_keep_their_code_and_text(tmp_path):
    async def body():
        async with machine(tmp_path) as device, connected(device) as client:
            with pytest.raises(ttrpc.StatusError) as failure:
                await client.start_container(agent_pb2.StartContainerRequest(container_id="c9"))
            assert failure.value.code == ttrpc.Code.NOT_FOUND
            assert failure.value.message == "Invalid container id c9"
            with pytest.raises(ttrpc.StatusError) as failure:
                await client.get_metrics(agent_pb2.GetMetricsRequest())
            assert failure.value.code == ttrpc.Code.UNIMPLEMENTED

    asyncio.run(body())


def test_a_call_that_takes_too_long_is_a_deadline_exceeded(tmp_path):
    async def body():
        async with machine(tmp_path) as device, connected(device) as client:
            with pytest.raises(ttrpc.StatusError) as failure:
                await client.wait_process(agent_pb2.WaitProcessRequest(), timeout_s=0.05)
            assert failure.value.code == ttrpc.Code.DEADLINE_EXCEEDED
            assert not client.closed

    asyncio.run(body())


def test_connect_waits_until_the_agent_listens(tmp_path):
    async def body():
        async with machine(tmp_path, listening=False) as device:
            connecting = asyncio.create_task(AgentClient.connect(device.address, timeout_s=LONG_S))
            while device.refused < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            assert not connecting.done()
            device.listening = True
            await (await connecting).close()

    asyncio.run(body())


def test_connect_waits_until_the_agent_says_it_serves(tmp_path):
    async def body():
        agent = Agent()
        agent.check_answers = ["NOT_SERVING", "NOT_SERVING", "SERVING"]
        async with machine(tmp_path, agent) as device, connected(device):
            assert agent.check_answers == ["SERVING"]

    asyncio.run(body())


def test_a_device_without_an_agent_is_a_timeout(tmp_path):
    async def body():
        async with machine(tmp_path, listening=False) as device:
            connecting = asyncio.create_task(AgentClient.connect(device.address, timeout_s=LONG_S))
            while device.refused < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            clock.skip(LONG_S)
            with pytest.raises(
                AgentDialTimeout, match=r"v\.sock:1024: no answer within 30 s; last: the guest does"
            ):
                await connecting

    clock.run(body())


def test_an_agent_that_says_nothing_is_a_timeout(tmp_path):
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"OK 1\n")
        await reader.read()
        writer.close()

    async def body():
        server = await asyncio.start_unix_server(silent, tmp_path / "v.sock")
        async with server:
            with pytest.raises(AgentDialTimeout, match=r"no answer within 0\.2 s"):
                await AgentClient.connect(HybridVsockAddress(tmp_path / "v.sock"), timeout_s=0.2)

    asyncio.run(body())


def test_the_end_of_the_machine_ends_calls_and_is_seen(tmp_path):
    async def body():
        async with machine(tmp_path) as device, connected(device) as client:
            waiting = asyncio.create_task(client.wait_process(agent_pb2.WaitProcessRequest()))
            await device.agent.waiting.wait()
            assert not client.closed

            device.kill()

            with pytest.raises(ttrpc.ConnectionClosed):
                await waiting
            await client.wait_closed()
            assert client.closed
            with pytest.raises(ttrpc.ConnectionClosed):
                await client.check(health_pb2.CheckRequest())

    asyncio.run(body())


def test_a_client_reconnects_after_a_loss_and_in_full_health(tmp_path):
    async def body():
        async with machine(tmp_path) as device, connected(device) as client:
            device.kill()
            await client.wait_closed()
            await client.reconnect(timeout_s=LONG_S)
            assert not client.closed

            waiting = asyncio.create_task(client.wait_process(agent_pb2.WaitProcessRequest()))
            await device.agent.waiting.wait()
            await client.reconnect(timeout_s=LONG_S)
            with pytest.raises(ttrpc.ConnectionClosed):
                await waiting
            await client.check(health_pb2.CheckRequest())

    asyncio.run(body())


def test_a_closed_client_is_closed_twice(tmp_path):
    async def body():
        async with machine(tmp_path) as device:
            client = await AgentClient.connect(device.address, timeout_s=LONG_S)
            await client.close()
            await client.close()
            assert client.closed

    asyncio.run(body())


@asynccontextmanager
async def serial_machine(path: Path, agent: Agent, *, delay_s: float = 0) -> AsyncIterator[SerialAddress]:
    """A QEMU chardev on `path`, one host at a time, before a guest that serves `agent` on its port.

    What the guest says reaches the host `delay_s` later.
    """
    host_end, guest_end = socket.socketpair()
    host_end.setblocking(False)
    guest_end.setblocking(False)
    port_reader, port_writer = await asyncio.open_connection(sock=host_end)
    turn = asyncio.Lock()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float = 0) -> None:
        while data := await reader.read(65536):
            asyncio.get_running_loop().call_later(delay_s, writer.write, data)
            await writer.drain()

    async def chardev(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with turn:
            to_host = asyncio.create_task(pump(port_reader, writer, delay_s))
            try:
                await pump(reader, port_writer)
            except ConnectionError:
                pass
            finally:
                to_host.cancel()
                writer.close()

    async def guest() -> None:
        listener = ChardevListener(guest_end.detach())
        try:
            while True:
                reader, writer = await listener.accept()
                await agent.server().serve_connection(reader, writer)
        finally:
            listener.close()

    server = await asyncio.start_unix_server(chardev, path)
    serving = asyncio.create_task(guest())
    try:
        yield SerialAddress(path)
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        server.close()
        port_writer.transport.abort()


def test_a_serial_port_carries_calls_of_one_host_after_the_other(tmp_path):
    async def body():
        agent = Agent()
        async with serial_machine(tmp_path / "agent.sock", agent) as address:
            for name in ("first", "second"):
                client = await AgentClient.connect(address, timeout_s=LONG_S)
                await client.create_container(agent_pb2.CreateContainerRequest(container_id=name))
                answer = await client.read_stdout(agent_pb2.ReadStreamRequest(len=1 << 20))
                assert answer.data == b"x" * (1 << 20)
                await client.close()
        assert agent.containers == ["first", "second"]

    asyncio.run(body())


def test_a_new_host_on_a_serial_port_does_not_see_the_old_ones_answers(tmp_path):
    async def body():
        agent = Agent()
        async with serial_machine(tmp_path / "agent.sock", agent) as address:
            old = await AgentClient.connect(address, timeout_s=LONG_S)
            waiting = asyncio.create_task(old.wait_process(agent_pb2.WaitProcessRequest()))
            await agent.waiting.wait()
            await old.close()
            with pytest.raises(ttrpc.ConnectionClosed):
                await waiting

            new = await AgentClient.connect(address, timeout_s=LONG_S)
            agent.exited.set()
            assert (await new.version(health_pb2.CheckRequest())).agent_version == "1.2.3"
            await new.close()

    asyncio.run(body())


def test_a_guest_that_is_slow_to_answer_is_reached_over_a_serial_port(tmp_path):
    async def body():
        async with serial_machine(tmp_path / "agent.sock", Agent(), delay_s=0.3) as address:
            client = await AgentClient.connect(address, timeout_s=LONG_S)
            await client.close()

    asyncio.run(body())


def test_a_serial_port_without_a_guest_is_a_timeout(tmp_path):
    async def body():
        async def absorb(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        async with await asyncio.start_unix_server(absorb, tmp_path / "agent.sock"):
            with pytest.raises(
                AgentDialTimeout, match=r"^agent at serial://.*agent\.sock: no answer within 0\.3 s"
            ):
                await AgentClient.connect(SerialAddress(tmp_path / "agent.sock"), timeout_s=0.3)
            await asyncio.sleep(0.01)  # the device's side sees the end

    asyncio.run(body())


def test_the_client_imports_nothing_that_a_shim_could_do_without():
    heavy = "{'grpc', 'pyroute2', 'psutil', 'http', 'email', 'tomllib', 'xml', 'importlib.metadata'}"
    script = f"import sys, agent_client.client; print(sorted({heavy} & sys.modules.keys()))"

    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout

    assert loaded.strip() == "[]"
