"""A Kubernetes pod through containerd's CRI plugin: crictl's commands, as a person uses them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import host_state
import pytest
from cri import POD, CriClient, Crictl, Pod, Result, cgroups
from harness import TIMEOUT_S, processes_of, wait_for, wait_page
from private_cri import KUBERNETES, RUNTIME_HANDLER
from test_volumes import Kubelet, umount

SLEEP = ("sleep", "100000")
HOST_TO_CONTAINER = 1
"""CRI's MountPropagation."""
SIZE = "until stty size 2>/dev/null | grep .; do :; done"
"""In a shell that may already run when its terminal is given a size: busybox does not fail without one."""


@pytest.fixture(scope="module")
def pod(crictl: Crictl) -> Iterator[Pod]:
    with crictl.pod("pod") as pod:
        yield pod


@pytest.fixture(scope="module")
def sleeper(pod: Pod) -> str:
    """A container that does nothing."""
    return pod.start("sleeper", "sh", "-c", "echo out; echo err >&2; exec sleep 100000")


def test_a_container_is_created_started_stopped_and_removed(crictl: Crictl, pod: Pod) -> None:
    container = pod.create("life", *SLEEP)
    assert crictl.status(container)["state"] == "CONTAINER_CREATED"
    crictl("start", container)
    assert crictl.status(container)["state"] == "CONTAINER_RUNNING"
    refused = crictl("rm", container, check=False)
    assert refused.returncode != 0
    assert "running" in refused.stderr
    crictl("stop", "--timeout", "0", container)
    status = crictl.status(container)
    assert (status["state"], status["exitCode"]) == ("CONTAINER_EXITED", 137)
    crictl("rm", container)
    assert container not in crictl("ps", "--all", "--quiet").stdout


def test_a_container_that_ends_by_itself_is_seen(crictl: Crictl, pod: Pod) -> None:
    container = pod.start("ends", "sh", "-c", "exit 3")
    status = pod.wait_exited(container)
    assert (status["exitCode"], status["reason"]) == (3, "Error")
    crictl("rm", container)


def test_inspect_and_lists_show_what_there_is(crictl: Crictl, pod: Pod, sleeper: str) -> None:
    found = crictl.inspectp(pod.id)
    assert found["status"]["state"] == "SANDBOX_READY"
    assert found["info"]["runtimeType"] == "io.containerd.kata-py.v2"
    # Nothing of the pod but the machine is on the host.
    assert processes_of(pod.id, "qemu-system") == [found["info"]["pid"]]
    assert crictl.inspect(sleeper)["info"]["pid"] == found["info"]["pid"]
    assert re.search(rf"{pod.id[:13]} .* Ready +{pod.name} ", crictl("pods").stdout)
    assert re.search(rf"{sleeper[:13]} .* Running +sleeper ", crictl("ps").stdout)


def test_exec_gives_output_and_status(crictl: Crictl, sleeper: str) -> None:
    script = "echo one; echo two >&2; exit "
    assert crictl("exec", "--sync", sleeper, "sh", "-c", f"{script} 0").stdout == "one\n\ntwo\n\n"
    failed = crictl("exec", "--sync", sleeper, "sh", "-c", f"{script} 3", check=False)
    assert failed.returncode == 1
    assert "exited with 3: two" in failed.stderr
    failed = crictl("exec", sleeper, "sh", "-c", f"{script} 4", check=False)
    assert (failed.returncode, failed.stdout, failed.stderr.splitlines()[0]) == (1, "one\n", "two")
    assert "exit code 4" in failed.stderr
    missing = crictl("exec", "--sync", sleeper, "no-such-program", check=False)
    assert missing.returncode == 1
    assert "127" in missing.stderr
    assert "no-such-program" in missing.stderr
    unknown = crictl("exec", "--sync", "0123456789ab", "true", check=False)
    assert unknown.returncode == 1
    assert "NotFound" in unknown.stderr


def test_exec_sync_ends_what_takes_too_long(crictl: Crictl, pod: Pod, sleeper: str) -> None:
    result = crictl("exec", "--sync", "--timeout", "1", sleeper, "sleep", "4321", check=False)
    assert result.returncode != 0
    assert "timeout" in result.stderr
    assert "4321" not in pod.exec(sleeper, "ps").stdout


def test_exec_passes_stdin_to_its_end(crictl: Crictl, sleeper: str) -> None:
    text = "".join(f"{number}\n" for number in range(20000))
    assert crictl("exec", "-i", sleeper, "sort", "-rn", input=text).stdout.startswith("19999\n19998\n")


def test_exec_with_a_terminal(crictl: Crictl, pod: Pod, sleeper: str) -> None:
    with crictl.terminal("exec", "-it", sleeper, "sh", size=(33, 99)) as terminal:
        terminal.expect("# ")
        terminal.type(f"{SIZE}; tty; echo $TERM\n")
        terminal.expect("33 99\r\n/dev/pts/")
        terminal.expect("xterm\r\n")
        terminal.type("sleep 5432\n")
        wait_for("sleep", lambda: "sleep 5432" in pod.exec(sleeper, "ps").stdout)
        terminal.type("\x03")
        terminal.expect("^C")
        terminal.expect("# ")
        terminal.type("exit 7\n")
        terminal.expect("exit code 7")
        assert terminal.process.wait(TIMEOUT_S) == 1


def test_volumes_as_kubernetes_has_them(pod: Pod, tmp_path: Path) -> None:
    kubelet = Kubelet(tmp_path)
    host = tmp_path / "host"
    (host / "inner").mkdir(parents=True)
    with kubelet.mounted:
        memory = kubelet.mount(kubelet.path("empty-dir", "memory"), "tmpfs", "size=4m,mode=1777")
        settings = kubelet.path("configmap", "settings")
        kubelet.publish(settings, 1, colour="red")
        subprocess.run(["mount", "--bind", host, host], check=True)
        kubelet.mounted.callback(umount, host)
        subprocess.run(["mount", "--make-shared", host], check=True)
        mounts = [
            {"container_path": "/memory", "host_path": str(memory)},
            {"container_path": "/settings", "host_path": str(settings), "readonly": True},
            {"container_path": "/host", "host_path": str(host), "propagation": HOST_TO_CONTAINER},
        ]
        one, two = (pod.start(name, *SLEEP, mounts=mounts) for name in ("volumes-1", "volumes-2"))
        pod.exec(one, "sh", "-c", "echo one > /memory/file")
        assert pod.exec(two, "cat", "/memory/file").stdout == "one\n"
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", host / "inner"], check=True)
        (host / "inner/later").write_text("mounted")
        kubelet.publish(settings, 2, colour="green")
        for container in (one, two):
            command = ("sh", "-c", "until grep mounted /host/inner/later; do sleep 0.1; done 2> /dev/null")
            pod.exec(container, *command)
            pod.exec(container, "sh", "-c", "until grep green /settings/colour; do sleep 0.1; done")
        for container in (one, two):
            pod.crictl("rm", "--force", container)


def test_attach_joins_a_running_container(crictl: Crictl, pod: Pod) -> None:
    container = pod.start("reader", "sh", stdin=True, stdin_once=True)
    result = crictl("attach", "-i", container, input="echo $((6 * 7))\nexit 5\n", check=False)
    assert result.stdout == "42\n"
    assert pod.wait_exited(container)["exitCode"] == 5
    assert crictl("logs", container).stdout == "42\n"
    crictl("rm", container)


def test_attach_to_a_container_with_a_terminal(crictl: Crictl, pod: Pod) -> None:
    container = pod.start("terminal", "sh", stdin=True, stdin_once=True, tty=True)
    with crictl.terminal("attach", "-it", container, size=(22, 77)) as terminal:
        terminal.type(f"{SIZE}\n")
        terminal.expect("22 77")
        terminal.type("exit\n")
        terminal.process.wait(TIMEOUT_S)
    assert pod.wait_exited(container)["exitCode"] == 0
    crictl("rm", container)


def test_logs_are_kept_by_stream_and_followed(crictl: Crictl, pod: Pod, sleeper: str) -> None:
    wait_for("all its words", lambda: crictl("logs", sleeper) == Result(0, "out\n", "err\n"))
    script = "for n in 1 2 3; do echo line $n; sleep 0.3; done"
    container = pod.start("talker", "sh", "-c", script)
    assert crictl("logs", "--follow", container).stdout == "line 1\nline 2\nline 3\n"
    assert crictl("logs", "--tail", "1", container).stdout == "line 3\n"
    crictl("rm", container)


def test_stats_are_the_guests(crictl: Crictl, pod: Pod) -> None:
    work = "n=0; while [ $n -lt 30000 ]; do n=$((n + 1)); done"
    script = f"head -c 16m /dev/zero >/dev/shm/kept; {work}; echo done; cat"
    container = pod.start("user", "sh", "-c", script, stdin=True)
    wait_for("its work", lambda: crictl("logs", container).stdout)
    (stats,) = json.loads(crictl("stats", "--id", container, "-o", "json").stdout)["stats"]
    assert int(stats["memory"]["workingSetBytes"]["value"]) > 16 << 20
    assert int(stats["cpu"]["usageCoreNanoSeconds"]["value"]) > 50_000_000
    crictl("stop", container)
    crictl("rm", container)


def test_statsp_counts_the_whole_machine(crictl: Crictl, pod: Pod, sleeper: str) -> None:
    (stats,) = json.loads(crictl("statsp", "--id", pod.id, "-o", "json").stdout)["stats"]
    assert stats["attributes"]["metadata"]["name"] == pod.name
    assert int(stats["linux"]["cpu"]["usageCoreNanoSeconds"]["value"]) > 10_000_000
    assert [each["attributes"]["id"] for each in stats["linux"]["containers"]].count(sleeper) == 1


def test_update_grows_the_machine_and_reaches_the_cgroup_in_the_guest(crictl: Crictl) -> None:
    with crictl.pod("grows") as pod:
        limits = {"resources": {"memory_limit_in_bytes": 64 << 20}}
        container = pod.start("limited", *SLEEP, linux=limits)

        def cgroup() -> list[str]:
            files = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu.weight")
            return pod.exec(container, "cat", *files).stdout.split("\n")[:3]

        def machine() -> tuple[int, int]:
            """vCPUs and MiB."""
            processors, meminfo = pod.exec(
                container, "sh", "-c", "nproc; grep MemTotal /proc/meminfo"
            ).stdout.splitlines()
            return int(processors), int(meminfo.split()[1]) >> 10

        maximum, quota, weight = cgroup()
        assert (maximum, quota) == (str(64 << 20), "max 100000")
        vcpus, mib = machine()
        cpu = ("--cpu-period", "100000", "--cpu-quota", "50000")
        crictl("update", *cpu, "--memory", str(192 << 20), container)
        assert cgroup() == [str(192 << 20), "50000 100000", weight]
        # A block of the guest's memory is 128 MiB: one more.
        assert machine() == (vcpus + 1, mib + 128)
        crictl("update", "--memory", str(96 << 20), "--cpu-share", "512", container)
        maximum, quota, lighter = cgroup()
        assert (maximum, quota) == (str(96 << 20), "50000 100000"), "what an update does not name stays"
        assert int(lighter) < int(weight)
        assert machine() == (vcpus + 1, mib + 128), "a DIMM is not taken back"


def test_a_container_has_its_grace_period(crictl: Crictl, pod: Pod) -> None:
    loop = "echo ready; while :; do sleep 0.1; done"
    container = pod.start("polite", "sh", "-c", f"trap 'echo asked; exit 7' TERM; {loop}")
    stubborn = pod.start("stubborn", "sh", "-c", f"trap '' TERM; {loop}")
    wait_for("both to be ready", lambda: all(crictl("logs", c).stdout for c in (container, stubborn)))
    crictl("stop", "--timeout", "60", container)
    assert crictl.status(container)["exitCode"] == 7
    assert crictl("logs", container).stdout == "ready\nasked\n"
    started = time.monotonic()
    crictl("stop", "--timeout", "2", stubborn)
    assert crictl.status(stubborn)["exitCode"] == 137
    assert time.monotonic() - started >= 2
    crictl("rm", container, stubborn)


def test_a_container_is_restarted_in_a_living_pod(crictl: Crictl, pod: Pod, sleeper: str) -> None:
    boot_id = pod.exec(sleeper, "cat", "/proc/sys/kernel/random/boot_id").stdout
    for attempt in (0, 1, 2):
        metadata = {"name": "phoenix", "attempt": attempt}
        container = pod.start("phoenix", "sh", "-c", "ls /once; touch /once; sleep 99999", metadata=metadata)
        assert pod.exec(container, "cat", "/proc/sys/kernel/random/boot_id").stdout == boot_id
        crictl("stop", container)
        assert crictl("logs", container).stdout == "", "its root is new"
        crictl("rm", container)


def test_memory_that_runs_out_is_the_reason(crictl: Crictl, pod: Pod, sleeper: str) -> None:
    container = pod.start(
        "hungry",
        *("sh", "-c", "text=a; while :; do text=$text$text; done"),
        linux={"resources": {"memory_limit_in_bytes": 24 << 20}},
    )
    assert pod.wait_exited(container)["exitCode"] == 137
    # containerd learns it by an event, whose way is not that of the exit.
    wait_for("the reason", lambda: crictl.status(container)["reason"] == "OOMKilled")
    assert pod.exec(sleeper, "echo", "alive").stdout == "alive\n"
    crictl("rm", container)


def test_ten_containers_in_a_pod(crictl: Crictl) -> None:
    with crictl.pod("ten", linux={"security_context": {"namespace_options": {"pid": POD}}}) as pod:
        ids = [
            pod.start(f"c{number}", "sh", "-c", f"echo {number}; {' '.join(SLEEP)}") for number in range(10)
        ]
        assert len(processes_of(pod.id, "containerd-shim-kata-py-v2")) == 1
        assert len(processes_of(pod.id, "qemu-system")) == 1
        words = [f"{number}\n" for number in range(10)]
        wait_for("their words", lambda: [crictl("logs", each).stdout for each in ids] == words)
        assert pod.exec(ids[3], "ps").stdout.count(" ".join(SLEEP)) >= 10
        crictl("stop", ids[0])
        crictl("rm", ids[0])
        assert pod.exec(ids[9], "ps").stdout.count(" ".join(SLEEP)) >= 9


def test_the_readmes_pod(crictl: Crictl, tmp_path: Path) -> None:
    pod_config = json.loads((KUBERNETES / "crictl-pod.json").read_text())
    config = tmp_path / "crictl-pod.json"
    config.write_text(json.dumps(pod_config | {"log_directory": str(tmp_path)}))
    container_config = KUBERNETES / "crictl-container.json"
    with cgroups(pod_config["linux"]["cgroup_parent"]):
        pod = crictl("runp", "--runtime", RUNTIME_HANDLER, str(config)).stdout.strip()
        host_state.own_ids.add(pod)
        try:
            container = crictl("create", pod, str(container_config), str(config)).stdout.strip()
            host_state.own_ids.add(container)
            crictl("start", container)
            wait_for("its kernel", lambda: "Linux demo " in crictl("logs", container).stdout)
            assert container[:13] in crictl("stats", container).stdout
            assert pod[:13] in crictl("statsp", pod).stdout
        finally:
            crictl("rmp", "--force", pod)


def test_where_crictl_cannot_be_had_there_are_its_commands(crictl: Crictl) -> None:
    client = CriClient(crictl.containerd, crictl.directory)
    with client.pod("client") as pod:
        assert client.inspectp(pod.id)["status"]["state"] == "SANDBOX_READY"
        assert re.search(rf"{pod.id[:13]} .* Ready +{pod.name} ", client("pods").stdout)
        container = pod.start("c", "sh", "-c", "echo out; echo err >&2; exec sleep 100000")
        assert client.status(container)["state"] == "CONTAINER_RUNNING"
        assert re.search(rf"{container[:13]} .* Running +c ", client("ps").stdout)
        assert pod.exec(container, "echo", "hello").stdout == "hello\n"
        assert client("exec", "-i", container, "cat", input="there and back").stdout == "there and back"
        failed = client("exec", container, "sh", "-c", "exit 4", check=False)
        assert failed.returncode == 1
        assert "exit code 4" in failed.stderr
        with client.terminal("exec", "-it", container, "sh", size=(33, 99)) as terminal:
            terminal.expect("# ")
            terminal.type(f"{SIZE}; exit\n")
            terminal.expect("33 99")
            assert terminal.process.wait(TIMEOUT_S) == 0
        wait_for("all its words", lambda: client("logs", container) == Result(0, "out\n", "err\n"))
        client("update", "--memory", str(48 << 20), container)
        assert pod.exec(container, "cat", "/sys/fs/cgroup/memory.max").stdout == f"{48 << 20}\n"
        assert container[:13] in client("stats").stdout
        assert pod.id[:13] in client("statsp").stdout
        reader = pod.start("reader", "sh", stdin=True, stdin_once=True)
        assert client("attach", "-i", reader, input="echo $((6 * 7))\n").stdout == "42\n"
        assert pod.wait_exited(reader)["exitCode"] == 0
        refused = client("rm", container, check=False)
        assert "is running" in refused.stderr
        client("stop", container)
        client("rm", container, reader)
        assert client("ps", "--all", "--quiet", "--pod", pod.id).stdout == ""
        client("stopp", pod.id)
        client("rmp", pod.id)
        assert pod.id not in client("pods", "--quiet").stdout


def test_a_stopped_pod_is_no_machine_any_more(crictl: Crictl) -> None:
    with crictl.pod("stopped") as pod:
        container = pod.start("c", *SLEEP)
        crictl("stopp", pod.id)
        assert not processes_of(pod.id, "qemu-system")
        wait_for("its shim's end", lambda: not processes_of(pod.id, "containerd-shim-kata-py-v2"))
        assert crictl.inspectp(pod.id)["status"]["state"] == "SANDBOX_NOTREADY"
        assert crictl.status(container)["state"] == "CONTAINER_EXITED"
        crictl("rmp", pod.id)
        assert pod.id not in crictl("pods", "--quiet").stdout


def test_what_is_paused_is_stopped_and_removed_like_anything_else(crictl: Crictl) -> None:
    with crictl.pod("paused") as pod:
        stopped, left = pod.start("stopped", *SLEEP), pod.start("left", *SLEEP)
        for task in (stopped, left, pod.id):
            pause = crictl.containerd.ctr_command("--namespace", "k8s.io", "tasks", "pause", task)
            subprocess.run(pause, check=True)
        crictl("stop", "--timeout", "0", stopped)
        assert crictl.status(stopped)["exitCode"] == 137
        crictl("rm", stopped)
        crictl("rmp", "--force", pod.id)
        assert not processes_of(pod.id, "qemu-system")


def test_a_machine_that_dies_ends_its_pod(crictl: Crictl) -> None:
    with crictl.pod("dies") as pod:
        container = pod.start("c", *SLEEP)
        (machine,) = processes_of(pod.id, "qemu-system")
        os.kill(machine, signal.SIGKILL)
        assert pod.wait_exited(container)["exitCode"] == 137
        wait_for(
            "the pod's end", lambda: crictl.inspectp(pod.id)["status"]["state"] == "SANDBOX_NOTREADY" or None
        )


def test_pods_go_on_while_containerd_restarts(crictl: Crictl, pod: Pod, sleeper: str) -> None:
    boot_id = pod.exec(sleeper, "cat", "/proc/sys/kernel/random/boot_id").stdout
    crictl.containerd.terminate()
    crictl.containerd.start()
    wait_for("the CRI plugin", lambda: crictl("pods", check=False).returncode == 0)
    assert crictl.inspectp(pod.id)["status"]["state"] == "SANDBOX_READY"
    assert pod.exec(sleeper, "cat", "/proc/sys/kernel/random/boot_id").stdout == boot_id
    container = pod.start("after", "sh", "-c", "echo after; exit 2")
    assert pod.wait_exited(container)["exitCode"] == 2
    assert crictl("logs", container).stdout == "after\n"
    crictl("rm", container)


def test_a_pod_of_crictl_is_reached_from_the_host(crictl: Crictl) -> None:
    with crictl.pod("reached") as pod:
        address = crictl.inspectp(pod.id)["status"]["network"]["ip"]
        container = pod.start("server", "httpd", "-f", "-h", "/etc")
        found = pod.exec(container, "ip", "-o", "-4", "addr", "show", "eth0").stdout
        assert f"inet {address}/24" in found
        wait_for("the server", lambda: ":80 " in pod.exec(container, "netstat", "-ltn").stdout)
        assert wait_page(f"http://{address}/passwd").startswith(b"root:x:0:0:")
        gateway = crictl.containerd.network.prefix + ".1"
        # ping waits a second for the last.
        assert re.search("[12] packets received", pod.exec(container, "ping", "-c", "2", gateway).stdout)


def test_newer_containerds_run_pods_too(newer_crictl: Crictl) -> None:
    crictl = newer_crictl
    with crictl.pod("newer", linux={"security_context": {"privileged": True}}) as pod:
        container = pod.start("c", "sh", "-c", "echo hello; exec sleep 100000")
        assert pod.exec(container, "hostname").stdout == f"{pod.name}\n"
        assert crictl("exec", "-i", container, "cat", input="there and back").stdout == "there and back"
        wait_for("its word", lambda: crictl("logs", container).stdout == "hello\n")
        crictl("update", "--memory", str(48 << 20), container)
        assert pod.exec(container, "cat", "/sys/fs/cgroup/memory.max").stdout == f"{48 << 20}\n"
        assert json.loads(crictl("stats", "--id", container, "-o", "json").stdout)["stats"]
        assert crictl.inspectp(pod.id)["status"]["runtimeHandler"] == "kata-py"
        # Of the machine, which the host's file for containerd gives to who is privileged.
        script = "mknod /tmp/rng c 10 183 && head -c 1 /tmp/rng >/dev/null && echo read"
        trusted = pod.run("trusted", "sh", "-c", script, linux={"security_context": {"privileged": True}})
        assert trusted.stdout == "read\n", trusted.stderr
        crictl("stop", container)
        assert crictl.status(container)["state"] == "CONTAINER_EXITED"
    ids = [{"host_id": 100000, "container_id": 0, "length": 65536}]
    options = {"userns_options": {"mode": POD, "uids": ids, "gids": ids}}
    linux = {"security_context": {"namespace_options": options}}
    with (
        pytest.raises(AssertionError, match=r"found a user namespace in linux\.namespaces, expected none"),
        crictl.pod("users", linux=linux),
    ):
        pass
