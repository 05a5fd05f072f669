"""The VM cache's client, after Kata's `factory/grpccache`: machines that a server (`cache`) keeps ready.

A machine is handed over by a file, `owner`, in its directory: whoever creates it has the machine, be it the
client, with the sandbox's id, or a server that takes back what nobody came for.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError, Message

from virtcontainers.errors import DeadlineExceededError, FailedPreconditionError, KataError, UnavailableError
from virtcontainers.factory.base import FactoryBase, OnPlanned
from virtcontainers.factory.grpc_unary import call_unary
from virtcontainers.protocols.cache_pb2 import GrpcStatus, GrpcVM, GrpcVMConfig
from virtcontainers.vm import VM, VMConfig

log = logging.getLogger(__name__)

MACHINE_ID = re.compile(r"cache-[0-9a-f]{12}")
OWNER = "owner"

_CALL_TIMEOUT_S = 5.0
_ATTACH_TIMEOUT_S = 10.0

Answer = TypeVar("Answer", bound=Message)


class CacheMisfit(FailedPreconditionError):
    """The cache's machines are of another configuration."""


class GrpcCache(FactoryBase):
    """The machines of the server on `endpoint`."""

    shares_already = True

    def __init__(self, endpoint: Path, config: VMConfig) -> None:
        """Use `fetch`."""
        self.endpoint = endpoint
        self.config = config

    @classmethod
    async def fetch(cls, endpoint: Path, config: VMConfig) -> GrpcCache:
        """The cache of machines of `config`. Raises KataError's classes when there is no server, or it does
        not answer; CacheMisfit when its machines are others."""
        found = await _call(endpoint, "Config", GrpcVMConfig)
        expected = config.to_grpc()
        differences = [
            *_differences(endpoint, found.Data, expected.Data),
            *_differences(endpoint, found.AgentConfig, expected.AgentConfig),
        ]
        if differences:
            raise CacheMisfit(f"the VM cache at {endpoint} does not fit: {'; '.join(differences)}")
        return cls(endpoint, config)

    async def get_base_vm(
        self, vm_id: str, config: VMConfig, *, shared_path: Path | None, on_planned: OnPlanned
    ) -> VM:
        """A paused machine, whose share is the sandbox's from now on. Its id is the cache's and stays."""
        found = await _call(self.endpoint, "GetBaseVM", GrpcVM)
        if not MACHINE_ID.fullmatch(found.id):
            raise KataError(f"{self.endpoint}: found machine {found.id!r}, expected cache-<12 hex digits>")
        vm = VM.from_grpc(found, self.config, shared_path=shared_path)
        vm.assign_sandbox(vm_id)
        on_planned(vm.hypervisor.save(), share_of=vm.id)
        # Until here it is the server's, which ends what nobody takes.
        if not claim(vm.hypervisor.directory, vm_id):
            raise UnavailableError(f"{self.endpoint}: machine {vm.id} was taken back")
        try:
            await vm.attach(_ATTACH_TIMEOUT_S)
        except BaseException:
            await asyncio.shield(vm.stop())
            raise
        log.debug("machine %s is the sandbox's", vm.id, extra={"sandbox": vm_id})
        return vm


def claim(directory: Path, owner: str) -> bool:
    """Make a cached machine the owner's; False: it has one already, or is gone. Raises KataError."""
    try:
        fd = os.open(directory / OWNER, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except (FileExistsError, FileNotFoundError):
        return False
    except OSError as error:
        raise KataError(f"{directory / OWNER}: {error.strerror}") from error
    with os.fdopen(fd, "w") as file:
        file.write(owner)
    return True


async def cache_status(endpoint: Path) -> GrpcStatus:
    """The server's pid, and the machines that are ready. Raises KataError's classes."""
    return await _call(endpoint, "Status", GrpcStatus)


async def quit_cache(endpoint: Path, timeout_s: float) -> bool:
    """End the server and the machines that are ready; False: there is none. Raises KataError's classes."""
    try:
        pid = (await cache_status(endpoint)).pid
        pidfd = os.pidfd_open(pid)
    except (UnavailableError, ProcessLookupError):
        return False
    try:
        await _call(endpoint, "Quit", Empty)
        if not await _ended(pidfd, timeout_s):
            raise DeadlineExceededError(f"{endpoint}: the server (pid {pid}) does not end in {timeout_s:g} s")
    finally:
        os.close(pidfd)
    return True


async def _call(endpoint: Path, method: str, answer: type[Answer]) -> Answer:
    data = await call_unary(endpoint, f"/cache.CacheService/{method}", timeout_s=_CALL_TIMEOUT_S)
    try:
        return answer.FromString(data)
    except DecodeError as error:
        raise KataError(
            f"{endpoint}: {method}: found {len(data)} bytes, expected {answer.__name__}"
        ) from error


def _differences(endpoint: Path, found_json: bytes, expected_json: bytes) -> Iterator[str]:
    try:
        found = dict(json.loads(found_json))
    except (ValueError, TypeError) as error:
        raise KataError(f"{endpoint}: Config: found what is no JSON object: {error}") from error
    expected = json.loads(expected_json)
    for key in dict.fromkeys((*expected, *found)):
        if (key in found, found.get(key)) != (key in expected, expected.get(key)):
            yield f"{key}: found {found.get(key, 'nothing')}, expected {expected.get(key, 'nothing')}"


async def _ended(pidfd: int, timeout_s: float) -> bool:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(pidfd, ended.set)
    try:
        async with asyncio.timeout(timeout_s):
            await ended.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(pidfd)
    return True
