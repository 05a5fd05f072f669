"""An OCI bundle's config.json, checked, and what it says to a sandbox.

At module level nothing but json: the shim's `start` reads a bundle before it imports anything big.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from katautils.config import RuntimeConfig
    from virtcontainers.config import (
        ContainerConfig,
        ContainerType,
        HypervisorConfig,
        Mount,
        OCISpec,
        SandboxConfig,
    )

CRI_O_CONTAINER_TYPE = "io.kubernetes.cri-o.ContainerType"
CONTAINER_TYPE_ANNOTATIONS = (
    "io.kubernetes.cri.container-type",
    CRI_O_CONTAINER_TYPE,
    "io.kubernetes.docker.type",
)
SANDBOX_ID_ANNOTATIONS = (
    "io.kubernetes.cri.sandbox-id",
    "io.kubernetes.cri-o.SandboxID",
    "io.kubernetes.sandbox.id",
)
"""Of containerd's CRI, CRI-O, and dockershim."""

SANDBOX_CPU_PERIOD = "io.kubernetes.cri.sandbox-cpu-period"
SANDBOX_CPU_QUOTA = "io.kubernetes.cri.sandbox-cpu-quota"
SANDBOX_CPU_SHARES = "io.kubernetes.cri.sandbox-cpu-shares"
SANDBOX_MEMORY = "io.kubernetes.cri.sandbox-memory"

BUNDLE_PATH = "io.katacontainers.pkg.oci.bundle_path"
CONTAINER_TYPE = "io.katacontainers.pkg.oci.container_type"

_NOT_FOR_THE_CONTAINER = (
    "io.katacontainers.config.agent.policy",
    "io.katacontainers.config.hypervisor.cc_init_data",
)

DEFAULT_SHM_SIZE = 64 << 20

# Objects are {key: shape}, lists [shape], maps (shape,); a key that ends in "!" has to be there.
_STRINGS = [str]
_IDS = [{"containerID!": int, "hostID!": int, "size!": int}]
_HOOKS = [{"path!": str, "args": _STRINGS, "env": _STRINGS, "timeout": int}]
_HOOK_STAGES = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
_RATES = [{"major!": int, "minor!": int, "rate!": int}]
_RESOURCES = {
    "devices": [{"allow!": bool, "type": str, "major": int, "minor": int, "access": str}],
    "memory": {
        "limit": int, "reservation": int, "swap": int, "kernel": int, "kernelTCP": int,
        "swappiness": int, "disableOOMKiller": bool, "useHierarchy": bool, "checkBeforeUpdate": bool,
    },
    "cpu": {
        "shares": int, "quota": int, "burst": int, "period": int, "realtimeRuntime": int,
        "realtimePeriod": int, "cpus": str, "mems": str, "idle": int,
    },
    "pids": {"limit": int},
    "blockIO": {
        "weight": int, "leafWeight": int,
        "weightDevice": [{"major!": int, "minor!": int, "weight": int, "leafWeight": int}],
        "throttleReadBpsDevice": _RATES, "throttleWriteBpsDevice": _RATES,
        "throttleReadIOPSDevice": _RATES, "throttleWriteIOPSDevice": _RATES,
    },
    "hugepageLimits": [{"pageSize!": str, "limit!": int}],
    "network": {"classID": int, "priorities": [{"name!": str, "priority!": int}]},
    "rdma": ({"hcaHandles": int, "hcaObjects": int},),
    "unified": (str,),
}  # fmt: skip
_PROCESS = {
    "terminal": bool,
    "consoleSize": {"height!": int, "width!": int},
    "user": {"uid": int, "gid": int, "umask": int, "additionalGids": [int], "username": str},
    "args!": _STRINGS,
    "env": _STRINGS,
    "cwd!": str,
    "capabilities": (_STRINGS,),
    "rlimits": [{"type!": str, "hard!": int, "soft!": int}],
    "noNewPrivileges": bool,
    "apparmorProfile": str,
    "oomScoreAdj": int,
    "selinuxLabel": str,
}
_SPEC = {
    "ociVersion!": str,
    "process!": _PROCESS,
    "root!": {"path!": str, "readonly": bool},
    "hostname": str,
    "domainname": str,
    "mounts": [
        {
            "destination!": str, "type": str, "source": str, "options": _STRINGS,
            "uidMappings": _IDS, "gidMappings": _IDS,
        }
    ],
    "hooks": dict.fromkeys(_HOOK_STAGES, _HOOKS),
    "annotations": (str,),
    "linux!": {
        "uidMappings": _IDS,
        "gidMappings": _IDS,
        "sysctl": (str,),
        "resources": _RESOURCES,
        "cgroupsPath": str,
        "namespaces": [{"type!": str, "path": str}],
        "devices": [
            {
                "path!": str, "type!": str, "major": int, "minor": int,
                "fileMode": int, "uid": int, "gid": int,
            }
        ],
        "seccomp": {
            "defaultAction!": str, "defaultErrnoRet": int, "architectures": _STRINGS, "flags": _STRINGS,
            "syscalls": [
                {
                    "names!": _STRINGS, "action!": str, "errnoRet": int,
                    "args": [{"index!": int, "value!": int, "valueTwo": int, "op!": str}],
                }
            ],
        },
        "rootfsPropagation": str,
        "maskedPaths": _STRINGS,
        "readonlyPaths": _STRINGS,
        "mountLabel": str,
        "intelRdt": {"closID": str, "l3CacheSchema": str, "memBwSchema": str},
    },
}  # fmt: skip

_TYPE_NAMES = {str: "a string", int: "an integer", bool: "true or false"}


def load_spec(bundle: Path) -> OCISpec:
    """Read `config.json`. A `null` in it is the same as nothing, as in Go.

    Raises InvalidArgumentError naming file and field: unreadable, not JSON, a missing field or wrong type.
    """
    path = Path(bundle) / "config.json"
    try:
        spec = json.loads(path.read_bytes(), object_pairs_hook=_without_nulls)
    except OSError as error:
        raise _invalid(f"{path}: {error.strerror}, expected the bundle's OCI spec") from error
    except (ValueError, RecursionError) as error:
        raise _invalid(f"{path}: not JSON: {error}") from None
    if not isinstance(spec, dict):
        raise _invalid(f"{path}: found {_show(spec)}, expected an object")
    _check(str(path), "", spec, _SPEC)
    _check_values(path, spec)
    return spec


def container_type(spec: OCISpec) -> ContainerType:
    """By the annotations of CRI, CRI-O and dockershim; without any, a single container.

    Raises InvalidArgumentError for a value that none of them has.
    """
    from virtcontainers.config import ContainerType

    for name in CONTAINER_TYPE_ANNOTATIONS:
        value = _annotations(spec).get(name)
        if value in ("sandbox", "podsandbox"):
            return ContainerType.POD_SANDBOX
        if value == "container":
            return ContainerType.POD_CONTAINER
        if value is not None:
            raise _invalid(f'annotation {name}: found "{value}", expected "sandbox" or "container"')
    return ContainerType.SINGLE_CONTAINER


def sandbox_id(spec: OCISpec, container_id: str) -> str:
    """The id of the pod: the container's own unless it is a container of a pod.

    Raises InvalidArgumentError when such a container does not name its pod.
    """
    annotations = _annotations(spec)
    # Compared as text, for `start` calls this and should import nothing.
    if not any(annotations.get(name) == "container" for name in CONTAINER_TYPE_ANNOTATIONS):
        return container_id
    for name in SANDBOX_ID_ANNOTATIONS:
        if value := annotations.get(name):
            return value
    raise _invalid(
        f"container {container_id}: found no pod, expected an annotation {SANDBOX_ID_ANNOTATIONS[0]} or "
        f"{SANDBOX_ID_ANNOTATIONS[1]}"
    )


def container_config(
    spec: OCISpec, bundle: Path, container_id: str, rootfs: Sequence[Mount]
) -> ContainerConfig:
    """`rootfs` are containerd's mounts, which go to `<bundle>/rootfs`; without any, the root is where the
    spec says. Raises InvalidArgumentError."""
    from virtcontainers.config import ContainerConfig, RootFs

    _check_devices(spec, container_id)
    if any(namespace["type"] == "user" for namespace in spec["linux"].get("namespaces", [])):
        raise _invalid(
            f"container {container_id}: found a user namespace in linux.namespaces, expected none: its "
            "machine has users of its own"
        )
    target = bundle / "rootfs" if rootfs else bundle / spec["root"]["path"]
    type_ = container_type(spec)
    # Kata's agent, and its policies, look for these two. Policy and init data are not the container's.
    annotations = {k: v for k, v in _annotations(spec).items() if k not in _NOT_FOR_THE_CONTAINER}
    annotations |= {BUNDLE_PATH: str(bundle), CONTAINER_TYPE: str(type_)}
    return ContainerConfig(
        id=container_id,
        bundle=bundle,
        rootfs=RootFs(target=target, mounts=tuple(rootfs)),
        spec={**spec, "annotations": annotations},
        container_type=type_,
        annotations=annotations,
    )


def sandbox_config(
    spec: OCISpec, config: RuntimeConfig, bundle: Path, container_id: str, rootfs: Sequence[Mount]
) -> SandboxConfig:
    """The pod of a sandbox's or a single container. Raises InvalidArgumentError."""
    from virtcontainers.config import ContainerType, NetworkConfig, SandboxConfig

    container = container_config(spec, bundle, container_id, rootfs)
    hypervisor = config.hypervisor
    if config.static_sandbox_resource_mgmt:
        is_pod = container.container_type is ContainerType.POD_SANDBOX
        sizing = sandbox_sizing(spec) if is_pod else container_sizing(spec)
        hypervisor = _with_workload(config, *sizing)
    if not config.disable_new_netns:
        _check_network(spec, container_id)
    network = next((n.get("path") for n in spec["linux"].get("namespaces", []) if n["type"] == "network"), "")
    return SandboxConfig(
        id=container_id,
        hostname=spec.get("hostname", ""),
        hypervisor=hypervisor,
        agent=config.agent,
        factory=config.factory,
        network=NetworkConfig(
            network_namespace=Path(network) if network else None,
            interworking_model=config.internetworking_model,
            disable_new_network=config.disable_new_netns,
        ),
        container=container,
        annotations=container.annotations,
        shm_size_bytes=shm_size(spec),
        sandbox_cgroup_only=config.sandbox_cgroup_only,
        static_resource_mgmt=config.static_sandbox_resource_mgmt,
        disable_guest_seccomp=config.disable_guest_seccomp,
        disable_guest_empty_dir=config.disable_guest_empty_dir,
        emptydir_mode=config.emptydir_mode,
        enable_vcpus_pinning=config.enable_vcpus_pinning,
        sandbox_bind_mounts=config.sandbox_bind_mounts,
        guest_selinux_label=config.guest_selinux_label,
        create_container_timeout_s=config.create_container_timeout_s,
    )


def _check_network(spec: OCISpec, container_id: str) -> None:
    """Without a namespace in the list a container has its runtime's, without a path a new one: runtime-spec,
    config-linux.md#namespaces. Raises InvalidArgumentError for the host's."""
    networks = [n for n in spec["linux"].get("namespaces", []) if n["type"] == "network"]
    if networks and not _is_own_network(networks[0].get("path", "")):
        return
    raise _invalid(
        f"container {container_id}: found the host's network in linux.namespaces, expected a network "
        "namespace: a machine cannot be in the host's (hostNetwork, --net-host)"
    )


def _is_own_network(path: str) -> bool:
    try:
        return bool(path) and Path(path).samefile("/proc/self/ns/net")
    except OSError:
        return False  # who joins it says what is wrong with it


def _check_devices(spec: OCISpec, container_id: str) -> None:
    """Character devices become nodes with the same numbers in the guest, as with Kata, and block devices are
    plugged in. Raises InvalidArgumentError naming a device that is neither."""
    for device in spec["linux"].get("devices", []):
        path = device["path"]
        if path.startswith("/dev/vfio/") and path != "/dev/vfio/vfio":
            raise _invalid(
                f"container {container_id}: found the host's VFIO device {path} in linux.devices, expected "
                "none: it cannot be given to the machine (for privileged containers set "
                "privileged_without_host_devices = true at the runtime in containerd's configuration)"
            )


def shm_size(spec: OCISpec) -> int:
    """Bytes of the pod's /dev/shm, from the mount: what a bind mount's source has, a tmpfs' `size=`, else
    DEFAULT_SHM_SIZE; 0 without such a mount. Raises InvalidArgumentError for a source that is not there."""
    for mount in spec.get("mounts", []):
        if mount["destination"] != "/dev/shm":
            continue
        options = mount.get("options", [])
        source = mount.get("source", "")
        if (mount.get("type") == "bind" or {"bind", "rbind"} & set(options)) and source != "/dev/shm":
            try:
                found = os.statvfs(source)
            except OSError as error:
                raise _invalid(f"mount /dev/shm: {source}: {error.strerror}") from error
            return found.f_frsize * found.f_blocks
        sizes = [_bytes(option.removeprefix("size=")) for option in options if option.startswith("size=")]
        return sizes[-1] if sizes else DEFAULT_SHM_SIZE
    return 0


def sandbox_sizing(spec: OCISpec) -> tuple[float, int]:
    """CPUs and MiB of a pod's containers together, as CRI's annotations tell them; 0 for what they do not.

    After Kata's `CalculateSandboxSizing`.
    """
    annotations = _annotations(spec)
    period, quota, shares, memory = (
        _int(annotations.get(name, ""))
        for name in (SANDBOX_CPU_PERIOD, SANDBOX_CPU_QUOTA, SANDBOX_CPU_SHARES, SANDBOX_MEMORY)
    )
    cpus, memory_mib = _vm_resources(period, quota, memory)
    # The kubelet's static CPU manager gives whole CPUs by cpuset and lifts the quota.
    if quota < 0 and shares > 0:
        cpus = float(-(-shares // 1024))
    return cpus, memory_mib


def container_sizing(spec: OCISpec) -> tuple[float, int]:
    """As `sandbox_sizing`, from the limits of a single container."""
    resources = spec["linux"].get("resources", {})
    cpu = resources.get("cpu", {})
    memory = resources.get("memory", {}).get("limit", 0)
    return _vm_resources(cpu.get("period", 0), cpu.get("quota", 0), memory)


def _vm_resources(period: int, quota: int, memory: int) -> tuple[float, int]:
    # A negative quota or limit is none.
    return (quota / period if quota >= 0 and period > 0 else 0.0), max(memory, 0) >> 20


def _with_workload(config: RuntimeConfig, cpus: float, memory_mib: int) -> HypervisorConfig:
    """The machine with the workload's size from the start, for nothing is added to it later."""
    import math
    import os
    from dataclasses import replace

    # As when a machine grows: vCPUs that take turns help nobody, and no template has slots for them.
    most = max(config.hypervisor.default_vcpus, os.cpu_count() or 1)
    vcpus = min(math.ceil(config.hypervisor.default_vcpus + cpus), most)
    # A clone has the slots of its template, and is grown once before its first container.
    clones = config.factory.enable_template or config.factory.vm_cache_number > 0
    memory_mib += config.hypervisor.default_memory_mib
    return replace(
        config.hypervisor,
        default_vcpus=vcpus,
        default_maxvcpus=max(vcpus, config.hypervisor.default_maxvcpus) if clones else vcpus,
        default_memory_mib=memory_mib,
        default_maxmemory_mib=max(memory_mib, config.hypervisor.default_maxmemory_mib),
    )


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        return 0


def _bytes(text: str) -> int:
    """A tmpfs' size; a percentage, of a memory that is not the guest's, is the default."""
    units = {"k": 10, "m": 20, "g": 30}
    shift = units.get(text[-1:].lower(), 0)
    digits = text[:-1] if shift else text
    return int(digits) << shift if digits.isdecimal() else DEFAULT_SHM_SIZE


def _annotations(spec: OCISpec) -> Mapping[str, str]:
    annotations: Mapping[str, str] = spec.get("annotations", {})
    return annotations


def _without_nulls(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in pairs if value is not None}


def _invalid(message: str) -> Exception:
    from virtcontainers.errors import InvalidArgumentError

    return InvalidArgumentError(message)


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check(file: str, where: str, value: Any, shape: Any) -> None:
    if isinstance(shape, type):
        # bool is an int to Python and not to JSON.
        if not isinstance(value, shape) or (shape is int and isinstance(value, bool)):
            raise _invalid(f"{file}: {where}: found {_show(value)}, expected {_TYPE_NAMES[shape]}")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise _invalid(f"{file}: {where}: found {_show(value)}, expected a list")
        for index, item in enumerate(value):
            _check(file, f"{where}[{index}]", item, shape[0])
    elif not isinstance(value, dict):
        raise _invalid(f"{file}: {where}: found {_show(value)}, expected an object")
    elif isinstance(shape, tuple):
        for key, item in value.items():
            _check(file, f"{where}[{_show(key)}]", item, shape[0])
    else:
        for name, inner in shape.items():
            key = name.removesuffix("!")
            path = f"{where}.{key}" if where else key
            if key in value:
                _check(file, path, value[key], inner)
            elif key is not name:
                raise _invalid(f"{file}: {path}: found nothing, expected {_expected(inner)}")


def _expected(shape: Any) -> str:
    if isinstance(shape, type):
        return _TYPE_NAMES[shape]
    return "a list" if isinstance(shape, list) else "an object"


def _check_values(path: Path, spec: OCISpec) -> None:
    """What has the right type and still cannot be."""

    def require(condition: object, where: str, found: object, expected: str) -> None:
        if not condition:
            raise _invalid(f"{path}: {where}: found {_show(found)}, expected {expected}")

    process = spec["process"]
    require(process["args"], "process.args", process["args"], "at least the program")
    require(process["cwd"].startswith("/"), "process.cwd", process["cwd"], "an absolute path")
    require(spec["root"]["path"], "root.path", spec["root"]["path"], "a path")
    for i, mount in enumerate(spec.get("mounts", [])):
        destination = mount["destination"]
        require(destination.startswith("/"), f"mounts[{i}].destination", destination, "an absolute path")
    for i, namespace in enumerate(spec["linux"].get("namespaces", [])):
        kinds = ("pid", "network", "mount", "ipc", "uts", "user", "cgroup", "time")
        where = f"linux.namespaces[{i}].type"
        require(namespace["type"] in kinds, where, namespace["type"], "one of " + ", ".join(kinds))
    for i, device in enumerate(spec["linux"].get("devices", [])):
        where = f"linux.devices[{i}].type"
        require(device["type"] in ("c", "b", "u", "p"), where, device["type"], '"c", "b", "u" or "p"')
    for stage in _HOOK_STAGES:
        for i, hook in enumerate(spec.get("hooks", {}).get(stage, [])):
            where = f"hooks.{stage}[{i}]"
            require(hook["path"].startswith("/"), f"{where}.path", hook["path"], "an absolute path")
            timeout = hook.get("timeout", 1)
            require(timeout > 0, f"{where}.timeout", timeout, "a positive number of seconds")
