"""The small API of virtcontainers.sandbox with processes of this machine in place of a guest's."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from agent_client.protocols import agent_pb2
from virtcontainers.config import ContainerType, Mount
from virtcontainers.container import ContainerState
from virtcontainers.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    KataError,
    NotFoundError,
    UnavailableError,
)


async def until(condition: Callable[[], object]) -> None:
    """For what happens in another process or thread. The caller has a timeout."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


class LocalProcess:
    def __init__(self, sandbox: LocalSandbox, process_id: str, spec: dict[str, Any]) -> None:
        self.sandbox = sandbox
        self.id = process_id
        self.spec = spec
        self.terminal = bool(spec.get("terminal"))
        self.size: tuple[int, int] | None = None
        self.is_removed = False
        """From the guest, and what was unread with it."""
        self._process: asyncio.subprocess.Process | None = None

    @property
    def process(self) -> asyncio.subprocess.Process:
        assert self._process is not None
        return self._process

    async def spawn(self) -> None:
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self.spec["args"],
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
                limit=1 << 16,
            )
        except FileNotFoundError:
            name = self.spec["args"][0]
            raise KataError(f"crun: executable file `{name}` not found in $PATH: No such file") from None

    async def read_stdout(self, size: int) -> bytes:
        assert self.process.stdout is not None
        return await self._read(self.process.stdout, size)

    async def read_stderr(self, size: int) -> bytes:
        assert self.process.stderr is not None
        return await self._read(self.process.stderr, size)

    async def _read(self, stream: asyncio.StreamReader, size: int) -> bytes:
        if self.is_removed:
            raise UnavailableError(f"process {self.id} is gone")
        return await stream.read(size)

    async def write_stdin(self, data: bytes) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        await self.process.stdin.drain()
        return len(data)

    async def close_stdin(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    async def resize(self, width: int, height: int) -> None:
        self.size = (width, height)

    async def signal(self, number: int) -> None:
        if self.process.returncode is not None:
            raise NotFoundError(f"process {self.id}: ESRCH")
        os.killpg(self.process.pid, number)

    async def wait(self) -> int:
        # Not asyncio's own wait, which is for the end of the pipes too.
        await until(lambda: self.process.returncode is not None)
        status = self.process.returncode
        assert status is not None
        if self.sandbox.is_dead:
            raise UnavailableError("the machine is gone")
        return status if status >= 0 else 128 - status

    def abandon(self) -> None:
        """End what it has left running, and its pipes."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process._transport.close()  # type: ignore[attr-defined]

    async def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self.die()
            await self._process.wait()

    def die(self) -> None:
        """It may have died already without our having heard of it."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


class LocalContainer:
    def __init__(self, sandbox: LocalSandbox, container_id: str, spec: dict[str, Any]) -> None:
        self.sandbox = sandbox
        self.id = container_id
        self.config = SimpleNamespace(container_type=ContainerType.SINGLE_CONTAINER, annotations={})
        self.state = ContainerState.CREATED
        self.process = LocalProcess(sandbox, container_id, spec["process"])
        self.processes: dict[str, LocalProcess] = {}
        self.resources: dict[str, Any] = {}

    async def start(self) -> None:
        await self.process.spawn()
        self.state = ContainerState.RUNNING

    async def enter(self, exec_id: str, spec: dict[str, Any]) -> LocalProcess:
        if exec_id in self.processes:
            raise AlreadyExistsError(exec_id)
        process = LocalProcess(self.sandbox, exec_id, spec)
        await process.spawn()
        self.processes[exec_id] = process
        return process

    async def kill(self, number: int, *, all_processes: bool = False) -> None:
        if self.process.process.returncode is not None:
            raise FailedPreconditionError(f"container {self.id} is stopped")
        await self.process.signal(number)

    async def pause(self) -> None:
        await self.process.signal(signal.SIGSTOP)

    async def resume(self) -> None:
        await self.process.signal(signal.SIGCONT)

    async def update(self, resources: dict[str, Any]) -> None:
        self.resources = resources

    async def stats(self) -> agent_pb2.StatsContainerResponse:
        response = agent_pb2.StatsContainerResponse()
        response.cgroup_stats.pids_stats.current = 1
        return response

    async def stop(self, *, force: bool = False) -> None:
        for process in self.all_processes():
            await process.kill()
        self.state = ContainerState.STOPPED

    def all_processes(self) -> Sequence[LocalProcess]:
        return (*self.processes.values(), self.process)

    async def delete(self) -> None:
        await self.stop()
        for process in self.all_processes():
            process.is_removed = True
        del self.sandbox.containers[self.id]


class LocalSandbox:
    def __init__(self, sandbox_id: str) -> None:
        self.id = sandbox_id
        self.hypervisor_pid = 4711
        self.agent = self
        self.containers: dict[str, LocalContainer] = {}
        self.is_dead = False
        self.is_stopped = False
        self.is_deleted = False
        self.death: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.oom: asyncio.Queue[str] = asyncio.Queue()

    async def monitor(self) -> str:
        reason = await self.death
        self.die()
        return reason

    def die(self) -> None:
        """Everything in one instant."""
        self.is_dead = True
        for container in self.containers.values():
            for process in container.all_processes():
                process.die()

    async def check(self) -> None:
        if self.is_dead:
            raise UnavailableError("the machine is gone")

    async def wait_oom(self) -> str:
        return await self.oom.get()

    async def stop(self) -> None:
        for container in self.containers.values():
            await container.stop()
            for process in container.all_processes():
                process.is_removed = True
        self.is_stopped = True

    async def delete(self) -> None:
        await self.stop()
        self.is_deleted = True


class LocalKata:
    """In place of katautils.create. `refuse` is what the next creation fails with."""

    def __init__(self) -> None:
        self.sandbox: LocalSandbox | None = None
        self.specs: dict[str, dict[str, Any]] = {}
        self.config_path: Path | None = None
        self.refuse: Exception | None = None
        self.post_stopped: list[str] = []
        self.creating = asyncio.Event()
        self.may_create = asyncio.Event()
        self.may_create.set()
        self.starting = asyncio.Event()
        self.may_start = asyncio.Event()
        self.may_start.set()

    async def create_sandbox(
        self,
        bundle: Path,
        container_id: str,
        rootfs: Sequence[Mount],
        runtime_config_path: Path | None,
        *,
        terminal: bool,
    ) -> LocalSandbox:
        self.config_path = runtime_config_path
        await self._check()
        self.sandbox = LocalSandbox(container_id)
        await self.create_container(self.sandbox, bundle, container_id, rootfs, terminal=terminal)
        return self.sandbox

    async def create_container(
        self,
        sandbox: LocalSandbox,
        bundle: Path,
        container_id: str,
        rootfs: Sequence[Mount],
        *,
        terminal: bool,
    ) -> LocalContainer:
        await self._check()
        spec = {"process": {**self.specs[container_id], "terminal": terminal}}
        sandbox.containers[container_id] = LocalContainer(sandbox, container_id, spec)
        return sandbox.containers[container_id]

    async def _check(self) -> None:
        self.creating.set()
        await self.may_create.wait()
        if self.refuse is not None:
            raise self.refuse

    async def start_container(self, container: LocalContainer) -> None:
        self.starting.set()
        await self.may_start.wait()
        await container.start()

    async def post_stop_hooks(self, container: LocalContainer) -> None:
        self.post_stopped.append(container.id)
