"""What the containers of a pod ask for together, after Kata's `calculateSandboxCPUs` and `…Memory`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from virtcontainers.resource_control import parse_cpus

Resources = Mapping[str, Any]
"""linux.resources of an OCI spec."""

_PAGE_BYTES = 4096


def wanted_vcpus(default_vcpus: int, containers: Iterable[Resources]) -> int:
    """The machine's own and the sum of the quotas, rounded up once; where no container has a quota, the CPUs
    of their sets are counted. Raises InvalidArgumentError for a set that is none."""
    quotas, in_sets = 0.0, 0
    for resources in containers:
        cpu = resources.get("cpu") or {}
        quota, period = cpu.get("quota") or 0, cpu.get("period") or 0
        if quota > 0 and period > 0:
            quotas += quota / period
        in_sets += len(set(parse_cpus(cpu.get("cpus") or "")))
    # Kata's arithmetic is in thousandths: 0.1 + 0.2 are not a CPU more than 0.3.
    return default_vcpus + math.ceil(round(quotas, 3)) if quotas else default_vcpus + in_sets


def wanted_memory_mib(default_mib: int, containers: Iterable[Resources]) -> int:
    """The machine's own and the sum of the limits, of huge pages too. A limit is in whole pages, as the
    guest's kernel takes it."""
    limits = 0
    for resources in containers:
        limit = (resources.get("memory") or {}).get("limit") or 0
        limits += max(limit, 0) // _PAGE_BYTES * _PAGE_BYTES
        limits += sum(entry.get("limit") or 0 for entry in resources.get("hugepageLimits") or [])
    return default_mib + math.ceil(limits / (1 << 20))


def cpuset(containers: Iterable[Resources]) -> tuple[str, str]:
    """(CPUs, memory nodes) of the host that the pod may use: the union of its containers' sets, as the kernel
    writes them; "" for no wish."""
    cpus: set[int] = set()
    mems: set[int] = set()
    for resources in containers:
        cpu = resources.get("cpu") or {}
        cpus.update(parse_cpus(cpu.get("cpus") or ""))
        mems.update(parse_cpus(cpu.get("mems") or ""))
    return ",".join(map(str, sorted(cpus))), ",".join(map(str, sorted(mems)))
