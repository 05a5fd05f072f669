"""containerd goes and comes back; containers do not notice."""

import os
import signal
import subprocess
from pathlib import Path

from harness import TIMEOUT_S, Config, Ctr, processes_of, wait_for
from test_ctr_failures import initrd_that_sleeps


def test_containers_go_on_without_containerd_and_are_found_again(
    every_ctr: Ctr, container_id: str, tmp_path: Path
) -> None:
    containerd = every_ctr.containerd
    script = "trap 'exit 5' TERM; i=0; while :; do i=$((i+1)); echo $i > /data/count; sleep 0.1; done"
    options = ("--mount", f"type=bind,src={tmp_path},dst=/data,options=rbind:rw")
    with every_ctr.detached(container_id, "sh", "-c", script, options=options):
        pid = every_ctr.host_pid(container_id)
        containerd.terminate()
        try:
            assert containerd.pid is None
            wait_for(
                "the first count", lambda: (tmp_path / "count").exists() and (tmp_path / "count").read_text()
            )
            seen = (tmp_path / "count").read_text()
            wait_for("the next count", lambda: (tmp_path / "count").read_text() not in ("", seen))
        finally:
            containerd.start()
        assert every_ctr.status(container_id) == "RUNNING"
        assert every_ctr.host_pid(container_id) == pid
        assert every_ctr.exec(container_id, "echo", "here").stdout == b"here\n"
        every_ctr("tasks", "kill", "-s", "SIGTERM", container_id)
        wait_for("the end", lambda: every_ctr.status(container_id) == "STOPPED")
        assert "exit code 5" in every_ctr("tasks", "rm", container_id).stderr


def test_an_exit_while_containerd_is_dead_is_seen_afterwards(
    ctr: Ctr, container_id: str, tmp_path: Path
) -> None:
    script = "until [ -e /data/go ]; do sleep 0.1; done; echo gone > /data/gone; exit 6"
    options = ("--mount", f"type=bind,src={tmp_path},dst=/data,options=rbind:rw")
    with ctr.detached(container_id, "sh", "-c", script, options=options):
        pid = ctr.containerd.pid
        assert pid
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        (tmp_path / "go").touch()
        try:
            wait_for("the container's end", (tmp_path / "gone").exists)
        finally:
            ctr.containerd.start()
        wait_for("containerd to see it", lambda: ctr.status(container_id) == "STOPPED")
        assert "exit code 6" in ctr("tasks", "rm", container_id).stderr


def test_nothing_stays_of_a_creation_during_which_containerd_is_killed(
    ctr: Ctr, container_id: str, config: Config, tmp_path: Path
) -> None:
    # A machine with an agent might be there too soon.
    initrd = initrd_that_sleeps(tmp_path / "no-agent.img")
    options = config({"hypervisor.qemu": {"initrd": str(initrd)}})
    command = ctr.run_command(container_id, "sleep", "1000", options=("-d", *options))
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as creating:
        wait_for("its machine", lambda: processes_of(container_id, "qemu-system"))
        pid = ctr.containerd.pid
        assert pid
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert creating.wait(TIMEOUT_S)
    try:
        wait_for("its shim's end", lambda: not processes_of(container_id, "containerd-shim-kata-py-v2"))
    finally:
        ctr.containerd.start()
        ctr.remove(container_id)
