"""Pods that fit: what containers ask for, and what their machine then is, through containerd."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cri import Crictl
from harness import MONITORED, TIMEOUT_S, Ctr, new_id, processes_of, qmp, wait_for
from private_containerd import RUNTIME, TEST_IMAGE, Settings, write_kata_config
from templates import Log, ReadyTemplates, Templates, qemu_arguments, templates
from test_ctr_pod import cri

from virtcontainers.config import SHARED_SANDBOXES

MIB = 1 << 20
SETTINGS: Settings = {
    "hypervisor.qemu": {"default_maxvcpus": 4, "default_maxmemory": 2048, "memory_slots": 3},
    # A busy host is slow at copying files in an emulated machine.
    "runtime": {"create_container_timeout": TIMEOUT_S - 20},
}
COPIED_MIB = 60
TMPFS = "size=20%"
"""Of a machine of the default size that is less, and leaves its guest enough to be quick."""
MOST_VCPUS = min(4, len(os.sched_getaffinity(0)))
"""default_maxvcpus is no more than the host has."""
SLEEP = ("sleep", "100000")


@pytest.fixture(scope="module")
def template(
    tmp_path_factory: pytest.TempPathFactory, ready_templates: ReadyTemplates
) -> Iterator[Templates]:
    with templates(tmp_path_factory.mktemp("resources"), SETTINGS) as made:
        made.put(ready_templates)
        yield made


@pytest.fixture(scope="module", autouse=True)
def _made(crictl: Crictl, template: Templates) -> None:
    """Before anybody looks at what a test leaves behind."""


@pytest.fixture(params=["direct", "template"])
def options(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, ...]:
    """Of `ctr run`: each way to a machine."""
    if request.param == "template":
        found: Templates = request.getfixturevalue("template")
        return found.options
    path = write_kata_config(tmp_path / "configuration.toml", SETTINGS)
    return ("--runtime-config-path", str(path))


def limits(mib: float = 0, cpus: float = 0) -> tuple[str, ...]:
    memory = ("--memory-limit", str(int(mib * MIB))) if mib else ()
    return (*memory, *(("--cpus", str(cpus)) if cpus else ()))


def start(ctr: Ctr, container_id: str, *options: str) -> None:
    ctr("run", "-d", "--runtime", RUNTIME, *options, TEST_IMAGE, container_id, *SLEEP)


def machine(ctr: Ctr, container_id: str) -> tuple[int, int]:
    """vCPUs and MiB, as its guest has them."""
    found = ctr.exec(container_id, "sh", "-c", "nproc; grep MemTotal /proc/meminfo")
    assert found.returncode == 0, found.stderr
    processors, meminfo = found.stdout.decode().splitlines()
    return int(processors), int(meminfo.split()[1]) >> 10


def shared_with(pod: str) -> list[str]:
    """The names in what the host shares with the pod's machine."""
    return sorted(path.name for path in (SHARED_SANDBOXES / pod).glob("*/*"))


def test_a_machine_grows_with_each_container(ctr: Ctr, container_id: str, options: tuple[str, ...]) -> None:
    joins = cri("container", container_id)
    with ctr.detached(container_id, *SLEEP, options=(*options, *cri("sandbox", container_id))):
        vcpus, mib = machine(ctr, container_id)
        assert vcpus == 1
        assert 150 < mib <= 256
        expected = [
            # Over the default: all that it asks for.
            (limits(512, 0.3), (2, 512)),
            # A byte over a page is no page more, and so no block; parts of CPUs are added and then rounded.
            (limits(128 + 1 / MIB, 0.3), (2, 640)),
            (limits(0, 0.4), (2, 640)),
            # No limit asks for nothing.
            ((), (2, 640)),
            # There is room for 64 MiB more in the next block.
            (limits(64), (2, 768)),
            (limits(64, 2), (MOST_VCPUS, 768)),
        ]
        started = []
        try:
            for asked, (now_vcpus, more_mib) in expected:
                started.append(new_id("grows"))
                start(ctr, started[-1], *joins, *asked)
                assert machine(ctr, container_id) == (now_vcpus, mib + more_mib), asked
            assert machine(ctr, started[0]) == machine(ctr, container_id), "every container sees all of it"
        finally:
            for each in started:
                ctr.remove(each)


def test_memory_is_there_before_the_container_is_created(
    ctr: Ctr, container_id: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    """A tmpfs that begins with a copy of what it covers is filled while the container is created."""
    (tmp_path / "data").mkdir()
    with (tmp_path / "data/file").open("wb") as file:
        for _ in range(COPIED_MIB):
            file.write(b"\xa5" * MIB)
    filled = (
        *("--mount", f"type=bind,src={tmp_path / 'data'},dst=/data,options=rbind:ro"),
        *("--mount", f"type=tmpfs,src=tmpfs,dst=/data,options=tmpcopyup:{TMPFS}"),
    )
    joins = cri("container", container_id)
    with ctr.detached(container_id, *SLEEP, options=(*options, *cri("sandbox", container_id))):
        before = machine(ctr, container_id)
        small = ctr.run(f"{container_id}-small", "true", options=(*joins, *filled))
        assert small.returncode != 0
        assert b"No space left on device" in small.stderr, "it is the creation that needs the memory"
        assert machine(ctr, container_id) == before
        look = ("sh", "-c", "ls -l /data/file; mount | grep ' /data '")
        large = ctr.run(f"{container_id}-large", *look, options=(*joins, *filled, *limits(512)))
        assert large.returncode == 0, large.stderr
        assert str(COPIED_MIB * MIB) in large.stdout.decode()
        assert "tmpfs on /data" in large.stdout.decode()


def test_what_is_refused_leaves_the_pod_as_it_was(
    ctr: Ctr, container_id: str, options: tuple[str, ...]
) -> None:
    joins = cri("container", container_id)
    log = Log(ctr.containerd)
    with ctr.detached(container_id, *SLEEP, options=(*options, *cri("sandbox", container_id))):
        before, shared = machine(ctr, container_id), shared_with(container_id)

        def refused(*asked: str) -> str:
            had = machine(ctr, container_id)
            result = ctr.run(f"{container_id}-no", "true", options=(*joins, *asked))
            assert result.returncode != 0
            assert machine(ctr, container_id) == had
            assert shared_with(container_id) == shared
            assert ctr.status(f"{container_id}-no") is None
            # And the same again, only smaller, runs.
            assert ctr.run(f"{container_id}-no", "echo", "yes", options=joins).stdout == b"yes\n"
            return result.stderr.decode()

        said = refused(*limits(4096, 1))
        assert (
            "4096 MiB more are above the 2048 MiB it may have (default_maxmemory in [hypervisor.qemu])"
            in said
        )
        assert said.count("the machine has 256 MiB") == 1
        # One after another, their sum: 3 slots.
        assert machine(ctr, container_id) == before
        started = [f"{container_id}-{number}" for number in range(3)]
        try:
            for each in started:
                start(ctr, each, *joins, *limits(128))
            shared = shared_with(container_id)
            said = refused(*limits(128))
            assert "3 of 3 memory slots are used" in said
            assert "memory_slots in [hypervisor.qemu]" in said
            # What one leaves behind is room for another.
            ctr.remove(started.pop())
            again = ctr.run(f"{container_id}-again", "echo", "fits", options=(*joins, *limits(128)))
            assert again.stdout == b"fits\n", again.stderr
        finally:
            for each in started:
                ctr.remove(each)
        # vCPUs are no refusal: there are as many as there may be.
        many = ctr.run(f"{container_id}-many", "nproc", options=(*joins, *limits(0, 9)))
        assert many.stdout == f"{MOST_VCPUS}\n".encode(), many.stderr
        wait_for(
            "the warning",
            lambda: any("default_maxvcpus" in warning for warning in log.warnings(container_id)),
        )


def test_a_machine_of_a_fixed_size_is_as_large_as_its_pod_was_said_to_be(
    ctr: Ctr, container_id: str, template: Templates, tmp_path: Path
) -> None:
    """Booted and cloned: the size is the pod's annotations', whatever its containers ask for then."""
    said = {"cpu-period": "100000", "cpu-quota": "50000", "memory": str(512 * MIB)}
    annotations = [f"io.kubernetes.cri.sandbox-{key}={value}" for key, value in said.items()]
    ways: dict[str, Settings] = {"booted": {}, "cloned": {"factory": template.settings["factory"]}}
    for name, more in ways.items():
        pod = f"{container_id}-{name}"
        fixed: dict[str, Any] = {**SETTINGS, "runtime": {"static_sandbox_resource_mgmt": True}, **more}
        path = write_kata_config(tmp_path / f"{name}.toml", fixed)
        options = (
            *("--runtime-config-path", str(path)),
            *cri("sandbox", pod),
            *(word for each in annotations for word in ("--annotation", each)),
        )
        with ctr.detached(pod, *SLEEP, options=options):
            (qemu,) = processes_of(pod, "qemu-system")
            assert ("-incoming" in qemu_arguments(qemu)) is (name == "cloned")
            vcpus, mib = machine(ctr, pod)
            assert vcpus == 2, name
            assert 150 + 512 < mib <= 256 + 512, name
            joins = (*cri("container", pod), *limits(1024, 1))
            shown = ctr.run(f"{pod}-more", "sh", "-c", "nproc; grep MemTotal /proc/meminfo", options=joins)
            assert shown.stdout.split()[0] == b"2", shown.stderr
            assert int(shown.stdout.split()[2]) >> 10 == mib, name


def test_a_machine_that_dies_while_it_grows_is_an_error(
    ctr: Ctr, container_id: str, template: Templates
) -> None:
    with ctr.detached(container_id, *SLEEP, options=(*template.options, *cri("sandbox", container_id))):
        shared = shared_with(container_id)
        (qemu,) = processes_of(container_id, "qemu-system")
        command = ctr.run_command(
            f"{container_id}-late", *SLEEP, options=(*cri("container", container_id), *limits(1024))
        )
        os.kill(qemu, signal.SIGSTOP)
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as growing:
            try:
                assert growing.stderr
                # QEMU is asked next, or has been.
                wait_for("the container's share", lambda: shared_with(container_id) != shared)
                os.kill(qemu, signal.SIGKILL)
                assert growing.wait(TIMEOUT_S) != 0
                assert b"SIGKILL" in growing.stderr.read()
            finally:
                growing.kill()
        ctr.remove(f"{container_id}-late")
        wait_for("the pod's end", lambda: ctr.status(container_id) == "STOPPED")


def test_what_qemu_refuses_is_told_and_the_pod_goes_on(ctr: Ctr, container_id: str, tmp_path: Path) -> None:
    monitored: Settings = {"hypervisor.qemu": {**SETTINGS["hypervisor.qemu"], **MONITORED}}
    path = write_kata_config(tmp_path / "configuration.toml", monitored)
    options = ("--runtime-config-path", str(path), *cri("sandbox", container_id))
    late, joins = f"{container_id}-late", cri("container", container_id)
    with ctr.detached(container_id, *SLEEP, options=options):
        before, shared = machine(ctr, container_id), shared_with(container_id)
        qmp(container_id, "device_add", driver="virtio-rng-pci", id="dimm0", bus="rp3", rng="rng0")
        refusal = re.compile(rb"dimm0, of 512 MiB: QMP device_add: .*dimm0")
        refused = ctr.run(late, *SLEEP, options=(*joins, *limits(512, 1)))
        assert refused.returncode != 0
        assert refusal.search(refused.stderr)
        assert (machine(ctr, container_id), shared_with(container_id)) == (before, shared)

        def starts() -> bool:
            result = ctr.run(f"{late}-er", "true", options=(*joins, *limits(512, 1)))
            # Else that name is the memory's.
            if refusal.search(result.stderr):
                # Again: a guest that was just looking at the slot may have missed it. Or it is about to go.
                with contextlib.suppress(AssertionError):
                    qmp(container_id, "device_del", id="dimm0")
            return result.returncode == 0

        wait_for("the guest to let go of it", starts)
        assert machine(ctr, container_id) == (before[0] + 1, before[1] + 512)


def test_a_guest_that_panics_while_it_grows_is_an_error(crictl: Crictl) -> None:
    """With its agent, which is the first process: a privileged container does it at the first new block."""
    # It has counted before it says so, and forks nothing: what it looks for is there while the pod grows.
    blocks = "set -- /sys/devices/system/memory/memory*"
    looks = f"{blocks}; n=$#; echo looks; while [ $# = $n ]; do {blocks}; done"
    script = f"{looks}; echo c >/proc/sysrq-trigger"
    privileged = {"security_context": {"privileged": True}}
    with crictl.pod("panics", linux=privileged) as pod:
        container = pod.start("watches", "sh", "-c", script, linux=privileged)
        wait_for("it to have counted", lambda: "looks" in crictl("logs", container).stdout)
        late = pod.create("late", *SLEEP, linux={"resources": {"memory_limit_in_bytes": 1024 * MIB}})
        refused = crictl("start", late, check=False)
        assert refused.returncode != 0
        # The end of its console; the reason is above a long trace.
        assert "Rebooting in 1 seconds" in refused.stderr
        assert pod.wait_exited(container)["exitCode"] == 137
        assert not processes_of(pod.id, "qemu-system")


def test_an_update_down_gives_memory_back_where_it_can(crictl: Crictl) -> None:
    annotations = {"io.katacontainers.config.hypervisor.enable_virtio_mem": "true"}
    with crictl.pod("shrinks", annotations=annotations) as pod:

        def container_and_machine() -> tuple[int, int]:
            """MiB of the container's limit and of the machine."""
            script = "cat /sys/fs/cgroup/memory.max; grep MemTotal /proc/meminfo"
            found = pod.exec(container, "sh", "-c", script).stdout.split()
            return int(found[0]) // MIB, int(found[2]) >> 10

        container = pod.start("limited", *SLEEP, linux={"resources": {"memory_limit_in_bytes": 512 * MIB}})
        limit, grown = container_and_machine()
        assert limit == 512
        refused = crictl("update", "--memory", str(1 << 45), container, check=False)
        assert refused.returncode != 0
        assert "default_maxmemory" in refused.stderr
        assert container_and_machine() == (limit, grown), "who is refused keeps what there was"
        crictl("update", "--memory", str(640 * MIB), container)
        assert container_and_machine() == (640, grown + 128)
        crictl("update", "--memory", str(128 * MIB), container)
        assert container_and_machine()[0] == 128
        # A guest that is slow goes on with it.
        wait_for("the machine to shrink", lambda: container_and_machine()[1] < grown)
