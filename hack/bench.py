"""What machines and containers cost, measured in one run: a table, JSON and a plot in bench-results/.

A container beside runc, the machines of every factory, pods that grow, and a pod's network and files beside
runc's; hack/bench_*.py say how. Times of different runs do not compare, those of one run do.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import bench_factory
import bench_files
import bench_network
import bench_pods
import bench_runc
from bench_common import Progress, lined_up
from bench_ctr import Bench
from private_containerd import REPO

RESULTS = REPO / "bench-results"
FACTORY_PARTS = ("agent", "first-byte", "memory")
PARTS = ("runc", *FACTORY_PARTS, *bench_pods.PARTS, "network", "files")
BUSY = 0.5
"""Processes that want to run, per CPU, before the benchmark starts any."""
QUICK_RUNS = 2
QUICK_PODS = (3,)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="hack/bench.sh", description=__doc__)
    parser.add_argument("--runs", type=int, help=f"of each measurement (10; with --quick {QUICK_RUNS})")
    parser.add_argument(
        "--pods",
        type=lambda text: tuple(sorted({int(word) for word in text.split(",")})),
        metavar="N,N",
        help=f"idle pods ({_list(bench_factory.PODS)}; with --quick {_list(QUICK_PODS)})",
    )
    parser.add_argument("--quick", action="store_true", help="some ten minutes, for a first look")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts")
    parser.add_argument(
        "--ways", nargs="+", choices=bench_factory.WAYS, default=list(bench_factory.WAYS), help="these ways"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of bench.json and bench.png")
    options = parser.parse_args(arguments)
    options.runs = options.runs or (QUICK_RUNS if options.quick else 10)
    options.pods = options.pods or (QUICK_PODS if options.quick else bench_factory.PODS)
    if options.runs < 1 or options.pods[0] < 1:
        parser.error("--runs and --pods: expected numbers above 0")
    return options


def _list(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


def report(result: dict[str, Any]) -> str:
    parts = []
    if "runc" in result:
        parts.append(lined_up(bench_runc.rows(result["runc"])))
    if "factory" in result:
        factory = result["factory"]
        parts.append(lined_up(bench_factory.rows(factory)))
        measured = [aim.row() for aim in bench_factory.aims(factory)]
        parts.append(lined_up([("aim", "", "found", ""), *measured]))
        if failures := bench_factory.failures(factory):
            parts.append(_not_measured(failures))
    for name, part in (("pods", bench_pods), ("network", bench_network), ("files", bench_files)):
        if name in result:
            parts.append(lined_up(part.rows(result[name])))
            if failures := bench_pods.failures(result[name]):
                parts.append(_not_measured(failures))
    host = result["host"]
    load = ", ".join(
        f"{host[key][0]:.1f} {when}" for key, when in (("load", "before"), ("load_after", "after"))
    )
    parts.append(
        f"{host['cpus']} CPUs, {host['accelerator']}, {host['qemu']}; medians of {result['runs']} runs; "
        f"machines of 256 MiB; load {load}"
    )
    if host["load"][0] > host["cpus"] * BUSY:
        parts[-1] += "\nThe host was busy with something else: ratios may do, times and MemAvailable do not."
    return "\n\n".join(parts)


def _not_measured(failures: list[str]) -> str:
    """The first line of each: what is left, such as containerd's log, is in the JSON."""
    return "\n".join(["not measured:", *(f"  {failure.partition(chr(10))[0]}" for failure in failures)])


def plot(result: dict[str, Any], path: Path) -> None:
    # Only where it is wanted: it takes a second to import.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = [
        (part, name)
        for part, name in (
            (bench_runc, "runc"),
            (bench_factory, "factory"),
            (bench_pods, "pods"),
            (bench_network, "network"),
            (bench_files, "files"),
        )
        if name in result
    ]
    figure, axes = pyplot.subplots(
        len(parts), 2, figsize=(13, 4.5 * len(parts)), width_ratios=(2, 1), squeeze=False
    )
    for (part, name), (left, right) in zip(parts, axes, strict=True):
        part.plot(result[name], left, right)
    host = result["host"]
    figure.suptitle(f"{host['cpus']} CPUs, {host['accelerator']}, {host['qemu']}", fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"runs": options.runs, "host": _host()}
    progress = Progress()
    with tempfile.TemporaryDirectory(prefix="kata-py-bench-") as directory:
        bench = Bench(Path(directory))
        try:
            bench.containerd.start()
            if "runc" in options.only:
                result["runc"] = bench_runc.measure(bench, options.runs, progress)
            if parts := set(FACTORY_PARTS).intersection(options.only):
                result["factory"] = bench_factory.measure(
                    bench, options.ways, parts, options.runs, options.pods, progress
                )
            if parts := set(bench_pods.PARTS).intersection(options.only):
                result["pods"] = bench_pods.measure(bench, options.ways, parts, options.runs, progress)
            if "network" in options.only:
                result["network"] = bench_network.measure(bench, options.runs, progress)
            if "files" in options.only:
                result["files"] = bench_files.measure(bench, options.runs, progress)
        finally:
            progress.close()
            bench.containerd.destroy()
    result["host"]["load_after"] = os.getloadavg()
    return result


def _host() -> dict[str, Any]:
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg(),
        "accelerator": "KVM" if _kvm() else "TCG",
        "containerd": subprocess.run(
            ["containerd", "--version"], capture_output=True, text=True
        ).stdout.split()[2],
        "qemu": subprocess.run(
            ["qemu-system-x86_64", "--version"], capture_output=True, text=True
        ).stdout.split("\n")[0],
    }


def _kvm() -> bool:
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return bool(flags and {"vmx", "svm"} & set(flags[1].split()) and os.access("/dev/kvm", os.R_OK | os.W_OK))


def main() -> None:
    options = parse()

    def interrupt(number: int, frame: object) -> None:
        # Who presses ctrl-C twice wants it to end sooner, and not to find its machines tomorrow.
        for other in (signal.SIGINT, signal.SIGTERM):
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        result = measure(options)
    except KeyboardInterrupt:
        raise SystemExit("interrupted: nothing was written, and nothing is left running") from None
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "bench.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(result, options.output / "bench.png")
    print(report(result))
    print(f"written: {options.output}/bench.json, {options.output}/bench.png")


if __name__ == "__main__":
    main()
