from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from guest.agent.spec import GuestNamespaces, find_hooks, guest_spec, needs_crun

NAMESPACES = GuestNamespaces(network="/proc/1/ns/net", ipc="/proc/1/ns/ipc", uts="/proc/1/ns/uts")


def host_spec() -> dict[str, Any]:
    return {
        "ociVersion": "1.0.2",
        "process": {"args": ["sh"], "cwd": "/", "apparmorProfile": "x", "selinuxLabel": "y"},
        "root": {"path": "/rootfs"},
        "linux": {
            "cgroupsPath": "system.slice:cri:abc",
            "mountLabel": "z",
            "intelRdt": {},
            "maskedPaths": ["/proc/kcore"],
            "namespaces": [
                {"type": "pid", "path": "/proc/99/ns/pid"},
                {"type": "ipc", "path": "/proc/99/ns/ipc"},
                {"type": "uts"},
                {"type": "network", "path": "/var/run/netns/cni"},
                {"type": "mount"},
                {"type": "user"},
            ],
        },
    }


def namespaces(spec: dict[str, Any]) -> dict[str, str | None]:
    return {entry["type"]: entry.get("path") for entry in spec["linux"]["namespaces"]}


def test_the_hosts_paths_and_labels_do_not_reach_crun() -> None:
    given = host_spec()
    before = copy.deepcopy(given)
    guest = guest_spec(given, cgroup_path="/containers/c", namespaces=NAMESPACES)
    assert given == before
    assert guest["linux"]["cgroupsPath"] == "/containers/c"
    assert guest["linux"]["maskedPaths"] == ["/proc/kcore"]
    assert "mountLabel" not in guest["linux"] and "intelRdt" not in guest["linux"]
    assert set(guest["process"]) == {"args", "cwd"}
    assert namespaces(guest) == {
        "pid": None,
        "ipc": "/proc/1/ns/ipc",
        "uts": "/proc/1/ns/uts",
        "network": "/proc/1/ns/net",
        "mount": None,
        "cgroup": None,
        "user": None,
    }


def test_a_spec_without_linux_gets_what_a_container_needs() -> None:
    spec = {"process": {"args": ["sh"]}, "root": {"path": "/r"}}
    guest = guest_spec(spec, cgroup_path="/c", namespaces=NAMESPACES)
    assert namespaces(guest) == {"pid": None, "network": "/proc/1/ns/net", "mount": None, "cgroup": None}
    assert guest["ociVersion"]


def test_a_shared_pid_namespace_is_joined() -> None:
    shared = GuestNamespaces("/n", "/i", "/u", pid="/proc/7/ns/pid")
    guest = guest_spec(host_spec(), cgroup_path="/c", namespaces=shared)
    assert namespaces(guest)["pid"] == "/proc/7/ns/pid"


def test_a_container_opens_its_own_devices_unless_all_are_its() -> None:
    def rules(**linux: Any) -> Any:
        spec = host_spec()
        spec["linux"] |= linux
        return guest_spec(spec, cgroup_path="/c", namespaces=NAMESPACES)["linux"]["resources"]["devices"]

    disk = {"path": "/dev/xvda", "type": "b", "major": 254, "minor": 16}
    given = rules(devices=[disk, {"path": "/run/fifo", "type": "p", "major": 0, "minor": 0}])
    assert given[0] == {"allow": False, "access": "rwm"}
    assert {"allow": True, "type": "b", "major": 254, "minor": 16, "access": "rwm"} in given
    assert "p" not in [rule.get("type") for rule in given]
    everything = {"allow": True, "type": "a", "access": "rwm"}
    assert rules(devices=[disk], resources={"devices": [everything]}) == [{"allow": True, "access": "rwm"}]


@pytest.mark.parametrize("missing", ["process", "root"])
def test_a_spec_that_cannot_run_is_refused(missing: str) -> None:
    spec = host_spec()
    del spec[missing]
    with pytest.raises(ValueError, match=missing):
        guest_spec(spec, cgroup_path="/c", namespaces=NAMESPACES)


def test_guest_hooks_come_after_the_specs_own(tmp_path: Path) -> None:
    for kind, name, mode in (
        ("prestart", "b", 0o755),
        ("prestart", "a", 0o755),
        ("poststop", "plain", 0o644),
    ):
        (tmp_path / kind).mkdir(exist_ok=True)
        (tmp_path / kind / name).touch()
        (tmp_path / kind / name).chmod(mode)
    (tmp_path / "prestart/link").symlink_to("a")
    hooks = find_hooks(str(tmp_path))
    assert [hook["args"] for hook in hooks["prestart"]] == [["a", "prestart"], ["b", "prestart"]]
    assert set(hooks) == {"prestart"}
    spec = host_spec() | {"hooks": {"prestart": [{"path": "/own"}], "poststart": [{"path": "/later"}]}}
    guest = guest_spec(spec, cgroup_path="/c", namespaces=NAMESPACES, hooks=hooks)
    assert [Path(hook["path"]).name for hook in guest["hooks"]["prestart"]] == ["own", "a", "b"]
    assert needs_crun(guest, "poststart") and not needs_crun(guest, "poststop")
    assert find_hooks(str(tmp_path / "nosuch")) == {}
