"""The agent's statistics, and a whole pod's, as `ctr task metrics` and the CRI plugin read them."""

from agent_client.protocols.agent_pb2 import StatsContainerResponse
from shim.metrics import UNLIMITED, metrics, sandbox_metrics
from virtcontainers.resource_control import ResourceStats


def test_units_and_fields() -> None:
    response = StatsContainerResponse()
    stats = response.cgroup_stats
    stats.cpu_stats.cpu_usage.total_usage = 3_000_000
    stats.cpu_stats.cpu_usage.usage_in_usermode = 2_000_000
    stats.cpu_stats.cpu_usage.usage_in_kernelmode = 1_000_000
    stats.cpu_stats.throttling_data.throttled_time = 5_000
    stats.memory_stats.usage.usage = 1 << 20
    stats.memory_stats.usage.limit = 1 << 30
    stats.memory_stats.stats.update({"anon": 4096, "inactive_file": 8192, "not_a_field": 1, "psi": 1})
    stats.pids_stats.current = 3
    stats.hugetlb_stats["2MB"].usage = 7
    for operation, value in (("Read", 100), ("write", 200), ("Total", 300)):
        stats.blkio_stats.io_service_bytes_recursive.add(major=8, minor=0, op=operation, value=value)
        stats.blkio_stats.io_serviced_recursive.add(major=8, minor=0, op=operation, value=value // 100)
    response.network_stats.add(name="eth0", rx_bytes=10, tx_dropped=2)

    found = metrics(response)
    assert (found.cpu.usage_usec, found.cpu.user_usec, found.cpu.system_usec) == (3000, 2000, 1000)
    assert found.cpu.throttled_usec == 5
    assert (found.memory.usage, found.memory.usage_limit) == (1 << 20, 1 << 30)
    assert (found.memory.anon, found.memory.inactive_file) == (4096, 8192)
    assert found.pids.current == 3
    (huge,) = found.hugetlb
    assert (huge.pagesize, huge.current) == ("2MB", 7)
    (device,) = found.io.usage
    assert (device.major, device.rbytes, device.wbytes, device.rios, device.wios) == (8, 100, 200, 1, 2)
    (network,) = found.network
    assert (network.name, network.rx_bytes, network.tx_dropped) == ("eth0", 10, 2)


def test_a_guest_without_numbers_still_has_every_group() -> None:
    """Clients look into them without asking whether they are there."""
    found = metrics(StatsContainerResponse())
    assert found.HasField("cpu") and found.HasField("memory") and found.HasField("pids")


def test_a_pods_are_the_hosts_under_the_names_of_cgroup_v2() -> None:
    response = StatsContainerResponse()
    response.cgroup_stats.memory_stats.usage.usage = 7
    response.network_stats.add(name="eth0", rx_bytes=10)
    memory_stat = {"rss": 4096, "inactive_file": 8192, "swap": 1, "usage": 1}
    found = sandbox_metrics(ResourceStats(30, 20, 10, 1 << 20, memory_stat, 3), response)
    assert (found.cpu.usage_usec, found.cpu.user_usec, found.cpu.system_usec) == (30, 20, 10)
    assert (found.memory.anon, found.memory.inactive_file) == (4096, 8192)
    assert found.pids.current == 3
    assert found.network[0].rx_bytes == 10
    found = sandbox_metrics(ResourceStats(memory_bytes=1 << 20, memory_stat={"anon": 5}), response)
    assert (found.memory.usage, found.memory.usage_limit, found.memory.anon) == (1 << 20, UNLIMITED, 5)
    assert found.HasField("cpu") and found.HasField("pids")
