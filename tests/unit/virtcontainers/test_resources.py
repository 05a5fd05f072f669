import pytest

from virtcontainers.errors import InvalidArgumentError
from virtcontainers.resources import cpuset, wanted_memory_mib, wanted_vcpus

MIB = 1 << 20


def quota(cpus: float) -> dict[str, object]:
    return {"cpu": {"quota": int(cpus * 100_000), "period": 100_000}}


@pytest.mark.parametrize(
    ("containers", "vcpus"),
    [
        ([], 1),
        ([{}], 1),
        ([{"cpu": {"shares": 2}}], 1),
        ([quota(2)], 3),
        ([quota(0.5), quota(0.5)], 2),
        ([quota(0.5), quota(0.6)], 3),
        ([quota(0.1), quota(0.2), quota(0.7)], 2),
        ([{"cpu": {"quota": -1, "period": 100_000}}], 1),
        ([{"cpu": {"quota": 5000, "period": 0}}], 1),
        ([{"cpu": {"cpus": "0-2"}}], 4),
        ([{"cpu": {"cpus": "0,2"}}, {"cpu": {"cpus": "1"}}], 4),
        # A quota anywhere makes the sets not count.
        ([{"cpu": {"cpus": "0-7"}}, quota(1)], 2),
    ],
)
def test_the_vcpus_of_a_pod(containers: list[dict[str, object]], vcpus: int) -> None:
    assert wanted_vcpus(1, containers) == vcpus


@pytest.mark.parametrize(
    ("containers", "mib"),
    [
        ([{}], 256),
        ([{"memory": {"limit": 128 * MIB}}], 384),
        ([{"memory": {"limit": 128 * MIB + 1}}], 384),
        ([{"memory": {"limit": 128 * MIB + 4096}}], 385),
        ([{"memory": {"limit": -1}}], 256),
        ([{"memory": {"limit": 100 * MIB}}, {"memory": {"limit": 50 * MIB}}], 406),
        ([{"hugepageLimits": [{"pageSize": "2MB", "limit": 64 * MIB}]}], 320),
    ],
)
def test_the_memory_of_a_pod(containers: list[dict[str, object]], mib: int) -> None:
    assert wanted_memory_mib(256, containers) == mib


def test_the_sets_of_a_pod_are_united() -> None:
    containers = [{"cpu": {"cpus": "0-1", "mems": "0"}}, {"cpu": {"cpus": "1,5"}}, {}]
    assert cpuset(containers) == ("0,1,5", "0")
    assert cpuset([{}]) == ("", "")


def test_a_set_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="found '0-x', expected a list such as 0-3,7"):
        wanted_vcpus(1, [{"cpu": {"cpus": "0-x"}}])
