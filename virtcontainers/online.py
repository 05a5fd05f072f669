"""What was plugged into a machine is put to use by its guest, after Kata's `updateResources` and `vm.go`.

Online means online: the guest's own total has grown by all that was plugged. Our agent and Kata's tell it
with GetMetrics; of an agent that does not (its policy may forbid it) the word that all is online counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator

from virtcontainers.agent import KataAgent
from virtcontainers.errors import DeadlineExceededError, KataError, UnavailableError, UnimplementedError
from virtcontainers.hypervisor.base import HypervisorError
from virtcontainers.hypervisor.hotplug import NotOnline
from virtcontainers.hypervisor.qemu import Qemu

ONLINE_TIMEOUT_S = 60.0

_POLL_S = 0.02
_SETTLED_S = 10.0
"""Blocks that are all there, and that the agent says it has onlined, count within that time."""
_TAKE_BACK_TIMEOUT_S = 5.0
_DEATH_TIMEOUT_S = 3.0


class MachineEnded(HypervisorError, UnavailableError):
    """The machine died while it was grown; the message says of what."""


_MEM_TOTAL = re.compile(r'^kata_guest_meminfo\{item="mem_total"\} (\S+)', re.MULTILINE)


def mem_total_mib(metrics: str) -> float | None:
    """What the guest's MemTotal is in an agent's metrics; None where they do not have it."""
    found = _MEM_TOTAL.search(metrics)
    return float(found[1]) / (1 << 20) if found else None


class Online:
    """Of one machine, which is grown by one caller at a time."""

    def __init__(
        self, hypervisor: Qemu, agent: KataAgent, logger: logging.LoggerAdapter[logging.Logger]
    ) -> None:
        self._hypervisor = hypervisor
        self._agent = agent
        self._log = logger
        self._vcpus = hypervisor.config.default_vcpus
        self._memory_mib = hypervisor.config.default_memory_mib
        """As the guest was last seen to use them."""
        self._block_mib: int | None = None
        self._kept_mib: float | None = None
        """What the guest's kernel keeps of the machine's memory for itself."""

    async def find_size(self) -> None:
        async with self._told_of_death():
            await self._find_size()

    async def add_cpus(self, count: int) -> int:
        async with self._told_of_death():
            await self._find_size()
            return await self._hypervisor.hotplug_vcpus(count)

    async def add_memory(self, mib: int, timeout_s: float) -> None:
        async with self._told_of_death():
            await self._find_size()
            await self._look(timeout_s)
            assert self._block_mib is not None
            for number, step in enumerate(await self._hypervisor.plan_hotplug_memory(mib, self._block_mib)):
                if number:
                    await self.online(timeout_s)
                await self._hypervisor.hotplug_memory(step)

    async def _find_size(self) -> None:
        await self._hypervisor.find_size()
        self._vcpus = min(self._vcpus, self._hypervisor.vcpus)
        self._memory_mib = min(self._memory_mib, self._hypervisor.memory_mib)

    async def _look(self, timeout_s: float) -> None:
        """At the guest, before it gets its first new block."""
        if self._block_mib is not None:
            return
        await self._agent.get_guest_details()
        total = await self._total_mib(timeout_s)
        self._kept_mib = None if total is None else self._memory_mib - total
        self._block_mib = self._agent.details.mem_block_size_bytes >> 20

    async def _total_mib(self, timeout_s: float) -> float | None:
        try:
            return mem_total_mib(await self._agent.get_metrics(timeout_s))
        except (UnavailableError, DeadlineExceededError):
            raise
        except KataError as error:
            self._log.debug("not known how much memory the guest has: %s", error)
            return None

    async def online(self, timeout_s: float) -> None:
        """Raises NotOnline, or what the agent or QEMU has failed with; what the guest does not use is taken
        back then, as far as it lets go of it."""
        try:
            async with self._told_of_death():
                await self._online(timeout_s)
        except BaseException:
            await asyncio.shield(self._take_back())
            raise
        self._vcpus, self._memory_mib = self._hypervisor.vcpus, self._hypervisor.memory_mib

    async def _online(self, timeout_s: float) -> None:
        hypervisor = self._hypervisor
        await self._find_size()
        # As Kata: 0 leaves the CPUs as they are.
        nb_cpus = hypervisor.vcpus if hypervisor.vcpus > self._vcpus else 0
        cpu_only = hypervisor.memory_mib <= self._memory_mib
        if cpu_only and not nb_cpus:
            return
        clock = asyncio.get_running_loop().time
        started_at = clock()
        deadline = started_at + timeout_s
        settled_at: float | None = None
        while True:
            missing = "" if cpu_only else await hypervisor.memory_not_taken()
            if not missing or hypervisor.config.enable_virtio_mem:
                try:
                    left_s = max(_POLL_S, deadline - clock())
                    await self._agent.online_cpu_mem(nb_cpus, cpu_only=cpu_only, timeout_s=left_s)
                except (UnavailableError, UnimplementedError):
                    raise
                except KataError as error:
                    missing = str(error)
                else:
                    if not missing and not cpu_only:
                        missing = await self._missing(max(_POLL_S, deadline - clock()))
                        settled_at = settled_at or clock()
            if not missing:
                break
            if clock() > deadline or (settled_at and clock() - settled_at > _SETTLED_S):
                waited_s = clock() - started_at
                raise NotOnline(
                    f"after {waited_s:.0f} s the guest does not use {self._plugged(nb_cpus)}: {missing}"
                )
            await asyncio.sleep(_POLL_S)
        took_ms = 1000 * (clock() - started_at)
        self._log.debug("the guest uses %s after %.0f ms", self._plugged(nb_cpus), took_ms)

    def _plugged(self, nb_cpus: int) -> str:
        more = nb_cpus - self._vcpus
        plugged = [f"{more} more vCPU{'s' if more > 1 else ''}"] if nb_cpus else []
        if self._hypervisor.memory_mib > self._memory_mib:
            plugged += [f"{self._hypervisor.memory_mib - self._memory_mib} MiB more memory"]
        return " and ".join(plugged)

    async def _missing(self, timeout_s: float) -> str:
        if self._kept_mib is None:
            return ""
        total = await self._total_mib(timeout_s)
        expected = self._hypervisor.memory_mib - self._kept_mib
        if total is None or total >= expected - 1:
            return ""
        # What it was to give back earlier may have gone only now.
        await self._hypervisor.find_size()
        return f"its MemTotal is {total:.0f} MiB, expected {expected:.0f} MiB"

    async def _take_back(self) -> None:
        hypervisor = self._hypervisor
        try:
            if hypervisor.vcpus > self._vcpus:
                count = hypervisor.vcpus - self._vcpus
                await hypervisor.hotunplug_vcpus(count, timeout_s=_TAKE_BACK_TIMEOUT_S)
            if hypervisor.memory_mib > self._memory_mib:
                mib = hypervisor.memory_mib - self._memory_mib
                await hypervisor.hotunplug_memory(mib, timeout_s=_TAKE_BACK_TIMEOUT_S)
        except HypervisorError as error:
            self._log.warning("what was plugged in stays: %s", error)

    @contextlib.asynccontextmanager
    async def _told_of_death(self) -> AsyncIterator[None]:
        """Who was not answered because the machine has ended says that, and why it has."""
        try:
            yield
        except UnavailableError as error:
            try:
                async with asyncio.timeout(_DEATH_TIMEOUT_S):
                    reason = await self._hypervisor.wait_dead()
            except (TimeoutError, HypervisorError):
                raise error from None
            raise MachineEnded(f"the machine ended while it was grown: {reason}") from error
