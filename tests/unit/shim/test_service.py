"""The Task service over a real ttrpc connection, with processes of this machine as containers."""

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.message import Message

import shim.pod
from katautils.hooks import HookError
from shim.pod import Pod
from shim.protocols import cgroups_v2_pb2, events_pb2
from shim.protocols import task_v2_pb2 as api
from shim.protocols.runtimeoptions_pb2 import Options
from shim.protocols.task_types_pb2 import CREATED, PAUSED, RUNNING, STOPPED
from shim.service import TaskService, map_error
from tests.unit.shim.local_sandbox import LocalKata, until
from ttrpc import Client, Code, ConnectionClosed, Server, StatusError
from virtcontainers.errors import InvalidArgumentError, KataError, UnavailableError

TIMEOUT_S = 120
PID = 4711


class Published:
    """Where events go."""

    def __init__(self) -> None:
        self.events: list[Message] = []

    def publish(self, event: Message) -> None:
        self.events.append(event)

    @property
    def names(self) -> list[str]:
        return [type(event).__name__ for event in self.events]

    def of(self, kind: type[Message]) -> list[Any]:
        return [event for event in self.events if type(event) is kind]


class Shim:
    """A served pod and its client."""

    def __init__(
        self,
        directory: Path,
        kata: LocalKata,
        pod: Pod,
        client: Client,
        events: Published,
        is_shut_down: asyncio.Event,
    ) -> None:
        self.directory = directory
        self.kata = kata
        self.pod = pod
        self.client = client
        self.task: Any = client.service(api.DESCRIPTOR.services_by_name["Task"])
        self.events = events
        self.is_shut_down = is_shut_down

    async def create(self, container_id: str = "c1", *command: str, **request: Any) -> api.CreateTaskResponse:
        self.kata.specs[container_id] = {"args": command or ("sleep", "1000")}
        request.setdefault("stdout", f"file://{self.directory}/{container_id}.out")
        response = await self.task.create(
            api.CreateTaskRequest(id=container_id, bundle=str(self.directory), **request)
        )
        assert isinstance(response, api.CreateTaskResponse)
        return response

    async def run(self, container_id: str, *command: str) -> None:
        await self.create(container_id, *command)
        await self.task.start(api.StartRequest(id=container_id))

    async def exec(self, exec_id: str, *command: str, **request: Any) -> None:
        spec = AnyMessage(value=json.dumps({"args": command, "cwd": "/"}).encode())
        request.setdefault("stdout", f"file://{self.directory}/{exec_id}.out")
        await self.task.exec(api.ExecProcessRequest(id="c1", exec_id=exec_id, spec=spec, **request))

    async def state(self, container_id: str = "c1", exec_id: str = "") -> api.StateResponse:
        response = await self.task.state(api.StateRequest(id=container_id, exec_id=exec_id))
        assert isinstance(response, api.StateResponse)
        return response

    async def wait(self, container_id: str = "c1", exec_id: str = "") -> int:
        response = await self.task.wait(api.WaitRequest(id=container_id, exec_id=exec_id))
        assert response.exited_at.ToSeconds() > 1_700_000_000
        return int(response.exit_status)

    async def kill(self, number: int = signal.SIGKILL, container_id: str = "c1", exec_id: str = "") -> None:
        await self.task.kill(api.KillRequest(id=container_id, exec_id=exec_id, signal=number))

    async def delete(self, container_id: str = "c1", exec_id: str = "") -> api.DeleteResponse:
        response = await self.task.delete(api.DeleteRequest(id=container_id, exec_id=exec_id))
        assert isinstance(response, api.DeleteResponse)
        return response

    def output(self, name: str) -> str:
        return (self.directory / f"{name}.out").read_text()


@asynccontextmanager
async def serving(directory: Path) -> AsyncIterator[Shim]:
    kata, events = LocalKata(), Published()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shim.pod, "katautils_create", kata)
        pod = Pod("default", events)  # type: ignore[arg-type]
        server = Server(map_error=map_error)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(directory / "socket"))
        listener.listen()
        is_shut_down = asyncio.Event()
        TaskService(pod, is_shut_down.set).register(server)
        serving = asyncio.create_task(server.serve(listener))
        client = await Client.connect(directory / "socket")
        served = Shim(directory, kata, pod, client, events, is_shut_down)
        try:
            yield served
        finally:
            await pod.close()
            await client.close()
            await server.shutdown(0)
            await serving


def run(tmp_path: Path, body: Callable[[Shim], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(TIMEOUT_S), serving(tmp_path) as shim:
            await body(shim)

    asyncio.run(main())


async def refused(code: Code, call: Awaitable[Any]) -> str:
    """The message of the refusal, which has no traceback in it."""
    with pytest.raises(StatusError) as caught:
        await call
    assert caught.value.code is code, caught.value
    assert "Traceback" not in caught.value.message
    return caught.value.message


def test_the_life_of_a_container(tmp_path: Path) -> None:
    async def body(shim: Shim) -> None:
        created = await shim.create("c1", "sh", "-c", "echo out; echo err >&2; exit 7", terminal=False)
        assert created.pid == PID
        assert (await shim.state()).status == CREATED
        waiting = asyncio.create_task(shim.wait())
        assert (await shim.task.start(api.StartRequest(id="c1"))).pid == PID
        assert await waiting == 7
        assert await shim.wait() == 7
        state = await shim.state()
        assert (state.status, state.exit_status, state.pid) == (STOPPED, 7, PID)
        assert (state.id, state.bundle) == ("c1", str(tmp_path))
        assert sorted(shim.output("c1").split()) == ["err", "out"]
        deleted = await shim.delete()
        assert (deleted.exit_status, deleted.pid) == (7, PID)
        assert shim.kata.sandbox and shim.kata.sandbox.is_deleted
        assert shim.kata.post_stopped == ["c1"]
        await refused(Code.NOT_FOUND, shim.state())
        await shim.task.shutdown(api.ShutdownRequest(id="c1"))
        await shim.is_shut_down.wait()
        assert shim.events.names == ["TaskCreate", "TaskStart", "TaskExit", "TaskDelete"]
        (exit_,) = shim.events.of(events_pb2.TaskExit)
        assert (exit_.container_id, exit_.id, exit_.pid, exit_.exit_status) == ("c1", "c1", PID, 7)

    run(tmp_path, body)


def test_what_create_is_given_arrives(tmp_path: Path) -> None:
    async def body(shim: Shim) -> None:
        options = AnyMessage(
            type_url="runtimeoptions.v1.Options",
            value=Options(config_path="/etc/kata-py/other.toml").SerializeToString(),
        )
        rootfs = api.CreateTaskRequest().rootfs.add(type="overlay", source="overlay", options=["ro"])
        await shim.create("c1", rootfs=[rootfs], options=options)
        assert shim.kata.config_path == Path("/etc/kata-py/other.toml")
        (created,) = shim.events.of(events_pb2.TaskCreate)
        assert (created.rootfs[0], created.bundle) == (rootfs, str(tmp_path))
        assert created.io.stdout == f"file://{tmp_path}/c1.out"

    run(tmp_path, body)


def test_a_refused_creation_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    async def body(shim: Shim) -> None:
        shim.kata.refuse = InvalidArgumentError("kernel /no/kernel: found nothing")
        assert "kernel /no/kernel" in await refused(Code.INVALID_ARGUMENT, shim.create())
        assert shim.events.events == []
        await shim.task.shutdown(api.ShutdownRequest(id="c1"))
        await shim.is_shut_down.wait()

    run(tmp_path, body)


def test_a_creation_that_is_given_up_is_the_end(tmp_path: Path) -> None:
    """What containerd does when its client goes away meanwhile."""

    async def body(shim: Shim) -> None:
        shim.kata.may_create.clear()
        creating = asyncio.create_task(shim.create())
        await shim.kata.creating.wait()
        await refused(Code.NOT_FOUND, shim.delete())
        await shim.task.shutdown(api.ShutdownRequest(id="c1"))
        assert not shim.is_shut_down.is_set()
        await shim.client.close()
        with pytest.raises(ConnectionClosed):
            await creating
        await shim.is_shut_down.wait()
        assert shim.events.events == []

    run(tmp_path, body)


def test_a_missing_command_ends_with_127_and_says_why(tmp_path: Path) -> None:
    """As a shell does it, wherever the guest notices: at the creation, at the start, in an exec."""

    async def body(shim: Shim) -> None:
        await shim.run("c1", "no-such-command")
        assert await shim.wait() == 127
        assert "no-such-command" in shim.output("c1")
        assert shim.events.names == ["TaskCreate", "TaskStart", "TaskExit"]
        await shim.delete()

        shim.kata.refuse = InvalidArgumentError("crun: executable file `nowhere` not found in $PATH")
        await shim.run("c2")
        assert await shim.wait("c2") == 127
        assert "nowhere" in shim.output("c2")
        await shim.delete("c2")

        shim.kata.refuse = None
        await shim.run("c1")
        await shim.exec("e1", "no-such-exec")
        await shim.task.start(api.StartRequest(id="c1", exec_id="e1"))
        assert await shim.wait("c1", "e1") == 127
        assert "no-such-exec" in shim.output("e1")

    run(tmp_path, body)


def test_a_hook_that_misses_a_command_is_a_failure(tmp_path: Path) -> None:
    async def body(shim: Shim) -> None:
        shim.kata.refuse = HookError("createRuntime hook /h: exec: executable file not found in $PATH")
        with pytest.raises(StatusError, match="createRuntime hook /h"):
            await shim.create("c1")
        await refused(Code.NOT_FOUND, shim.state())

    run(tmp_path, body)


def test_an_exec(tmp_path: Path) -> None:
    async def body(shim: Shim) -> None:
        await shim.run("c1", "sleep", "1000")
        await shim.exec("e1", "sh", "-c", "echo exec; exit 3")
        assert (await shim.state("c1", "e1")).status == CREATED
        await refused(Code.ALREADY_EXISTS, shim.exec("e1", "true"))
        await shim.task.start(api.StartRequest(id="c1", exec_id="e1"))
        assert await shim.wait("c1", "e1") == 3
        assert (await shim.state("c1", "e1")).id == "e1"
        assert shim.output("e1") == "exec\n"
        assert (await shim.delete("c1", "e1")).exit_status == 3
        await refused(Code.NOT_FOUND, shim.state("c1", "e1"))
        await shim.exec("e1", "true")
        names = ["TaskCreate", "TaskStart", "TaskExecAdded", "TaskExecStarted", "TaskExit", "TaskExecAdded"]
        assert shim.events.names == names
        assert (await shim.state()).status == RUNNING

    run(tmp_path, body)


def test_execs_end_before_their_container(tmp_path: Path) -> None:
    async def body(shim: Shim) -> None:
        await shim.run("c1", "sleep", "1000")
        for exec_id in ("e1", "e2"):
            await shim.exec(exec_id, "sleep", "1000")
            await shim.task.start(api.StartRequest(id="c1", exec_id=exec_id))
        assert shim.kata.sandbox
        container = shim.kata.sandbox.containers["c1"]
        # A guest's kernel ends them with their init.
        for process in (container.process, *container.processes.values()):
            await process.signal(signal.SIGKILL)
        assert await shim.wait() == 137
        exits = shim.events.of(events_pb2.TaskExit)
        assert {exit_.id for exit_ in exits[:2]} == {"e1", "e2"}
        assert [(exit_.id, exit_.exit_status) for exit_ in exits[2:]] == [("c1", 137)]
        await refused(Code.FAILED_PRECONDITION, shim.exec("e3", "true"))

    run(tmp_path, body)


def test_kill(tmp_path: Path) -> None:
    async def body(shim: Shim) -> None:
        await shim.run("c1", "sh", "-c", "trap 'exit 42' TERM; echo ready; while :; do sleep 0.01; done")
        await shim.exec("e1", "sleep", "1000")
        await refused(Code.FAILED_PRECONDITION, shim.kill(exec_id="e1"))
        await shim.task.start(api.StartRequest(id="c1", exec_id="e1"))
        await shim.kill(exec_id="e1")
        assert await shim.wait("c1", "e1") == 137
        await refused(Code.FAILED_PRECONDITION, shim.delete())
        await until(lambda: shim.output("c1") == "ready\n")
        await shim.kill(signal.SIGTERM)
        assert await shim.wait() == 42
        assert "process already finished" in await refused(Code.NOT_FOUND, shim.kill())
        await refused(Code.NOT_FOUND, shim.kill(container_id="c2"))
        await shim.delete()

    run(tmp_path, body)


def test_a_container_that_never_started_can_be_killed_and_deleted(tmp_path: Path) -> None:
    async def body(shim: Shim) -> None:
        await shim.create("c1")
        waiting = asyncio.create_task(shim.wait())
        await shim.kill()
        assert await waiting == 137
        await shim.delete()
        await shim.create("c1")
        waiting = asyncio.create_task(shim.wait())
        await asyncio.sleep(0)
        await shim.delete()
        assert await waiting == 137

    run(tmp_path, body)


def test_states_forbid(tmp_path: Path) -> None:
    async def body(shim: Shim) -> None:
        await shim.create("c1")
        await refused(Code.ALREADY_EXISTS, shim.create("c1"))
        await refused(Code.FAILED_PRECONDITION, shim.task.pause(api.PauseRequest(id="c1")))
        await refused(Code.FAILED_PRECONDITION, shim.exec("e1", "true"))
        await shim.task.start(api.StartRequest(id="c1"))
        await refused(Code.FAILED_PRECONDITION, shim.task.start(api.StartRequest(id="c1")))
        await refused(Code.FAILED_PRECONDITION, shim.task.resume(api.ResumeRequest(id="c1")))
        await refused(Code.FAILED_PRECONDITION, shim.delete())
        await refused(Code.NOT_FOUND, shim.wait("c1", "e1"))
        await refused(Code.UNIMPLEMENTED, shim.task.checkpoint(api.CheckpointTaskRequest(id="c1")))
        await refused(Code.UNIMPLEMENTED, shim.create("c2", checkpoint="/somewhere"))
        assert (await shim.state()).status == RUNNING

    run(tmp_path, body)


def test_pause_and_resume(tmp_path: Path) -> None:
    async def body(shim: Shim) -> None:
        await shim.run("c1", "sleep", "1000")
        await shim.task.pause(api.PauseRequest(id="c1"))
        assert (await shim.state()).status == PAUSED
        await shim.task.resume(api.ResumeRequest(id="c1"))
        assert (await shim.state()).status == RUNNING
        assert shim.events.names[2:] == ["TaskPaused", "TaskResumed"]

    run(tmp_path, body)


def test_update_and_stats(tmp_path: Path) -> None:
    async def body(shim: Shim) -> None:
        await shim.run("c1", "sleep", "1000")
        limits = AnyMessage(value=b'{"memory": {"limit": 1048576}}')
        await shim.task.update(api.UpdateTaskRequest(id="c1", resources=limits))
        assert shim.kata.sandbox
        assert shim.kata.sandbox.containers["c1"].resources == {"memory": {"limit": 1048576}}
        for wrong in (b"{", b"[]"):
            request = api.UpdateTaskRequest(id="c1", resources=AnyMessage(value=wrong))
            await refused(Code.INVALID_ARGUMENT, shim.task.update(request))
        stats = (await shim.task.stats(api.StatsRequest(id="c1"))).stats
        assert stats.type_url == "io.containerd.cgroups.v2.Metrics"
        assert cgroups_v2_pb2.Metrics.FromString(stats.value).pids.current == 1

    run(tmp_path, body)


def test_the_size_of_a_terminal_that_is_not_there_yet(tmp_path: Path) -> None:
    async def body(shim: Shim) -> None:
        await shim.run("c1", "sleep", "1000")
        await shim.exec("e1", "sleep", "1000", terminal=True)
        for width in (80, 132):
            await shim.task.resize_pty(api.ResizePtyRequest(id="c1", exec_id="e1", width=width, height=24))
            if width == 80:
                await shim.task.start(api.StartRequest(id="c1", exec_id="e1"))
            assert shim.kata.sandbox
            assert shim.kata.sandbox.containers["c1"].processes["e1"].size == (width, 24)

    run(tmp_path, body)


def test_stdin_and_its_end(tmp_path: Path) -> None:
    async def body(shim: Shim) -> None:
        os.mkfifo(tmp_path / "in")
        await shim.create("c1", "cat", stdin=str(tmp_path / "in"))
        await shim.task.start(api.StartRequest(id="c1"))
        await asyncio.to_thread((tmp_path / "in").write_bytes, b"typed\n")
        await asyncio.sleep(0.1)
        assert (await shim.state()).status == RUNNING
        await shim.task.close_io(api.CloseIORequest(id="c1", stdin=True))
        assert await shim.wait() == 0
        assert shim.output("c1") == "typed\n"

    run(tmp_path, body)


def test_a_dead_machine_ends_every_process_and_the_pod_can_be_deleted(tmp_path: Path) -> None:
    async def body(shim: Shim) -> None:
        await shim.run("c1", "sleep", "1000")
        await shim.exec("e1", "sleep", "1000")
        await shim.task.start(api.StartRequest(id="c1", exec_id="e1"))
        await shim.run("c2", "sleep", "1000")
        await shim.create("c3")
        assert shim.kata.sandbox
        shim.kata.sandbox.death.set_result("QEMU was killed")
        for container_id, exec_id in (("c1", ""), ("c1", "e1"), ("c2", ""), ("c3", "")):
            assert await shim.wait(container_id, exec_id) == 137
        exits = [exit_.id for exit_ in shim.events.of(events_pb2.TaskExit)]
        assert sorted(exits) == ["c1", "c2", "c3", "e1"]
        assert exits.index("e1") < exits.index("c1")
        for container_id in ("c2", "c3", "c1"):
            assert (await shim.delete(container_id)).exit_status == 137
        assert shim.kata.sandbox.is_deleted

    run(tmp_path, body)


@pytest.mark.parametrize("why", ["its main container ends", "it dies and nobody says why"])
def test_with_its_machine_a_container_ends_that_never_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    monkeypatch.setattr(shim.pod, "CAUSE_S", 0.1)

    async def body(shim: Shim) -> None:
        await shim.run("c1", "sleep", "1000")
        await shim.create("c3")
        sandbox = shim.kata.sandbox
        assert sandbox
        if why == "its main container ends":
            await sandbox.containers["c1"].process.signal(signal.SIGKILL)
        else:
            sandbox.die()
        assert [await shim.wait("c1"), await shim.wait("c3")] == [137, 137]
        exits = shim.events.of(events_pb2.TaskExit)
        assert [(exit_.id, exit_.exit_status) for exit_ in exits] == [("c1", 137), ("c3", 137)]
        for container_id in ("c3", "c1"):
            assert (await shim.delete(container_id)).exit_status == 137

    run(tmp_path, body)


def test_a_process_whose_machine_dies_of_the_same_kill_is_killed(tmp_path: Path) -> None:
    """A guest that answers no more is found dead while it is asked to kill."""

    async def body(shim: Shim) -> None:
        await shim.run("c1", "sleep", "1000")
        sandbox = shim.kata.sandbox
        assert sandbox

        async def kill(number: int, *, all_processes: bool) -> None:
            sandbox.death.set_result("the agent does not answer")
            raise UnavailableError("the machine's agent is gone")

        setattr(sandbox.containers["c1"], "kill", kill)  # noqa: B010
        assert "process already finished" in await refused(Code.NOT_FOUND, shim.kill())
        assert await shim.wait() == 137
        assert (await shim.delete()).exit_status == 137

    run(tmp_path, body)


def test_an_end_from_outside_is_published_too(tmp_path: Path) -> None:
    async def body(shim: Shim) -> None:
        await shim.run("c1", "sleep", "1000")
        await shim.create("c2")
        await shim.pod.close()
        assert [await shim.wait("c1"), await shim.wait("c2")] == [137, 137]
        assert {exit_.id for exit_ in shim.events.of(events_pb2.TaskExit)} == {"c1", "c2"}
        assert shim.kata.sandbox and shim.kata.sandbox.is_deleted
        await refused(Code.UNAVAILABLE, shim.create("c3"))

    run(tmp_path, body)


def test_what_stays_of_a_pod_does_not_end_the_shim_before_its_news(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(shim: Shim) -> None:
        await shim.run("c1", "sleep", "1000")
        sandbox = shim.kata.sandbox
        assert sandbox

        async def delete() -> None:
            raise KataError("cgroup /vc/kata_c1: Device or resource busy")

        setattr(sandbox, "delete", delete)  # noqa: B010
        await shim.pod.close()
        assert {exit_.id for exit_ in shim.events.of(events_pb2.TaskExit)} == {"c1"}
        assert "something of the pod stays: cgroup /vc/kata_c1" in caplog.text
        del sandbox.delete

    run(tmp_path, body)


def test_one_container_of_a_pod_ends_without_the_others(tmp_path: Path) -> None:
    async def body(shim: Shim) -> None:
        await shim.run("c1", "sleep", "1000")
        await shim.run("c2", "true")
        assert await shim.wait("c2") == 0
        await shim.delete("c2")
        await shim.task.shutdown(api.ShutdownRequest(id="c2"))
        assert not shim.is_shut_down.is_set()
        assert (await shim.state("c1")).status == RUNNING
        assert shim.kata.sandbox and not shim.kata.sandbox.is_deleted

    run(tmp_path, body)


def test_out_of_memory(tmp_path: Path) -> None:
    async def body(shim: Shim) -> None:
        await shim.run("c1", "sleep", "1000")
        assert shim.kata.sandbox
        shim.kata.sandbox.oom.put_nowait("c1")
        await until(lambda: "TaskOOM" in shim.events.names)
        assert not list(tmp_path.rglob("oom"))
        # CRI-O hears no events, and looks for a file in the bundle.
        container = shim.kata.sandbox.containers["c1"]
        container.config.annotations["io.kubernetes.cri-o.ContainerType"] = "container"
        shim.kata.sandbox.oom.put_nowait("c1")
        await until(lambda: list(tmp_path.rglob("oom")))

    run(tmp_path, body)


def test_output_that_a_child_holds_open_does_not_hold_the_exit_back_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shim.pod, "DRAIN_IDLE_S", 0.2)

    async def body(shim: Shim) -> None:
        await shim.run("c1", "sleep", "1000")
        await shim.exec("e1", "sh", "-c", "sleep 1000 &")
        await shim.task.start(api.StartRequest(id="c1", exec_id="e1"))
        assert shim.kata.sandbox
        process = shim.kata.sandbox.containers["c1"].processes["e1"]
        assert await shim.wait("c1", "e1") == 0
        await shim.delete("c1", "e1")
        process.abandon()

    run(tmp_path, body)


async def run_unread(shim: Shim, container_id: str, fifo: Path) -> int:
    """A container to its exit, whose output nobody has read yet: the descriptor, which does not block."""
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    # More than the fifo takes, and less than all the pipes on the way.
    await shim.create(container_id, "head", "-c", "200000", "/dev/zero", stdout=str(fifo))
    await shim.task.start(api.StartRequest(id=container_id))
    assert await shim.wait(container_id) == 0
    return reader


async def read_all(reader: int) -> int:
    """Of a descriptor that does not block, which is closed then: how many bytes there were."""
    size = 0
    while True:
        try:
            count = len(os.read(reader, 65536))
        except BlockingIOError:
            await asyncio.sleep(0.01)
            continue
        if not count:
            os.close(reader)
            return size
        size += count


@pytest.mark.parametrize("container_id", ["c1", "c2"])
def test_the_end_of_the_output_waits_for_a_reader_that_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, container_id: str
) -> None:
    """Also when it is the pod's main container, whose end is the machine's."""
    monkeypatch.setattr(shim.pod, "DRAIN_IDLE_S", 0.05)

    async def body(shim: Shim) -> None:
        if container_id != "c1":
            await shim.run("c1", "sleep", "1000")
        reader = await run_unread(shim, container_id, tmp_path / "fifo")
        sandbox = shim.kata.sandbox
        assert sandbox and not sandbox.is_stopped
        monkeypatch.setattr("shim.pod.DRAIN_IDLE_S", TIMEOUT_S)
        deleting = asyncio.create_task(shim.delete(container_id))
        assert await read_all(reader) == 200_000
        await deleting

    run(tmp_path, body)


def test_the_machine_ends_once_the_output_of_its_main_container_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shim.pod, "DRAIN_IDLE_S", 0.05)

    async def body(shim: Shim) -> None:
        reader = await run_unread(shim, "c1", tmp_path / "fifo")
        sandbox = shim.kata.sandbox
        assert sandbox and not sandbox.is_stopped
        await read_all(reader)
        await until(lambda: sandbox.is_stopped)
        assert not sandbox.is_deleted

    run(tmp_path, body)


def test_the_client_may_go_while_something_is_done(tmp_path: Path) -> None:
    async def body(shim: Shim) -> None:
        await shim.create("c1", "sleep", "1000")
        other = await Client.connect(tmp_path / "socket")
        stub = other.service(api.DESCRIPTOR.services_by_name["Task"])
        shim.kata.may_start.clear()
        starting = asyncio.create_task(stub.start(api.StartRequest(id="c1")))
        await shim.kata.starting.wait()
        await other.close()
        with pytest.raises(ConnectionClosed):
            await starting
        shim.kata.may_start.set()
        await until(lambda: "TaskStart" in shim.events.names)
        assert (await shim.state()).status == RUNNING
        assert shim.events.names == ["TaskCreate", "TaskStart"]

    run(tmp_path, body)


def test_a_shim_whose_containerd_dies_during_its_first_creation_ends(tmp_path: Path) -> None:
    async def body(shim: Shim) -> None:
        shim.kata.may_create.clear()
        creating = asyncio.create_task(shim.create("c1"))
        await shim.kata.creating.wait()
        await shim.client.close()
        with pytest.raises(ConnectionClosed):
            await creating
        await shim.is_shut_down.wait()

    run(tmp_path, body)


def test_a_container_killed_while_it_starts_ends(tmp_path: Path) -> None:
    async def body(shim: Shim) -> None:
        await shim.create("c1", "sleep", "1000")
        shim.kata.may_start.clear()
        starting = asyncio.create_task(shim.task.start(api.StartRequest(id="c1")))
        await shim.kata.starting.wait()
        killing = asyncio.create_task(shim.kill())
        await asyncio.sleep(0)
        # Answered after it, on the same connection: the kill has arrived.
        await shim.state()
        shim.kata.may_start.set()
        await asyncio.gather(starting, killing)
        assert await shim.wait() == 137
        assert (await shim.delete()).exit_status == 137
        assert shim.events.names == ["TaskCreate", "TaskStart", "TaskExit", "TaskDelete"]

    run(tmp_path, body)


@pytest.mark.parametrize("change", ["pause", "resume"])
def test_a_container_that_ends_while_it_is_paused_or_resumed_stays_ended(tmp_path: Path, change: str) -> None:
    async def body(shim: Shim) -> None:
        await shim.run("c1", "sleep", "1000")
        if change == "resume":
            await shim.task.pause(api.PauseRequest(id="c1"))
        assert shim.kata.sandbox
        container = shim.kata.sandbox.containers["c1"]

        async def end_meanwhile() -> None:
            await container.process.kill()
            await shim.wait()

        setattr(container, change, end_meanwhile)
        request = api.PauseRequest(id="c1") if change == "pause" else api.ResumeRequest(id="c1")
        await refused(Code.FAILED_PRECONDITION, getattr(shim.task, change)(request))
        assert (await shim.state()).status == STOPPED
        assert (await shim.delete()).exit_status == 137

    run(tmp_path, body)


def test_connect_and_pids(tmp_path: Path) -> None:
    async def body(shim: Shim) -> None:
        connected = await shim.task.connect(api.ConnectRequest(id="c1"))
        assert (connected.shim_pid, connected.task_pid) == (os.getpid(), 0)
        await refused(Code.NOT_FOUND, shim.task.pids(api.PidsRequest(id="c1")))
        await shim.create("c1")
        assert (await shim.task.connect(api.ConnectRequest(id="c1"))).task_pid == PID
        pids = await shim.task.pids(api.PidsRequest(id="c1"))
        assert [process.pid for process in pids.processes] == [PID]

    run(tmp_path, body)


def test_version_3_is_the_same_service_under_another_name(tmp_path: Path) -> None:
    async def body(shim: Shim) -> None:
        file = FileDescriptorProto()
        api.DESCRIPTOR.CopyToProto(file)
        file.name, file.package = "v3.proto", "containerd.task.v3"
        renamed = FileDescriptorProto.FromString(
            file.SerializeToString().replace(b".containerd.task.v2.", b".containerd.task.v3.")
        )
        descriptor_pool.Default().Add(renamed)
        service = descriptor_pool.Default().FindServiceByName("containerd.task.v3.Task")
        client = await Client.connect(tmp_path / "socket")
        request = message_factory.GetMessageClass(service.methods_by_name["Connect"].input_type)(id="c1")
        connected = await client.service(service).connect(request)
        assert connected.DESCRIPTOR.full_name == "containerd.task.v3.ConnectResponse"
        assert connected.shim_pid == os.getpid()
        await client.close()

    run(tmp_path, body)
