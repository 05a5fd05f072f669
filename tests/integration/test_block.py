"""Disks: roots, devices and volumes that a machine is given instead of a share of the host's files."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import signal
import stat
import struct
import subprocess
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from harness import TIMEOUT_S, Config, Ctr, loop, new_id, processes_of, wait_for
from private_containerd import CACHE, Containerd
from templates import KATA_PY, Log, Pods, ReadyTemplates, templates
from test_sandbox import booting, container_config, run, sandbox_config, spec
from test_share_sizes import LARGE_MIB

from virtcontainers import direct_volume
from virtcontainers.config import ContainerConfig, Mount, SharedFS
from virtcontainers.device import manager
from virtcontainers.device.block import DeviceInfo
from virtcontainers.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from virtcontainers.fs_share import FilesystemShare
from virtcontainers.sandbox import Sandbox, create_sandbox

T = TypeVar("T")

MIB = 1 << 20


def image(path: Path, mib: int = 16, *, root: Path | None = None, fs: bool = True) -> Path:
    """A sparse file, with an ext4 in it that has the files of `root`."""
    path.touch()
    os.truncate(path, mib * MIB)
    if fs:
        contents = ["-d", str(root)] if root else []
        subprocess.run(["mkfs.ext4", "-q", *contents, str(path)], check=True)
    return path


def partitioned(path: Path, mib: int) -> Path:
    """An image of a disk that has a partition of 4 MiB, with nothing in it."""
    disk = image(path, mib, fs=False)
    with disk.open("r+b") as file:
        # As of DOS: the first of four entries, and the mark of such a table.
        file.seek(446)
        file.write(struct.pack("<4xB3xII48xH", 0x83, 2048, 8192, 0xAA55))
    return disk


def read_image(path: Path, name: str) -> str:
    """A file of the ext4 in an image that nobody has mounted."""
    command = ["debugfs", "-R", f"cat {name}", str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def loops(path: Path) -> list[str]:
    """Loop devices of files below."""
    found = subprocess.run(["losetup", "-l", "-n", "-O", "NAME,BACK-FILE"], capture_output=True, text=True)
    return [line.split()[0] for line in found.stdout.splitlines() if str(path) in line]


def wait_until_no_loops(path: Path) -> None:
    """A device ends when the last mount of it has been taken apart."""
    wait_for(f"the loop devices of {path} to go", lambda: not loops(path))


@contextlib.contextmanager
def loop_partition(device: str) -> Iterator[str]:
    """The first of the partitions that are on a loop device."""
    subprocess.run(["partx", "--add", device], check=True)
    try:
        yield f"{device}p1"
    finally:
        subprocess.run(["partx", "--delete", device], check=True)


def grow(path: Path, device: str, mib: int) -> None:
    """A CSI driver's part."""
    os.truncate(path, mib * MIB)
    subprocess.run(["losetup", "-c", device], check=True)


def device_entry(device: str) -> dict[str, Any]:
    """Of a spec's linux.devices."""
    number = Path(device).stat().st_rdev
    return {"path": "/dev/xvdz", "type": "b", "major": os.major(number), "minor": os.minor(number)}


@contextlib.contextmanager
def registered(volume: Path, info: dict[str, Any]) -> Iterator[None]:
    direct_volume.add(str(volume), json.dumps({"volume-type": "block", "fstype": "ext4", **info}))
    try:
        yield
    finally:
        direct_volume.remove(str(volume))
        direct_volume.DIRECT_VOLUMES.rmdir()


# -- a pod whose machine shares no files with the host at all


@dataclass
class Pod:
    """Its first container runs, and has a disk for its root."""

    sandbox: Sandbox
    loop: asyncio.Runner
    directory: Path

    def await_(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run(work)

    def container(
        self, name: str, script: str, mounts: list[dict[str, Any]] | None = None, **linux: Any
    ) -> ContainerConfig:
        given = spec("sh", "-c", f"exec 2>&1; {script}", mounts=mounts)
        given["linux"] |= linux
        return block_container(self.directory, new_id(name), given)

    def run(self, config: ContainerConfig) -> str:
        """A container to its end, which is removed then; what it wrote."""

        async def body() -> str:
            container = await self.sandbox.create_container(config)
            try:
                return (await run(container))[1].decode()
            finally:
                await container.delete()

        return self.await_(body())

    def disks(self) -> list[str]:
        """What QEMU has: the names of its block nodes."""
        found = self.await_(self.sandbox.hypervisor.monitor.execute("query-named-block-nodes"))  # type: ignore[attr-defined]
        return sorted(node["node-name"] for node in found)


def block_container(directory: Path, container_id: str, given: dict[str, Any]) -> ContainerConfig:
    """As blockfile's: the root is an image file, `<bundle>/disk`."""
    config = container_config(directory, container_id, given)
    disk = image(config.bundle / "disk", root=config.bundle / "lower")
    mount = Mount(type="ext4", source=str(disk), options=("loop",))
    return replace(config, rootfs=replace(config.rootfs, mounts=(mount,)))


MACHINES: dict[str, dict[str, Any]] = {
    "virtio-blk": {"block_device_aio": "native"},
    "virtio-scsi": {"enable_iothreads": True, "block_device_cache_set": True},
}


@contextlib.contextmanager
def running_pod(
    directory: Path,
    guest_image: Path,
    *,
    factory: Pods = booting,
    **hypervisor: Any,
) -> Iterator[Pod]:
    """Its machine shares nothing."""
    pod_id = new_id("pod")
    config = sandbox_config(
        directory / "unused",
        guest_image,
        pod_id,
        spec("sleep", "100000"),
        shared_fs=SharedFS.NONE,
        **hypervisor,
    )
    config = replace(config, container=block_container(directory, pod_id, config.container.spec))

    async def start() -> Sandbox:
        sandbox = await create_sandbox(config, factory(config))
        await sandbox.containers[pod_id].start()
        return sandbox

    with asyncio.Runner() as runner, pytest.MonkeyPatch.context() as patch:
        # On a busy host a guest takes its time to let go of a disk.
        patch.setattr(manager, "_UNPLUG_TIMEOUT_S", TIMEOUT_S)
        sandbox = runner.run(start())
        try:
            yield Pod(sandbox, runner, directory)
        finally:
            runner.run(sandbox.delete())


@pytest.fixture(scope="module", params=MACHINES)
def pod(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, guest_image: Path
) -> Iterator[Pod]:
    directory, driver = tmp_path_factory.mktemp("pod"), request.param
    with running_pod(directory, guest_image, block_device_driver=driver, **MACHINES[driver]) as running:
        yield running


def test_a_root_is_the_containers_alone_and_full_when_it_is_full(pod: Pod) -> None:
    disks = pod.disks()
    script = "echo mine > /f; cat /f; while cat /bin/busybox; do :; done > /big; true"
    config = pod.container("root", script)
    output = pod.run(config)
    assert output.startswith("mine\n") and "No space left on device" in output
    assert read_image(config.bundle / "disk", "/f") == "mine\n"
    assert pod.disks() == disks
    # Nothing was mounted on the host for it.
    assert not os.path.ismount(config.bundle / "rootfs")
    assert loops(pod.directory) == []


def test_a_device_of_the_host_is_the_root(pod: Pod) -> None:
    config = pod.container("root", "echo from the guest > /f")
    disk = config.bundle / "disk"
    with loop(disk) as device:
        mount = Mount(type="ext4", source=device)
        pod.run(replace(config, rootfs=replace(config.rootfs, mounts=(mount,))))
    assert read_image(disk, "/f") == "from the guest\n"


def test_a_readonly_root_is_read_only_for_the_machine(pod: Pod) -> None:
    config = pod.container("root", "echo x > /f; cat /sys/block/*/ro 2>/dev/null")
    mount = replace(config.rootfs.mounts[0], options=("loop", "ro"))
    config = replace(config, rootfs=replace(config.rootfs, mounts=(mount,)))
    config.spec["mounts"].append({"destination": "/sys", "type": "sysfs", "source": "sysfs"})
    (config.bundle / "lower/sys").mkdir()
    (config.bundle / "disk").unlink()
    image(config.bundle / "disk", root=config.bundle / "lower")
    output = pod.run(config)
    assert "Read-only file system" in output
    assert output.split()[-2:] == ["0", "1"]


def test_a_device_that_two_containers_have_is_plugged_in_once_and_out_at_the_end(
    pod: Pod, tmp_path: Path
) -> None:
    with loop(image(tmp_path / "disk", 8, fs=False)) as device:
        entry = device_entry(device)
        write = pod.container("write", "echo hello > /dev/xvdz; sleep 1000", devices=[entry])
        rule = {"allow": True, "type": "b", "major": entry["major"], "minor": entry["minor"], "access": "rm"}
        reading = pod.container(
            "read", "until read l < /dev/xvdz && [ $l ]; do :; done; echo $l", devices=[entry]
        )
        # What it may only read the guest cannot write, whatever it does.
        readonly = pod.container(
            "readonly",
            "echo x > /dev/xvdz; read line < /dev/xvdz; echo $line",
            devices=[entry],
            resources={"devices": [{"allow": False, "access": "rwm"}, rule]},
        )
        disks = pod.disks()

        async def body() -> None:
            first = await pod.sandbox.create_container(write)
            try:
                await first.start()
                second = await pod.sandbox.create_container(reading)
                for _ in range(100):
                    status, output = await run(second)
                    await second.delete()
                    if output == b"hello\n":
                        break
                    second = await pod.sandbox.create_container(replace(reading, id=new_id("read")))
                assert (status, output) == (0, b"hello\n")
                found = await pod.sandbox.hypervisor.monitor.execute("query-named-block-nodes")  # type: ignore[attr-defined]
                # The roots' are others.
                assert sum(node["drv"] == "host_device" for node in found) == 1
                with pytest.raises(InvalidArgumentError, match=f"{device}: found it writable in the machine"):
                    await pod.sandbox.create_container(replace(readonly, id=new_id("readonly")))
            finally:
                await first.stop()
                await first.delete()

        pod.await_(body())
        assert pod.disks() == disks
        assert pod.run(readonly).endswith("hello\n")
        assert Path(device).read_bytes()[:6] == b"hello\n"


def test_devices_in_use_or_empty_are_refused_by_name(pod: Pod, tmp_path: Path) -> None:
    disk = image(tmp_path / "disk", 8)
    (tmp_path / "mnt").mkdir()
    with loop(disk) as device:
        entry = device_entry(device)
        subprocess.run(["mount", device, str(tmp_path / "mnt")], check=True)
        try:
            with pytest.raises(FailedPreconditionError, match=f"/dev/xvdz.*{device} is in use by the host"):
                pod.run(pod.container("busy", "true", devices=[entry]))
            volume = {"destination": "/data", "type": "ext4", "source": device}
            with pytest.raises(
                FailedPreconditionError, match=f"mount /data of container.*{device} is in use"
            ):
                pod.run(pod.container("busy", "true", mounts=[volume]))
        finally:
            subprocess.run(["umount", str(tmp_path / "mnt")], check=True)
    with loop(image(tmp_path / "none", 0, fs=False)) as device:
        entry = device_entry(device)
        with pytest.raises(InvalidArgumentError, match="found 0 bytes, expected a disk"):
            pod.run(pod.container("empty", "true", devices=[entry]))
    disk = partitioned(tmp_path / "parts", 16)
    with loop(disk) as device, loop_partition(device) as partition:
        subprocess.run(["mkfs.ext4", "-q", partition], check=True)
        subprocess.run(["mount", partition, str(tmp_path / "mnt")], check=True)
        try:
            with pytest.raises(FailedPreconditionError, match=f"{device} is in use by the host"):
                pod.run(pod.container("busy", "true", devices=[device_entry(device)]))
        finally:
            subprocess.run(["umount", str(tmp_path / "mnt")], check=True)
    entry |= {"major": 4000, "minor": 1}
    with pytest.raises(InvalidArgumentError, match="the host has no block device 4000:1"):
        pod.run(pod.container("nothing", "true", devices=[entry]))


def test_volumes_that_are_disks(pod: Pod, tmp_path: Path) -> None:
    """With a file system, bare, and read-only; two containers of a pod may have the same."""
    disk, bare = image(tmp_path / "disk", 8), image(tmp_path / "bare", 8, fs=False)
    with bare.open("r+") as file:
        file.write("12345\n")
    with loop(disk) as device, loop(bare) as bare_device:
        mounts: list[dict[str, Any]] = [
            {"destination": "/data", "type": "ext4", "source": device, "options": ["noatime"]},
            {"destination": "/disk", "type": "bind", "source": bare_device, "options": ["rbind"]},
        ]
        script = "echo one >> /data/f; cat /data/f; read line < /disk; echo $line; echo hello > /disk"
        assert pod.run(pod.container("one", script, mounts)) == "one\n12345\n"
        assert pod.run(pod.container("two", script, mounts)) == "one\none\nhello\n"
        mounts[1]["options"] = ["rbind", "ro"]
        config = pod.container("three", "echo no > /disk; read line < /disk; echo $line", mounts[1:])
        assert pod.run(config).endswith("hello\n")
        assert Path(bare_device).read_bytes()[:6] == b"hello\n"
    assert read_image(disk, "/f") == "one\none\n"


def test_a_large_file_on_a_disk_is_whole_both_ways(pod: Pod, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    digest, block = hashlib.md5(), os.urandom(MIB)
    with (tmp_path / "files/large").open("wb") as file:
        for number in range(LARGE_MIB):
            piece = number.to_bytes(8, "little") + block[8:]
            digest.update(piece)
            file.write(piece)
    disk = image(tmp_path / "disk", 5 * LARGE_MIB // 2 + 32, root=tmp_path / "files")
    (tmp_path / "files/large").unlink()
    mounts = [{"destination": "/data", "type": "ext4", "source": str(disk), "options": ["loop"]}]
    script = "/bin/busybox md5sum < /data/large; /bin/busybox dd if=/data/large of=/data/copy bs=1M"
    output = pod.run(pod.container("large", script, mounts))
    assert output.split()[0] == digest.hexdigest()
    assert f"{LARGE_MIB}+0 records out" in output
    subprocess.run(["debugfs", "-R", f"dump /copy {tmp_path}/copy", str(disk)], check=True)
    with (tmp_path / "copy").open("rb") as file:
        assert hashlib.file_digest(file, "md5").hexdigest() == digest.hexdigest()


@pytest.mark.parametrize("kind", ["image", "device"])
def test_a_direct_volume_is_mounted_by_the_guest_measured_and_grows(
    pod: Pod, tmp_path: Path, kind: str
) -> None:
    disk, volume = image(tmp_path / "disk", 8), tmp_path / "volume"
    group = {"fsGroup": "1234", "fsGroupChangePolicy": "Always"}
    mounts = [{"destination": "/data", "type": "bind", "source": str(volume), "options": ["rbind"]}]
    with contextlib.ExitStack() as stack:
        device = stack.enter_context(loop(disk)) if kind == "device" else str(disk)
        info = {"device": device, "options": ["noatime"], "metadata": group}
        stack.enter_context(registered(volume, info))
        config = pod.container("direct", "echo kept > /data/f; echo written; sleep 1000", mounts)

        async def body() -> None:
            sandbox = pod.sandbox
            container = await sandbox.create_container(config)
            try:
                await container.start()
                assert await container.process.read_stdout(100) == b"written\n"
                other = await sandbox.create_container(pod.container("other", "true", mounts))
                await other.delete()
                assert direct_volume.sandbox_id_for_volume(str(volume)) == sandbox.id
                before = await sandbox.guest_volume_stats(device)
                assert 4 * MIB < before.usage[0].total <= 8 * MIB
                with pytest.raises(InvalidArgumentError, match="does not grow to 4194304"):
                    await sandbox.agent.resize_volume(
                        container.disks.guest_volumes[device].mount_point, 4 * MIB
                    )
                if kind == "device":
                    grow(disk, device, 64)
                await sandbox.resize_guest_volume(device, 64 * MIB)
                after = await sandbox.guest_volume_stats(device)
                assert 48 * MIB < after.usage[0].total <= 64 * MIB
                assert disk.stat().st_size == 64 * MIB
                with pytest.raises(NotFoundError, match="has no volume that is block device /dev/none"):
                    await sandbox.guest_volume_stats("/dev/none")
            finally:
                await container.stop()
                await container.delete()

        pod.await_(body())
        with pytest.raises(NotFoundError, match="no pod has it"):
            direct_volume.sandbox_id_for_volume(str(volume))
    assert read_image(disk, "/f") == "kept\n"
    show = subprocess.run(["debugfs", "-R", "stat /f", str(disk)], check=True, capture_output=True, text=True)
    # A new file is the group's because its folder is setgid.
    assert re.search(r"Group:\s+1234\b", show.stdout)
    subprocess.run(["e2fsck", "-fn", str(disk)], check=True, capture_output=True)


def test_a_guest_chooses_no_disk_of_the_host(pod: Pod, tmp_path: Path) -> None:
    """It has made a symlink in a volume of its own, and the kubelet names the path as a sub-path."""
    share = FilesystemShare(new_id("other"))
    share.prepare()
    try:
        volume = tmp_path / "volume"
        volume.mkdir()
        share.share_file("c", volume, "/data", readonly=False)
        with loop(image(tmp_path / "disk", 8, fs=False)) as device:
            (volume / "link").symlink_to(device)
            os.mknod(volume / "node", 0o600 | stat.S_IFBLK, Path(device).stat().st_rdev)
            for name in ("link", "node"):
                mount = {
                    "destination": "/x",
                    "type": "bind",
                    "source": str(volume / name),
                    "options": ["rbind"],
                }
                with pytest.raises(InvalidArgumentError, match=f"/x.*{name}: a guest can write in {volume}"):
                    pod.run(pod.container("subpath", "true", mounts=[mount]))
    finally:
        share.cleanup()


def test_a_disk_that_the_guest_keeps_is_not_waited_for_for_ever(
    pod: Pod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hypervisor, devices = pod.sandbox.hypervisor, pod.sandbox.devices
    disk = DeviceInfo(path=image(tmp_path / "disk", 8, fs=False))
    before = pod.disks()
    monitor = hypervisor.monitor  # type: ignore[attr-defined]

    # Of a SCSI disk the guest is not asked.
    is_asked = pod.sandbox.config.hypervisor.block_device_driver == "virtio-blk"

    async def body() -> None:
        device = await devices.attach(hypervisor, disk)
        await monitor.execute("stop")
        with monkeypatch.context() as patch:
            patch.setattr(manager, "_UNPLUG_TIMEOUT_S", 0.5 if is_asked else TIMEOUT_S)
            await devices.detach(hypervisor, device)
        await monitor.execute("cont")
        assert ("has not let go of virtio-drive" in caplog.text) is is_asked
        # Who wants it again has the guest let go of it first.
        with monkeypatch.context() as patch:
            patch.setattr(manager, "_UNPLUG_TIMEOUT_S", TIMEOUT_S)
            await devices.detach(hypervisor, await devices.attach(hypervisor, disk))

    pod.await_(body())
    assert pod.disks() == before


def test_what_was_written_is_on_a_disk_that_others_still_see(pod: Pod, tmp_path: Path) -> None:
    """A container that is made while another has a disk has the mount in its namespace, too."""
    disk = image(tmp_path / "disk", 8)
    mount = {"destination": "/data", "type": "ext4", "source": str(disk), "options": ["loop"]}

    async def body() -> None:
        writing = await pod.sandbox.create_container(pod.container("one", "echo kept > /data/f", [mount]))
        other = await pod.sandbox.create_container(pod.container("two", "sleep 1000"))
        try:
            await other.start()
            assert await run(writing) == (0, b"")
            await writing.delete()
            assert read_image(disk, "/f") == "kept\n"
        finally:
            await other.stop()
            await other.delete()

    pod.await_(body())
    subprocess.run(["e2fsck", "-fn", str(disk)], check=True, capture_output=True)


def test_a_root_that_is_no_disk_is_refused_where_nothing_is_shared(pod: Pod) -> None:
    config = container_config(pod.directory, new_id("overlay"), spec("true"))
    with pytest.raises(InvalidArgumentError, match=r'shared_fs = "none".*blockfile'):
        pod.run(config)
    assert config.id not in pod.sandbox.containers


# -- containerd


@pytest.fixture(scope="module")
def blockfile(tmp_path_factory: pytest.TempPathFactory, guest_image: Path) -> Iterator[Ctr]:
    """containerd 2.x, whose blockfile snapshotter gives image files."""
    binaries = CACHE / "containerd/sid/bin"
    if not (binaries / "containerd").exists():
        pytest.skip("run hack/containerd-versions")
    directory = tmp_path_factory.mktemp("c")
    scratch = image(directory / "scratch", 48)
    plugin = f"""
[plugins."io.containerd.snapshotter.v1.blockfile"]
  root_path = "{directory}/blockfile"
  scratch_file = "{scratch}"
  fs_type = "ext4"
  mount_options = []
  recreate_scratch = true
"""
    containerd = Containerd(root=directory / "root", run=directory / "run", binaries=binaries, plugins=plugin)
    containerd.start()
    yield Ctr(containerd)
    containerd.destroy()
    wait_until_no_loops(directory)


SNAPSHOTTER = ("--snapshotter", "blockfile")


@pytest.mark.parametrize(("driver", "shared_fs"), [("virtio-blk", "virtio-9p"), ("virtio-scsi", "none")])
def test_blockfile_roots_are_mounted_in_clones(
    blockfile: Ctr, tmp_path: Path, ready_templates: ReadyTemplates, driver: str, shared_fs: str
) -> None:
    settings = {"hypervisor.qemu": {"block_device_driver": driver, "shared_fs": shared_fs}}
    with templates(tmp_path, settings) as made:
        made.put(ready_templates)
        log = Log(blockfile.containerd)
        first = new_id("blockfile")
        script = "grep ' / ' /proc/mounts; echo hello > /f; cat /f"
        for container_id in (first, new_id("blockfile")):
            result = blockfile.run(container_id, "sh", "-c", script, options=(*made.options, *SNAPSHOTTER))
            assert result.returncode == 0, result.stderr
            device, *_, last = result.stdout.decode().split()
            assert device == ("/dev/vda" if driver == "virtio-blk" else "/dev/sda")
            assert last == "hello"
            # That no template fits would be one.
            assert log.of_the_factory() == []
    wait_until_no_loops(blockfile.containerd.root.parent)


def test_disable_block_device_use_mounts_the_image_on_the_host(
    blockfile: Ctr, container_id: str, config: Config, tmp_path: Path
) -> None:
    options = config({"hypervisor.qemu": {"disable_block_device_use": True, "shared_fs": "virtio-9p"}})
    # Of a shim that is killed ctr leaves them.
    options += ("--fifo-dir", str(tmp_path / "fifo"))
    directory = blockfile.containerd.root.parent
    with blockfile.detached(container_id, "sleep", "1000", options=(*options, *SNAPSHOTTER)):
        mounts = blockfile.exec(container_id, "grep", " / ", "/proc/mounts").stdout.decode()
        assert mounts.startswith("kataShared / 9p ")
        wait_for("its one loop device", lambda: len(loops(directory)) == 1)
        # Whoever is killed has no chance to take anything back.
        for program in ("containerd-shim-kata-py-v2", "qemu-system"):
            for pid in processes_of(container_id, program):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        wait_until_no_loops(directory)


def test_kill_9_leaves_a_blockfile_root_to_nobody(
    blockfile: Ctr, container_id: str, config: Config, tmp_path: Path
) -> None:
    options = config({"hypervisor.qemu": {"shared_fs": "none"}})
    options += ("--fifo-dir", str(tmp_path / "fifo"))
    with blockfile.detached(container_id, "sleep", "1000", options=(*options, *SNAPSHOTTER)):
        for pid in processes_of(container_id, "containerd-shim-kata-py-v2"):
            os.kill(pid, signal.SIGKILL)
        wait_for("QEMU's end", lambda: not processes_of(container_id, "qemu-system"))
    wait_until_no_loops(blockfile.containerd.root.parent)


def test_kata_py_direct_volume(ctr: Ctr, container_id: str, tmp_path: Path) -> None:
    disk, volume = image(tmp_path / "50% disk", 8), tmp_path / "volume"
    of_volume = ("--volume-path", str(volume))

    def kata_py(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(KATA_PY), "direct-volume", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    info = json.dumps({"volume-type": "block", "device": str(disk), "fstype": "ext4"})
    assert kata_py("add", *of_volume, "--mount-info", info).returncode == 0
    try:
        refused = kata_py("stats", *of_volume)
        assert (refused.returncode, refused.stderr) == (
            1,
            f"kata-py: direct volume {volume}: no pod has it\n",
        )
        mount = f"type=bind,src={volume},dst=/data,options=rbind:rw"
        with ctr.detached(container_id, "sleep", "1000", options=("--mount", mount)):
            written = ctr.exec(container_id, "sh", "-c", "echo hello > /data/f")
            assert written.returncode == 0, written.stderr
            before = json.loads(kata_py("stats", *of_volume).stdout)
            assert before["usage"][0]["unit"] == 1 and before["usage"][0]["total"] <= 8 * MIB
            grown = kata_py("resize", *of_volume, "--size", str(32 * MIB))
            assert (grown.returncode, grown.stderr) == (0, "")
            after = json.loads(kata_py("stats", *of_volume).stdout)
            assert 24 * MIB < after["usage"][0]["total"] <= 32 * MIB
            smaller = kata_py("resize", *of_volume, "--size", str(16 * MIB))
            assert smaller.returncode == 1
            assert f"{disk}: found a size of 16777216 bytes, expected at least the 33554432" in smaller.stderr
    finally:
        assert kata_py("remove", *of_volume).returncode == 0
        direct_volume.DIRECT_VOLUMES.rmdir()
    assert read_image(disk, "/f") == "hello\n"
    wrong = kata_py("add", *of_volume, "--mount-info", '{"volume-type": "block"}')
    assert wrong.returncode == 1 and '"device": found null, expected a string' in wrong.stderr


def test_ctr_gives_a_device_to_a_container(ctr: Ctr, container_id: str, tmp_path: Path) -> None:
    with loop(image(tmp_path / "disk", 8, fs=False)) as device:
        script = f"stat -c %F {device}; echo from the guest > {device}"
        options = ("--device", device)
        result = ctr.run(container_id, "sh", "-c", script, options=options)
        assert result.stdout == b"block special file\n", result.stderr
        assert Path(device).read_bytes()[:15] == b"from the guest\n"
