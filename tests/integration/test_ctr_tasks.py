"""A container in the background, handled with `ctr tasks`: the same life with every containerd."""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import Ctr, new_id, processes_of, wait_for


@dataclass
class Running:
    """One container that many tests look at."""

    ctr: Ctr
    id: str
    shared: Path

    def exec(self, *command: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[bytes]:
        return self.ctr.exec(self.id, *command, options=options)

    def output(self, *command: str, options: tuple[str, ...] = ()) -> str:
        result = self.exec(*command, options=options)
        assert result.returncode == 0, result.stderr
        return result.stdout.decode()


@pytest.fixture(scope="module")
def running(every_ctr: Ctr, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("running")
    shared = directory / "shared"
    shared.mkdir()
    container_id = new_id("running")
    options = (
        *("--env", "GREETING=hello world", "--cwd", "/usr/bin", "--read-only", "--label", "purpose=test"),
        *("--mount", f"type=bind,src={shared},dst=/data,options=rbind:rw"),
    )
    script = "trap 'echo stopping > /data/end; exit 3' TERM; while :; do sleep 0.1; done"
    with every_ctr.detached(container_id, "sh", "-c", script, options=options):
        yield Running(every_ctr, container_id, shared)


def test_tasks_ls_shows_it_running(running: Running) -> None:
    assert running.ctr.status(running.id) == "RUNNING"
    assert running.ctr.host_pid(running.id) > 1


def test_environment_of_the_container(running: Running) -> None:
    assert "GREETING=hello world" in running.output("cat", "/proc/1/environ").split("\0")


def test_working_directory_of_the_container_and_of_an_exec(running: Running) -> None:
    assert running.output("readlink", "/proc/1/cwd") == "/usr/bin\n"
    assert running.output("pwd") == "/usr/bin\n"
    assert running.output("pwd", options=("--cwd", "/tmp")) == "/tmp\n"


def test_read_only_root(running: Running) -> None:
    result = running.exec("touch", "/forbidden")
    assert result.returncode != 0
    assert b"Read-only file system" in result.stderr


def test_bind_mount_in_both_directions(running: Running) -> None:
    (running.shared / "from-host").write_text("one")
    assert running.output("cat", "/data/from-host") == "one"
    (running.shared / "from-host").write_text("another")
    assert running.output("cat", "/data/from-host") == "another"
    running.output("sh", "-c", "echo two > /data/from-guest; mkdir /data/dir; ln -s x /data/link")
    assert (running.shared / "from-guest").read_text() == "two\n"
    assert (running.shared / "dir").is_dir()
    assert (running.shared / "link").readlink() == Path("x")


@pytest.mark.parametrize(("user", "expected"), [("1000", "1000"), ("1000:33", "1000"), ("nobody", "65534")])
def test_exec_as_a_user(running: Running, user: str, expected: str) -> None:
    assert running.output("id", "-u", options=("--user", user)).strip() == expected


def test_exec_has_streams_and_an_exit_status_of_its_own(running: Running) -> None:
    result = running.ctr.exec(running.id, "sh", "-c", "cat; echo no >&2; exit 9", input=b"through\n")
    assert (result.returncode, result.stdout, result.stderr) == (9, b"through\n", b"no\n")


def test_exec_of_a_missing_binary_says_so(running: Running) -> None:
    result = running.exec("no-such-binary")
    assert result.returncode != 0
    assert b"no-such-binary" in result.stderr


def test_many_execs_at_once(running: Running) -> None:
    command = running.ctr.containerd.ctr_command("tasks", "exec", "--exec-id")
    execs = [
        subprocess.Popen(
            [*command, new_id("exec"), running.id, "sh", "-c", f"sleep 0.2; echo {number}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        for number in range(8)
    ]
    assert [process.communicate()[0] for process in execs] == [b"%d\n" % number for number in range(8)]


def test_an_exec_can_be_killed_alone(running: Running) -> None:
    exec_id = new_id("exec")
    command = running.ctr.containerd.ctr_command("tasks", "exec", "--exec-id", exec_id, running.id)
    script = "echo ready; exec sleep 1000"
    with subprocess.Popen(
        [*command, "sh", "-c", script], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stdout.readline() == b"ready\n"
        running.ctr("tasks", "kill", "-s", "SIGKILL", "--exec-id", exec_id, running.id)
        assert process.wait() == 137
    assert running.ctr.status(running.id) == "RUNNING"


def test_tasks_ps_shows_the_machine(running: Running) -> None:
    shown = [int(line.split()[0]) for line in running.ctr("tasks", "ps", running.id).stdout.splitlines()[1:]]
    assert shown
    assert set(shown) <= {running.ctr.host_pid(running.id), *processes_of(running.id, "qemu-system")}


def test_pause_stops_the_container_and_resume_lets_it_go_on(running: Running) -> None:
    script = "i=0; while [ -e /data/counting ]; do i=$((i+1)); echo $i > /data/count; done"
    (running.shared / "counting").touch()
    running.output("sh", "-c", f"({script}) > /dev/null 2>&1 &")

    def count() -> str:
        return (running.shared / "count").read_text()

    try:
        wait_for("counting", (running.shared / "count").exists)
        running.ctr("tasks", "pause", running.id)
        assert running.ctr.status(running.id) == "PAUSED"
        first, second = count(), subprocess.run(["sleep", "0.5"]) and count()
        assert first == second
        running.ctr("tasks", "resume", running.id)
        assert running.ctr.status(running.id) == "RUNNING"
        wait_for("counting again", lambda: count() != second)
    finally:
        (running.shared / "counting").unlink()


def test_metrics_are_those_of_the_container(running: Running) -> None:
    shown = running.ctr("tasks", "metrics", running.id).stdout
    values = dict(re.findall(r"^(\S+)\s+(\d+)\s*$", shown, re.MULTILINE))
    memory = int(values.get("memory.usage_in_bytes") or values["memory.usage"])
    assert 0 < memory < 256 << 20
    assert int(values["pids.current"]) >= 1
    assert int(values.get("cpuacct.usage") or values["cpu.usage_usec"]) > 0


def test_a_whole_life_is_published_in_order(every_ctr: Ctr, container_id: str, tmp_path: Path) -> None:
    script = "trap 'echo stopping > /data/end; exit 3' TERM; touch /data/ready; while :; do sleep 0.1; done"
    options = ("--mount", f"type=bind,src={tmp_path},dst=/data,options=rbind:rw")
    with every_ctr.events(tmp_path) as events:
        with every_ctr.detached(container_id, "sh", "-c", script, options=options):
            assert every_ctr.exec(container_id, "true").returncode == 0
            every_ctr("tasks", "pause", container_id)
            every_ctr("tasks", "resume", container_id)
            wait_for("the trap", (tmp_path / "ready").exists)
            every_ctr("tasks", "kill", "-s", "SIGTERM", container_id)
            wait_for("the end", lambda: every_ctr.status(container_id) == "STOPPED")
            assert (tmp_path / "end").read_text() == "stopping\n"
            assert "exit code 3" in every_ctr("tasks", "rm", container_id).stderr
            assert every_ctr.status(container_id) is None
            every_ctr("containers", "rm", container_id)
        wait_for("the deletion's event", lambda: "delete" in dict(events.of(container_id)))
        published = events.of(container_id)
    assert [topic for topic, _ in published] == [
        *("create", "start", "exec-added", "exec-started", "exit", "paused", "resumed", "exit", "delete"),
    ]
    assert [content["exit_status"] for topic, content in published if topic == "delete"] == [3]
