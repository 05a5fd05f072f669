"""`kata-py check`: whether this host can run kata-py, and what to do about it when not."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from katautils.cli import containerd
from katautils.cli.output import Cell, Colour, is_terminal, mib, print_table
from katautils.config import RuntimeConfig, load_configuration
from virtcontainers.config import Accel, AgentConfig, AgentTransport, HypervisorConfig, SharedFS
from virtcontainers.errors import KataError, NotFoundError

TESTED_QEMU = (7, 2)
"""The oldest that kata-py is tested with."""

NEEDED_LINUX = (5, 14)
"""For the mounts of what a pod shares: mount_setattr(2) with MOUNT_ATTR_NOSYMFOLLOW."""

TUN_DEVICE = Path("/dev/net/tun")


class Status(StrEnum):
    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


_COLOURS = {Status.OK: Colour.GREEN, Status.WARNING: Colour.YELLOW, Status.FAILURE: Colour.RED}


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and, where that is not well, the way out."""

    name: str
    status: Status
    found: str
    way_out: str = ""


def check(config_path: Path | None) -> int:
    """Print the findings; 1 when there is a failure among them, else 0."""
    findings = []
    for finding in examine(config_path):
        findings.append(finding)
        if not is_terminal():
            way_out = f"; {finding.way_out}" if finding.way_out else ""
            print(f"{finding.status}: {finding.name}: {finding.found}{way_out}", flush=True)
    if is_terminal():
        print_table([_row(finding) for finding in findings])
    return int(any(finding.status is Status.FAILURE for finding in findings))


def _row(finding: Finding) -> list[Cell]:
    text = finding.found + (f"\n-> {finding.way_out}" if finding.way_out else "")
    return [Cell(finding.status, _COLOURS[finding.status]), Cell(finding.name, Colour.BOLD), Cell(text)]


def examine(config_path: Path | None) -> Iterator[Finding]:
    """Every finding, in the order in which a person would put things right."""
    if os.geteuid() != 0:
        yield Finding(
            "user", Status.WARNING, "not root: what only root may open is reported as missing", "use sudo"
        )
    config = None
    try:
        config = load_configuration(config_path)
    except KataError as error:
        missing = isinstance(error, NotFoundError)
        way_out = (
            "write one (README, Configuration), or name one: --config, KATA_CONF_FILE" if missing else ""
        )
        yield Finding("configuration", Status.FAILURE, str(error), way_out)
    else:
        yield from _configuration(config)
    hypervisor = config.hypervisor if config else HypervisorConfig()
    yield _linux()
    yield _qemu(hypervisor)
    yield _acceleration(hypervisor)
    yield _vsock(config.agent if config else AgentConfig())
    yield _tun()
    if config:
        yield from _guest(hypervisor)
        if hypervisor.shared_fs is SharedFS.VIRTIO_FS:
            yield _virtiofsd(hypervisor)
        if config.factory.enable_template:
            yield from _template(config)
        if config.factory.vm_cache_number:
            yield from _cache(config)
    yield from _containerd()


def _configuration(config: RuntimeConfig) -> Iterator[Finding]:
    from katautils.config.files import read_configuration
    from katautils.config.warn import key_warning, unimplemented_keys, unknown_keys

    name = "configuration"
    yield Finding(name, Status.OK, ", ".join(str(path) for path in (config.path, *config.drop_ins)))
    parsed = read_configuration(config.path)
    for key in unknown_keys(parsed):
        yield Finding(name, Status.WARNING, f"unknown: {key}", "correct it or take it out")
    for key in unimplemented_keys(parsed):
        yield Finding(name, Status.WARNING, f"without effect: {key}", "kata-py does not implement it")
    for warning in config.warnings:
        if warning != key_warning(parsed):
            yield Finding(name, Status.WARNING, warning)


def _linux() -> Finding:
    release = os.uname().release
    if tuple(map(int, re.findall(r"\d+", release)[:2])) < NEEDED_LINUX:
        needed = ".".join(map(str, NEEDED_LINUX))
        return Finding(
            "Linux", Status.FAILURE, f"{release}: a pod's folders cannot be shared", f"boot {needed} or newer"
        )
    return Finding("Linux", Status.OK, release)


def _qemu(config: HypervisorConfig) -> Finding:
    path = config.path
    if not os.access(path, os.X_OK):
        what = "is not executable" if path.exists() else "does not exist"
        return Finding(
            "QEMU", Status.FAILURE, f"{path} {what}",
            "apt-get install qemu-system-x86, or set path in [hypervisor.qemu]",
        )  # fmt: skip
    version = qemu_version(path)
    if version is None:
        way_out = f"see what `{path} --version` says"
        return Finding("QEMU", Status.FAILURE, f"{path} does not tell its version", way_out)
    if tuple(map(int, version.split(".")[:2])) < TESTED_QEMU:
        tested = ".".join(map(str, TESTED_QEMU))
        return Finding(
            "QEMU", Status.WARNING, f"{path} {version}", f"kata-py is tested with {tested} and newer"
        )
    return Finding("QEMU", Status.OK, f"{path} {version}")


def qemu_version(path: Path) -> str | None:
    """Such as "7.2.19"; None when the program does not say."""
    found = re.search(r"version (\d+\.\d+(?:\.\d+)*)", containerd.output_of(path, "--version"))
    return found[1] if found else None


def _acceleration(config: HypervisorConfig) -> Finding:
    from virtcontainers.hypervisor.accel import decide_accel

    decision = decide_accel(config.accel)
    if decision.accel is Accel.KVM or config.accel is Accel.TCG:
        return Finding("acceleration", Status.OK, f"{decision.accel}: {decision.reason}")
    return Finding(
        "acceleration", Status.WARNING, f"{decision.accel}, which is slow: {decision.reason}",
        "turn virtualization on in the firmware, or in the machine around this one, and load kvm_intel or "
        "kvm_amd",
    )  # fmt: skip


def _vsock(agent: AgentConfig) -> Finding:
    from virtcontainers.hypervisor.vhost_vsock import (
        VHOST_DEVICE_VSOCK,
        VHOST_VSOCK_DEVICE,
        find_vhost_device_vsock,
    )

    if agent.transport is AgentTransport.SERIAL:
        return Finding("vsock", Status.OK, "not needed: transport is serial")
    if agent.transport is AgentTransport.HVSOCK:
        try:
            return Finding(
                "vsock", Status.OK, f"hvsock through {find_vhost_device_vsock(VHOST_DEVICE_VSOCK)}"
            )
        except KataError as error:
            return Finding("vsock", Status.FAILURE, str(error))
    if (problem := _cannot_open(VHOST_VSOCK_DEVICE)) is None:
        return Finding("vsock", Status.OK, f"{VHOST_VSOCK_DEVICE} opens")
    if agent.transport is AgentTransport.VSOCK:
        way_out = 'modprobe vhost_vsock, or set transport = "auto" in [agent.kata]'
        return Finding("vsock", Status.FAILURE, problem, way_out)
    return Finding(
        "vsock", Status.WARNING, f"{problem}: agents are reached over a serial port",
        "modprobe vhost_vsock, when the guest is Kata's own: its agent knows only vsock",
    )  # fmt: skip


def _tun() -> Finding:
    if (problem := _cannot_open(TUN_DEVICE)) is None:
        return Finding("TUN", Status.OK, f"{TUN_DEVICE} opens")
    return Finding("TUN", Status.WARNING, f"{problem}: pods cannot have a network", "modprobe tun")


def _cannot_open(device: Path) -> str | None:
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{device} does not open: {error.strerror}"
    return None


def _guest(config: HypervisorConfig) -> Iterator[Finding]:
    for key, path in (("kernel", config.kernel), ("initrd", config.initrd), ("image", config.image)):
        if path is None:
            continue
        way_out = f"set {key} in [hypervisor.qemu]; hack/setup.sh builds a guest"
        try:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
        except OSError as error:
            yield Finding(key, Status.FAILURE, f"{path}: {error.strerror}", way_out)
            continue
        if size == 0:
            yield Finding(key, Status.FAILURE, f"{path} is empty", way_out)
        else:
            yield Finding(key, Status.OK, f"{path} ({mib(size)})")


def _virtiofsd(config: HypervisorConfig) -> Finding:
    from virtcontainers.hypervisor.virtiofsd import find_virtiofsd

    try:
        path = find_virtiofsd(config)
    except KataError as error:
        return Finding("virtiofsd", Status.FAILURE, str(error))
    version = re.search(r"\d+\.\d+(?:\.\d+)*", containerd.output_of(path, "--version"))
    if version is None:
        return Finding(
            "virtiofsd", Status.FAILURE, f"{path} does not tell its version", "install another one"
        )
    return Finding("virtiofsd", Status.OK, f"{path} {version[0]}")


def _template(config: RuntimeConfig) -> Iterator[Finding]:
    from katautils.cli.factory import vm_config
    from virtcontainers.factory.template import Template, TemplateMisfit, TemplateMissing

    path = config.factory.template_path
    way_out = "`kata-py factory init` makes it, or the next pod"
    if (problem := _no_room_for_template(path)) is not None:
        yield Finding("template", Status.WARNING, *problem)
    try:
        template = Template.fetch(path, vm_config(config))
    except TemplateMissing as error:
        yield Finding("template", Status.WARNING, str(error), way_out)
    except TemplateMisfit as error:
        parts = ", ".join(difference.part for difference in error.differences)
        found = f"the one in {path} does not fit the configuration: it differs in {parts}"
        yield Finding("template", Status.WARNING, found, way_out)
    except KataError as error:
        yield Finding("template", Status.WARNING, str(error), way_out)
    else:
        size = mib(template.info.memory_allocated_bytes)
        yield Finding("template", Status.OK, f"the one in {path} fits, {size}")


def _no_room_for_template(path: Path) -> tuple[str, str] | None:
    """What keeps a tmpfs from being mounted there, and the way out."""
    if "\ttmpfs\n" not in Path("/proc/filesystems").read_text():
        return "the kernel has no tmpfs", "set enable_template = false in [factory]"
    way_out = "set template_path in [factory] to a folder that is empty, or does not exist"
    try:
        if path.is_dir() and not path.is_mount() and any(path.iterdir()):
            return f"template_path {path} has files in it and is no tmpfs", way_out
        if path.exists() and not path.is_dir():
            return f"template_path {path} is no folder", way_out
    except PermissionError:
        return None
    return None


def _cache(config: RuntimeConfig) -> Iterator[Finding]:
    from katautils.cli.factory_status import cache_status
    from katautils.config.load import host_memory_mib

    number, endpoint = config.factory.vm_cache_number, config.factory.vm_cache_endpoint
    found = cache_status(config)
    if found["problem"]:
        way_out = "`kata-py factory destroy`, then start it again with `kata-py factory init`"
        yield Finding("VM cache", Status.WARNING, found["problem"], way_out)
    elif not found["server_pid"]:
        way_out = "start hack/kata-py-vm-cache.service, or `kata-py factory init`"
        yield Finding("VM cache", Status.WARNING, f"nobody serves {endpoint}", way_out)
    else:
        ready = f"{len(found['machines'])} of {number} machines are ready"
        yield Finding("VM cache", Status.OK, f"{endpoint} is served by pid {found['server_pid']}: {ready}")
    wanted, host = number * config.hypervisor.default_memory_mib, host_memory_mib()
    if wanted > host:
        yield Finding(
            "VM cache", Status.WARNING, f"{number} machines may grow to {wanted} MiB, this host has {host}",
            "lower vm_cache_number in [factory], or default_memory",
        )  # fmt: skip


def _containerd() -> Iterator[Finding]:
    found = containerd.find_containerds()
    if not found:
        yield Finding("containerd", Status.FAILURE, "there is none", "apt-get install containerd")
    for each in found:
        what = f"pid {each.pid}" if each.pid else "not running"
        version = each.version()
        known = each.path or each.pid == 0
        yield Finding(
            "containerd",
            Status.OK if each.pid else Status.WARNING,
            f"{each.program} {version or 'of unknown version'}, {what}",
            "" if each.pid else "systemctl start containerd, or hack/containerd start for a private one",
        )
        shim = each.find_shim()
        of = f"for containerd, {what}"
        if shim is None and not known:
            yield Finding(
                "shim", Status.WARNING, f"the PATH of containerd, {what}, is not readable", "use sudo"
            )
        elif shim is None:
            yield Finding(
                "shim", Status.FAILURE, f"{containerd.SHIM} is not on the PATH {of}: {each.path}",
                f"link it into one of these directories: {_own_shim()}",
            )  # fmt: skip
        elif not containerd.output_of(shim, "-v"):
            yield Finding("shim", Status.FAILURE, f"{shim} {of} does not run", f"see what `{shim} -v` says")
        else:
            yield Finding("shim", Status.OK, f"{shim} {of}")


def _own_shim() -> str:
    """The shim of the installation that we are part of."""
    import sys

    return str(Path(sys.prefix) / "bin" / containerd.SHIM)
