"""What the parts of the benchmark share: progress, tables, and the kernel's view of processes."""

from __future__ import annotations

import collections
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MIB = 1 << 20


class Progress:
    """On a terminal one line that changes, elsewhere a line a step; on stderr, the table has stdout."""

    def __init__(self) -> None:
        self._changes = sys.stderr.isatty()
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        line = f"{time.monotonic() - self._began:5.0f} s  {text}"
        if self._changes:
            width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            sys.stderr.write(f"\r\x1b[K{line[: width - 1]}")
        else:
            sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    def close(self) -> None:
        if self._changes:
            sys.stderr.write("\r\x1b[K")


def lined_up(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a table: the first column to the left, the others to the right."""
    width = max(len(row) for row in rows)
    full = [[*row, *[""] * (width - len(row))] for row in rows]
    widths = [max(len(row[column]) for row in full) for column in range(width)]
    return "\n".join(
        "  ".join(
            f"{cell:<{widths[column]}}" if column == 0 else f"{cell:>{widths[column]}}"
            for column, cell in enumerate(row)
        ).rstrip()
        for row in full
    )


def grouped_bars(axes: Any, groups: Sequence[str], series: Mapping[str, Sequence[float]]) -> None:
    """Of each series a bar in each group, with its number on it; on matplotlib's axes."""
    width = 0.8 / max(1, len(series))
    for number, (label, values) in enumerate(series.items()):
        places = [place - 0.4 + (number + 0.5) * width for place in range(len(groups))]
        bars = axes.bar(places, values, width=width, label=label)
        axes.bar_label(bars, fmt="%.0f", fontsize="small")
    axes.set_xticks(range(len(groups)), groups)


def memory(pids: Sequence[int]) -> dict[str, float]:
    """PSS and USS of the processes together, in MiB. Raises OSError when one has ended."""
    kib = collections.Counter[str]()
    for pid in pids:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        kib.update(
            {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+) kB", rollup, re.MULTILINE)}
        )
    return {"pss_mib": kib["Pss"] / 1024, "uss_mib": (kib["Private_Clean"] + kib["Private_Dirty"]) / 1024}


def memory_available_mib() -> float:
    """What the kernel could give to new processes without swapping."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) / 1024


def start_time(pid: int) -> float:
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
