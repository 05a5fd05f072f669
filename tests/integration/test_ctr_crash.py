"""Parts of a pod are killed while its container runs: containerd hears of it, and all of the pod goes."""

import contextlib
import os
import signal
from pathlib import Path

import pytest
from harness import TIMEOUT_S, Config, Ctr, processes_of, wait_for
from templates import Log

PROGRAMS = {"shim": "containerd-shim-kata-py-v2", "QEMU": "qemu-system", "virtiofsd": "virtiofsd"}


@pytest.mark.parametrize("victim", PROGRAMS)
def test_kill_9_ends_the_container_and_leaves_nothing(
    every_ctr: Ctr, container_id: str, config: Config, tmp_path: Path, victim: str
) -> None:
    ctr, log = every_ctr, Log(every_ctr.containerd)
    options = (
        *config({"hypervisor.qemu": {"shared_fs": "virtio-fs"}}),
        # ctr removes this when it deletes the task. containerd forgets the task of a dead shim, whatever the
        # runtime, and leaves ctr nothing to delete.
        *("--fifo-dir", str(tmp_path / "fifo")),
    )
    with (
        ctr.events(tmp_path) as events,
        ctr.detached(container_id, "sleep", "1000", options=options),
    ):
        for pid in processes_of(container_id, PROGRAMS[victim]):
            # virtiofsd is two: one may end with the other.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

        def exit_event() -> dict[str, object] | None:
            return next((event for topic, event in events.of(container_id) if topic == "exit"), None)

        event = wait_for("containerd to see the exit", exit_event)
        assert event["exit_status"] == 137
        if victim != "shim":
            reason = f"the pod is dead: {victim.lower()} (pid "
            wait_for("its reason in containerd's log", lambda: log.count(reason))
        wait_for("no running task", lambda: ctr.status(container_id) in (None, "STOPPED"))
        if ctr.status(container_id):
            ctr("tasks", "rm", "-f", container_id, check=False)
        assert ctr.status(container_id) is None
        ctr("containers", "rm", container_id)
        assert container_id not in ctr("containers", "ls", "-q").stdout.split()


def test_ctr_run_in_the_foreground_ends_when_its_machine_is_killed(ctr: Ctr, container_id: str) -> None:
    with ctr.foreground(container_id, "sh", "-c", "echo ready; sleep 1000") as running:
        assert running.stdout and running.stdout.readline() == b"ready\n"
        for pid in processes_of(container_id, PROGRAMS["QEMU"]):
            os.kill(pid, signal.SIGKILL)
        assert running.wait(TIMEOUT_S) == 137
        wait_for("ctr to remove it", lambda: container_id not in ctr("containers", "ls", "-q").stdout.split())
