"""What a machine is made of, so that nobody takes one for another.

A saved machine can only be continued by a QEMU that describes the same one, and what runs in it came from a
kernel and an initrd that may have changed since.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from virtcontainers.config import Accel, AgentTransport, HypervisorConfig
from virtcontainers.errors import InvalidArgumentError
from virtcontainers.hypervisor.accel import CPUINFO, decide_accel
from virtcontainers.hypervisor.qemu import host_memory_mib
from virtcontainers.hypervisor.qemu_cmdline import MachineFiles, Option, plan
from virtcontainers.hypervisor.vhost_vsock import resolve_transport
from virtcontainers.vm import VMConfig

FORMAT = 2
"""Of template.json and of how a template is booted; another one never fits."""

_LISTS = ("kernel_params", "devices")
_ANYWHERE = Path("/template")
_ANY_CID = 3
_ANY_FD = 0


@dataclass(frozen=True)
class Difference:
    """One part in which two machines differ."""

    part: str
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{self.part}: found {self.found}, expected {self.expected}"


def differences(found: Mapping[str, str], expected: Mapping[str, str]) -> tuple[Difference, ...]:
    """Of two results of `made_of`; a part that one of them lacks is "nothing". Of lists only those words are
    told that the other does not have."""
    differing = [part for part in dict.fromkeys((*expected, *found)) if found.get(part) != expected.get(part)]
    return tuple(_difference(part, found.get(part, ""), expected.get(part, "")) for part in differing)


def _difference(part: str, found: str, expected: str) -> Difference:
    if part in _LISTS and set(found.split()) != set(expected.split()):
        found, expected = _words_beside(found, expected), _words_beside(expected, found)
    return Difference(part, found or "nothing", expected or "nothing")


def _words_beside(text: str, other: str) -> str:
    return " ".join(word for word in text.split() if word not in other.split())


def template_hypervisor(config: HypervisorConfig, directory: Path) -> HypervisorConfig:
    """The machine that is booted and saved into `directory`."""
    return replace(
        config,
        boot_to_be_template=True,
        boot_from_template=False,
        memory_path=directory / "memory",
        devices_state_path=directory / "state",
        # Either would fill each clone's memory before it runs.
        enable_mem_prealloc=False,
        enable_hugepages=False,
    )


def made_of(config: VMConfig) -> dict[str, str]:
    """The parts of a template for this configuration, by names that a person understands.

    Files are told by their inode, size and times: reading them would cost every pod more than its start.
    Raises InvalidArgumentError for one that is not there.
    """
    hypervisor = template_hypervisor(config.hypervisor, _ANYWHERE)
    accel = decide_accel(hypervisor.accel).accel
    transport = resolve_transport(config.agent.transport)
    line = plan(
        hypervisor,
        config.agent,
        MachineFiles(directory=_ANYWHERE),
        name="template",
        accel=accel,
        transport=transport,
        guest_cid=_ANY_CID if transport is AgentTransport.VSOCK else None,
        shared_path=_ANYWHERE,
        host_memory_mib=host_memory_mib(),
    )
    fds = dict.fromkeys(("qmp", "agent", "vhost", "memory"), _ANY_FD)

    def text(*options: Option) -> str:
        return " ".join(option.render(fds) for option in options)

    parts = {
        "format": str(FORMAT),
        "kernel": _file(line.kernel),
        "initrd": _file(line.initrd) if line.initrd else "none",
        "firmware": _file(line.firmware) if line.firmware else "QEMU's",
        "qemu": _file(line.path),
        "accelerator": text(line.accel),
        "machine": text(line.machine),
        "cpu": text(line.cpu),
        "vcpus": text(line.smp),
        "memory": text(line.memory),
        "kernel_params": " ".join(line.kernel_params),
        "devices": text(*line.objects, *line.chardevs, *line.fsdevs, *line.devices),
    }
    if accel is Accel.KVM:
        parts["host_cpu"] = _host_cpu()
    return parts


def sharing(config: HypervisorConfig) -> dict[str, str]:
    """What is no part of a template, but of a machine that runs and shares files already: the words for
    virtiofsd and its device, and how it has its memory and gets more."""
    return {
        "enable_mem_prealloc": str(config.enable_mem_prealloc),
        "enable_hugepages": str(config.enable_hugepages),
        "enable_virtio_mem": str(config.enable_virtio_mem),
        "virtio_fs_daemon": str(config.virtio_fs_daemon),
        "virtio_fs_cache": config.virtio_fs_cache,
        "virtio_fs_cache_size": str(config.virtio_fs_cache_size_mib),
        "virtio_fs_queue_size": str(config.virtio_fs_queue_size),
        "virtio_fs_extra_args": " ".join(config.virtio_fs_extra_args),
    }


def _file(path: Path) -> str:
    try:
        found = path.stat()
    except OSError as error:
        raise InvalidArgumentError(f"{path}: {error.strerror}") from error
    return (
        f"{path} ({found.st_size} bytes, inode {found.st_ino}, "
        f"modified {_time(found.st_mtime_ns)}, changed {_time(found.st_ctime_ns)})"
    )


def _time(ns: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(ns // 10**9)) + f".{ns % 10**9:09d}Z"


def _host_cpu() -> str:
    """Under KVM the guest has seen the host's, and is lost on another."""
    wanted = ("model name", "stepping", "microcode", "flags")
    lines = CPUINFO.read_text().split("\n\n", 1)[0].splitlines()
    text = "\n".join(line for line in lines if line.startswith(wanted))
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown'} ({zlib.crc32(text.encode()):08x})"
