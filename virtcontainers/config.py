"""The library's whole configuration, as frozen data under Kata's names.

`katautils.config` fills it from configuration.toml and annotations; nothing here reads a file.
Sizes carry their unit in the name; a `Path | None` of None means "not configured".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

OCISpec = dict[str, Any]
"""A runtime-spec config.json as parsed; validated by `katautils.oci` before it comes here."""

RUN_VC = Path("/run/vc")
"""Root of `sbs/<sandbox>` (persisted state) and `vm/<sandbox>` (sockets, logs), as in Kata."""

MAX_SOCKET_PATH_BYTES = 107
"""unix(7): sun_path, with its end."""

SHARED_SANDBOXES = Path("/run/kata-containers/shared/sandboxes")
"""Host side of what guests see: `<sandbox>/{mounts,shared}`."""

GUEST_SHARED_DIR = "/run/kata-containers/shared/containers/"
"""Where the guest mounts the share; the rootfs of container C is `<here>C/rootfs`."""

GUEST_CONTAINERS_DIR = "/run/kata-containers/"
"""In the guest: `<here>C/rootfs` is the root of a container C that is not shared."""

GUEST_SANDBOX_DIR = "/run/kata-containers/sandbox/"
"""Where the guest keeps what belongs to the pod: shm, ephemeral storages, namespaces."""

MOUNT_GUEST_TAG = "kataShared"
"""The 9p mount tag / virtio-fs tag of the share."""


class SharedFS(StrEnum):
    """`shared_fs`: how the guest sees the host's files."""

    VIRTIO_FS = "virtio-fs"
    VIRTIO_9P = "virtio-9p"
    NONE = "none"


class BlockDeviceDriver(StrEnum):
    """`block_device_driver`: how a disk is plugged in. runtime-rs's "virtio-blk-pci" is VIRTIO_BLK."""

    VIRTIO_SCSI = "virtio-scsi"
    VIRTIO_BLK = "virtio-blk"


class AgentTransport(StrEnum):
    """`transport` of [agent.kata] (ours): AUTO takes VSOCK where the host has vhost-vsock, else SERIAL."""

    AUTO = "auto"
    VSOCK = "vsock"
    HVSOCK = "hvsock"
    SERIAL = "serial"


class Accel(StrEnum):
    """`machine_accelerators`-independent choice of QEMU's accelerator; AUTO decides by node and CPU flag."""

    AUTO = "auto"
    KVM = "kvm"
    TCG = "tcg"


class ContainerType(StrEnum):
    """What a bundle is to its pod, after Kata's `ContainerType`."""

    POD_SANDBOX = "pod_sandbox"
    POD_CONTAINER = "pod_container"
    SINGLE_CONTAINER = "single_container"


@dataclass(frozen=True, kw_only=True)
class HypervisorConfig:
    """[hypervisor.qemu], resolved: paths exist-checked by the driver, 0 and -1 replaced by real numbers."""

    path: Path = Path("/usr/bin/qemu-system-x86_64")
    kernel: Path | None = None
    initrd: Path | None = None
    image: Path | None = None
    rootfs_type: str = "ext4"
    firmware: Path | None = None
    kernel_params: str = ""
    machine_type: str = "q35"
    machine_accelerators: str = ""
    accel: Accel = Accel.AUTO
    cpu_model: str = ""
    """Empty: "host" under KVM, "max" under TCG."""
    cpu_features: str = ""
    default_vcpus: int = 1
    default_maxvcpus: int = 1
    default_memory_mib: int = 2048
    default_maxmemory_mib: int = 0
    """0: the host's memory."""
    memory_slots: int = 10
    memory_offset_mib: int = 0
    enable_mem_prealloc: bool = False
    enable_hugepages: bool = False
    enable_virtio_mem: bool = False
    shared_fs: SharedFS = SharedFS.VIRTIO_FS
    virtio_fs_daemon: Path | None = None
    """None: the first of /usr/libexec/virtiofsd, /usr/lib/qemu/virtiofsd, /usr/libexec/kata-py/virtiofsd."""
    virtio_fs_cache: str = "auto"
    virtio_fs_cache_size_mib: int = 0
    virtio_fs_queue_size: int = 1024
    virtio_fs_extra_args: tuple[str, ...] = ()
    msize_9p: int = 8192
    block_device_driver: BlockDeviceDriver = BlockDeviceDriver.VIRTIO_SCSI
    block_device_aio: str = "io_uring"
    block_device_cache_set: bool = False
    """The next two count; else it is QEMU's own way: through the host's page cache, flushed when asked to."""
    block_device_cache_direct: bool = False
    block_device_cache_noflush: bool = False
    disable_block_device_use: bool = False
    disable_vhost_net: bool = False
    entropy_source: str = "/dev/urandom"
    seccompsandbox: str = "on,obsolete=deny,spawn=deny,resourcecontrol=deny"
    default_bridges: int = 1
    pcie_root_port: int = 0
    pcie_switch_port: int = 0
    use_legacy_serial: bool = False
    enable_iothreads: bool = False
    guest_hook_path: str = ""
    guest_memory_dump_path: Path | None = None
    enable_debug: bool = False
    disable_selinux: bool = False
    extra_monitor_socket: str = ""
    # Set by the factory, never by a file.
    boot_to_be_template: bool = False
    boot_from_template: bool = False
    memory_path: Path | None = None
    devices_state_path: Path | None = None


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """[agent.kata]."""

    enable_debug: bool = False
    enable_tracing: bool = False
    kernel_modules: tuple[str, ...] = ()
    """Each "name param=value ...", for the guest's modprobe."""
    debug_console_enabled: bool = False
    dial_timeout_s: float = 45.0
    launch_process_timeout_s: float = 6.0
    transport: AgentTransport = AgentTransport.AUTO
    policy: str = ""


@dataclass(frozen=True, kw_only=True)
class FactoryConfig:
    """[factory]."""

    enable_template: bool = False
    template_path: Path = RUN_VC / "vm/template"
    vm_cache_number: int = 0
    vm_cache_endpoint: Path = Path("/var/run/kata-containers/cache.sock")


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The pod's network namespace; None: loopback only."""

    network_namespace: Path | None = None
    interworking_model: str = "tcfilter"
    disable_new_network: bool = False
    dns: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Mount:
    """One mount as containerd and the OCI spec give it."""

    type: str
    source: str
    options: tuple[str, ...] = ()
    target: str = ""
    """Below the rootfs; containerd 1.7+ only."""


@dataclass(frozen=True, kw_only=True)
class RootFs:
    """Where a container's root comes from.

    `mounts` (of containerd's Create) are mounted in order on `target`; without any, `target` holds the
    root already and is only shared.
    """

    target: Path
    mounts: tuple[Mount, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ContainerConfig:
    """One container; `spec` is the host's OCI spec, unchanged, and never modified."""

    id: str
    bundle: Path
    rootfs: RootFs
    spec: OCISpec
    container_type: ContainerType
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SandboxConfig:
    """One pod, with its first container."""

    id: str
    hostname: str
    """Empty: the sandbox's id, so that no two machines have the same."""
    hypervisor: HypervisorConfig
    agent: AgentConfig
    factory: FactoryConfig
    network: NetworkConfig
    container: ContainerConfig
    """The pod's sandbox container or the single container."""
    annotations: Mapping[str, str] = field(default_factory=dict)
    shm_size_bytes: int = 64 << 20
    sandbox_pidns: bool = False
    """Containers share one PID namespace in the guest."""
    sandbox_cgroup_only: bool = False
    static_resource_mgmt: bool = False
    disable_guest_seccomp: bool = False
    disable_guest_empty_dir: bool = False
    emptydir_mode: str = "shared-fs"
    enable_vcpus_pinning: bool = False
    sandbox_bind_mounts: tuple[str, ...] = ()
    guest_selinux_label: str = ""
    create_container_timeout_s: float = 60.0
    check_interval_s: float = 5.0
    """How often the monitor asks the agent's Check."""
