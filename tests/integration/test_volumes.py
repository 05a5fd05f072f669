"""Volumes as containers see them, on each kind of share, and what kubelet does with them on the host."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from harness import Ctr, new_id, wait_for
from templates import Log, ReadyTemplates, Templates, templates
from test_ctr_pod import cri

SLEEP = ("sleep", "100000")
GROUP = 2000
SHARES_EMPTY_DIRS = "virtio-fs"


def mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *arguments], check=True)


def umount(path: Path) -> None:
    subprocess.run(["umount", "--recursive", "--lazy", path], check=True)


class Kubelet:
    """Volumes of one pod, at the paths and in the way kubelet makes them."""

    def __init__(self, directory: Path) -> None:
        self.volumes = directory / "pods/01234567-89ab-cdef-0123-456789abcdef/volumes"
        self.mounted = contextlib.ExitStack()

    def path(self, kind: str, name: str) -> Path:
        path = self.volumes / f"kubernetes.io~{kind}" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def mount(self, path: Path, fstype: str, options: str) -> Path:
        mount("-t", fstype, "-o", options, fstype, path)
        self.mounted.callback(umount, path)
        return path

    def publish(self, volume: Path, number: int, **files: str) -> None:
        """As its atomic writer: all new files, then one link that makes them count."""
        new = volume / f"..2026_11_27_18_30_00.{number}"
        new.mkdir()
        for name, text in files.items():
            (new / name).write_text(text)
        old = (volume / "..data").readlink() if (volume / "..data").is_symlink() else None
        (volume / "..data_tmp").symlink_to(new.name)
        (volume / "..data_tmp").rename(volume / "..data")
        for name in files:
            if not (volume / name).is_symlink():
                (volume / name).symlink_to(f"..data/{name}")
        for link in list(volume.iterdir()):
            if not link.name.startswith("..") and link.name not in files:
                link.unlink()
        if old is not None:
            for file in (volume / old).iterdir():
                file.unlink()
            (volume / old).rmdir()


@dataclass
class Pod:
    """One machine of a template; its first container does nothing."""

    ctr: Ctr
    id: str
    template: Templates
    kubelet: Kubelet
    shares_empty_dirs: bool
    _containers: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def container(self, *mounts: str, limit_mib: int = 0) -> Iterator[Callable[..., str]]:
        """A further container, as a function that runs a shell's script in it."""
        name = f"{self.id}-{len(self._containers)}"
        self._containers.append(name)
        options = [*cri("container", self.id), *self.template.options]
        for entry in mounts:
            options += ["--mount", entry]
        if limit_mib:
            options += ["--memory-limit", str(limit_mib << 20)]

        def run(script: str, check: bool = True) -> str:
            result = self.ctr.exec(name, "sh", "-c", script)
            assert not check or result.returncode == 0, (script, result)
            return (result.stdout if check else result.stdout + result.stderr).decode()

        with self.ctr.detached(name, *SLEEP, options=tuple(options)):
            yield run


def bind(source: Path | str, destination: str, *options: str) -> str:
    return f"type=bind,src={source},dst={destination},options={':'.join(('rbind', *options))}"


@pytest.fixture(scope="module", params=["virtio-9p", "virtio-fs"])
def pod(
    request: pytest.FixtureRequest,
    ctr: Ctr,
    tmp_path_factory: pytest.TempPathFactory,
    ready_templates: ReadyTemplates,
) -> Iterator[Pod]:
    """One for all tests, on each kind of share."""
    directory = tmp_path_factory.mktemp("v")
    (directory / "for-the-guest").mkdir()
    (directory / "for-the-guest/file").write_text("sandbox_bind_mounts")
    settings = {
        "hypervisor.qemu": {"shared_fs": request.param},
        "runtime": {
            "sandbox_bind_mounts": [str(directory / "for-the-guest")],
            "disable_guest_empty_dir": request.param == SHARES_EMPTY_DIRS,
        },
    }
    kubelet = Kubelet(directory)
    with kubelet.mounted, templates(directory, settings) as template:
        template.put(ready_templates)
        pod_id = new_id(f"volumes-{request.param}")
        options = (*cri("sandbox", pod_id), *template.options)
        with ctr.detached(pod_id, *SLEEP, options=options):
            yield Pod(ctr, pod_id, template, kubelet, request.param == SHARES_EMPTY_DIRS)


@pytest.fixture
def log(ctr: Ctr) -> Log:
    return Log(ctr.containerd)


def test_files_and_folders_of_the_host(pod: Pod, tmp_path: Path) -> None:
    odd = tmp_path / "öd d'\\name\u2028"
    (odd / "inner").mkdir(parents=True)
    mount("-t", "tmpfs", "tmpfs", odd / "inner")
    try:
        (odd / "inner/below").write_text("a mount's\n")
        (tmp_path / "file").write_text("a file's\n")
        (tmp_path / "link").symlink_to(odd)
        with pod.container(
            bind(odd, "/öd d'\\name\u2028", "rw"),
            bind(odd, "/readonly", "ro"),
            bind(tmp_path / "link", "/linked", "ro"),
            bind(tmp_path / "file", "/etc/a file", "rw"),
        ) as run:
            assert run("cat /öd*/inner/below /readonly/inner/below /linked/inner/below '/etc/a file'") == (
                "a mount's\n" * 3 + "a file's\n"
            )
            for path in ("/readonly/new", "/readonly/inner/new", "/linked/inner/new"):
                assert "Read-only file system" in run(f"echo > {path}", check=False)
            run("echo changed > '/etc/a file'; cd /öd*/inner; echo new > new; mv below moved")
            assert (tmp_path / "file").read_text() == "changed\n"
            assert (odd / "inner/new").read_text() == "new\n"
            with pod.container(bind(odd, "/again", "rw")) as other:
                other("echo other > /again/inner/from-other")
                assert run("cat /readonly/inner/from-other") == "other\n"
            assert run("cat /readonly/inner/from-other") == "other\n", "the end of one is not that of both"
    finally:
        umount(odd / "inner")
    assert sorted(p.name for p in odd.iterdir()) == ["inner"]


def test_a_mount_that_comes_later_is_seen_where_that_is_asked_for(pod: Pod, tmp_path: Path, log: Log) -> None:
    source = tmp_path / "source"
    for name in ("private", "slave", "shared"):
        (source / name).mkdir(parents=True)
    mount("--bind", source, source)
    mount("--make-shared", source)
    try:
        with pod.container(
            bind(source, "/private"),
            bind(source, "/slave", "rslave", "ro"),
            bind(source, "/shared", "rshared"),
        ) as run:
            run("ls /private/slave /slave/slave /shared/slave")
            mount("-t", "tmpfs", "tmpfs", source / "slave")
            (source / "slave/later").touch()
            wait_for("the mount", lambda: run("ls /slave/slave /shared/slave").count("later\n") == 2)
            assert run("ls /private/slave") == ""
            subprocess.run(["umount", "--lazy", source / "slave"], check=True)
            look = "echo looks; ls /slave/slave /shared/slave"
            gone = re.compile(r"looks\n(?!.*later)", re.DOTALL)
            wait_for("its end", lambda: gone.match(run(look, check=False)))
        (warning,) = log.warnings(pod.id)
        assert warning.startswith("mount /shared asks for propagation both ways")
    finally:
        umount(source)


@pytest.mark.parametrize("pod", ["virtio-9p"], indirect=True, scope="module")
def test_an_empty_dir_in_memory_is_the_machines_own(pod: Pod) -> None:
    path = pod.kubelet.mount(pod.kubelet.path("empty-dir", "memory"), "tmpfs", "size=8m")
    os.chown(path, -1, GROUP)
    path.chmod(0o2777)
    whole = pod.kubelet.mount(pod.kubelet.path("empty-dir", "whole"), "tmpfs", "mode=0777")
    shm = pod.kubelet.mount(pod.kubelet.path("empty-dir", "shm"), "tmpfs", "size=3m")

    def mib(run: Callable[..., str], path: str) -> int:
        return int(run(f"df -k {path} | tail -n 1").split()[1]) >> 10

    mounts = (bind(path, "/cache", "rw"), bind(whole, "/whole", "rw"), bind(shm, "/dev/shm", "rw"))
    with pod.container(*mounts) as one:
        assert one("grep ' /cache ' /proc/mounts").split()[2] == "tmpfs"
        assert one("stat -c '%g %a' /cache") == f"{GROUP} 2777\n"
        assert (mib(one, "/cache"), mib(one, "/dev/shm")) == (8, 3)
        # As in Kata it may have all of the memory, which grows with the containers.
        assert mib(one, "/whole") == 256
        one("echo one > /cache/file; echo one > /whole/file")
        assert "No space left" in one(
            "dd if=/dev/zero of=/cache/full bs=1M count=9; rm /cache/full", check=False
        )
        with pod.container(bind(path, "/other", "ro"), limit_mib=64) as two:
            assert two("cat /other/file") == "one\n"
            assert "Read-only" in two("echo > /other/two", check=False)
            assert mib(two, "/dev/shm") == 64, "the pod's"
            assert (mib(one, "/whole"), mib(one, "/cache")) == (384, 8)
    assert not list(path.iterdir()), "nothing of it is on the host"
    with pod.container(*mounts) as again:
        assert again("cat /cache/file /whole/file") == "one\none\n", "a restart loses nothing"


def test_an_empty_dir_on_disk_is_beside_the_pods_root_or_shared(pod: Pod) -> None:
    path = pod.kubelet.path("empty-dir", "disk")
    os.chown(path, -1, GROUP)
    path.chmod(0o2777)
    with pod.container(bind(path, "/disk", "rw")) as one, pod.container(bind(path, "/disk", "rw")) as two:
        one("echo one > /disk/file")
        assert two("cat /disk/file; stat -c '%g %a' /disk") == f"one\n{GROUP} 2777\n"
    with pod.container(bind(path, "/disk", "rw")) as again:
        assert again("cat /disk/file") == "one\n", "a restart loses nothing"
    in_kubelets_folder = [file.name for file in path.iterdir()]
    assert in_kubelets_folder == (["file"] if pod.shares_empty_dirs else [])


@pytest.mark.parametrize(("kind", "fstype"), [("configmap", "tmpfs"), ("projected", "")])
def test_an_update_of_a_config_map_is_seen(pod: Pod, kind: str, fstype: str) -> None:
    kubelet = pod.kubelet
    volume = kubelet.path(kind, "settings")
    kubelet.publish(volume, 1, colour="red", size="1")
    with pod.container(bind(volume, "/settings", "ro")) as run:
        assert run("cd /settings; cat colour size; ls") == "red1colour\nsize\n"
        assert "Read-only" in run("echo > /settings/new", check=False)
        if fstype:
            assert run("grep ' /settings ' /proc/mounts").split()[2] == fstype, "which programs can wait on"
        kubelet.publish(volume, 2, colour="green", shape="round")
        # What goes meanwhile is an error for `ls`.
        wait_for("the update", lambda: run("ls /settings", check=False) == "colour\nshape\n")
        assert run("cat /settings/colour /settings/shape") == "greenround"


def test_sandbox_bind_mounts_are_the_guests(pod: Pod) -> None:
    share = Path("/run/kata-containers/shared/sandboxes", pod.id, "shared/sandbox-mounts/for-the-guest")
    assert (share / "file").read_text() == "sandbox_bind_mounts"
    with pytest.raises(OSError, match="Read-only"):
        (share / "new").touch()
