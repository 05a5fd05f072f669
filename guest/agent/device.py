"""Finding the devices the host has plugged in: by PCI path, SCSI address or name, as Kata's runtime says."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import stat
from collections.abc import Callable
from typing import Any

from agent_client.protocols import agent_pb2
from ttrpc import Code, StatusError

log = logging.getLogger(__name__)

_TIMEOUT_S = 30.0
_POLL_S = 0.02
_PCI_ROOT = "/sys/devices/pci0000:00"
_SCSI_HOSTS = "/sys/class/scsi_host"

DRIVER_BLK = "blk"
DRIVER_BLK_MMIO = "mmioblk"
DRIVER_SCSI = "scsi"


def pci_sysfs_path(pci_path: str, root: str = _PCI_ROOT) -> str:
    """The sysfs directory of a PCI path ("02/03": slot 3 behind the bridge in slot 2; hexadecimal, and
    ".function" may follow each). Raises FileNotFoundError while a bridge on the way is missing."""
    directory, bus = root, "0000:00"
    slots = pci_path.split("/")
    for depth, slot in enumerate(slots):
        number, _, function = slot.partition(".")
        directory = f"{directory}/{bus}:{int(number, 16):02x}.{int(function or '0', 16):x}"
        if depth < len(slots) - 1:
            buses = os.listdir(f"{directory}/pci_bus")
            if len(buses) != 1:
                raise ValueError(
                    f"the PCI device {directory} is a bridge to {len(buses)} buses, expected one"
                )
            bus = buses[0]
    return directory


def _block_device_below(directory: str) -> str | None:
    for entry in os.listdir(directory):
        if entry.startswith("virtio"):
            names = os.listdir(f"{directory}/{entry}/block")
            return f"/dev/{names[0]}" if names else None
    return None


def _scsi_block_device(address: str) -> str | None:
    names = os.listdir(f"/sys/class/scsi_device/0:0:{address}/device/block")
    return f"/dev/{names[0]}" if names else None


def _opens(path: str) -> bool:
    """A disk has its node a moment before it is one."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.ENXIO, errno.ENODEV)
    return True


async def _appear(what: str, find: Callable[[], str | None]) -> str:
    deadline = asyncio.get_running_loop().time() + _TIMEOUT_S
    while True:
        try:
            path = find()
        except FileNotFoundError:
            path = None
        if path and _opens(path):
            return path
        if asyncio.get_running_loop().time() > deadline:
            raise StatusError(Code.DEADLINE_EXCEEDED, f"no block device at {what} after {_TIMEOUT_S:g} s")
        await asyncio.sleep(_POLL_S)


def load_modules(driver: str) -> None:
    """Not when a machine boots: most never have a disk."""
    from guest.agent.modules import load_module

    modules: dict[str, tuple[str, ...]] = {}
    if driver == DRIVER_BLK:
        modules = {"virtio_blk": ()}
    elif driver == DRIVER_SCSI:
        # Of a new controller Linux would ask for every disk that there might be; we know which one there is.
        modules = {"scsi_mod": ("scan=none",), "virtio_scsi": (), "sd_mod": ()}
    for module, parameters in modules.items():
        try:
            load_module(module, parameters)
        except OSError as error:
            # A kernel of another image may have it built in; else the disk does not appear, which is told.
            log.warning("module %s: %s", module, error)


async def block_device(driver: str, address: str) -> str:
    """Wait for the device and return its path in /dev."""
    load_modules(driver)
    if driver == DRIVER_SCSI:
        target, _, lun = address.partition(":")

        def scan() -> str | None:
            # The controller may be as new as the disk, and then comes a moment later.
            for host in os.listdir(_SCSI_HOSTS):
                with open(f"{_SCSI_HOSTS}/{host}/scan", "w") as file:
                    file.write(f"0 {target} {lun}")
            return _scsi_block_device(address)

        return await _appear(f"SCSI address {address}", scan)
    if driver == DRIVER_BLK and not address.startswith("/dev/"):
        return await _appear(f"PCI path {address}", lambda: _block_device_below(pci_sysfs_path(address)))
    return await _appear(address, lambda: address)


async def add_devices(devices: list[agent_pb2.Device], spec: dict[str, Any]) -> None:
    """Wait for `devices` and give those of the spec their numbers in this machine."""
    for device in devices:
        if device.type == DRIVER_BLK:
            path = await block_device(device.type, device.id or device.vm_path)
        elif device.type == DRIVER_SCSI:
            path = await block_device(device.type, device.id)
        elif device.type == DRIVER_BLK_MMIO:
            path = await block_device(device.type, device.vm_path)
        else:
            raise StatusError(
                Code.UNIMPLEMENTED,
                f"device {device.container_path or device.id}: type {device.type!r} is unknown here",
            )
        if device.container_path:
            set_device_numbers(spec, device.container_path, os.stat(path))


def set_device_numbers(spec: dict[str, Any], container_path: str, found: os.stat_result) -> None:
    """Point the spec's device at `container_path`, and allow it in the cgroup if the spec limits devices."""
    linux = spec.setdefault("linux", {})
    kind = "b" if stat.S_ISBLK(found.st_mode) else "c"
    numbers = {"type": kind, "major": os.major(found.st_rdev), "minor": os.minor(found.st_rdev)}
    for entry in linux.get("devices", []):
        if entry.get("path") == container_path:
            entry.update(numbers)
            break
    else:
        raise StatusError(Code.INVALID_ARGUMENT, f"the spec has no device {container_path}")
    rules = (linux.get("resources") or {}).get("devices")
    if rules:
        rules.append({"allow": True, "access": "rwm", **numbers})
