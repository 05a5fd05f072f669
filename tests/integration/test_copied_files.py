"""A pod whose machine shares no files with the host: what it gets copies of, and what it cannot have."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from templates import ReadyTemplates
from test_block import Pod, running_pod
from test_volumes import GROUP, Kubelet

from virtcontainers.config import ContainerConfig
from virtcontainers.container import Container
from virtcontainers.errors import InvalidArgumentError, KataError


@pytest.fixture(scope="module")
def pod(
    tmp_path_factory: pytest.TempPathFactory, guest_image: Path, ready_templates: ReadyTemplates
) -> Iterator[Pod]:
    directory = tmp_path_factory.mktemp("pod")
    with (
        ready_templates.cloning(directory) as factory,
        running_pod(directory, guest_image, factory=factory) as running,
    ):
        yield running


@pytest.fixture
def kubelet(tmp_path: Path) -> Iterator[Kubelet]:
    kubelet = Kubelet(tmp_path)
    with kubelet.mounted:
        yield kubelet


def bind(source: Path, destination: str, *options: str) -> dict[str, Any]:
    return {
        "destination": destination,
        "type": "bind",
        "source": str(source),
        "options": ["rbind", "rprivate", *options],
    }


def container(
    pod: Pod, name: str, script: str, mounts: list[dict[str, Any]], **linux: Any
) -> ContainerConfig:
    """With all that busybox has, in a root that has little of it."""
    return pod.container(name, f"/bin/busybox --install -s /bin; {script}", mounts, **linux)


async def says(container: Container, text: str) -> str:
    """What the container has written, up to `text`."""
    said = ""
    while text not in said:
        piece = await container.process.read_stdout(65536)
        assert piece, said
        said += piece.decode()
    return said


def test_small_files_and_folders_are_copied_with_their_owners(pod: Pod, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n")
    hosts.chmod(0o604)
    os.chown(hosts, 1000, GROUP)
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    (folder / "below/big").write_bytes(b"x" * (3 << 20))
    (folder / "link").symlink_to("below/big")
    script = "cat /etc/hosts; stat -c '%u %g %a' /etc/hosts; wc -c < /folder/link; echo > /folder/new"
    said = pod.run(
        container(pod, "files", script, [bind(hosts, "/etc/hosts"), bind(folder, "/folder", "ro")])
    )
    assert said.startswith(f"127.0.0.1 localhost\n1000 {GROUP} 604\n{3 << 20}\n")
    assert "Read-only file system" in said


def test_what_kubelet_changes_changes_in_the_container(pod: Pod, kubelet: Kubelet) -> None:
    volume = kubelet.path("projected", "token")
    kubelet.publish(volume, 1, token="first", old="old")
    script = (
        "cat /token/token /token/old; echo; until [ -f /token/new ]; do usleep 20000; done; "
        "cat /token/token /token/new; ls /token; cat /token/old; echo; "
        "until [ $(cat /token/token) = third ]; do usleep 20000; done; echo end"
    )

    async def body() -> tuple[str, str]:
        config = container(pod, "token", script, [bind(volume, "/token", "ro")])
        made = await pod.sandbox.create_container(config)
        (copied,) = made._volumes.copied
        try:
            await made.start()
            await pod.sandbox.agent.get_volume_stats(copied.guest_path)
            before = await says(made, "\n")
            kubelet.publish(volume, 2, token="second", new="new")
            after = await says(made, "No such file or directory\n")
            kubelet.publish(volume, 3, token="third", new="new")
            await says(made, "end\n")
            return before, after
        finally:
            await made.stop()
            await made.delete()
            with pytest.raises(KataError, match="No such file"):
                await pod.sandbox.agent.get_volume_stats(copied.guest_path)

    before, after = pod.await_(body())
    assert before == "firstold\n"
    assert re.match(r"secondnew(\n|)", after)


@pytest.mark.parametrize("why", ["the container's", "the copy's"])
def test_of_a_container_that_is_not_created_no_copy_stays(
    pod: Pod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    config = container(pod, "refused", "", [bind(tmp_path / n, f"/{n}") for n in ("one", "two")])
    config.spec["process"]["args"] = ["no-such-command"]
    copies: list[str] = []
    copy_file = pod.sandbox.agent.copy_file

    async def copy_one(path: str, *arguments: Any, **more: Any) -> None:
        if why == "the copy's" and copies:
            raise KataError("no more is copied")
        await copy_file(path, *arguments, **more)
        copies.append(path)

    monkeypatch.setattr(pod.sandbox.agent, "copy_file", copy_one)
    with pytest.raises(KataError, match=r"no-such-command|no more"):
        pod.run(config)
    assert copies
    for path in copies:
        with pytest.raises(KataError, match="No such file"):
            pod.await_(pod.sandbox.agent.get_volume_stats(path))


def test_empty_dirs_are_the_machines(pod: Pod, kubelet: Kubelet) -> None:
    memory = kubelet.mount(kubelet.path("empty-dir", "memory"), "tmpfs", "size=2m,mode=1777")
    disk = kubelet.path("empty-dir", "disk")
    os.chown(disk, -1, GROUP)
    disk.chmod(0o2777)
    mounts = [bind(memory, "/memory"), bind(disk, "/disk")]
    script = "df -k /memory | tail -n 1; echo one > /memory/file; echo two > /disk/file"
    assert pod.run(container(pod, "one", script, mounts)).split()[1] == "2048"
    script = "cat /memory/file /disk/file; stat -c '%g %a' /disk; grep ' /disk ' /proc/mounts"
    said = pod.run(container(pod, "two", script, mounts)).splitlines()
    assert said[:3] == ["one", "two", f"{GROUP} 2777"]
    assert said[3].split()[2] == "ext4", "the pod's first container's root"


def test_what_cannot_be_copied_is_refused_by_name(pod: Pod, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for source, mode, found in (
        (tmp_path, "rw", f"{tmp_path}: found a folder to write to"),
        (tmp_path, "ro", f"{tmp_path}/pipe: found a FIFO"),
    ):
        with pytest.raises(InvalidArgumentError, match=f"mount /data of container .*{found}"):
            pod.run(container(pod, "refused", "true", [bind(source, "/data", mode)]))
    with pytest.raises(
        InvalidArgumentError, match=r"mount /data .*/usr: found more than 1000 files or 16 MiB"
    ):
        pod.run(container(pod, "refused", "true", [bind(Path("/usr"), "/data", "ro")]))


def test_huge_pages_are_set_aside(pod: Pod, kubelet: Kubelet) -> None:
    volume = kubelet.mount(kubelet.path("empty-dir", "hugepage"), "hugetlbfs", "pagesize=2M")
    limits = [{"pageSize": "2MB", "limit": 8 << 20}]
    script = "grep ' /huge ' /proc/mounts; cat /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"
    mounts = [bind(volume, "/huge"), {"destination": "/sys", "type": "sysfs", "source": "sysfs"}]
    config = container(pod, "huge", script, mounts, resources={"hugepageLimits": limits})
    mounted, count = pod.run(config).splitlines()
    assert mounted.split()[2] == "hugetlbfs"
    assert "pagesize=2M" in mounted
    assert count == "4"
    after = pod.run(container(pod, "after", script.rpartition("; ")[2], mounts[1:]))
    assert after == "0\n"
    with pytest.raises(InvalidArgumentError, match=r"/huge .*found no limit for huge pages of 2097152 bytes"):
        pod.run(container(pod, "refused", "true", mounts))
