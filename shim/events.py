"""Telling containerd what happens: in order, and again after it was away."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable

from google.protobuf.message import Message

from shim.protocols import events_pb2, ttrpc_events_pb2
from shim.protocols.types_pb2 import Envelope
from ttrpc import Client, Code, StatusError, TtrpcError

log = logging.getLogger(__name__)

TOPICS: dict[type[Message], str] = {
    events_pb2.TaskCreate: "/tasks/create",
    events_pb2.TaskStart: "/tasks/start",
    events_pb2.TaskExit: "/tasks/exit",
    events_pb2.TaskDelete: "/tasks/delete",
    events_pb2.TaskExecAdded: "/tasks/exec-added",
    events_pb2.TaskExecStarted: "/tasks/exec-started",
    events_pb2.TaskPaused: "/tasks/paused",
    events_pb2.TaskResumed: "/tasks/resumed",
    events_pb2.TaskOOM: "/tasks/oom",
}
"""containerd's core/runtime/events.go."""

QUEUE_LIMIT = 2048
"""As in containerd's own publisher; when it is full the oldest go."""

_FORWARD_TIMEOUT_S = 5.0
_MAX_ANSWERED_ATTEMPTS = 5
_MAX_DELAY_S = 2.0

Forward = Callable[[Envelope], Awaitable[None]]


class Publisher:
    """A queue in front of `forward`, which raises OSError or TtrpcError for an event it could not deliver.

    While containerd is away events wait. One that containerd itself refuses is given up, with an error in
    the log.
    """

    def __init__(self, namespace: str, forward: Forward) -> None:
        self._namespace = namespace
        self._forward = forward
        self._queue: deque[Envelope] = deque()
        self._changed = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._runner = asyncio.create_task(self._run())

    def publish(self, event: Message) -> None:
        envelope = Envelope(namespace=self._namespace, topic=TOPICS[type(event)])
        envelope.timestamp.FromNanoseconds(time.time_ns())
        # containerd's typeurl has the bare name, without a prefix.
        envelope.event.type_url = event.DESCRIPTOR.full_name
        envelope.event.value = event.SerializeToString()
        log.debug("event %s", envelope.topic)
        if len(self._queue) == QUEUE_LIMIT:
            log.error("containerd has been away for too long: dropped an event %s", self._queue[1].topic)
            del self._queue[1]  # the first may be on its way
        self._queue.append(envelope)
        self._empty.clear()
        self._changed.set()

    async def close(self, timeout_s: float) -> None:
        """Give what is queued `timeout_s` to leave; idempotent."""
        if self._queue and not self._runner.done():
            waiting = asyncio.create_task(self._empty.wait())
            await asyncio.wait({waiting, self._runner}, timeout=timeout_s, return_when="FIRST_COMPLETED")
            waiting.cancel()
        if self._queue:
            log.error("%d events were not delivered", len(self._queue))
        self._runner.cancel()

    async def _run(self) -> None:
        while True:
            while self._queue:
                await self._deliver(self._queue[0])
                self._queue.popleft()
            self._empty.set()
            self._changed.clear()
            await self._changed.wait()

    async def _deliver(self, envelope: Envelope) -> None:
        delay_s = 0.05
        answered_attempts = 0
        told = False
        while True:
            try:
                await self._forward(envelope)
                return
            except StatusError as error:
                answered_attempts += 1
                retriable = error.code in (Code.DEADLINE_EXCEEDED, Code.UNAVAILABLE)
                if not retriable or answered_attempts == _MAX_ANSWERED_ATTEMPTS:
                    log.error("containerd did not take event %s: %s", envelope.topic, error)
                    return
            except (OSError, TtrpcError) as error:
                if not told:
                    log.warning("containerd is away, event %s waits: %s", envelope.topic, error)
                told = True
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _MAX_DELAY_S)


class TtrpcForwarder:
    """To containerd's Events service on `address`; a connection that has ended is made again."""

    def __init__(self, address: str) -> None:
        self._path = address.removeprefix("unix://")
        self._client: Client | None = None

    async def __call__(self, envelope: Envelope) -> None:
        method = ttrpc_events_pb2.DESCRIPTOR.services_by_name["Events"].methods_by_name["Forward"]
        if self._client is None or self._client.closed:
            self._client = await Client.connect(self._path)
        request = ttrpc_events_pb2.ForwardRequest(envelope=envelope)
        await self._client.call(method, request, timeout_s=_FORWARD_TIMEOUT_S)


class BinaryForwarder:
    """With `containerd publish`, for a containerd that names no ttrpc address."""

    def __init__(self, binary: str, address: str) -> None:
        self._command = [binary, "--address", address, "publish"]

    async def __call__(self, envelope: Envelope) -> None:
        command = [*self._command, "--topic", envelope.topic, "--namespace", envelope.namespace]
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(_FORWARD_TIMEOUT_S):
                _, stderr = await process.communicate(envelope.event.SerializeToString())
        except TimeoutError:
            process.kill()
            await process.wait()
            raise StatusError(Code.DEADLINE_EXCEEDED, f"{command[0]} publish hangs") from None
        if process.returncode:
            message = stderr.decode(errors="replace").strip() or f"exit status {process.returncode}"
            raise StatusError(Code.UNAVAILABLE, f"{command[0]} publish: {message}")


async def into_the_log(envelope: Envelope) -> None:
    """For a caller that takes no events, as CRI-O."""
    log.info("event %s", envelope.topic)


def forwarder(ttrpc_address: str, publish_binary: str, address: str) -> Forward:
    """The way that containerd offers."""
    if ttrpc_address:
        return TtrpcForwarder(ttrpc_address)
    if publish_binary and address:
        return BinaryForwarder(publish_binary, address)
    return into_the_log
