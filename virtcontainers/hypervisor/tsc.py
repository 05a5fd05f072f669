"""How fast the host's time stamp counter runs, which is the one that an emulated machine has as well."""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import time
from functools import cache

_RDTSC = bytes.fromhex(
    "0f31"  # rdtsc
    "48c1e220"  # shl rdx, 32
    "4809d0"  # or rax, rdx
    "c3"  # ret
)
_LEAST_S = 0.02
"""An uncertainty of a microsecond at both ends is 0.01 % of it. Linux measures again, for a second, and
believes itself when the two differ by less than 1 %."""
_SAMPLES = 20


async def tsc_khz() -> int | None:
    """Takes some 20 ms; None where there is none, or where a process may have no code of its own making."""
    try:
        counter = _counter()
    except OSError:
        return None
    ticks, ns = counter.sample()
    await asyncio.sleep(_LEAST_S)
    later_ticks, later_ns = counter.sample()
    return (later_ticks - ticks) * 10**6 // (later_ns - ns)


class _Counter:
    """Raises OSError."""

    def __init__(self) -> None:
        if (machine := os.uname().machine) != "x86_64":
            raise OSError(f"no time stamp counter is known of {machine}")
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        page.write(_RDTSC)
        self._code = (ctypes.c_char * len(_RDTSC)).from_buffer(page)
        # Nothing is done around it, such as letting another thread run.
        self._read = ctypes.PYFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(self._code))

    def sample(self) -> tuple[int, int]:
        """The counter, and the ns of a clock that nobody slews at that moment: of several the one that was
        interrupted the least."""
        samples = []
        for _ in range(_SAMPLES):
            before = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
            ticks = self._read()
            after = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
            samples.append((after - before, ticks, (before + after) // 2))
        _, ticks, ns = min(samples)
        return ticks, ns


_counter = cache(_Counter)
