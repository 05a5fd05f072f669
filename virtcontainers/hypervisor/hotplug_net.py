"""Network cards are plugged into a machine that runs, and out of it, after Kata's `hotplugNetDevice`.

Their TAPs come as open descriptors: QEMU needs no privilege where they are, and a TAP goes when it is closed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from virtcontainers.hypervisor.base import NetDevice, QMPFailed
from virtcontainers.hypervisor.qemu_cmdline import BridgeSlot
from virtcontainers.hypervisor.qmp import QMP


async def plug(qmp: QMP, device: NetDevice, slot: BridgeSlot) -> None:
    """Raises QMPFailed; nothing of it is in the machine then."""
    names = await _send(qmp, device.tap, device.fds)
    vhost_names = await _send(qmp, f"{device.tap}-vhost", device.vhost_fds)
    queues = len(names)
    plural = "s" if queues > 1 else ""
    netdev: dict[str, object] = {"type": "tap", "id": device.tap, f"fd{plural}": ":".join(names)}
    if vhost_names:
        netdev |= {"vhost": True, f"vhostfd{plural}": ":".join(vhost_names)}
    await qmp.execute("netdev_add", netdev)
    card: dict[str, object] = {
        "driver": "virtio-net-pci",
        "id": _card(device.tap),
        "netdev": device.tap,
        "mac": device.hardware_addr,
        # It is plugged in: nobody boots from it.
        "romfile": "",
        "disable-legacy": "on",
        **slot.place,
    }
    if queues > 1:
        # For each queue two, and one for the configuration and one for the control queue: as in Kata.
        card |= {"mq": True, "vectors": 2 * queues + 2}
    try:
        await qmp.execute("device_add", card)
    except BaseException:
        with contextlib.suppress(QMPFailed):
            await qmp.execute("netdev_del", {"id": device.tap})
        raise


async def _send(qmp: QMP, prefix: str, fds: Sequence[int]) -> list[str]:
    names = [f"{prefix}-{number}" for number in range(len(fds))]
    for name, fd in zip(names, fds, strict=True):
        await qmp.send_fd(name, fd)
    return names


async def unplug(qmp: QMP, tap: str, *, timeout_s: float) -> None:
    """Return when the guest has let go of the card, and the TAP is gone. Raises HypervisorError."""
    await qmp.unplug(_card(tap), timeout_s=timeout_s)
    await qmp.execute("netdev_del", {"id": tap})


def _card(tap: str) -> str:
    return f"virtio-{tap}"
