"""One `ctr run --rm`, seen from outside: clocks, containerd's events, the kernel's times, the shim's log."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from bench_common import Cpu, memory, start_time
from private_containerd import REPO, RUNTIME, TEST_IMAGE, Containerd, Settings, write_kata_config

from virtcontainers import persist
from virtcontainers.errors import NotFoundError
from virtcontainers.hypervisor.process import find_processes

SHIM = "containerd-shim-kata-py-v2"
RUNC = "io.containerd.runc.v2"
PHASES = (
    "containerd, before the shim",
    "shim start",
    "shim, before QEMU",
    "QEMU to agent",
    "agent: create",
    "agent: start, to the first byte",
    "exit and removal",
)

WRAPPER = """#!/bin/bash
command=other
for word; do case $word in start | delete) command=$word ;; esac; done
TIMEFORMAT="$command $EPOCHREALTIME %R %U %S"
# containerd waits until nobody holds its ends of start's pipes: the server must not get a third one.
{{ time {shim} "$@" 2>&3 3>&-; }} 3>&2 2>>{record}
"""


@dataclass(frozen=True)
class Call:
    """One call of the shim's program, as the wrapper saw it; seconds, `began` since the epoch."""

    command: str
    began: float
    wall: float
    cpu: float


@dataclass(frozen=True)
class Life:
    """Of one `ctr run --rm`: seconds, MiB."""

    first_byte: float
    whole: float
    """To the first byte, and from the end of the command's input to the end of ctr."""
    phases: dict[str, float]
    """Empty with runc, and where the machine was there before the container."""
    memory: dict[str, dict[str, float]]
    """Process to its PSS and USS, while the command runs."""
    host_cpu: float
    """Of the shim's three processes: start, the server from its fork to its end, delete."""
    start_wall: float


class Bench:
    """A private containerd whose shim is called through the wrapper."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._record = directory / "record"
        programs = directory / "bin"
        programs.mkdir()
        wrapper = programs / SHIM
        wrapper.write_text(WRAPPER.format(shim=REPO / ".venv/bin" / SHIM, record=self._record))
        wrapper.chmod(0o755)
        self.containerd = Containerd(root=directory / "root", run=directory / "run", programs=programs)
        self._numbers = itertools.count(1)

    def new_id(self) -> str:
        return f"bench-{os.getpid()}-{next(self._numbers)}"

    def configure(self, settings: Settings) -> None:
        """For the pods from now on."""
        write_kata_config(self.containerd.kata_config, settings)

    def run_detached(self, container_id: str, *command: str) -> None:
        """`ctr run -d` with kata-py."""
        self.containerd.ctr(
            "run", "-d", "--runtime", RUNTIME, TEST_IMAGE, container_id, *command, check=True, timeout_s=180
        )

    def remove(self, container_id: str) -> None:
        """Whatever there is of it."""
        self.containerd.ctr("tasks", "rm", "-f", container_id)
        self.containerd.ctr("containers", "rm", container_id)

    def life(self, runtime: str) -> Life:
        container_id = self.new_id()
        self._record.write_text("")
        logged_before = self.containerd.log.stat().st_size
        with tempfile.TemporaryFile("w+") as events_file:
            listener = subprocess.Popen(self.containerd.ctr_command("events"), stdout=events_file)
            try:
                began = time.time()
                process = subprocess.Popen(
                    self.containerd.ctr_command(
                        *("run", "--rm", "--runtime", runtime, TEST_IMAGE, container_id),
                        *("sh", "-c", "echo first; cat"),
                    ),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
                assert process.stdin and process.stdout
                output = process.stdout.read(1)
                first_byte = time.time()
                if output != b"f":
                    raise SystemExit(f"ctr run failed:\n{self.containerd.log_tail()}")
                processes = pod_processes(container_id)
                used = {name: memory(pids) for name, pids in processes.items()}
                qemu_start = start_time(processes["QEMU"][0]) if "QEMU" in processes else 0.0
                closed = time.time()
                process.stdin.close()
                server = Cpu(processes["shim"][0])
                while process.poll() is None:
                    server.read()
                    time.sleep(0.001)
                ended = time.time()
                while server.read():
                    time.sleep(0.001)
            finally:
                listener.kill()
                listener.wait()
            events_file.seek(0)
            events = events_file.read()
        calls = self._calls()
        phases = {}
        if qemu_start > began:
            with self.containerd.log.open(errors="replace") as log:
                log.seek(logged_before)
                connected = re.findall(r'time="?([0-9T:.+Z-]+)"?.*connected to the agent', log.read())
            start = next(call for call in calls if call.command == "start")
            created = re.findall(rf"(\S+ \S+) \S+ \S+ \S+ /tasks/create .*{re.escape(container_id)}", events)
            marks = [
                *(began, start.began, start.began + start.wall, qemu_start),
                *(_epoch(connected[-1]), _epoch(created[-1]), first_byte),
            ]
            phases = {
                name: after - before for name, (before, after) in zip(PHASES, pairwise(marks), strict=False)
            }
            phases[PHASES[-1]] = ended - closed
        return Life(
            first_byte=first_byte - began,
            whole=first_byte - began + ended - closed,
            phases=phases,
            memory=used,
            host_cpu=server.seconds + sum(call.cpu for call in calls),
            start_wall=sum(call.wall for call in calls if call.command == "start"),
        )

    def _calls(self) -> list[Call]:
        found = []
        for line in self._record.read_text().splitlines():
            command, began, wall, user, system = line.split()
            found.append(Call(command, float(began), float(wall), float(user) + float(system)))
        return found


def pod_processes(container_id: str) -> dict[str, list[int]]:
    """Of each kind, the oldest first: virtiofsd has a child."""
    try:
        state = persist.load(container_id)
    except NotFoundError:
        return {"shim": _shims_of(container_id)}
    found = {"shim": [state.shim_pid]}
    # Not by QEMU's command line: one from the cache was named before its pod.
    for pid in sorted(find_processes(Path(state.hypervisor["directory"]))):
        name = Path(f"/proc/{pid}/comm").read_text().strip()
        found.setdefault("QEMU" if name.startswith("qemu-system") else name, []).append(pid)
    return found


def _shims_of(container_id: str) -> list[int]:
    found = []
    for pid in sorted(int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            named = any(Path(argument).name.startswith("containerd-shim") for argument in arguments[:3])
            if named and container_id in arguments:
                found.append(pid)
    return found


def _epoch(text: str) -> float:
    """Of a time as Go and our log write it; more digits than microseconds are left out."""
    text = re.sub(r"(\.\d{6})\d+", r"\1", text.replace("Z", "+00:00"))
    return datetime.datetime.fromisoformat(text).replace(tzinfo=datetime.UTC).timestamp()
