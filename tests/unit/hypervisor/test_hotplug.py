"""How much is plugged at a time, and in what order; the rest is tests/integration/test_hotplug.py's."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from tests.unit import clock
from virtcontainers.config import HypervisorConfig
from virtcontainers.hypervisor.base import QMPFailed
from virtcontainers.hypervisor.hotplug import (
    MEMORY_FACTOR,
    Hotplug,
    hotplug_size_mib,
    hotplug_steps_mib,
)
from virtcontainers.hypervisor.qmp import QMP
from virtcontainers.online import mem_total_mib


@pytest.mark.parametrize(
    ("mib", "block_mib", "size_mib"),
    [(0, 128, 0), (1, 128, 128), (128, 128, 128), (129, 128, 256), (100, 0, 100), (2049, 2048, 4096)],
)
def test_a_plug_is_of_whole_blocks(mib: int, block_mib: int, size_mib: int) -> None:
    assert hotplug_size_mib(mib, block_mib) == size_mib


@pytest.mark.parametrize(
    ("current_mib", "mib", "block_mib", "steps"),
    [
        (256, 0, 128, []),
        (256, 1, 128, [128]),
        (256, 2048, 128, [2048]),
        (256, 2049, 128, [2048, 128]),
        (256, 8192, 128, [2048, 6144]),
        (256, 100 << 10, 128, [2048, 18432, 81920]),
        (2048, 16 << 10, 128, [16 << 10]),
        # A guest whose blocks are larger than what it should take at once.
        (64, 4096, 2048, [2048, 2048]),
        (64, 1000, 0, [512, 488]),
    ],
)
def test_no_step_is_more_than_the_guest_can_hold_the_page_structures_of(
    current_mib: int, mib: int, block_mib: int, steps: list[int]
) -> None:
    found = hotplug_steps_mib(current_mib, mib, block_mib)
    assert found == steps
    for step in found:
        assert step <= max(current_mib * MEMORY_FACTOR, block_mib)
        current_mib += step


def test_the_total_is_found_in_the_metrics_of_either_agent() -> None:
    kata = (
        '# TYPE kata_guest_meminfo gauge\nkata_guest_meminfo{item="mem_free"} 1\n'
        'kata_guest_meminfo{item="mem_total"} 2147483648\n'
    )
    assert mem_total_mib(kata) == 2048
    assert mem_total_mib(kata.replace("2147483648", "2.147483648e+09")) == 2048
    assert mem_total_mib("kata_agent_threads 3\n") is None


class Monitor(QMP):
    """A machine of four vCPU slots, whose guest lets go of all but one. An emulated one cannot be asked: QEMU
    dies of it."""

    def __init__(self, plugged: list[int], keeps: int) -> None:
        self.plugged = plugged
        self.keeps = keeps
        self.asked: list[str] = []

    async def execute(self, command: str, arguments: Any = None, *, timeout_s: float = 10) -> Any:
        if command == "query-hotpluggable-cpus":
            return [self._slot(number) for number in (3, 2, 1, 0)]
        if command == "human-monitor-command":
            return "JIT information is only available with accel=tcg\r\n"
        name = arguments["id"] if command in ("device_add", "device_del") else ""
        if command == "device_add":
            self.asked.append(name)
            if arguments["socket-id"] == self.keeps:
                raise QMPFailed("QMP device_add: no more threads")
            self.plugged.append(arguments["socket-id"])
        elif command == "device_del":
            self.asked.append(name)
            if name != f"cpu-{self.keeps}":
                self.plugged.remove(int(name.removeprefix("cpu-")))
        elif command == "qom-list":
            return [{"name": f"cpu-{number}"} for number in self.plugged]
        return None

    def _slot(self, number: int) -> dict[str, Any]:
        slot: dict[str, Any] = {"type": "host-x86_64-cpu", "props": {"socket-id": number, "core-id": 0}}
        if number == 0:
            return slot | {"qom-path": "/machine/unattached/device[0]"}
        if number in self.plugged:
            return slot | {"qom-path": f"/machine/peripheral/cpu-{number}"}
        return slot


def hotplug(monitor: Monitor) -> Hotplug:
    return Hotplug(
        monitor,
        HypervisorConfig(),
        shared=False,
        maximum_mib=4096,
        take_port=lambda: "rp0",
        logger=logging.LoggerAdapter(logging.getLogger(__name__), {}),
    )


def test_the_vcpu_that_came_last_goes_first_and_those_of_the_start_stay(
    caplog: pytest.LogCaptureFixture,
) -> None:
    monitor = Monitor([1, 2, 3], keeps=0)
    assert asyncio.run(hotplug(monitor).remove_vcpus(2, timeout_s=60)) == 2
    assert monitor.asked == ["cpu-3", "cpu-2"]
    assert asyncio.run(hotplug(monitor).remove_vcpus(2, timeout_s=60)) == 1
    assert monitor.plugged == []
    assert "2 vCPUs are to be unplugged, of which only 1 can" in caplog.text


def test_a_vcpu_that_the_guest_keeps_stays_and_that_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        monitor = Monitor([1, 2, 3], keeps=2)
        removing = asyncio.create_task(hotplug(monitor).remove_vcpus(3, timeout_s=60))
        while "cpu-2" not in monitor.asked:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        clock.skip(60)
        assert await removing == 1
        assert monitor.plugged == [1, 2]

    clock.run(body())
    assert "cpu-2 stays: the guest has not let go of cpu-2 within" in caplog.text


def test_vcpus_come_in_the_order_of_their_slots_until_one_is_refused() -> None:
    monitor = Monitor([], keeps=3)
    with pytest.raises(QMPFailed, match="no more threads"):
        asyncio.run(hotplug(monitor).add_vcpus(3))
    assert monitor.asked == ["cpu-1", "cpu-2", "cpu-3"]
    assert monitor.plugged == [1, 2]
