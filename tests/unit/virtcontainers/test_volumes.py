"""What a container's volumes become in the guest, as far as nothing has to be mounted for it."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from virtcontainers.config import (
    AgentConfig,
    ContainerConfig,
    ContainerType,
    FactoryConfig,
    HypervisorConfig,
    NetworkConfig,
    RootFs,
    SandboxConfig,
    SharedFS,
)
from virtcontainers.errors import InvalidArgumentError
from virtcontainers.fs_share import FilesystemShare
from virtcontainers.volumes import Volumes

SHARED = "/run/kata-containers/shared/containers/"


def volumes(directory: Path, shared_fs: SharedFS = SharedFS.NONE, **runtime: Any) -> Volumes:
    config = SandboxConfig(
        id="pod",
        hostname="",
        hypervisor=HypervisorConfig(shared_fs=shared_fs),
        agent=AgentConfig(),
        factory=FactoryConfig(),
        network=NetworkConfig(),
        container=ContainerConfig(
            id="pod",
            bundle=directory,
            rootfs=RootFs(target=directory),
            spec={},
            container_type=ContainerType.POD_SANDBOX,
        ),
        **runtime,
    )
    return Volumes("web", {}, config, FilesystemShare("pod"), local_dir="/pod/rootfs/local")


def bind(source: Path, *options: str) -> dict[str, Any]:
    return {"destination": "/data", "type": "bind", "source": str(source), "options": ["rbind", *options]}


def empty_dir(directory: Path) -> Path:
    path = directory / "volumes/kubernetes.io~empty-dir/cache"
    path.mkdir(parents=True)
    path.chmod(0o2770)
    return path


def test_an_empty_dir_is_a_folder_beside_the_pods_root(tmp_path: Path) -> None:
    found = volumes(tmp_path)
    path = empty_dir(tmp_path)
    guest = found.guest_mount(bind(path, "rw"))
    (storage,) = found.storages
    assert guest == {**bind(path, "rw"), "source": storage.mount_point}
    assert storage.mount_point == "/pod/rootfs/local/cache"
    assert (storage.driver, storage.source, storage.fstype, storage.shared) == ("local",) * 3 + (True,)
    group = [f"fsgid={path.stat().st_gid}"] if path.stat().st_gid else []
    assert list(storage.options) == ["mode=2770", *group]


def test_an_empty_dir_is_the_hosts_where_that_is_configured(tmp_path: Path) -> None:
    found = volumes(tmp_path, disable_guest_empty_dir=True)
    with pytest.raises(InvalidArgumentError, match=r'folder to write to, expected .* shared_fs = "none"'):
        found.guest_mount(bind(empty_dir(tmp_path), "rw"))
    assert not found.storages


def test_options_for_all_mounts_below_are_plain_ones_in_the_guest(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    guest = volumes(tmp_path).guest_mount(bind(tmp_path / "f", "rro", "rnoexec", "rprivate"))
    assert guest["options"] == ["rbind", "ro", "noexec", "rprivate"]


def test_without_a_share_files_and_readonly_folders_are_copied(tmp_path: Path) -> None:
    found = volumes(tmp_path)
    (tmp_path / "hosts").write_text("127.0.0.1 localhost")
    (tmp_path / "link").symlink_to("hosts")
    config_map = tmp_path / "kubernetes.io~configmap/settings"
    config_map.mkdir(parents=True)
    for source, options in ((tmp_path / "hosts", ()), (tmp_path / "link", ()), (config_map, ())):
        assert found.guest_mount(bind(source, *options))["source"].startswith(SHARED + "web-")
    assert found.guest_mount(bind(tmp_path, "ro"))["source"].endswith("-data")
    assert len({copied.guest_path for copied in found.copied}) == 4


def test_without_a_share_the_rest_is_refused_by_name(tmp_path: Path) -> None:
    found = volumes(tmp_path)

    def refused(source: Path, *options: str) -> str:
        with pytest.raises(InvalidArgumentError, match="mount /data of container web: ") as refusal:
            found.guest_mount(bind(source, *options))
        assert str(source) in str(refusal.value)
        return str(refusal.value)

    assert "No such file" in refused(tmp_path / "nowhere")
    assert "found a folder to write to" in refused(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    assert "found a FIFO" in refused(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        assert "found a socket" in refused(tmp_path / "socket")
    (tmp_path / "socket").unlink()
    (tmp_path / "fifo").unlink()
    with (tmp_path / "big").open("wb") as file:
        file.truncate((16 << 20) + 1)
    assert "more than 1000 files or 16 MiB" in refused(tmp_path, "ro")
    (tmp_path / "big").unlink()
    for number in range(1000):
        (tmp_path / str(number)).touch()
    assert "more than 1000 files or 16 MiB" in refused(tmp_path, "ro")
