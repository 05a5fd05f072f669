"""`ctr run`: what the user gets back from a container that runs to its end."""

import json
import platform
import signal
import subprocess
import tarfile
from pathlib import Path

import pytest
from harness import TIMEOUT_S, Config, Ctr, wait_for
from private_containerd import RUNTIME, TEST_IMAGE_ARCHIVE


def test_a_command_runs_in_a_machine_with_a_kernel_of_its_own(
    every_ctr: Ctr, container_id: str, config: Config
) -> None:
    result = every_ctr.run(container_id, "sh", "-c", "uname -r; echo to stderr >&2", options=config({}))
    assert result.stderr == b"to stderr\n"
    assert result.returncode == 0
    assert result.stdout.decode().strip()
    assert result.stdout.decode().strip() != platform.release()
    assert container_id not in every_ctr("containers", "ls", "-q").stdout.split()


def test_exit_status_of_the_command_is_that_of_ctr(ctr: Ctr, container_id: str) -> None:
    result = ctr.run(container_id, "sh", "-c", "exit 7")
    assert (result.returncode, result.stderr) == (7, b"")


def test_missing_binary_is_127_with_the_reason_on_stderr(ctr: Ctr, container_id: str) -> None:
    result = ctr.run(container_id, "no-such-binary")
    assert result.returncode == 127
    assert b"no-such-binary" in result.stderr
    assert b"not found" in result.stderr or b"No such file" in result.stderr


def test_killed_container_is_137(ctr: Ctr, container_id: str) -> None:
    with ctr.foreground(container_id, "sh", "-c", "echo ready; sleep 1000") as running:
        assert running.stdout and running.stdout.readline() == b"ready\n"
        ctr("tasks", "kill", "-s", "SIGKILL", container_id)
        assert running.wait(TIMEOUT_S) == 137


def test_signals_to_ctr_reach_the_container(ctr: Ctr, container_id: str, tmp_path: Path) -> None:
    script = "trap 'touch /data/usr1' USR1; trap 'exit 42' TERM; echo ready; while :; do sleep 0.1; done"
    options = ("--mount", f"type=bind,src={tmp_path},dst=/data,options=rbind:rw")
    with ctr.foreground(container_id, "sh", "-c", script, options=options) as running:
        assert running.stdout and running.stdout.readline() == b"ready\n"

        def answered() -> bool:
            # ctr ignores this one until it forwards signals, a moment after the container's first words.
            running.send_signal(signal.SIGUSR1)
            return (tmp_path / "usr1").exists()

        wait_for("the container to get SIGUSR1", answered)
        running.send_signal(signal.SIGTERM)
        assert running.wait(TIMEOUT_S) == 42


@pytest.mark.parametrize("shared_fs", ["virtio-9p", "virtio-fs"])
def test_files_are_shared_both_ways(
    ctr: Ctr, container_id: str, config: Config, tmp_path: Path, shared_fs: str
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "from-host").write_text("host's\n")
    script = "cat /data/from-host; echo guest\\'s > /data/from-guest; mkdir /data/d; grep ' / ' /proc/mounts"
    result = ctr.run(
        container_id,
        "sh",
        "-c",
        script,
        options=(
            *config({"hypervisor.qemu": {"shared_fs": shared_fs}}),
            "--mount",
            f"type=bind,src={shared},dst=/data,options=rbind:rw",
        ),
    )
    assert result.returncode == 0, result.stderr
    first, root_mount = result.stdout.decode().splitlines()
    assert first == "host's"
    assert root_mount.split()[2] == {"virtio-9p": "9p", "virtio-fs": "virtiofs"}[shared_fs]
    assert (shared / "from-guest").read_text() == "guest's\n"
    assert (shared / "d").is_dir()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The test image unpacked: a root that containerd does not mount."""
    directory = tmp_path / "root"
    directory.mkdir()
    with tarfile.open(TEST_IMAGE_ARCHIVE) as archive:
        layer = archive.extractfile(max(archive.getmembers(), key=lambda member: member.size))
        assert layer
        subprocess.run(["tar", "-x", "-C", directory], input=layer.read(), check=True)
    return directory


def spec_of(root: Path, **process: object) -> dict[str, object]:
    """A minimal OCI spec of somebody's own, not one that ctr makes."""
    return {
        "ociVersion": "1.0.2",
        "hostname": "own-hostname",
        "root": {"path": str(root)},
        "process": {"args": ["id"], "cwd": "/", "env": ["PATH=/bin:/usr/bin"], "user": {"uid": 0, "gid": 0}}
        | process,
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")]},
    }


def run_spec(ctr: Ctr, container_id: str, directory: Path, spec: object) -> subprocess.CompletedProcess[str]:
    path = directory / "config.json"
    path.write_text(json.dumps(spec))
    return subprocess.run(
        ctr.containerd.ctr_command("run", "--rm", "--runtime", RUNTIME, "--config", str(path), container_id),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=TIMEOUT_S,
    )


def test_a_spec_of_ones_own_with_user_and_groups(
    ctr: Ctr, container_id: str, tmp_path: Path, root: Path
) -> None:
    (root / "tmp").chmod(0o1777)
    spec = spec_of(
        root,
        args=["sh", "-c", "id; hostname; touch /tmp/made"],
        user={"uid": 1000, "gid": 1001, "additionalGids": [33]},
    )
    result = run_spec(ctr, container_id, tmp_path, spec)
    assert result.returncode == 0, result.stderr
    identity, hostname = result.stdout.splitlines()
    assert (
        identity == "uid=1000 gid=1001 groups=33(www-data),1001"
        or identity == "uid=1000 gid=1001 groups=33(www-data)"
    )
    assert hostname == "own-hostname"
    made = (root / "tmp/made").stat()
    assert (made.st_uid, made.st_gid) == (1000, 1001)


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ({"args": []}, "process.args"),
        ({"cwd": "not/absolute"}, "process.cwd"),
    ],
)
def test_a_bad_spec_is_refused_by_name(
    ctr: Ctr, container_id: str, tmp_path: Path, root: Path, broken: dict[str, object], named: str
) -> None:
    result = run_spec(ctr, container_id, tmp_path, spec_of(root, **broken))
    assert result.returncode != 0
    assert named in result.stderr
    assert "Traceback" not in result.stderr


def test_a_reader_that_vanishes_does_not_stop_the_container(ctr: Ctr, container_id: str) -> None:
    script = "i=0; while :; do i=$((i+1)); echo $i; echo $i > /count; done"
    with ctr.foreground(container_id, "sh", "-c", script) as running:
        assert running.stdout and running.stdout.readline() == b"1\n"
        # A stopped reader is the slowest: the container's pipe fills, everything else goes on.
        running.send_signal(signal.SIGSTOP)
        assert ctr.exec(container_id, "echo", "answer").stdout == b"answer\n"
        running.kill()

        def count() -> int:
            return int(ctr.exec(container_id, "cat", "/count").stdout or b"0")

        seen = count()
        wait_for("the container to go on without a reader", lambda: count() > seen)
