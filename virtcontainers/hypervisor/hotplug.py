"""A machine grows while it runs: vCPUs, DIMMs, or a virtio-mem device that shrinks as well; after Kata's
`qemu.go`.

QEMU is the one who knows what is plugged: it is asked each time, and nothing of it is kept here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

from virtcontainers.config import HypervisorConfig
from virtcontainers.errors import DeadlineExceededError, FailedPreconditionError
from virtcontainers.hypervisor.base import HypervisorError, QMPFailed
from virtcontainers.hypervisor.qmp import COMMAND_TIMEOUT_S, QMP

log = logging.getLogger(__name__)

MEMORY_FACTOR = 8
"""How many times its own memory a guest can take at once.

It needs 64 bytes for the structure of each page of 4 KiB before it has the first of them to use: an eighth of
what it has. Kata's 48 needs three quarters, and a guest of 256 MiB given 8 GiB at once was seen to panic.
"""

VIRTIO_MEM_STEP_MIB = 4
"""Linux plugs no less at a time; Kata's, too."""

_VIRTIO_MEM = "virtiomem0"
_VIRTIO_MEM_BACKEND = "virtiomem"
_PERIPHERAL = "/machine/peripheral/"
_PREALLOC_S_PER_GIB = 5.0
_POLL_S = 0.01

_CODE_SIZE = re.compile(r"^gen code size +(\d+)/(\d+)", re.MULTILINE)
_REGION_BYTES = 2 << 20
_REGIONS_PER_VCPU = 8
"""QEMU 7.2, tcg/region.c: so large at least, and so many at most."""
_TRANSLATED_MEANWHILE_BYTES = 1 << 20
"""Until the new vCPU has its region; a guest was seen to have 15 MiB translated in a second."""

_OST_DEVICE_CHECK = 1
"""ACPI 6.4, 6.3.5 _OST: what the guest then tells of is that it has looked at a device that was added."""


class OutOfSlots(HypervisorError, FailedPreconditionError):
    """There are not as many memory slots as DIMMs are needed (`memory_slots`)."""


class AboveMaximum(HypervisorError, FailedPreconditionError):
    """More memory than the machine may ever have (`default_maxmemory`)."""


class NotOnline(HypervisorError, DeadlineExceededError):
    """The guest does not use all that it was given; the message names what is missing."""


def hotplug_size_mib(mib: int, block_mib: int) -> int:
    """`mib` in whole memory blocks of the guest; 0 is a guest that does not say."""
    return -(-mib // block_mib) * block_mib if block_mib else mib


def hotplug_steps_mib(current_mib: int, mib: int, block_mib: int) -> list[int]:
    """The DIMMs that make `mib` more, each no larger than a guest can take with those before it."""
    steps = []
    missing = hotplug_size_mib(mib, block_mib)
    while missing > 0:
        most = current_mib * MEMORY_FACTOR
        # Whole blocks, but at least one, also for a guest smaller than an eighth of its block.
        step = min(missing, max(most // block_mib * block_mib, block_mib) if block_mib else most)
        steps.append(step)
        current_mib += step
        missing -= step
    return steps


class Hotplug:
    """Of one machine.

    `shared`: a vhost-user daemon maps the guest's memory. `maximum_mib`: with all that can be plugged.
    `take_port` gives an empty pcie-root-port.
    """

    def __init__(
        self,
        qmp: QMP,
        config: HypervisorConfig,
        *,
        shared: bool,
        maximum_mib: int,
        take_port: Callable[[], str],
        logger: logging.LoggerAdapter[logging.Logger],
    ) -> None:
        self._qmp = qmp
        self._config = config
        self._shared = shared
        self._maximum_mib = maximum_mib
        self._take_port = take_port
        self._log = logger
        self._lock = asyncio.Lock()
        self._not_taken: set[str] = set()
        """The DIMMs at which the guest was not yet seen to have looked."""

    # -- vCPUs

    async def add_vcpus(self, count: int) -> int:
        """Plug up to `count`: no more than there is room for, which is logged; gives how many.

        Raises QMPFailed; what it has plugged before stays.
        """
        async with self._lock:
            slots = await self._vcpu_slots()
            free = [(number, slot) for number, slot in enumerate(slots) if "qom-path" not in slot]
            if count > len(free):
                self._log.warning(
                    "%d more vCPUs are wanted and %d plugged: the machine has %d, and at most %d "
                    "(default_maxvcpus in [hypervisor.qemu])",
                    count,
                    len(free),
                    len(slots) - len(free),
                    len(slots),
                )
            for plugged, (number, slot) in enumerate(free[:count]):
                if not await self._can_translate(len(slots) - len(free) + plugged, len(slots)):
                    self._log.warning(
                        "%d more vCPUs are wanted and %d plugged: an emulated machine (TCG) would die of the "
                        "next, because its room for translated code is nearly used up; it is emptied then",
                        count,
                        plugged,
                    )
                    return plugged
                device = {"driver": slot["type"], "id": f"cpu-{number}", **slot["props"]}
                await self._qmp.execute("device_add", device)
            return min(count, len(free))

    async def _can_translate(self, vcpus: int, maximum: int) -> bool:
        """Whether QEMU has room for the code of a vCPU more than `vcpus`; with KVM always.

        It divides the room into regions, gives them to vCPUs one by one, and empties all when a vCPU finds
        none left, except when that vCPU is new: then it aborts (tcg/region.c of QEMU 7.2). How many regions
        are left it does not say. A vCPU's latest one may be as good as empty, so that many are not counted.
        """
        text = await self._qmp.execute("human-monitor-command", {"command-line": "info jit"})
        found = _CODE_SIZE.search(text)
        if found is None:
            return True
        used, capacity = int(found[1]), int(found[2])
        regions = max(maximum, min(capacity // _REGION_BYTES, _REGIONS_PER_VCPU * maximum))
        return capacity - used > vcpus * capacity // regions + _TRANSLATED_MEANWHILE_BYTES

    async def remove_vcpus(self, count: int, *, timeout_s: float) -> int:
        """Unplug up to `count` of those that were plugged, the last first; gives how many have gone.

        One that the guest does not let go of in time stays, which is logged; it may go later.
        """
        async with self._lock:
            plugged = [
                slot["qom-path"].removeprefix(_PERIPHERAL)
                for slot in await self._vcpu_slots()
                if slot.get("qom-path", "").startswith(_PERIPHERAL)
            ]
            if count > len(plugged):
                self._log.warning(
                    "%d vCPUs are to be unplugged, of which only %d can: the others were there at the start",
                    count,
                    len(plugged),
                )
            return await self._unplug(plugged[::-1][:count], timeout_s)

    async def _vcpu_slots(self) -> list[dict[str, Any]]:
        """Free ones have no qom-path; in an order that stays."""
        slots: list[dict[str, Any]] = await self._qmp.execute("query-hotpluggable-cpus")
        return sorted(slots, key=lambda slot: sorted(slot["props"].items()))

    async def _unplug(self, devices: list[str], timeout_s: float) -> int:
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout_s
        for gone, device in enumerate(devices):
            try:
                await self._qmp.unplug(device, timeout_s=max(0.0, deadline - clock()))
            except QMPFailed:
                raise
            except HypervisorError as error:
                self._log.warning("%s stays: %s", device, error)
                return gone
        return len(devices)

    # -- memory

    async def plan_memory(self, current_mib: int, mib: int, block_mib: int) -> list[int]:
        """What to give to `add_memory` one after another, each for the guest to use before the next, to have
        `mib` more in whole blocks of the guest's.

        Raises OutOfSlots or AboveMaximum; nothing was changed then.
        """
        if self._config.enable_virtio_mem:
            steps = [hotplug_size_mib(mib, VIRTIO_MEM_STEP_MIB)] if mib > 0 else []
        else:
            steps = hotplug_steps_mib(current_mib, mib, block_mib)
        await self._require_room(current_mib, steps)
        return steps

    async def _require_room(self, current_mib: int, steps: list[int]) -> None:
        if current_mib + sum(steps) > self._maximum_mib:
            raise AboveMaximum(
                f"the machine has {current_mib} MiB, and {sum(steps)} MiB more are above the "
                f"{self._maximum_mib} MiB it may have (default_maxmemory in [hypervisor.qemu])"
            )
        if self._config.enable_virtio_mem:
            return
        used, slots = len(await self._used_slots()), self._config.memory_slots
        if used + len(steps) > slots:
            raise OutOfSlots(
                f"{used} of {slots} memory slots are used, and {len(steps)} are needed for "
                f"{sum(steps)} MiB more (memory_slots in [hypervisor.qemu])"
            )

    async def _devices(self) -> list[dict[str, Any]]:
        return [device["data"] for device in await self._qmp.execute("query-memory-devices")]

    async def _used_slots(self) -> set[int]:
        """The guest's image, an NVDIMM, is in one, too."""
        return {device["slot"] for device in await self._devices() if "slot" in device}

    async def memory_mib(self, *, timeout_s: float = COMMAND_TIMEOUT_S) -> int:
        """All that the guest was given; of virtio-mem, what it is asked to have."""
        devices = [
            device["data"]
            for device in await self._qmp.execute("query-memory-devices", timeout_s=timeout_s)
            if device["type"] != "nvdimm"
        ]
        plugged: int = sum(device.get("requested-size", device["size"]) for device in devices)
        return self._config.default_memory_mib + (plugged >> 20)

    async def add_memory(self, current_mib: int, mib: int) -> None:
        """Give the guest `mib` more, for it to use: `memory_not_taken` says when it has looked at them.

        Raises OutOfSlots, AboveMaximum or QMPFailed; the machine is as it was then.
        """
        async with self._lock:
            await self._require_room(current_mib, [mib])
            if self._config.enable_virtio_mem:
                await self._resize_virtio_mem(mib)
            else:
                await self._add_dimm(mib)

    async def _add_dimm(self, mib: int) -> None:
        used = await self._used_slots()
        told = {
            int(slot["slot"]): slot["source"]
            for slot in await self._qmp.execute("query-acpi-ospm-status")
            if slot["slot-type"] == "DIMM"
        }
        # In a slot that had another before, the guest's word on that one is still to be read.
        number = min((told.get(slot, 0) != 0, slot) for slot in told if slot not in used)[1]
        backend, dimm = f"memory{number}", f"dimm{number}"
        if await self._has_object(backend):
            await self._qmp.execute("object-del", {"id": backend})  # of a DIMM that went late
        device: dict[str, object] = {"driver": "pc-dimm", "id": dimm, "memdev": backend, "slot": number}
        prealloc = {"prealloc": True} if self._config.enable_mem_prealloc else {}
        await self._add_backend(backend, mib, prealloc, device)
        self._not_taken.add(dimm)

    async def _add_backend(
        self, backend: str, mib: int, properties: Mapping[str, object], device: dict[str, object]
    ) -> None:
        timeout_s = COMMAND_TIMEOUT_S + (
            _PREALLOC_S_PER_GIB * mib / 1024 if properties.get("prealloc") else 0
        )
        memory = {"id": backend, "size": mib << 20, **properties, **self._backend_kind()}
        try:
            await self._qmp.execute("object-add", memory, timeout_s=timeout_s)
            await self._qmp.execute("device_add", device)
        except BaseException as error:
            with contextlib.suppress(QMPFailed):
                await asyncio.shield(self._qmp.execute("object-del", {"id": backend}))
            if isinstance(error, QMPFailed):
                raise QMPFailed(f"{device['id']}, of {mib} MiB: {error}") from error
            raise

    def _backend_kind(self) -> dict[str, object]:
        if self._config.enable_hugepages:
            return {"qom-type": "memory-backend-memfd", "share": True, "hugetlb": True}
        if self._shared:
            return {"qom-type": "memory-backend-memfd", "share": True}
        return {"qom-type": "memory-backend-ram"}

    async def _has_object(self, name: str) -> bool:
        return any(
            found["name"] == name for found in await self._qmp.execute("qom-list", {"path": "/objects"})
        )

    async def _resize_virtio_mem(self, by_mib: int) -> None:
        device = await self._virtio_mem()
        if device is None:
            # Only now: a template has none, and a pod that is never grown pays for none.
            size = (self._maximum_mib - self._config.default_memory_mib) // VIRTIO_MEM_STEP_MIB
            # Its size is only reserved, and touched when the guest is given a part of it.
            prealloc = self._config.enable_mem_prealloc or self._config.enable_hugepages
            device = {
                "driver": "virtio-mem-pci",
                "id": _VIRTIO_MEM,
                "memdev": _VIRTIO_MEM_BACKEND,
                "bus": self._take_port(),
                "requested-size": by_mib << 20,
                "prealloc": prealloc,
                "disable-legacy": "on",
            }
            await self._add_backend(
                _VIRTIO_MEM_BACKEND, size * VIRTIO_MEM_STEP_MIB, {"reserve": False}, device
            )
            return
        requested = {"path": f"{_PERIPHERAL}{_VIRTIO_MEM}", "property": "requested-size"}
        value = device["requested-size"] + (by_mib << 20)
        await self._qmp.execute("qom-set", {**requested, "value": value})

    async def _virtio_mem(self) -> dict[str, Any] | None:
        return next((device for device in await self._devices() if device.get("id") == _VIRTIO_MEM), None)

    async def memory_not_taken(self) -> str:
        """What the guest has not looked at yet, in words for a user; "" when that is nothing.

        All blocks of a DIMM are there when it is taken, if the guest can have them at all; a virtio-mem
        device wants the blocks to be put to use that it has before it goes on.
        """
        if self._config.enable_virtio_mem:
            device = await self._virtio_mem()
            if device is None or device["size"] >= device["requested-size"]:
                return ""
            return f"virtio-mem has {device['size'] >> 20} of {device['requested-size'] >> 20} MiB"
        if self._not_taken:
            for slot in await self._qmp.execute("query-acpi-ospm-status"):
                if slot["source"] == _OST_DEVICE_CHECK:
                    self._not_taken.discard(slot.get("device", ""))
        return f"the guest has not looked at {', '.join(sorted(self._not_taken))}" if self._not_taken else ""

    async def remove_memory(self, mib: int, *, timeout_s: float) -> int:
        """Take back up to `mib`; gives how many MiB have gone.

        With DIMMs, whole ones, the last first. What the guest does not let go of in time stays, which is
        logged; of virtio-mem it still goes when the guest can spare it. Raises QMPFailed.
        """
        async with self._lock:
            if self._config.enable_virtio_mem:
                return await self._shrink_virtio_mem(mib, timeout_s)
            await self.memory_not_taken()
            gone = 0
            ours = [
                device
                for device in await self._devices()
                if device.get("memdev", "").startswith("/objects/memory")
            ]
            for device in sorted(ours, key=lambda device: -device["addr"]):
                size = device["size"] >> 20
                if device["id"] in self._not_taken:
                    # Told to let go of what it has not taken, it would do so at the next that is plugged in.
                    self._log.warning("%s stays: the guest has not looked at it", device["id"])
                    break
                if gone + size > mib or not await self._unplug([device["id"]], timeout_s):
                    break
                await self._qmp.execute("object-del", {"id": device["memdev"].removeprefix("/objects/")})
                gone += size
            return gone

    async def _shrink_virtio_mem(self, mib: int, timeout_s: float) -> int:
        device = await self._virtio_mem()
        if device is None:
            return 0
        by_mib = min(mib, device["requested-size"] >> 20) // VIRTIO_MEM_STEP_MIB * VIRTIO_MEM_STEP_MIB
        await self._resize_virtio_mem(-by_mib)
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout_s
        wanted = device["requested-size"] - (by_mib << 20)
        while (now := await self._virtio_mem() or device)["size"] > wanted:
            if clock() > deadline:
                self._log.warning(
                    "the guest keeps %d MiB of virtio-mem, of which it was to give back %d",
                    now["size"] >> 20,
                    (now["size"] - wanted) >> 20,
                )
                break
            await asyncio.sleep(_POLL_S)
        return max(0, int(device["size"]) - int(now["size"])) >> 20
