"""Machines of each factory: how soon their agent answers, how soon a container runs, what a pod costs.

- agent: hack/bench_agent.py, the library in a fresh process, from the decision to make a machine to the first
  answer of its agent; and hack/bench_floor.py, the same without the library.
- first byte: from the start of `ctr run` to the first byte that its container writes.
- memory: of N idle pods, `ctr run -d ... sleep`: the PSS of all their processes, and by how much MemAvailable
  has fallen since there was none; the template and what is in the cache were there before.

The ways take turns, run by run: whatever else the host does meets all of them. Those of a cache come after
the others, for a cache that fills up again is something else that the host does.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_common import Progress, memory, memory_available_mib
from bench_ctr import PHASES, Bench, Life, pod_processes
from private_containerd import REPO, RUNTIME, ContainerdError, write_kata_config

from virtcontainers.errors import KataError
from virtcontainers.factory.grpccache import cache_status

AGENT = REPO / "hack/bench_agent.py"
FLOOR = REPO / "hack/bench_floor.py"
KATA_PY = REPO / ".venv/bin/kata-py"
PODS = (1, 10, 30)
SETTLE_S = 4.0
"""Until idle pods are idle, and the host's counters of free memory are up to date."""
MEMORY_KEPT_MIB = 2048
"""Of the host's, that no pods are started into."""
TIMEOUT_S = 180.0

Result = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """One way to a machine."""

    label: tuple[str, str]
    shared_fs: str = "virtio-9p"
    template: bool = False
    cache: int = 0
    """Machines kept ready."""


WAYS = {
    "direct": Way(("direct", "virtio-9p")),
    "template": Way(("template", "virtio-9p"), template=True),
    "template-virtio-fs": Way(("template", "virtio-fs"), "virtio-fs", template=True),
    "cache": Way(("cache", "virtio-9p"), cache=1),
    "cache-template": Way(("cache + templ.", "virtio-9p"), template=True, cache=1),
}


@dataclass(frozen=True)
class Aim:
    """Met when `found` is at most `bound`; None: not measured."""

    text: str
    bound: float
    found: float | None
    unit: str = ""
    at_least: bool = False

    @property
    def met(self) -> bool:
        assert self.found is not None
        return self.found >= self.bound if self.at_least else self.found <= self.bound

    @property
    def verdict(self) -> str:
        if self.found is None:
            return "not measured"
        off = abs(self.found / self.bound - 1)
        return f"met, by {off:.0%}" if self.met else f"MISSED by {off:.0%}"

    def row(self) -> tuple[str, str, str, str]:
        bound = f"at {'least' if self.at_least else 'most'} {self.bound:g}{self.unit}"
        found = "" if self.found is None else f"{self.found:.3g}{self.unit}"
        return self.text, bound, found, self.verdict


class Ready:
    """A way that is set up: its configuration's file, its template, its cache."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.way = WAYS[name]
        self.config = directory / f"{name}.toml"
        self.template_path = Path(f"/run/vc/vm/bench-{os.getpid()}-{name}")
        self.endpoint = directory / f"{name}.sock"
        factory: dict[str, Any] = {
            "enable_template": self.way.template,
            "template_path": str(self.template_path),
            "vm_cache_number": self.way.cache,
            "vm_cache_endpoint": str(self.endpoint),
        }
        self.settings = {"hypervisor.qemu": {"shared_fs": self.way.shared_fs}, "factory": factory}
        write_kata_config(self.config, self.settings)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "KATA_CONF_FILE": str(self.config)}

    @contextmanager
    def set_up(self, log: Path) -> Iterator[None]:
        """Raises NotMeasured."""
        with ExitStack() as stack:
            stack.callback(self.forget, log)
            if self.way.cache:
                stack.enter_context(self._server(log))
                self.wait_filled()
            elif self.way.template and self._kata_py("factory", "init", log=log):
                raise NotMeasured(f"kata-py factory init failed: {_last_line(log)}")
            yield

    def forget(self, log: Path) -> None:
        """Take its template away."""
        if self.way.template:
            self._kata_py("factory", "destroy", log=log)

    def _kata_py(self, *arguments: str, log: Path) -> int:
        with log.open("ab") as output:
            return subprocess.run(
                [KATA_PY, *arguments], env=self.environment, stdout=output, stderr=output, timeout=TIMEOUT_S
            ).returncode

    @contextmanager
    def _server(self, log: Path) -> Iterator[None]:
        with log.open("ab") as output:
            # Its own session: ctrl-C is for us, who end it when its pods have gone.
            self._cache = subprocess.Popen(
                [KATA_PY, "factory", "init"],
                env=self.environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._cache_log = log
        try:
            yield
        finally:
            self._cache.terminate()
            try:
                self._cache.wait(60)
            except subprocess.TimeoutExpired:
                self._cache.kill()
                self._cache.wait()

    def wait_filled(self) -> None:
        """Return when the cache, if there is one, has all its machines. Raises NotMeasured."""
        if not self.way.cache:
            return
        deadline = time.monotonic() + TIMEOUT_S
        while self._cached() < self.way.cache:
            if self._cache.poll() is not None:
                raise NotMeasured(f"the cache's server ended: {_last_line(self._cache_log)}")
            if time.monotonic() > deadline:
                raise NotMeasured(f"the cache is not full within {TIMEOUT_S:g} s")
            time.sleep(0.1)

    def _cached(self) -> int:
        try:
            return len(asyncio.run(cache_status(self.endpoint)).vmstatus)
        except KataError:
            return 0  # it is not there yet


class NotMeasured(Exception):
    """Why there is no number: the message is for the table's reader."""


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no output"


# -- measuring


def measure(
    bench: Bench, names: Sequence[str], parts: set[str], runs: int, pods: Sequence[int], progress: Progress
) -> Result:
    """`parts`: of agent, first-byte and memory."""
    results: dict[str, Result] = {name: {} for name in names}
    groups = [
        [name for name in names if not WAYS[name].cache],
        *([name] for name in names if WAYS[name].cache),
    ]
    floors: list[dict[str, float]] = []
    for group in groups:
        with ExitStack() as stack:
            ready = []
            for name in group:
                progress.say(f"{name}: set up")
                one = Ready(name, bench.directory)
                try:
                    stack.enter_context(one.set_up(bench.directory / f"{name}.log"))
                    ready.append(one)
                except NotMeasured as error:
                    results[name]["failure"] = str(error)
                    progress.say(f"{name}: not measured: {error}")
            if "agent" in parts:
                _measure_agents(bench, ready, runs, results, floors, progress)
            if "first-byte" in parts:
                _measure_first_bytes(bench, ready, runs, results, progress)
            if "memory" in parts:
                for one in ready:
                    results[one.name]["memory"] = _measure_memory(bench, one, pods, progress)
    floor = {step: statistics.median(one[step] for one in floors) for step in floors[0]} if floors else {}
    return {"ways": results, "floor_s": floor}


def _measure_agents(
    bench: Bench,
    ready: Sequence[Ready],
    runs: int,
    results: dict[str, Result],
    floors: list[dict[str, float]],
    progress: Progress,
) -> None:
    times: dict[str, list[dict[str, float]]] = {one.name: [] for one in ready}
    # The first of each fills the page cache, and is not counted.
    for number in range(runs + 1):
        for one in ready:
            one.wait_filled()
            found = agent(one, "time", bench.new_id())
            if number:
                times[one.name].append(found)
            progress.say(f"agent: {one.name} run {number} of {runs}: {1000 * found['answer']:.0f} ms")
            if one.name == "template":
                steps = floor(one, bench.new_id(), bench.directory)
                if number:
                    floors.append(steps)
                progress.say(f"agent: floor run {number} of {runs}: {1000 * steps['answer']:.0f} ms")
    for name, found_times in times.items():
        for step in ("answer", "ready"):
            values = [found[step] for found in found_times]
            results[name][f"agent_{step}_s"] = statistics.median(values)
            results[name][f"agent_{step}_all_s"] = values


def agent(one: Ready, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = _answer([sys.executable, AGENT, *arguments], environment=one.environment)
    return found


def _answer(command: list[str | Path], *, environment: dict[str, str] | None = None, text: str = "") -> Any:
    """Its JSON. When we are interrupted, it is told, once, and takes its machine with it."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(text, TIMEOUT_S)
    except BaseException:
        process.terminate()
        process.communicate()
        raise
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{errors}")
    return json.loads(output)


def floor(one: Ready, machine_id: str, directory: Path) -> dict[str, float]:
    """Seconds to each step of hack/bench_floor.py."""
    place = directory / machine_id
    place.mkdir()
    plan = agent(one, "plan", machine_id, str(place))
    found: dict[str, float] = _answer(["/usr/bin/python3", FLOOR], text=json.dumps(plan))
    return found


def _measure_first_bytes(
    bench: Bench, ready: Sequence[Ready], runs: int, results: dict[str, Result], progress: Progress
) -> None:
    lives: dict[str, list[Life]] = {one.name: [] for one in ready}
    for number in range(runs + 1):
        for one in ready:
            one.wait_filled()
            bench.configure(one.settings)
            life = bench.life(RUNTIME)
            if number:
                lives[one.name].append(life)
            progress.say(f"first byte: {one.name} run {number} of {runs}: {1000 * life.first_byte:.0f} ms")
    for name, found in lives.items():
        values = [life.first_byte for life in found]
        results[name]["first_byte_s"] = statistics.median(values)
        results[name]["first_byte_all_s"] = values
        if all(life.phases for life in found):
            results[name]["phases_s"] = {
                phase: statistics.median(life.phases[phase] for life in found) for phase in PHASES
            }


def _measure_memory(bench: Bench, one: Ready, pods: Sequence[int], progress: Progress) -> list[Result]:
    """For each number of pods, in MiB: of the host in all, and of a pod."""
    started: list[str] = []
    levels: list[Result] = []
    one.wait_filled()
    time.sleep(SETTLE_S)
    available_mib = memory_available_mib()
    bench.configure(one.settings)
    try:
        for wanted in pods:
            if levels:
                needed = (wanted - len(started)) * levels[-1]["available_per_pod_mib"]
                if memory_available_mib() - needed < MEMORY_KEPT_MIB:
                    levels.append({"pods": wanted, "failure": f"it would take {needed:.0f} MiB more"})
                    break
            while len(started) < wanted:
                one.wait_filled()
                started.append(bench.new_id())
                bench.run_detached(started[-1], "sleep", "86400")
                progress.say(f"memory: {one.name}: pod {len(started)} of {pods[-1]}")
            one.wait_filled()
            time.sleep(SETTLE_S)
            used = Counter[str]()
            for container_id in started:
                for kind, pids in pod_processes(container_id).items():
                    used[kind] += memory(pids)["pss_mib"]  # type: ignore[assignment]
            level: Result = {
                "pods": wanted,
                "pss_per_pod_mib": {kind: mib / wanted for kind, mib in used.items()},
                "available_per_pod_mib": (available_mib - memory_available_mib()) / wanted,
            }
            level["pss_sum_per_pod_mib"] = sum(level["pss_per_pod_mib"].values())
            levels.append(level)
    except ContainerdError as error:
        levels.append({"pods": len(started), "failure": str(error)})
    finally:
        for number, container_id in enumerate(started, 1):
            progress.say(f"memory: {one.name}: removing pod {number} of {len(started)}")
            with suppress(subprocess.TimeoutExpired):
                bench.remove(container_id)
    return levels


# -- telling


def aims(result: Result) -> list[Aim]:
    """The aims, beside what was found."""
    ways, floor_s = result["ways"], result["floor_s"].get("answer")

    def value(way: str, key: str) -> float | None:
        found: float | None = ways.get(way, {}).get(key)
        return found

    def ratio(above: float | None, below: float | None) -> float | None:
        return None if above is None or below is None else above / below

    direct, template = value("direct", "agent_answer_s"), value("template", "agent_answer_s")
    cached = [value(name, "agent_answer_s") for name in ("cache", "cache-template")]
    found = [
        Aim("agent answers: direct / template", 20, ratio(direct, template), at_least=True),
        Aim("agent answers: template / floor", 1.5, ratio(template, floor_s)),
    ]
    for name, seconds in zip(("cache", "cache + template"), cached, strict=True):
        found.append(Aim(f"agent answers: {name}", 50, None if seconds is None else 1000 * seconds, " ms"))
    found.append(
        Aim(
            "ctr run to the first byte: direct / template",
            4,
            ratio(value("direct", "first_byte_s"), value("template", "first_byte_s")),
            at_least=True,
        )
    )
    for key, text in (("pss_sum_per_pod_mib", "PSS"), ("available_per_pod_mib", "MemAvailable")):
        clones, booted = _level(ways.get("template", {}), key), _level(ways.get("direct", {}), key)
        # Others who end meanwhile can give back more than the pods take.
        share = None
        if clones and booted and min(clones[1], booted[1]) > 0:
            share = 100 * clones[1] / booted[1]
        text = f"{text} of a pod: " + (
            f"template, {clones[0]} pods / direct, {booted[0]}" if clones and booted else "template / direct"
        )
        found.append(Aim(text, 25, share, " %"))
    return found


def _level(way: Result, key: str) -> tuple[int, float] | None:
    """The greatest number of pods that was measured, and what one of them costs."""
    levels = [level for level in way.get("memory", []) if key in level]
    return (levels[-1]["pods"], levels[-1][key]) if levels else None


def rows(result: Result) -> list[list[str]]:
    ways: dict[str, Result] = result["ways"]
    rows = [["", *(WAYS[name].label[0] for name in ways), "floor"]]
    rows.append(["", *(WAYS[name].label[1] for name in ways)])

    def row(label: str, cells: Sequence[str]) -> None:
        if any(cells):
            rows.append([label, *cells])

    def ms(seconds: float | None) -> str:
        return "" if seconds is None else f"{1000 * seconds:.0f} ms"

    def mib(value: float | None) -> str:
        return "" if value is None else f"{value:.1f} MiB"

    floor_s = result["floor_s"].get("answer")
    row("agent answers", [*(ms(way.get("agent_answer_s")) for way in ways.values()), ms(floor_s)])
    row("fit for a container", [ms(way.get("agent_ready_s")) for way in ways.values()])
    row("ctr run to the first byte", [ms(way.get("first_byte_s")) for way in ways.values()])
    for phase in PHASES:
        row(f"  {phase}", [ms(way.get("phases_s", {}).get(phase)) for way in ways.values()])
    counts = sorted({level["pods"] for way in ways.values() for level in way.get("memory", [])})
    for pods in counts:
        found: list[Result] = [
            next((level for level in way.get("memory", []) if level["pods"] == pods), {})
            for way in ways.values()
        ]
        title = "1 idle pod" if pods == 1 else f"{pods} idle pods, each"
        row(f"{title}: PSS", [mib(level.get("pss_sum_per_pod_mib")) for level in found])
        for kind in dict.fromkeys(kind for level in found for kind in level.get("pss_per_pod_mib", {})):
            row(f"  {kind}", [mib(level.get("pss_per_pod_mib", {}).get(kind)) for level in found])
        row("  less MemAvailable", [mib(level.get("available_per_pod_mib")) for level in found])
    return rows


def failures(result: Result) -> list[str]:
    """What was not measured, and why."""
    found = []
    for name, way in result["ways"].items():
        if "failure" in way:
            found.append(f"{name}: {way['failure']}")
        found += [
            f"{name}, {level['pods']} pods: {level['failure']}"
            for level in way.get("memory", [])
            if "failure" in level
        ]
    return found


def plot(result: Result, times: Any, memory: Any) -> None:
    """On two of matplotlib's axes."""
    ways: dict[str, Result] = result["ways"]
    labels = ["\n".join(WAYS[name].label) for name in ways]
    for offset, key, label in (
        (-0.2, "agent_answer_s", "agent answers"),
        (0.2, "first_byte_s", "first byte of ctr run"),
    ):
        places = [place + offset for place, way in enumerate(ways.values()) if key in way]
        values = [1000 * way[key] for way in ways.values() if key in way]
        bars = times.bar(places, values, width=0.4, label=label)
        times.bar_label(bars, fmt="%.0f", fontsize="small")
    if floor_s := result["floor_s"].get("answer"):
        times.axhline(1000 * floor_s, color="gray", linestyle="--", label=f"floor: {1000 * floor_s:.0f} ms")
    if any("agent_answer_s" in way or "first_byte_s" in way for way in ways.values()):
        times.set_yscale("log")
        times.legend(fontsize="small")
    times.set_xticks(range(len(labels)), labels, fontsize="small")
    times.set_ylabel("milliseconds")
    times.set_title("one machine")
    for name, way in ways.items():
        levels = [level for level in way.get("memory", []) if "pss_sum_per_pod_mib" in level]
        pods = [level["pods"] for level in levels]
        label = ", ".join(WAYS[name].label)
        line = memory.plot(pods, [level["pss_sum_per_pod_mib"] for level in levels], marker="o", label=label)
        available = [level["available_per_pod_mib"] for level in levels]
        memory.plot(pods, available, marker="x", linestyle=":", color=line[0].get_color())
    memory.set_xlabel("idle pods")
    memory.set_ylabel("MiB a pod")
    memory.set_ylim(bottom=0)
    memory.set_title("PSS; dotted: MemAvailable lost")
    if any("memory" in way for way in ways.values()):
        memory.legend(fontsize="small")
