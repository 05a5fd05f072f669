"""What is large, many or full on the shares, and what programs expect of a file system."""

from __future__ import annotations

import hashlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from root_guest import Pod, bind, root_pod
from templates import qemu_arguments
from test_hypervisor import virtiofsd_of

from virtcontainers import mount
from virtcontainers.config import SharedFS
from virtcontainers.hypervisor.virtiofsd import Flavour

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="machines need root")

FILES = 50_000
READ = int(os.environ.get("KATA_PY_READ_FILES", "1000"))
LARGE_MIB = int(os.environ.get("KATA_PY_LARGE_MIB", "64"))
"""More of them take an emulated machine minutes."""

SHARES: dict[str, dict[str, Any]] = {
    "9p": {"shared_fs": SharedFS.VIRTIO_9P, "msize_9p": 65536},
    "virtiofsd-c": {
        "shared_fs": SharedFS.VIRTIO_FS,
        "virtio_fs_cache": "auto",
        "virtio_fs_queue_size": 128,
        "virtio_fs_extra_args": ("--xattr",),
    },
    "virtiofsd-rust": {"shared_fs": SharedFS.VIRTIO_FS, "virtio_fs_cache": "always"},
}


def files(kind: str) -> int:
    """virtiofsd has a file open for each that the guest knows, unless it may use handles."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return FILES if kind != "virtiofsd-c" else min(FILES, limit // 2000 * 1000)


@pytest.fixture(scope="module", params=SHARES)
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def pod(kind: str, guest_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    settings, directory = dict(SHARES[kind]), tmp_path_factory.mktemp(kind)
    if kind != "9p":
        settings["virtio_fs_daemon"] = virtiofsd_of(Flavour.C if kind == "virtiofsd-c" else Flavour.RUST)
    if kind == "virtiofsd-rust" and resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 2 * FILES:
        settings["virtio_fs_extra_args"] = ("--inode-file-handles=prefer",)

    def fill(root: Path) -> None:
        for number in range(files(kind)):
            if number % 1000 == 0:
                folder = root / f"many/{number // 1000}"
                folder.mkdir(parents=True)
            (folder / f"{number}").write_text(f"{number}\n")

    for name in ("volume", "full"):
        (directory / name).mkdir()
    mount.mount("tmpfs", directory / "full", "tmpfs", data="size=4m")
    try:
        mounts = [bind(directory / name, f"/{name}") for name in ("volume", "full")]
        with root_pod(directory, guest_image, mounts, fill=fill, default_memory_mib=512, **settings) as pod:
            yield pod
    finally:
        mount.unmount(directory / "full")
        for file in (directory / "volume").iterdir():
            file.unlink()


def names(count: int) -> str:
    """Of so many files, which are their contents, too."""
    return hashlib.md5(b"".join(b"%d\n" % number for number in range(count))).hexdigest()


def test_a_root_of_many_files_is_complete(pod: Pod, kind: str) -> None:
    count = files(kind)
    # By the shell's own means: programs that list look at each file as well.
    script = "cd /many; for i in *; do cd $i; for j in *; do echo $j; done; cd ..; done | sort -n | md5sum"
    assert pod.sh(script).split()[0] == names(count)
    script = f"seq 0 {READ - 1} | while read n; do echo /many/$((n / 1000))/$n; done"
    assert pod.sh(script + " | xargs cat | md5sum").split()[0] == names(READ)


def test_a_large_file_is_whole_both_ways(pod: Pod) -> None:
    volume = pod.directory / "volume"
    digest, block = hashlib.md5(), os.urandom(1 << 20)
    with (volume / "large").open("wb") as file:
        for number in range(LARGE_MIB):
            piece = number.to_bytes(8, "little") + block[8:]
            digest.update(piece)
            file.write(piece)
    assert pod.sh("md5sum </volume/large").split()[0] == digest.hexdigest()
    pod.sh("dd if=/volume/large of=/volume/copy bs=1M")
    (volume / "large").unlink()
    with (volume / "copy").open("rb") as file:
        assert hashlib.file_digest(file, "md5").hexdigest() == digest.hexdigest()


def test_a_full_disk_is_enospc_and_room_is_room_again(pod: Pod) -> None:
    status, output = pod.run("dd if=/dev/zero of=/full/file bs=64k count=128 conv=fsync")
    assert status == 1
    assert "No space left on device" in output
    assert (pod.directory / "full/file").stat().st_size <= 4 << 20
    assert "No space left on device" in pod.run("echo more >/full/another; sync /full/another")[1]
    pod.sh("rm /full/*; echo more >/full/another")
    assert (pod.directory / "full/another").read_text() == "more\n"


def test_programs_find_what_they_expect_of_a_file_system(pod: Pod, kind: str) -> None:
    found = pod.as_guests_root(f"""
import fcntl, mmap
for place in {pod.volume_in_guest("volume")!r}, {pod.root_in_guest!r}:
    os.chdir(place)
    fd = os.open("file", os.O_RDWR | os.O_CREAT, 0o640)
    os.write(fd, bytes(8192))
    os.fsync(fd)
    os.chown("file", 1234, 5678)
    os.chmod("file", 0o4751)
    os.utime("file", (1, 2))
    seen = os.stat("file")
    print(seen.st_uid, seen.st_gid, oct(seen.st_mode), int(seen.st_mtime), seen.st_size)
    print(seen.st_ino == os.fstat(fd).st_ino, seen.st_ino != os.stat(".").st_ino)
    fcntl.flock(fd, fcntl.LOCK_EX)
    other = os.open("file", os.O_RDWR)
    print(error(fcntl.flock, other, fcntl.LOCK_EX | fcntl.LOCK_NB))
    with mmap.mmap(fd, 4096) as mapped:
        mapped[:6] = b"mapped"
        mapped.flush()
    print(os.pread(other, 6, 0))
    os.rename("file", "renamed")
    print(error(os.stat, "file"), os.pread(fd, 6, 0))
    os.unlink("renamed")
    print(os.pread(fd, 6, 0), os.fstat(fd).st_nlink)
    os.symlink("nowhere", "link")
    print(os.readlink("link"), os.lstat("link").st_size)
    print(error(os.mkdir, "link"), error(os.rmdir, "."), error(open, "x" * 256, "w"))
    direct = error(os.open, "direct", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    page = mmap.mmap(-1, 4096)
    page[:6] = b"direct"
    print(direct if isinstance(direct, str) else error(os.write, direct, page))
    print(error(os.setxattr, "direct", "user.mine", b"value") or os.getxattr("direct", "user.mine"))
""").splitlines()
    for lines in (found[: len(found) // 2], found[len(found) // 2 :]):
        assert lines[:9] == [
            "1234 5678 0o104751 2 8192",
            "True True",
            "EAGAIN",
            "b'mapped'",
            "ENOENT b'mapped'",
            "b'mapped' 0",
            "nowhere 7",
            "EEXIST EINVAL ENAMETOOLONG",
            "4096",
        ]
        # virtiofsd has attributes when it is told to.
        assert lines[9:] == ["ENOTSUP" if kind == "virtiofsd-rust" else "b'value'"]


def test_the_settings_of_the_share_are_in_effect(pod: Pod, kind: str) -> None:
    settings = pod.sandbox.config.hypervisor
    shown = pod.sh("cat /proc/mounts")
    if kind == "9p":
        assert "msize=65536" in shown
        return
    assert " / virtiofs " in shown
    # Not asked of QEMU: to look at a queue that a daemon has, it stops it.
    device = next(text for text in qemu_arguments(pod.sandbox.hypervisor_pid) if "vhost-user-fs" in text)
    assert f"queue-size={settings.virtio_fs_queue_size}" in device
    # A file that the host changes while the guest knows it.
    file = pod.directory / "volume/known"
    file.write_text("old")
    assert pod.sh("cat /volume/known") == "old"
    file.write_text("newer")
    seen = pod.sh("sleep 2; cat /volume/known")
    assert seen == {"auto": "newer", "always": "old"}[settings.virtio_fs_cache]
