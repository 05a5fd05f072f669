"""`kata-py env`: the resolved configuration, and the versions of what takes part."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from enum import Enum
from pathlib import Path
from typing import Any

from katautils import __version__
from katautils.cli import containerd
from katautils.cli.check import qemu_version
from katautils.cli.output import Cell, Colour, colour, is_terminal, print_table
from katautils.config import RuntimeConfig, load_configuration
from katautils.config.load import host_memory_mib

_TABLES = ("hypervisor", "agent", "factory")


def env(config_path: Path | None, *, as_json: bool) -> int:
    """Print it. Raises KataError when the configuration cannot be loaded."""
    sections = collect(load_configuration(config_path))
    if as_json:
        print(json.dumps(sections, indent=2))
        return 0
    for number, (name, values) in enumerate(sections.items()):
        if number:
            print()
        if is_terminal():
            print(colour(Cell(name, Colour.BOLD)))
            print_table([[Cell(f"  {key}", Colour.DIM), Cell(_show(value))] for key, value in values.items()])
        else:
            print(f"[{name}]")
            for key, value in values.items():
                print(f"{key} = {json.dumps(value)}")
    return 0


def collect(config: RuntimeConfig) -> dict[str, dict[str, Any]]:
    """Sections of keys and plain JSON values."""
    from virtcontainers.hypervisor.accel import decide_accel
    from virtcontainers.hypervisor.vhost_vsock import resolve_transport

    decision = decide_accel(config.hypervisor.accel)
    own = ("path", "drop_ins", "warnings", "of_files", *_TABLES)
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    hypervisor = dataclasses.asdict(config.hypervisor)
    for of_the_factory in ("boot_to_be_template", "boot_from_template", "memory_path", "devices_state_path"):
        del hypervisor[of_the_factory]
    sections: dict[str, dict[str, Any]] = {
        "kata-py": {
            "version": __version__,
            "program": Path(sys.argv[0]).resolve(),
            "python": platform.python_version(),
        },
        "configuration": {key: fields[key] for key in ("path", "drop_ins", "warnings")},
        "hypervisor": {"version": qemu_version(config.hypervisor.path), **hypervisor},
        "agent": dataclasses.asdict(config.agent),
        "factory": dataclasses.asdict(config.factory),
        "runtime": {key: value for key, value in fields.items() if key not in own},
        "host": {
            "kernel": platform.release(),
            "architecture": platform.machine(),
            "cpus": os.cpu_count(),
            "memory_mib": host_memory_mib(),
            "accel": decision.accel,
            "accel_reason": decision.reason,
            "transport": resolve_transport(config.agent.transport),
        },
        "containerd": {
            f"{each.program} ({f'pid {each.pid}' if each.pid else 'not running'})": each.version() or None
            for each in containerd.find_containerds()
        },
    }
    plain: dict[str, dict[str, Any]] = _plain(sections)
    return plain


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case Enum():
            return value.value
        case Path():
            return str(value)
    return value


def _show(value: Any) -> str:
    if value is None or value == "" or value == []:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
