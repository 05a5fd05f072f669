"""The pod's cgroups on the host, after Kata's `resourcecontrol` and its use in `sandbox.go`.

With `sandbox_cgroup_only` everything of a pod is in its sandbox cgroup, which the engine has sized. Without
it only the vCPUs are; the shim, QEMU's other threads and the daemons are in an overhead cgroup of their own.

Hosts with cgroup v1, also beside v2 (hybrid), get a directory in each v1 hierarchy; hosts with v2 alone one.
There a thread cannot leave its process, so all of QEMU is in the sandbox cgroup, as in Kata.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from virtcontainers.device_cgroup import DeviceRule, DevicesController
from virtcontainers.errors import InvalidArgumentError, KataError

if TYPE_CHECKING:
    from virtcontainers.device_filter import DeviceFilter

log = logging.getLogger(__name__)

KATA_PREFIX = "kata_"
OVERHEAD_ROOT = "/kata_overhead"
DEFAULT_ROOT = "/vc"
"""Above a relative cgroupsPath."""

_V1_CONTROLLERS = frozenset(
    (
        *("cpu", "cpuacct", "cpuset", "memory", "hugetlb", "devices", "freezer", "blkio", "pids"),
        *("perf_event", "net_cls", "net_prio", "rdma"),
    )
)
_NO_MACHINES = frozenset(("hugetlb", "perf_event", "net_cls", "net_prio", "rdma"))
"""What no pod is held to unless its engine, which needs the same rights, has made it a cgroup there."""
_REMOVE_TIMEOUT_S = 10.0
_MAX_CPU = 8191  # of Linux on x86, CONFIG_NR_CPUS


def sandbox_cgroup_path(cgroups_path: str, sandbox_id: str) -> str:
    """Where the pod's cgroup is in each hierarchy, for `linux.cgroupsPath` of its spec ("" for none).

    Raises InvalidArgumentError for one that leaves the hierarchy.
    """
    if ".." in PurePosixPath(cgroups_path).parts:
        raise InvalidArgumentError(f"linux.cgroupsPath: found {cgroups_path!r}, expected no '..' in it")
    match cgroups_path.split(":"):
        case [slice_, prefix, name] if slice_.endswith(".slice"):
            return f"{_expand_slice(slice_)}/{prefix}-{name}.scope"
    path = PurePosixPath(cgroups_path or sandbox_id)
    root = PurePosixPath("/") if path.is_absolute() else PurePosixPath(DEFAULT_ROOT)
    renamed = root / path.parent / f"{KATA_PREFIX}{path.name}"
    return str(renamed)


def _expand_slice(slice_: str) -> str:
    """systemd.slice(5): "a-b.slice" is in "a.slice", which is in "-.slice", the root."""
    if slice_ == "-.slice":
        return ""
    parts = slice_.removesuffix(".slice").split("-")
    return "".join(f"/{'-'.join(parts[: n + 1])}.slice" for n in range(len(parts)))


def overhead_cgroup_path(sandbox_id: str) -> str:
    return f"{OVERHEAD_ROOT}/{sandbox_id}"


@dataclass(frozen=True)
class Hierarchy:
    """A mounted cgroup file system."""

    mount_point: Path
    controllers: frozenset[str]
    """Of v1; empty for v2."""
    home: Path | None = None
    """The cgroup of this process, when it was looked for; None when it is not to be seen here."""

    @property
    def is_v2(self) -> bool:
        return not self.controllers


def find_hierarchies(
    mountinfo: Path = Path("/proc/self/mountinfo"), cgroup: Path = Path("/proc/self/cgroup")
) -> list[Hierarchy]:
    """All of v1 where there is a controller in one, else v2's."""
    own: dict[str, PurePosixPath] = {}
    for line in _lines(cgroup):
        _, names, path = line.split(":", 2)
        own.update(dict.fromkeys(names.split(","), PurePosixPath(path)))
    found: dict[str, Hierarchy] = {}
    unified: list[Hierarchy] = []
    for line in _lines(mountinfo):
        left, _, right = line.partition(" - ")
        _, _, _, root, mount_point, *_ = left.split(" ")
        fstype, _, options = right.split(" ", 2)
        if fstype == "cgroup2":
            home = _home(Path(mount_point), root, own.get(""))
            unified.append(Hierarchy(Path(mount_point), frozenset(), home))
        elif fstype == "cgroup":
            controllers = _V1_CONTROLLERS & frozenset(options.replace(" ", ",").split(","))
            if controllers:  # and not systemd's own
                name = ",".join(sorted(controllers))
                home = _home(Path(mount_point), root, own.get(min(controllers)))
                found.setdefault(name, Hierarchy(Path(mount_point), controllers, home))
    return list(found.values()) or unified[:1]


def _lines(path: Path) -> list[str]:
    """As the kernel joined them: names have whatever else str.splitlines splits at, or is no text."""
    return os.fsdecode(path.read_bytes()).split("\n")[:-1]


def _home(mount_point: Path, root: str, path: PurePosixPath | None) -> Path | None:
    """`root` is the cgroup that is mounted there, which is not the topmost one in some containers."""
    if path is None or ".." in path.parts or not path.is_relative_to(root):
        return None
    return mount_point / path.relative_to(root)


@dataclass(frozen=True)
class ResourceStats:
    """What the processes of a cgroup and of those below it have used."""

    cpu_usec: int = 0
    cpu_user_usec: int = 0
    cpu_system_usec: int = 0
    memory_bytes: int = 0
    """With the page cache that was read or written for them."""
    memory_stat: Mapping[str, int] = field(default_factory=dict)
    """memory.stat, with cgroup v1's names on v1."""
    pids: int = 0
    """Threads count."""

    def __add__(self, other: ResourceStats) -> ResourceStats:
        names = self.memory_stat.keys() | other.memory_stat.keys()
        return ResourceStats(
            self.cpu_usec + other.cpu_usec,
            self.cpu_user_usec + other.cpu_user_usec,
            self.cpu_system_usec + other.cpu_system_usec,
            self.memory_bytes + other.memory_bytes,
            {name: self.memory_stat.get(name, 0) + other.memory_stat.get(name, 0) for name in names},
            self.pids + other.pids,
        )


class ResourceController:
    """One cgroup, in every hierarchy; its path begins with "/". All raise KataError."""

    def __init__(self, path: str, hierarchies: list[Hierarchy] | None = None) -> None:
        self.path = path
        self._hierarchies = find_hierarchies() if hierarchies is None else hierarchies
        self._device_filter: DeviceFilter | None = None
        """Of v2, once it is used: it knows what is allowed."""

    def _directories(self) -> Iterator[tuple[Hierarchy, Path]]:
        for hierarchy in self._hierarchies:
            yield hierarchy, hierarchy.mount_point / self.path.lstrip("/")

    def create(self) -> None:
        """Idempotent. Hierarchies that hold nothing of a machine are left out where nobody may write."""
        for hierarchy, directory in list(self._directories()):
            try:
                _make(hierarchy, directory)
            except OSError as error:
                if hierarchy.is_v2 or not hierarchy.controllers <= _NO_MACHINES:
                    raise KataError(f"cgroup {directory}: {error.strerror}") from error
                log.info("there is no cgroup %s: %s", directory, error.strerror)
                self._hierarchies = [other for other in self._hierarchies if other != hierarchy]

    def add_process(self, pid: int) -> None:
        """With all its threads; children to come are born here."""
        self._write("cgroup.procs", str(pid))

    def add_thread(self, thread_id: int) -> None:
        """v1; on v2 its whole process comes."""
        for hierarchy, directory in self._directories():
            _write(directory / ("cgroup.procs" if hierarchy.is_v2 else "tasks"), str(thread_id))

    def update_cpuset(self, cpus: str, mems: str) -> None:
        """Lists as the kernel's, "0-3,7"; "" leaves what is there."""
        for hierarchy, directory in self._directories():
            if "cpuset" not in hierarchy.controllers and not (directory / "cpuset.cpus").exists():
                continue
            for name, value in (("cpuset.cpus", cpus), ("cpuset.mems", mems)):
                if value:
                    _write(directory / name, value)

    def update_devices(self, rules: Iterable[DeviceRule]) -> None:
        """In their order. What the cgroup above does not allow is not allowed here either."""
        rules = list(rules)
        for controller in self._device_controllers():
            controller.update(rules)

    @contextlib.contextmanager
    def devices_allowed(self, rules: Iterable[DeviceRule]) -> Iterator[None]:
        """So for as long as this lasts; what else is done with devices meanwhile has to end within it."""
        rules = list(rules)
        with contextlib.ExitStack() as undo:
            for controller in self._device_controllers() if rules else ():
                undo.enter_context(controller.allowed(rules))
            yield

    def _device_controllers(self) -> Iterator[DevicesController | DeviceFilter]:
        for hierarchy, directory in self._directories():
            if "devices" in hierarchy.controllers:
                yield DevicesController(directory)
            elif hierarchy.is_v2:
                if self._device_filter is None:
                    from virtcontainers.device_filter import DeviceFilter

                    self._device_filter = DeviceFilter(directory)
                yield self._device_filter

    def _write(self, name: str, text: str) -> None:
        for _, directory in self._directories():
            _write(directory / name, text)

    def pids(self) -> set[int]:
        """Of the processes that have a thread in it."""
        found: set[int] = set()
        for _, directory in self._directories():
            with contextlib.suppress(OSError):
                found.update(int(pid) for pid in (directory / "cgroup.procs").read_text().split())
        return found

    def stat(self) -> ResourceStats:
        """Of what the host does not count: 0."""
        total = ResourceStats()
        for hierarchy, directory in self._directories():
            total += _stat_v2(directory) if hierarchy.is_v2 else _stat_v1(hierarchy, directory)
        return total

    def delete(self) -> None:
        """Remove it; whoever is still in it goes where this process came from, or to its parent. Idempotent,
        in any process."""
        if self._device_filter is not None:
            self._device_filter.close()
            self._device_filter = None
        for hierarchy, directory in self._directories():
            deadline = time.monotonic() + _REMOVE_TIMEOUT_S
            while True:
                _move_out(hierarchy, directory)
                try:
                    directory.rmdir()
                except FileNotFoundError:
                    pass
                except OSError as error:
                    # A process that was just killed is in it until it is reaped.
                    if error.errno == errno.EBUSY and time.monotonic() < deadline:
                        time.sleep(0.005)
                        continue
                    raise KataError(f"cgroup {directory}: {error.strerror}") from error
                break


def _make(hierarchy: Hierarchy, directory: Path) -> None:
    # Of cpusets one that is there may have been made by another pod just now, which has still to fill it.
    is_filled = "cpuset" not in hierarchy.controllers
    if directory == hierarchy.mount_point or (is_filled and directory.is_dir()):
        return
    _make(hierarchy, directory.parent)
    if hierarchy.is_v2:
        # What the parent cannot give, because of processes in it, is only not counted.
        for controller in (directory.parent / "cgroup.controllers").read_text().split():
            with contextlib.suppress(OSError):
                (directory.parent / "cgroup.subtree_control").write_text(f"+{controller}")
    with contextlib.suppress(FileExistsError):
        directory.mkdir()
    if "cpuset" in hierarchy.controllers:
        # Born empty, and then nobody may enter.
        for name in ("cpuset.cpus", "cpuset.mems"):
            if not (directory / name).read_text().strip():
                (directory / name).write_text((directory.parent / name).read_text())


def _move_out(hierarchy: Hierarchy, directory: Path) -> None:
    places = [*([hierarchy.home] if hierarchy.home else []), *directory.parents]
    # v2: processes are in the leaves, and in the root unless that is a namespace's.
    places = [
        place
        for place in places
        if place.is_relative_to(hierarchy.mount_point) and not place.is_relative_to(directory)
    ]
    for name in ("cgroup.procs", "tasks"):  # v1 has both: a thread's process may be elsewhere
        with contextlib.suppress(OSError):
            for id_ in (directory / name).read_text().split():
                _move(id_, [place / name for place in places])


def _move(id_: str, files: Iterable[Path]) -> None:
    """Into the first that takes it."""
    for file in files:
        try:
            file.write_text(id_)
        except ProcessLookupError:
            return
        except OSError:
            continue
        return


def _stat_v1(hierarchy: Hierarchy, directory: Path) -> ResourceStats:
    cpuacct, memory = "cpuacct" in hierarchy.controllers, "memory" in hierarchy.controllers
    return ResourceStats(
        cpu_usec=_number(directory / "cpuacct.usage") // 1000 if cpuacct else 0,
        cpu_user_usec=_number(directory / "cpuacct.usage_user") // 1000 if cpuacct else 0,
        cpu_system_usec=_number(directory / "cpuacct.usage_sys") // 1000 if cpuacct else 0,
        memory_bytes=_number(directory / "memory.usage_in_bytes") if memory else 0,
        # The other names are without the cgroups below.
        memory_stat={
            name.removeprefix("total_"): value
            for name, value in (_numbers(directory / "memory.stat") if memory else {}).items()
            if name.startswith("total_")
        },
        pids=_number(directory / "pids.current") if "pids" in hierarchy.controllers else 0,
    )


def _stat_v2(directory: Path) -> ResourceStats:
    cpu = _numbers(directory / "cpu.stat")
    return ResourceStats(
        cpu_usec=cpu.get("usage_usec", 0),
        cpu_user_usec=cpu.get("user_usec", 0),
        cpu_system_usec=cpu.get("system_usec", 0),
        memory_bytes=_number(directory / "memory.current"),
        memory_stat=_numbers(directory / "memory.stat"),
        pids=_number(directory / "pids.current"),
    )


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except OSError:
        return 0


def _numbers(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    return {name: int(value) for name, _, value in (line.partition(" ") for line in lines)}


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except ProcessLookupError:
        pass  # it has ended
    except OSError as error:
        raise KataError(f"{path}: {text!r} is refused: {error.strerror}") from error


def parse_cpus(text: str) -> list[int]:
    """ "0-2,7" as [0, 1, 2, 7]. Raises InvalidArgumentError."""
    cpus: list[int] = []
    try:
        for part in filter(None, text.strip().split(",")):
            first, _, last = part.partition("-")
            if int(last or first) > _MAX_CPU:
                raise ValueError
            cpus += range(int(first), int(last or first) + 1)
    except ValueError:
        raise InvalidArgumentError(f"cpuset: found {text!r}, expected a list such as 0-3,7") from None
    return cpus


def pin_thread(thread_id: int, cpus: list[int]) -> None:
    """Raises KataError."""
    try:
        os.sched_setaffinity(thread_id, cpus)
    except ProcessLookupError:
        pass
    except (OSError, ValueError) as error:
        raise KataError(f"thread {thread_id} is not bound to CPUs {cpus}: {error}") from error


class PodCgroups:
    """The cgroups of one pod."""

    def __init__(self, sandbox_id: str, cgroups_path: str, *, sandbox_cgroup_only: bool) -> None:
        hierarchies = find_hierarchies()
        self.sandbox = ResourceController(sandbox_cgroup_path(cgroups_path, sandbox_id), hierarchies)
        self.overhead: ResourceController | None = None
        if not sandbox_cgroup_only:
            self.overhead = ResourceController(overhead_cgroup_path(sandbox_id), hierarchies)

    @property
    def paths(self) -> list[str]:
        """What `ResourceController.delete` needs to undo it all in another process."""
        return [self.sandbox.path, *([self.overhead.path] if self.overhead else [])]

    def enter(self, devices: Iterable[DeviceRule]) -> None:
        """Make them, and put this process where all that it starts from now on is to be."""
        self.sandbox.create()
        self.sandbox.update_devices(devices)
        if self.overhead is not None:
            self.overhead.create()
        self.add_processes([os.getpid()])

    def add_processes(self, pids: Iterable[int]) -> None:
        """Put those there, too, that this process has not started. Raises KataError."""
        for pid in pids:
            (self.overhead or self.sandbox).add_process(pid)

    def constrain(self, vcpu_threads: list[int]) -> None:
        """The threads that run the guest go where the pod's limits are."""
        if self.overhead is not None:
            for thread_id in vcpu_threads:
                self.sandbox.add_thread(thread_id)

    def stat(self) -> ResourceStats:
        """Of all that the pod is on the host."""
        return self.sandbox.stat() + (self.overhead.stat() if self.overhead else ResourceStats())

    def delete(self) -> None:
        """Idempotent; this process goes back where it came from. Raises KataError, with both tried."""
        with contextlib.ExitStack() as rest:
            rest.callback(self.sandbox.delete)
            if self.overhead is not None:
                rest.callback(self.overhead.delete)
