"""What the agent reads from and writes to its machine, on files that look like it."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from agent_client.protocols import agent_pb2
from guest.agent import device, linux, storage
from guest.agent import uevent as uevents
from guest.agent.boot import kernel_command_line
from guest.agent.cgroup import Cgroup
from guest.agent.copy_file import copy_file
from guest.agent.device import pci_sysfs_path, set_device_numbers
from guest.agent.hotplug import count_cpus
from guest.agent.modules import find_module
from guest.agent.mount import parse_options
from guest.agent.reaper import Reaper
from guest.agent.storage import Storages
from guest.agent.uevent import DriverLoader, parse_uevent
from ttrpc import StatusError


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], (0, "", [])),
        (["trans=virtio,cache=mmap", "nodev"], (linux.MS_NODEV, "trans=virtio,cache=mmap", [])),
        (["ro", "rw", "noexec", "mode=1777", "size=1k"], (linux.MS_NOEXEC, "mode=1777,size=1k", [])),
        (["rbind", "rprivate"], (linux.MS_BIND | linux.MS_REC, "", [linux.MS_PRIVATE | linux.MS_REC])),
        (["io.katacontainers.fs-opt.overlay-rw", "lowerdir=/a"], (0, "lowerdir=/a", [])),
    ],
)
def test_mount_options(options: list[str], expected: tuple[int, str, list[int]]) -> None:
    assert parse_options(options) == expected


def test_kernel_command_line(tmp_path: Path) -> None:
    path = tmp_path / "cmdline"
    path.write_text("quiet agent.log=info agent.transport=serial agent.log=debug\n")
    options = kernel_command_line(str(path))
    assert options == {"quiet": "", "agent.log": "debug", "agent.transport": "serial"}


@pytest.mark.parametrize(("ranges", "count"), [("0", 1), ("0-3\n", 4), ("0-2,7", 4), ("0,2,4-5", 4)])
def test_count_cpus(ranges: str, count: int) -> None:
    assert count_cpus(ranges) == count


def test_modules_load_after_what_they_need(tmp_path: Path) -> None:
    (tmp_path / "modules.dep").write_text(
        "kernel/fs/9p/9p.ko: kernel/fs/netfs/netfs.ko kernel/net/9p/9pnet.ko\n"
        "kernel/net/9p/9pnet.ko:\n"
        "kernel/drivers/net/virtio_net.ko.xz: kernel/net/core/failover.ko.xz\n"
    )
    assert find_module(str(tmp_path), "9p") == [
        "kernel/net/9p/9pnet.ko",
        "kernel/fs/netfs/netfs.ko",
        "kernel/fs/9p/9p.ko",
    ]
    assert find_module(str(tmp_path), "virtio_net") == [
        "kernel/net/core/failover.ko.xz",
        "kernel/drivers/net/virtio_net.ko.xz",
    ]
    assert find_module(str(tmp_path), "nosuch") is None


def test_uevent() -> None:
    message = b"add@/devices/x/virtio5\0ACTION=add\0SUBSYSTEM=virtio\0MODALIAS=virtio:d00000002v00001AF4\0"
    assert parse_uevent(message) == {
        "ACTION": "add",
        "SUBSYSTEM": "virtio",
        "MODALIAS": "virtio:d00000002v00001AF4",
    }


def uevent(action: str, kind: str, **values: str) -> bytes:
    lines = [f"{action}@/devices/x", f"ACTION={action}", f"SUBSYSTEM={kind}"]
    return "".join(f"{line}\0" for line in (*lines, *(f"{k}={v}" for k, v in values.items()))).encode()


def test_a_driver_is_loaded_once_and_not_where_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    network, disk = "virtio:d00000001v00001AF4", "virtio:d00000002v00001AF4"
    full = "virtio:when-there-is-no-task-left"
    asked: list[str] = []

    class Modprobe(Reaper):
        def spawn(self, path: str, argv: list[str], fds: Sequence[int]) -> asyncio.Future[int]:
            asked.append(argv[-1])
            if argv[-1] == full:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), path)
            status: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            status.set_result(1 if "nosuch" in argv[-1] else 0)
            return status

    async def body() -> None:
        kernel, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        ours.setblocking(False)
        with kernel, ours:
            loader = DriverLoader(Modprobe())
            loader._socket.close()
            loader._socket = ours
            for modalias in (network, disk, disk, full, "virtio:nosuch", "virtio:nosuch", "virtio:last"):
                kernel.send(uevent("add", "virtio", MODALIAS=modalias))
            kernel.send(uevent("bind", "virtio", MODALIAS="virtio:bound"))
            kernel.send(uevent("add", "pci", MODALIAS="pci:other"))
            loader._announced()
            with pytest.raises(BlockingIOError):
                ours.recv(1)
            running = asyncio.create_task(loader.run())
            async with asyncio.timeout(60):
                while "virtio:last" not in asked:  # noqa: ASYNC110
                    await asyncio.sleep(0)
            running.cancel()
            asyncio.get_running_loop().remove_reader(ours)

    monkeypatch.setattr(uevents, "_served", {network})
    monkeypatch.setattr(uevents, "_waiting_devices", lambda: iter(()))
    asyncio.run(body())
    assert asked == [disk, full, "virtio:nosuch", "virtio:nosuch", "virtio:last"]


def test_a_pci_path_is_followed_through_its_bridges(tmp_path: Path) -> None:
    root = str(tmp_path)
    assert pci_sysfs_path("1f.2", root) == f"{root}/0000:00:1f.2"
    with pytest.raises(FileNotFoundError):
        pci_sysfs_path("02/03", root)
    (tmp_path / "0000:00:02.0/pci_bus/0000:01").mkdir(parents=True)
    assert pci_sysfs_path("02/03", root) == f"{root}/0000:00:02.0/0000:01:03.0"


def test_a_device_of_the_spec_gets_the_guests_numbers() -> None:
    spec = {
        "linux": {
            "devices": [{"path": "/dev/xvdc", "type": "b", "major": 202, "minor": 32}],
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
        }
    }
    set_device_numbers(spec, "/dev/xvdc", Path("/dev/null").stat())
    assert spec["linux"]["devices"] == [{"path": "/dev/xvdc", "type": "c", "major": 1, "minor": 3}]
    assert spec["linux"]["resources"]["devices"][1] == {
        "allow": True,
        "access": "rwm",
        "type": "c",
        "major": 1,
        "minor": 3,
    }
    with pytest.raises(StatusError, match="/dev/other"):
        set_device_numbers(spec, "/dev/other", Path("/dev/null").stat())


def test_stats_of_a_cgroup(tmp_path: Path) -> None:
    files = {
        "cpu.stat": "usage_usec 1500\nuser_usec 1000\nnr_periods 4\nnr_throttled 2\nthrottled_usec 7\n",
        "memory.current": "4096\n",
        "memory.max": "max\n",
        "memory.stat": "anon 1024\nfile 2048\n",
        "memory.events": "low 0\nmax 3\noom_kill 1\n",
        "memory.swap.max": "8192\n",
        "pids.current": "5\n",
        "pids.max": "max\n",
        "io.stat": "254:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n",
        "hugetlb.2MB.current": "2097152\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    stats = Cgroup(str(tmp_path)).stats()
    assert stats.cpu_stats.cpu_usage.total_usage == 1_500_000
    assert stats.cpu_stats.throttling_data.throttled_time == 7000
    memory = stats.memory_stats
    assert (memory.cache, memory.usage.usage, memory.usage.failcnt) == (2048, 4096, 3)
    assert (memory.usage.limit, memory.swap_usage.limit, memory.stats["anon"]) == ((1 << 64) - 1, 8192, 1024)
    assert (stats.pids_stats.current, stats.pids_stats.limit) == (5, 0)
    entries = {e.op: e.value for e in stats.blkio_stats.io_service_bytes_recursive}
    assert entries == {"read": 10, "write": 20, "rios": 1, "wios": 2, "dbytes": 0, "dios": 0}
    assert stats.hugetlb_stats["2MB"].usage == 2097152


def test_stats_of_a_cgroup_that_is_gone_are_zero(tmp_path: Path) -> None:
    assert Cgroup(str(tmp_path / "gone")).stats().cpu_stats.cpu_usage.total_usage == 0


def test_a_local_storage_is_made_once_for_all_that_name_it(tmp_path: Path) -> None:
    async def body() -> None:
        storages = Storages()
        point = str(tmp_path / "local")
        wanted = [agent_pb2.Storage(driver="local", mount_point=point, options=["mode=0750"])]
        assert await storages.add(wanted, None) == [point]
        assert await storages.add(wanted, None) == [point]
        assert Path(point).stat().st_mode & 0o7777 == 0o750
        await storages.release([point], None)
        await storages.release([point], None)
        assert Path(point).is_dir()

    asyncio.run(body())


def test_who_comes_for_a_disk_that_another_waits_for_waits_too_and_tries_when_that_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = str(tmp_path / "disk")
    asked: list[asyncio.Future[str]] = []

    async def block_device(driver: str, address: str) -> str:
        asked.append(asyncio.get_running_loop().create_future())
        return await asked[-1]

    monkeypatch.setattr(device, "block_device", block_device)

    async def body() -> None:
        storages = Storages()
        wanted = [agent_pb2.Storage(driver="blk", source="02/01", fstype="nosuchfs", mount_point=point)]
        both = [asyncio.create_task(storages.add(wanted, None)) for _ in range(2)]
        for number in range(2):
            while len(asked) <= number:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert not any(each.done() for each in both[number:])
            asked[number].set_result("/nowhere")
            with pytest.raises(StatusError, match="mount /nowhere"):
                await both[number]

    asyncio.run(body())


class Disks:
    """A kernel's part: what is done to mount points, one after another."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.is_busy = True
        self.was_asked = asyncio.Event()
        loop = asyncio.get_running_loop()

        async def block_device(driver: str, address: str) -> str:
            return f"/dev/{address}"

        def mount(source: str, *_: object) -> None:
            self.done.append(f"mount {source}")

        def remount(*_: object) -> None:
            loop.call_soon_threadsafe(self.was_asked.set)
            if self.is_busy:
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
            self.done.append("read-only")

        monkeypatch.setattr(device, "block_device", block_device)
        monkeypatch.setattr(storage, "mount", mount)
        monkeypatch.setattr(storage, "_READ_ONLY_TIMEOUT_S", 120.0)
        monkeypatch.setattr(linux, "mount", remount)
        monkeypatch.setattr(linux, "umount", lambda point, flags=0: self.done.append("unmount"))


def disk(address: str, point: Path) -> list[agent_pb2.Storage]:
    return [agent_pb2.Storage(driver="blk", source=address, fstype="ext4", mount_point=str(point))]


def test_a_busy_disk_holds_up_nobody_but_who_comes_to_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        disks, storages = Disks(monkeypatch), Storages()
        point = tmp_path / "disk"
        points = await storages.add(disk("vda", point), None)
        leaving = asyncio.create_task(storages.release(points, None))
        await disks.was_asked.wait()
        coming = asyncio.create_task(storages.add(disk("vdb", point), None))
        other = await storages.add(disk("vdc", tmp_path / "other"), None)
        assert not leaving.done()
        assert not coming.done()
        disks.is_busy = False
        await leaving
        await coming
        assert disks.done == ["mount /dev/vda", "mount /dev/vdc", "read-only", "unmount", "mount /dev/vdb"]

        await storages.release(points, None)
        await storages.release(other, None)
        assert disks.done[5:] == ["read-only", "unmount"] * 2
        await storages.add(disk("vda", point), None)
        assert disks.done[9:] == ["mount /dev/vda"], "nothing is remembered of those before"

    asyncio.run(body())


def test_the_end_of_the_sandbox_waits_for_a_disk_that_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        disks, storages = Disks(monkeypatch), Storages()
        points = await storages.add(disk("vda", tmp_path / "disk"), None)
        leaving = asyncio.create_task(storages.release(points, None))
        await disks.was_asked.wait()
        ending = asyncio.create_task(storages.release_all())
        await asyncio.sleep(0)
        assert not ending.done()
        disks.is_busy = False
        await asyncio.gather(leaving, ending)
        assert disks.done == ["mount /dev/vda", "read-only", "unmount"]

    asyncio.run(body())


def copy(
    root: Path, name: str, data: bytes = b"", mode: int = 0o100644, size: int = -1, offset: int = 0
) -> None:
    copy_file(
        agent_pb2.CopyFileRequest(
            path=f"{root}/{name}",
            data=data,
            file_mode=mode,
            dir_mode=0o755,
            file_size=len(data) if size < 0 else size,
            offset=offset,
            uid=os.getuid(),
            gid=os.getgid(),
        ),
        str(root),
    )


def test_a_copied_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    copy(tmp_path, "a/b/file", b"abc", size=6)
    assert not (tmp_path / "a/b/file").exists()
    copy(tmp_path, "a/b/file", b"def", size=6, offset=3)
    assert (tmp_path / "a/b/file").read_bytes() == b"abcdef"
    copy(tmp_path, "a/b/file", b"x", mode=0o100600)
    assert (tmp_path / "a/b/file").read_bytes() == b"x"
    assert (tmp_path / "a/b/file").stat().st_mode == 0o100600


def test_directories_and_links_are_copied(tmp_path: Path) -> None:
    copy(tmp_path, "d", mode=0o042750)
    assert (tmp_path / "d").stat().st_mode == 0o042750
    copy(tmp_path, "link", b"d", mode=0o120777)
    assert (tmp_path / "link").readlink() == Path("d")
    copy(tmp_path, "d/file", b"x")
    copy(tmp_path, "d", mode=0o040755)
    assert (tmp_path / "d/file").exists()
    copy(tmp_path, "link", b"now a file")
    assert not (tmp_path / "link").is_symlink()


def test_nothing_is_copied_out_of_the_shared_directory(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "link").symlink_to(outside)
    for name in ("../outside/x", "a/../../outside/x", "a//b", "."):
        with pytest.raises(StatusError):
            copy(root, name, b"x")
    with pytest.raises(OSError):
        copy(root, "link/x", b"x")
    assert list(outside.iterdir()) == []
