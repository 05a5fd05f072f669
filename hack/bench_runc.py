"""A container in a machine that is booted for it, beside runc."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Iterable
from typing import Any

from bench_common import Progress
from bench_ctr import PHASES, RUNC, Bench, Life
from private_containerd import RUNTIME

AIMS = {"shim_uss_mib": 20.0, "start_over_python": 2.5, "host_cpu_ms": 250.0}


def measure(bench: Bench, runs: int, progress: Progress) -> dict[str, Any]:
    lives: dict[str, list[Life]] = {"kata-py": [], "runc": []}
    bench.configure({})
    # The first of each fills the page cache, and is not counted.
    for number in range(runs + 1):
        for name, runtime in (("kata-py", RUNTIME), ("runc", RUNC)):
            life = bench.life(runtime)
            if number:
                lives[name].append(life)
            progress.say(f"beside runc: {name:8} run {number} of {runs}: {life.whole:.2f} s")
    return summary(lives, bare_python(20))


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


def rows(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    ours, runc = result["kata-py"], result["runc"]
    rows = [("one container, its machine booted", "kata-py", "runc")]
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
    return rows


def plot(result: dict[str, Any], times: Any, memory: Any) -> None:
    """On two of matplotlib's axes."""
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
    times.set_title("one container, its machine booted")
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
