"""The share on a real host: real mounts, as root."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from virtcontainers import mount
from virtcontainers.config import Mount, RootFs
from virtcontainers.errors import KataError
from virtcontainers.fs_share import FilesystemShare


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
    assert list((share.root / "private").iterdir()) == []


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


def test_a_list_of_mounts_that_fails_half_way_is_undone(tmp_path: Path) -> None:
    good = Mount(type="tmpfs", source="tmpfs")
    with pytest.raises(KataError, match="nosuchfs"):
        mount.mount_all([good, Mount(type="nosuchfs", source="none")], tmp_path)
    assert mount.mounts_below(tmp_path) == []
