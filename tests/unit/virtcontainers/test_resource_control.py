import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from virtcontainers.device_cgroup import DeviceRule
from virtcontainers.errors import InvalidArgumentError, KataError
from virtcontainers.resource_control import (
    Hierarchy,
    PodCgroups,
    ResourceController,
    ResourceStats,
    find_hierarchies,
    parse_cpus,
    pin_thread,
    sandbox_cgroup_path,
)

V1 = "35 24 0:30 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
V1_SYSTEMD = "29 24 0:25 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n"
V2 = "25 24 0:22 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate\n"
MOUNTS = Path("/proc/self/mountinfo")
REPO = Path(__file__).parents[3]
CGROUP = f"kata-py-unit-test-{secrets.token_hex(3)}"
"""Not of the pid, which is of a namespace: cgroups are the host's."""
OTHER = "22 1 259:2 / / rw,relatime shared:1 - ext4 /dev/root rw\n"


@pytest.mark.parametrize(
    ("cgroups_path", "path"),
    [
        ("/default/one", "/default/kata_one"),
        ("/kubepods/burstable/pod1/one", "/kubepods/burstable/pod1/kata_one"),
        ("relative/one", "/vc/relative/kata_one"),
        ("", "/vc/kata_pod"),
        (
            "kubepods-burstable-pod1.slice:cri-containerd:one",
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-one.scope",
        ),
        ("-.slice:ctr:one", "/ctr-one.scope"),
        ("a.slice:one", "/vc/kata_a.slice:one"),
    ],
)
def test_where_the_pods_cgroup_is(cgroups_path: str, path: str) -> None:
    assert sandbox_cgroup_path(cgroups_path, "pod") == path


def test_a_path_that_leaves_the_hierarchy_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"found '/a/../../b', expected no '..' in it"):
        sandbox_cgroup_path("/a/../../b", "pod")


@pytest.mark.parametrize(
    ("mountinfo", "found"),
    [
        (OTHER + V1_SYSTEMD + V2 + V1, [("/sys/fs/cgroup/cpu,cpuacct", {"cpu", "cpuacct"}, "engine")]),
        (OTHER + V1_SYSTEMD + V2, [("/sys/fs/cgroup/unified", set(), "system.slice/engine.service")]),
        (OTHER, []),
    ],
)
def test_the_hierarchies_of_a_host(
    mountinfo: str, found: list[tuple[str, set[str], str]], tmp_path: Path
) -> None:
    (tmp_path / "mountinfo").write_text(mountinfo)
    (tmp_path / "cgroup").write_text(
        "4:cpu,cpuacct:/engine\n1:name=systemd:/x\n0::/system.slice/engine.service\n"
    )
    expected = [
        Hierarchy(Path(path), frozenset(controllers), Path(path, home)) for path, controllers, home in found
    ]
    assert find_hierarchies(tmp_path / "mountinfo", tmp_path / "cgroup") == expected


def test_what_else_is_mounted_on_a_host_may_have_any_name(tmp_path: Path) -> None:
    odd = OTHER.encode().replace(b" / rw", b" /mnt/\xff\xc2\x85\xe2\x80\xa8\x0c rw")
    (tmp_path / "mountinfo").write_bytes(odd + V2.encode())
    (tmp_path / "cgroup").write_bytes(b"1:name=systemd:/\xff\xc2\x85\n0::/\n")
    (hierarchy,) = find_hierarchies(tmp_path / "mountinfo", tmp_path / "cgroup")
    assert hierarchy.mount_point == Path("/sys/fs/cgroup/unified")


@pytest.mark.parametrize(
    ("root", "cgroup", "home"),
    [
        ("/docker/one", "/docker/one/engine", "engine"),
        ("/docker/one", "/docker/one", ""),
        # What is mounted is another part of the tree, or this process is outside of its namespace.
        ("/docker/one", "/docker/other", None),
        ("/", "/../engine", None),
        ("/../..", "/engine", None),
    ],
)
def test_where_this_process_is(root: str, cgroup: str, home: str | None, tmp_path: Path) -> None:
    (tmp_path / "mountinfo").write_text(V2.replace(" / ", f" {root} "))
    (tmp_path / "cgroup").write_text(f"0::{cgroup}\n")
    (hierarchy,) = find_hierarchies(tmp_path / "mountinfo", tmp_path / "cgroup")
    assert hierarchy.home == (None if home is None else Path("/sys/fs/cgroup/unified", home))


@pytest.mark.parametrize(("text", "cpus"), [("", []), ("3", [3]), ("0-2,7", [0, 1, 2, 7])])
def test_lists_of_cpus(text: str, cpus: list[int]) -> None:
    assert parse_cpus(text) == cpus


@pytest.mark.parametrize("text", ["a", "0-x", "0-99999999999"])
def test_what_is_no_list_of_cpus_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="expected a list such as 0-3,7"):
        parse_cpus(text)


def test_a_thread_is_pinned_to_cpus_that_there_are() -> None:
    here = sorted(os.sched_getaffinity(0))
    with subprocess.Popen(["sleep", "100"]) as process:
        try:
            pin_thread(process.pid, here[:1])
            assert os.sched_getaffinity(process.pid) == set(here[:1])
            with pytest.raises(KataError, match=f"thread {process.pid} is not bound to CPUs"):
                pin_thread(process.pid, [8000])
        finally:
            process.kill()
    pin_thread(process.pid, here)  # it has ended: nothing to pin


@pytest.fixture(params=["v1", "v2"])
def hierarchies(request: pytest.FixtureRequest) -> list[Hierarchy]:
    if os.geteuid() != 0:
        pytest.skip("cgroups need root")
    if request.param == "v1":
        found = [hierarchy for hierarchy in find_hierarchies() if not hierarchy.is_v2]
    else:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        points = [line.split()[4] for line in lines if " - cgroup2 " in line]
        found = [Hierarchy(Path(point), frozenset()) for point in points[:1]]
    if not found:
        pytest.skip(f"this host has no cgroup {request.param}")
    return found


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "1000"]) as sleeper:
        yield sleeper
        sleeper.kill()


def test_a_cgroup_holds_a_process_and_goes(
    hierarchies: list[Hierarchy], process: subprocess.Popen[bytes]
) -> None:
    path = f"/{CGROUP}/kata_pod"
    controller = ResourceController(path, hierarchies)
    parent = ResourceController(str(Path(path).parent), hierarchies)
    controller.create()
    controller.create()
    try:
        controller.add_process(process.pid)
        assert controller.pids() == {process.pid}
        controller.add_thread(process.pid)
        controller.update_cpuset("", "")
        assert path in Path(f"/proc/{process.pid}/cgroup").read_text()
    finally:
        controller.delete()
        controller.delete()
        assert path not in Path(f"/proc/{process.pid}/cgroup").read_text()
        process.kill()
        process.wait()
        parent.delete()
    for hierarchy in hierarchies:
        assert not (hierarchy.mount_point / parent.path.lstrip("/")).exists()


def test_a_cpuset_that_another_pod_is_still_making_is_filled(process: subprocess.Popen[bytes]) -> None:
    """On a cold host several make the one above theirs at once, which is born empty."""
    hierarchies = [each for each in find_hierarchies() if "cpuset" in each.controllers]
    if os.geteuid() != 0 or not hierarchies:
        pytest.skip("this needs root, and cgroup v1's cpuset")
    parent = ResourceController(f"/{CGROUP}", hierarchies)
    controller = ResourceController(f"{parent.path}/kata_pod", hierarchies)
    (hierarchies[0].mount_point / CGROUP).mkdir()
    try:
        controller.create()
        controller.add_process(process.pid)
        assert controller.pids() == {process.pid}
    finally:
        controller.delete()
        parent.delete()


def test_who_is_left_in_a_cgroup_of_v2_goes_where_processes_may_be(process: subprocess.Popen[bytes]) -> None:
    points = [line.split()[4] for line in MOUNTS.read_text().splitlines() if " - cgroup2 " in line]
    if os.geteuid() != 0 or not points or not (Path(points[0]) / "cgroup.controllers").read_text().strip():
        pytest.skip("this needs root, and a cgroup v2 with a controller")
    hierarchy = Hierarchy(Path(points[0]), frozenset())
    parent = ResourceController(f"/{CGROUP}", [hierarchy])
    controller = ResourceController(f"{parent.path}/kata_pod", [hierarchy])
    controller.create()
    try:
        controller.add_process(process.pid)
        # Its controllers are given to the cgroups below: the kernel takes no process into it any more.
        assert (hierarchy.mount_point / parent.path[1:] / "cgroup.subtree_control").read_text().strip()
        controller.delete()
        assert controller.path not in Path(f"/proc/{process.pid}/cgroup").read_text()
        assert parent.pids() == set()
    finally:
        controller.delete()
        parent.delete()


IN_A_NAMESPACE = """
import os, time
from pathlib import Path
from virtcontainers.resource_control import PodCgroups, find_hierarchies

root = Path("/sys/fs/cgroup")
(hierarchy,) = find_hierarchies()
assert hierarchy.home == root / "engine", hierarchy
pod = PodCgroups("pod", "/kubepods/pod", sandbox_cgroup_only=False)
pod.enter([])
assert "0::/kata_overhead/pod\\n" in Path("/proc/self/cgroup").read_text()
# As in a container of an engine's that gives controllers on.
for directory in (root, root / "kata_overhead", root / "kubepods"):
    assert (directory / "cgroup.subtree_control").read_text().strip(), directory
pod.delete()
assert "0::/engine\\n" in Path("/proc/self/cgroup").read_text()
for directory in (root / "kata_overhead", root / "kubepods"):
    assert not [path for path in directory.iterdir() if path.is_dir()]
    directory.rmdir()
print("done")
"""
ENTER = """
echo $$ >$0/cgroup.procs
exec unshare --mount --cgroup sh -ec '
while mountpoint -q /sys; do umount -R -l /sys; done
mount -t sysfs sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir /sys/fs/cgroup/engine
echo $$ >/sys/fs/cgroup/engine/cgroup.procs
exec "$@"' sh "$@"
"""


def test_in_a_namespace_of_v2_this_process_goes_back_where_it_came_from() -> None:
    """There the root takes no process either: containerd in Docker, kind."""
    points = [line.split()[4] for line in MOUNTS.read_text().splitlines() if " - cgroup2 " in line]
    if (
        os.geteuid() != 0
        or not points
        or not (Path(points[0]) / "cgroup.subtree_control").read_text().strip()
    ):
        pytest.skip("this needs root, and a cgroup v2 that gives a controller on")
    container = Path(points[0], CGROUP)
    container.mkdir()
    try:
        command = ["sh", "-ec", ENTER, container, sys.executable, "-c", IN_A_NAMESPACE]
        found = subprocess.run(command, capture_output=True, text=True, cwd=REPO, timeout=180)
        assert (found.returncode, found.stdout) == (0, "done\n"), found.stderr
    finally:
        for directory, _, _ in os.walk(container, topdown=False):
            Path(directory).rmdir()


def test_hierarchies_that_no_machine_needs_may_be_closed() -> None:
    path = f"/{CGROUP}"
    closed = Path("/proc")  # nobody makes a directory there
    controller = ResourceController(path, [Hierarchy(closed, frozenset({"net_cls", "net_prio"}))])
    controller.create()
    controller.add_process(os.getpid())
    controller.delete()
    with pytest.raises(KataError, match=f"cgroup /proc{path}: No such file"):
        ResourceController(path, [Hierarchy(closed, frozenset({"memory"}))]).create()


def test_a_device_that_cannot_be_denied_is_an_error(tmp_path: Path) -> None:
    """As its file says no: by a directory in its place."""
    for name in ("devices.allow", "devices.deny"):
        (tmp_path / "pod" / name).mkdir(parents=True)
    controller = ResourceController("/pod", [Hierarchy(tmp_path, frozenset({"devices"}))])
    with pytest.raises(KataError, match="device 'a \\*:\\* rwm' cannot be denied"):
        controller.update_devices([DeviceRule(False, "a *:* rwm")])


def test_what_a_cgroup_has_used() -> None:
    controller = ResourceController(f"/{CGROUP}")
    found = {name for hierarchy in find_hierarchies() for name in hierarchy.controllers}
    if os.geteuid() != 0 or not {"cpuacct", "memory", "pids"} <= found:
        pytest.skip("this needs root, and cgroup v1")
    controller.create()
    try:
        read_end, write_end = os.pipe()
        script = "read go; x=$(head -c 20m /dev/zero | tr '\\0' a); echo done; read end"
        with subprocess.Popen(
            ["sh", "-c", script], stdin=subprocess.PIPE, stdout=write_end, text=True
        ) as process:
            assert process.stdin
            controller.add_process(process.pid)
            assert controller.stat().memory_bytes < 8 << 20
            process.stdin.write("go\n")
            process.stdin.flush()
            assert os.read(read_end, 5) == b"done\n"
            deadline = time.monotonic() + 60
            while (stats := controller.stat()).memory_stat["rss"] <= 16 << 20:
                # The kernel sums memory.stat up every few seconds.
                assert time.monotonic() < deadline, stats
                time.sleep(0.05)
            assert stats.pids == 1
            assert stats.memory_bytes > 16 << 20
            # In the same unit; the kernel guesses these from its ticks.
            assert 0 < stats.cpu_user_usec + stats.cpu_system_usec <= controller.stat().cpu_usec * 10
            process.stdin.write("end\n")
        os.close(read_end)
        os.close(write_end)
        twice = stats + stats
        assert (twice.memory_bytes, twice.pids) == (2 * stats.memory_bytes, 2)
        assert twice.memory_stat["rss"] == 2 * stats.memory_stat["rss"]
    finally:
        controller.delete()


def test_what_a_cgroup_of_v2_has_used(tmp_path: Path) -> None:
    """From a directory with a kernel's files: no host here counts CPU and memory by v2."""
    (tmp_path / "pod").mkdir()
    for name, text in {
        "cpu.stat": "usage_usec 30\nuser_usec 20\nsystem_usec 10\ncore_sched.force_idle_usec 0\n",
        "memory.current": "4096\n",
        "memory.stat": "anon 1024\nfile 3072\n",
        "pids.current": "3\n",
    }.items():
        (tmp_path / "pod" / name).write_text(text)
    stats = ResourceController("/pod", [Hierarchy(tmp_path, frozenset())]).stat()
    assert stats == ResourceStats(30, 20, 10, 4096, {"anon": 1024, "file": 3072}, 3)
    assert ResourceController("/none", [Hierarchy(tmp_path, frozenset())]).stat() == ResourceStats()


def test_a_process_that_has_ended_is_in_no_cgroup(hierarchies: list[Hierarchy]) -> None:
    controller = ResourceController(f"/{CGROUP}", hierarchies)
    with subprocess.Popen(["true"]) as process:
        process.wait()
    controller.create()
    try:
        controller.add_process(process.pid)
        assert controller.pids() == set()
    finally:
        controller.delete()


def test_a_pod_has_an_overhead_cgroup_unless_it_has_the_one_only() -> None:
    both = PodCgroups("pod", "/default/one", sandbox_cgroup_only=False)
    assert both.paths == ["/default/kata_one", "/kata_overhead/pod"]
    assert PodCgroups("pod", "/default/one", sandbox_cgroup_only=True).paths == ["/default/kata_one"]
