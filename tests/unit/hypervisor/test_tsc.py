"""The rate of the host's time stamp counter."""

from __future__ import annotations

import asyncio
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from virtcontainers.hypervisor import tsc
from virtcontainers.hypervisor.tsc import tsc_khz

_WITHOUT_WRITABLE_CODE = """
import asyncio, ctypes, sys
from virtcontainers.hypervisor.tsc import tsc_khz

PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1
if ctypes.CDLL(None).prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0):
    sys.exit("no MDWE")
print(asyncio.run(tsc_khz()))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86 only")
def test_it_is_the_same_each_time() -> None:
    async def body() -> tuple[int | None, int | None]:
        return await tsc_khz(), await tsc_khz()

    one, other = asyncio.run(body())
    assert one is not None and other is not None
    # Linux wants 1 %.
    assert abs(one - other) < one / 200
    assert 500_000 < one < 10_000_000


def test_other_machines_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine="aarch64"))
    tsc._counter.cache_clear()
    assert asyncio.run(tsc_khz()) is None


def test_none_is_known_where_a_process_may_not_write_code() -> None:
    """As of systemd's MemoryDenyWriteExecute=."""
    done = subprocess.run([sys.executable, "-c", _WITHOUT_WRITABLE_CODE], capture_output=True, text=True)
    if "no MDWE" in done.stderr:
        pytest.skip("the kernel is older than 6.3")
    assert (done.stdout, done.returncode) == ("None\n", 0), done.stderr
