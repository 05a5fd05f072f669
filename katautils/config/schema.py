"""Every key of Kata's configuration.toml for QEMU: its type, where it goes, and its annotation.

Sources: `tomlConfig` of Kata's Go runtime (pkg/katautils/config.go), kata-types of runtime-rs, and all
releases of `configuration-qemu*.toml.in`; annotations from pkg/annotations and pkg/oci/utils.go.

As in Go, a key that holds its type's zero (`false`, 0, "", []) is as good as absent: the default applies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

Value = Any
"""bool, int, float, str, or a tuple of str; of tables what TOML has."""

INT32_MAX = (1 << 31) - 1
UINT32_MAX = (1 << 32) - 1
UINT64_MAX = (1 << 64) - 1
INT64_MAX = (1 << 63) - 1


class Kind(NamedTuple):
    """A type, with its range."""

    expected: str
    """Completes "expected ..."."""
    accept: Callable[[Any], Value]
    """The TOML value as we keep it; raises ValueError for one that is not of this kind."""
    from_text: Callable[[str], Any]
    """What an annotation's text would be in TOML; raises ValueError."""


def _text(text: str) -> str:
    return text


def _text_bool(text: str) -> bool:
    # What Go's strconv.ParseBool takes.
    if text in ("1", "t", "T", "true", "TRUE", "True"):
        return True
    if text in ("0", "f", "F", "false", "FALSE", "False"):
        return False
    raise ValueError(text)


def _text_int(text: str) -> int:
    if not (text.isascii() and text.removeprefix("-").isdigit()):
        raise ValueError(text)
    return int(text)


def _text_strings(text: str) -> list[Any]:
    """A JSON list, as Kata's Go runtime wants it; else the words between commas, as its runtime-rs does."""
    if not text.lstrip().startswith("["):
        return text.split(",")
    import json

    found: list[Any] = json.loads(text)
    return found


def _accept_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _accept_string(value: Any) -> str:
    # A NUL cannot be in a path, an argument or an environment.
    if not isinstance(value, str) or "\0" in value:
        raise ValueError
    return value


def _accept_strings(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError
    return tuple(map(_accept_string, value))


def _accept_path(value: Any) -> str:
    path = _accept_string(value)
    if path and not path.startswith("/"):
        raise ValueError
    return path


def _accept_paths(value: Any) -> tuple[str, ...]:
    return tuple(map(_accept_path, _accept_strings(value)))


def _accept_table(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError
    return value


def _accept_tables(value: Any) -> Any:
    if not isinstance(value, list):
        raise ValueError
    return [_accept_table(item) for item in value]


def integer(lowest: int, highest: int) -> Kind:
    def accept(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
            raise ValueError
        return value

    return Kind(f"an integer from {lowest} to {highest}", accept, _text_int)


def one_of(*words: str) -> Kind:
    """One of the words, or "" for the default."""

    def accept(value: Any) -> str:
        if not isinstance(value, str) or (value and value not in words):
            raise ValueError
        return value

    return Kind(("one of " if words[1:] else "") + ", ".join(f'"{word}"' for word in words), accept, _text)


def _accept_number(value: Any) -> float:
    # float32 in Kata; the bound keeps infinities and NaN out as well.
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e38 < value < 1e38:
        raise ValueError
    return value


def _accept_msize(value: Any) -> int:
    size: int = UINT32.accept(value)
    if size and not 4096 <= size <= INT32_MAX:
        raise ValueError
    return size


def _accept_queue_size(value: Any) -> int:
    size: int = UINT32.accept(value)
    if size and (not 8 <= size <= 1024 or size & (size - 1)):
        raise ValueError
    return size


def _accept_sector_size(value: Any) -> int:
    size: int = UINT32.accept(value)
    if size and (not 512 <= size <= 65536 or size & (size - 1)):
        raise ValueError
    return size


BOOL = Kind("true or false", _accept_bool, _text_bool)
STRING = Kind("a string", _accept_string, _text)
STRINGS = Kind("a list of strings", _accept_strings, _text_strings)
PATH = Kind("an absolute path", _accept_path, _text)
PATHS = Kind("a list of absolute paths", _accept_paths, _text_strings)
UINT8 = integer(0, 255)
UINT32 = integer(0, UINT32_MAX)
UINT64 = integer(0, UINT64_MAX)
INT64 = integer(-INT64_MAX - 1, INT64_MAX)
NUMBER = Kind("a number", _accept_number, float)
SECTOR_SIZE = Kind("0 or a power of two from 512 to 65536", _accept_sector_size, _text_int)
# 4096 is the least that QEMU's 9p server takes, and the guest's kernel reads a signed number.
MSIZE_9P = Kind("0 or an integer from 4096 to 2147483647", _accept_msize, _text_int)
# 1024 is the most that QEMU's queues have; the guest's virtiofs wants more than four places.
QUEUE_SIZE = Kind("0 or a power of two from 8 to 1024", _accept_queue_size, _text_int)
VFIO_PORT = one_of("no-port", "bridge-port", "root-port", "switch-port")
TABLE = Kind("a table", _accept_table, _text)
TABLES = Kind("a list of tables", _accept_tables, _text)
MODULES = Kind("a list of strings", _accept_strings, lambda text: text.split(";"))
WORDS = Kind("a list of strings", _accept_strings, str.split)

# Kata's others are not for disks of a q35 machine's; the last is runtime-rs's name.
BLOCK_DEVICE_DRIVER = one_of("virtio-scsi", "virtio-blk", "virtio-blk-pci")
VM_ROOTFS_DRIVER = one_of("virtio-blk-pci", "virtio-blk-ccw", "virtio-blk-mmio", "virtio-pmem", "virtio-scsi")


class Key(NamedTuple):
    """One key. One without a `field` is known and not implemented; nor is one that is `inert`."""

    kind: Kind
    field: str = ""
    """Of the dataclass that the key's table becomes."""
    idle: tuple[Value, ...] = ()
    """Values beside zero that ask for nothing that we do not do: such a key is not worth a warning."""
    part_of: str = ""
    """The key without which this one means nothing: when that one is off, or has its warning already, this
    one is not worth another."""
    annotation: str = ""
    """The last part of `io.katacontainers.config.<table>.<annotation>`; "" when there is none. Every other
    key belongs to the host's administrator alone."""
    allowed_by: str = ""
    """The key with the glob(3) patterns for a path that comes by annotation."""
    inert: bool = False
    """Its field is there, and the library does not do anything with it yet."""

    @property
    def is_implemented(self) -> bool:
        return bool(self.field) and not self.inert

    def is_idle(self, value: Value) -> bool:
        return not value or value in self.idle


Table = dict[str, Key]


def _settable(keys: Table, names: Iterable[str]) -> None:
    """The annotations that are named as their keys are."""
    for name in names:
        keys[name] = keys[name]._replace(annotation=name)


HYPERVISOR: Table = {
    "path": Key(PATH, "path", allowed_by="valid_hypervisor_paths"),
    "valid_hypervisor_paths": Key(PATHS, "valid_hypervisor_paths"),
    "kernel": Key(PATH, "kernel"),
    "initrd": Key(PATH, "initrd"),
    "image": Key(PATH, "image"),
    "rootfs_type": Key(one_of("ext4", "xfs", "erofs"), "rootfs_type"),
    "firmware": Key(PATH, "firmware"),
    "firmware_volume": Key(PATH),
    "pflashes": Key(PATHS),
    "enable_annotations": Key(STRINGS, "enable_annotations"),
    "kernel_params": Key(STRING, "kernel_params"),
    "kernel_verity_params": Key(STRING),
    "machine_type": Key(one_of("q35"), "machine_type"),
    "machine_accelerators": Key(STRING, "machine_accelerators"),
    "cpu_features": Key(STRING, "cpu_features"),
    "default_vcpus": Key(NUMBER, "default_vcpus"),
    "default_maxvcpus": Key(UINT32, "default_maxvcpus", annotation="default_max_vcpus"),
    "default_memory": Key(UINT32, "default_memory_mib"),
    "default_maxmemory": Key(UINT64, "default_maxmemory_mib"),
    "memory_slots": Key(UINT32, "memory_slots"),
    "memory_offset": Key(UINT64, "memory_offset_mib"),
    "enable_mem_prealloc": Key(BOOL, "enable_mem_prealloc"),
    "enable_hugepages": Key(BOOL, "enable_hugepages"),
    "enable_virtio_mem": Key(BOOL, "enable_virtio_mem"),
    "shared_fs": Key(one_of("virtio-fs", "virtio-9p", "none"), "shared_fs"),
    "virtio_fs_daemon": Key(PATH, "virtio_fs_daemon", allowed_by="valid_virtio_fs_daemon_paths"),
    "valid_virtio_fs_daemon_paths": Key(PATHS, "valid_virtio_fs_daemon_paths"),
    "virtio_fs_cache": Key(one_of("never", "metadata", "auto", "always", "none"), "virtio_fs_cache"),
    "virtio_fs_cache_size": Key(UINT32, "virtio_fs_cache_size_mib"),
    "virtio_fs_queue_size": Key(QUEUE_SIZE, "virtio_fs_queue_size"),
    "virtio_fs_extra_args": Key(STRINGS, "virtio_fs_extra_args"),
    "virtio_fs_is_dax": Key(BOOL),
    "msize_9p": Key(MSIZE_9P, "msize_9p"),
    "block_device_driver": Key(BLOCK_DEVICE_DRIVER, "block_device_driver"),
    "block_device_aio": Key(one_of("threads", "native", "io_uring"), "block_device_aio"),
    "disable_block_device_use": Key(BOOL, "disable_block_device_use"),
    "block_device_cache_set": Key(BOOL, "block_device_cache_set"),
    "block_device_cache_direct": Key(BOOL, "block_device_cache_direct"),
    "block_device_cache_noflush": Key(BOOL, "block_device_cache_noflush"),
    "block_device_logical_sector_size": Key(SECTOR_SIZE, annotation="blk_logical_sector_size"),
    "block_device_physical_sector_size": Key(SECTOR_SIZE, annotation="blk_physical_sector_size"),
    "queue_size": Key(UINT32, idle=(128,), annotation="block_device_queue_size"),
    "num_queues": Key(UINT32, idle=(1,), annotation="block_device_num_queues"),
    "enable_iothreads": Key(BOOL, "enable_iothreads"),
    "indep_iothreads": Key(UINT32),
    "vm_rootfs_driver": Key(VM_ROOTFS_DRIVER, part_of="image"),
    "disable_image_nvdimm": Key(BOOL, part_of="image"),
    "guest_extension_images": Key(TABLES),
    "reclaim_guest_freed_memory": Key(BOOL),
    "hugepage_type": Key(one_of("hugetlbfs", "thp"), idle=("hugetlbfs",), part_of="enable_hugepages"),
    "file_mem_backend": Key(STRING),
    "valid_file_mem_backends": Key(STRINGS, part_of="file_mem_backend"),
    "file_mem_backend_list": Key(STRINGS, part_of="file_mem_backend"),
    "enable_guest_swap": Key(BOOL),
    "guest_swap_path": Key(STRING, part_of="enable_guest_swap"),
    "guest_swap_size_percent": Key(UINT64, part_of="enable_guest_swap"),
    "guest_swap_create_threshold_secs": Key(UINT64, part_of="enable_guest_swap"),
    "enable_swap": Key(BOOL),
    "enable_numa": Key(BOOL),
    "numa_mapping": Key(WORDS, part_of="enable_numa"),
    "overhead_vcpus": Key(NUMBER),
    "overhead_memory": Key(UINT32),
    "disable_nested_virtualization": Key(BOOL),
    "disable_vhost_net": Key(BOOL, "disable_vhost_net"),
    "network_queues": Key(UINT32, idle=(1,)),
    "rx_rate_limiter_max_rate": Key(UINT64),
    "tx_rate_limiter_max_rate": Key(UINT64),
    "net_rate_limiter_bw_max_rate": Key(INT64),
    "net_rate_limiter_bw_one_time_burst": Key(INT64, part_of="net_rate_limiter_bw_max_rate"),
    "net_rate_limiter_ops_max_rate": Key(INT64),
    "net_rate_limiter_ops_one_time_burst": Key(INT64, part_of="net_rate_limiter_ops_max_rate"),
    "disk_rate_limiter_bw_max_rate": Key(INT64),
    "disk_rate_limiter_bw_one_time_burst": Key(INT64, part_of="disk_rate_limiter_bw_max_rate"),
    "disk_rate_limiter_ops_max_rate": Key(INT64),
    "disk_rate_limiter_ops_one_time_burst": Key(INT64, part_of="disk_rate_limiter_ops_max_rate"),
    "entropy_source": Key(PATH, "entropy_source", allowed_by="valid_entropy_sources"),
    "valid_entropy_sources": Key(PATHS, "valid_entropy_sources"),
    "seccompsandbox": Key(STRING, "seccompsandbox"),
    "seccomp_sandbox": Key(STRING, "seccompsandbox"),  # runtime-rs
    "disable_seccomp": Key(BOOL),
    "default_bridges": Key(UINT32, "default_bridges"),
    "hot_plug_vfio": Key(VFIO_PORT, idle=("no-port",)),
    "cold_plug_vfio": Key(VFIO_PORT, idle=("no-port",)),
    "hotplug_vfio_on_root_bus": Key(BOOL),
    "pcie_root_port": Key(UINT32, "pcie_root_port"),
    "pcie_switch_port": Key(UINT32, "pcie_switch_port", inert=True),
    "enable_iommu": Key(BOOL),
    "enable_iommu_platform": Key(BOOL),
    "enable_vhost_user_store": Key(BOOL),
    "vhost_user_store_path": Key(
        PATH, part_of="enable_vhost_user_store", allowed_by="valid_vhost_user_store_paths"
    ),
    "valid_vhost_user_store_paths": Key(PATHS, part_of="enable_vhost_user_store"),
    "vhost_user_store_path_list": Key(PATHS, part_of="enable_vhost_user_store"),
    "vhost_user_reconnect_timeout_sec": Key(UINT32, part_of="enable_vhost_user_store"),
    "use_legacy_serial": Key(BOOL, "use_legacy_serial", idle=(True,), inert=True),
    "guest_hook_path": Key(STRING, "guest_hook_path"),
    "guest_memory_dump_path": Key(PATH, "guest_memory_dump_path", inert=True),
    "guest_memory_dump_paging": Key(BOOL, part_of="guest_memory_dump_path"),
    "enable_debug": Key(BOOL, "enable_debug"),
    "log_level": Key(STRING, part_of="enable_debug"),
    "hypervisor_loglevel": Key(UINT32, part_of="enable_debug"),
    "extra_monitor_socket": Key(one_of("hmp", "qmp", "qmp-pretty"), "extra_monitor_socket"),
    "dbg_monitor_socket": Key(one_of("hmp", "qmp", "qmp-pretty"), "extra_monitor_socket"),  # runtime-rs 3.x
    # The checks that these would turn off are not made here.
    "disable_nesting_checks": Key(BOOL, idle=(True,)),
    "disable_guest_selinux": Key(BOOL, idle=(True,)),
    # We label nothing.
    "disable_selinux": Key(BOOL, "disable_selinux", idle=(True,), inert=True),
    "selinux_label": Key(STRING),
    "rootless": Key(BOOL),
    "rootless_user": Key(TABLE, part_of="rootless"),
    "confidential_guest": Key(BOOL),
    "sev_snp_guest": Key(BOOL),
    "snp_certs_path": Key(STRING, part_of="confidential_guest"),
    "snp_id_block": Key(STRING, part_of="confidential_guest"),
    "snp_id_auth": Key(STRING, part_of="confidential_guest"),
    "snp_guest_policy": Key(UINT64, part_of="confidential_guest"),
    "measurement_algo": Key(STRING, part_of="confidential_guest"),
    "tdx_quote_generation_service_socket_port": Key(UINT32, part_of="confidential_guest"),
    "initdata": Key(STRING, annotation="cc_init_data"),
    "prefetch_list_path": Key(STRING, annotation="prefetch_files.list"),
    "use_vsock": Key(BOOL, idle=(True,)),  # Kata 1.x
    # Kata 2.0's names.
    "path_list": Key(PATHS, "valid_hypervisor_paths"),
    "virtio_fs_daemon_list": Key(PATHS, "valid_virtio_fs_daemon_paths"),
    # Of other hypervisors; Kata's one struct has them all.
    "jailer_path": Key(PATH, allowed_by="valid_jailer_paths"),
    "valid_jailer_paths": Key(PATHS, part_of="jailer_path"),
    "ctlpath": Key(STRING),
    "valid_ctlpaths": Key(STRINGS, part_of="ctlpath"),
    "remote_hypervisor_socket": Key(STRING),
    "remote_hypervisor_timeout": Key(UINT32, part_of="remote_hypervisor_socket"),
    "default_gpus": Key(UINT32),
    "default_gpu_model": Key(STRING, part_of="default_gpus"),
}

_settable(
    HYPERVISOR,
    (
        "path", "kernel", "initrd", "image", "firmware", "firmware_volume", "jailer_path",
        "kernel_params", "kernel_verity_params", "machine_type", "machine_accelerators", "cpu_features",
        "disable_vhost_net", "enable_vhost_user_store", "vhost_user_store_path",
        "vhost_user_reconnect_timeout_sec", "guest_hook_path", "disable_image_nvdimm", "cold_plug_vfio",
        "hot_plug_vfio", "pcie_root_port", "pcie_switch_port", "entropy_source", "use_legacy_serial",
        "default_gpus", "default_gpu_model", "default_vcpus", "default_memory", "memory_slots",
        "memory_offset", "enable_virtio_mem", "enable_mem_prealloc", "reclaim_guest_freed_memory",
        "enable_hugepages", "hugepage_type", "enable_iommu", "enable_iommu_platform", "numa_mapping",
        "msize_9p", "shared_fs", "virtio_fs_daemon", "virtio_fs_cache", "virtio_fs_cache_size",
        "virtio_fs_extra_args", "block_device_driver", "block_device_aio", "disable_block_device_use",
        "enable_iothreads", "indep_iothreads", "block_device_cache_set", "block_device_cache_direct",
        "block_device_cache_noflush", "network_queues", "rx_rate_limiter_max_rate",
        "tx_rate_limiter_max_rate", "enable_guest_swap", "rootless",
    ),
)  # fmt: skip

AGENT: Table = {
    "enable_debug": Key(BOOL, "enable_debug"),
    "enable_tracing": Key(BOOL, "enable_tracing"),
    "kernel_modules": Key(MODULES, "kernel_modules"),
    "debug_console_enabled": Key(BOOL, "debug_console_enabled"),
    "dial_timeout": Key(UINT32, "dial_timeout_s"),
    "launch_process_timeout": Key(UINT32, "launch_process_timeout_s"),
    "policy": Key(STRING, "policy"),
    "transport": Key(one_of("auto", "vsock", "hvsock", "serial"), "transport"),  # ours
    "create_container_timeout": Key(UINT32, "create_container_timeout"),  # runtime-rs; [runtime]'s in Go
    # runtime-rs's budget of 3 s is for a machine that KVM runs; `dial_timeout` is the one that counts here.
    "dial_timeout_ms": Key(UINT32, part_of="dial_timeout"),
    "reconnect_timeout_ms": Key(UINT32, idle=(3000,)),
    "cdh_api_timeout": Key(UINT32, idle=(50,)),
    "cdh_api_timeout_ms": Key(UINT32, idle=(50000,)),
    "health_check_request_timeout_ms": Key(UINT32),
    "container_pipe_size": Key(UINT32),
    "visible_cdi_devices": Key(BOOL),
    "log_level": Key(STRING, part_of="enable_debug"),
    "log_port": Key(UINT32, idle=(1025,)),
    "server_port": Key(UINT32, idle=(1024,)),
    "passfd_listener_port": Key(UINT32, idle=(1027,)),
    "trace_mode": Key(STRING, part_of="enable_tracing"),
    "trace_type": Key(STRING, part_of="enable_tracing"),
}

_settable(AGENT, ("kernel_modules", "enable_tracing", "container_pipe_size", "cdh_api_timeout_ms", "policy"))

MEM_AGENT: Table = {
    "mem_agent_enable": Key(BOOL),
    "enable": Key(BOOL),
    "memcg_disable": Key(BOOL, part_of="mem_agent_enable"),
    "memcg_swap": Key(BOOL, part_of="mem_agent_enable"),
    "memcg_swappiness_max": Key(UINT8, part_of="mem_agent_enable"),
    "memcg_period_secs": Key(UINT64, part_of="mem_agent_enable"),
    "memcg_period_psi_percent_limit": Key(UINT8, part_of="mem_agent_enable"),
    "memcg_eviction_psi_percent_limit": Key(UINT8, part_of="mem_agent_enable"),
    "memcg_eviction_run_aging_count_min": Key(UINT64, part_of="mem_agent_enable"),
    "compact_disable": Key(BOOL, part_of="mem_agent_enable"),
    "compact_period_secs": Key(UINT64, part_of="mem_agent_enable"),
    "compact_period_psi_percent_limit": Key(UINT8, part_of="mem_agent_enable"),
    "compact_psi_percent_limit": Key(UINT8, part_of="mem_agent_enable"),
    "compact_sec_max": Key(INT64, part_of="mem_agent_enable"),
    "compact_order": Key(UINT8, part_of="mem_agent_enable"),
    "compact_threshold": Key(UINT64, part_of="mem_agent_enable"),
    "compact_force_times": Key(UINT64, part_of="mem_agent_enable"),
    # Kata 3.x's runtime-rs file has it below this table's header.
    "create_container_timeout": Key(UINT32, part_of="mem_agent_enable"),
}

FACTORY: Table = {
    "enable_template": Key(BOOL, "enable_template"),
    "template_path": Key(PATH, "template_path"),
    "vm_cache_number": Key(UINT32, "vm_cache_number"),
    "vm_cache_endpoint": Key(PATH, "vm_cache_endpoint"),
}

RUNTIME: Table = {
    "enable_debug": Key(BOOL, "enable_debug"),
    "internetworking_model": Key(one_of("default", "tcfilter", "macvtap", "none"), "internetworking_model"),
    "disable_new_netns": Key(BOOL, "disable_new_netns"),
    "disable_guest_seccomp": Key(BOOL, "disable_guest_seccomp"),
    "guest_selinux_label": Key(STRING, "guest_selinux_label", inert=True),
    "enable_vcpus_pinning": Key(BOOL, "enable_vcpus_pinning"),
    "sandbox_cgroup_only": Key(BOOL, "sandbox_cgroup_only"),
    "static_sandbox_resource_mgmt": Key(BOOL, "static_sandbox_resource_mgmt"),
    "sandbox_bind_mounts": Key(PATHS, "sandbox_bind_mounts"),
    "disable_guest_empty_dir": Key(BOOL, "disable_guest_empty_dir"),
    "emptydir_mode": Key(
        one_of("shared-fs", "block-encrypted", "block-plain"),
        "emptydir_mode",
        idle=("shared-fs",),
        inert=True,
    ),
    "create_container_timeout": Key(UINT32, "create_container_timeout"),
    "vfio_mode": Key(one_of("vfio", "guest-kernel"), idle=("guest-kernel",)),
    "enable_tracing": Key(BOOL),
    "jaeger_endpoint": Key(STRING, part_of="enable_tracing"),
    "jaeger_user": Key(STRING, part_of="enable_tracing"),
    "jaeger_password": Key(STRING, part_of="enable_tracing"),
    "enable_pprof": Key(BOOL),
    "experimental": Key(WORDS),
    "experimental_force_guest_pull": Key(BOOL),
    "dan_conf": Key(STRING, idle=("/run/kata-containers/dans",)),
    "kubelet_root_dir": Key(STRING, idle=("/var/lib/kubelet",)),
    "pod_resource_api_sock": Key(STRING),
    "disable_selinux": Key(BOOL),
    # runtime-rs
    "name": Key(STRING, idle=("virt_container",)),
    "hypervisor_name": Key(one_of("qemu"), idle=("qemu",)),
    "agent_name": Key(one_of("kata"), idle=("kata",)),
    "log_level": Key(STRING, part_of="enable_debug"),
    "keep_abnormal": Key(BOOL),
    "shared_mounts": Key(TABLES),
    "use_passfd_io": Key(BOOL),
    "passfd_listener_port": Key(UINT32, part_of="use_passfd_io"),
}

_settable(
    RUNTIME,
    (
        "disable_guest_seccomp", "guest_selinux_label", "sandbox_cgroup_only", "enable_vcpus_pinning",
        "enable_pprof", "experimental", "internetworking_model", "disable_new_netns", "vfio_mode",
        "create_container_timeout", "experimental_force_guest_pull", "name", "hypervisor_name", "agent_name",
    ),
)  # fmt: skip

TABLES_BY_NAME: dict[str, Table] = {
    "hypervisor.qemu": HYPERVISOR,
    "agent.kata": AGENT,
    "factory": FACTORY,
    "runtime": RUNTIME,
    "hypervisor.qemu.factory": FACTORY,  # runtime-rs
    "agent.kata.mem_agent": MEM_AGENT,
}

FOREIGN_TABLES = frozenset({
    "hypervisor.acrn", "hypervisor.clh", "hypervisor.cloud_hypervisor", "hypervisor.dragonball",
    "hypervisor.firecracker", "hypervisor.openvmm", "hypervisor.remote", "hypervisor.stratovirt",
    "netmon", "proxy", "shim", "image",
})  # fmt: skip
"""Tables of Kata's that are not ours to read: other hypervisors, and what Kata 1.x and its CC branch had."""
