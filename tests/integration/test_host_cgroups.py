"""Where a pod is on the host: its cgroups, its CPUs, and what it is seen to use."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from cri import Crictl, Pod
from harness import Config, Ctr, loop, processes_of, remove_cgroups, wait_for
from host_state import RUN
from lan import HOST, Namespace, bridge, namespace
from private_containerd import Containerd
from templates import Log, ReadyTemplates, Templates, templates
from test_block import loop_partition, partitioned, read_image
from test_ctr_pod import cri

CGROUPS = Path("/sys/fs/cgroup")
CGROUP_ONLY = "io.katacontainers.config.runtime.sandbox_cgroup_only"
PINNING = "io.katacontainers.enable_vcpus_pinning"
SLEEP = ("sleep", "100000")
MIB = 1 << 20

on_v1 = pytest.mark.skipif(
    not (CGROUPS / "memory/tasks").exists(), reason="this looks at a host with cgroup v1's controllers"
)

PURE_V2 = f"""#!/bin/sh
exec unshare --mount sh -c '
while mountpoint -q /sys; do umount -R -l /sys || exit 1; done
mount -t sysfs sysfs /sys && mount -t cgroup2 cgroup2 {CGROUPS} || exit 1
exec /usr/bin/containerd "$@"' containerd "$@"
"""
"""A containerd that, with all it starts, sees a host of cgroup v2 alone."""

IN_A_NAMESPACE = f"""#!/bin/sh
echo $$ >CONTAINER/cgroup.procs || exit 1
exec unshare --mount --cgroup sh -c '
while mountpoint -q /sys; do umount -R -l /sys || exit 1; done
mount -t sysfs sysfs /sys && mount -t cgroup2 cgroup2 {CGROUPS} && mkdir {CGROUPS}/engine || exit 1
echo $$ >{CGROUPS}/engine/cgroup.procs || exit 1
exec /usr/bin/containerd "$@"' containerd "$@"
"""
"""The same in a container: what it sees as the root is a cgroup that takes no processes, CONTAINER."""


_PF_EXITING = 0x4  # <linux/sched.h>


def threads_of(pid: int) -> dict[int, str]:
    """Their ids, with their names."""
    found = {}
    # Those that end meanwhile, or all of them, are left out.
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found[int(task.name)] = (task / "comm").read_text().strip()
    return found


def cgroups_of(threads: Iterable[int], *, unified: bool = False) -> set[str]:
    """In the hierarchies that have a controller, or in v2's; those that are ending are in none."""
    found: set[str] = set()
    for thread in threads:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            lines = Path(f"/proc/{thread}/cgroup").read_text().splitlines()
            fields = [line.split(":", 2) for line in lines]
            flags = int(Path(f"/proc/{thread}/stat").read_text().rpartition(")")[2].split()[6])
            if not flags & _PF_EXITING:
                found |= {
                    path
                    for _, name, path in fields
                    if (not name if unified else name and not name.startswith("name="))
                }
    return found


def vcpus_of(pod: str) -> dict[str, int]:
    """The threads that run the guest, by QEMU's names for them."""
    (machine,) = processes_of(pod, "qemu-system")
    found = {name: thread for thread, name in threads_of(machine).items() if name.startswith("CPU ")}
    return dict(sorted(found.items()))


def others_of(pod: str) -> list[int]:
    """All threads of the pod that are no vCPUs: QEMU's, the shim's, and its virtiofsds'."""
    programs = ("qemu-system", "containerd-shim-kata-py-v2", "virtiofsd")
    processes = {program: processes_of(pod, program) for program in programs}
    assert all(processes.values()), processes
    threads = [thread for pids in processes.values() for pid in pids for thread in threads_of(pid)]
    return sorted(set(threads) - set(vcpus_of(pod).values()))


def value(controller: str, cgroup: str, name: str) -> str:
    return (CGROUPS / controller / cgroup.strip("/") / name).read_text().strip()


def metrics(crictl: Crictl, container: str) -> dict[str, int]:
    """containerd's Stats of a task, as a person sees them."""
    found = crictl.containerd.ctr("-n", "k8s.io", "tasks", "metrics", container, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"^(\w+\.\w+) +(\d+) *$", found, re.MULTILINE)}


def statsp(crictl: Crictl, pod: Pod) -> tuple[int, int]:
    """The CPU time in ns and the memory in bytes that the kubelet would be told."""
    (stats,) = json.loads(crictl("statsp", "--id", pod.id, "-o", "json").stdout)["stats"]
    linux = stats["linux"]
    return int(linux["cpu"]["usageCoreNanoSeconds"]["value"]), int(linux["memory"]["usageBytes"]["value"])


def private_bytes(pid: int) -> int:
    """What the process has for itself: of a clone, all that is not the template's any more."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(kib) << 10 for kib in re.findall(r"^Private_\w+: +(\d+) kB", text, re.MULTILINE))


def work(pod: Pod, container: str) -> None:
    """Use CPU, and memory that stays used."""
    loop = "n=0; while [ $n -lt 30000 ]; do n=$((n + 1)); done"
    pod.exec(container, "sh", "-c", f"head -c 40m /dev/urandom >/dev/shm/kept; {loop}")


def growing(cpus: str = "") -> dict[str, object]:
    """The resources of a container that makes a machine of one vCPU one of two."""
    return {"resources": {"cpu_quota": 100_000, "cpu_period": 100_000, "cpuset_cpus": cpus}}


@pytest.fixture
def v2_root() -> Path:
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return next(Path(fields[4]) for fields in mounts if "cgroup2" in fields)


@contextlib.contextmanager
def ctr_of(script: str, directory: Path, containerd: Containerd) -> Iterator[Ctr]:
    """On a containerd that `script` starts."""
    binaries = directory / "bin"
    binaries.mkdir()
    (binaries / "containerd").write_text(script)
    (binaries / "containerd").chmod(0o755)
    (binaries / "ctr").symlink_to(containerd.binaries / "ctr")
    instance = dataclasses.replace(
        containerd, root=directory / "root", run=directory / "run", binaries=binaries
    )
    try:
        instance.start()
        yield Ctr(instance)
    finally:
        instance.destroy()


@pytest.fixture(scope="module")
def template(
    tmp_path_factory: pytest.TempPathFactory, containerd: Containerd, ready_templates: ReadyTemplates
) -> Iterator[Templates]:
    with templates(tmp_path_factory.mktemp("t"), {}) as found:
        found.put(ready_templates)
        yield found


@on_v1
def test_with_sandbox_cgroup_only_all_of_a_pod_is_in_its_cgroup_and_counted(crictl: Crictl) -> None:
    with crictl.pod("only", annotations={CGROUP_ONLY: "true"}) as pod:
        cgroup = f"{pod.cgroup}/kata_{pod.id}"
        assert len(vcpus_of(pod.id)) == 1
        container = pod.start("c", *SLEEP, linux=growing("1"))
        assert len(vcpus_of(pod.id)) == 2
        assert cgroups_of([*vcpus_of(pod.id).values(), *others_of(pod.id)]) == {cgroup}
        assert not list(CGROUPS.glob(f"*/kata_overhead/{pod.id}"))
        # The CPUs are the containers'; other limits are of the cgroup above, and the engine's.
        assert value("cpuset", cgroup, "cpuset.cpus") == "1"
        assert value("cpu", cgroup, "cpu.cfs_quota_us") == "-1"
        assert int(value("memory", cgroup, "memory.limit_in_bytes")) > 1 << 60

        # Of the host's devices a machine that was broken out of finds those that a machine needs.
        assert "c 1:9 rwm" in value("devices", cgroup, "devices.list").splitlines()
        join = f"echo $$ >{CGROUPS}/devices{cgroup}/cgroup.procs; exec head -c 1"
        for device, is_allowed in (("/dev/urandom", True), ("/dev/kmsg", False)):
            opened = subprocess.run(
                ["sh", "-c", f"{join} {device} >/dev/null"], capture_output=True, text=True
            )
            assert (opened.returncode == 0) is is_allowed, opened.stderr
            assert is_allowed or "Operation not permitted" in opened.stderr

        (machine,) = processes_of(pod.id, "qemu-system")
        cpu, memory = statsp(crictl, pod)
        assert private_bytes(machine) / 2 < memory < private_bytes(machine) * 2 + 300 * MIB
        before = metrics(crictl, pod.id)
        work(pod, container)
        cpu_after, memory_after = statsp(crictl, pod)
        assert cpu_after - cpu > 100_000_000
        assert memory_after - memory > 20 * MIB
        after = metrics(crictl, pod.id)
        assert after["cpu.usage_usec"] - before["cpu.usage_usec"] > 100_000
        assert after["memory.usage"] - before["memory.usage"] > 20 * MIB
        assert after["memory.usage"] > private_bytes(machine) / 2

        # containerd ends the pod of a shim that died.
        for shim in processes_of(pod.id, "containerd-shim-kata-py-v2"):
            os.kill(shim, signal.SIGKILL)
        wait_for("its cgroups to go", lambda: not list(CGROUPS.glob(f"*{cgroup}")))
        assert not processes_of(pod.id, "qemu-system")


@on_v1
def test_without_it_the_vcpus_alone_are_in_the_pods_cgroup(crictl: Crictl) -> None:
    with crictl.pod("vcpus") as pod:
        cgroup, overhead = f"{pod.cgroup}/kata_{pod.id}", f"/kata_overhead/{pod.id}"
        container = pod.start("c", *SLEEP)
        assert len(vcpus_of(pod.id)) == 1
        more = ("--cpu-period", "100000", "--cpu-quota", "100000", "--cpuset-cpus", "0")
        refused = crictl("update", *more, "--memory", str(1 << 50), container, check=False)
        assert "default_maxmemory" in refused.stderr
        assert len(vcpus_of(pod.id)) == 1, "who is refused has got nothing"
        assert cgroups_of(vcpus_of(pod.id).values()) == {cgroup}
        assert value("cpuset", cgroup, "cpuset.cpus") != "0"
        crictl("update", *more, container)
        assert len(vcpus_of(pod.id)) == 2
        assert cgroups_of(vcpus_of(pod.id).values()) == {cgroup}
        assert cgroups_of(others_of(pod.id)) == {overhead}
        assert value("cpuset", cgroup, "cpuset.cpus") == "0"
        assert value("cpuset", overhead, "cpuset.cpus") == value("cpuset", "/", "cpuset.cpus")

        (machine,) = processes_of(pod.id, "qemu-system")
        cpu, _ = statsp(crictl, pod)
        before = metrics(crictl, pod.id)
        work(pod, container)
        assert statsp(crictl, pod)[0] - cpu > 100_000_000
        after = metrics(crictl, pod.id)
        # Of the task, both cgroups.
        assert after["cpu.usage_usec"] - before["cpu.usage_usec"] > 100_000
        assert after["memory.usage"] - before["memory.usage"] > 20 * MIB
        assert after["memory.usage"] > private_bytes(machine) / 2

        def counted() -> bool:
            threads = len(vcpus_of(pod.id)) + len(others_of(pod.id))
            return metrics(crictl, pod.id)["pids.current"] == threads

        wait_for("all of its threads, which come and go, to be counted", counted)
        # Of a container that is not the pod's own, the guest's.
        assert metrics(crictl, container)["memory.usage"] < after["memory.usage"]

        for machine in processes_of(pod.id, "qemu-system"):
            os.kill(machine, signal.SIGKILL)
        assert pod.wait_exited(container)["exitCode"] == 137
        crictl("rmp", "--force", pod.id)
        for path in (cgroup, overhead):
            assert not list(CGROUPS.glob(f"*{path}"))


@on_v1
def test_a_pod_that_outgrows_the_engines_limit_ends(crictl: Crictl) -> None:
    """As the kubelet sets it for the pod: its containers' limits and the RuntimeClass' overhead."""
    with crictl.pod("outgrown", annotations={CGROUP_ONLY: "true"}) as pod:
        container = pod.start("c", *SLEEP)
        limit = CGROUPS / f"memory{pod.cgroup}/memory.limit_in_bytes"
        limit.write_text(str(statsp(crictl, pod)[1] + 20 * MIB))
        pod.exec(container, "sh", "-c", "x=$(head -c 100m /dev/zero | tr '\\0' a)", check=False)
        assert pod.wait_exited(container)["exitCode"] == 137
        wait_for("the pod's end", lambda: crictl.inspectp(pod.id)["status"]["state"] == "SANDBOX_NOTREADY")
        assert not processes_of(pod.id, "qemu-system")


@on_v1
def test_each_vcpu_has_a_cpu_of_its_own_while_there_are_as_many(crictl: Crictl) -> None:
    if os.sched_getaffinity(0) != {0, 1}:
        pytest.skip("for a host of two CPUs")
    with crictl.pod("pinned", annotations={PINNING: "true"}) as pod:

        def affinities() -> list[set[int]]:
            return [os.sched_getaffinity(thread) for thread in vcpus_of(pod.id).values()]

        assert affinities() == [{0, 1}]
        container = pod.start("c", *SLEEP, linux=growing("0-1"))
        assert affinities() == [{0}, {1}]
        crictl("update", "--cpuset-cpus", "1", container)
        assert value("cpuset", f"{pod.cgroup}/kata_{pod.id}", "cpuset.cpus") == "1"
        assert affinities() == [{1}, {1}]
        crictl("update", "--cpuset-cpus", "0-1", container)
        assert affinities() == [{0}, {1}]
        # One of them is more than there are CPUs for.
        refused = crictl("update", "--cpuset-cpus", "0,77", container, check=False)
        assert refused.returncode != 0
        assert "cpuset.cpus: '0,77' is refused" in refused.stderr
        assert pod.exec(container, "echo", "alive").stdout == "alive\n"
        # A quota that is too small for the guest's kernel: then nothing has changed on the host either.
        quota = ("--cpu-period", "100000", "--cpu-quota", "10")
        refused = crictl("update", "--cpuset-cpus", "1", *quota, container, check=False)
        assert refused.returncode != 0
        assert "cpu.max" in refused.stderr
        assert affinities() == [{0}, {1}]
        # The CPUs of a container that has gone are the pod's no longer.
        crictl("update", "--cpuset-cpus", "1", container)
        other = pod.start("other", *SLEEP, linux={"resources": {"cpuset_cpus": "0"}})
        assert affinities() == [{0}, {1}]
        crictl("stop", other)
        crictl("rm", other)
        assert value("cpuset", f"{pod.cgroup}/kata_{pod.id}", "cpuset.cpus") == "1"
        assert affinities() == [{1}, {1}]


@on_v1
def test_a_machine_of_a_fixed_size_is_in_its_cgroups_too(ctr: Ctr, container_id: str, config: Config) -> None:
    options = (
        *config(
            {"runtime": {"static_sandbox_resource_mgmt": True}, "hypervisor.qemu": {"default_maxvcpus": 2}}
        ),
        *("--cpus", "1"),
    )
    with ctr.detached(container_id, "sleep", "1000", options=options):
        assert len(vcpus_of(container_id)) == 2
        assert cgroups_of(vcpus_of(container_id).values()) == {f"/default/kata_{container_id}"}
        assert cgroups_of(others_of(container_id)) == {f"/kata_overhead/{container_id}"}
        ctr("tasks", "rm", "-f", container_id)
        assert not list(CGROUPS.glob(f"*/default/kata_{container_id}"))
        assert not list(CGROUPS.glob(f"*/kata_overhead/{container_id}"))


@pytest.fixture
def net(host_unchanged: None) -> Iterator[Namespace]:
    with bridge(), namespace() as made:
        made.add_eth0()
        yield made


@pytest.fixture
def pure_v2_ctr(
    tmp_path_factory: pytest.TempPathFactory, containerd: Containerd, template: Templates, net: Namespace
) -> Iterator[Ctr]:
    """It sees what was mounted before, as these are."""
    with ctr_of(PURE_V2, tmp_path_factory.mktemp("v2"), containerd) as ctr:
        yield ctr


@pytest.fixture
def disk(host_unchanged: None, tmp_path: Path) -> Iterator[str]:
    """A partition, whose number is not among the loop devices'."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "hello").write_text("from the disk\n")
    with loop(partitioned(tmp_path / "disk", 8)) as device, loop_partition(device) as partition:
        subprocess.run(["mkfs.ext4", "-q", "-d", root, partition], check=True)
        yield partition


def openable(cgroup: Path, *devices: str) -> set[str]:
    """Which of them a process in that cgroup of v2 can open, by the host's nodes."""
    script = """
        echo $$ >"$0/cgroup.procs" || exit 1
        for device; do if (: <$device); then echo $device; fi; done
    """
    found = subprocess.run(["sh", "-c", script, cgroup, *devices], capture_output=True, text=True, check=True)
    opened = set(found.stdout.split())
    assert found.stderr.count("Operation not permitted") == len(devices) - len(opened), found.stderr
    return opened


@pytest.mark.parametrize("only", [True, False])
def test_pods_on_a_host_of_cgroup_v2_alone(
    pure_v2_ctr: Ctr,
    container_id: str,
    template: Templates,
    only: bool,
    v2_root: Path,
    net: Namespace,
    disk: str,
) -> None:
    ctr, root = pure_v2_ctr, v2_root
    cgroup, overhead = f"/default/kata_{container_id}", f"/kata_overhead/{container_id}"
    template.configure({"runtime": {"sandbox_cgroup_only": only}})
    log = Log(ctr.containerd)
    with ctr.detached(
        container_id,
        "sleep",
        "1000",
        options=(*template.options, *net.options, *cri("sandbox", container_id)),
    ):
        (machine,) = processes_of(container_id, "qemu-system")
        # A thread is where its process is.
        assert cgroups_of(threads_of(machine), unified=True) == {cgroup}
        rest = set(others_of(container_id)) - set(threads_of(machine))
        assert cgroups_of(rest, unified=True) == {cgroup if only else overhead}
        assert (root / overhead[1:]).exists() is not only

        # What a machine that was broken out of could open: the shim, if it is there, has loop devices.
        ours = {"/dev/null", "/dev/urandom", "/dev/net/tun", *(["/dev/loop-control"] if only else [])}
        ours |= {device for device in ("/dev/kvm", "/dev/vhost-net") if Path(device).exists()}
        others = {"/dev/kmsg", "/dev/mem", "/dev/loop-control", disk, *map(str, Path("/dev").glob("vd?"))}
        all_of_them = sorted(device for device in ours | others if Path(device).exists())
        assert openable(root / cgroup[1:], *all_of_them) == ours

        # The pod's own disk is plugged in, and was opened for the machine.
        data = ("--mount", f"type=ext4,src={disk},dst=/data,options=rw", *cri("container", container_id))
        other = f"{container_id}-2"
        with ctr.detached(other, "sleep", "1000", options=(*template.options, *data)):
            assert ctr.exec(other, "cat", "/data/hello").stdout == b"from the disk\n"
            assert ctr.exec(other, "sh", "-c", "echo written >/data/hello; sync").returncode == 0
            assert openable(root / cgroup[1:], *all_of_them) == ours
        assert ctr.exec(container_id, "ping", "-c", "1", "-W", "60", HOST).returncode == 0
        assert log.warnings(container_id) + log.warnings(other) == []
        os.kill(machine, signal.SIGKILL)
        wait_for("the end", lambda: ctr.status(container_id) == "STOPPED")
        # The shim is in it to the end, and the cgroup above may not take processes.
        ctr("tasks", "rm", "-f", container_id)
        assert not (root / cgroup[1:]).exists()
        assert not (root / overhead[1:]).exists()
    assert read_image(Path(disk), "hello") == "written\n"


def test_pods_of_an_engine_that_is_in_a_container_itself(
    containerd: Containerd, container_id: str, config: Config, v2_root: Path, tmp_path: Path
) -> None:
    """Docker in Docker, kind: with cgroup v2 and a namespace of them."""
    container = v2_root / f"engine-{RUN}"
    container.mkdir()
    try:
        with ctr_of(IN_A_NAMESPACE.replace("CONTAINER", str(container)), tmp_path, containerd) as ctr:
            with ctr.detached(container_id, "sleep", "1000", options=config({})):
                (machine,) = processes_of(container_id, "qemu-system")
                pids = (container / f"default/kata_{container_id}/cgroup.procs").read_text().split()
                assert str(machine) in pids
                ctr("tasks", "rm", "-f", container_id)
                assert not list(container.glob(f"*/*{container_id}"))
            ctr.run(f"{container_id}-2", "true", options=config({}))
            assert {path.parent.name for path in container.glob("*/cgroup.procs")} == {
                *("engine", "default", "kata_overhead")
            }
    finally:
        remove_cgroups(container)
