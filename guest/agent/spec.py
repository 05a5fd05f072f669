"""The spec that came from the host, made the guest's."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Spec = dict[str, Any]

_DENY_ALL_DEVICES = {"allow": False, "access": "rwm"}
_TUN = {"allow": True, "type": "c", "major": 10, "minor": 200, "access": "rwm"}

_HOOKS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")


@dataclass(frozen=True)
class GuestNamespaces:
    """Paths that containers join: the machine's own, and the sandbox's PID namespace when it is shared."""

    network: str
    ipc: str
    uts: str
    pid: str | None = None


def guest_spec(
    spec: Spec,
    *,
    cgroup_path: str,
    namespaces: GuestNamespaces,
    hooks: dict[str, list[dict[str, Any]]] | None = None,
    disks: Iterable[os.stat_result] = (),
) -> Spec:
    """Return what crun is to run; `spec` is not modified.

    Paths in it of namespaces and of the cgroup are the host's and are replaced. `disks` are device nodes that
    its mounts bring, and that it may open. Raises ValueError for a spec
    without process or root.
    """
    for key in ("process", "root"):
        if not spec.get(key):
            raise ValueError(f"the spec has no {key}")
    # crun 1.8 (Debian 12) refuses the number of a newer version, not what that version added.
    guest = {**spec, "ociVersion": "1.0.2"}
    # The guest's kernel has neither AppArmor profiles nor an SELinux policy of the host's.
    guest["process"] = {
        k: v for k, v in spec["process"].items() if k not in ("apparmorProfile", "selinuxLabel")
    }
    linux = {k: v for k, v in spec.get("linux", {}).items() if k not in ("mountLabel", "intelRdt")}
    linux["cgroupsPath"] = cgroup_path
    linux["namespaces"] = _namespaces(linux.get("namespaces") or [], namespaces)
    linux["resources"] = {**linux.get("resources", {}), "devices": _device_rules(linux, disks)}
    guest["linux"] = linux
    if hooks:
        own = spec.get("hooks") or {}
        merged = {name: [*own.get(name, []), *hooks.get(name, [])] for name in _HOOKS}
        guest["hooks"] = {name: entries for name, entries in merged.items() if entries}
    return guest


def _device_rules(linux: dict[str, Any], disks: Iterable[os.stat_result]) -> list[dict[str, Any]]:
    """What the container may open: its own devices, what crun adds (null, zero, terminals...), and tun, as
    with Kata's agent. Everything only where the host's spec says so: CAP_MKNOD is an ordinary capability."""
    rules = (linux.get("resources") or {}).get("devices") or []
    if any(rule.get("allow") and rule.get("type", "a") == "a" for rule in rules):
        return [{"allow": True, "access": "rwm"}]
    own = [
        {"allow": True, "type": kind, "major": entry["major"], "minor": entry["minor"], "access": "rwm"}
        for entry in linux.get("devices") or []
        if (kind := "c" if entry["type"] == "u" else entry["type"]) in ("b", "c")
    ]
    own += [
        {
            "allow": True,
            "type": "b",
            "major": os.major(disk.st_rdev),
            "minor": os.minor(disk.st_rdev),
            "access": "rwm",
        }
        for disk in disks
    ]
    return [_DENY_ALL_DEVICES, _TUN, *own]


def _namespaces(wanted: list[dict[str, str]], guest: GuestNamespaces) -> list[dict[str, str]]:
    shared = {"ipc": guest.ipc, "uts": guest.uts}
    result: list[dict[str, str]] = []
    for kind in dict.fromkeys(entry["type"] for entry in wanted):
        if kind in shared:
            result.append({"type": kind, "path": shared[kind]})
        elif kind not in ("pid", "network", "cgroup", "mount"):
            result.append({"type": kind})
    # The machine has one network, its containers share it. Named, not left out: net.* sysctls of the spec
    # are refused for a container without network namespace.
    result.append({"type": "network", "path": guest.network})
    result.append({"type": "pid", "path": guest.pid} if guest.pid else {"type": "pid"})
    result += [{"type": "mount"}, {"type": "cgroup"}]
    return result


def needs_crun(spec: Spec, hook: str) -> bool:
    """Whether the spec has hooks of that kind, which only crun knows to run."""
    return bool((spec.get("hooks") or {}).get(hook))


def find_hooks(directory: str) -> dict[str, list[dict[str, Any]]]:
    """Executables in `directory`/{prestart,poststart,poststop}, as hooks of the spec, by name."""
    found: dict[str, list[dict[str, Any]]] = {}
    for kind in ("prestart", "poststart", "poststop"):
        try:
            entries = sorted(os.scandir(os.path.join(directory, kind)), key=lambda e: e.name)
        except OSError:
            continue
        for entry in entries:
            if entry.is_file(follow_symlinks=False) and entry.stat().st_mode & 0o111:
                found.setdefault(kind, []).append({"path": entry.path, "args": [entry.name, kind]})
    return found
