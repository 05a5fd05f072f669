"""Block devices, plugged into a running machine and out of it; after Kata's `hotplugBlockDevice`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from virtcontainers.config import BlockDeviceDriver, HypervisorConfig
from virtcontainers.errors import InvalidArgumentError
from virtcontainers.hypervisor.base import HypervisorError, QMPFailed
from virtcontainers.hypervisor.qemu_cmdline import BridgeSlot
from virtcontainers.hypervisor.qmp import QMP

AGENT_BLK = "blk"
AGENT_SCSI = "scsi"
"""Kata's names, in its agent's API."""

_DRIVERS = {BlockDeviceDriver.VIRTIO_BLK: AGENT_BLK, BlockDeviceDriver.VIRTIO_SCSI: AGENT_SCSI}
_THREADS = "threads"

_SCSI_CONTROLLER = "scsi0"
_IOTHREAD = "iothread-block"
_LUNS_PER_TARGET = 256
_SCSI_DEVICES = 256 * _LUNS_PER_TARGET
"""As Kata counts them."""

_POLL_S = 0.02
_UNDO_TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class BlockDrive:
    """What is to be plugged in: a disk, or a file that is the raw image of one."""

    fd: int
    """Open as it will be used; QEMU gets a duplicate, and opens nothing itself."""
    is_device: bool
    readonly: bool
    share_rw: bool
    """Others may write at the same time; else QEMU refuses what another QEMU has."""


@dataclass(frozen=True)
class PluggedDrive:
    """`address` is what the agent finds it by: `driver` says which kind."""

    number: int
    driver: str
    address: str
    fdset: int
    slot: BridgeSlot | None

    @property
    def node(self) -> str:
        return f"drive-{self.number}"

    @property
    def device(self) -> str:
        return f"virtio-drive-{self.number}"


class BlockHotplug:
    """Of one machine."""

    def __init__(
        self,
        qmp: QMP,
        config: HypervisorConfig,
        *,
        take_slot: Callable[[], BridgeSlot],
        give_back_slot: Callable[[BridgeSlot], None],
        logger: logging.LoggerAdapter[logging.Logger],
    ) -> None:
        self._qmp = qmp
        self._config = config
        self._take_slot = take_slot
        self._give_back_slot = give_back_slot
        self._log = logger
        self._aio = config.block_device_aio
        self._lock = asyncio.Lock()
        self._count = 0
        self._has_controller = False
        self._has_iothread = False

    async def add(self, drive: BlockDrive) -> PluggedDrive:
        """The guest may take a moment to see it: its agent waits. Raises HypervisorError; nothing stays
        then."""
        driver = _DRIVERS[self._config.block_device_driver]
        async with self._lock, AsyncExitStack() as undo:
            number, self._count = self._count, self._count + 1
            fdset = await self._qmp.add_fd(drive.fd)
            undo.push_async_callback(self._try, "remove-fd", {"fdset-id": fdset})
            plugged = PluggedDrive(number, driver, "", fdset, None)
            await self._add_node(plugged, drive)
            undo.push_async_callback(self._try, "blockdev-del", {"node-name": plugged.node})
            device: dict[str, object] = {"id": plugged.device, "drive": plugged.node}
            device["share-rw"] = drive.share_rw
            if driver == AGENT_BLK:
                slot = self._take_slot()
                undo.callback(self._give_back_slot, slot)
                device |= {"driver": "virtio-blk-pci", "disable-legacy": "on", **slot.place}
                device |= await self._iothread()
                plugged = PluggedDrive(number, driver, slot.pci_path, fdset, slot)
            else:
                await self._add_controller()
                # Never one that was used before: the guest may be about to forget the device it had there.
                target, lun = divmod(number % _SCSI_DEVICES, _LUNS_PER_TARGET)
                device |= {"driver": "scsi-hd", "bus": f"{_SCSI_CONTROLLER}.0", "scsi-id": target, "lun": lun}
                plugged = PluggedDrive(number, driver, f"{target}:{lun}", fdset, None)
            await self._add_device(device)
            undo.pop_all()
            return plugged

    async def _add_device(self, device: dict[str, object]) -> None:
        try:
            await self._qmp.execute("device_add", device)
        except BaseException:
            # QEMU may have done it for a caller who has no more patience.
            with contextlib.suppress(HypervisorError):
                await self._qmp.unplug(str(device["id"]), timeout_s=_UNDO_TIMEOUT_S)
            raise

    async def _add_node(self, plugged: PluggedDrive, drive: BlockDrive) -> None:
        node: dict[str, object] = {
            "driver": "host_device" if drive.is_device else "file",
            "node-name": plugged.node,
            "filename": f"/dev/fdset/{plugged.fdset}",
            "read-only": drive.readonly,
            # What the guest discards need not be kept: an image file becomes smaller again.
            "discard": "unmap",
        }
        try:
            await self._qmp.execute("blockdev-add", {**node, **self._ways(self._aio)})
        except QMPFailed as error:
            if self._aio == _THREADS:
                raise
            try:
                await self._qmp.execute("blockdev-add", {**node, **self._ways(_THREADS)})
            except QMPFailed:
                raise error from None
            self._log.warning(
                'block_device_aio = "%s" in [hypervisor.qemu] cannot be had here, "%s" is taken: %s',
                self._aio,
                _THREADS,
                error,
            )
            self._aio = _THREADS

    def _ways(self, aio: str) -> dict[str, object]:
        config = self._config
        cache: dict[str, object] = {}
        if config.block_device_cache_set:
            direct, noflush = config.block_device_cache_direct, config.block_device_cache_noflush
            cache = {"direct": direct, "no-flush": noflush}
        if aio == "native":
            # Linux does nothing asynchronously for it through the page cache, and QEMU refuses.
            cache["direct"] = True
        return {"aio": aio, **({"cache": cache} if cache else {})}

    async def _add_controller(self) -> None:
        """At the first need: a pod without block devices pays for none, and no template has one."""
        if self._has_controller:
            return
        slot = self._take_slot()
        controller = {"driver": "virtio-scsi-pci", "id": _SCSI_CONTROLLER, "disable-legacy": "on"}
        try:
            await self._add_device({**controller, **slot.place, **await self._iothread()})
        except BaseException:
            self._give_back_slot(slot)
            raise
        self._has_controller = True

    async def _iothread(self) -> dict[str, object]:
        if not self._config.enable_iothreads:
            return {}
        if not self._has_iothread:
            await self._qmp.execute("object-add", {"qom-type": "iothread", "id": _IOTHREAD})
            self._has_iothread = True
        return {"iothread": _IOTHREAD}

    async def remove(self, plugged: PluggedDrive, *, timeout_s: float) -> None:
        """Have the guest let go of it. Raises HypervisorError when it does not in time: it stays then, and
        so does its slot, for another call."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout_s
        await self._qmp.unplug(plugged.device, timeout_s=timeout_s)
        while True:
            try:
                await self._qmp.execute("blockdev-del", {"node-name": plugged.node})
                break
            except QMPFailed:
                # A call whose answer nobody waited for may have done it.
                if plugged.node not in await self._nodes():
                    break
                # The device that has gone may hold it for a moment.
                if clock() > deadline:
                    raise
            await asyncio.sleep(_POLL_S)
        await self._try("remove-fd", {"fdset-id": plugged.fdset})
        # Last: once, however often it takes.
        if plugged.slot is not None:
            self._give_back_slot(plugged.slot)

    async def resize(self, plugged: PluggedDrive, size_bytes: int) -> None:
        """Have the guest see a larger size; a file becomes as large, of a disk it must be what it has.

        Raises InvalidArgumentError for a smaller one, for which QEMU would cut a file off, and QMPFailed.
        """
        found = (await self._nodes())[plugged.node]["image"]["virtual-size"]
        if size_bytes < found:
            raise InvalidArgumentError(
                f"found a size of {size_bytes} bytes, expected at least the {found} of now"
            )
        await self._qmp.execute("block_resize", {"node-name": plugged.node, "size": size_bytes})

    async def _nodes(self) -> dict[str, Any]:
        """QEMU's BlockDeviceInfo of each, by its name."""
        nodes = await self._qmp.execute("query-named-block-nodes", {"flat": True})
        return {node["node-name"]: node for node in nodes}

    async def _try(self, command: str, arguments: dict[str, object]) -> None:
        with contextlib.suppress(HypervisorError):
            await self._qmp.execute(command, arguments)
