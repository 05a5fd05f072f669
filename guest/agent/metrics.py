"""What Kata's agent tells with GetMetrics, in Prometheus' text format: of that, the guest's memory."""

from __future__ import annotations

import re

_NAME = "kata_guest_meminfo"


def meminfo(text: str) -> str:
    """/proc/meminfo as Kata's gauge: in bytes, and the items' names in snake case."""
    lines = [f"# HELP {_NAME} Statistics about memory usage in the system.", f"# TYPE {_NAME} gauge"]
    for line in text.splitlines():
        name, _, value = line.partition(":")
        number, *unit = value.split()
        lines.append(f'{_NAME}{{item="{_snake_case(name)}"}} {int(number) * (1024 if unit else 1)}')
    return "\n".join(lines) + "\n"


def _snake_case(name: str) -> str:
    """ "SReclaimable" is s_reclaimable, "Active(anon)" active_anon; to Kata, huge pages are one word."""
    name = name.replace("HugePages", "Hugepages").replace("Percpu", "PerCpu")
    words = re.sub(r"(?<=[a-z])(?=[A-Z0-9])|(?<=[A-Z])(?=[A-Z][a-z])|\(", "_", name.rstrip(")"))
    return words.lower()


def metrics() -> str:
    with open("/proc/meminfo") as file:
        return meminfo(file.read())
