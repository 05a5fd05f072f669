"""What makes a template another one: each part, and what does not count."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from virtcontainers.config import AgentTransport, SharedFS
from virtcontainers.errors import InvalidArgumentError
from virtcontainers.factory import fingerprint
from virtcontainers.factory.fingerprint import Difference, differences, made_of
from virtcontainers.vm import VMConfig


def changed(
    config: VMConfig, *, agent: Mapping[str, Any] = MappingProxyType({}), **hypervisor: Any
) -> VMConfig:
    return VMConfig(replace(config.hypervisor, **hypervisor), replace(config.agent, **agent))


def _one(key: str, value: object) -> dict[str, Any]:
    return {key: value}


def parts_that_differ(one: VMConfig, other: VMConfig) -> list[str]:
    return [found.part for found in differences(made_of(one), made_of(other))]


# -- files


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def append(path: Path) -> None:
    with path.open("a") as file:
        file.write("x")


def overwrite_keeping_size_and_time(path: Path) -> None:
    found = path.stat()
    path.write_text("X" * found.st_size)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    while path.stat().st_ctime_ns == found.st_ctime_ns:  # the kernel's clock for files has ticks
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def replace_keeping_content_and_time(path: Path) -> None:
    """As a package's upgrade to the same version, or `cp -a`."""
    found = path.stat()
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(found.st_atime_ns, found.st_mtime_ns))
    other.rename(path)


@pytest.mark.parametrize(
    "change", [touch, append, overwrite_keeping_size_and_time, replace_keeping_content_and_time]
)
@pytest.mark.parametrize(("key", "part"), [("kernel", "kernel"), ("initrd", "initrd"), ("path", "qemu")])
def test_a_file_that_changes_is_another(
    vm_config: VMConfig, key: str, part: str, change: Callable[[Path], None]
) -> None:
    before = made_of(vm_config)
    path: Path = getattr(vm_config.hypervisor, key)
    change(path)
    found = differences(before, made_of(vm_config))
    assert [difference.part for difference in found] == [part]
    # Not only different: a person sees in what.
    assert str(path) in found[0].found and str(path) in found[0].expected
    assert found[0].found != found[0].expected


@pytest.mark.parametrize(("key", "part"), [("kernel", "kernel"), ("initrd", "initrd"), ("path", "qemu")])
def test_a_copy_elsewhere_is_another(vm_config: VMConfig, tmp_path: Path, key: str, part: str) -> None:
    path: Path = getattr(vm_config.hypervisor, key)
    copy = tmp_path / "copy"
    copy.write_bytes(path.read_bytes())
    assert parts_that_differ(vm_config, changed(vm_config, **_one(key, copy))) == [part]


def test_what_a_link_leads_to_counts(vm_config: VMConfig, tmp_path: Path) -> None:
    """/boot/vmlinuz stays the same when another kernel is installed."""
    link = tmp_path / "vmlinuz"
    assert vm_config.hypervisor.kernel is not None and vm_config.hypervisor.initrd is not None
    link.symlink_to(vm_config.hypervisor.kernel)
    linked = changed(vm_config, kernel=link)
    before = made_of(linked)
    link.unlink()
    link.symlink_to(vm_config.hypervisor.initrd)
    assert [found.part for found in differences(before, made_of(linked))] == ["kernel"]


@pytest.mark.parametrize("key", ["kernel", "initrd", "path"])
def test_a_file_that_is_not_there_is_named(vm_config: VMConfig, tmp_path: Path, key: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{tmp_path}/none: No such file"):
        made_of(changed(vm_config, **_one(key, tmp_path / "none")))


# -- settings


@pytest.mark.parametrize(
    ("hypervisor", "agent", "part"),
    [
        ({"cpu_model": "Nehalem"}, {}, "cpu"),
        ({"cpu_features": "pmu=off"}, {}, "cpu"),
        ({"default_vcpus": 2}, {}, "vcpus"),
        ({"default_maxvcpus": 8}, {}, "vcpus"),
        ({"default_memory_mib": 512}, {}, "memory"),
        ({"default_maxmemory_mib": 2048}, {}, "memory"),
        ({"memory_slots": 11}, {}, "memory"),
        ({"memory_offset_mib": 64}, {}, "memory"),
        ({"kernel_params": "mitigations=off"}, {}, "kernel_params"),
        ({"enable_debug": True}, {}, "kernel_params"),
        ({"machine_accelerators": "nvdimm=off"}, {}, "machine"),
        ({"shared_fs": SharedFS.NONE}, {}, "devices"),
        ({"shared_fs": SharedFS.VIRTIO_FS}, {}, "devices"),
        ({"pcie_root_port": 2}, {}, "devices"),
        ({"entropy_source": "/dev/random"}, {}, "devices"),
        ({}, {"enable_debug": True}, "kernel_params"),
        ({}, {"enable_tracing": True}, "kernel_params"),
        ({}, {"debug_console_enabled": True}, "kernel_params"),
        ({}, {"launch_process_timeout_s": 20.0}, "kernel_params"),
    ],
)
def test_a_setting_that_the_guest_sees_is_another_machine(
    vm_config: VMConfig, hypervisor: dict[str, Any], agent: dict[str, Any], part: str
) -> None:
    found = parts_that_differ(vm_config, changed(vm_config, agent=agent, **hypervisor))
    assert part in found
    # A larger machine has a larger backend of memory, too, and a kernel that boots on one vCPU of several.
    also = {"devices", "kernel_params"} if part in ("memory", "vcpus") else {"devices"}
    assert set(found) <= {part, *also}


def test_a_firmware_is_a_part(vm_config: VMConfig, tmp_path: Path) -> None:
    with_firmware = changed(vm_config, firmware=tmp_path / "host/firmware")
    assert parts_that_differ(vm_config, with_firmware) == ["firmware"]


def test_another_transport_is_another_machine(vm_config: VMConfig) -> None:
    serial = vm_config
    hvsock = changed(vm_config, agent={"transport": AgentTransport.HVSOCK})
    vsock = changed(vm_config, agent={"transport": AgentTransport.VSOCK})
    assert parts_that_differ(serial, hvsock) == ["kernel_params", "devices"]
    assert parts_that_differ(serial, vsock) == ["kernel_params", "devices"]
    assert parts_that_differ(hvsock, vsock) == ["devices"]


@pytest.mark.parametrize(
    ("hypervisor", "agent"),
    [
        # Either is part of what a clone gets when it starts.
        ({"virtio_fs_cache": "never"}, {}),
        ({"virtio_fs_queue_size": 512}, {}),
        ({"virtio_fs_extra_args": ("-d",)}, {}),
        ({"msize_9p": 4096}, {}),
        ({"enable_mem_prealloc": True}, {}),
        ({"enable_hugepages": True}, {}),
        ({}, {"dial_timeout_s": 90.0}),
        ({}, {"kernel_modules": ("loop",)}),
        ({}, {"policy": "package agent_policy"}),
    ],
)
def test_what_the_guest_does_not_see_fits(
    vm_config: VMConfig, hypervisor: dict[str, Any], agent: dict[str, Any]
) -> None:
    assert parts_that_differ(vm_config, changed(vm_config, agent=agent, **hypervisor)) == []


def test_virtio_fs_needs_nothing_of_a_template(vm_config: VMConfig) -> None:
    """Its device is plugged into the clone."""
    virtio_fs = changed(vm_config, shared_fs=SharedFS.VIRTIO_FS)
    assert parts_that_differ(virtio_fs, changed(vm_config, shared_fs=SharedFS.NONE)) == []


def test_another_format_never_fits(vm_config: VMConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    before = made_of(vm_config)
    monkeypatch.setattr(fingerprint, "FORMAT", fingerprint.FORMAT + 1)
    assert differences(before, made_of(vm_config)) == (
        Difference("format", str(fingerprint.FORMAT - 1), str(fingerprint.FORMAT)),
    )


def test_it_is_the_same_each_time(vm_config: VMConfig) -> None:
    assert made_of(vm_config) == made_of(vm_config)
    assert differences(made_of(vm_config), made_of(vm_config)) == ()


# -- telling


def test_a_difference_says_what_was_found_and_expected() -> None:
    assert str(Difference("memory", "256M", "512M")) == "memory: found 256M, expected 512M"


def test_a_part_that_one_of_them_lacks_is_nothing() -> None:
    assert differences({"cpu": "max"}, {"cpu": "max", "host_cpu": "x"}) == (
        Difference("host_cpu", "nothing", "x"),
    )
    assert differences({"cpu": "max", "host_cpu": "x"}, {"cpu": "max"}) == (
        Difference("host_cpu", "x", "nothing"),
    )


@pytest.mark.parametrize(
    ("found", "expected", "told"),
    [
        ("quiet panic=1", "quiet panic=1 foo", ("nothing", "foo")),
        ("quiet panic=1 foo", "quiet panic=1", ("foo", "nothing")),
        ("quiet foo=1", "quiet foo=2", ("foo=1", "foo=2")),
        # The last of a name wins: the order counts.
        ("foo=1 foo=2", "foo=2 foo=1", ("foo=1 foo=2", "foo=2 foo=1")),
        # Twice is not once.
        ("quiet foo", "quiet foo foo", ("quiet foo", "quiet foo foo")),
    ],
)
def test_of_lists_only_what_differs_is_told(found: str, expected: str, told: tuple[str, str]) -> None:
    (difference,) = differences({"kernel_params": found}, {"kernel_params": expected})
    assert (difference.found, difference.expected) == told
