"""How a balloon is filled; what a guest makes of it is tests/integration/test_template_guest.py's."""

from __future__ import annotations

from typing import Any

from tests.unit import clock
from virtcontainers.hypervisor.balloon import squeeze
from virtcontainers.hypervisor.qmp import QMP

FULL_MIB = 256
SMALLEST_MIB = 64


class Monitor(QMP):
    """A QEMU that is not run for a while, in the middle of its guest's giving memory back."""

    def __init__(self) -> None:
        self.sizes_mib = [FULL_MIB, 200, 128, 128, 128, SMALLEST_MIB]
        self.let_out_at_mib = 0

    async def execute(self, command: str, arguments: Any = None, *, timeout_s: float = 10) -> Any:
        if command == "balloon" and arguments["value"] == FULL_MIB << 20:
            self.let_out_at_mib = self.sizes_mib[0]
            self.sizes_mib = [FULL_MIB]
        if command == "query-balloon":
            if self.sizes_mib[0] == 128:
                clock.skip(10)
            if len(self.sizes_mib) > 1:
                return {"actual": self.sizes_mib.pop(0) << 20}
            return {"actual": self.sizes_mib[0] << 20}
        return []


def test_the_balloon_is_full_when_it_grows_no_more_and_not_when_qemu_is_slow() -> None:
    monitor = Monitor()

    async def body() -> None:
        assert await squeeze(monitor, memory_mib=FULL_MIB, bus="rp0", timeout_s=60)

    clock.run(body())
    assert monitor.let_out_at_mib == SMALLEST_MIB
