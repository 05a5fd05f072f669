"""The files of direct-assigned volumes."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from virtcontainers import direct_volume
from virtcontainers.errors import InvalidArgumentError, NotFoundError

VOLUME = "/var/lib/kubelet/pods/1/volumes/csi~x/mount"
INFO = {"volume-type": "block", "device": "/dev/sdz", "fstype": "ext4", "options": ["noatime"]}


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(direct_volume, "DIRECT_VOLUMES", tmp_path)
    return tmp_path


def test_what_is_added_is_found_where_kata_has_it_until_it_is_removed(directory: Path) -> None:
    assert direct_volume.volume_mount_info(VOLUME) is None
    direct_volume.add(VOLUME, json.dumps(INFO))
    folder = directory / base64.urlsafe_b64encode(VOLUME.encode()).decode()
    assert json.loads((folder / "mountInfo.json").read_text()) == INFO
    assert (folder.stat().st_mode & 0o777, (folder / "mountInfo.json").stat().st_mode & 0o777) == (
        0o700,
        0o600,
    )
    found = direct_volume.volume_mount_info(VOLUME)
    assert found == direct_volume.MountInfo(device="/dev/sdz", fstype="ext4", options=("noatime",))
    direct_volume.add(VOLUME, json.dumps({**INFO, "metadata": {"fsGroup": "7"}}))
    assert (again := direct_volume.volume_mount_info(VOLUME)) and again.metadata == {"fsGroup": "7"}
    direct_volume.remove(VOLUME)
    direct_volume.remove(VOLUME)
    assert list(directory.iterdir()) == []


def test_the_sandbox_that_has_a_volume_is_told(directory: Path) -> None:
    with pytest.raises(NotFoundError, match="is not known"):
        direct_volume.sandbox_id_for_volume(VOLUME)
    direct_volume.add(VOLUME, json.dumps(INFO))
    direct_volume.add("/other", json.dumps(INFO))
    with pytest.raises(NotFoundError, match="no pod has it"):
        direct_volume.sandbox_id_for_volume(VOLUME)
    direct_volume.record_sandbox_id("pod", VOLUME)
    direct_volume.record_sandbox_id("pod", "/other")
    assert direct_volume.sandbox_id_for_volume(VOLUME) == "pod"
    direct_volume.forget_sandbox_id("pod", VOLUME)
    with pytest.raises(NotFoundError):
        direct_volume.sandbox_id_for_volume(VOLUME)
    direct_volume.forget_sandbox_id("pod")
    with pytest.raises(NotFoundError):
        direct_volume.sandbox_id_for_volume("/other")
    direct_volume.forget_sandbox_id("pod")


def test_a_pod_with_the_name_of_the_record_takes_no_record_away() -> None:
    direct_volume.add(VOLUME, json.dumps(INFO))
    with pytest.raises(InvalidArgumentError, match=f"{VOLUME}: found a pod with the id mountInfo.json"):
        direct_volume.record_sandbox_id("mountInfo.json", VOLUME)
    direct_volume.forget_sandbox_id("mountInfo.json", VOLUME)
    direct_volume.forget_sandbox_id("mountInfo.json")
    assert direct_volume.volume_mount_info(VOLUME)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected a JSON object"),
        (json.dumps({**INFO, "device": "sdz"}), '"device": found "sdz", expected an absolute path'),
        (json.dumps({**INFO, "fstype": 4}), '"fstype": found 4, expected a string'),
        (json.dumps({**INFO, "volume-type": "nfs"}), '"volume-type": found "nfs", expected "block"'),
        (json.dumps({**INFO, "options": "ro"}), 'expected a list for "options"'),
        (json.dumps({**INFO, "metadata": {"fsGroup": 7}}), '"metadata".*expected strings'),
    ],
)
def test_mount_info_that_makes_no_sense_is_not_added(directory: Path, info: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"mount info of {VOLUME}.*{message}"):
        direct_volume.add(VOLUME, info)
    assert list(directory.iterdir()) == []


def test_a_path_that_no_file_can_be_named_after_is_no_volume() -> None:
    assert direct_volume.volume_mount_info("/" + "x" * 4000) is None
