"""The guest's spec against Kata's rules."""

import copy
from typing import Any

import pytest

from virtcontainers.errors import InvalidArgumentError
from virtcontainers.guest_spec import guest_spec


def spec(**linux: Any) -> dict[str, Any]:
    return {
        "ociVersion": "1.2.0",
        "process": {"args": ["sh"], "apparmorProfile": "cri", "selinuxLabel": "a:b:c", "cwd": "/"},
        "root": {"path": "rootfs", "readonly": True},
        "hooks": {"prestart": [{"path": "/bin/true"}]},
        "mounts": [],
        "linux": linux,
    }


class Binds:
    """Records what it was asked for, and answers a guest path."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, entry: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(entry["destination"])
        return {**entry, "source": f"/guest{entry['source']}"}


def convert(given: dict[str, Any], **options: Any) -> tuple[dict[str, Any], bool, Binds]:
    binds = Binds()
    options = {"shm_size_bytes": 1 << 20, "pass_seccomp": True, **options}
    before = copy.deepcopy(given)
    guest, pidns = guest_spec(given, rootfs="/guest/rootfs", guest_mount=binds, **options)
    assert given == before, "the host's spec must not change"
    return guest, pidns, binds


def test_root_is_the_guests_and_stays_readonly() -> None:
    guest, _, _ = convert(spec())
    assert guest["root"] == {"path": "/guest/rootfs", "readonly": True}


def test_host_hooks_and_security_labels_do_not_reach_the_guest() -> None:
    guest, _, _ = convert(spec(mountLabel="x", intelRdt={"closID": "y"}))
    assert "hooks" not in guest
    assert guest["process"] == {"args": ["sh"], "cwd": "/"}
    assert not {"mountLabel", "intelRdt"} & guest["linux"].keys()


def test_limits_stay_and_host_numbered_resources_go() -> None:
    resources = {
        "memory": {"limit": 1 << 20},
        "pids": {"limit": 10},
        "cpu": {"quota": 1000, "period": 100, "cpus": "0-63", "mems": "1"},
        "devices": [{"allow": False, "access": "rwm"}],
        "blockIO": {"weight": 10},
    }
    guest, _, _ = convert(spec(resources=resources))
    assert guest["linux"]["resources"] == {
        "memory": {"limit": 1 << 20},
        "pids": {"limit": 10},
        "cpu": {"quota": 1000, "period": 100},
    }


def test_all_devices_of_the_host_become_all_of_the_machine() -> None:
    def devices(*rules: dict[str, Any]) -> Any:
        return convert(spec(resources={"devices": list(rules)}))[0]["linux"]["resources"].get("devices")

    nothing, everything = ({"allow": allow, "access": "rwm"} for allow in (False, True))
    one = {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rwm"}
    assert devices(nothing, one) is None
    assert devices(everything, nothing) is None
    assert devices(nothing, everything, one) == [{"allow": True, "type": "a", "access": "rwm"}]


@pytest.mark.parametrize(("path", "shared"), [(None, False), ("/proc/42/ns/pid", True)])
def test_pid_namespace_to_join_means_the_sandboxes(path: str | None, shared: bool) -> None:
    pid = {"type": "pid"} | ({"path": path} if path else {})
    others = [{"type": t, "path": "/proc/42/ns/x"} for t in ("network", "cgroup", "time", "ipc", "mount")]
    guest, pidns, _ = convert(spec(namespaces=[pid, *others]))
    assert pidns is shared
    assert guest["linux"]["namespaces"] == [{"type": "ipc"}, {"type": "mount"}]


def test_seccomp_goes_when_it_is_disabled_in_the_guest() -> None:
    given = spec(seccomp={"defaultAction": "SCMP_ACT_ALLOW"})
    assert "seccomp" in convert(given)[0]["linux"]
    assert "seccomp" not in convert(given, pass_seccomp=False)[0]["linux"]


def test_bind_mounts_are_shared_and_others_pass() -> None:
    given = spec()
    given["mounts"] = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/data", "type": "bind", "source": "/srv", "options": ["rbind", "ro"]},
        {"destination": "/none", "type": "none", "source": "/opt", "options": ["bind"]},
        {"destination": "/sys/fs", "type": "bind", "source": "/sys/fs", "options": ["rbind"]},
        {"destination": "/dev/null2", "type": "bind", "source": "/dev/null", "options": ["bind"]},
    ]
    guest, _, binds = convert(given)
    assert binds.asked == ["/data", "/none"]
    assert [m["source"] for m in guest["mounts"]] == [
        "proc",
        "/guest/srv",
        "/guest/opt",
        "/sys/fs",
        "/dev/null",
    ]
    assert guest["mounts"][1]["options"] == ["rbind", "ro"]


@pytest.mark.parametrize(
    ("size", "kind", "source"), [(4096, "bind", "/run/kata-containers/sandbox/shm"), (0, "tmpfs", "shm")]
)
def test_dev_shm_is_the_sandboxes_or_its_own(size: int, kind: str, source: str) -> None:
    given = spec()
    given["mounts"] = [{"destination": "/dev/shm", "type": "bind", "source": "/run/host/shm"}]
    guest, _, binds = convert(given, shm_size_bytes=size)
    assert binds.asked == []
    assert (guest["mounts"][0]["type"], guest["mounts"][0]["source"]) == (kind, source)


def test_dev_shm_with_a_size_or_a_volume_of_its_own_stays() -> None:
    given = spec()
    tmpfs = {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["size=1m"]}
    empty_dir = "/var/lib/kubelet/pods/1/volumes/kubernetes.io~empty-dir/shm"
    volume = {"destination": "/dev/shm", "type": "bind", "source": empty_dir}
    given["mounts"] = [tmpfs, volume]
    guest, _, binds = convert(given)
    assert guest["mounts"][0] == tmpfs
    assert binds.asked == ["/dev/shm"]


def test_relative_bind_source_is_refused_by_name() -> None:
    given = spec()
    given["mounts"] = [{"destination": "/data", "type": "bind", "source": "srv"}]
    with pytest.raises(InvalidArgumentError, match=r"/data.*'srv'.*absolute"):
        convert(given)
