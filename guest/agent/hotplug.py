"""CPUs and memory that the host has added, put to use."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Iterator

from ttrpc import Code, StatusError

_CPUS = "/sys/devices/system/cpu"
_MEMORY = "/sys/devices/system/memory"
# The host may ask before ACPI has told the kernel; Kata's agent is as patient.
_ATTEMPTS = 250
_POLL_S = 0.02


def count_cpus(ranges: str) -> int:
    """How many CPUs a list of the kernel's names: "0-2,7" are four."""
    count = 0
    for part in ranges.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            count += int(last or first) - int(first) + 1
    return count


def _online_cpus() -> int:
    with open(f"{_CPUS}/online") as file:
        return count_cpus(file.read())


def _offline(directory: str, pattern: str) -> Iterator[str]:
    names = [name for name in os.listdir(directory) if re.fullmatch(pattern, name)]
    for name in sorted(names, key=lambda n: int(re.sub(r"\D", "", n))):
        path = f"{directory}/{name}/online"
        # The first CPU often has no such file.
        with contextlib.suppress(FileNotFoundError), open(path) as file:
            if file.read().strip() == "0":
                yield path


def _set_online(path: str) -> str:
    """Why it does not go online; "" when it does, or was."""
    try:
        with open(path, "w") as file:
            file.write("1")
    except OSError as error:
        return error.strerror or str(error)
    return ""


async def online_cpus(wanted: int) -> None:
    """Until at least `wanted` CPUs work; raises StatusError (DEADLINE_EXCEEDED) when that takes over 5 s."""
    for _ in range(_ATTEMPTS):
        missing = wanted - _online_cpus()
        if missing <= 0:
            return
        for path in list(_offline(_CPUS, r"cpu\d+"))[:missing]:
            _set_online(path)
        if _online_cpus() >= wanted:
            return
        await asyncio.sleep(_POLL_S)
    raise StatusError(Code.DEADLINE_EXCEEDED, f"{_online_cpus()} of {wanted} CPUs are online")


async def online_memory() -> None:
    """Until no block that is there is offline; raises StatusError (DEADLINE_EXCEEDED) when one is after 5 s.

    Blocks that the host has added and that are not there yet are for the host to know.
    """
    for _ in range(_ATTEMPTS):
        failed = {}
        for path in list(_offline(_MEMORY, r"memory\d+")):
            if reason := _set_online(path):
                failed[path.split("/")[-2]] = reason
            await asyncio.sleep(0)  # one takes milliseconds, and a machine may get hundreds
        if not failed:
            return
        await asyncio.sleep(_POLL_S)
    blocks = ", ".join(f"{name} ({reason})" for name, reason in failed.items())
    raise StatusError(Code.DEADLINE_EXCEEDED, f"memory blocks do not go online: {blocks}")


def memory_block_size() -> int:
    """In bytes; 0 on a kernel without memory hotplug."""
    try:
        with open(f"{_MEMORY}/block_size_bytes") as file:
            return int(file.read(), 16)
    except FileNotFoundError:
        return 0


def has_memory_probe() -> bool:
    return os.path.exists(f"{_MEMORY}/probe")


def probe_memory(addresses: list[int]) -> None:
    for address in addresses:
        with open(f"{_MEMORY}/probe", "w") as file:
            file.write(f"{address:#X}")
