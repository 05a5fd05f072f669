"""`ctr run` with enable_template: where pods' machines come from, and that only the clock can tell."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import TIMEOUT_S, Ctr, new_id, processes_of, wait_for
from templates import Log, ReadyTemplates, Templates, qemu_arguments, templates
from test_ctr_pod import cri

from virtcontainers.config import HypervisorConfig
from virtcontainers.factory.template import _FAILURE_KEPT_S

SHARED_FS = ("virtio-9p", "virtio-fs")
UUID = ("cat", "/proc/sys/kernel/random/uuid")
ANNOTATION = "io.katacontainers.config.hypervisor"


def settings(shared_fs: str = "virtio-9p") -> dict[str, dict[str, object]]:
    return {"hypervisor.qemu": {"shared_fs": shared_fs, "enable_annotations": [".*"]}}


@pytest.fixture(scope="module", params=SHARED_FS)
def template(
    request: pytest.FixtureRequest,
    ctr: Ctr,
    tmp_path_factory: pytest.TempPathFactory,
    ready_templates: ReadyTemplates,
) -> Iterator[Templates]:
    """One that is there, for each kind of share."""
    with templates(tmp_path_factory.mktemp("t"), settings(request.param)) as found:
        found.put(ready_templates)
        yield found


only_9p = pytest.mark.parametrize("template", SHARED_FS[:1], indirect=True, scope="module")
"""Where the share makes no difference."""

only_virtio_fs = pytest.mark.parametrize("template", SHARED_FS[1:], indirect=True, scope="module")
"""Where it is enough that the more costly share does it: each clone has a copy of the memory."""


@pytest.fixture
def victim(ctr: Ctr, tmp_path: Path, ready_templates: ReadyTemplates) -> Iterator[Templates]:
    """One that is there, and the test's own."""
    with templates(tmp_path, settings()) as found:
        found.put(ready_templates)
        yield found


@pytest.fixture
def no_template(ctr: Ctr, tmp_path: Path) -> Iterator[Templates]:
    with templates(tmp_path, settings()) as found:
        yield found


@pytest.fixture
def log(ctr: Ctr) -> Log:
    return Log(ctr.containerd)


@pytest.fixture
def unchanged(template: Templates, log: Log) -> Iterator[None]:
    """What the test does is no reason for another template."""
    earlier = template.current
    assert earlier
    yield
    assert template.current == earlier
    assert log.count("a new template is made") == 0


def is_clone(container_id: str) -> bool:
    (machine,) = processes_of(container_id, "qemu-system")
    return "-incoming" in qemu_arguments(machine)


def bind(directory: Path) -> tuple[str, ...]:
    return ("--mount", f"type=bind,src={directory},dst=/data,options=rbind:rw")


def test_the_first_pod_makes_the_template_and_the_next_is_a_clone(
    ctr: Ctr, container_id: str, no_template: Templates, log: Log
) -> None:
    result = ctr.run(container_id, "echo", "first", options=no_template.options)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"first\n", b"")
    made = no_template.current
    assert made
    wait_for("the log", lambda: log.count(f"the template in {no_template.path} is ready"))
    (warning,) = log.of_the_factory()
    assert warning.startswith("a new template is made: there is no template in")
    log = Log(ctr.containerd)
    with ctr.detached(f"{container_id}-next", "sleep", "1000", options=no_template.options):
        (machine,) = processes_of(f"{container_id}-next", "qemu-system")
        arguments = qemu_arguments(machine)
    assert arguments[arguments.index("-incoming") + 1] == "defer"
    (memory,) = (each for each in arguments if each.startswith("memory-backend-file,"))
    assert f"mem-path={no_template.path}/builds/{made}/memory,share=off" in memory
    assert no_template.current == made
    wait_for("the log", lambda: log.count("the machine is from Template, after "))
    assert log.of_the_factory() == []
    assert log.count("is ready") == 0


@only_9p
def test_files_of_a_template_are_roots_alone(template: Templates) -> None:
    build = template.path / "builds" / template.current
    assert {each.name for each in build.iterdir()} == {"memory", "state", "template.json"}
    assert {each.stat().st_mode & 0o777 for each in build.iterdir()} == {0o600}
    assert {each.stat().st_mode & 0o777 for each in (template.path, build.parent, build)} == {0o700}


def test_a_clone_has_streams_and_an_exit_status(
    ctr: Ctr, container_id: str, template: Templates, unchanged: None
) -> None:
    script = "cat; echo to stderr >&2; exit 7"
    data = os.urandom(1 << 20)
    result = ctr.run(container_id, "sh", "-c", script, options=template.options, input=data)
    assert (result.returncode, result.stderr) == (7, b"to stderr\n")
    assert result.stdout == data
    result = ctr.run(f"{container_id}-none", "no-such-binary", options=template.options)
    assert result.returncode == 127
    assert b"no-such-binary" in result.stderr


def test_a_clone_shares_files_both_ways(
    ctr: Ctr, container_id: str, template: Templates, tmp_path: Path, unchanged: None
) -> None:
    (tmp_path / "from-host").write_text("host's\n")
    script = (
        "cat /data/from-host; echo guest\\'s > /data/from-guest; mkdir /data/d; echo root\\'s > /from-guest"
    )
    root = ctr.containerd.run / "state/io.containerd.runtime.v2.task/default" / container_id / "rootfs"
    with ctr.detached(container_id, "sleep", "1000", options=(*template.options, *bind(tmp_path))):
        assert is_clone(container_id)
        assert ctr.exec(container_id, "sh", "-c", script).stdout == b"host's\n"
        assert (tmp_path / "from-guest").read_text() == "guest's\n"
        assert (tmp_path / "d").is_dir()
        assert (root / "from-guest").read_text() == "root's\n"
        (root / "from-host").write_text("into the root\n")
        assert ctr.exec(container_id, "cat", "/from-host").stdout == b"into the root\n"
        (tmp_path / "from-host").write_text("changed\n")
        assert ctr.exec(container_id, "cat", "/data/from-host").stdout == b"changed\n"
        mounts = ctr.exec(container_id, "grep", " / ", "/proc/mounts").stdout.decode()
    shared_fs = template.settings["hypervisor.qemu"]["shared_fs"]
    assert mounts.split()[2] == {"virtio-9p": "9p", "virtio-fs": "virtiofs"}[shared_fs]


def test_a_clone_is_handled_as_any_container(
    ctr: Ctr, container_id: str, template: Templates, tmp_path: Path, unchanged: None
) -> None:
    script = "trap 'exit 3' TERM; i=0; while :; do i=$((i+1)); echo $i > /data/count; sleep 0.1; done"
    with ctr.detached(container_id, "sh", "-c", script, options=(*template.options, *bind(tmp_path))):
        count = tmp_path / "count"
        wait_for("counting", count.exists)
        result = ctr.exec(container_id, "sh", "-c", "cat; exit 9", input=b"through\n")
        assert (result.returncode, result.stdout) == (9, b"through\n")
        ctr("tasks", "pause", container_id)
        assert ctr.status(container_id) == "PAUSED"
        first, second = count.read_text(), subprocess.run(["sleep", "0.5"]) and count.read_text()
        assert first == second
        ctr("tasks", "resume", container_id)
        wait_for("counting again", lambda: count.read_text() not in ("", second))
        assert "pids.current" in ctr("tasks", "metrics", container_id).stdout
        ctr("tasks", "kill", "-s", "SIGTERM", container_id)
        wait_for("the end", lambda: ctr.status(container_id) == "STOPPED")
        assert "exit code 3" in ctr("tasks", "rm", container_id).stderr


def test_a_clone_is_removed_by_force(ctr: Ctr, container_id: str, template: Templates) -> None:
    with ctr.detached(container_id, "sleep", "1000", options=template.options):
        ctr("tasks", "rm", "-f", container_id)
        assert ctr.status(container_id) is None
        assert not processes_of(container_id, "qemu-system")


def test_containers_of_a_pod_share_a_clone(ctr: Ctr, container_id: str, template: Templates) -> None:
    boot_id = ("cat", "/proc/sys/kernel/random/boot_id")
    options = (*template.options, *cri("sandbox", container_id))
    with ctr.detached(container_id, "sleep", "1000", options=options):
        assert is_clone(container_id)
        machine = ctr.exec(container_id, *boot_id).stdout
        joins = (*template.options, *cri("container", container_id))
        one = ctr.run(f"{container_id}-one", *boot_id, options=joins)
        assert (one.returncode, one.stdout, one.stderr) == (0, machine, b"")
        with ctr.detached(f"{container_id}-two", "sleep", "1000", options=joins):
            assert len(processes_of(container_id, "qemu-system")) == 1
        assert ctr.run(f"{container_id}-three", "sh", "-c", "exit 3", options=joins).returncode == 3
        assert ctr.exec(container_id, *boot_id).stdout == machine


PROGRAMS = {"shim": "containerd-shim-kata-py-v2", "QEMU": "qemu-system", "virtiofsd": "virtiofsd"}


@pytest.mark.parametrize("victim", PROGRAMS)
def test_a_clone_that_is_killed_leaves_the_template(
    ctr: Ctr, container_id: str, template: Templates, unchanged: None, tmp_path: Path, victim: str
) -> None:
    # What a clone leaves behind is what `host_unchanged` looks for; ctr's fifos are not the shim's.
    options = (*template.options, "--fifo-dir", str(tmp_path / "fifo"))
    with ctr.detached(container_id, "sleep", "1000", options=options):
        victims = processes_of(container_id, PROGRAMS[victim])
        if victim == "virtiofsd" and template.settings["hypervisor.qemu"]["shared_fs"] == "virtio-9p":
            assert victims == []
            return
        assert victims
        for pid in victims:
            # virtiofsd is two: one may end with the other.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_for("no running task", lambda: ctr.status(container_id) in (None, "STOPPED"))
    with ctr.detached(f"{container_id}-next", "sleep", "1000", options=template.options):
        assert is_clone(f"{container_id}-next")


@only_9p
def test_a_clone_that_is_killed_before_its_agent_answers_leaves_the_template(
    ctr: Ctr, container_id: str, template: Templates, unchanged: None
) -> None:
    def killed_in_time() -> bool:
        log = Log(ctr.containerd)
        clones: list[int] = []

        def clones_or_end() -> bool:
            clones.extend(processes_of(container_id, "qemu-system"))
            return bool(clones) or running.poll() is not None

        with subprocess.Popen(
            ctr.run_command(container_id, "echo", "works", options=("--rm", *template.options)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        ) as running:
            wait_for("the clone", clones_or_end)
            for pid in clones:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            output, _ = running.communicate(timeout=TIMEOUT_S)
        if not clones:
            return False
        wait_for("the log", lambda: log.count("the machine is from Template, ") or log.of_the_factory())
        if log.count("the machine is from Template, "):
            return False
        # It is booted then.
        assert output == b"works\n"
        (warning,) = log.of_the_factory()
        assert warning.startswith("no machine from Template: ")
        return True

    wait_for("a kill that the agent is not faster than", killed_in_time)
    with ctr.detached(f"{container_id}-next", "sleep", "1000", options=template.options):
        assert is_clone(f"{container_id}-next")


def run_many(ctr: Ctr, container_id: str, options: tuple[str, ...], number: int) -> None:
    """So many `ctr run` at once, of which each must do what one alone does, and know a uuid of its own."""
    with concurrent.futures.ThreadPoolExecutor(number) as pool:
        results = list(
            pool.map(lambda n: ctr.run(f"{container_id}-{n}", *UUID, options=options), range(number))
        )
    assert [(result.returncode, result.stderr) for result in results] == [(0, b"")] * number
    assert len({result.stdout for result in results}) == number


@only_virtio_fs
def test_ten_pods_at_once_are_clones(
    ctr: Ctr, container_id: str, template: Templates, unchanged: None, log: Log
) -> None:
    run_many(ctr, container_id, template.options, 10)
    assert log.of_the_factory() == []


def test_twenty_pods_at_once_make_one_template(
    ctr: Ctr, container_id: str, no_template: Templates, log: Log
) -> None:
    run_many(ctr, container_id, no_template.options, 20)
    assert wait_for("the log", lambda: log.count(f"the template in {no_template.path} is ready")) == 1
    assert len(list((no_template.path / "builds").iterdir())) == 1
    told = log.of_the_factory()
    assert [each for each in told if not each.startswith("a new template is made: there is no")] == []


def test_a_pod_of_another_machine_is_booted_and_the_template_stays(
    ctr: Ctr, container_id: str, template: Templates, unchanged: None, log: Log
) -> None:
    options = (*template.options, "--annotation", f"{ANNOTATION}.kernel_params=kata.test=1")
    with ctr.detached(container_id, "sleep", "1000", options=options):
        assert not is_clone(container_id)
        assert b"kata.test=1" in ctr.exec(container_id, "cat", "/proc/cmdline").stdout
    (warning,) = wait_for("the log", log.of_the_factory)
    assert "booted" in warning
    assert "kernel_params" in warning
    assert "kata.test=1" in warning


def test_a_pod_of_a_bigger_machine_is_a_clone_that_grows(
    ctr: Ctr, container_id: str, template: Templates, unchanged: None, log: Log
) -> None:
    options = (
        *template.options,
        *(
            "--annotation",
            f"{ANNOTATION}.default_vcpus=2",
            "--annotation",
            f"{ANNOTATION}.default_memory=512",
        ),
    )

    def memory_mib(container_id: str) -> int:
        found = ctr.exec(container_id, "awk", "/MemTotal/ {print $2}", "/proc/meminfo").stdout
        return int(found) >> 10

    small = new_id("small")
    with (
        ctr.detached(container_id, "sleep", "1000", options=options),
        ctr.detached(small, "sleep", "1000", options=template.options),
    ):
        assert is_clone(container_id)
        assert ctr.exec(container_id, "nproc").stdout == b"2\n"
        assert ctr.exec(small, "nproc").stdout == b"1\n"
        assert 250 <= memory_mib(container_id) - memory_mib(small) <= 256
    assert log.of_the_factory() == []


def test_a_template_of_another_size_is_made_anew_and_says_why(
    ctr: Ctr, container_id: str, victim: Templates, log: Log
) -> None:
    earlier = victim.current
    victim.configure({"hypervisor.qemu": {"default_memory": 320}})
    with ctr.detached(container_id, "sleep", "1000", options=victim.options):
        assert is_clone(container_id)
        assert victim.current != earlier
        assert [each.name for each in (victim.path / "builds").iterdir()] == [victim.current]
    (warning,) = wait_for("the log", log.of_the_factory)
    assert "memory: found 256M" in warning
    assert "expected 320M" in warning


def test_a_truncated_template_is_made_anew_and_says_why(
    ctr: Ctr, container_id: str, victim: Templates, log: Log
) -> None:
    earlier = victim.current
    path = victim.path / "builds" / earlier / "state"
    os.truncate(path, path.stat().st_size // 2)
    with ctr.detached(container_id, "sleep", "1000", options=victim.options):
        assert is_clone(container_id)
    assert victim.current not in ("", earlier)
    (warning,) = wait_for("the log", log.of_the_factory)
    assert warning.startswith(f"a new template is made: {path}: found ")


def qemu_that_stands_still_once(directory: Path) -> Path:
    """QEMU, but for the first machine of all, in which nothing ever runs."""
    path = directory / "qemu"
    qemu = HypervisorConfig.path
    path.write_text(
        f'#!/bin/sh\nmkdir {directory}/first 2>/dev/null && exec {qemu} -S "$@"\nexec {qemu} "$@"\n'
    )
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("victim", ["shim", "QEMU", "ctr"])
def test_a_pod_that_is_killed_while_it_makes_the_template_is_no_obstacle(
    ctr: Ctr, container_id: str, no_template: Templates, tmp_path: Path, log: Log, victim: str
) -> None:
    no_template.configure({"hypervisor.qemu": {"path": str(qemu_that_stands_still_once(tmp_path))}})
    # ctr's fifos are not the shim's.
    options = (*no_template.options, "--fifo-dir", str(tmp_path / "fifo"))
    command = ctr.run_command(container_id, "true", options=("--rm", *options))
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as running:
        (builder,) = wait_for("the boot", lambda: processes_of(str(no_template.path), "qemu-system"))
        arguments = qemu_arguments(builder)
        directory = Path(arguments[arguments.index("-pidfile") + 1]).parent
        assert directory.exists()
        victims = {
            "shim": processes_of(container_id, PROGRAMS["shim"]),
            "QEMU": [builder],
            "ctr": [running.pid],
        }
        killed_at = time.monotonic()
        for pid in victims[victim]:
            os.kill(pid, signal.SIGKILL)
        _, error = running.communicate(timeout=TIMEOUT_S)
    ctr.remove(container_id)
    # A pod needs no template, and has none when it is made of a machine that died. The other two are no pods.
    assert running.returncode == {"shim": 1, "QEMU": 0, "ctr": -signal.SIGKILL}[victim], error
    result = ctr.run(f"{container_id}-next", "echo", "next", options=no_template.options)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"next\n", b"")
    if victim == "QEMU":
        # Later it would have been tried again.
        if time.monotonic() < killed_at + _FAILURE_KEPT_S:
            tried = "no template can be made, the machine is booted: tried "
            assert wait_for("the log", lambda: log.count(tried)) == 1
        assert no_template.factory("init").returncode == 0
    assert no_template.current
    assert [each.name for each in (no_template.path / "builds").iterdir()] == [no_template.current]
    assert not directory.exists()


# -- templates that cannot be made


@pytest.fixture
def hopeless(no_template: Templates) -> Iterator[Templates]:
    """Its path is a folder of somebody's files."""
    no_template.path.mkdir()
    (no_template.path / "precious").write_text("content")
    yield no_template
    assert (no_template.path / "precious").read_text() == "content"
    (no_template.path / "precious").unlink()


def test_a_template_that_cannot_be_made_costs_no_pod(
    ctr: Ctr, container_id: str, hopeless: Templates, log: Log
) -> None:
    with ctr.detached(container_id, "sleep", "1000", options=hopeless.options):
        assert not is_clone(container_id)
        assert ctr.exec(container_id, "echo", "works").stdout == b"works\n"
    no_template = "no template can be made, the machine is booted"
    wait_for("the log", lambda: log.count(no_template))
    (warning,) = (each for each in log.warnings() if no_template in each)
    assert f"{hopeless.path} is a folder with files in it" in warning


def test_a_guest_that_never_answers_costs_one_timeout_and_is_named(
    ctr: Ctr, container_id: str, no_template: Templates, tmp_path: Path, log: Log
) -> None:
    initrd = tmp_path / "nonsense.img"
    initrd.write_text("nonsense\n" * 100)
    no_template.configure({"hypervisor.qemu": {"initrd": str(initrd)}})
    result = ctr.run(container_id, "true", options=no_template.options)
    assert result.returncode != 0
    assert b"Kernel panic" in result.stderr
    assert b"Traceback" not in result.stderr
    assert no_template.current == ""
    assert wait_for("the log", lambda: log.count("no template can be made, the machine is booted")) == 1


def test_an_image_is_refused_with_enable_template(
    ctr: Ctr, container_id: str, no_template: Templates
) -> None:
    text = no_template.configuration.read_text().replace("initrd = ", "image = ")
    no_template.configuration.write_text(text)
    result = ctr.run(container_id, "true", options=no_template.options)
    assert result.returncode != 0
    error = result.stderr.decode()
    assert str(no_template.configuration.resolve()) in error
    assert "enable_template" in error
    assert "initrd= to be set (image= is not supported)" in error
    init = no_template.factory("init")
    assert init.returncode == 1
    assert "initrd= to be set (image= is not supported)" in init.stderr
