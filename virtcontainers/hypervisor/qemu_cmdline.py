"""QEMU's command line: what the machine is, as data first, rendered last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from virtcontainers.config import (
    MOUNT_GUEST_TAG,
    Accel,
    AgentConfig,
    AgentTransport,
    HypervisorConfig,
    SharedFS,
)

AGENT_CHANNEL = "agent.channel.0"
"""The guest finds its agent's port by this name, as in Kata."""

HOTPLUG_PORTS = 4
"""Empty pcie-root-ports beside those the configuration asks for; one costs 20 ms of an emulated boot."""

BRIDGE_SLOTS = range(1, 31)
"""Of a PCI bridge, as in Kata."""

_FIRST_BRIDGE = 2
"""The first bridge's slot on the root bus, as in Kata."""

_NVDIMM_ROOT = "/dev/pmem0p1"
_TCG_TB_SIZE_MIB = 128


@dataclass(frozen=True)
class Fd:
    """A file descriptor that has its number only when QEMU is started."""

    name: str


@dataclass(frozen=True)
class FdPath:
    """The path of a file that QEMU inherits open."""

    name: str


@dataclass(frozen=True)
class BridgeSlot:
    """A slot of one of the machine's PCI bridges (`default_bridges`), for a device to be plugged in."""

    bridge: int
    slot: int

    @property
    def place(self) -> dict[str, object]:
        """`device_add`'s arguments."""
        return {"bus": _bridge_id(self.bridge), "addr": f"{self.slot:#x}"}

    @property
    def pci_path(self) -> str:
        """As the agent wants it: the bridge's slot and the device's, in hexadecimal."""
        return f"{_FIRST_BRIDGE + self.bridge:02x}/{self.slot:02x}"


def _bridge_id(number: int) -> str:
    return f"pci-bridge-{number}"


Value = str | int | bool | Path | Fd | FdPath
Fds = Mapping[str, int]


@dataclass(frozen=True)
class Option:
    """`first,key=value,...` of one of QEMU's options."""

    first: str
    properties: Mapping[str, Value] = field(default_factory=dict)

    def render(self, fds: Fds) -> str:
        return ",".join(
            [self.first, *(f"{key}={_render(value, fds)}" for key, value in self.properties.items())]
        )


def _render(value: Value, fds: Fds) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, Fd):
        return str(fds[value.name])
    if isinstance(value, FdPath):
        return f"/proc/self/fd/{fds[value.name]}"
    # QEMU's only way to have a comma in a value.
    return str(value).replace(",", ",,")


@dataclass(frozen=True, kw_only=True)
class MachineFiles:
    """Where the machine's sockets are, in its directory."""

    directory: Path

    @property
    def qmp_socket(self) -> Path:
        return self.directory / "qmp.sock"

    @property
    def agent_socket(self) -> Path:
        """The chardev behind the agent's serial port, or vhost-device-vsock's side for us."""
        return self.directory / "agent.sock"

    @property
    def virtiofsd_socket(self) -> Path:
        return self.directory / "virtiofsd.sock"

    @property
    def vhost_vsock_socket(self) -> Path:
        """vhost-device-vsock's side for QEMU."""
        return self.directory / "vhost-vsock.sock"

    @property
    def extra_monitor_socket(self) -> Path:
        return self.directory / "extra-monitor.sock"

    @property
    def pid_file(self) -> Path:
        return self.directory / "pid"

    @property
    def console_log(self) -> Path:
        return self.directory / "console.log"


@dataclass(frozen=True, kw_only=True)
class QemuCommandLine:
    """One machine. `argv` gives QEMU's arguments; the order of `devices` decides their PCI slots."""

    path: Path
    name: str
    machine: Option
    accel: Option
    cpu: Option
    smp: Option
    memory: Option
    kernel: Path
    kernel_params: tuple[str, ...]
    initrd: Path | None = None
    firmware: Path | None = None
    objects: tuple[Option, ...] = ()
    chardevs: tuple[Option, ...] = ()
    monitors: tuple[Option, ...] = ()
    fsdevs: tuple[Option, ...] = ()
    devices: tuple[Option, ...] = ()
    sandbox: str = ""
    pid_file: Path
    boots_on_one_vcpu: bool = False
    """The guest's others are to be brought up by its agent."""
    calibrates_tsc: bool = False
    """The guest would find out the rate of its TSC by itself, and is to be told."""
    incoming: str = ""
    debug: bool = False

    def argv(self, fds: Fds, *, tsc_khz: int | None = None) -> list[str]:
        """`fds` has a number for every `Fd`. The list begins with QEMU itself.

        `tsc_khz` is what the guest is told; no part of the machine, for it is measured anew each time.
        """

        def each(flag: str, options: tuple[Option, ...]) -> list[str]:
            return [word for option in options for word in (flag, option.render(fds))]

        told = [f"tsc_early_khz={tsc_khz}"] if tsc_khz else []
        return [
            str(self.path),
            *("-name", f"{self.name},debug-threads=on"),
            "-nodefaults",
            "-no-user-config",
            *("-display", "none"),
            # A guest's reset, and so its panic, ends the machine instead of booting it anew.
            "-no-reboot",
            *(("-sandbox", self.sandbox) if self.sandbox else ()),
            *("-pidfile", str(self.pid_file)),
            *("-machine", self.machine.render(fds)),
            *("-accel", self.accel.render(fds)),
            *("-cpu", self.cpu.render(fds)),
            *("-smp", self.smp.render(fds)),
            *("-m", self.memory.render(fds)),
            *each("-object", self.objects),
            *each("-chardev", self.chardevs),
            *each("-mon", self.monitors),
            *each("-fsdev", self.fsdevs),
            *each("-device", self.devices),
            *(("-bios", str(self.firmware)) if self.firmware else ()),
            *("-kernel", str(self.kernel)),
            *(("-initrd", str(self.initrd)) if self.initrd else ()),
            *("-append", " ".join((*told, *self.kernel_params))),
            *(("-incoming", self.incoming) if self.incoming else ()),
            *(("-d", "guest_errors,unimp") if self.debug else ()),
        ]


def plan(
    config: HypervisorConfig,
    agent: AgentConfig,
    files: MachineFiles,
    *,
    name: str,
    accel: Accel,
    transport: AgentTransport,
    guest_cid: int | None,
    shared_path: Path | None,
    host_memory_mib: int,
    plugs_hvsock: bool = False,
) -> QemuCommandLine:
    """The command line for a configuration; `accel` and `transport` are decided, not AUTO.

    With `plugs_hvsock`, and in templates and clones, the device of HVSOCK is not in it, but for a port.
    Its `Fd`s are `qmp`, `agent` (SERIAL), `vhost` (VSOCK, with `guest_cid`), `vsock` (HVSOCK) and `memory`
    (`copies_memory`).
    Touches nothing.
    """
    assert config.kernel is not None
    is_template = config.boot_to_be_template or config.boot_from_template
    virtio_fs = shared_path is not None and config.shared_fs is SharedFS.VIRTIO_FS
    backend = _memory_backend(config, shared=shares_memory(config, transport, shared_path))

    machine: dict[str, Value] = {
        # Controllers that no guest of ours uses and every boot would pay for.
        "usb": False,
        "sata": False,
        "smbus": False,
        "vmport": False,
        "hpet": False,
    }
    objects: list[Option] = []
    chardevs: list[Option] = []
    monitors: list[Option] = []
    fsdevs: list[Option] = []
    devices: list[Option] = []

    # First, so that nothing else takes their slots. Windows of their own: SeaBIOS gives an empty bridge none.
    for number in range(config.default_bridges):
        bridge: dict[str, Value] = {"id": _bridge_id(number), "bus": "pcie.0", "chassis_nr": number + 1}
        reserved: dict[str, Value] = {"io-reserve": "4k", "mem-reserve": "1M", "pref64-reserve": "1M"}
        slot = f"{_FIRST_BRIDGE + number:#x}"
        devices.append(Option("pci-bridge", {**bridge, "addr": slot, "shpc": False, **reserved}))

    if backend is not None:
        objects.append(backend)
        machine["memory-backend"] = backend.properties["id"]
    if config.image is not None:
        machine["nvdimm"] = True
        size = config.image.stat().st_size
        image: dict[str, Value] = {"id": "mem0", "mem-path": config.image, "size": size, "share": True}
        objects.append(Option("memory-backend-file", {**image, "readonly": True}))
        # Unarmed: the guest is told that it may not write, and does not try.
        devices.append(Option("nvdimm", {"id": "nv0", "memdev": "mem0", "unarmed": True}))

    chardevs.append(Option("socket", {"id": "qmp", "fd": Fd("qmp"), "server": True, "wait": False}))
    monitors.append(Option("qmp", {"mode": "control"}))
    if config.extra_monitor_socket and config.enable_debug:
        path = files.extra_monitor_socket
        chardevs.append(Option("socket", {"id": "extra", "path": path, "server": True, "wait": False}))
        monitors.append(_extra_monitor(config.extra_monitor_socket))

    # The legacy port and not virtio's: Debian's kernel has it built in and so tells why a boot failed. It
    # costs at most 0.05 s of an emulated boot's 2.6. stdio is a pipe of ours, see ConsoleLog.
    chardevs.append(Option("stdio", {"id": "console", "signal": False}))
    devices.append(Option("isa-serial", {"chardev": "console"}))

    objects.append(Option("rng-random", {"id": "rng0", "filename": config.entropy_source}))
    devices.append(_virtio("virtio-rng-pci", {"rng": "rng0"}))
    if config.boot_to_be_template or config.boot_from_template:
        # Tells the guest's kernel that it is a clone, whose random numbers must be its own.
        devices.append(Option("vmgenid", {"guid": "auto"}))

    match transport:
        case AgentTransport.VSOCK:
            assert guest_cid is not None
            devices.append(
                _virtio("vhost-vsock-pci", {"id": "vsock0", "vhostfd": Fd("vhost"), "guest-cid": guest_cid})
            )
        case AgentTransport.HVSOCK if is_template or plugs_hvsock:
            pass  # as virtio-fs: plugged in
        case AgentTransport.HVSOCK:
            chardevs.append(Option("socket", {"id": "vsock", "fd": Fd("vsock")}))
            devices.append(_virtio("vhost-user-vsock-pci", {"id": "vsock0", "chardev": "vsock"}))
        case _:
            chardevs.append(
                Option("socket", {"id": "agent", "fd": Fd("agent"), "server": True, "wait": False})
            )
            devices.append(_virtio("virtio-serial-pci", {"id": "serial0"}))
            devices.append(
                Option("virtserialport", {"chardev": "agent", "bus": "serial0.0", "name": AGENT_CHANNEL})
            )

    if virtio_fs and not is_template:
        chardevs.append(Option("socket", {"id": "fs", "path": files.virtiofsd_socket}))
        devices.append(Option("vhost-user-fs-pci", virtio_fs_device(config, "fs")))
    elif shared_path is not None and config.shared_fs is SharedFS.VIRTIO_9P:
        share: dict[str, Value] = {"id": "share", "path": shared_path, "security_model": "none"}
        # Several file systems are mounted below the path: their inode numbers must not meet.
        fsdevs.append(Option("local", {**share, "multidevs": "remap"}))
        devices.append(_virtio("virtio-9p-pci", {"fsdev": "share", "mount_tag": MOUNT_GUEST_TAG}))

    devices.extend(
        Option("pcie-root-port", {"id": f"rp{number}", "chassis": number + 1})
        for number in range(HOTPLUG_PORTS + config.pcie_root_port)
    )

    return QemuCommandLine(
        path=config.path,
        name=name,
        machine=Option(_with_raw(config.machine_type, config.machine_accelerators), machine),
        accel=_accel(accel),
        cpu=Option(_with_raw(_cpu_model(config.cpu_model, accel), config.cpu_features)),
        smp=_smp(config),
        memory=_memory(config, host_memory_mib),
        kernel=config.kernel,
        kernel_params=_kernel_params(config, agent, transport, accel),
        boots_on_one_vcpu=_boots_on_one_vcpu(config, accel),
        calibrates_tsc=_calibrates_tsc(config, accel),
        initrd=config.initrd,
        firmware=config.firmware,
        objects=tuple(objects),
        chardevs=tuple(chardevs),
        monitors=tuple(monitors),
        fsdevs=tuple(fsdevs),
        devices=tuple(devices),
        sandbox=config.seccompsandbox,
        pid_file=files.pid_file,
        incoming="defer" if config.boot_from_template else "",
        debug=config.enable_debug,
    )


def virtio_fs_device(config: HypervisorConfig, chardev: str) -> dict[str, Value]:
    """The properties of vhost-user-fs-pci. It cannot be saved, so clones get it by hotplug."""
    properties: dict[str, Value] = {"chardev": chardev, "tag": MOUNT_GUEST_TAG}
    properties["queue-size"] = config.virtio_fs_queue_size
    if config.virtio_fs_cache_size_mib:
        properties["cache-size"] = config.virtio_fs_cache_size_mib << 20
    return properties


def shares_memory(config: HypervisorConfig, transport: AgentTransport, shared_path: Path | None) -> bool:
    """Whether a vhost-user daemon maps the guest's memory."""
    virtio_fs = shared_path is not None and config.shared_fs is SharedFS.VIRTIO_FS
    return virtio_fs or transport is AgentTransport.HVSOCK


def copies_memory(config: HypervisorConfig, transport: AgentTransport, shared_path: Path | None) -> bool:
    """Whether a clone has a copy of the template's memory, `Fd("memory")`, instead of a private mapping.

    A vhost-user daemon would see the template's pages where the guest has written its own.
    """
    return config.boot_from_template and shares_memory(config, transport, shared_path)


def _virtio(driver: str, properties: Mapping[str, Value]) -> Option:
    # On the root bus they would have a legacy half as well, for guests of before virtio 1.0.
    return Option(driver, {**properties, "disable-legacy": True})


def _with_raw(first: str, raw: str) -> str:
    return f"{first},{raw}" if raw else first


def _accel(accel: Accel) -> Option:
    if accel is Accel.KVM:
        return Option("kvm")
    # QEMU's own bound for translated code is an eighth of the host's memory, up to 1 GiB a machine.
    return Option("tcg", {"thread": "multi", "tb-size": _TCG_TB_SIZE_MIB})


def _cpu_model(model: str, accel: Accel) -> str:
    if accel is Accel.KVM:
        return model or "host"
    return "max" if model in ("", "host") else model


def _smp(config: HypervisorConfig) -> Option:
    # A socket a vCPU, as in Kata: each can be hot-plugged alone.
    most = max(config.default_vcpus, config.default_maxvcpus)
    return Option(str(config.default_vcpus), {"maxcpus": most, "sockets": most, "cores": 1, "threads": 1})


def _memory(config: HypervisorConfig, host_memory_mib: int) -> Option:
    most = (config.default_maxmemory_mib or host_memory_mib) + config.memory_offset_mib
    if config.image is not None:
        # The image takes a slot, and its size of the room for hot-plugging.
        most += -(-config.image.stat().st_size // (1 << 20))
    can_grow = config.memory_slots > 0 or config.enable_virtio_mem
    if not can_grow or most <= config.default_memory_mib:
        return Option(f"{config.default_memory_mib}M")
    return Option(f"{config.default_memory_mib}M", {"slots": config.memory_slots, "maxmem": f"{most}M"})


def _memory_backend(config: HypervisorConfig, *, shared: bool) -> Option | None:
    """None: QEMU's own anonymous memory, which is private and so the cheapest."""
    common: dict[str, Value] = {"id": "dimm1", "size": f"{config.default_memory_mib}M"}
    if config.enable_mem_prealloc:
        common["prealloc"] = True
    if config.boot_to_be_template or config.boot_from_template:
        assert config.memory_path is not None
        if shared and config.boot_from_template:
            return Option("memory-backend-file", {**common, "mem-path": FdPath("memory"), "share": True})
        # The template writes the file; a clone maps it copy-on-write.
        share = config.boot_to_be_template
        return Option("memory-backend-file", {**common, "mem-path": config.memory_path, "share": share})
    if config.enable_hugepages:
        return Option("memory-backend-memfd", {**common, "share": True, "hugetlb": True})
    if shared:
        # A vhost-user daemon maps the guest's memory by descriptor.
        return Option("memory-backend-memfd", {**common, "share": True})
    if config.enable_mem_prealloc:
        return Option("memory-backend-ram", common)
    return None


def _extra_monitor(kind: str) -> Option:
    if kind == "hmp":
        return Option("extra", {"mode": "readline"})
    return Option("extra", {"mode": "control", "pretty": kind == "qmp-pretty"})


def _boots_on_one_vcpu(config: HypervisorConfig, accel: Accel) -> bool:
    # QEMU 7.2 can keep its translation of code that another vCPU has just overwritten, and Linux patches
    # itself all through its boot: about one boot in 500 on a busy host spun for ever on a breakpoint that was
    # no longer there. `VM.start` has the other vCPUs brought up when the agent has answered.
    return accel is Accel.TCG and config.default_vcpus > 1


def _calibrates_tsc(config: HypervisorConfig, accel: Accel) -> bool:
    # Linux counts a TSC's ticks during 10 ms of another clock, and an emulated vCPU may not be run in just
    # these: at load 20 one boot in 460 took 2.6 GHz for 85, and Linux's loop, run alone, once in 4000 for
    # 0.36. It does not believe a later, better count that differs by over 1 %. So the guest's clock almost
    # stands still, or runs seven times too fast, for good, and with it those of all clones. KVM has a clock
    # of its own.
    return accel is Accel.TCG and not config.boot_from_template


def _kernel_params(
    config: HypervisorConfig, agent: AgentConfig, transport: AgentTransport, accel: Accel
) -> tuple[str, ...]:
    """Kata's for this machine, the agent's, and the user's last: the last of a name wins."""
    params = [
        "tsc=reliable",
        "no_timer_check",
        "rcupdate.rcu_expedited=1",
        "i8042.direct=1",
        "i8042.dumbkbd=1",
        "i8042.nopnp=1",
        "i8042.noaux=1",
        "noreplace-smp",
        # A triple fault, which needs no keyboard controller; with -no-reboot a panic then ends QEMU.
        "reboot=t",
        "panic=1",
        "cryptomgr.notests",
        "net.ifnames=0",
        "pci=lastbus=0",
        "console=ttyS0",
        "8250.nr_uarts=1",
        # Room for hot-plugged memory above 4 GiB makes Linux set 64 MiB aside for devices that cannot reach
        # it. All of ours can, and it would be a quarter of a small guest.
        "swiotlb=noforce",
    ]
    if _boots_on_one_vcpu(config, accel):
        params += ["maxcpus=1"]
    if config.image is not None:
        params += [
            f"root={_NVDIMM_ROOT}",
            *_root_flags(config.rootfs_type),
            f"rootfstype={config.rootfs_type}",
        ]
    params += ["debug"] if config.enable_debug else ["quiet"]
    if config.image is not None:
        if config.enable_debug:
            params += ["systemd.show_status=true", "systemd.log_level=debug"]
        else:
            params += ["systemd.show_status=false"]
        # What Kata's images start the agent with.
        params += ["systemd.unit=kata-containers.target", "systemd.mask=systemd-networkd.service"]
        params += ["systemd.mask=systemd-networkd.socket"]
    if agent.enable_debug:
        params += ["agent.log=debug"]
    if agent.enable_tracing:
        params += ["agent.trace=true"]
    if agent.debug_console_enabled:
        params += ["agent.debug_console", "agent.debug_console_vport=1026"]
    if agent.launch_process_timeout_s > 0:
        params += [f"agent.launch_process_timeout={agent.launch_process_timeout_s:.0f}"]
    params += [f"agent.transport={'serial' if transport is AgentTransport.SERIAL else 'vsock'}"]
    return (*params, *config.kernel_params.split())


def _root_flags(rootfs_type: str) -> list[str]:
    flags = "dax" if rootfs_type in ("xfs", "erofs") else "dax,data=ordered,errors=remount-ro"
    return [f"rootflags={flags}", "ro"]
