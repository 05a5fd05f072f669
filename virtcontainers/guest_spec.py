"""The guest's version of a container's OCI spec: the host's business goes, the rest names guest paths.

The rules are Kata's (`constrainGRPCSpec`, `handleShm`, `mountSharedDirMounts` of its Go runtime), so that its
agent gets what it expects.
"""

from __future__ import annotations

import copy
import stat
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from virtcontainers.config import GUEST_SANDBOX_DIR, OCISpec
from virtcontainers.errors import InvalidArgumentError
from virtcontainers.volumes import is_empty_dir

GuestMount = Callable[[dict[str, Any]], dict[str, Any]]
"""A bind mount of a path of the host's -> the guest's mount."""

_DEFAULT_SHM_BYTES = 64 << 20


def guest_spec(
    spec: OCISpec, *, rootfs: str, guest_mount: GuestMount, shm_size_bytes: int, pass_seccomp: bool
) -> tuple[OCISpec, bool]:
    """Return the guest's spec and whether the container joins the sandbox's PID namespace.

    `spec` is not modified. Raises InvalidArgumentError for a bind mount without source, and what
    `guest_mount` raises.
    """
    guest = copy.deepcopy(spec)
    guest["root"] = {**guest.get("root", {}), "path": rootfs}
    # Hooks of the host's life cycle have run on the host; its security labels mean nothing in the guest.
    guest.pop("hooks", None)
    process = guest.get("process")
    if process:
        process.pop("apparmorProfile", None)
        process.pop("selinuxLabel", None)
    guest["mounts"] = [_guest_mount(m, guest_mount, shm_size_bytes) for m in guest.get("mounts", [])]
    linux = guest.setdefault("linux", {})
    linux.pop("mountLabel", None)
    linux.pop("intelRdt", None)
    if not pass_seccomp:
        linux.pop("seccomp", None)
    _constrain_resources(linux.get("resources", {}))
    return guest, _constrain_namespaces(linux)


def _constrain_resources(resources: dict[str, Any]) -> None:
    # Devices and disks have other numbers in the guest, and CPUs and NUMA nodes other names. That all devices
    # are allowed means the same there, of the machine's.
    allows_all_devices = _allows_all_devices(resources.get("devices", []))
    for key in ("devices", "blockIO", "network", "rdma"):
        resources.pop(key, None)
    if allows_all_devices:
        resources["devices"] = [{"allow": True, "type": "a", "access": "rwm"}]
    cpu = resources.get("cpu", {})
    for key in ("cpus", "mems"):
        cpu.pop(key, None)


def _allows_all_devices(rules: list[dict[str, Any]]) -> bool:
    """Whether the last rule for every device, of runtime-spec's `linux.resources.devices`, allows it."""
    for rule in reversed(rules):
        everything = rule.get("type", "a") == "a" and rule.get("major", -1) == rule.get("minor", -1) == -1
        if everything and set("rwm") <= set(rule.get("access", "")):
            return bool(rule["allow"])
    return False


def _constrain_namespaces(linux: dict[str, Any]) -> bool:
    """Network, time and cgroup are the machine's; the agent itself makes the PID namespace, or joins the
    sandbox's when the host's spec named one to join."""
    shared_pidns = False
    kept = []
    for namespace in linux.get("namespaces", []):
        if namespace["type"] == "pid":
            shared_pidns = bool(namespace.get("path"))
        elif namespace["type"] not in ("network", "time", "cgroup"):
            kept.append({"type": namespace["type"]})
    linux["namespaces"] = kept
    return shared_pidns


def _guest_mount(entry: dict[str, Any], guest_mount: GuestMount, shm_size_bytes: int) -> dict[str, Any]:
    destination, source = entry["destination"], entry.get("source", "")
    is_bind = entry.get("type") == "bind" or bool({"bind", "rbind"} & set(entry.get("options") or []))
    if destination == "/dev/shm" and not (is_bind and is_empty_dir(source)):
        return _shm(entry, shm_size_bytes, is_bind=is_bind)
    if not is_bind:
        return entry
    if not source.startswith("/"):
        raise InvalidArgumentError(f"mount {destination}: source {source!r} of a bind mount must be absolute")
    if _is_system_path(source) or _is_host_device(Path(source)):
        return entry
    return guest_mount(entry)


def _shm(entry: dict[str, Any], size_bytes: int, *, is_bind: bool) -> dict[str, Any]:
    """The sandbox's, also where every container has one of its own, as in Kata; unless its own has a size."""
    if not is_bind and any(option.startswith("size=") for option in entry.get("options") or []):
        return entry
    destination = entry["destination"]
    if size_bytes:
        return {
            "destination": destination,
            "type": "bind",
            "source": GUEST_SANDBOX_DIR + "shm",
            "options": ["rbind"],
        }
    options = ["noexec", "nosuid", "nodev", "mode=1777", f"size={_DEFAULT_SHM_BYTES}"]
    return {"destination": destination, "type": "tmpfs", "source": "shm", "options": options}


def _is_system_path(source: str) -> bool:
    """/proc and /sys of the host make no sense in a guest: it binds its own."""
    parts = PurePosixPath(source).parts
    return len(parts) > 1 and parts[1] in ("proc", "sys")


def _is_host_device(source: Path) -> bool:
    """/dev, and all in it that is no regular file: the guest binds its own."""
    if source == Path("/dev"):
        return True
    if not source.is_relative_to("/dev"):
        return False
    try:
        return not stat.S_ISREG(source.stat().st_mode)
    except OSError as error:
        raise InvalidArgumentError(f"bind mount source {source}: {error.strerror}") from error
