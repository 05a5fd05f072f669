"""Network cards are plugged into a machine that runs, and out of it, after Kata's `hotplugNetDevice`.

Their TAPs come as open descriptors: QEMU needs no privilege where they are, and a TAP goes when it is closed.
"""

from __future__ import annotations

import contextlib

from virtcontainers.hypervisor.base import NetDevice, QMPFailed
from virtcontainers.hypervisor.qemu_cmdline import BridgeSlot
from virtcontainers.hypervisor.qmp import QMP


async def plug(qmp: QMP, device: NetDevice, slot: BridgeSlot) -> None:
    """Raises QMPFailed; nothing of it is in the machine then."""
    queues = len(device.fds)
    await _add_netdev(qmp, device)
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


async def _add_netdev(qmp: QMP, device: NetDevice) -> None:
    fds = {f"{device.tap}-{number}": fd for number, fd in enumerate(device.fds)}
    vhost_fds = {f"{device.tap}-vhost-{number}": fd for number, fd in enumerate(device.vhost_fds)}
    plural = "s" if len(fds) > 1 else ""
    netdev: dict[str, object] = {"type": "tap", "id": device.tap, f"fd{plural}": ":".join(fds)}
    if vhost_fds:
        netdev |= {"vhost": True, f"vhostfd{plural}": ":".join(vhost_fds)}
    try:
        for name, fd in (fds | vhost_fds).items():
            await qmp.send_fd(name, fd)
        await qmp.execute("netdev_add", netdev)
    except BaseException:
        # Those that it has not taken, or the TAP would stay.
        for name in fds | vhost_fds:
            with contextlib.suppress(QMPFailed):
                await qmp.execute("closefd", {"fdname": name})
        raise


async def unplug(qmp: QMP, tap: str, *, timeout_s: float) -> None:
    """Return when the guest has let go of the card, and the TAP is gone. Raises HypervisorError."""
    await qmp.unplug(_card(tap), timeout_s=timeout_s)
    await qmp.execute("netdev_del", {"id": tap})


def _card(tap: str) -> str:
    return f"virtio-{tap}"
