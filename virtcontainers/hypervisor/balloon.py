"""What a guest can spare is taken from it, once, before its memory becomes a template's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from virtcontainers.hypervisor.base import QMPFailed
from virtcontainers.hypervisor.qmp import QMP

log = logging.getLogger(__name__)

_ID = "balloon0"
_TARGET_BYTES = 1 << 20
"""Less than any guest can live in: the balloon stops growing where the guest's kernel finds nothing more."""

_POLL_S = 0.02
_STILL_LOOKS = 25
"""So many that find the same: half a second. A balloon that gets no page tries again after 0.2 s (Linux,
drivers/virtio/virtio_balloon.c)."""
_UNPLUG_TIMEOUT_S = 30.0


async def squeeze(qmp: QMP, *, memory_mib: int, bus: str, timeout_s: float) -> bool:
    """Have the guest of a running machine give back the memory that it can do without; QEMU punches it out of
    the memory's file.

    `bus` is a free pcie-root-port, and free again afterwards. False, with a warning, when it did not work or
    not within `timeout_s`: the machine then is as it was. Raises HypervisorError when the machine cannot be
    rid of the balloon, and so not be saved for machines that have none.
    """
    balloon: dict[str, object] = {"driver": "virtio-balloon-pci", "id": _ID, "bus": bus}
    # What the guest wants while the balloon is full, it takes back.
    balloon |= {"deflate-on-oom": True, "disable-legacy": "on"}
    try:
        async with asyncio.timeout(timeout_s):
            await qmp.execute("device_add", balloon)
            await _empty(qmp, memory_mib << 20)
        squeezed = True
    except (QMPFailed, TimeoutError) as error:
        log.warning("the guest gives no memory back: %s", error or f"not within {timeout_s:g} s")
        squeezed = False
    finally:
        # Though cancelled. With the device goes the driver's hold on all that is still in the balloon.
        await asyncio.shield(qmp.unplug(_ID, timeout_s=_UNPLUG_TIMEOUT_S))
    return squeezed


async def _empty(qmp: QMP, full: int) -> None:
    """Fill the balloon with all the guest has to spare, and let the air out again."""
    await qmp.execute("balloon", {"value": _TARGET_BYTES})
    # The driver may have to be loaded first.
    await _wait(qmp, lambda size: size < full)
    smallest = await _settled(qmp)
    await qmp.execute("balloon", {"value": full})
    await _wait(qmp, lambda size: size == full)
    log.debug("the guest can live in %d of its %d MiB", smallest >> 20, full >> 20)


async def _size(qmp: QMP) -> int:
    size: int = (await qmp.execute("query-balloon"))["actual"]
    return size


async def _wait(qmp: QMP, reached: Callable[[int], bool]) -> None:
    while not reached(await _size(qmp)):  # noqa: ASYNC110 - it is QEMU that is asked
        await asyncio.sleep(_POLL_S)


async def _settled(qmp: QMP) -> int:
    """Looks are counted, and no time: that goes by also while neither QEMU nor its guest is run."""
    size, same = await _size(qmp), 0
    while same < _STILL_LOOKS:
        await asyncio.sleep(_POLL_S)
        found = await _size(qmp)
        size, same = found, same + 1 if found == size else 0
    return size
