"""What of a spec is a disk. Only files are there to look at: devices are the integration tests'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from virtcontainers import direct_volume
from virtcontainers.config import Mount, RootFs
from virtcontainers.device.block import block_root
from virtcontainers.device.volumes import put_block_volumes, take_block_volumes
from virtcontainers.errors import InvalidArgumentError

PROC = {"destination": "/proc", "type": "proc", "source": "proc"}


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(512))
    return path


def bind(source: Path | str, *options: str) -> dict[str, Any]:
    return {"destination": "/data", "type": "bind", "source": str(source), "options": ["rbind", *options]}


def root(*mounts: Mount) -> RootFs:
    return RootFs(target=Path("/nowhere"), mounts=mounts)


def test_a_root_is_a_disk_when_it_is_one_image_file_with_loop(disk: Path) -> None:
    mount = Mount(type="ext4", source=str(disk), options=("loop", "noatime"))
    found = block_root(root(mount))
    assert found and (found.fstype, found.options) == ("ext4", ("noatime",))
    assert found.device.path == disk and not found.device.readonly and found.device.has_filesystem
    readonly = block_root(root(Mount(type="xfs", source=str(disk), options=("ro", "loop"))))
    assert readonly and readonly.device.readonly and readonly.options == ("nouuid", "ro")
    assert block_root(root(Mount(type="ext4", source=str(disk)))) is None
    assert block_root(root(mount, mount)) is None
    assert block_root(root(Mount(type="ext4", source=str(disk), options=("loop",), target="a"))) is None
    assert block_root(root(Mount(type="overlay", source="overlay", options=("lowerdir=/a",)))) is None
    assert block_root(root()) is None


def test_a_volume_waits_in_its_place(disk: Path) -> None:
    image = {"destination": "/data", "type": "ext4", "source": str(disk), "options": ["loop", "ro"]}
    spec = {"mounts": [PROC, image, bind("/etc")]}
    taken, volumes = take_block_volumes(spec, disabled=False)
    assert spec["mounts"][1] is image
    assert [mount["destination"] for mount in taken["mounts"]] == ["/proc", "/data", "/data"]
    assert taken["mounts"][0] is PROC and taken["mounts"][1] != image
    (volume,) = volumes
    assert (volume.fstype, volume.options, volume.device.readonly) == ("ext4", ("ro",), True)
    guest = {"destination": "/data", "type": "bind", "source": "/there", "options": ["rbind", "ro"]}
    put_block_volumes(taken, [guest])
    assert taken["mounts"] == [PROC, guest, bind("/etc")]


def test_other_mounts_are_no_disks(disk: Path) -> None:
    spec = {"mounts": [PROC, bind(disk), {"destination": "/x", "type": "ext4", "source": str(disk)}]}
    assert take_block_volumes(spec, disabled=False) == (spec, [])
    assert take_block_volumes({}, disabled=False) == ({}, [])


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("/nowhere/disk", ["loop"], "/data: found nothing at /nowhere/disk on the host, expected an image"),
        ("/etc", ["loop"], "/data: found something else at /etc on the host, expected an image file"),
        ("/dev/nothing", [], "/data: found nothing at /dev/nothing on the host, expected a block device"),
    ],
)
def test_a_disk_that_the_host_does_not_have_is_refused_by_name(
    source: str, options: list[str], message: str
) -> None:
    mount = {"destination": "/data", "type": "ext4", "source": source, "options": options}
    with pytest.raises(InvalidArgumentError, match=message):
        take_block_volumes({"mounts": [mount]}, disabled=False)


def test_disable_block_device_use_refuses_a_volume_by_name(disk: Path) -> None:
    image = {"destination": "/data", "type": "ext4", "source": str(disk), "options": ["loop"]}
    with pytest.raises(InvalidArgumentError, match=f"/data: found block device {disk}.*disable_block_device"):
        take_block_volumes({"mounts": [image]}, disabled=True)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, None),
        ({"fsGroup": "12"}, (12, 0)),
        ({"fsGroup": "12", "fsGroupChangePolicy": "OnRootMismatch"}, (12, 1)),
        ({"fsGroup": "twelve"}, "fsGroup 'twelve', expected a group's id"),
        ({"fsGroup": "12", "fsGroupChangePolicy": "Never"}, "'Never', expected Always or OnRootMismatch"),
        ({"encryptionKey": "k"}, "found 'encryptionKey' in its metadata"),
    ],
)
def test_a_direct_volume_is_what_its_mount_info_says(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metadata: dict[str, str], expected: Any
) -> None:
    monkeypatch.setattr(direct_volume, "DIRECT_VOLUMES", tmp_path / "volumes")
    info = {"volume-type": "block", "device": str(disk), "fstype": "xfs", "metadata": metadata}
    direct_volume.add("/volume", json.dumps(info))
    spec = {"mounts": [bind("/volume", "ro")]}
    if isinstance(expected, str):
        with pytest.raises(InvalidArgumentError, match=expected):
            take_block_volumes(spec, disabled=False)
        return
    _, (volume,) = take_block_volumes(spec, disabled=False)
    assert volume.is_direct and (volume.device.path, volume.fstype) == (disk, "xfs")
    # Read-only for one container, which its own mount says; the disk is as its options say.
    assert not volume.device.readonly
    group = volume.fs_group
    assert (group and (group.group_id, group.group_change_policy)) == expected
