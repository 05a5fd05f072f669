"""What of this host a container may touch, as sets that can be compared before and after.

Where things carry the id of their pod, only those of this test run count: others may use the machine
meanwhile. What carries no id is compared as a whole.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass, fields
from pathlib import Path

from private_cri import BRIDGE_PREFIX

RUN = os.urandom(3).hex()
"""Of this run of tests; pids are of a namespace, and cgroups of the host."""

own_ids = {f"-{RUN}-"}
"""In the ids of all containers and pods of this test run: `harness.new_id`'s, and the CRI plugin's."""

own_directories: set[Path] = set()
"""Of this test run: a template in one of them is its own, too."""

PER_POD = re.compile(
    r"/run/vc/(sbs|vm)/."
    r"|/run/kata-containers/shared/sandboxes/."
    r"|/run/containerd/(fifo|runc/[^/]+)/."
)
"""Below these everything belongs to one pod, which the path names."""

ROOTS = ("/run/vc", "/run/kata-containers", "/run/containerd", "/run/netns", "/dev/shm")

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


def _is_own(text: str) -> bool:
    return any(own in text for own in own_ids)


def look(state_directories: frozenset[Path] = frozenset()) -> HostState:
    """`state_directories`: of containerds whose bundles count as well."""
    sockets = _unix_sockets()
    ports = {port.name for port in Path("/sys/class/net").glob(f"{BRIDGE_PREFIX}*/brif/*")}
    links = {link.name for link in Path("/sys/class/net").iterdir()} - ports
    return HostState(
        processes=frozenset(_processes()),
        mounts=frozenset(_mounts()),
        # The bridges of private containerds, and what is plugged into them, come and go with these.
        network_links=frozenset(link for link in links if not link.startswith(BRIDGE_PREFIX)),
        cgroups=frozenset(name for name, _, _ in os.walk("/sys/fs/cgroup") if _is_own(name)),
        unix_sockets=frozenset(path for path in sockets if _is_own(path)),
        paths=frozenset(path for root in ROOTS for path in _below(root, sockets)) - PERMANENT,
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
        if _is_own(arguments):
            found.append(f"{entry.name} {arguments[:300]}")
    return found


def _mounts() -> list[str]:
    mounts = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, right = line.split(" - ")
        point, (kind, source) = left.split()[4], right.split()[:2]
        is_template = source == "kata-py-template" and not own_directories.isdisjoint(Path(point).parents)
        if is_template or _is_own(point):
            mounts.append(f"{kind} on {point}")
    return mounts


def _unix_sockets() -> set[str]:
    """Paths that somebody holds."""
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    return {"".join(line.split(maxsplit=7)[7:]) for line in lines}


def _below(root: str, sockets: set[str]) -> list[str]:
    mount_points = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    found = []
    for directory, names, files in os.walk(root):
        for path in (f"{directory}/{name}" for name in names + files):
            # A shim's socket has a hash for its name: it is left behind when its shim is not there any more.
            others = PER_POD.match(path) and not _is_own(path)
            if not others and not (directory == "/run/containerd/s" and path in sockets):
                found.append(path)
        # What is in a mount belongs to the mount, which is counted itself.
        names[:] = [name for name in names if f"{directory}/{name}" not in mount_points]
    return found
