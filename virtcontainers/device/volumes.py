"""Which of a container's mounts are block devices, that the guest is given instead of a share of them; after
Kata's `createBlockDevices`."""

from __future__ import annotations

import base64
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent_client.protocols import agent_pb2, types_pb2
from virtcontainers import direct_volume
from virtcontainers.config import GUEST_SANDBOX_DIR, OCISpec
from virtcontainers.device.block import DeviceInfo, is_block_device, is_readonly
from virtcontainers.device.manager import BlockDevice
from virtcontainers.errors import InvalidArgumentError

_PLACEHOLDER = "kata-py-block"
"""The type of a mount that waits for its disk to be plugged in."""

_LOOP = "loop"


@dataclass(frozen=True, kw_only=True)
class BlockVolume:
    """One mount that is a disk."""

    mount: dict[str, Any]
    """As the spec has it."""
    device: DeviceInfo
    fstype: str
    """"bind": no file system, the container is given the device itself."""
    options: tuple[str, ...] = ()
    fs_group: agent_pb2.FSGroup | None = None
    is_direct: bool = False

    @property
    def destination(self) -> str:
        return str(self.mount["destination"])

    def storage(self, device: BlockDevice) -> agent_pb2.Storage:
        """What the guest mounts, once for all containers of the pod that have it."""
        assert device.plugged is not None
        name = base64.urlsafe_b64encode(device.plugged.address.encode()).decode()
        if self.fstype == "bind":
            name += "-device"
        storage = device.agent_storage(
            fstype=self.fstype, options=self.options, mount_point=f"{GUEST_SANDBOX_DIR}storage/{name}"
        )
        if self.fs_group is not None:
            storage.fs_group.CopyFrom(self.fs_group)
        return storage

    def guest_mount(self, storage: agent_pb2.Storage) -> dict[str, Any]:
        """How the container gets it from there."""
        options = self.mount.get("options") or []
        if self.mount.get("type") != "bind" and not {"bind", "rbind"} & set(options):
            options = ["rbind", *(["ro"] if "ro" in options else [])]
        destination = self.mount["destination"]
        return {"destination": destination, "type": "bind", "source": storage.mount_point, "options": options}


def take_block_volumes(spec: OCISpec, *, disabled: bool) -> tuple[OCISpec, list[BlockVolume]]:
    """The spec with a placeholder for each, for `put_block_volumes`, and the volumes.

    `spec` is not modified. Raises InvalidArgumentError for a volume that cannot be had; with `disabled`
    (disable_block_device_use) that is each.
    """
    volumes: list[BlockVolume] = []
    mounts: list[dict[str, Any]] = []
    for mount in spec.get("mounts") or []:
        volume = _block_volume(mount)
        if volume is None:
            mounts.append(mount)
            continue
        if disabled:
            raise InvalidArgumentError(
                f"mount {volume.destination}: found block device {volume.device.path}, which "
                "disable_block_device_use = true in [hypervisor.qemu] keeps out of the machine"
            )
        mounts.append({"destination": volume.destination, "type": _PLACEHOLDER, "source": str(len(volumes))})
        volumes.append(volume)
    return ({**spec, "mounts": mounts}, volumes) if volumes else (spec, volumes)


def put_block_volumes(guest_spec: OCISpec, mounts: list[dict[str, Any]]) -> None:
    """Put the mounts into the places of the volumes."""
    guest_spec["mounts"] = [
        mounts[int(mount["source"])] if mount.get("type") == _PLACEHOLDER else mount
        for mount in guest_spec.get("mounts") or []
    ]


def _block_volume(mount: dict[str, Any]) -> BlockVolume | None:
    source, options = mount.get("source") or "", mount.get("options") or []
    if not source.startswith("/"):
        return None
    path = Path(source)
    if mount.get("type") == "bind" or {"bind", "rbind"} & set(options):
        if (info := direct_volume.volume_mount_info(source)) is not None:
            return _direct(mount, info)
        if not is_block_device(path):
            return None
        device = DeviceInfo(path=path, readonly=bool({"ro", "rro"} & set(options)) or is_readonly(path))
        return BlockVolume(mount=mount, device=device, fstype="bind")
    # A file system that the container's runtime is to mount: the guest's would take a disk of its own.
    if not is_block_device(path) and not (_LOOP in options and _is_file(path)):
        if _LOOP in options or (path.is_relative_to("/dev") and not path.exists()):
            expected = "an image file" if _LOOP in options else "a block device"
            found = "something else" if path.exists() else "nothing"
            raise InvalidArgumentError(
                f"mount {mount['destination']}: found {found} at {path} on the host, expected {expected}"
            )
        return None
    readonly = "ro" in options or is_readonly(path)
    return BlockVolume(
        mount=mount,
        device=DeviceInfo(path=path, readonly=readonly, has_filesystem=True),
        fstype=mount.get("type") or "",
        options=_with_ro([option for option in options if option != _LOOP], readonly),
    )


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def _with_ro(options: list[str], readonly: bool) -> tuple[str, ...]:
    return (*options, *(["ro"] if readonly and "ro" not in options else []))


def _direct(mount: dict[str, Any], info: direct_volume.MountInfo) -> BlockVolume:
    path = Path(info.device)
    readonly = "ro" in info.options or is_readonly(path)
    return BlockVolume(
        mount=mount,
        device=DeviceInfo(path=path, readonly=readonly, has_filesystem=True),
        fstype=info.fstype,
        options=_with_ro(list(info.options), readonly),
        fs_group=_fs_group(mount["destination"], dict(info.metadata)),
        is_direct=True,
    )


def _fs_group(destination: str, metadata: dict[str, str]) -> agent_pb2.FSGroup | None:
    group = metadata.pop(direct_volume.FS_GROUP, None)
    policy = metadata.pop(direct_volume.FS_GROUP_CHANGE_POLICY, "Always")
    if metadata:
        # "encryptionKey" and "createFilesystem" need programs that no guest of ours has.
        names = ", ".join(map(repr, metadata))
        raise InvalidArgumentError(
            f"direct volume {destination}: found {names} in its metadata, expected "
            f"{direct_volume.FS_GROUP} and {direct_volume.FS_GROUP_CHANGE_POLICY} only"
        )
    if group is None:
        return None
    if not group.isdecimal() or int(group) >= 1 << 32:
        raise InvalidArgumentError(
            f"direct volume {destination}: found {direct_volume.FS_GROUP} {group!r}, expected a group's id"
        )
    policies = types_pb2.FSGroupChangePolicy
    if policy not in dict(policies.items()):
        raise InvalidArgumentError(
            f"direct volume {destination}: found {direct_volume.FS_GROUP_CHANGE_POLICY} {policy!r}, expected "
            + " or ".join(policies.keys())
        )
    return agent_pb2.FSGroup(group_id=int(group), group_change_policy=policy)
