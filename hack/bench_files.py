"""Files of a container's volume by each way into a machine, beside runc's bind mount.

The same folder of the host is bound to /bench: with 9p and virtio-fs it is shared, and as a direct-assigned
volume it is an image file with an ext4, which the machine has as a disk. What was written is on the host when
its time ends (fsync). Before anything is read a machine drops what it has cached itself. The host keeps its
page cache, which runc, QEMU and virtiofsd read from.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_common import MIB, Progress, grouped_bars
from bench_ctr import RUNC, Bench
from bench_factory import KATA_PY, NotMeasured, Ready
from private_containerd import RUNTIME, TEST_IMAGE, ContainerdError

FILE_MIB = 64
FILES = 500
FILE_BYTES = 4096
FOLDERS = 10
IMAGE_MIB = 256
TIMEOUT_S = 600.0
WAYS = {
    "template": ("clone", "virtio-9p"),
    "template-virtio-fs": ("clone", "virtio-fs"),
    "block": ("clone", "block"),
    "runc": ("runc", "bind"),
}
STEPS = {
    "write": f"write {FILE_MIB} MiB",
    "read": f"read {FILE_MIB} MiB",
    "unpack": f"unpack {FILES} files of {FILE_BYTES >> 10} KiB",
    "list": "list them (ls -lR)",
    "read-all": "read them",
    "remove": "remove them",
}

# Times are of the machine's own clock: an exec for each step would be most of the small ones. /machine is a
# second proc, of machines only: a container may not write in its own. The programs are in a tmpfs: from the
# container's root they would be read again after each forget.
_SCRIPT = f"""\
set -e
cp /given/files.tar /bin/busybox /room
mkdir /room/bin
/room/busybox --install -s /room/bin
PATH=/room/bin
cd /bench
timed() {{
    name=$1; shift
    began=$EPOCHREALTIME
    sh -c "$*"
    echo "$name $began $EPOCHREALTIME"
}}
forget() {{ [ ! -e /machine ] || echo 3 >/machine/sys/vm/drop_caches; }}
timed write "dd if=/dev/zero of=big bs=1M count={FILE_MIB} conv=fsync 2>/dev/null"
forget
timed read "dd if=big of=/dev/null bs=1M 2>/dev/null"
rm big
mkdir small
timed unpack "tar -xf /room/files.tar -C small; sync -f small"
forget
timed list "ls -lR small >/dev/null"
forget
timed read-all "cat small/*/* >/dev/null"
timed remove "rm -r small; sync -f ."
"""

Result = dict[str, Any]


def measure(bench: Bench, runs: int, progress: Progress) -> Result:
    given = bench.directory / "given"
    given.mkdir()
    _write_archive(given / "files.tar")
    (given / "steps").write_text(_SCRIPT)
    results: dict[str, Result] = {}
    for name in WAYS:
        progress.say(f"files: {name}")
        try:
            results[name] = _measure_way(bench, name, given, runs, progress)
        except (NotMeasured, ContainerdError, OSError, subprocess.SubprocessError) as error:
            results[name] = {"failure": str(error)}
    return {"ways": results}


def _write_archive(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for number in range(FILES):
            member = tarfile.TarInfo(f"{number % FOLDERS}/{number}")
            member.size = FILE_BYTES
            archive.addfile(member, io.BytesIO(os.urandom(FILE_BYTES)))


def _measure_way(bench: Bench, name: str, given: Path, runs: int, progress: Progress) -> Result:
    with contextlib.ExitStack() as stack:
        if name != "runc":
            ready = Ready("template" if name == "block" else name, bench.directory)
            stack.enter_context(ready.set_up(bench.directory / f"{name}.log"))
            bench.configure(ready.settings)
        volume = bench.directory / f"volume-{name}"
        volume.mkdir()
        if name == "block":
            stack.enter_context(_direct_volume(volume))
        found: dict[str, list[float]] = {step: [] for step in STEPS}
        for number in range(runs + 1):
            times = _run(bench, name, given, volume)
            if number:  # the first has the emulated processor's code translated, and QEMU's in memory
                for step, seconds in times.items():
                    found[step].append(seconds)
            progress.say(f"files: {name} run {number} of {runs}: {sum(times.values()):.2f} s")
    return {step: statistics.median(each) for step, each in found.items()}


@contextlib.contextmanager
def _direct_volume(volume: Path) -> Iterator[None]:
    image = volume.with_suffix(".img")
    image.touch()
    os.truncate(image, IMAGE_MIB * MIB)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    info = {"volume-type": "block", "device": str(image), "fstype": "ext4"}
    command = [str(KATA_PY), "direct-volume"]
    added = [*command, "add", "--volume-path", str(volume), "--mount-info", json.dumps(info)]
    subprocess.run(added, check=True, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        subprocess.run([*command, "remove", "--volume-path", str(volume)], check=True)


def _run(bench: Bench, name: str, given: Path, volume: Path) -> dict[str, float]:
    """Seconds of each step."""
    machine = () if name == "runc" else ("--mount", "type=proc,src=proc,dst=/machine")
    result = bench.containerd.ctr(
        *("run", "--rm", "--runtime", RUNC if name == "runc" else RUNTIME, *machine),
        *("--mount", f"type=bind,src={volume},dst=/bench,options=rbind:rw"),
        *("--mount", f"type=bind,src={given},dst=/given,options=rbind:ro"),
        *("--mount", "type=tmpfs,src=tmpfs,dst=/room,options=size=64m"),
        *(TEST_IMAGE, bench.new_id(), "sh", "/given/steps"),
        check=True,
        timeout_s=TIMEOUT_S,
    )
    times = {}
    for line in result.stdout.splitlines():
        step, began, ended = line.split()
        times[step] = float(ended) - float(began)
    if times.keys() != STEPS.keys():
        raise NotMeasured(f"the container ended early: {result.stdout}{result.stderr}")
    return times


# -- telling


def rows(result: Result) -> list[list[str]]:
    ways: dict[str, Result] = result["ways"]
    rows = [["files", *(WAYS[name][0] for name in ways)], ["", *(WAYS[name][1] for name in ways)]]
    for step, title in STEPS.items():
        rows.append([title, *(f"{1000 * way[step]:.0f} ms" if step in way else "" for way in ways.values())])
    return rows


def plot(result: Result, times: Any, throughput: Any) -> None:
    """On two of matplotlib's axes."""
    ways = {name: way for name, way in result["ways"].items() if "failure" not in way}
    steps = list(STEPS)[2:]
    of_ways = {", ".join(WAYS[name]): [1000 * way[step] for step in steps] for name, way in ways.items()}
    grouped_bars(times, [STEPS[step].partition(" (")[0] for step in steps], of_ways)
    times.tick_params("x", labelsize="small")
    times.set_ylabel("milliseconds")
    times.set_title("small files of a volume")
    if ways:
        times.set_yscale("log")
        times.margins(y=0.2)  # for the legend
        times.legend(fontsize="small", ncols=len(ways), loc="upper right")
    of_steps = {step: [FILE_MIB / way[step] for way in ways.values()] for step in ("write", "read")}
    grouped_bars(throughput, [WAYS[name][1] for name in ways], of_steps)
    throughput.set_ylabel("MiB/s")
    throughput.set_title(f"a file of {FILE_MIB} MiB")
    if ways:
        throughput.set_yscale("log")
        throughput.margins(y=0.2)
        throughput.legend(fontsize="small")
