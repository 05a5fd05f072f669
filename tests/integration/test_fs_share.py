"""The share on a real host: real mounts, as root."""

import os
import stat
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from virtcontainers import mount
from virtcontainers.config import SHARED_SANDBOXES, Mount, RootFs
from virtcontainers.copied_files import CopiedFile
from virtcontainers.errors import KataError
from virtcontainers.fs_share import FilesystemShare, GuestFolders


@pytest.fixture
def share() -> Iterator[FilesystemShare]:
    share = FilesystemShare(f"test-{uuid.uuid4().hex[:8]}")
    share.prepare()
    yield share
    share.cleanup()
    assert not share.root.exists()
    assert mount.mounts_below(share.root) == []


def overlay(base: Path, layers: int) -> RootFs:
    lowers = []
    for number in range(layers):
        lower = base / f"a-directory-of-a-snapshot-with-a-long-name/{number}/fs"
        lower.mkdir(parents=True)
        (lower / f"layer{number}").write_text(str(number))
        lowers.append(str(lower))
    for name in ("upper", "work", "rootfs"):
        (base / name).mkdir()
    options = (f"lowerdir={':'.join(lowers)}", f"upperdir={base}/upper", f"workdir={base}/work")
    entry = Mount(type="overlay", source="overlay", options=options)
    return RootFs(target=base / "rootfs", mounts=(entry,))


def guest_side(share: FilesystemShare, guest_path: str) -> Path:
    return share.shared_path / guest_path.removeprefix("/run/kata-containers/shared/containers/")


@pytest.mark.parametrize("layers", [1, 100])
def test_rootfs_is_seen_and_written_through_the_share(
    share: FilesystemShare, tmp_path: Path, layers: int
) -> None:
    rootfs = overlay(tmp_path, layers)
    if layers == 100:
        assert len(rootfs.mounts[0].options[0]) > os.sysconf("SC_PAGE_SIZE"), "the case this is about"
    root = guest_side(share, share.share_root_filesystem("web", rootfs))
    assert sorted(p.name for p in root.iterdir()) == sorted(f"layer{n}" for n in range(layers))
    (root / "new").write_text("from the guest")
    assert (tmp_path / "upper/new").read_text() == "from the guest"
    share.unshare_root_filesystem("web", rootfs)
    share.unshare_root_filesystem("web", rootfs)
    assert mount.mounts_below(tmp_path) == []
    assert list(share.shared_path.iterdir()) == []


def test_the_guest_cannot_make_or_rename_at_the_top_of_the_share(
    share: FilesystemShare, tmp_path: Path
) -> None:
    rootfs = overlay(tmp_path, 1)
    share.share_root_filesystem("web", rootfs)
    with pytest.raises(OSError, match="Read-only"):
        (share.shared_path / "x").mkdir()
    with pytest.raises(OSError, match="Read-only"):
        (share.shared_path / "web").rename(share.shared_path / "other")
    share.unshare_root_filesystem("web", rootfs)


@pytest.mark.parametrize("kind", ["file", "directory"])
@pytest.mark.parametrize("readonly", [True, False])
def test_a_volume_is_writable_only_when_it_may_be(
    share: FilesystemShare, tmp_path: Path, kind: str, readonly: bool
) -> None:
    source = tmp_path / "source"
    if kind == "directory":
        source.mkdir()
    else:
        source.write_text("host")
    seen = guest_side(share, share.share_file("web", source, "/data", readonly=readonly))
    written = seen / "f" if kind == "directory" else seen
    if readonly:
        with pytest.raises(OSError, match="Read-only"):
            written.write_text("guest")
    else:
        written.write_text("guest")
        assert (source / "f" if kind == "directory" else source).read_text() == "guest"


def test_a_file_is_shared_with_each_container_of_a_pod(share: FilesystemShare, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n")
    for container in ("one", "two"):
        path = share.share_file(container, tmp_path / "hosts", "/etc/hosts", readonly=False)
        assert guest_side(share, path).read_text() == "127.0.0.1 localhost\n"


def test_a_mount_inside_a_readonly_volume_is_readonly_too(share: FilesystemShare, tmp_path: Path) -> None:
    (tmp_path / "volume/inner").mkdir(parents=True)
    mount.mount("tmpfs", tmp_path / "volume/inner", "tmpfs")
    try:
        seen = guest_side(share, share.share_file("web", tmp_path / "volume", "/data", readonly=True))
        with pytest.raises(OSError, match="Read-only"):
            (seen / "inner/f").write_text("guest")
    finally:
        share.unshare_files("web")
        mount.unmount(tmp_path / "volume/inner")


def options_of(mount_point: Path) -> set[str]:
    """Of the last that was mounted there."""
    lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return set([line[5] for line in lines if line[4] == str(mount_point)][-1].split(","))


def test_on_the_host_devices_setuid_programs_and_symlinks_in_the_share_are_nothing(
    share: FilesystemShare, tmp_path: Path
) -> None:
    rootfs = overlay(tmp_path, 1)
    (tmp_path / "volume/inner").mkdir(parents=True)
    mount.mount("tmpfs", tmp_path / "volume/inner", "tmpfs")
    try:
        root = guest_side(share, share.share_root_filesystem("web", rootfs))
        volume = guest_side(share, share.share_file("web", tmp_path / "volume", "/data", readonly=False))
        for point in (root, volume, volume / "inner"):
            assert {"nosuid", "nodev", "noexec", "nosymfollow"} <= options_of(point)
        assert not {"nosuid", "nodev"} & options_of(tmp_path / "volume/inner"), "which is the host's own"
        os.mknod(volume / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        with pytest.raises(PermissionError):
            (volume / "null").read_bytes()
        (tmp_path / "secret").write_text("the host's")
        (root / "link").symlink_to(tmp_path / "secret")
        with pytest.raises(OSError, match="Too many levels of symbolic links"):
            (root / "link").read_text()
        assert (root / "link").readlink() == tmp_path / "secret"
    finally:
        share.unshare_root_filesystem("web", rootfs)
        share.unshare_files("web")
        mount.unmount(tmp_path / "volume/inner")


def test_a_mount_made_later_in_a_volume_is_not_shared(share: FilesystemShare, tmp_path: Path) -> None:
    (tmp_path / "volume/inner").mkdir(parents=True)
    mount.mount(tmp_path / "volume", tmp_path / "volume", flags=mount.MS_BIND)
    mount.mount("", tmp_path / "volume", flags=mount.MS_SHARED)
    try:
        seen = guest_side(share, share.share_file("web", tmp_path / "volume", "/data", readonly=True))
        mount.mount("tmpfs", tmp_path / "volume/inner", "tmpfs")
        (tmp_path / "volume/inner/later").touch()
        assert list((seen / "inner").iterdir()) == []
    finally:
        share.unshare_files("web")
        mount.unmount_below(tmp_path / "volume")


def test_what_is_unshared_goes_from_the_servers_own_namespace(share: FilesystemShare, tmp_path: Path) -> None:
    """With what is mounted in it. virtiofsd has one."""
    (tmp_path / "volume/inner").mkdir(parents=True)
    mount.mount("tmpfs", tmp_path / "volume/inner", "tmpfs")
    server = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "slave", "sh", "-c", "echo; exec sleep 1000"],
        stdout=subprocess.PIPE,
    )
    try:
        assert server.stdout and server.stdout.readline()
        name = guest_side(share, share.share_file("web", tmp_path / "volume", "/data", readonly=False)).name
        mountinfo = Path(f"/proc/{server.pid}/mountinfo")
        assert f"/shared/{name}/inner " in mountinfo.read_text()
        share.unshare_files("web")
        assert name not in mountinfo.read_text()
    finally:
        server.kill()
        server.communicate()
        share.unshare_files("web")
        mount.unmount(tmp_path / "volume/inner")


def test_a_volume_in_a_folder_that_a_guest_has_does_not_lead_out_of_it(
    share: FilesystemShare, tmp_path: Path
) -> None:
    (tmp_path / "volume/directory").mkdir(parents=True)
    (tmp_path / "host").mkdir()
    share.share_file("hostile", tmp_path / "volume", "/data", readonly=False)
    (tmp_path / "volume/out").symlink_to(tmp_path / "host")
    (tmp_path / "volume/up").symlink_to("../host")
    (tmp_path / "volume/in").symlink_to("directory")
    for name in ("out", "up"):
        with pytest.raises(KataError, match=rf"source .*/volume/{name}: .*; a guest can write in .*/volume$"):
            share.share_file("web", tmp_path / "volume" / name, "/data", readonly=True)
    share.share_file("web", tmp_path / "volume/in", "/data", readonly=True)
    share.share_file("web", tmp_path / "volume", "/data", readonly=True)
    share.unshare_files("web")
    share.unshare_files("hostile")
    share.share_file("web", tmp_path / "volume/out", "/data", readonly=True)


def test_for_what_is_shared_at_one_go_the_guests_folders_are_looked_for_when_there_is_one_more(
    share: FilesystemShare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    def mounts_below(path: Path) -> list[Path]:
        nonlocal looks
        looks += path == SHARED_SANDBOXES
        return find_below(path)

    find_below = mount.mounts_below
    monkeypatch.setattr(mount, "mounts_below", mounts_below)
    for name in ("volume", "host"):
        (tmp_path / name).mkdir()
    (tmp_path / "hosts").touch()
    (tmp_path / "volume/out").symlink_to(tmp_path / "host")
    guests = GuestFolders()
    for number in range(3):
        share.share_file("web", tmp_path / "hosts", f"/file{number}", readonly=False, guests=guests)
        share.share_file("web", tmp_path / "volume/out", f"/data{number}", readonly=True, guests=guests)
    assert looks == 1
    share.share_file("web", tmp_path / "volume", "/volume", readonly=False, guests=guests)
    with pytest.raises(KataError, match="a guest can write in"):
        share.share_file("web", tmp_path / "volume/out", "/last", readonly=True, guests=guests)
    assert looks == 2


def test_a_way_by_the_hosts_own_links_and_mounts_into_a_guests_folder_does_not_lead_out_of_it(
    share: FilesystemShare, tmp_path: Path
) -> None:
    for name in ("volume/inner", "volume/real", "disk", "host"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "host/file").write_text("the host's")
    mount.mount(tmp_path / "disk", tmp_path / "volume/inner", flags=mount.MS_BIND)
    try:
        share.share_file("hostile", tmp_path / "volume", "/data", readonly=False)
        (tmp_path / "alias").symlink_to("volume/way/below")
        (tmp_path / "volume/way").symlink_to(tmp_path)
        (tmp_path / "below").symlink_to("host")
        (tmp_path / "disk/out").symlink_to(tmp_path / "host")
        for source, folder in (("alias", "volume"), ("disk/out", "disk")):
            refusal = rf"{tmp_path}/{source}: .*; a guest can write in {tmp_path}/{folder}$"
            with pytest.raises(KataError, match=refusal):
                share.share_file("web", tmp_path / source, "/data", readonly=True)
            with pytest.raises(KataError, match=refusal):
                CopiedFile(tmp_path / source, "/copy").check(readonly=True)
        (tmp_path / "volume/way").unlink()
        (tmp_path / "volume/way").symlink_to(".")
        (tmp_path / "volume/below").symlink_to("real")
        share.share_file("web", tmp_path / "alias", "/data", readonly=True)
        CopiedFile(tmp_path / "alias", "/copy").check(readonly=True)
    finally:
        for container in ("web", "hostile"):
            share.unshare_files(container)
        mount.unmount(tmp_path / "volume/inner")


def test_unmounting_does_not_follow_a_symlink_that_a_guest_puts_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at what is mounted, and the unmount."""
    look = mount.mounts_below

    def look_and_lose_the_race(path: Path) -> list[Path]:
        found = look(path)
        way = tmp_path / "volume/way"
        if not way.is_symlink():
            way.rename(tmp_path / "volume/moved")
            way.symlink_to(tmp_path / "host")
        return found

    (tmp_path / "volume/way/victim").mkdir(parents=True)
    (tmp_path / "host/victim").mkdir(parents=True)
    share_point = tmp_path / "share"
    mount.mount("tmpfs", tmp_path / "volume/way/victim", "tmpfs")
    mount.mount("tmpfs", tmp_path / "host/victim", "tmpfs")
    try:
        mount.bind_mount(tmp_path / "volume", share_point, recursive=True)
        monkeypatch.setattr(mount, "mounts_below", look_and_lose_the_race)
        mount.unmount_below(share_point)
        assert look(share_point) == []
        assert look(tmp_path / "host") == [tmp_path / "host/victim"]
    finally:
        for point in reversed(look(tmp_path)):
            mount.unmount(point)


def test_a_mounts_target_in_the_root_is_looked_up_as_in_the_container(tmp_path: Path) -> None:
    for name in ("root/real", "host/below"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "root/absolute").symlink_to("/real")
    (tmp_path / "root/out").symlink_to("../../../../../.." + str(tmp_path / "host"))
    try:
        mounts = [
            Mount(type="tmpfs", source="tmpfs", target="/absolute/new"),
            Mount(type="tmpfs", source="tmpfs", target="../real/../real/up", options=("size=4k",)),
        ]
        mount.mount_all(mounts, tmp_path / "root")
        assert mount.mounts_below(tmp_path) == [tmp_path / "root/real" / name for name in ("new", "up")]
        with pytest.raises(KataError, match=r"mount target 'out/below' in .*/root"):
            mount.mount_all([Mount(type="tmpfs", source="tmpfs", target="out/below")], tmp_path / "root")
        assert list((tmp_path / "host/below").iterdir()) == []
    finally:
        mount.unmount_below(tmp_path)


def test_unsharing_one_container_leaves_its_namesakes(share: FilesystemShare, tmp_path: Path) -> None:
    share.share_file("web", tmp_path, "/data", readonly=False)
    kept = guest_side(share, share.share_file("web-1", tmp_path, "/data", readonly=False))
    share.unshare_files("web")
    assert list(share.shared_path.iterdir()) == [kept]


def test_a_destination_with_the_longest_name_is_shared(share: FilesystemShare, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("content")
    seen = guest_side(share, share.share_file("web", tmp_path / "f", "/" + "\u00fc" * 127, readonly=False))
    assert seen.read_text() == "content"


def test_missing_source_is_named(share: FilesystemShare, tmp_path: Path) -> None:
    with pytest.raises(KataError, match=r"source .*/nowhere: No such file"):
        share.share_file("web", tmp_path / "nowhere", "/data", readonly=False)


def test_cleanup_never_deletes_content(tmp_path: Path) -> None:
    (tmp_path / "tree/directory").mkdir(parents=True)
    (tmp_path / "tree/directory/file").write_text("precious")
    with pytest.raises(KataError, match="has content"):
        mount.remove_mountpoints(tmp_path / "tree")
    assert (tmp_path / "tree/directory/file").read_text() == "precious"


def test_cleanup_enters_neither_symlinks_nor_mounts(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "host/empty").mkdir(parents=True)
    (tmp_path / "tree/link").symlink_to(tmp_path / "host")
    with pytest.raises(KataError, match="tree/link is not removed"):
        mount.remove_mountpoints(tmp_path / "tree")
    with pytest.raises(KataError, match="tree/link is not removed"):
        mount.remove_mountpoints(tmp_path / "tree/link")
    assert (tmp_path / "host/empty").exists()
    mount.remove_mountpoints(tmp_path / "nowhere")


def test_a_list_of_mounts_that_fails_half_way_is_undone(tmp_path: Path) -> None:
    good = Mount(type="tmpfs", source="tmpfs")
    with pytest.raises(KataError, match="nosuchfs"):
        mount.mount_all([good, Mount(type="nosuchfs", source="none")], tmp_path)
    assert mount.mounts_below(tmp_path) == []
