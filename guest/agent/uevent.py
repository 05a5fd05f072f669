"""Drivers for devices: those found at boot that the boot list does not serve, and those plugged in later."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Iterator

from guest.agent.reaper import Reaper

log = logging.getLogger(__name__)

_NETLINK_KOBJECT_UEVENT = 15
_KERNEL_GROUP = 1
_MODPROBE = "/sbin/modprobe"
_BUSES = ("virtio", "scsi")
"""The buses a machine of ours has devices on; drivers of the others, PCI above all, are in the boot list."""

_DRIVERS = {
    "virtio/drivers/virtio_net": "virtio:d00000001v00001AF4",
    "virtio/drivers/virtio_blk": "virtio:d00000002v00001AF4",
    "virtio/drivers/virtio_scsi": "virtio:d00000008v00001AF4",
    "virtio/drivers/virtiofs": "virtio:d0000001Av00001AF4",
    "scsi/drivers/sd": "scsi:t-0x00",
}

_served: set[str] = set()
"""Modaliases whose modules are loaded: nothing unloads them."""


def has_drivers() -> None:
    """Of the drivers there are, devices that come need none loaded: a process less, when somebody waits."""
    for driver, modalias in _DRIVERS.items():
        if os.path.isdir(f"/sys/bus/{driver}"):
            _served.add(modalias)


def parse_uevent(message: bytes) -> dict[str, str]:
    """The kernel's "ACTION@devpath", then KEY=VALUE, each ended by a zero byte."""
    pairs = (part.partition("=") for part in message.decode(errors="replace").split("\0")[1:])
    return {key: value for key, _, value in pairs if key}


def _waiting_devices() -> Iterator[str]:
    for bus in _BUSES:
        directory = f"/sys/bus/{bus}/devices"
        if not os.path.isdir(directory):
            continue
        for name in os.listdir(directory):
            try:
                with open(f"{directory}/{name}/modalias") as file:
                    modalias = file.read().strip()
            except OSError:
                continue
            if not os.path.exists(f"{directory}/{name}/driver"):
                yield modalias


class DriverLoader:
    """Loads the module that fits as soon as the kernel announces a device."""

    def __init__(self, reaper: Reaper) -> None:
        self._reaper = reaper
        self._wanted: asyncio.Queue[str] = asyncio.Queue()
        self._socket = socket.socket(
            socket.AF_NETLINK,
            socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
            _NETLINK_KOBJECT_UEVENT,
        )
        self._socket.bind((0, _KERNEL_GROUP))

    async def run(self) -> None:
        """Until cancelled."""
        asyncio.get_running_loop().add_reader(self._socket, self._announced)
        for modalias in _waiting_devices():
            self._wanted.put_nowait(modalias)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        while True:
            modalias = await self._wanted.get()
            if modalias in _served:
                continue
            try:
                loading = self._reaper.spawn(_MODPROBE, ["modprobe", "-q", modalias], (null, null, null))
            except OSError as error:
                log.warning("no modprobe for %s: %s", modalias, error.strerror)
                continue
            if await loading:
                log.debug("no module for %s", modalias)
            else:
                _served.add(modalias)

    def _announced(self) -> None:
        """All there are: what a template leaves unread, each clone would read while its host waits."""
        while True:
            try:
                message = self._socket.recv(65536)
            except BlockingIOError:
                return
            except OSError as error:
                # Too many at once for the socket's buffer: what was lost stands in sysfs.
                log.warning("uevents: %s", error.strerror)
                for modalias in _waiting_devices():
                    self._wanted.put_nowait(modalias)
                return
            # Of most, nothing else is looked at.
            if not message.startswith(b"add@"):
                continue
            event = parse_uevent(message)
            if event.get("SUBSYSTEM") in _BUSES and event.get("MODALIAS"):
                self._wanted.put_nowait(event["MODALIAS"])
