from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from katautils import oci
from katautils.config import RuntimeConfig
from virtcontainers.config import ContainerType, Mount
from virtcontainers.errors import InvalidArgumentError

WriteBundle = Callable[[dict[str, Any]], Path]

CRI = {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "pod"}


def test_a_spec_of_containerds_is_read(write_bundle: WriteBundle, spec: dict[str, Any]) -> None:
    more = {
        "hostname": "h",
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]}],
        "annotations": {"a": "b"},
        "hooks": {"createRuntime": [{"path": "/bin/true", "args": ["true"], "env": ["A=b"], "timeout": 3}]},
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "network", "path": "/run/netns/x"}],
            "resources": {
                "memory": {"limit": 1 << 30}, "cpu": {"quota": -1, "cpus": "0-1"}, "unified": {"a": "b"},
                "devices": [{"allow": False, "access": "rwm"}], "pids": {"limit": 0},
            },
            "seccomp": {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["read"], "action": "X"}]},
            "maskedPaths": ["/proc/kcore"], "cgroupsPath": "/x", "sysctl": {"net.x": "1"},
            "unknownToUs": [1],
        },
        "zos": {},
    }  # fmt: skip
    assert oci.load_spec(write_bundle(more)) == {**spec, **more}


def test_null_is_nothing(write_bundle: WriteBundle) -> None:
    """Go writes one for a slice that is nil."""
    found = oci.load_spec(write_bundle({"mounts": None, "linux": {"devices": None, "resources": None}}))
    assert found["linux"] == {}
    assert "mounts" not in found


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "found [], expected an object"),
        (b"{}", "ociVersion: found nothing, expected a string"),
    ],
)
def test_a_file_that_is_no_spec(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InvalidArgumentError) as refused:
        oci.load_spec(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path}/config.json: {said}")


def test_a_bundle_without_a_spec(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{tmp_path}/config.json: No such file"):
        oci.load_spec(tmp_path)


def _changed(spec: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The spec with one place in it changed; `...` takes the place out."""
    spec = copy.deepcopy(spec)
    *parents, last = path.split(".")
    place = spec
    for parent in parents:
        place = place.setdefault(parent, {})
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return spec


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("process", ..., "process: found nothing, expected an object"),
        ("process.args", ..., "process.args: found nothing, expected a list"),
        ("process.args", None, "process.args: found nothing, expected a list"),
        ("process.args", [], "process.args: found [], expected at least the program"),
        ("process.args", "sh", 'process.args: found "sh", expected a list'),
        ("process.args", ["sh", 1], "process.args[1]: found 1, expected a string"),
        ("process.cwd", "tmp", 'process.cwd: found "tmp", expected an absolute path'),
        ("process.cwd", ..., "process.cwd: found nothing"),
        ("process.terminal", 1, "process.terminal: found 1, expected true or false"),
        ("process.user", {"uid": "root"}, 'process.user.uid: found "root", expected an integer'),
        ("process.user", {"uid": True}, "process.user.uid: found true, expected an integer"),
        ("process.user", {"additionalGids": [1.5]}, "process.user.additionalGids[0]: found 1.5"),
        ("process.env", {"A": "b"}, 'process.env: found {"A": "b"}, expected a list'),
        ("process.capabilities", {"bounding": [1]}, 'process.capabilities["bounding"][0]: found 1'),
        ("process.rlimits", [{"type": "X", "hard": 1}], "process.rlimits[0].soft: found nothing"),
        ("root", ..., "root: found nothing, expected an object"),
        ("root.path", 7, "root.path: found 7, expected a string"),
        ("root.path", "", 'root.path: found "", expected a path'),
        ("root.readonly", "yes", 'root.readonly: found "yes", expected true or false'),
        ("hostname", [], "hostname: found [], expected a string"),
        ("linux", ..., "linux: found nothing, expected an object"),
        ("linux", [], "linux: found [], expected an object"),
        ("linux.namespaces", [{}], "linux.namespaces[0].type: found nothing"),
        (
            "linux.namespaces",
            [{"type": "net"}],
            'linux.namespaces[0].type: found "net", expected one of pid,',
        ),
        (
            "linux.devices",
            [{"path": "/dev/x", "type": "x"}],
            'linux.devices[0].type: found "x", expected "c",',
        ),
        ("linux.devices", [{"path": "/dev/x", "type": "c", "major": "1"}], "linux.devices[0].major: found"),
        ("linux.resources", {"memory": {"limit": "1G"}}, 'linux.resources.memory.limit: found "1G"'),
        ("linux.resources", {"cpu": []}, "linux.resources.cpu: found [], expected an object"),
        ("linux.resources", {"unified": {"a": 1}}, 'linux.resources.unified["a"]: found 1'),
        ("linux.resources", {"devices": [{}]}, "linux.resources.devices[0].allow: found nothing"),
        ("linux.seccomp", {}, "linux.seccomp.defaultAction: found nothing"),
        ("linux.sysctl", {"a": 1}, 'linux.sysctl["a"]: found 1, expected a string'),
        ("mounts", {}, "mounts: found {}, expected a list"),
        ("mounts", [{"source": "x"}], "mounts[0].destination: found nothing"),
        ("mounts", [{"destination": "x"}], 'mounts[0].destination: found "x", expected an absolute path'),
        ("mounts", [{"destination": "/", "options": "ro"}], 'mounts[0].options: found "ro", expected a list'),
        ("annotations", {"a": 1}, 'annotations["a"]: found 1, expected a string'),
        ("hooks", {"prestart": [{"path": "x"}]}, 'hooks.prestart[0].path: found "x", expected an absolute'),
        ("hooks", {"poststop": [{}]}, "hooks.poststop[0].path: found nothing"),
        ("hooks", {"poststop": [{"path": "/x", "timeout": 0}]}, "hooks.poststop[0].timeout: found 0"),
    ],
)
def test_a_bad_spec_names_file_and_field(
    write_bundle: WriteBundle, spec: dict[str, Any], path: str, value: Any, said: str
) -> None:
    changed = _changed(spec, path, value)
    first = path.split(".")[0]
    bundle = write_bundle({first: changed.get(first)})
    with pytest.raises(InvalidArgumentError) as refused:
        oci.load_spec(bundle)
    assert str(refused.value).startswith(f"{bundle}/config.json: {said}")


def test_a_long_value_is_not_shown_whole(write_bundle: WriteBundle) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        oci.load_spec(write_bundle({"hostname": ["x" * 10_000]}))
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("annotations", "kind", "sandbox"),
    [
        ({}, ContainerType.SINGLE_CONTAINER, "c1"),
        ({"io.kubernetes.cri.container-type": "sandbox"}, ContainerType.POD_SANDBOX, "c1"),
        (CRI, ContainerType.POD_CONTAINER, "pod"),
        ({"io.kubernetes.cri-o.ContainerType": "sandbox"}, ContainerType.POD_SANDBOX, "c1"),
        (
            {"io.kubernetes.cri-o.ContainerType": "container", "io.kubernetes.cri-o.SandboxID": "pod"},
            ContainerType.POD_CONTAINER,
            "pod",
        ),
        ({"io.kubernetes.docker.type": "podsandbox"}, ContainerType.POD_SANDBOX, "c1"),
        (
            {"io.kubernetes.docker.type": "container", "io.kubernetes.sandbox.id": "pod"},
            ContainerType.POD_CONTAINER,
            "pod",
        ),
    ],
)
def test_what_a_bundle_is_to_its_pod(
    spec: dict[str, Any], annotations: dict[str, str], kind: ContainerType, sandbox: str
) -> None:
    spec["annotations"] = annotations
    assert oci.container_type(spec) is kind
    assert oci.sandbox_id(spec, "c1") == sandbox


def test_annotations_that_make_no_sense(spec: dict[str, Any]) -> None:
    spec["annotations"] = {"io.kubernetes.cri.container-type": "vm"}
    with pytest.raises(InvalidArgumentError, match='container-type: found "vm", expected "sandbox" or "con'):
        oci.container_type(spec)
    spec["annotations"] = {"io.kubernetes.cri.container-type": "container"}
    with pytest.raises(InvalidArgumentError, match="container c1: found no pod"):
        oci.sandbox_id(spec, "c1")


def test_the_container_is_told_what_katas_agent_looks_for(spec: dict[str, Any], tmp_path: Path) -> None:
    policy = "io.katacontainers.config.agent.policy"
    spec["annotations"] = {**CRI, policy: "secret"}
    mounts = [Mount(type="overlay", source="overlay", options=("lowerdir=/a",))]
    config = oci.container_config(spec, tmp_path, "c1", mounts)
    assert config.rootfs.target == tmp_path / "rootfs"
    assert config.rootfs.mounts == tuple(mounts)
    assert config.container_type is ContainerType.POD_CONTAINER
    assert (
        config.annotations
        == config.spec["annotations"]
        == {
            **CRI,
            "io.katacontainers.pkg.oci.bundle_path": str(tmp_path),
            "io.katacontainers.pkg.oci.container_type": "pod_container",
        }
    )
    assert spec["annotations"][policy] == "secret"


@pytest.mark.parametrize(("path", "expected"), [("rootfs", "rootfs"), ("/somewhere/else", "/somewhere/else")])
def test_a_root_that_needs_no_mount(spec: dict[str, Any], tmp_path: Path, path: str, expected: str) -> None:
    spec["root"]["path"] = path
    assert oci.container_config(spec, tmp_path, "c1", []).rootfs.target == tmp_path / expected


def test_a_sandbox_takes_its_configuration_and_its_network(
    spec: dict[str, Any], tmp_path: Path, load: Callable[..., RuntimeConfig]
) -> None:
    spec["hostname"] = "host"
    spec["linux"]["namespaces"] = [{"type": "pid"}, {"type": "network", "path": "/run/netns/x"}]
    spec["mounts"] = [{"destination": "/dev/shm", "type": "tmpfs", "options": ["size=1m"]}]
    runtime = {
        "disable_guest_seccomp": True, "create_container_timeout": 5, "emptydir_mode": "block-plain",
        "internetworking_model": "macvtap", "guest_selinux_label": "l", "sandbox_cgroup_only": True,
    }  # fmt: skip
    config = load(runtime=runtime)
    found = oci.sandbox_config(spec, config, tmp_path, "c1", [])
    assert (found.id, found.hostname, found.container.id) == ("c1", "host", "c1")
    assert (found.hypervisor, found.agent, found.factory) == (config.hypervisor, config.agent, config.factory)
    assert found.network.network_namespace == Path("/run/netns/x")
    assert found.network.interworking_model == "macvtap"
    assert found.shm_size_bytes == 1 << 20
    assert found.disable_guest_seccomp
    assert found.create_container_timeout_s == 5
    assert found.emptydir_mode == "block-plain"
    assert found.guest_selinux_label == "l"
    assert found.sandbox_cgroup_only
    spec["linux"]["namespaces"] = [{"type": "network"}]
    assert oci.sandbox_config(spec, config, tmp_path, "c1", []).network.network_namespace is None


@pytest.mark.parametrize("namespaces", [[], [{"type": "network", "path": "/proc/self/ns/net"}]])
def test_the_hosts_network_is_refused(
    spec: dict[str, Any], tmp_path: Path, load: Callable[..., RuntimeConfig], namespaces: list[dict[str, str]]
) -> None:
    spec["linux"]["namespaces"] = namespaces
    with pytest.raises(
        InvalidArgumentError, match=r"^container c1: found the host's network in linux\.namesp"
    ):
        oci.sandbox_config(spec, load(), tmp_path, "c1", [])
    # Who has turned off the network of machines knows.
    config = load(runtime={"disable_new_netns": True, "internetworking_model": "none"})
    assert oci.sandbox_config(spec, config, tmp_path, "c1", []).network.disable_new_network


@pytest.mark.parametrize("path", ["", "/proc/1/ns/ipc", "/no/such/netns"])
def test_another_network_is_not_the_hosts(
    spec: dict[str, Any], tmp_path: Path, load: Callable[..., RuntimeConfig], path: str
) -> None:
    spec["linux"]["namespaces"] = [{"type": "network", "path": path}]
    assert oci.sandbox_config(spec, load(), tmp_path, "c1", []).id == "c1"


def test_a_container_of_a_pod_has_its_pods_network(spec: dict[str, Any], tmp_path: Path) -> None:
    spec["annotations"] = CRI
    for namespaces in ([], [{"type": "network", "path": "/proc/self/ns/net"}]):
        spec["linux"]["namespaces"] = namespaces
        assert oci.container_config(spec, tmp_path, "c1", []).id == "c1"


def test_a_user_namespace_is_refused(spec: dict[str, Any], tmp_path: Path) -> None:
    spec["linux"]["namespaces"] = [{"type": "user"}]
    with pytest.raises(
        InvalidArgumentError, match=r"container c1: found a user namespace in linux\.namespaces"
    ):
        oci.container_config(spec, tmp_path, "c1", [])


@pytest.mark.parametrize(
    "device",
    [
        {"path": "/dev/sda", "type": "b", "major": 8, "minor": 0},
        {"path": "/dev/vfio/vfio", "type": "c", "major": 10, "minor": 196},
        {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229},
        {"path": "/dev/pipe", "type": "p"},
    ],
)
def test_devices_that_the_machine_can_have_are_kept(
    spec: dict[str, Any], tmp_path: Path, device: dict[str, Any]
) -> None:
    spec["linux"]["devices"] = [device]
    assert oci.container_config(spec, tmp_path, "c1", []).spec["linux"]["devices"] == [device]


def test_vfio_devices_are_refused_by_name(spec: dict[str, Any], tmp_path: Path) -> None:
    spec["linux"]["devices"] = [{"path": "/dev/vfio/12", "type": "c", "major": 240, "minor": 1}]
    with pytest.raises(InvalidArgumentError) as refused:
        oci.container_config(spec, tmp_path, "c1", [])
    assert "container c1: found the host's VFIO device /dev/vfio/12 in linux.devices" in str(refused.value)
    assert "privileged_without_host_devices = true" in str(refused.value)


@pytest.mark.parametrize(
    ("mount", "expected"),
    [
        (None, 0),
        ({"type": "tmpfs"}, 64 << 20),
        ({"type": "tmpfs", "options": ["nosuid", "size=65536k"]}, 64 << 20),
        ({"type": "tmpfs", "options": ["size=1g"]}, 1 << 30),
        ({"type": "tmpfs", "options": ["size=4096"]}, 4096),
        ({"type": "tmpfs", "options": ["size=50%"]}, 64 << 20),
        ({"type": "bind", "source": "/dev/shm"}, 64 << 20),
    ],
)
def test_the_size_of_shm(spec: dict[str, Any], mount: dict[str, Any] | None, expected: int) -> None:
    spec["mounts"] = [{"destination": "/dev/shm", **mount}] if mount else []
    assert oci.shm_size(spec) == expected


def test_the_size_of_a_pods_shm_is_that_of_its_mount(spec: dict[str, Any], tmp_path: Path) -> None:
    mount = {"destination": "/dev/shm", "type": "bind", "source": str(tmp_path), "options": ["rbind"]}
    found = os.statvfs(tmp_path)
    assert oci.shm_size({**spec, "mounts": [mount]}) == found.f_frsize * found.f_blocks
    with pytest.raises(InvalidArgumentError, match="mount /dev/shm: /none: No such file"):
        oci.shm_size({**spec, "mounts": [{**mount, "source": "/none"}]})


@pytest.mark.parametrize(
    ("period", "quota", "shares", "memory", "expected"),
    [
        ("100000", "220000", "2", "1048576", (2.2, 1)),
        ("100000", "-1", "2048", "0", (2.0, 0)),
        ("100000", "-1", "2049", "-1", (3.0, 0)),
        ("100000", "0", "2", "0", (0.0, 0)),
        ("0", "5", "", "much", (0.0, 0)),
        ("", "", "", "", (0.0, 0)),
    ],
)
def test_the_size_of_a_pod(
    spec: dict[str, Any], period: str, quota: str, shares: str, memory: str, expected: tuple[float, int]
) -> None:
    spec["annotations"] = {
        "io.kubernetes.cri.sandbox-cpu-period": period,
        "io.kubernetes.cri.sandbox-cpu-quota": quota,
        "io.kubernetes.cri.sandbox-cpu-shares": shares,
        "io.kubernetes.cri.sandbox-memory": memory,
    }
    assert oci.sandbox_sizing(spec) == expected


def test_a_machine_of_static_size_has_the_workload_in_it(
    spec: dict[str, Any], tmp_path: Path, load: Callable[..., RuntimeConfig], host_cpus: int
) -> None:
    spec["linux"]["resources"] = {"cpu": {"quota": 150000, "period": 100000}, "memory": {"limit": 100 << 20}}
    assert oci.container_sizing(spec) == (1.5, 100)
    config = load(runtime={"static_sandbox_resource_mgmt": True})
    found = oci.sandbox_config(spec, config, tmp_path, "c1", [])
    assert found.static_resource_mgmt
    assert (found.hypervisor.default_vcpus, found.hypervisor.default_maxvcpus) == (3, 3)
    assert found.hypervisor.default_memory_mib == 356
    spec["linux"]["resources"] = {"cpu": {"quota": 9_900_000, "period": 100000}}
    found = oci.sandbox_config(spec, config, tmp_path, "c1", [])
    assert found.hypervisor.default_vcpus == host_cpus, "no more than the host has"
    assert oci.sandbox_config(spec, load(), tmp_path, "c1", []).hypervisor.default_memory_mib == 256


def test_reading_a_bundle_imports_nothing_big() -> None:
    """The shim's `start` does it, on the way to a container's first byte."""
    code = "import sys, katautils.oci; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    big = {"asyncio", "logging", "dataclasses", "tomllib", "virtcontainers", "katautils.config", "google"}
    assert not big & set(found.split())
