"""`kata-py factory status`: the template, its clones, the cache."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

from katautils.cli.factory import machines, vm_config
from katautils.cli.output import Cell, Colour, colour, local_time, mib, print_table
from katautils.config import RuntimeConfig, load_configuration
from virtcontainers.errors import KataError, UnavailableError

Plain = dict[str, Any]
"""What JSON has; sizes are in bytes."""

_STATES = {
    "fits": Colour.GREEN,
    "missing": None,
    "misfit": Colour.YELLOW,
    "broken": Colour.RED,
    "unreadable": Colour.YELLOW,
}


def status(config_path: Path | None, *, as_json: bool) -> int:
    """Print it. Raises KataError when the configuration cannot be loaded."""
    found = collect(load_configuration(config_path))
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _print_template(found["template"])
        print()
        _print_clones(found["clones"], found["total"])
        print()
        _print_cache(found["cache"])
    return 0


def collect(config: RuntimeConfig) -> Plain:
    from virtcontainers.factory.clones import find_clones

    clones = find_clones(config.factory.template_path)
    return {
        "configuration": str(config.path),
        "template": _template(config),
        "clones": [
            {
                "sandbox": clone.sandbox_id,
                "pid": clone.pid,
                "memory": clone.memory.value,
                "shared_bytes": clone.shared_bytes,
                "own_bytes": clone.own_bytes,
            }
            for clone in clones
        ],
        "total": {
            "clones": len(clones),
            "shared_bytes": sum(clone.shared_bytes for clone in clones),
            "own_bytes": sum(clone.own_bytes for clone in clones),
        },
        "cache": cache_status(config),
    }


def _template(config: RuntimeConfig) -> Plain:
    from virtcontainers.factory.fingerprint import differences, made_of
    from virtcontainers.factory.template import TemplateMissing, read_template

    path = config.factory.template_path
    found: Plain = {"enabled": config.factory.enable_template, "path": str(path)}
    try:
        info = read_template(path)
    except TemplateMissing:
        problem = None if os.geteuid() == 0 else "not root: what only root may see is missing here"
        return found | {"state": "missing", "problem": problem}
    except KataError as error:
        state = "broken" if os.access(path, os.R_OK | os.X_OK) else "unreadable"
        return found | {"state": state, "problem": str(error)}
    found |= {
        "created": info.created,
        "memory_bytes": info.memory_bytes,
        "memory_allocated_bytes": info.memory_allocated_bytes,
        "state_bytes": info.state_bytes,
        "booted_bytes": info.booted_bytes,
        "given_back_bytes": info.given_back_bytes,
        "zero_bytes": info.zero_bytes,
        "made_of": info.made_of,
    }
    try:
        misfits = differences(info.made_of, made_of(vm_config(config)))
    except KataError as error:  # the configuration names a file that is not there
        return found | {"state": "misfit", "problem": str(error), "differences": []}
    return found | {
        "state": "misfit" if misfits else "fits",
        "problem": None,
        "differences": [dataclasses.asdict(misfit) for misfit in misfits],
    }


def _print_template(found: Plain) -> None:
    on = "on" if found["enabled"] else "off"
    state = found["state"]
    says = {
        "fits": "fits the configuration",
        "missing": "there is none",
        "misfit": "does not fit the configuration, and will be made anew",
        "broken": "broken, and will be made anew",
        "unreadable": "only root can tell: use sudo",
    }[state]
    print(colour(Cell("template", Colour.BOLD)))
    rows = [
        [Cell("  enable_template", Colour.DIM), Cell(on)],
        [Cell("  template_path", Colour.DIM), Cell(found["path"])],
        [Cell("  state", Colour.DIM), Cell(says, _STATES[state])],
    ]
    if found["problem"]:
        rows.append([Cell("  problem", Colour.DIM), Cell(found["problem"], Colour.RED)])
    if "made_of" in found:
        given_back, zero = found["given_back_bytes"], found["zero_bytes"]
        saved = (
            f"{mib(given_back + zero)} of {mib(found['booted_bytes'])}: {mib(given_back)} given back by the "
            f"guest, {mib(zero)} zeros punched out"
        )
        memory = f"{mib(found['memory_allocated_bytes'])} allocated of {mib(found['memory_bytes'])}"
        rows += [
            [Cell("  made", Colour.DIM), Cell(f"{local_time(found['created'])}, {_ago(found['created'])}")],
            [Cell("  memory", Colour.DIM), Cell(memory)],
            [Cell("  devices' state", Colour.DIM), Cell(mib(found["state_bytes"]))],
            [Cell("  saved", Colour.DIM), Cell(saved)],
            [Cell("  made of", Colour.DIM), Cell("")],
        ]
        differing = {each["part"]: each for each in found["differences"]}
        for part in dict.fromkeys((*found["made_of"], *differing)):
            if part not in differing:
                rows.append([Cell(f"    {part}", Colour.DIM), Cell(found["made_of"][part])])
                continue
            rows.append([Cell(f"    {part}", Colour.YELLOW), Cell(differing[part]["found"])])
            rows.append(
                [Cell("      expected", Colour.YELLOW), Cell(differing[part]["expected"], Colour.YELLOW)]
            )
    print_table(rows)


def _ago(seconds: float) -> str:
    passed = round(time.time() - seconds)
    if passed < 0:
        return "by a clock ahead of this one"
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if passed >= 2 * length:
            return f"{passed // length} {unit} ago"
    return f"{passed} seconds ago"


def _print_clones(clones: list[Plain], total: Plain) -> None:
    print(colour(Cell("clones", Colour.BOLD)))
    if not clones:
        print("  there are none")
        return
    rows = [["pod", "pid", "shared MiB", "own MiB", "memory"]]
    rows += [
        [
            each["sandbox"],
            str(each["pid"]),
            _figure(each["shared_bytes"]),
            _figure(each["own_bytes"]),
            each["memory"],
        ]
        for each in clones
    ]
    figures = [_figure(total["shared_bytes"]), _figure(total["own_bytes"])]
    rows.append([f"{total['clones']} together", "", *figures, ""])
    _print_columns(rows, numbers=(1, 2, 3))


def _figure(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):.1f}"


def _print_columns(rows: list[list[str]], *, numbers: tuple[int, ...]) -> None:
    """The first row is the columns' heads; the columns of `numbers` are flush right."""
    widths = {column: max(len(row[column]) for row in rows) for column in numbers}
    cells = [[Cell(text.rjust(widths.get(column, 0))) for column, text in enumerate(row)] for row in rows]
    cells[0] = [Cell(cell.text, Colour.DIM) for cell in cells[0]]
    print_table([[Cell(f"  {row[0].text}", row[0].colour), *row[1:]] for row in cells])


def cache_status(config: RuntimeConfig) -> Plain:
    """Of the server on vm_cache_endpoint, whether there should be one or not."""
    factory = config.factory
    found: Plain = {
        "enabled": factory.vm_cache_number > 0,
        "number": factory.vm_cache_number,
        "endpoint": str(factory.vm_cache_endpoint),
        "server_pid": None,
        "machines": [],
        "problem": None,
    }
    return found | asyncio.run(_ask_cache(config))


async def _ask_cache(config: RuntimeConfig) -> Plain:
    from virtcontainers.factory import grpccache

    endpoint = config.factory.vm_cache_endpoint
    found: Plain = {}
    try:
        answer = await grpccache.cache_status(endpoint)
        found["server_pid"] = answer.pid
        found["machines"] = [
            {"pid": each.pid, "vcpus": each.cpu, "memory_bytes": each.memory << 20}
            for each in answer.vmstatus
        ]
        await grpccache.GrpcCache.fetch(endpoint, vm_config(config))
    except UnavailableError:
        pass
    except KataError as error:
        found["problem"] = str(error)
    return found


def _print_cache(found: Plain) -> None:
    print(colour(Cell("VM cache", Colour.BOLD)))
    number = str(found["number"]) if found["enabled"] else "off"
    server, tint = "none", Colour.YELLOW if found["enabled"] else None
    if found["server_pid"]:
        server, tint = f"pid {found['server_pid']}, {machines(len(found['machines']))} ready", Colour.GREEN
    rows = [
        [Cell("  vm_cache_number", Colour.DIM), Cell(number)],
        [Cell("  vm_cache_endpoint", Colour.DIM), Cell(found["endpoint"])],
        [Cell("  server", Colour.DIM), Cell(server, tint)],
    ]
    if found["problem"]:
        rows.append([Cell("  problem", Colour.DIM), Cell(found["problem"], Colour.RED)])
    print_table(rows)
    if found["machines"]:
        machine_rows = [["machine's pid", "vCPUs", "MiB"]]
        machine_rows += [
            [str(each["pid"]), str(each["vcpus"]), str(each["memory_bytes"] >> 20)]
            for each in found["machines"]
        ]
        _print_columns(machine_rows, numbers=(0, 1, 2))
