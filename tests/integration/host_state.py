"""What of this host a container may touch, as sets that can be compared before and after."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass, fields
from pathlib import Path

ROOTS = ("/run/vc", "/run/kata-containers", "/run/containerd", "/dev/shm", "/run/netns")
"""Everything below counts: state, sockets, shares, stdio's fifos, memory files, network namespaces."""

OURS = ("/run/vc/", "/run/kata-containers/", "containerd-shim")
"""A process belongs to a container when its command line has one of these."""

SOCKETS = ("/run/containerd/", *OURS)

PERMANENT = frozenset(
    (
        "/run/vc/sbs",
        "/run/vc/vm",
        "/run/kata-containers/shared",
        "/run/kata-containers/shared/sandboxes",
        "/run/containerd/s",
        "/run/containerd/fifo",
        "/run/containerd/runc",
        "/run/containerd/runc/default",
    )
)
"""Directories of all pods together: the first one makes them, none removes them."""


@dataclass(frozen=True)
class HostState:
    processes: frozenset[str]
    mounts: frozenset[str]
    network_links: frozenset[str]
    cgroups: frozenset[str]
    unix_sockets: frozenset[str]
    paths: frozenset[str]
    bundles: frozenset[str]

    def differences(self, earlier: HostState) -> str:
        """Empty when nothing was left behind and nothing taken away; else a line for each thing."""
        lines = []
        for name in (field.name for field in fields(self)):
            was, now = getattr(earlier, name), getattr(self, name)
            for what, items in (("left behind", now - was), ("gone", was - now)):
                # A directory stands for all in it.
                top = [item for item in sorted(items) if item.rpartition("/")[0] not in items]
                lines += [f"  {name.replace('_', ' ')}: {what}: {item}" for item in top]
        return "\n".join(lines)


def look(state_directories: frozenset[Path] = frozenset()) -> HostState:
    """`state_directories`: of containerds whose bundles count as well."""
    return HostState(
        processes=frozenset(_processes()),
        mounts=frozenset(_mounts()),
        network_links=frozenset(link.name for link in Path("/sys/class/net").iterdir()),
        cgroups=frozenset(_cgroups()),
        unix_sockets=frozenset(_unix_sockets()),
        paths=frozenset(path for root in ROOTS for path in _below(root)) - PERMANENT,
        bundles=frozenset(
            str(bundle)
            for state in state_directories
            for bundle in state.glob("io.containerd.runtime.v2.task/*/*")
        ),
    )


def differences_after(earlier: HostState, state_directories: frozenset[Path], timeout_s: float) -> str:
    """Looks until all is as before or the time is over: containerd and the kernel take theirs to end."""
    deadline = time.monotonic() + timeout_s
    while True:
        differences = look(state_directories).differences(earlier)
        if not differences or time.monotonic() > deadline:
            return differences
        time.sleep(0.1)


def _processes() -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            arguments = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if any(part in arguments for part in OURS):
            found.append(f"{entry.name} {arguments[:300]}")
    return found


def _mounts() -> list[str]:
    mounts = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, right = line.split(" - ")
        mounts.append(f"{right.split()[0]} on {left.split()[4]}")
    return mounts


def _cgroups() -> list[str]:
    # Services, users and whoever runs the tests have theirs, which come and go: ours are known by name.
    ours = re.compile(rf"/default/|/k8s\.io/|-{os.getpid()}-|/kata|/vc")
    return [directory for directory, _, _ in os.walk("/sys/fs/cgroup") if ours.search(directory)]


def _unix_sockets() -> list[str]:
    paths = []
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        name = "".join(line.split(maxsplit=7)[7:])
        if any(part in name for part in SOCKETS):
            paths.append(name)
    return paths


def _below(root: str) -> list[str]:
    mount_points = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    found = []
    for directory, names, files in os.walk(root):
        found += [f"{directory}/{name}" for name in names + files]
        # What is in a mount belongs to the mount, which is counted itself.
        names[:] = [name for name in names if f"{directory}/{name}" not in mount_points]
    return found
