"""What a container in a machine of its own costs, beside runc: a table, JSON and a plot in bench-results/.

Everything is taken from outside: clocks around `ctr`, containerd's events, the start of processes as the
kernel has it, and one line of the shim's log. The shim is called through a wrapper that notes when and for
how long.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from private_containerd import REPO, RUNTIME, TEST_IMAGE, Containerd

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
AIMS = {"shim_uss_mib": 20.0, "start_over_python": 2.5, "host_cpu_ms": 250.0}

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
    memory: dict[str, dict[str, float]]
    """Process to its PSS and USS, while the command runs."""
    host_cpu: float
    """Of the shim's three processes: start, the server from its fork to its end, delete."""
    start_wall: float


class Bench:
    """A private containerd whose shim is called through the wrapper."""

    def __init__(self, directory: Path) -> None:
        self._record = directory / "record"
        programs = directory / "bin"
        programs.mkdir()
        wrapper = programs / SHIM
        wrapper.write_text(WRAPPER.format(shim=REPO / ".venv/bin" / SHIM, record=self._record))
        wrapper.chmod(0o755)
        self.containerd = Containerd(root=directory / "root", run=directory / "run", programs=programs)
        self._numbers = itertools.count(1)

    def life(self, runtime: str) -> Life:
        container_id = f"bench-{os.getpid()}-{next(self._numbers)}"
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
                processes = _processes(container_id)
                memory = {name: _memory(pids) for name, pids in processes.items()}
                qemu_start = _start_time(processes["QEMU"][0]) if "QEMU" in processes else 0.0
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
        if runtime == RUNTIME:
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
            memory=memory,
            host_cpu=server.seconds + sum(call.cpu for call in calls),
            start_wall=sum(call.wall for call in calls if call.command == "start"),
        )

    def _calls(self) -> list[Call]:
        found = []
        for line in self._record.read_text().splitlines():
            command, began, wall, user, system = line.split()
            found.append(Call(command, float(began), float(wall), float(user) + float(system)))
        return found


def _processes(container_id: str) -> dict[str, list[int]]:
    """Of each kind, the oldest first: virtiofsd has a child."""
    found: dict[str, list[int]] = {}
    kinds = {"containerd-shim": "shim", "qemu-system": "QEMU", "virtiofsd": "virtiofsd"}
    for pid in sorted(int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            for begins, kind in kinds.items():
                named = any(Path(argument).name.startswith(begins) for argument in arguments[:3])
                if named and any(container_id in argument for argument in arguments):
                    found.setdefault(kind, []).append(pid)
    return found


def _memory(pids: list[int]) -> dict[str, float]:
    kib = collections.Counter[str]()
    for pid in pids:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        kib.update(
            {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+) kB", rollup, re.MULTILINE)}
        )
    return {"pss_mib": kib["Pss"] / 1024, "uss_mib": (kib["Private_Clean"] + kib["Private_Dirty"]) / 1024}


def _start_time(pid: int) -> float:
    """Since the epoch, as exactly as the kernel's clock ticks."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    since_boot = int(after_name[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot


class Cpu:
    """What another process has used, all its threads together, as of the last read."""

    def __init__(self, pid: int) -> None:
        self._stat = Path(f"/proc/{pid}/stat")
        # clock_getcpuclockid(3) in one line: nanoseconds, where /proc has ticks.
        self._clock = (~pid << 3) | 2
        self.seconds = 0.0

    def read(self) -> bool:
        """False once the process has ended."""
        try:
            self.seconds = time.clock_gettime(self._clock)
            return self._stat.read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False


def _epoch(text: str) -> float:
    """Of a time as Go and our log write it; more digits than microseconds are left out."""
    text = re.sub(r"(\.\d{6})\d+", r"\1", text.replace("Z", "+00:00"))
    return datetime.datetime.fromisoformat(text).replace(tzinfo=datetime.UTC).timestamp()


def bare_python(runs: int) -> float:
    """Median seconds of `python3 -c pass`, taken as the wrapper takes those of the shim."""
    script = f"TIMEFORMAT=%R; for i in {{1..{runs}}}; do time /usr/bin/python3 -c pass; done"
    result = subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True)
    return statistics.median(float(line) for line in result.stderr.split())


def summary(lives: dict[str, list[Life]], python: float) -> dict[str, Any]:
    """Medians."""

    def median(values: Iterable[float]) -> float:
        return statistics.median(values)

    result: dict[str, Any] = {}
    for name, of_runtime in lives.items():
        result[name] = {
            "runs": len(of_runtime),
            "first_byte_s": median(life.first_byte for life in of_runtime),
            "whole_s": median(life.whole for life in of_runtime),
            "memory": {
                process: {
                    kind: median(life.memory[process][kind] for life in of_runtime)
                    for kind in ("pss_mib", "uss_mib")
                }
                for process in of_runtime[0].memory
            },
        }
    ours = lives["kata-py"]
    result["kata-py"]["phases_s"] = {name: median(life.phases[name] for life in ours) for name in PHASES}
    result["kata-py"]["host_cpu_ms"] = median(life.host_cpu for life in ours) * 1000
    result["kata-py"]["start_ms"] = median(life.start_wall for life in ours) * 1000
    result["python_ms"] = python * 1000
    result["start_over_python"] = result["kata-py"]["start_ms"] / result["python_ms"]
    return result


def table(result: dict[str, Any]) -> str:
    ours, runc = result["kata-py"], result["runc"]
    rows = [("", "kata-py", "runc")]
    rows.append(
        ("ctr run to the first byte", f"{ours['first_byte_s']:.2f} s", f"{runc['first_byte_s']:.2f} s")
    )
    rows.append(("ctr run to the exit", f"{ours['whole_s']:.2f} s", f"{runc['whole_s']:.2f} s"))
    for name, seconds in ours["phases_s"].items():
        rows.append((f"  {name}", f"{seconds * 1000:.0f} ms", f"{seconds / ours['whole_s']:.0%} of it"))
    for process in ours["memory"]:
        for kind, label in (("pss_mib", "PSS"), ("uss_mib", "USS")):
            other = runc["memory"].get(process, {}).get(kind)
            rows.append(
                (
                    f"{process}, {label}",
                    f"{ours['memory'][process][kind]:.1f} MiB",
                    f"{other:.1f} MiB" if other else "",
                )
            )
    rows.append(
        (
            "shim USS, aim",
            f"{ours['memory']['shim']['uss_mib']:.1f} MiB",
            f"at most {AIMS['shim_uss_mib']:.0f}",
        )
    )
    rows.append(
        (
            "start / python3 -c pass",
            f"{result['start_over_python']:.2f}",
            f"at most {AIMS['start_over_python']}",
        )
    )
    rows.append(
        ("host CPU per container", f"{ours['host_cpu_ms']:.0f} ms", f"under {AIMS['host_cpu_ms']:.0f} ms")
    )
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"{row[0]:{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}" for row in rows)


def plot(result: dict[str, Any], path: Path) -> None:
    # Only where it is wanted: it takes a second to import.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (times, memory) = pyplot.subplots(1, 2, figsize=(13, 4.5), width_ratios=(2, 1))
    left = 0.0
    for name, seconds in result["kata-py"]["phases_s"].items():
        times.barh("kata-py", seconds, left=left, label=f"{name}: {seconds * 1000:.0f} ms")
        left += seconds
    times.barh(
        "runc",
        result["runc"]["whole_s"],
        color="gray",
        label=f"runc: {result['runc']['whole_s'] * 1000:.0f} ms",
    )
    times.set_xlabel("seconds from ctr run to its end")
    times.legend(fontsize="small")
    times.set_title(f"one container, {result['host']['cpus']} CPUs, {result['host']['accelerator']}")
    for position, kind in ((-0.2, "pss_mib"), (0.2, "uss_mib")):
        processes = result["kata-py"]["memory"]
        memory.bar(
            [place + position for place in range(len(processes))],
            [values[kind] for values in processes.values()],
            width=0.4,
            label=kind[:3].upper(),
        )
    memory.set_xticks(range(len(processes)), list(processes))
    memory.set_ylabel("MiB")
    memory.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="?", type=int, default=5, help="of each runtime (5)")
    runs = parser.parse_args().runs
    results = REPO / "bench-results"
    results.mkdir(exist_ok=True)
    lives: dict[str, list[Life]] = {"kata-py": [], "runc": []}
    with tempfile.TemporaryDirectory(prefix="kata-py-bench-") as directory:
        bench = Bench(Path(directory))
        bench.containerd.start()
        try:
            # The first of each fills the page cache, and is not counted.
            for number in range(runs + 1):
                for name, runtime in (("kata-py", RUNTIME), ("runc", RUNC)):
                    life = bench.life(runtime)
                    if number:
                        lives[name].append(life)
                    print(
                        f"  {name:8} run {number} of {runs}: {life.whole:.2f} s", file=sys.stderr, flush=True
                    )
        finally:
            bench.containerd.destroy()
    result = summary(lives, bare_python(20))
    result["host"] = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "accelerator": "KVM" if _kvm() else "TCG",
        "containerd": subprocess.run(
            ["containerd", "--version"], capture_output=True, text=True
        ).stdout.split()[2],
        "qemu": subprocess.run(
            ["qemu-system-x86_64", "--version"], capture_output=True, text=True
        ).stdout.split("\n")[0],
    }
    (results / "bench.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(result, results / "bench.png")
    print(table(result))
    print(f"written: {results}/bench.json, {results}/bench.png")


def _kvm() -> bool:
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return bool(flags and {"vmx", "svm"} & set(flags[1].split()) and os.access("/dev/kvm", os.R_OK | os.W_OK))


if __name__ == "__main__":
    main()
