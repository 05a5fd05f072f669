"""A container that cannot be made: the user's terminal names the cause; `host_unchanged` finds nothing."""

import re
import subprocess
from pathlib import Path

import pytest
from harness import Config, Ctr, busybox, wait_for


def refusal(ctr: Ctr, container_id: str, options: tuple[str, ...]) -> str:
    """What `ctr run` prints when it fails, as it must."""
    result = ctr.run(container_id, "true", options=options)
    error = result.stderr.decode()
    assert result.returncode != 0
    assert "Traceback" not in error
    assert container_id not in ctr("containers", "ls", "-q").stdout.split()
    assert ctr.status(container_id) is None
    return error


def test_no_kernel_file(every_ctr: Ctr, container_id: str, config: Config) -> None:
    error = refusal(every_ctr, container_id, config({"hypervisor.qemu": {"kernel": "/no/such/vmlinuz"}}))
    assert "/no/such/vmlinuz" in error


def test_no_qemu(ctr: Ctr, container_id: str, config: Config) -> None:
    error = refusal(ctr, container_id, config({"hypervisor.qemu": {"path": "/no/such/qemu-system-x86_64"}}))
    assert "/no/such/qemu-system-x86_64" in error


def test_qemu_that_is_another_program(ctr: Ctr, container_id: str, config: Config) -> None:
    error = refusal(ctr, container_id, config({"hypervisor.qemu": {"path": "/bin/false"}}))
    assert "/bin/false" in error


def test_empty_initrd(ctr: Ctr, container_id: str, config: Config, tmp_path: Path) -> None:
    initrd = tmp_path / "empty.img"
    initrd.touch()
    error = refusal(ctr, container_id, config({"hypervisor.qemu": {"initrd": str(initrd)}}))
    assert str(initrd) in error


def initrd_that_sleeps(path: Path) -> Path:
    """A guest that boots and has no agent: one static busybox as init, in the format of cpio -H newc."""
    entries = [
        ("bin", 0o40755, b""),
        ("bin/busybox", 0o100755, busybox()),
        ("init", 0o100755, b"#!/bin/busybox sh\nwhile :; do /bin/busybox sleep 1000; done\n"),
        ("TRAILER!!!", 0, b""),
    ]
    image = b""
    for inode, (name, mode, data) in enumerate(entries):
        fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        image += b"070701" + b"".join(b"%08x" % value for value in fields) + name.encode() + b"\0"
        image += bytes(-len(image) % 4) + data
        image += bytes(-len(image) % 4)
    path.write_bytes(image)
    return path


def test_an_initrd_that_is_none_shows_the_kernels_panic(
    ctr: Ctr, container_id: str, config: Config, tmp_path: Path
) -> None:
    initrd = tmp_path / "nonsense.img"
    initrd.write_text("nonsense\n" * 100)
    settings = {"hypervisor.qemu": {"initrd": str(initrd), "shared_fs": "virtio-fs"}}
    # Not virtiofsd, which ends with QEMU and may be seen first.
    error = refusal(ctr, container_id, config(settings))
    assert "Kernel panic" in error


def test_agent_that_never_answers(ctr: Ctr, container_id: str, config: Config, tmp_path: Path) -> None:
    initrd = initrd_that_sleeps(tmp_path / "no-agent.img")
    options = config({"hypervisor.qemu": {"initrd": str(initrd)}, "agent.kata": {"dial_timeout": 8}})

    def told() -> str | None:
        # On a busy host QEMU's own start may take all of the time.
        error = refusal(ctr, container_id, options)
        return None if "QEMU did not greet" in error else error

    error = wait_for("QEMU to be quicker than the timeout", told)
    # What QEMU's start has left of it.
    waited = re.search(r"no answer within ([\d.]+) s", error)
    assert waited and float(waited[1]) <= 8
    assert "agent" in error
    assert "dial_timeout" in error


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"hypervisor.qemu": {"default_memory": "much"}}, ("default_memory", "much")),
        ({"hypervisor.qemu": {"shared_fs": "nfs"}}, ("shared_fs", "nfs")),
    ],
)
def test_a_wrong_configuration_names_file_key_and_value(
    ctr: Ctr,
    container_id: str,
    config: Config,
    settings: dict[str, dict[str, object]],
    named: tuple[str, ...],
) -> None:
    options = config(settings)
    error = refusal(ctr, container_id, options)
    assert all(name in error for name in (*named, options[-1]))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--net-host",), "the host's network"),
        (("--with-ns", "network:/proc/self/ns/net"), "the host's network"),
        (("--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536"), "a user namespace"),
    ],
)
def test_what_a_machine_cannot_have_of_the_host_is_refused(
    ctr: Ctr, container_id: str, options: tuple[str, ...], named: str
) -> None:
    error = refusal(ctr, container_id, options)
    assert f"container {container_id}: found {named} in linux.namespaces, expected" in error


def test_a_second_container_of_the_same_name_is_refused(ctr: Ctr, container_id: str) -> None:
    with ctr.detached(container_id, "sleep", "1000"):
        result = subprocess.run(
            ctr.run_command(container_id, "true", options=("--rm",)),
            capture_output=True,
            stdin=subprocess.DEVNULL,
        )
        assert result.returncode != 0
        assert b"already exists" in result.stderr
        assert ctr.exec(container_id, "echo", "untouched").stdout == b"untouched\n"
