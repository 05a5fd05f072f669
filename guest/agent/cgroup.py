"""A container's cgroup (v2): what crun is not needed for."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
from collections.abc import Callable

from agent_client.protocols import agent_pb2
from ttrpc import Code, StatusError

CGROUP_PARENT = "/containers"
"""Below the root of the hierarchy; what the host calls the cgroup means nothing in the guest."""

_POLL_S = 0.005
_FREEZE_TIMEOUT_S = 10.0
_UNLIMITED = (1 << 64) - 1


def read_number(path: str) -> int:
    """0 for a file that is not there: a controller may be off. "max" is the largest number."""
    try:
        with open(path) as file:
            text = file.read().strip()
    except OSError:
        return 0
    return _UNLIMITED if text == "max" else int(text or 0)


def read_flat(path: str) -> dict[str, int]:
    """A flat keyed file of the kernel's cgroup-v2 document; empty when it is not there."""
    try:
        with open(path) as file:
            pairs = (line.split() for line in file)
            return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
    except OSError:
        return {}


def read_nested(path: str) -> dict[str, dict[str, int]]:
    """A nested keyed file, like io.stat; empty when it is not there."""
    result: dict[str, dict[str, int]] = {}
    try:
        with open(path) as file:
            for line in file:
                key, *fields = line.split()
                pairs = (field.partition("=") for field in fields)
                result[key] = {name: int(value) for name, _, value in pairs if value.isdigit()}
    except OSError:
        return {}
    return result


class Cgroup:
    """`path` is the one in the file system; it need not exist."""

    def __init__(self, path: str) -> None:
        self.path = path

    def _write(self, name: str, value: str) -> None:
        with open(f"{self.path}/{name}", "w") as file:
            file.write(value)

    def pids(self) -> list[int]:
        try:
            with open(f"{self.path}/cgroup.procs") as file:
                return [int(line) for line in file]
        except OSError:
            return []

    def signal(self, number: int) -> None:
        """Signal every process; SIGKILL misses none, not even one that is being forked."""
        if number == signal.SIGKILL:
            with contextlib.suppress(OSError):
                self._write("cgroup.kill", "1")
                return
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    @property
    def is_populated(self) -> bool:
        return read_flat(f"{self.path}/cgroup.events").get("populated", 0) == 1

    async def set_frozen(self, frozen: bool) -> None:
        """Freeze or thaw, and wait until all processes are. Raises StatusError, thawed again, if not."""
        self._write("cgroup.freeze", "1" if frozen else "0")
        deadline = asyncio.get_running_loop().time() + _FREEZE_TIMEOUT_S
        while read_flat(f"{self.path}/cgroup.events").get("frozen", 0) != int(frozen):
            if asyncio.get_running_loop().time() > deadline:
                self._write("cgroup.freeze", "0")
                raise StatusError(
                    Code.DEADLINE_EXCEEDED,
                    f"the processes in {self.path} could not be frozen in {_FREEZE_TIMEOUT_S:g} s",
                )
            await asyncio.sleep(_POLL_S)

    async def wait_empty(self) -> None:
        while self.is_populated:  # noqa: ASYNC110 - the file's own notice comes no sooner, and takes more code
            await asyncio.sleep(_POLL_S)

    def remove(self) -> None:
        """Remove it and those the container made in it; all must be empty. One that is gone is no error."""
        for path, _, _ in os.walk(self.path, topdown=False):
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(path)

    def stats(self) -> agent_pb2.CgroupStats:
        cpu = read_flat(f"{self.path}/cpu.stat")
        memory = read_flat(f"{self.path}/memory.stat")
        return agent_pb2.CgroupStats(
            cpu_stats=agent_pb2.CpuStats(
                # The kernel counts in microseconds, the protocol in nanoseconds.
                cpu_usage=agent_pb2.CpuUsage(
                    total_usage=cpu.get("usage_usec", 0) * 1000,
                    usage_in_kernelmode=cpu.get("system_usec", 0) * 1000,
                    usage_in_usermode=cpu.get("user_usec", 0) * 1000,
                ),
                throttling_data=agent_pb2.ThrottlingData(
                    periods=cpu.get("nr_periods", 0),
                    throttled_periods=cpu.get("nr_throttled", 0),
                    throttled_time=cpu.get("throttled_usec", 0) * 1000,
                ),
            ),
            memory_stats=agent_pb2.MemoryStats(
                cache=memory.get("file", 0),
                usage=self._memory("memory", self.path),
                swap_usage=self._memory("memory.swap", self.path),
                kernel_usage=agent_pb2.MemoryData(usage=memory.get("kernel", 0)),
                use_hierarchy=True,
                stats=memory,
            ),
            pids_stats=self._pids(),
            blkio_stats=self._blkio(),
            hugetlb_stats=self._hugetlb(),
        )

    @staticmethod
    def _memory(prefix: str, path: str) -> agent_pb2.MemoryData:
        return agent_pb2.MemoryData(
            usage=read_number(f"{path}/{prefix}.current"),
            max_usage=read_number(f"{path}/{prefix}.peak"),
            failcnt=read_flat(f"{path}/{prefix}.events").get("max", 0),
            limit=read_number(f"{path}/{prefix}.max"),
        )

    def _pids(self) -> agent_pb2.PidsStats:
        limit = read_number(f"{self.path}/pids.max")
        return agent_pb2.PidsStats(
            current=read_number(f"{self.path}/pids.current") or len(self.pids()),
            limit=0 if limit == _UNLIMITED else limit,
        )

    def _blkio(self) -> agent_pb2.BlkioStats:
        # Kata's agent puts all of io.stat here, by these names.
        names = {"rbytes": "read", "wbytes": "write"} | {n: n for n in ("rios", "wios", "dbytes", "dios")}
        entries: list[agent_pb2.BlkioStatsEntry] = []
        for device, counters in read_nested(f"{self.path}/io.stat").items():
            major, _, minor = device.partition(":")
            entries += [
                agent_pb2.BlkioStatsEntry(
                    major=int(major), minor=int(minor), op=op, value=counters.get(name, 0)
                )
                for name, op in names.items()
            ]
        return agent_pb2.BlkioStats(io_service_bytes_recursive=entries)

    def _hugetlb(self) -> dict[str, agent_pb2.HugetlbStats]:
        result = {}
        with contextlib.suppress(OSError):
            for name in os.listdir(self.path):
                if name.startswith("hugetlb.") and name.endswith(".current") and ".rsvd." not in name:
                    size = name.removeprefix("hugetlb.").removesuffix(".current")
                    result[size] = agent_pb2.HugetlbStats(
                        usage=read_number(f"{self.path}/{name}"),
                        failcnt=read_flat(f"{self.path}/hugetlb.{size}.events").get("max", 0),
                    )
        return result


class OOMWatcher:
    """Calls back with a container's id when the kernel has killed one of its processes for memory."""

    def __init__(self, on_oom: Callable[[str], None]) -> None:
        self._on_oom = on_oom
        # An epoll of its own: the kernel announces a change of memory.events as EPOLLPRI, which asyncio does
        # not ask for; readable, for which it does, the file is always.
        self._epoll = select.epoll()
        self._files: dict[int, tuple[str, int]] = {}
        asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._changed)

    def add(self, container_id: str, cgroup: Cgroup) -> None:
        """Does nothing where the memory controller is off."""
        with contextlib.suppress(OSError):
            fd = os.open(f"{cgroup.path}/memory.events", os.O_RDONLY | os.O_CLOEXEC)
            self._files[fd] = (container_id, self._kills(fd))
            self._epoll.register(fd, select.EPOLLPRI)

    def check(self, container_id: str) -> None:
        """Call back now if there is cause to: the kernel lets 10 ms pass between two notices, and the process
        it has killed may have ended by then."""
        for fd in self._of(container_id):
            self._look(fd)

    def remove(self, container_id: str) -> None:
        self.check(container_id)
        for fd in self._of(container_id):
            self._forget(fd)

    def _of(self, container_id: str) -> list[int]:
        return [fd for fd, (owner, _) in self._files.items() if owner == container_id]

    def _forget(self, fd: int) -> None:
        del self._files[fd]
        self._epoll.unregister(fd)
        os.close(fd)

    @staticmethod
    def _kills(fd: int) -> int:
        """Reading also arms the next notification."""
        for line in os.pread(fd, 4096, 0).splitlines():
            if line.startswith(b"oom_kill "):
                return int(line.split()[1])
        return 0

    def _changed(self) -> None:
        for fd, _ in self._epoll.poll(0):
            self._look(fd)

    def _look(self, fd: int) -> None:
        container_id, before = self._files[fd]
        try:
            kills = self._kills(fd)
        except OSError:
            # The cgroup is gone.
            self._forget(fd)
            return
        self._files[fd] = (container_id, kills)
        if kills > before:
            self._on_oom(container_id)
