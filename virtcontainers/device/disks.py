"""All that is a disk of one container: its root, the block devices of its spec, and volumes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent_client.protocols import agent_pb2
from virtcontainers import direct_volume
from virtcontainers.config import GUEST_CONTAINERS_DIR, ContainerConfig, HypervisorConfig, OCISpec, SharedFS
from virtcontainers.device.block import DeviceInfo, block_root, host_device
from virtcontainers.device.manager import BlockDevice
from virtcontainers.device.volumes import BlockVolume, put_block_volumes, take_block_volumes
from virtcontainers.errors import InvalidArgumentError, KataError

if TYPE_CHECKING:
    from virtcontainers.sandbox import Sandbox


@dataclass(frozen=True)
class GuestVolume:
    """A volume that is a disk, and where the guest has mounted it."""

    device: BlockDevice
    mount_point: str


class ContainerDisks:
    """`attach` fills `storages` and `devices`, which are for the agent, and `guest_volumes`."""

    def __init__(self, config: ContainerConfig, hypervisor: HypervisorConfig) -> None:
        self._config = config
        self._hypervisor = hypervisor
        self._root = None if hypervisor.disable_block_device_use else block_root(config.rootfs)
        self._volumes: list[BlockVolume] = []
        self.storages: list[agent_pb2.Storage] = []
        self.devices: list[agent_pb2.Device] = []
        self.guest_volumes: dict[str, GuestVolume] = {}
        """By the host's path of the device."""
        self._direct_volumes: set[str] = set()
        """For which it is recorded that the pod has them."""

    @property
    def root(self) -> str:
        """Where the guest mounts a root that is a block device: beside the share, not in it. "" for another
        root."""
        return f"{GUEST_CONTAINERS_DIR}{self._config.id}/rootfs" if self._root else ""

    def require_root(self) -> None:
        """Raise InvalidArgumentError when the root can get into the guest neither as a block device nor
        through a share."""
        if self._root is not None or self._hypervisor.shared_fs is not SharedFS.NONE:
            return
        why = " (disable_block_device_use is true)" if self._hypervisor.disable_block_device_use else ""
        raise InvalidArgumentError(
            f'shared_fs = "none" in [hypervisor.qemu], and the root of container {self._config.id} is no '
            f'block device{why}: expected "virtio-fs" or "virtio-9p", or a snapshotter with block devices '
            "(devmapper, blockfile)"
        )

    def take_volumes(self) -> OCISpec:
        """The spec with placeholders for the volumes, for which `attach` puts the guest's mounts. Raises
        InvalidArgumentError."""
        with self._named():
            spec, self._volumes = take_block_volumes(
                self._config.spec, disabled=self._hypervisor.disable_block_device_use
            )
        return spec

    async def attach(self, sandbox: Sandbox, guest_spec: OCISpec, undo: AsyncExitStack) -> None:
        """Plug all of them in. Raises KataError's classes; `undo` then takes out what was plugged in."""
        if (root := self._root) is not None:
            with self._named():
                device = await _attach(sandbox, root.device, undo)
            self.storages.append(
                device.agent_storage(fstype=root.fstype, options=root.options, mount_point=self.root)
            )
        await self._attach_host_devices(sandbox, undo)
        mounts = []
        for volume in self._volumes:
            source = volume.mount["source"]
            with self._named(f"mount {volume.destination}"):
                device = await _attach(sandbox, volume.device, undo)
                if volume.is_direct:
                    undo.callback(self._forget_direct_volume, sandbox, source)
                    self._direct_volumes.add(source)
                    direct_volume.record_sandbox_id(sandbox.id, source)
            storage = volume.storage(device)
            self.storages.append(storage)
            self.guest_volumes[str(volume.device.path)] = GuestVolume(device, storage.mount_point)
            mounts.append(volume.guest_mount(storage))
        put_block_volumes(guest_spec, mounts)

    def _forget_direct_volume(self, sandbox: Sandbox, source: str) -> None:
        self._direct_volumes.discard(source)
        if not any(source in c.disks._direct_volumes for c in sandbox.containers.values()):
            direct_volume.forget_sandbox_id(sandbox.id, source)

    async def _attach_host_devices(self, sandbox: Sandbox, undo: AsyncExitStack) -> None:
        """The block devices of linux.devices; of the others the guest makes its own."""
        linux = self._config.spec.get("linux", {})
        rules = (linux.get("resources") or {}).get("devices") or []
        infos: dict[str, DeviceInfo] = {}
        for entry in linux.get("devices") or []:
            if entry["type"] == "b":
                # All of them are looked at before the first is plugged in: a privileged one may list many.
                with self._named_device(entry["path"]):
                    infos[entry["path"]] = info = host_device(entry, rules)
                    sandbox.devices.check(info)
        for path, info in infos.items():
            with self._named_device(path):
                device = await _attach(sandbox, info, undo)
            self.devices.append(device.agent_device(path))

    @contextlib.contextmanager
    def _named_device(self, path: str) -> Iterator[None]:
        with self._named():
            try:
                yield
            except KataError as error:
                raise type(error)(
                    f"found the host's block device {path} in linux.devices, which the machine cannot have: "
                    f"{error} (for privileged containers set privileged_without_host_devices = true at the "
                    "runtime in containerd's configuration)"
                ) from error

    @contextlib.contextmanager
    def _named(self, what: str = "") -> Iterator[None]:
        """Say whose it is, in an error."""
        try:
            yield
        except KataError as error:
            of = f"{what} of container" if what else "container"
            raise type(error)(f"{of} {self._config.id}: {error}") from error


async def _attach(sandbox: Sandbox, info: DeviceInfo, undo: AsyncExitStack) -> BlockDevice:
    hypervisor = sandbox.hypervisor
    device = await sandbox.devices.attach(hypervisor, info)

    async def detach() -> None:
        if not (sandbox.is_ending or sandbox.is_dead):
            await sandbox.devices.detach(hypervisor, device)

    undo.push_async_callback(detach)
    return device
