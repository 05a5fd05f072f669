"""From the files' and the annotations' settings to what the library runs with."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from katautils.config.files import ParsedConfig, Setting, as_toml, find_configuration, read_configuration
from katautils.config.schema import TABLES_BY_NAME
from katautils.config.warn import key_warning
from virtcontainers.config import (
    MAX_SOCKET_PATH_BYTES,
    Accel,
    AgentConfig,
    AgentTransport,
    BlockDeviceDriver,
    FactoryConfig,
    HypervisorConfig,
    SharedFS,
)
from virtcontainers.errors import InvalidArgumentError

DEFAULT_KERNEL = "/usr/share/kata-containers/vmlinuz.container"
DEFAULT_VIRTIO_FS_CACHE = "never"
MAX_VCPUS = 240
"""What Kata's QEMU driver takes at most."""
MIN_MEMORY_MIB = 256
MAX_BRIDGES = 5
MAX_PCIE_PORTS = 16

_ALLOW_LISTS = ("hypervisor_paths", "virtio_fs_daemon_paths", "entropy_sources")
"""What follows `valid_`: for the annotations, not for the library."""

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """[runtime], the other tables as the library's dataclasses, and where it all comes from."""

    path: Path
    drop_ins: tuple[Path, ...]
    warnings: tuple[str, ...]
    """For the log, once per load; what is wrong but does not stop anything."""
    hypervisor: HypervisorConfig
    agent: AgentConfig
    factory: FactoryConfig
    enable_debug: bool = False
    internetworking_model: str = "tcfilter"
    disable_new_netns: bool = False
    disable_guest_seccomp: bool = False
    guest_selinux_label: str = ""
    enable_vcpus_pinning: bool = False
    sandbox_cgroup_only: bool = False
    static_sandbox_resource_mgmt: bool = False
    sandbox_bind_mounts: tuple[str, ...] = ()
    disable_guest_empty_dir: bool = False
    emptydir_mode: str = "shared-fs"
    create_container_timeout_s: float = 60.0
    of_files: Callable[[], RuntimeConfig] | None = dataclasses.field(default=None, repr=False, compare=False)
    """Set when annotations changed something; see `without_annotations`."""

    @property
    def without_annotations(self) -> RuntimeConfig:
        """What the files say alone, which a template is made of; `self` when no annotation changed anything.

        Raises InvalidArgumentError when it is only with the annotations that they make sense.
        """
        return self.of_files() if self.of_files else self


def load_configuration(path: Path | None, annotations: Mapping[str, str] | None = None) -> RuntimeConfig:
    """Load `path`, or what `find_configuration` finds, with drop-ins, and `io.katacontainers.config.*` of
    `annotations` over it.

    Raises NotFoundError when there is no file; InvalidArgumentError for a wrong type, an impossible value, an
    annotation that is not allowed: with file and key, or the annotation, what was found and expected. Whether
    the kernel, QEMU and other paths exist is the driver's to say.
    """
    parsed = read_configuration(find_configuration(path))
    warnings = [warning] if (warning := key_warning(parsed)) else []
    if not annotations:
        return _resolve(parsed, warnings)

    from katautils.config.annotations import apply_annotations

    tables = {name: dict(settings) for name, settings in parsed.tables.items()}
    without_annotations = dataclasses.replace(parsed, tables=tables)
    ignored = apply_annotations(parsed, annotations)
    changed = parsed.tables != tables
    config = _resolve(parsed, [*warnings, ignored] if ignored else warnings)
    if not changed:
        return config
    return dataclasses.replace(config, of_files=lambda: _resolve(without_annotations, warnings))


def _resolve(parsed: ParsedConfig, warned: Sequence[str]) -> RuntimeConfig:
    warnings = [*warned]
    tables = parsed.tables
    if not tables["hypervisor.qemu"]:
        others = ", ".join(f"[{table}]" for table, _ in parsed.foreign if table.startswith("hypervisor."))
        raise InvalidArgumentError(
            f"{parsed.path}: found {others or 'no hypervisor'}, expected [hypervisor.qemu]"
        )
    # runtime-rs has these two in other places than Go's runtime, whose places win.
    for setting in ("enable_template", "template_path", "vm_cache_number", "vm_cache_endpoint"):
        if setting in tables["hypervisor.qemu.factory"]:
            tables["factory"].setdefault(setting, tables["hypervisor.qemu.factory"][setting])
    if "create_container_timeout" in tables["agent.kata"]:
        timeout = tables["agent.kata"]["create_container_timeout"]
        tables["runtime"].setdefault("create_container_timeout", timeout)

    hypervisor = _hypervisor(tables["hypervisor.qemu"], warnings)
    agent = _Fields("agent.kata", tables["agent.kata"])
    factory = _Fields("factory", tables["factory"])
    _warn_of_template(hypervisor, factory, tables["hypervisor.qemu"], warnings)
    runtime = _Fields("runtime", tables["runtime"])
    agent.convert("transport", AgentTransport)
    for field in ("dial_timeout_s", "launch_process_timeout_s"):
        agent.convert(field, float)
    agent.values.pop("create_container_timeout", None)
    for key in ("template_path", "vm_cache_endpoint"):
        factory.convert(key, Path)
    if runtime.values.get("internetworking_model") == "default":
        del runtime.values["internetworking_model"]
    if "create_container_timeout" in runtime.values:
        runtime.values["create_container_timeout_s"] = float(runtime.values.pop("create_container_timeout"))
    config = RuntimeConfig(
        path=parsed.path,
        drop_ins=parsed.drop_ins,
        warnings=tuple(warnings),
        hypervisor=hypervisor,
        agent=agent.build(AgentConfig),
        factory=factory.build(FactoryConfig),
        **runtime.values,
    )
    _check(config, tables)
    return config


class _Fields:
    """The fields of one dataclass, from a table's settings that are not zero."""

    def __init__(self, table: str, settings: dict[str, Setting]) -> None:
        schema = TABLES_BY_NAME[table]
        self.settings = settings
        self.values: dict[str, Any] = {}
        for key, setting in settings.items():
            if schema[key].field and setting.value:
                self.values[schema[key].field] = setting.value

    def convert(self, field: str, convert: Callable[[Any], Any]) -> None:
        if field in self.values:
            self.values[field] = convert(self.values[field])

    def build(self, config: Callable[..., ConfigT]) -> ConfigT:
        return config(**self.values)

    def refuse(self, key: str, expected: str) -> NoReturn:
        setting = self.settings[key]
        raise InvalidArgumentError(f"{setting.where}: found {as_toml(setting.value)}, expected {expected}")


def _hypervisor(settings: dict[str, Setting], warnings: list[str]) -> HypervisorConfig:
    fields = _Fields("hypervisor.qemu", settings)
    values = fields.values
    for field in ("enable_annotations", *(f"valid_{what}" for what in _ALLOW_LISTS)):
        values.pop(field, None)
    values.setdefault("kernel", DEFAULT_KERNEL)
    values.setdefault("virtio_fs_cache", DEFAULT_VIRTIO_FS_CACHE)
    for field in (
        "path", "kernel", "initrd", "image", "firmware", "virtio_fs_daemon", "guest_memory_dump_path",
    ):  # fmt: skip
        fields.convert(field, Path)
    fields.convert("shared_fs", SharedFS)
    # runtime-rs's name.
    fields.convert("block_device_driver", lambda name: BlockDeviceDriver(name.removesuffix("-pci")))
    # Kata's older name.
    fields.convert("virtio_fs_cache", lambda mode: "never" if mode == "none" else mode)
    fields.convert("default_bridges", lambda n: min(n, MAX_BRIDGES))
    for field in ("pcie_root_port", "pcie_switch_port"):
        fields.convert(field, lambda n: min(n, MAX_PCIE_PORTS))
    fields.convert("kernel_params", lambda text: " ".join(text.split()))
    fields.convert("cpu_features", _comma_separated)
    _resolve_accelerators(fields)
    _resolve_cpus(fields)
    _resolve_memory(fields, warnings)
    _check_guest(fields)
    return fields.build(HypervisorConfig)


def _comma_separated(text: str) -> str:
    return ",".join(word.strip() for word in text.split(",") if word.strip())


def _resolve_accelerators(fields: _Fields) -> None:
    """Kata hands `machine_accelerators` on to QEMU's -machine: an `accel=` in it chooses the accelerator."""
    words = _comma_separated(fields.values.pop("machine_accelerators", "")).split(",")
    for word in words:
        if word.startswith("accel="):
            try:
                fields.values["accel"] = Accel(word.removeprefix("accel="))
            except ValueError:
                fields.refuse("machine_accelerators", "accel=kvm or accel=tcg, where there is an accel=")
    if others := [word for word in words if word and not word.startswith("accel=")]:
        fields.values["machine_accelerators"] = ",".join(others)


def _resolve_cpus(fields: _Fields) -> None:
    """Kata's rules: below 0 or above the host's is the host's; 0 is 1 of them, or all for the maximum."""
    host = min(os.cpu_count() or 1, MAX_VCPUS)
    maximum = min(fields.values.get("default_maxvcpus", host), host)
    # A part of a CPU is a weight of the cgroup; the machine gets whole ones.
    wanted = fields.values.get("default_vcpus", 1)
    vcpus = math.ceil(wanted) if 0 <= wanted <= host else host
    if vcpus > maximum:
        fields.refuse("default_maxvcpus", f"at least default_vcpus, which comes to {vcpus}")
    fields.values["default_vcpus"], fields.values["default_maxvcpus"] = vcpus, maximum


def _resolve_memory(fields: _Fields, warnings: list[str]) -> None:
    values = fields.values
    default = HypervisorConfig.default_memory_mib
    memory = values.setdefault("default_memory_mib", default)
    if memory < MIN_MEMORY_MIB:
        where = fields.settings["default_memory"].where
        warnings.append(
            f"{where}: found {memory}, below {MIN_MEMORY_MIB} MiB; {default} is taken, as in Kata"
        )
        memory = values["default_memory_mib"] = default
    host = host_memory_mib()
    values["default_maxmemory_mib"] = maximum = min(values.get("default_maxmemory_mib", host), host)
    if memory <= maximum:
        return
    for key, expected in (
        ("default_memory", f"at most default_maxmemory, which comes to {maximum}"),
        ("default_maxmemory", f"at least default_memory, which is {memory}"),
    ):
        if key in fields.settings and fields.settings[key].value:
            fields.refuse(key, expected)
    values["default_memory_mib"] = maximum


def host_memory_mib() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20


def _check_guest(fields: _Fields) -> None:
    initrd: Path | None = fields.values.get("initrd")
    if initrd and "image" in fields.values:
        fields.refuse("initrd", f"initrd or image, not both; image is {fields.values['image']}")
    if initrd:
        try:
            size_mib = initrd.stat().st_size >> 20
        except OSError:
            return
        memory = fields.values["default_memory_mib"]
        if size_mib >= memory:
            fields.refuse(
                "initrd", f"a file smaller than default_memory ({memory} MiB); it has {size_mib} MiB"
            )


def _warn_of_template(
    hypervisor: HypervisorConfig, factory: _Fields, settings: dict[str, Setting], warnings: list[str]
) -> None:
    if not factory.values.get("enable_template"):
        return
    warnings.extend(
        f"{settings[key].where}: found true, which has no effect on a template and its clones "
        "(enable_template in [factory])"
        for key in ("enable_hugepages", "enable_mem_prealloc")
        if getattr(hypervisor, key)
    )


def _check(config: RuntimeConfig, tables: dict[str, dict[str, Setting]]) -> None:
    """What makes sense only together; after Kata's `checkConfig`."""
    hypervisor = config.hypervisor

    def refuse(table: str, key: str, expected: str) -> NoReturn:
        _Fields(table, tables[table]).refuse(key, expected)

    if hypervisor.initrd is None and hypervisor.image is None:
        raise InvalidArgumentError(
            f"{config.path}: [hypervisor.qemu]: found neither initrd nor image, expected one of them"
        )
    if config.factory.enable_template and (hypervisor.initrd is None or hypervisor.image is not None):
        refuse("factory", "enable_template", "initrd= to be set (image= is not supported) for a template")
    endpoint = os.fsencode(config.factory.vm_cache_endpoint)
    if config.factory.vm_cache_number and len(endpoint) > MAX_SOCKET_PATH_BYTES:
        refuse(
            "factory", "vm_cache_endpoint", f"a path of at most {MAX_SOCKET_PATH_BYTES} bytes, for a socket"
        )
    if config.disable_new_netns and config.internetworking_model != "none":
        expected = f'internetworking_model = "none" with it, which is "{config.internetworking_model}"'
        refuse("runtime", "disable_new_netns", expected)
    _check_vfio(tables["hypervisor.qemu"])
    _check_bind_mounts(config, tables["runtime"])


def _check_vfio(settings: dict[str, Setting]) -> None:
    hot, cold = settings.get("hot_plug_vfio"), settings.get("cold_plug_vfio")
    if hot and cold and hot.value not in ("", "no-port") and cold.value not in ("", "no-port"):
        raise InvalidArgumentError(
            f'{hot.where}: found "{hot.value}", expected "no-port" while cold_plug_vfio is "{cold.value}"'
        )


def _check_bind_mounts(config: RuntimeConfig, settings: dict[str, Setting]) -> None:
    names: dict[str, str] = {}
    if config.sandbox_bind_mounts and config.hypervisor.shared_fs is SharedFS.NONE:
        _Fields("runtime", settings).refuse("sandbox_bind_mounts", '[] with shared_fs = "none"')
    for mount in config.sandbox_bind_mounts:
        where = settings["sandbox_bind_mounts"].where
        path = Path(mount)
        if not path.exists():
            raise InvalidArgumentError(f"{where}: found {mount}, expected a path that exists")
        name = path.resolve().name
        if name in names:
            raise InvalidArgumentError(
                f"{where}: found {names[name]} and {mount}, expected different last names"
            )
        names[name] = mount
