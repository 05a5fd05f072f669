"""What a pod's configuration says of namespaces, users, privileges and volumes, as its containers meet it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cri import NODE, POD, Crictl, Pod
from harness import loop, wait_for
from private_cri import HOST_DEVICES_HANDLER
from test_block import image

SLEEP = ("sleep", "100000")
RUNTIME_DEFAULT, UNCONFINED, LOCALHOST = 0, 1, 2
"""CRI's SecurityProfile.ProfileType."""


@pytest.fixture(scope="module")
def pod(crictl: Crictl) -> Iterator[Pod]:
    with crictl.pod(
        "secure",
        hostname="ten-forward",
        dns_config={"servers": ["192.0.2.53"], "searches": ["svc.example"], "options": ["ndots:3"]},
        linux={"sysctls": {"kernel.shm_rmid_forced": "1", "net.ipv4.ip_local_port_range": "2000 3000"}},
    ) as pod:
        yield pod


@pytest.fixture(scope="module")
def trusted(crictl: Crictl) -> Iterator[Pod]:
    """A pod that may have privileged containers, and whose containers see each other's processes."""
    context = {"privileged": True, "namespace_options": {"pid": POD}}
    with crictl.pod("trusted", linux={"security_context": context}) as pod:
        yield pod


def secured(**context: Any) -> dict[str, Any]:
    return {"security_context": context}


def test_hostname_and_name_servers_are_the_pods(pod: Pod) -> None:
    found = pod.run("names", "sh", "-c", "hostname; cat /etc/hostname /etc/resolv.conf").stdout
    assert found == "ten-forward\nten-forward\nsearch svc.example\nnameserver 192.0.2.53\noptions ndots:3\n"


def test_sysctls_hold_in_every_container(pod: Pod) -> None:
    files = ("/proc/sys/kernel/shm_rmid_forced", "/proc/sys/net/ipv4/ip_local_port_range")
    assert pod.run("sysctls", "cat", *files).stdout.split() == ["1", "2000", "3000"]


def test_containers_share_ipc_and_shm_but_no_processes(crictl: Crictl, pod: Pod) -> None:
    script = "echo hello >/dev/shm/note; readlink /proc/self/ns/ipc; exec sleep 100000"
    writer = pod.start("writer", "sh", "-c", script)
    ipc = wait_for("its namespace", lambda: crictl("logs", writer).stdout)
    found = pod.run(
        "reader",
        *("sh", "-c", "readlink /proc/self/ns/ipc; cat /dev/shm/note; df -m /dev/shm | tail -n 1; ps"),
    ).stdout
    shm, processes = found.removeprefix(f"{ipc}hello\n").split("\n", 1)
    assert shm.split()[1] == "64", f"MiB of /dev/shm: {found}"
    assert "sleep" not in processes
    crictl("stop", writer)
    crictl("rm", writer)


def test_a_shared_pid_namespace_has_everybody_below_a_tiny_pause(crictl: Crictl, trusted: Pod) -> None:
    one = trusted.start("one", *SLEEP)
    two = trusted.start("two", "sh", "-c", "sleep 7777 & wait")
    wait_for("its child", lambda: "sleep 7777" in trusted.exec(one, "ps").stdout)
    shown = trusted.exec(one, "ps").stdout.splitlines()[1:]
    assert shown[0].split() == ["1", "65535", "/pause"]
    assert "sleep 100000" in shown[1]
    memory = trusted.exec(one, "grep", "VmRSS", "/proc/1/status").stdout
    assert int(memory.split()[1]) < 100, f"{memory.strip()} of the pause process"
    crictl("stop", two)
    wait_for("its children to end with it", lambda: "7777" not in trusted.exec(one, "ps").stdout)
    crictl("stop", one)
    crictl("rm", one, two)


def test_user_groups_and_directory(pod: Pod) -> None:
    context = {
        "run_as_user": {"value": 1234},
        "run_as_group": {"value": 2345},
        "supplemental_groups": [3456, 4567],
    }
    found = pod.run("user", "sh", "-c", "id; pwd", working_dir="/var/tmp", linux=secured(**context)).stdout
    assert found == "uid=1234 gid=2345 groups=2345,3456,4567\n/var/tmp\n"


def test_a_user_may_have_the_files_and_processes_of_a_server(pod: Pod) -> None:
    """Not what Linux gives to a machine that boots with little memory: 4096 and 725."""
    context = secured(run_as_user={"value": 1234})
    found = pod.run("limits", "sh", "-c", "ulimit -Sn; ulimit -Hn; ulimit -u", linux=context)
    assert found.stdout.split() == ["1048576", "1048576", "unlimited"]


def test_a_user_by_name_is_the_images(pod: Pod) -> None:
    assert pod.run("named", "id", linux=secured(run_as_username="www-data")).stdout.startswith(
        "uid=33(www-data) gid=33(www-data)"
    )


def test_capabilities_and_no_new_privileges(pod: Pod) -> None:
    context = {
        "capabilities": {"add_capabilities": ["NET_ADMIN"], "drop_capabilities": ["ALL"]},
        "no_new_privs": True,
    }
    found = pod.run(
        "capable", "grep", "-E", "Cap(Eff|Bnd)|NoNewPrivs", "/proc/self/status", linux=secured(**context)
    )
    assert [line.split()[1] for line in found.stdout.splitlines()] == [f"{1 << 12:016x}"] * 2 + ["1"]


def test_seccomp_profiles_are_the_guests_to_enforce(crictl: Crictl, pod: Pod) -> None:
    mode = ("grep", "Seccomp:", "/proc/self/status")
    default = secured(seccomp={"profile_type": RUNTIME_DEFAULT})
    assert pod.run("filtered", *mode, linux=default).stdout.split() == ["Seccomp:", "2"]
    free = secured(seccomp={"profile_type": UNCONFINED})
    assert pod.run("unfiltered", *mode, linux=free).stdout.split() == ["Seccomp:", "0"]
    profile = crictl.directory / "seccomp.json"
    rule = {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}))
    own = secured(seccomp={"profile_type": LOCALHOST, "localhost_ref": str(profile)})
    found = pod.run("profiled", "mkdir", "/tmp/new", linux=own)
    assert found.returncode == 1
    assert "Operation not permitted" in found.stderr


def test_a_root_that_is_read_only_and_volumes(pod: Pod, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "secret").write_text("a key\n")
    found = pod.run(
        "volumes",
        *(
            "sh",
            "-c",
            "touch /new; touch /etc/secret; cat /etc/secret; echo kept >/data/file; cat /etc/hosts",
        ),
        mounts=[
            {"container_path": "/data", "host_path": str(tmp_path / "data")},
            {"container_path": "/etc/secret", "host_path": str(tmp_path / "secret"), "readonly": True},
        ],
        linux=secured(readonly_rootfs=True),
    )
    assert found.stderr.count("Read-only file system") == 2
    assert found.stdout.startswith("a key\n")
    assert "localhost" in found.stdout
    assert (tmp_path / "data/file").read_text() == "kept\n"


def test_an_ordinary_container_may_not_change_its_machine(pod: Pod) -> None:
    script = "mount -t tmpfs none /tmp; echo 1 >/proc/sys/vm/swappiness; head -c 1 /proc/kcore | wc -c"
    # What the kubelet asks for in every container that is not privileged.
    context = {"masked_paths": ["/proc/kcore"], "readonly_paths": ["/proc/sys"]}
    found = pod.run("tame", "sh", "-c", script, linux=secured(**context))
    assert found.stdout == "0\n"
    assert found.stderr.splitlines() == [
        "mount: permission denied (are you root?)",
        "sh: can't create /proc/sys/vm/swappiness: Read-only file system",
    ]


def test_devices_are_what_the_pod_says(pod: Pod) -> None:
    """Though everybody may make nodes: mknod is an ordinary capability."""
    script = "head -c 3 /dev/nought | wc -c; mknod /tmp/rng c 10 183 && head -c 1 /tmp/rng"
    device = {"host_path": "/dev/zero", "container_path": "/dev/nought", "permissions": "r"}
    found = pod.run("devices", "sh", "-c", script, devices=[device])
    assert found.stdout == "3\n"
    assert found.stderr == "head: /tmp/rng: Operation not permitted\n"


def test_a_privileged_container_has_its_machine_and_nothing_of_the_host(trusted: Pod) -> None:
    may = "grep CapEff /proc/self/status; mkdir /mnt; mount -t tmpfs none /mnt && echo mounted"
    script = f"{may}; ls /dev; mount | grep cgroup"
    found = trusted.run("mighty", "sh", "-c", script, linux=secured(privileged=True))
    lines = found.stdout.splitlines()
    assert int(lines[0].split()[1], 16).bit_count() >= 38, "all capabilities"
    assert lines[1] == "mounted", found.stderr
    assert "(rw" in lines[-1]
    assert not {"kvm", "vhost-net", "loop-control"} & set(lines)


def test_environment_and_arguments(pod: Pod) -> None:
    found = pod.run(
        "env",
        *("sh", "-c", 'echo $WHO "$@"', "sh"),
        args=["one", "two words"],
        envs=[{"key": "WHO", "value": "me"}],
    )
    assert found.stdout == "me one two words\n"


def test_the_hosts_processes_and_ipc_are_the_machines(crictl: Crictl) -> None:
    """A pod of hostPID and hostIPC: there is no host in its machine, so all is the pod's."""
    namespaces = {"pid": NODE, "ipc": NODE}
    with crictl.pod("hostly", linux={"security_context": {"namespace_options": namespaces}}) as pod:
        script = "echo hello >/dev/shm/note; exec sleep 4711"
        one = pod.start("one", "sh", "-c", script)
        read = ("cat", "/dev/shm/note")
        wait_for("its note", lambda: pod.exec(one, *read, check=False).stdout == "hello\n")
        found = pod.run("two", "sh", "-c", "cat /dev/shm/note; readlink /proc/self/ns/ipc; ps").stdout
        assert found.startswith(f"hello\n{pod.exec(one, 'readlink', '/proc/self/ns/ipc').stdout}")
        assert "sleep 4711" in found
        assert "containerd" not in found
        assert not Path("/dev/shm/note").exists()


def test_the_hosts_network_is_refused(crictl: Crictl) -> None:
    config = {"security_context": {"namespace_options": {"network": NODE}}}
    with (
        pytest.raises(AssertionError, match=r"found the host's network in linux\.namespaces"),
        crictl.pod("hostnet", linux=config),
    ):
        pass


def test_host_devices_of_a_privileged_container_are_refused_by_name(crictl: Crictl) -> None:
    context = {"security_context": {"privileged": True}}
    with crictl.pod("devices", handler=HOST_DEVICES_HANDLER, linux=context) as pod:
        container = pod.create("c", *SLEEP, linux=context)
        refused = crictl("start", container, check=False)
        assert refused.returncode != 0
        assert re.search("found the host's block device /dev/[a-z0-9/-]+ in linux.devices", refused.stderr)
        assert "privileged_without_host_devices = true" in refused.stderr


def test_a_block_volume_of_kubernetes_is_a_device_under_its_own_name(crictl: Crictl, tmp_path: Path) -> None:
    with loop(image(tmp_path / "disk", 8, fs=False)) as device, crictl.pod("blockvolume") as pod:
        devices = [{"container_path": "/dev/xvdb", "host_path": device, "permissions": "rw"}]
        script = "stat -c %F /dev/xvdb; echo from the guest > /dev/xvdb"
        assert pod.run("one", "sh", "-c", script, devices=devices).stdout == "block special file\n"
        assert Path(device).read_bytes()[:15] == b"from the guest\n"
        # It was plugged out, and comes again; who may only read it cannot write.
        devices[0]["permissions"] = "r"
        script = "read line < /dev/xvdb; echo $line; echo no > /dev/xvdb"
        refused = pod.run("two", "sh", "-c", script, devices=devices)
        assert refused.stdout == "from the guest\n" and refused.returncode == 1
        assert Path(device).read_bytes()[:15] == b"from the guest\n"
