"""The VM cache's server: it keeps machines ready, and hands them out over gRPC, after Kata's `factory/cache`.

A machine is paused, its agent has answered, and nobody is connected to it. Its directory, `cache-<12 hex
digits>`, holds `server`, which names the process that made it, and `owner` once somebody has taken it, see
`grpccache`. From then on it is its pod's, and outlives the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# gRPC would start threads of its own in the child of each fork, which end that child before it is QEMU.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")

import grpc  # type: ignore[import-untyped]
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from virtcontainers.config import RUN_VC, SHARED_SANDBOXES
from virtcontainers.errors import FailedPreconditionError, KataError
from virtcontainers.factory import Factory
from virtcontainers.factory.base import FactoryBase
from virtcontainers.factory.fingerprint import made_of
from virtcontainers.factory.grpccache import MACHINE_ID, OWNER, claim
from virtcontainers.factory.template import Template
from virtcontainers.fs_share import FilesystemShare
from virtcontainers.hypervisor.base import Persisted, vm_dir
from virtcontainers.hypervisor.process import end_processes
from virtcontainers.hypervisor.qemu import remove_directory
from virtcontainers.protocols.cache_pb2 import GrpcStatus, GrpcVM, GrpcVMConfig, GrpcVMStatus
from virtcontainers.vm import VM, VMConfig

log = logging.getLogger(__name__)

CLAIM_TIMEOUT_S = 30.0

_SERVER = "server"
_CLAIM_POLL_S = 0.1
_LAST_CLAIMS_S = 1.0
_SETTLE_S = 0.1
_GIVEN_PAUSE_S = 1.0
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
_CALLS_GRACE_S = 10.0
_CONNECT_TIMEOUT_S = 1.0


@dataclass(eq=False)
class _Machine:
    """One that nobody has claimed yet."""

    vm: VM
    share: FilesystemShare
    made_of: dict[str, str]
    answer: GrpcVM
    watch: asyncio.Task[None] = field(init=False)
    """For its death while it is ready, then for its owner."""

    async def end(self) -> None:
        await self.vm.stop()
        self.share.cleanup()


class CacheServer:
    """Keeps `number` machines of `base` ready; `on_ready` is told how many there are after each new one."""

    def __init__(
        self,
        endpoint: Path,
        number: int,
        base: FactoryBase,
        config: VMConfig,
        *,
        on_ready: Callable[[int], None] = lambda number: None,
        claim_timeout_s: float = CLAIM_TIMEOUT_S,
    ) -> None:
        self.endpoint = endpoint
        self.number = number
        self.base = base
        self.config = config
        self._on_ready = on_ready
        self._claim_timeout_s = claim_timeout_s
        self._ready: list[_Machine] = []
        self._handed_out: set[_Machine] = set()
        self._endings: set[asyncio.Task[None]] = set()
        self._last_given_at = float("-inf")
        self._missing = asyncio.Event()
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        """Have `run` return."""
        self._stopped.set()

    async def run(self) -> None:
        """Serve until `stop`, Quit or cancellation; the machines that nobody has taken are ended then.

        Raises KataError when it cannot listen, FailedPreconditionError when another server does.
        """
        server = grpc.aio.server()
        tasks = {asyncio.create_task(self._fill()), asyncio.create_task(self._stopped.wait())}
        try:
            await self._listen(server)
            try:
                await end_orphans()
            except KataError as error:
                log.warning("machines of an earlier server stay: %s", error)
            self._missing.set()
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await asyncio.shield(self._close(server, tasks))

    async def _close(self, server: Any, tasks: set[asyncio.Task[Any]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.stop(_CALLS_GRACE_S)
        # Who has just been given a machine takes it at once, or never.
        if self._handed_out:
            await asyncio.wait({machine.watch for machine in self._handed_out}, timeout=_LAST_CLAIMS_S)
        for machine in (*self._handed_out, *self._ready):
            machine.watch.cancel()
        for machine in list(self._handed_out):
            self._take_back(machine)
        for machine in self._ready:
            self._end(machine)
        await asyncio.gather(*self._endings)

    # -- making machines

    async def _fill(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            await self._missing.wait()
            if len(self._ready) >= self.number:
                self._missing.clear()
                continue
            # Whoever has just been given a machine has more need of the CPUs.
            await asyncio.sleep(self._last_given_at + _GIVEN_PAUSE_S - asyncio.get_running_loop().time())
            try:
                machine = await self._make()
            except (KataError, OSError) as error:
                log.error("no machine for the cache, the next try is in %g s: %s", pause_s, error)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                continue
            pause_s = _FIRST_PAUSE_S
            self._ready.append(machine)
            machine.watch = asyncio.create_task(self._watch_life(machine))
            log.info("%d of %d machines are ready", len(self._ready), self.number)
            self._on_ready(len(self._ready))

    async def _make(self) -> _Machine:
        config = self.config
        vm_id = f"cache-{secrets.token_hex(6)}"
        share = FilesystemShare(vm_id)

        def on_planned(persisted: Persisted, share_of: str | None = None) -> None:
            _make_directory(Path(persisted["directory"]))
            share.prepare()

        try:
            parts = made_of(config)
            factory = Factory(await self._current_base())
            vm = await factory.get_vm(vm_id, config, shared_path=share.shared_path, on_planned=on_planned)
            try:
                await _rest(vm)
                return _Machine(vm, share, parts, vm.to_grpc())
            except BaseException:
                await asyncio.shield(vm.stop())
                raise
        except BaseException:
            share.cleanup()
            raise

    async def _current_base(self) -> FactoryBase:
        """A template is made anew when there is none any more, or what it was made of has changed."""
        if isinstance(self.base, Template):
            self.base = await Template.new(self.base.path, self.config)
        self.base.outlives_us = True
        return self.base

    async def _watch_life(self, machine: _Machine) -> None:
        reason = await machine.vm.hypervisor.wait_dead()
        log.error("machine %s was ready and ended: %s", machine.vm.id, reason)
        self._ready.remove(machine)
        self._missing.set()
        self._end(machine)

    def _end(self, machine: _Machine) -> None:
        """In the background; the server ends after it."""

        async def end() -> None:
            try:
                await machine.end()
            except KataError as error:
                log.error("machine %s does not go: %s", machine.vm.id, error)

        ending = asyncio.create_task(end())
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)

    # -- handing them out

    def _take(self) -> _Machine | None:
        """One that is what would be made now."""
        try:
            parts = made_of(self.config)
        except KataError as error:
            log.error("no machine is handed out: %s", error)
            return None
        while self._ready:
            machine = self._ready.pop(0)
            machine.watch.cancel()
            self._missing.set()
            if machine.made_of == parts:
                return machine
            log.warning("machine %s is ended: what it was made of has changed", machine.vm.id)
            self._end(machine)
        return None

    async def _watch_claim(self, machine: _Machine) -> None:
        owner = machine.vm.hypervisor.directory / OWNER
        deadline = asyncio.get_running_loop().time() + self._claim_timeout_s
        # Its pod may be over, and the directory gone, before we look again.
        while owner.parent.exists() and not owner.exists():
            if asyncio.get_running_loop().time() > deadline:
                break
            await asyncio.sleep(_CLAIM_POLL_S)
        self._take_back(machine)

    def _take_back(self, machine: _Machine) -> None:
        """End it, unless its pod has it."""
        self._handed_out.discard(machine)
        directory = machine.vm.hypervisor.directory
        if claim(directory, _process(os.getpid())):
            log.warning("machine %s was handed out, and nobody has come for it", machine.vm.id)
            self._end(machine)
        elif not directory.exists():
            # The pod is over; it may have been killed before it took the share.
            self._end(machine)

    # -- CacheService

    async def _listen(self, server: Any) -> None:
        methods = {
            "Config": self._answer_config,
            "GetBaseVM": self._answer_get_base_vm,
            "Status": self._answer_status,
            "Quit": self._answer_quit,
        }
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                method, request_deserializer=Empty.FromString, response_serializer=_serialize
            )
            for name, method in methods.items()
        }
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("cache.CacheService", handlers),)
        )
        with _free_endpoint(self.endpoint):
            before = os.umask(0o177)
            try:
                server.add_insecure_port(f"unix:{self.endpoint}")
            except RuntimeError as error:
                raise KataError(f"vm_cache_endpoint {self.endpoint}: {error}") from error
            finally:
                os.umask(before)
            await server.start()

    async def _answer_config(self, request: Empty, context: Any) -> GrpcVMConfig:
        return self.config.to_grpc()

    async def _answer_get_base_vm(self, request: Empty, context: Any) -> GrpcVM:
        machine = self._take()
        if machine is None:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no machine is ready")
        assert machine is not None
        self._last_given_at = asyncio.get_running_loop().time()
        self._handed_out.add(machine)
        machine.watch = asyncio.create_task(self._watch_claim(machine))
        log.info("machine %s is handed out", machine.vm.id)
        return machine.answer

    async def _answer_status(self, request: Empty, context: Any) -> GrpcStatus:
        machines = [
            GrpcVMStatus(pid=machine.vm.hypervisor.pid, cpu=machine.answer.cpu, memory=machine.answer.memory)
            for machine in self._ready
        ]
        return GrpcStatus(pid=os.getpid(), vmstatus=machines)

    async def _answer_quit(self, request: Empty, context: Any) -> Empty:
        self.stop()
        return Empty()


async def _rest(vm: VM) -> None:
    """Leave a machine whose agent has answered to whoever comes."""
    await vm.disconnect()
    # What the agent does when its first host has gone is done when it answers the next.
    await vm.connect(vm.config.agent.dial_timeout_s)
    # Whoever comes asks this first. An emulated CPU is slow when it does a thing for the first time.
    await vm.reseed_rng()
    await vm.sync_time()
    await vm.disconnect()
    await vm.unplug_hvsock()
    # It may still be busy with that, and would go on with it when somebody waits for it.
    await asyncio.sleep(_SETTLE_S)
    await vm.pause()
    await vm.detach()


def _serialize(answer: Message) -> bytes:
    return answer.SerializeToString()


@contextlib.contextmanager
def _free_endpoint(endpoint: Path) -> Iterator[None]:
    """A place for the socket, for one server at a time to take. Raises KataError's classes."""
    try:
        endpoint.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        directory = os.open(endpoint.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise KataError(f"vm_cache_endpoint {endpoint}: {error}") from error
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        _remove_stale(endpoint)
        yield
    except OSError as error:
        raise KataError(f"vm_cache_endpoint {endpoint}: {error}") from error
    finally:
        os.close(directory)


def _remove_stale(endpoint: Path) -> None:
    try:
        mode = endpoint.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FailedPreconditionError(
            f"vm_cache_endpoint {endpoint}: found what is no socket, expected nothing or the socket of a "
            "server that has ended"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as client:
        client.settimeout(_CONNECT_TIMEOUT_S)
        try:
            client.connect(str(endpoint))
        except ConnectionRefusedError:
            endpoint.unlink(missing_ok=True)
            return
        except FileNotFoundError:  # its server has just ended
            return
        except TimeoutError:
            server = "that does not answer"
        else:
            pid, _, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            server = f"with pid {pid}"
    raise FailedPreconditionError(
        f"vm_cache_endpoint {endpoint}: found a server {server}, expected none; `kata-py factory destroy` "
        "ends it"
    )


# -- what a server has left that was killed


def _make_directory(directory: Path) -> None:
    """A machine's, of this server. Raises KataError."""
    # Without its server in it, another server that starts just then takes it for an orphan.
    new = directory.with_name(f".{directory.name}")
    try:
        new.mkdir(parents=True, mode=0o700)
        (new / _SERVER).write_text(_process(os.getpid()))
        new.rename(directory)
    except OSError as error:
        with contextlib.suppress(OSError):
            remove_directory(new)
        raise KataError(f"machine {directory}: {error}") from error


async def end_orphans() -> int:
    """End the machines that a server has made which is gone, and that no pod has; returns how many.

    Idempotent. Raises KataError, after having tried all, with the first that would not go.
    """
    failures: list[KataError] = []
    ended = 0
    for directory in _named(RUN_VC / "vm"):
        try:
            if _is_orphan(directory) and await _end_orphan(directory):
                ended += 1
        except KataError as error:
            failures.append(error)
    # Of machines that were only about to be made.
    for new in (RUN_VC / "vm").glob(".cache-*"):
        if _is_orphan(new):
            with contextlib.suppress(OSError):
                remove_directory(new)
    for root in _named(SHARED_SANDBOXES):
        if not vm_dir(RUN_VC, root.name).exists():
            try:
                FilesystemShare(root.name).cleanup()
            except KataError as error:
                failures.append(error)
    if failures:
        raise failures[0]
    return ended


def _named(parent: Path) -> list[Path]:
    return sorted(entry for entry in parent.glob("cache-*") if MACHINE_ID.fullmatch(entry.name))


def _is_orphan(directory: Path) -> bool:
    return not _is_process(_read(directory / _SERVER))


async def _end_orphan(directory: Path) -> bool:
    us = _process(os.getpid())
    if not claim(directory, us):
        owner = _read(directory / OWNER)
        # A server's, which has died in the middle of this; no sandbox's id has a space.
        if " " not in owner or _is_process(owner):
            return False
    log.warning("machine %s is ended: its server is gone, and no pod has it", directory.name)
    await end_processes(directory)
    FilesystemShare(directory.name).cleanup()
    remove_directory(directory)
    return True


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _process(pid: int) -> str:
    """A process as no later one of the same pid is called: "<pid> <its start>"; "" for one that has ended.

    Source: proc_pid_stat(5).
    """
    fields = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return f"{pid} {fields[19]}" if fields and fields[0] not in "ZX" else ""


def _is_process(name: str) -> bool:
    pid = name.partition(" ")[0]
    return pid.isdecimal() and _process(int(pid)) == name
