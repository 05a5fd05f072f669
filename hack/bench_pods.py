"""Pods that grow: how soon a vCPU and a DIMM are of use, ten containers in a pod, and what a pod costs.

- hotplug: hack/bench_agent.py, the library in a fresh process: from the request for one vCPU and a DIMM of
  512 MiB to QEMU's last answer, and until the guest uses all of both.
- containers: `ctr run -d` of ten containers into one pod, one after another, each until it runs; without
  limits, and with limits for each of which the machine gets a DIMM. Beside them, ten containers of runc.
- overhead: a pod of the installed configuration's size with a container that has a limit. What all its
  processes take beyond that limit, idle and with the guest's memory in use; and the CPU of the idle pod.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any

from bench_common import Cpu, Progress, memory
from bench_ctr import RUNC, Bench, pod_processes
from bench_factory import SETTLE_S, WAYS, NotMeasured, Ready, agent
from private_containerd import RUNTIME, TEST_IMAGE, ContainerdError

PARTS = ("hotplug", "containers", "overhead")
CONTAINERS = 10
LIMITS = ("--memory-limit", str(128 << 20))
"""Of each of the ten: a block of the guest's memory, so a DIMM. None of CPU: that would slow their start."""
INSTALLED_MIB = 512
"""default_memory of hack/configuration.toml."""
LIMIT_MIB = 256
FILLED = 0.8
"""Of what the guest has to spare; nearer to its end it would look for somebody to kill."""
IDLE_S = 20.0
TIMEOUT_S = 180

Result = dict[str, Any]


def measure(bench: Bench, names: Sequence[str], parts: set[str], runs: int, progress: Progress) -> Result:
    results: dict[str, Result] = {name: {} for name in names if not WAYS[name].cache}
    with ExitStack() as stack:
        ready = []
        for name in results:
            progress.say(f"{name}: set up")
            one = Ready(name, bench.directory)
            try:
                stack.enter_context(one.set_up(bench.directory / f"{name}.log"))
                ready.append(one)
            except NotMeasured as error:
                results[name]["failure"] = str(error)
        if "hotplug" in parts:
            _measure_hotplug(bench, ready, runs, results, progress)
        if "containers" in parts:
            for one in ready:
                bench.configure(one.settings)
                for limits in ((), LIMITS):
                    progress.say(f"containers: {one.name}{', with limits' if limits else ''}")
                    found = _ten(bench, RUNTIME, limits)
                    results[one.name]["with_limits" if limits else "containers"] = found
            progress.say("containers: runc")
            results["runc"] = {"containers": _ten(bench, RUNC, ())}
    if "overhead" in parts:
        for name in list(results):
            if name in WAYS and "failure" not in results[name]:
                progress.say(f"overhead: {name}")
                results[name]["overhead"] = _overhead(bench, name)
    return {"ways": results}


def _measure_hotplug(
    bench: Bench, ready: Sequence[Ready], runs: int, results: dict[str, Result], progress: Progress
) -> None:
    found: dict[str, list[dict[str, float]]] = {one.name: [] for one in ready}
    for number in range(runs + 1):
        for one in ready:
            times = agent(one, "hotplug", bench.new_id())
            if number:
                found[one.name].append(times)
            progress.say(f"hotplug: {one.name} run {number} of {runs}: {1000 * times['online']:.0f} ms")
    for name, each in found.items():
        for step in ("plugged", "online"):
            results[name][f"{step}_s"] = statistics.median(times[step] for times in each)
            results[name][f"{step}_all_s"] = [times[step] for times in each]


def _cri(kind: str, pod: str) -> tuple[str, ...]:
    prefix = "io.kubernetes.cri"
    return (
        *("--annotation", f"{prefix}.container-type={kind}"),
        *("--annotation", f"{prefix}.sandbox-id={pod}"),
    )


def _run(bench: Bench, runtime: str, container_id: str, *options: str) -> float:
    """Seconds until it runs."""
    began = time.monotonic()
    bench.containerd.ctr(
        *("run", "-d", "--runtime", runtime, *options, TEST_IMAGE, container_id, "sleep", "86400"),
        check=True,
        timeout_s=TIMEOUT_S,
    )
    return time.monotonic() - began


def _ten(bench: Bench, runtime: str, limits: Sequence[str]) -> Result:
    pod = bench.new_id()
    started: list[str] = []
    try:
        result: Result = {}
        if runtime == RUNTIME:
            started.append(pod)
            result["pod_s"] = _run(bench, runtime, pod, *_cri("sandbox", pod))
        times = []
        for _ in range(CONTAINERS):
            started.append(bench.new_id())
            joins = _cri("container", pod) if runtime == RUNTIME else ()
            times.append(_run(bench, runtime, started[-1], *joins, *limits))
    except ContainerdError as error:
        return {"failure": str(error)}
    finally:
        _remove(bench, started)
    return {**result, "each_s": statistics.median(times), "all_s": sum(times), "times_s": times}


def _remove(bench: Bench, started: Sequence[str]) -> None:
    for container_id in reversed(started):
        with suppress(Exception):
            bench.remove(container_id)


def _overhead(bench: Bench, name: str) -> Result:
    way = Ready(name, bench.directory)
    bench.configure(
        {
            **way.settings,
            "hypervisor.qemu": {**way.settings["hypervisor.qemu"], "default_memory": INSTALLED_MIB},
        }
    )
    pod = bench.new_id()
    containers = [pod, f"{pod}-limited", f"{pod}-free"]
    joins = _cri("container", pod)
    room = ("--mount", "type=tmpfs,src=tmpfs,dst=/room,options=size=100%")
    try:
        _run(bench, RUNTIME, pod, *_cri("sandbox", pod))
        _run(bench, RUNTIME, containers[1], *joins, "--memory-limit", str(LIMIT_MIB << 20), *room)
        time.sleep(SETTLE_S)
        pids = [pid for kind in pod_processes(pod).values() for pid in kind]
        cpus = [Cpu(pid) for pid in pids]
        before = _used_s(cpus)
        idle_mib = memory(pids)["pss_mib"]
        time.sleep(IDLE_S)
        idle_cpu = (_used_s(cpus) - before) / IDLE_S
        _run(bench, RUNTIME, containers[2], *joins, *room)
        _fill(bench, containers[1], LIMIT_MIB * FILLED)
        _fill(bench, containers[2], FILLED * _spare_mib(bench, containers[2]))
        time.sleep(1)
        full = {kind: memory(found)["pss_mib"] for kind, found in pod_processes(pod).items()}
    except ContainerdError as error:
        return {"failure": str(error)}
    finally:
        _remove(bench, containers)
        way.forget(bench.directory / f"{name}.log")
    return {
        "idle_mib": idle_mib,
        "idle_cpu": idle_cpu,
        "full_mib": sum(full.values()) - LIMIT_MIB,
        "full_of_mib": full,
    }


def _used_s(cpus: Sequence[Cpu]) -> float:
    for cpu in cpus:
        cpu.read()
    return sum(cpu.seconds for cpu in cpus)


def _exec(bench: Bench, container_id: str, script: str) -> str:
    found = bench.containerd.ctr(
        *("tasks", "exec", "--exec-id", f"e{os.urandom(4).hex()}", container_id, "sh", "-c", script),
        check=True,
        timeout_s=TIMEOUT_S,
    )
    return found.stdout


def _spare_mib(bench: Bench, container_id: str) -> float:
    return int(_exec(bench, container_id, "grep MemAvailable /proc/meminfo").split()[1]) / 1024


def _fill(bench: Bench, container_id: str, mib: float) -> None:
    _exec(bench, container_id, f"head -c {mib:.0f}m /dev/zero >/room/filler")


# -- telling


def rows(result: Result) -> list[list[str]]:
    ways: dict[str, Result] = result["ways"]
    labels = [WAYS[name].label if name in WAYS else (name, "") for name in ways]
    rows = [["", *(first for first, _ in labels)], ["", *(second for _, second in labels)]]

    def row(title: str, *keys: str, unit: str = "ms", factor: float = 1000.0) -> None:
        cells = []
        for way in ways.values():
            found: Any = way
            for key in keys:
                found = found.get(key, {}) if isinstance(found, dict) else {}
            cells.append("" if isinstance(found, dict) else f"{factor * found:.0f} {unit}")
        if any(cells):
            rows.append([title, *cells])

    row("1 vCPU and 512 MiB: plugged", "plugged_s")
    row("  online in the guest", "online_s")
    row("pod", "containers", "pod_s")
    row(f"  each of {CONTAINERS} containers", "containers", "each_s")
    row("  all of them", "containers", "all_s")
    row("pod whose containers have a DIMM each", "with_limits", "pod_s")
    row(f"  each of {CONTAINERS} containers", "with_limits", "each_s")
    row("  all of them", "with_limits", "all_s")
    row("overhead of an idle pod: PSS", "overhead", "idle_mib", unit="MiB", factor=1)
    row("  CPU", "overhead", "idle_cpu", unit="m")
    row("overhead of a full one, beyond its limit", "overhead", "full_mib", unit="MiB", factor=1)
    return rows


def failures(result: Result) -> list[str]:
    """What was not measured, and why."""
    found = []
    for name, way in result["ways"].items():
        for part, values in (("", way), *((f" {key}", value) for key, value in way.items())):
            if isinstance(values, dict) and "failure" in values:
                found.append(f"{name}{part}: {values['failure']}")
    return found


def plot(result: Result, times: Any, memory: Any) -> None:
    """On two of matplotlib's axes."""
    ways: dict[str, Result] = result["ways"]
    for name, way in ways.items():
        label = ", ".join(WAYS[name].label) if name in WAYS else name
        for key, style in (("containers", "-"), ("with_limits", ":")):
            each = way.get(key, {}).get("times_s")
            if each:
                text = label if key == "containers" else f"{label}, limits"
                times.plot(
                    range(1, len(each) + 1), [1000 * one for one in each], style, marker=".", label=text
                )
    times.set_xlabel("container of the pod")
    times.set_ylabel("milliseconds")
    times.set_ylim(bottom=0)
    times.set_title("ctr run -d into one pod")
    if times.get_legend_handles_labels()[0]:
        times.legend(fontsize="small")
    names = [name for name, way in ways.items() if "online_s" in way]
    bars = memory.bar(
        ["\n".join(WAYS[name].label) for name in names], [1000 * ways[name]["online_s"] for name in names]
    )
    memory.bar_label(bars, fmt="%.0f", fontsize="small")
    memory.set_ylabel("milliseconds")
    memory.set_title("1 vCPU and 512 MiB, online")
