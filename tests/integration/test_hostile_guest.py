"""The guest's root does with what is shared what it can, and gets nothing of the host beside it."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from root_guest import Pod, bind, privileged, root_pod
from templates import ReadyTemplates
from test_hypervisor import virtiofsd_of
from test_sandbox import container_config

from virtcontainers.config import GUEST_SHARED_DIR, SharedFS
from virtcontainers.errors import InvalidArgumentError
from virtcontainers.hypervisor.process import find_processes
from virtcontainers.hypervisor.virtiofsd import Flavour

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="machines need root")

SECRET = "of the host alone"
FILES = {"chown", "dac_override", "fowner", "fsetid", "setgid", "setuid", "mknod", "setfcap"}
NUMBERS = {"chown": 0, "dac_override": 1, "fowner": 3, "fsetid": 4, "setgid": 6, "setuid": 7, "ipc_lock": 14}
NUMBERS |= {"setpcap": 8, "sys_admin": 21, "sys_resource": 24, "mknod": 27, "setfcap": 31}
"""<linux/capability.h>"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`volume`, `other` and `readonly` are shared, and what is beside them is not."""
    host = tmp_path_factory.mktemp("host")
    for name in ("volume/way", "other", "readonly", "secrets/way"):
        (host / name).mkdir(parents=True)
    (host / "secrets/way/file").write_text(SECRET)
    (host / "readonly/file").write_text("unchanged")
    return host


@pytest.fixture(scope="module", params=["9p", "virtiofsd-c", "virtiofsd-rust"])
def pod(
    request: pytest.FixtureRequest,
    host: Path,
    guest_image: Path,
    tmp_path_factory: pytest.TempPathFactory,
    ready_templates: ReadyTemplates,
) -> Iterator[Pod]:
    settings: dict[str, Any] = {"shared_fs": SharedFS.VIRTIO_9P}
    if request.param != "9p":
        flavour = Flavour.C if request.param == "virtiofsd-c" else Flavour.RUST
        settings = {"shared_fs": SharedFS.VIRTIO_FS, "virtio_fs_daemon": virtiofsd_of(flavour)}
        # Else it would have no attributes for the guest to try.
        settings["virtio_fs_extra_args"] = ("--xattr",)
    mounts = [
        bind(host / "volume", "/volume"),
        bind(host / "volume", "/again"),
        bind(host / "other", "/other"),
        bind(host / "readonly", "/readonly", "ro"),
    ]
    directory = tmp_path_factory.mktemp("pod")
    with (
        ready_templates.cloning(directory) as factory,
        root_pod(directory, guest_image, mounts, factory=factory, **settings) as pod,
    ):
        yield pod
        for name in ("volume", "other"):
            subprocess.run(["find", host / name, "-mindepth", "1", "-delete"], check=True)
        (host / "volume/way").mkdir()
    assert (host / "secrets/way/file").read_text() == SECRET
    assert (host / "readonly/file").read_text() == "unchanged"


def places(pod: Pod) -> str:
    """Python: where the guest's root finds what."""
    names = ("volume", "again", "other", "readonly")
    return f"""
share, root = {GUEST_SHARED_DIR!r}, {pod.root_in_guest!r}
volume, again, other, readonly = {[pod.volume_in_guest(name) for name in names]!r}
"""


def test_symlinks_and_dots_lead_nowhere_on_the_host(pod: Pod, host: Path) -> None:
    targets = [str(host / "secrets/way/file"), "../" * 20 + str(host / "secrets/way/file")[1:]]
    targets.append("../secrets/way/file")
    found = pod.as_guests_root(f"""{places(pod)}
for place in volume, root:
    for number, target in enumerate({targets!r}):
        os.symlink(target, f"{{place}}/link{{number}}")
        print(error(open, f"{{place}}/link{{number}}"))
        print(error(open, f"{{place}}/{{target}}"))
    os.symlink({str(host / "secrets")!r}, place + "/directory")
    print(error(os.listdir, place + "/directory"))
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    print(error(os.open, "../" * 20 + {str(host)[1:]!r}, os.O_RDONLY, dir_fd=fd))
""")
    assert found.split() == ["ENOENT"] * 16
    for place in (pod.volume("volume"), pod.shared / pod.id / "rootfs"):
        link = place / "link0"
        assert str(link.readlink()) == targets[0], "as it is, for who looks"
        with pytest.raises(OSError, match="Too many levels of symbolic links"):
            link.read_text()


def test_the_top_of_the_share_is_not_the_guests_to_change(pod: Pod) -> None:
    found = pod.as_guests_root(f"""{places(pod)}
print(sorted(os.listdir(share)))
print(error(os.mkdir, share + "new"), error(os.symlink, "/", share + "new"))
print(error(os.rename, share + {pod.id!r}, share + "new"), error(os.rmdir, volume), error(os.unlink, volume))
print(error(os.rename, volume, other + "/new"), error(os.mkdir, share + {pod.id + "/new"!r}))
print(error(open, readonly + "/file", "w"), error(os.unlink, readonly + "/file"))
print(error(os.chmod, readonly + "/file", 0o777), error(open, readonly + "/new", "w"))
""").splitlines()
    assert found[0] == str(sorted(path.name for path in pod.shared.iterdir()))
    assert set(" ".join(found[1:]).split()) <= {"EROFS", "EBUSY", "EXDEV", "ENOTDIR", "EISDIR", "EPERM"}
    assert found[4:] == ["EROFS EROFS"] * 2
    assert "EROFS EROFS" in found[1]


def test_device_nodes_are_the_guests_own(pod: Pod, host: Path) -> None:
    disk = host.stat().st_dev
    found = pod.as_guests_root(f"""{places(pod)}
import stat
for place in volume, root:
    print(error(os.mknod, place + "/memory", stat.S_IFCHR | 0o666, os.makedev(1, 1)))
    print(error(os.mknod, place + "/zero", stat.S_IFCHR | 0o666, os.makedev(1, 5)))
    print(error(os.mknod, place + "/disk", stat.S_IFBLK | 0o666, {disk}))
    print(error(os.open, place + "/disk", os.O_RDONLY))
""").split()
    made, read = [*found[:3], *found[4:7]], {found[3], found[7]}
    # The machine has no such disk, or its mount of the share has no devices at all.
    assert read <= {"ENXIO", "ENODEV", "EACCES", "ENOENT"}
    # The 9p server of QEMU 7.2 refuses to make what it would not open.
    assert set(made) == ({"ENXIO"} if _is_9p(pod) and "ENXIO" in made else {"None"})
    for place in (pod.volume("volume"), pod.shared / pod.id / "rootfs"):
        if not (place / "disk").exists():
            os.mknod(place / "disk", stat.S_IFBLK | 0o666, disk)
        with pytest.raises(PermissionError):
            os.open(place / "disk", os.O_RDONLY)
    assert pod.run("cat /volume/disk; cat /disk")[1].count("can't open") == 2


def test_setuid_programs_do_not_run_on_the_host(pod: Pod) -> None:
    pod.sh("cat /bin/busybox >/volume/busybox; cat /bin/busybox >/busybox")
    pod.as_guests_root(f"""{places(pod)}
for place in volume, root:
    os.chown(place + "/busybox", 0, 0)
    os.chmod(place + "/busybox", 0o6755)
""")
    assert "BusyBox" in pod.sh("/volume/busybox"), "the guest's own may"
    for place in (pod.volume("volume"), pod.shared / pod.id / "rootfs"):
        assert (place / "busybox").stat().st_mode == 0o106755
        with pytest.raises(PermissionError):
            subprocess.run([place / "busybox", "true"])


def test_hard_links_stay_in_one_volume(pod: Pod, host: Path) -> None:
    found = pod.as_guests_root(f"""{places(pod)}
open(volume + "/file", "w").write("guest")
os.link(volume + "/file", volume + "/linked")
print(os.stat(volume + "/linked").st_nlink)
for place in again, other, root:
    print(error(os.link, volume + "/file", place + "/second"))
    print(error(os.link, readonly + "/file", place + "/second"))
os.symlink({str(host / "secrets/way/file")!r}, volume + "/symlink")
os.link(volume + "/symlink", volume + "/third")
""").split()
    assert found == ["2"] + ["EXDEV"] * 6
    assert (host / "secrets/way/file").stat().st_nlink == 1, "what is linked is the symlink"


def test_a_rename_that_races_with_an_open_wins_nothing(pod: Pod, host: Path) -> None:
    """A folder that is open by one of its two ways into the guest is changed for a symlink by the other."""
    (host / "volume/way/file").write_text("guest")
    found = pod.as_guests_root(f"""{places(pod)}
fd = os.open(volume + "/way", os.O_RDONLY | os.O_DIRECTORY)
child = os.fork()
if child == 0:
    while True:
        os.rename(again + "/way", again + "/aside")
        os.symlink({str(host / "secrets/way")!r}, again + "/way")
        os.unlink(again + "/way")
        os.rename(again + "/aside", again + "/way")
read, number = set(), 0
while number < 200 or ("guest" not in read and number < 20000):
    number += 1
    try:
        if number % 3 == 0:
            anew = os.open(volume + "/way", os.O_RDONLY | os.O_DIRECTORY)
            os.close(fd)
            fd = anew
        read.add(open(os.open("file", os.O_RDONLY, dir_fd=fd)).read())
    except OSError as found:
        read.add(errno.errorcode[found.errno])
os.kill(child, 9)
os.wait()
print(*read)
""").split()
    assert "guest" in found
    assert set(found) <= {"guest", "ENOENT", "ELOOP", "ENOTDIR", "ESTALE", "EBADF", "EACCES", "EIO"}


def test_no_trusted_attribute_is_the_guests_to_set(pod: Pod, host: Path) -> None:
    """The host's overlay file systems and others trust them."""
    found = pod.as_guests_root(f"""{places(pod)}
for name in "trusted.overlay.redirect", "trusted.overlay.opaque", "user.mine":
    for place in volume, root:
        print(error(os.setxattr, place, name, b"/secrets"))
""").split()
    assert set(found[:4]) <= {"EPERM", "ENOTSUP"}
    for place in (host / "volume", pod.upper):
        assert not [name for name in os.listxattr(place) if b"secrets" in os.getxattr(place, name)] or (
            "user.mine" in os.listxattr(place)
        )
        assert "trusted.overlay.redirect" not in os.listxattr(place)


def test_a_volume_below_a_folder_of_the_guests_is_not_what_the_guest_makes_it(pod: Pod, host: Path) -> None:
    pod.as_guests_root(f"""{places(pod)}
os.symlink({str(host / "secrets")!r}, volume + "/sub")
""")
    mounts = [bind(host / "volume/sub", "/data")]
    config = container_config(pod.directory, "second", privileged("true", mounts=mounts))
    with pytest.raises(InvalidArgumentError, match=r"mount /data of .*volume/sub: .*a guest can write in"):
        pod.call(pod.sandbox.create_container(config))


def test_who_serves_the_guest_may_do_little_on_the_host(pod: Pod) -> None:
    assert pod.sandbox._vm is not None
    directory = pod.sandbox._vm.hypervisor.directory
    found: dict[str, list[dict[str, str]]] = {}
    shared = {path.name for path in pod.shared.iterdir()}
    for pid in find_processes(directory):
        fields = dict(re.findall(r"^(\w+):\t(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE))
        if fields["CapEff"] == f"{0:016x}":
            continue  # virtiofsd's parent, which waits
        name = "qemu" if fields["Name"].startswith("qemu") else "virtiofsd"
        allowed = FILES | ({"ipc_lock"} if name == "qemu" else set())
        assert _names(fields["CapEff"]) <= allowed, name
        assert _names(fields["CapPrm"]) <= allowed, name
        assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2"), name
        found.setdefault(name, []).append(fields)
        # Other threads of the C daemon have been there before it shut itself in.
        for thread in Path(f"/proc/{pid}/task").iterdir():
            try:
                status = re.search(r"CapEff:\t(\w+)", (thread / "status").read_text())
            except OSError:  # it has ended: workers do, after a while without work
                continue
            assert status
            assert _names(status[1]) <= allowed | {"sys_admin", "setpcap", "sys_resource"}
        if name == "virtiofsd":
            namespaces = {kind: Path(f"/proc/{pid}/ns/{kind}").readlink() for kind in ("mnt", "pid", "net")}
            assert all(Path(f"/proc/self/ns/{kind}").readlink() != ours for kind, ours in namespaces.items())
            assert {path.name for path in Path(f"/proc/{pid}/root").iterdir()} == shared
    assert len(found.pop("qemu")) == 1
    assert len(found.pop("virtiofsd", [])) == (0 if _is_9p(pod) else 1)


def _is_9p(pod: Pod) -> bool:
    return pod.sandbox.config.hypervisor.shared_fs is SharedFS.VIRTIO_9P


def _names(mask: str) -> set[str]:
    numbers = {number: name for name, number in NUMBERS.items()}
    return {numbers.get(bit, str(bit)) for bit in range(64) if int(mask, 16) >> bit & 1}
