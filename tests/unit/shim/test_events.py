"""Events on their way to a real ttrpc server: in order, none lost, through its restarts."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from google.protobuf.empty_pb2 import Empty

import shim.events
from shim.events import QUEUE_LIMIT, Publisher, TtrpcForwarder, forwarder, into_the_log
from shim.protocols import events_pb2
from shim.protocols.ttrpc_events_pb2 import DESCRIPTOR, ForwardRequest
from shim.protocols.types_pb2 import Envelope
from ttrpc import Code, Context, Server, StatusError

TIMEOUT_S = 120


class Containerd:
    """The Events service, on a socket of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.taken: list[Envelope] = []
        self.took = asyncio.Condition()
        self.refuse = ""

    async def forward(self, request: ForwardRequest, context: Context) -> Empty:
        if request.envelope.topic == self.refuse:
            raise StatusError(Code.INVALID_ARGUMENT, "not this one")
        async with self.took:
            self.taken.append(request.envelope)
            self.took.notify_all()
        return Empty()

    async def start(self) -> None:
        self.path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.path))
        listener.listen()
        self._server = Server()
        self._server.register(DESCRIPTOR.services_by_name["Events"], self)
        self._serving = asyncio.create_task(self._server.serve(listener))

    async def stop(self) -> None:
        await self._server.shutdown(0)
        await self._serving

    async def has(self, count: int) -> None:
        async with asyncio.timeout(TIMEOUT_S), self.took:
            await self.took.wait_for(lambda: len(self.taken) >= count)


def run(tmp_path: Path, body: Callable[[Containerd, Publisher], Awaitable[None]]) -> None:
    async def main() -> None:
        containerd = Containerd(tmp_path / "ttrpc")
        publisher = Publisher("k8s.io", TtrpcForwarder(f"unix://{containerd.path}"))
        try:
            await body(containerd, publisher)
        finally:
            await publisher.close(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shim.events, "_FORWARD_TIMEOUT_S", TIMEOUT_S)
        asyncio.run(main())


def test_an_event_as_containerd_reads_it(tmp_path: Path) -> None:
    async def body(containerd: Containerd, publisher: Publisher) -> None:
        await containerd.start()
        publisher.publish(events_pb2.TaskExit(container_id="c1", id="e1", pid=4711, exit_status=7))
        await publisher.close(TIMEOUT_S)
        await containerd.stop()
        (envelope,) = containerd.taken
        assert (envelope.namespace, envelope.topic) == ("k8s.io", "/tasks/exit")
        assert envelope.timestamp.ToSeconds() > 1_700_000_000
        assert envelope.event.type_url == "containerd.events.TaskExit"
        exit_ = events_pb2.TaskExit.FromString(envelope.event.value)
        assert (exit_.container_id, exit_.id, exit_.pid, exit_.exit_status) == ("c1", "e1", 4711, 7)

    run(tmp_path, body)


def test_events_wait_for_containerd_and_keep_their_order(tmp_path: Path) -> None:
    async def body(containerd: Containerd, publisher: Publisher) -> None:
        def publish(*numbers: int) -> None:
            for number in numbers:
                publisher.publish(events_pb2.TaskStart(container_id=str(number)))

        publish(0, 1)
        await containerd.start()
        await containerd.has(2)
        await containerd.stop()
        publish(2, 3, 4)
        await asyncio.sleep(0.1)
        await containerd.start()
        publish(5)
        await containerd.has(6)
        await containerd.stop()
        order = [events_pb2.TaskStart.FromString(e.event.value).container_id for e in containerd.taken]
        assert order == ["0", "1", "2", "3", "4", "5"]

    run(tmp_path, body)


def test_a_refused_event_does_not_hold_up_the_next(tmp_path: Path) -> None:
    async def body(containerd: Containerd, publisher: Publisher) -> None:
        containerd.refuse = "/tasks/oom"
        await containerd.start()
        publisher.publish(events_pb2.TaskOOM(container_id="c1"))
        publisher.publish(events_pb2.TaskPaused(container_id="c1"))
        await containerd.has(1)
        await containerd.stop()
        assert [envelope.topic for envelope in containerd.taken] == ["/tasks/paused"]

    run(tmp_path, body)


def test_the_queue_is_bounded_and_the_newest_stay(tmp_path: Path) -> None:
    async def body(containerd: Containerd, publisher: Publisher) -> None:
        for number in range(QUEUE_LIMIT + 100):
            publisher.publish(events_pb2.TaskStart(pid=number))
        await containerd.start()
        await containerd.has(QUEUE_LIMIT)
        await publisher.close(TIMEOUT_S)
        await containerd.stop()
        pids = [events_pb2.TaskStart.FromString(e.event.value).pid for e in containerd.taken]
        assert pids == [0, *range(101, QUEUE_LIMIT + 100)]

    run(tmp_path, body)


def test_without_an_address_the_binary_publishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shim.events, "_FORWARD_TIMEOUT_S", TIMEOUT_S)
    binary = tmp_path / "containerd"
    # Fails once: containerd may be restarting.
    binary.write_text(
        f"#!/bin/sh\n[ -e {tmp_path}/tried ] || {{ touch {tmp_path}/tried; echo no >&2; exit 1; }}\n"
        f'echo "$@" >>{tmp_path}/arguments\ncat >{tmp_path}/event\n'
    )
    binary.chmod(0o755)

    async def body() -> None:
        publisher = Publisher("default", forwarder("", str(binary), "/run/c.sock"))
        publisher.publish(events_pb2.TaskPaused(container_id="c1"))
        await publisher.close(TIMEOUT_S)

    asyncio.run(body())
    arguments = (tmp_path / "arguments").read_text().strip()
    assert arguments == "--address /run/c.sock publish --topic /tasks/paused --namespace default"
    event = Envelope().event.FromString((tmp_path / "event").read_bytes())
    assert event.type_url == "containerd.events.TaskPaused"


def test_a_caller_that_takes_no_events_gets_none() -> None:
    assert forwarder("", "", "") is into_the_log
