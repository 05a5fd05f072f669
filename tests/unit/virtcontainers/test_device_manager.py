"""Which disks a machine has, while its guest lets go of them or does not."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import cast

import pytest

from virtcontainers.device.block import DeviceInfo
from virtcontainers.device.manager import DeviceManager
from virtcontainers.hypervisor.base import Hypervisor, HypervisorError
from virtcontainers.hypervisor.hotplug_block import BlockDrive, PluggedDrive


class Machine:
    def __init__(self) -> None:
        self.drives: list[str] = []
        self.guest_keeps_them = False
        self._count = 0

    async def hotplug_block(self, drive: BlockDrive) -> PluggedDrive:
        plugged = PluggedDrive(self._count, "blk", f"02/0{self._count}", 0, None)
        self._count += 1
        self.drives.append(plugged.node)
        return plugged

    async def hotunplug_block(self, plugged: PluggedDrive, *, timeout_s: float) -> None:
        if self.guest_keeps_them:
            raise HypervisorError(f"the guest has not let go of {plugged.device}")
        self.drives.remove(plugged.node)


def test_a_disk_that_the_guest_has_kept_goes_before_it_comes_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(512))
    disk = DeviceInfo(path=path)
    machine, devices = Machine(), DeviceManager("pod", lambda paths: contextlib.nullcontext())
    hypervisor = cast("Hypervisor", machine)

    async def body() -> None:
        device = await devices.attach(hypervisor, disk)
        machine.guest_keeps_them = True
        await devices.detach(hypervisor, device)
        told = [record.getMessage() for record in caplog.records if record.name != "asyncio"]
        assert told == ["a block device stays: the guest has not let go of virtio-drive-0"]
        with pytest.raises(HypervisorError, match=f"block device {path}: the guest has not let go of"):
            await devices.attach(hypervisor, disk)
        assert machine.drives == ["drive-0"]
        machine.guest_keeps_them = False
        again = await devices.attach(hypervisor, disk)
        assert machine.drives == ["drive-1"]
        assert again.agent_device("/dev/x").id == "02/01"
        assert await devices.attach(hypervisor, disk) is again
        for _ in range(2):
            assert machine.drives == ["drive-1"]
            await devices.detach(hypervisor, again)
        assert machine.drives == []

    asyncio.run(body())
