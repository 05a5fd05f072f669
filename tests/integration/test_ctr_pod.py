"""Pods through containerd: containers that join a machine, memory that runs out, a guest that freezes."""

import os
import re
import signal
from pathlib import Path

from harness import MONITORED, Config, Ctr, new_id, processes_of, qmp, wait_for


def cri(kind: str, pod: str) -> tuple[str, ...]:
    """The annotations with which containerd's CRI plugin tells a pod's containers from each other."""
    prefix = "io.kubernetes.cri"
    return (
        *("--annotation", f"{prefix}.container-type={kind}"),
        *("--annotation", f"{prefix}.sandbox-id={pod}"),
    )


def cri_o(kind: str, pod: str) -> tuple[str, ...]:
    """As `cri`, of CRI-O."""
    prefix = "io.kubernetes.cri-o"
    return (
        *("--annotation", f"{prefix}.ContainerType={kind}"),
        *("--annotation", f"{prefix}.SandboxID={pod}"),
    )


def test_containers_of_a_pod_share_machine_and_shim(every_ctr: Ctr, container_id: str) -> None:
    ctr = every_ctr
    boot_id = ("cat", "/proc/sys/kernel/random/boot_id")
    with ctr.detached(container_id, "sleep", "1000", options=cri("sandbox", container_id)):
        machine = ctr.exec(container_id, *boot_id).stdout
        joins = cri("container", container_id)
        one = ctr.run(f"{container_id}-one", *boot_id, options=joins)
        assert (one.returncode, one.stdout) == (0, machine)
        with ctr.detached(f"{container_id}-two", "sleep", "1000", options=joins):
            assert len(processes_of(container_id, "containerd-shim-kata-py-v2")) == 1
            assert len(processes_of(container_id, "qemu-system")) == 1
            assert ctr.run(f"{container_id}-three", "sh", "-c", "exit 3", options=joins).returncode == 3
        failed = ctr.run(f"{container_id}-four", "no-such-command", options=joins)
        assert failed.returncode == 127
        assert ctr.exec(container_id, *boot_id).stdout == machine, "the pod goes on"


def test_a_pod_of_cri_o_is_one_machine(ctr: Ctr, container_id: str) -> None:
    boot_id = ("cat", "/proc/sys/kernel/random/boot_id")
    with ctr.detached(container_id, "sleep", "1000", options=cri_o("sandbox", container_id)):
        joins = cri_o("container", container_id)
        one = ctr.run(f"{container_id}-one", *boot_id, options=joins)
        assert (one.returncode, one.stdout) == (0, ctr.exec(container_id, *boot_id).stdout)
        assert len(processes_of(container_id, "containerd-shim-kata-py-v2")) == 1
        assert len(processes_of(container_id, "qemu-system")) == 1
        # CRI-O learns from a file in the bundle what containerd learns from an event.
        hungry = ("sh", "-c", "text=a; while :; do text=$text$text; done")
        options = ("--memory-limit", str(24 << 20), *joins)
        with ctr.detached(f"{container_id}-two", *hungry, options=options):
            bundle = (
                ctr.containerd.run / "state/io.containerd.runtime.v2.task/default" / f"{container_id}-two"
            )
            wait_for("its end", lambda: ctr.status(f"{container_id}-two") == "STOPPED")
            wait_for("the file", lambda: (bundle / "oom").exists())
        assert not (bundle.with_name(container_id) / "oom").exists()


def test_a_container_cannot_join_a_pod_that_is_not_there(ctr: Ctr, container_id: str) -> None:
    result = ctr.run(container_id, "true", options=cri("container", f"{container_id}-none"))
    assert result.returncode != 0
    assert f"{container_id}-none has no shim" in result.stderr.decode()


def test_memory_that_runs_out_is_an_event_and_137(ctr: Ctr, container_id: str, tmp_path: Path) -> None:
    with ctr.events(tmp_path) as events:
        result = ctr.run(
            container_id,
            *("sh", "-c", "text=a; while :; do text=$text$text; done"),
            options=("--memory-limit", str(24 << 20)),
        )
        assert result.returncode == 137

        def topics() -> list[str]:
            return [topic for topic, _ in events.of(container_id)]

        wait_for("the end's event", lambda: "delete" in topics())
        assert sorted(topics()) == ["create", "delete", "exit", "oom", "start"]
        assert topics().index("oom") < topics().index("delete")


def test_a_guest_that_answers_no_more_ends_its_containers(
    ctr: Ctr, container_id: str, config: Config
) -> None:
    """Because its machine stands still, or the guest alone, which is just to be grown."""
    frozen = new_id("frozen")
    monitored = config({"hypervisor.qemu": MONITORED})
    with (
        ctr.detached(container_id, "sleep", "1000"),
        ctr.detached(frozen, "sleep", "1000", options=(*monitored, *cri("sandbox", frozen))),
    ):
        (machine,) = processes_of(container_id, "qemu-system")
        os.kill(machine, signal.SIGSTOP)
        qmp(frozen, "stop")
        grows = (*cri("container", frozen), "--memory-limit", str(512 << 20))
        late = ctr.run(f"{frozen}-late", "sleep", "1000", options=grows)
        assert late.returncode != 0
        # Its creation was waiting for the guest, or was not answered itself.
        assert re.search(
            rf"sandbox {frozen} is dead: agent: |agent: \w+: no answer to \S+ within ", late.stderr.decode()
        )
        wait_for("their end", lambda: {ctr.status(pod) for pod in (container_id, frozen)} == {"STOPPED"})
        wait_for(
            "the machines to go",
            lambda: not [*processes_of(container_id, "qemu-system"), *processes_of(frozen, "qemu-system")],
        )
