"""The devices of one pod: each is plugged into its machine once, for all of its containers that have it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from agent_client.protocols import agent_pb2
from virtcontainers.device.block import DeviceInfo, Key, key_of, opened
from virtcontainers.errors import InvalidArgumentError, KataError
from virtcontainers.fs_share import GuestFolders
from virtcontainers.hypervisor.base import Hypervisor
from virtcontainers.hypervisor.hotplug_block import BlockDrive, PluggedDrive

log = logging.getLogger(__name__)

_UNPLUG_TIMEOUT_S = 10.0


class BlockDevice:
    """One disk, and how many containers have it."""

    def __init__(self, key: Key) -> None:
        self.key = key
        self.attach_count = 0
        self.readonly = False
        self.plugged: PluggedDrive | None = None
        """Also when nobody has it any more, while the guest has not let go of it."""
        self.lock = asyncio.Lock()

    def agent_storage(self, *, fstype: str, options: tuple[str, ...], mount_point: str) -> agent_pb2.Storage:
        """The disk's file system, for the guest to mount. Valid while attached."""
        assert self.plugged is not None
        return agent_pb2.Storage(
            driver=self.plugged.driver,
            source=self.plugged.address,
            fstype=fstype,
            options=options,
            mount_point=mount_point,
        )

    def agent_device(self, container_path: str) -> agent_pb2.Device:
        """The disk itself, for the entry of that path in a spec's linux.devices. Valid while attached."""
        assert self.plugged is not None
        return agent_pb2.Device(
            type=self.plugged.driver, id=self.plugged.address, container_path=container_path
        )


class DeviceManager:
    """`allowed` lasts while the devices of its paths are opened."""

    def __init__(
        self, sandbox_id: str, allowed: Callable[[list[Path]], contextlib.AbstractContextManager[None]]
    ) -> None:
        self._allowed = allowed
        self._devices: dict[Key, BlockDevice] = {}
        self._log = logging.LoggerAdapter(log, {"sandbox": sandbox_id})

    def check(self, info: DeviceInfo) -> None:
        """Whether it could be plugged in, as far as that is known before. Raises KataError's classes."""
        device = self._devices.get(key_of(info.path))
        if device is None or device.attach_count == 0:
            with self._opened(info):
                pass

    @contextlib.contextmanager
    def _opened(self, info: DeviceInfo) -> Iterator[tuple[Key, BlockDrive]]:
        if (guests := GuestFolders().part(info.path)) is not None:
            # Whose root user makes symlinks and device nodes there.
            raise InvalidArgumentError(
                f"block device {info.path}: a guest can write in {guests.folder}, expected another path"
            )
        with contextlib.ExitStack() as stack:
            with self._allowed([info.path]):
                found = stack.enter_context(opened(info))
            yield found

    async def attach(self, hypervisor: Hypervisor, info: DeviceInfo) -> BlockDevice:
        """Plug it in unless it is, for one `detach`. Raises KataError's classes."""
        key = key_of(info.path)
        device = self._devices.setdefault(key, BlockDevice(key))
        async with device.lock:
            if device.attach_count == 0:
                try:
                    # From the last time: a guest that was asked for it may let go of it at any moment.
                    await self._unplug(hypervisor, device)
                except KataError as error:
                    raise type(error)(f"block device {info.path}: {error}") from error
                with self._opened(info) as (found, drive):
                    if found != key:
                        raise InvalidArgumentError(f"block device {info.path} has become another")
                    device.plugged = await hypervisor.hotplug_block(drive)
                device.readonly = info.readonly
            elif device.readonly != info.readonly and (device.readonly or not info.has_filesystem):
                # Of a file system each has a mount of its own, which can be read-only.
                found_it = "read-only" if device.readonly else "writable"
                raise InvalidArgumentError(
                    f"block device {info.path}: found it {found_it} in the machine already, for another "
                    "container of the pod, expected all of them to write or none"
                )
            device.attach_count += 1
        return device

    async def detach(self, hypervisor: Hypervisor, device: BlockDevice) -> None:
        """Unplug it when nobody has it any more. Raises nothing: a guest that keeps it is logged, and has it
        until it is attached again or the pod ends."""
        async with device.lock:
            device.attach_count -= 1
            if device.attach_count:
                return
            try:
                await self._unplug(hypervisor, device)
            except KataError as error:
                self._log.warning("a block device stays: %s", error)

    async def _unplug(self, hypervisor: Hypervisor, device: BlockDevice) -> None:
        """Raises KataError's classes; it stays plugged then."""
        if device.plugged is not None:
            await hypervisor.hotunplug_block(device.plugged, timeout_s=_UNPLUG_TIMEOUT_S)
            device.plugged = None
