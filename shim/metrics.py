"""Statistics as containerd's clients read them: io.containerd.cgroups.v2.Metrics. A container's are the
agent's, after Kata's `statsToMetricsV2`; a whole pod's are the host's."""

from __future__ import annotations

from agent_client.protocols.agent_pb2 import BlkioStatsEntry, StatsContainerResponse
from shim.protocols.cgroups_v2_pb2 import (
    CPUStat,
    HugeTlbStat,
    IOEntry,
    IOStat,
    MemoryEvents,
    MemoryStat,
    Metrics,
    NetworkStat,
    PidsStat,
)
from virtcontainers.resource_control import ResourceStats

_MEMORY_FIELDS = {field.name for field in MemoryStat.DESCRIPTOR.fields} - {"psi"}


def metrics(response: StatsContainerResponse) -> Metrics:
    stats = response.cgroup_stats
    usage, throttling = stats.cpu_stats.cpu_usage, stats.cpu_stats.throttling_data
    cpu = CPUStat(
        usage_usec=usage.total_usage // 1000,
        user_usec=usage.usage_in_usermode // 1000,
        system_usec=usage.usage_in_kernelmode // 1000,
        nr_periods=throttling.periods,
        nr_throttled=throttling.throttled_periods,
        throttled_usec=throttling.throttled_time // 1000,
    )
    # The guest's memory.stat has the fields' own names, but for a few that no field is called after.
    memory = MemoryStat()
    for name in _MEMORY_FIELDS & stats.memory_stats.stats.keys():
        setattr(memory, name, stats.memory_stats.stats[name])
    memory.usage = stats.memory_stats.usage.usage
    memory.usage_limit = stats.memory_stats.usage.limit
    memory.max_usage = stats.memory_stats.usage.max_usage
    memory.swap_usage = stats.memory_stats.swap_usage.usage
    memory.swap_limit = stats.memory_stats.swap_usage.limit
    memory.swap_max_usage = stats.memory_stats.swap_usage.max_usage
    return Metrics(
        pids=PidsStat(current=stats.pids_stats.current, limit=stats.pids_stats.limit),
        cpu=cpu,
        memory=memory,
        memory_events=MemoryEvents(max=stats.memory_stats.usage.failcnt),
        io=IOStat(usage=_io(response)),
        hugetlb=[
            HugeTlbStat(current=huge.usage, max=huge.max_usage, pagesize=size, failcnt=huge.failcnt)
            for size, huge in sorted(stats.hugetlb_stats.items())
        ],
        network=_network(response),
    )


_OF_V1 = {
    "rss": "anon",
    "rss_huge": "anon_thp",
    "cache": "file",
    "mapped_file": "file_mapped",
    "dirty": "file_dirty",
    "writeback": "file_writeback",
}
"""Names in cgroup v1's memory.stat for what v2, and with it the message, calls otherwise."""

UNLIMITED = (1 << 64) - 1


def sandbox_metrics(stats: ResourceStats, response: StatsContainerResponse) -> Metrics:
    """A whole pod's: what it costs on the host, and what its network has carried, as the agent tells."""
    memory = MemoryStat()
    for name, value in stats.memory_stat.items():
        field = _OF_V1.get(name, name)
        if field in _MEMORY_FIELDS:
            setattr(memory, field, value)
    memory.usage, memory.usage_limit, memory.swap_limit = stats.memory_bytes, UNLIMITED, UNLIMITED
    return Metrics(
        pids=PidsStat(current=stats.pids),
        cpu=CPUStat(
            usage_usec=stats.cpu_usec, user_usec=stats.cpu_user_usec, system_usec=stats.cpu_system_usec
        ),
        memory=memory,
        memory_events=MemoryEvents(),
        io=IOStat(),
        network=_network(response),
    )


def _network(response: StatsContainerResponse) -> list[NetworkStat]:
    return [
        NetworkStat(**{field.name: value for field, value in network.ListFields()})
        for network in response.network_stats
    ]


def _io(response: StatsContainerResponse) -> list[IOEntry]:
    entries: dict[tuple[int, int], IOEntry] = {}

    def add(found: BlkioStatsEntry, read: str, write: str) -> None:
        device = found.major, found.minor
        entry = entries.setdefault(device, IOEntry(major=found.major, minor=found.minor))
        if (operation := found.op.lower()) in ("read", "write"):
            field = read if operation == "read" else write
            setattr(entry, field, getattr(entry, field) + found.value)

    blkio = response.cgroup_stats.blkio_stats
    for found in blkio.io_service_bytes_recursive:
        add(found, "rbytes", "wbytes")
    for found in blkio.io_serviced_recursive:
        add(found, "rios", "wios")
    return list(entries.values())
