"""containerd's Task service: requests and answers of the pod, and its errors as containerd's codes."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any as Json

from google.protobuf.any_pb2 import Any
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError

from shim.pod import Pod
from shim.protocols import task_v2_pb2 as api
from shim.protocols.task_types_pb2 import ProcessInfo
from shim.stdio import Stdio
from ttrpc import Code, Context, Server, StatusError
from virtcontainers import errors
from virtcontainers.config import ContainerType
from virtcontainers.errors import InvalidArgumentError, UnimplementedError

log = logging.getLogger(__name__)

SERVICE_V3 = "containerd.task.v3.Task"
"""Differs from v2 in the name only."""

_CODES: dict[type[errors.KataError], Code] = {
    errors.InvalidArgumentError: Code.INVALID_ARGUMENT,
    errors.NotFoundError: Code.NOT_FOUND,
    errors.AlreadyExistsError: Code.ALREADY_EXISTS,
    errors.FailedPreconditionError: Code.FAILED_PRECONDITION,
    errors.UnimplementedError: Code.UNIMPLEMENTED,
    errors.DeadlineExceededError: Code.DEADLINE_EXCEEDED,
    errors.UnavailableError: Code.UNAVAILABLE,
}


def map_error(error: Exception) -> StatusError | None:
    """The one place where our errors become containerd's. None: a bug, or the system's."""
    if not isinstance(error, errors.KataError):
        return None
    log.info("refused: %s", error)
    code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), Code.UNKNOWN)
    return StatusError(code, str(error))


class TaskService:
    """The handler of containerd.task.v2.Task and v3. `shutdown` is called when the last container is gone."""

    def __init__(self, pod: Pod, shutdown: Callable[[], None]) -> None:
        self._pod = pod
        self._shutdown = shutdown

    def register(self, server: Server) -> None:
        descriptor = api.DESCRIPTOR.services_by_name["Task"]
        server.register(descriptor, self)
        server.register(descriptor, self, name=SERVICE_V3)

    async def create(self, request: api.CreateTaskRequest, context: Context) -> api.CreateTaskResponse:
        if request.checkpoint:
            raise UnimplementedError(f"container {request.id}: a machine is not restored from a checkpoint")
        stdio = Stdio(request.stdin, request.stdout, request.stderr, request.terminal)
        config_path = runtime_config_path(request.options)
        try:
            pid = await self._pod.create(request.id, Path(request.bundle), request.rootfs, stdio, config_path)
        except asyncio.CancelledError:
            # containerd is gone. The next one, up to 1.6, would keep a shim without containers for ever.
            self._pod.when_empty(self._shutdown)
            raise
        return api.CreateTaskResponse(pid=pid)

    async def start(self, request: api.StartRequest, context: Context) -> api.StartResponse:
        return api.StartResponse(pid=await self._pod.start(request.id, request.exec_id))

    async def delete(self, request: api.DeleteRequest, context: Context) -> api.DeleteResponse:
        pid = self._pod.pid(request.id)
        task = await self._pod.delete(request.id, request.exec_id)
        return api.DeleteResponse(pid=pid, exit_status=task.exit_status, exited_at=task.exited_at)

    async def state(self, request: api.StateRequest, context: Context) -> api.StateResponse:
        task = self._pod.task(request.id, request.exec_id)
        return api.StateResponse(
            id=task.id,
            bundle=str(self._pod.container(request.id).bundle),
            pid=self._pod.pid(request.id),
            status=task.status,
            stdin=task.stdio.stdin,
            stdout=task.stdio.stdout,
            stderr=task.stdio.stderr,
            terminal=task.stdio.terminal,
            exit_status=task.exit_status,
            exited_at=task.exited_at,
            exec_id=task.exec_id,
        )

    async def pids(self, request: api.PidsRequest, context: Context) -> api.PidsResponse:
        return api.PidsResponse(processes=[ProcessInfo(pid=self._pod.pid(request.id))])

    async def wait(self, request: api.WaitRequest, context: Context) -> api.WaitResponse:
        task = await self._pod.wait(request.id, request.exec_id)
        return api.WaitResponse(exit_status=task.exit_status, exited_at=task.exited_at)

    async def kill(self, request: api.KillRequest, context: Context) -> Empty:
        await self._pod.kill(request.id, request.exec_id, request.signal, all_processes=request.all)
        return Empty()

    async def exec(self, request: api.ExecProcessRequest, context: Context) -> Empty:
        stdio = Stdio(request.stdin, request.stdout, request.stderr, request.terminal)
        await self._pod.exec(request.id, request.exec_id, json_of(request.spec, "process"), stdio)
        return Empty()

    async def resize_pty(self, request: api.ResizePtyRequest, context: Context) -> Empty:
        await self._pod.resize(request.id, request.exec_id, request.width, request.height)
        return Empty()

    async def close_io(self, request: api.CloseIORequest, context: Context) -> Empty:
        task = self._pod.task(request.id, request.exec_id)
        if request.stdin:
            task.release_stdin()
        return Empty()

    async def pause(self, request: api.PauseRequest, context: Context) -> Empty:
        await self._pod.pause(request.id)
        return Empty()

    async def resume(self, request: api.ResumeRequest, context: Context) -> Empty:
        await self._pod.resume(request.id)
        return Empty()

    async def checkpoint(self, request: api.CheckpointTaskRequest, context: Context) -> Empty:
        raise UnimplementedError(f"container {request.id}: a container in a machine has no checkpoint")

    async def update(self, request: api.UpdateTaskRequest, context: Context) -> Empty:
        await self._pod.running(request.id).update(json_of(request.resources, "resources"))
        return Empty()

    async def stats(self, request: api.StatsRequest, context: Context) -> api.StatsResponse:
        from shim.metrics import metrics, sandbox_metrics

        container = self._pod.running(request.id)
        in_guest = await container.stats()
        if container.config.container_type is ContainerType.POD_SANDBOX:
            found = sandbox_metrics(container.sandbox.stats(), in_guest)
        else:
            found = metrics(in_guest)
        # containerd's typeurl has the bare name, without a prefix.
        packed = Any(type_url=found.DESCRIPTOR.full_name, value=found.SerializeToString())
        return api.StatsResponse(stats=packed)

    async def connect(self, request: api.ConnectRequest, context: Context) -> api.ConnectResponse:
        try:
            pid = self._pod.pid(request.id)
        except errors.NotFoundError:
            pid = 0
        return api.ConnectResponse(shim_pid=os.getpid(), task_pid=pid)

    async def shutdown(self, request: api.ShutdownRequest, context: Context) -> Empty:
        """Ignored while there are containers: containerd says it after each of them, and also to give up one
        that is being created."""
        self._pod.when_empty(self._shutdown)
        return Empty()


def json_of(message: Any, what: str) -> dict[str, Json]:
    """The object of runtime-spec that containerd wraps as JSON. Raises InvalidArgumentError."""
    try:
        found = json.loads(message.value)
    except ValueError as error:
        raise InvalidArgumentError(f"{what} ({message.type_url}): {error}") from error
    if not isinstance(found, dict):
        raise InvalidArgumentError(f"{what} ({message.type_url}): {type(found).__name__}, expected an object")
    return found


def runtime_config_path(options: Any) -> Path | None:
    """`ConfigPath` of the runtime options; None without it, and for options of another runtime."""
    # Old CRI plugins say cri.runtimeoptions.v1.
    if not options.type_url.endswith("runtimeoptions.v1.Options"):
        return None
    from shim.protocols.runtimeoptions_pb2 import Options

    try:
        path = Options.FromString(options.value).config_path
    except DecodeError as error:
        raise InvalidArgumentError(f"runtime options {options.type_url}: {error}") from error
    return Path(path) if path else None
