"""The guest image in a machine that nothing but QEMU's own command line has made."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import TIMEOUT_S
from private_containerd import CACHE, REPO

from agent_client.client import AgentClient
from agent_client.protocols import agent_pb2, health_pb2
from agent_client.transports import SerialAddress
from guest.image import cpio

PARAMETERS = "console=ttyS0 quiet panic=-1 cryptomgr.notests agent.transport=serial"

# In the agent's place; its last word ends the machine.
INIT = """#!/usr/bin/busybox sh
export PATH=/usr/sbin:/usr/bin
busybox mount -t proc proc /proc
busybox mount -t devtmpfs dev /dev
{script}
echo THE END
busybox poweroff -f
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image of the present sources, from the cache where it has it."""
    output = tmp_path_factory.mktemp("guest")
    command = [sys.executable, "-m", "guest.image.build", f"--output={output}", f"--cache={CACHE}/guest"]
    subprocess.run(command, cwd=REPO, check=True)
    return output


@contextlib.contextmanager
def machine(kernel: Path, initrd: Path, console: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    command = ["qemu-system-x86_64", "-machine", "q35,accel=tcg", "-cpu", "max", "-m", "256"]
    command += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    command += ["-kernel", str(kernel), "-initrd", str(initrd), "-append", PARAMETERS]
    command += ["-chardev", f"file,id=console,path={console}", "-serial", "chardev:console", *options]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


def run_in_guest(image: Path, directory: Path, script: str, *options: str) -> list[str]:
    """What the script writes, with the image's files around it."""
    init = cpio.pack([cpio.file("/init", INIT.format(script=script).encode(), 0o755)])
    initrd = directory / "initrd.img"
    # A later archive's files replace those of an earlier one.
    initrd.write_bytes((image / "initrd.img").read_bytes() + init)
    console = directory / "console.log"
    with machine(image / "vmlinuz", initrd, console, *options) as process:
        process.wait(TIMEOUT_S)
    lines = console.read_text(errors="replace").replace("\r", "").splitlines()
    assert "THE END" in lines, lines
    return lines[: lines.index("THE END")]


def test_the_agent_answers_in_a_machine_of_256_mib(image: Path, tmp_path: Path) -> None:
    port = tmp_path / "agent.sock"
    options = ["-device", "virtio-serial-pci", "-chardev", f"socket,id=agent,path={port},server=on,wait=off"]
    options += ["-device", "virtserialport,chardev=agent,name=agent.channel.0"]

    async def ask() -> agent_pb2.GuestDetailsResponse:
        async with contextlib.AsyncExitStack() as stack:
            client = await AgentClient.connect(SerialAddress(port), timeout_s=TIMEOUT_S)
            stack.push_async_callback(client.close)
            check = await client.check(health_pb2.CheckRequest())
            assert check.status == health_pb2.HealthCheckResponse.SERVING
            return await client.get_guest_details(agent_pb2.GuestDetailsRequest(mem_block_size=True))

    console = tmp_path / "console.log"
    with machine(image / "vmlinuz", image / "initrd.img", console, *options):
        details = asyncio.run(ask())
    assert details.mem_block_size_bytes > 0
    assert details.agent_details.init_daemon
    assert "virtio-fs" in details.agent_details.storage_handlers
    assert "Traceback" not in console.read_text()


def test_every_module_of_the_image_loads(image: Path, tmp_path: Path) -> None:
    script = """
    cd /lib/modules/$(busybox uname -r)
    while IFS=: read -r path _; do
        name=$(busybox basename $path .ko)
        modprobe $name || echo "REFUSED $name"
    done <modules.dep
    busybox cut -d ' ' -f 1 /proc/modules | busybox sed 's/^/LOADED /'
    busybox cat /proc/filesystems
    """
    lines = run_in_guest(image, tmp_path, script)
    assert [line for line in lines if line.startswith("REFUSED")] == []
    assert sum(line.startswith("LOADED") for line in lines) > 50
    file_systems = {line.split()[-1] for line in lines if line.startswith(("\t", "nodev"))}
    assert {"9p", "virtiofs", "overlay", "ext4", "xfs", "tmpfs", "cgroup2"} <= file_systems


@pytest.mark.skipif(shutil.which("mkfs.ext4") is None, reason="makes an ext4 disk with the host's mkfs.ext4")
def test_the_kernel_loads_a_file_system_at_its_first_mount(image: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", disk], check=True)
    script = """
    modprobe virtio_pci
    modprobe virtio:d00000002v00001AF4
    busybox mount -t ext4 /dev/vda /mnt && echo kept >/mnt/file && busybox cat /mnt/file
    """
    options = ["-drive", f"if=none,id=disk,file={disk},format=raw", "-device", "virtio-blk-pci,drive=disk"]
    assert "kept" in run_in_guest(image, tmp_path, script, *options)


def test_programs_find_their_libraries(image: Path, tmp_path: Path) -> None:
    lines = run_in_guest(image, tmp_path, "crun --version; ls -ld /root /tmp /dev/console")
    assert any(line.startswith("crun version") for line in lines)
    assert any(line.startswith(stat.filemode(stat.S_IFDIR | 0o1777)) for line in lines)


def test_the_same_packages_and_sources_make_the_same_image(image: Path, tmp_path: Path) -> None:
    # A cache that has the packages, and no image.
    (tmp_path / "packages").symlink_to(CACHE / "guest/packages")
    command = [sys.executable, "-m", "guest.image.build", f"--output={tmp_path}/again", f"--cache={tmp_path}"]
    subprocess.run(command, cwd=REPO, check=True)
    for name in ("vmlinuz", "initrd.img", "manifest.json"):
        assert (tmp_path / "again" / name).read_bytes() == (image / name).read_bytes(), name
