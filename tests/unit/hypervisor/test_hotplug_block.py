"""What QEMU is asked, and what is taken back when it refuses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

import pytest

from virtcontainers.config import HypervisorConfig
from virtcontainers.hypervisor.base import QMPFailed
from virtcontainers.hypervisor.hotplug_block import BlockDrive, BlockHotplug
from virtcontainers.hypervisor.qemu_cmdline import BridgeSlot

DRIVE = BlockDrive(fd=0, is_device=True, readonly=False, share_rw=True)


class Monitor:
    """Answers as QEMU, and refuses what `refuses` says of a command."""

    def __init__(self, refuses: Mapping[str, Any] | None = None) -> None:
        self.refuses = refuses or {}
        self.asked: list[tuple[str, dict[str, Any]]] = []

    async def add_fd(self, fd: int) -> int:
        return 7

    async def execute(self, command: str, arguments: dict[str, Any]) -> Any:
        self.asked.append((command, arguments))
        refused = self.refuses.get(command)
        if refused and all(arguments.get(key) == value for key, value in refused.items()):
            raise QMPFailed(f"QMP {command}: refused")
        return []

    async def unplug(self, device_id: str, *, timeout_s: float) -> None:
        self.asked.append(("unplug", {"id": device_id}))

    def commands(self) -> list[str]:
        return [command for command, _ in self.asked]

    def arguments(self, command: str) -> list[dict[str, Any]]:
        return [arguments for name, arguments in self.asked if name == command]


def hotplug(monitor: Monitor, slots: list[BridgeSlot], **config: Any) -> BlockHotplug:
    return BlockHotplug(
        monitor,  # type: ignore[arg-type]
        HypervisorConfig(**config),
        take_slot=lambda: slots.pop(0),
        give_back_slot=slots.append,
        logger=logging.LoggerAdapter(logging.getLogger("test")),
    )


def slots() -> list[BridgeSlot]:
    return [BridgeSlot(0, 1), BridgeSlot(0, 2)]


def test_scsi_has_one_controller_and_a_new_lun_for_each_disk() -> None:
    monitor, free = Monitor(), slots()
    block = hotplug(monitor, free, block_device_driver="virtio-scsi", enable_iothreads=True)
    plugged = [asyncio.run(block.add(DRIVE)) for _ in range(2)]
    assert [(drive.driver, drive.address) for drive in plugged] == [("scsi", "0:0"), ("scsi", "0:1")]
    controller, *disks = monitor.arguments("device_add")
    assert (controller["driver"], controller["iothread"]) == ("virtio-scsi-pci", "iothread-block")
    assert [(disk["driver"], disk["bus"], disk["lun"]) for disk in disks] == [
        ("scsi-hd", "scsi0.0", 0),
        ("scsi-hd", "scsi0.0", 1),
    ]
    assert len(monitor.arguments("object-add")) == 1
    assert free == slots()[1:]


@pytest.mark.parametrize("command", ["blockdev-add", "device_add"])
def test_what_was_done_is_taken_back_when_qemu_refuses(command: str) -> None:
    monitor, free = (
        Monitor(
            {command: {"driver": "host_device"} if command == "blockdev-add" else {"bus": "pci-bridge-0"}}
        ),
        slots(),
    )
    with pytest.raises(QMPFailed):
        asyncio.run(hotplug(monitor, free, block_device_driver="virtio-blk").add(DRIVE))
    assert sorted(free, key=lambda slot: slot.slot) == slots()
    undone = ["unplug", "blockdev-del", "remove-fd"] if command == "device_add" else ["remove-fd"]
    assert monitor.commands()[-len(undone) :] == undone


@pytest.mark.parametrize("device", ["scsi0", "virtio-drive-0"])
def test_what_qemu_has_done_for_a_call_that_is_cut_short_is_taken_back(device: str) -> None:
    class Slow(Monitor):
        is_slow = True

        async def execute(self, command: str, arguments: dict[str, Any]) -> Any:
            found = await super().execute(command, arguments)
            if command == "device_add" and arguments["id"] == device and self.is_slow:
                asyncio.current_task().cancel()  # type: ignore[union-attr]
                await asyncio.sleep(0)
            return found

    async def body() -> None:
        monitor, free = Slow(), slots()
        block = hotplug(monitor, free, block_device_driver="virtio-scsi")
        with pytest.raises(asyncio.CancelledError):
            await asyncio.create_task(block.add(DRIVE))
        assert monitor.commands()[-3:] == ["unplug", "blockdev-del", "remove-fd"]
        assert monitor.arguments("unplug") == [{"id": device}]
        assert len(free) == (2 if device == "scsi0" else 1)
        monitor.is_slow = False
        assert (await block.add(DRIVE)).address == "0:1"

    asyncio.run(body())


def test_a_disk_that_does_not_go_at_once_gives_its_slot_back_once() -> None:
    class Reluctant(Monitor):
        nodes: tuple[str, ...] = ("drive-0",)

        async def execute(self, command: str, arguments: dict[str, Any]) -> Any:
            found = await super().execute(command, arguments)
            if command == "query-named-block-nodes":
                return [{"node-name": name} for name in self.nodes]
            return found

    monitor, free = Reluctant(), slots()
    block = hotplug(monitor, free, block_device_driver="virtio-blk")
    plugged = asyncio.run(block.add(DRIVE))
    monitor.refuses = {"blockdev-del": {"node-name": "drive-0"}}
    for _ in range(2):
        with pytest.raises(QMPFailed):
            asyncio.run(block.remove(plugged, timeout_s=0))
        assert free == slots()[1:]
    # It has gone meanwhile: QEMU refuses as before.
    monitor.nodes = ()
    asyncio.run(block.remove(plugged, timeout_s=0))
    assert sorted(free, key=lambda slot: slot.slot) == slots()
    assert monitor.commands()[-1] == "remove-fd"


def test_another_way_of_input_and_output_is_taken_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    monitor = Monitor({"blockdev-add": {"aio": "native"}})
    block = hotplug(monitor, slots(), block_device_aio="native")
    for _ in range(2):
        asyncio.run(block.add(DRIVE))
    ways = [(node["aio"], node.get("cache")) for node in monitor.arguments("blockdev-add")]
    assert ways == [("native", {"direct": True}), ("threads", None), ("threads", None)]
    (warning,) = (record.getMessage() for record in caplog.records if record.name != "asyncio")
    assert 'block_device_aio = "native" in [hypervisor.qemu] cannot be had here' in warning


def test_cache_keys_count_when_they_are_set() -> None:
    keys = {"block_device_cache_direct": True, "block_device_cache_noflush": True}
    monitor = Monitor()
    asyncio.run(hotplug(monitor, slots(), **keys).add(DRIVE))
    asyncio.run(hotplug(monitor, slots(), block_device_cache_set=True, **keys).add(DRIVE))
    assert [node.get("cache") for node in monitor.arguments("blockdev-add")] == [
        None,
        {"direct": True, "no-flush": True},
    ]
