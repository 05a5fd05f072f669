from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from virtcontainers.config import Accel, AgentConfig, AgentTransport, HypervisorConfig, SharedFS
from virtcontainers.hypervisor.qemu_cmdline import (
    BridgeSlot,
    Fd,
    MachineFiles,
    Option,
    QemuCommandLine,
    plan,
)

CONFIG = HypervisorConfig(
    kernel=Path("/k/vmlinux"),
    initrd=Path("/k/initrd.img"),
    default_memory_mib=256,
    default_maxvcpus=4,
    shared_fs=SharedFS.VIRTIO_9P,
)
AGENT = AgentConfig()
FDS = {"qmp": 10, "agent": 11, "vhost": 12, "vsock": 13}
DIRECTORY = Path("/run/vc/vm/pod")


def planned(
    config: HypervisorConfig = CONFIG,
    agent: AgentConfig = AGENT,
    *,
    accel: Accel = Accel.TCG,
    transport: AgentTransport = AgentTransport.SERIAL,
    shared_path: Path | None = Path("/shared"),
    **changes: Any,
) -> QemuCommandLine:
    return plan(
        replace(config, **changes),
        agent,
        MachineFiles(directory=DIRECTORY),
        name="sandbox-pod",
        accel=accel,
        transport=transport,
        guest_cid=77 if transport is AgentTransport.VSOCK else None,
        shared_path=shared_path,
        host_memory_mib=8192,
    )


def values(command_line: QemuCommandLine, flag: str) -> list[str]:
    """What follows each `flag`."""
    argv = command_line.argv(FDS)
    return [argv[n + 1] for n, word in enumerate(argv) if word == flag]


def value(command_line: QemuCommandLine, flag: str) -> str:
    (found,) = values(command_line, flag)
    return found


def kernel_params(command_line: QemuCommandLine) -> list[str]:
    return value(command_line, "-append").split()


def test_the_whole_command_line() -> None:
    assert planned().argv(FDS) == [
        "/usr/bin/qemu-system-x86_64",
        *("-name", "sandbox-pod,debug-threads=on"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-sandbox", "on,obsolete=deny,spawn=deny,resourcecontrol=deny"),
        *("-pidfile", "/run/vc/vm/pod/pid"),
        *("-machine", "q35,usb=off,sata=off,smbus=off,vmport=off,hpet=off"),
        *("-accel", "tcg,thread=multi,tb-size=128"),
        *("-cpu", "max"),
        *("-smp", "1,maxcpus=4,sockets=4,cores=1,threads=1"),
        *("-m", "256M,slots=10,maxmem=8192M"),
        *("-object", "rng-random,id=rng0,filename=/dev/urandom"),
        *("-chardev", "socket,id=qmp,fd=10,server=on,wait=off"),
        *("-chardev", "stdio,id=console,signal=off"),
        *("-chardev", "socket,id=agent,fd=11,server=on,wait=off"),
        *("-mon", "qmp,mode=control"),
        *("-fsdev", "local,id=share,path=/shared,security_model=none,multidevs=remap"),
        *(
            "-device",
            "pci-bridge,id=pci-bridge-0,bus=pcie.0,chassis_nr=1,addr=0x2,shpc=off,io-reserve=4k,mem-reserve=1M,"
            "pref64-reserve=1M",
        ),
        *("-device", "isa-serial,chardev=console"),
        *("-device", "virtio-rng-pci,rng=rng0,disable-legacy=on"),
        *("-device", "virtio-serial-pci,id=serial0,disable-legacy=on"),
        *("-device", "virtserialport,chardev=agent,bus=serial0.0,name=agent.channel.0"),
        *("-device", "virtio-9p-pci,fsdev=share,mount_tag=kataShared,disable-legacy=on"),
        *("-device", "pcie-root-port,id=rp0,chassis=1"),
        *("-device", "pcie-root-port,id=rp1,chassis=2"),
        *("-device", "pcie-root-port,id=rp2,chassis=3"),
        *("-device", "pcie-root-port,id=rp3,chassis=4"),
        *("-kernel", "/k/vmlinux"),
        *("-initrd", "/k/initrd.img"),
        "-append",
        "tsc=reliable no_timer_check rcupdate.rcu_expedited=1 i8042.direct=1 i8042.dumbkbd=1 i8042.nopnp=1 "
        "i8042.noaux=1 noreplace-smp reboot=t panic=1 cryptomgr.notests net.ifnames=0 pci=lastbus=0 "
        "console=ttyS0 8250.nr_uarts=1 swiotlb=noforce quiet agent.launch_process_timeout=6 "
        "agent.transport=serial",
    ]


def test_a_comma_in_a_path_stays_in_it() -> None:
    assert "path=/a,,b,security_model" in value(planned(shared_path=Path("/a,b")), "-fsdev")
    assert Option("x", {"y": Fd("qmp"), "z": False}).render(FDS) == "x,y=10,z=off"


def test_kvm_takes_the_hosts_cpu() -> None:
    command_line = planned(accel=Accel.KVM, cpu_features="pmu=off")
    assert value(command_line, "-accel") == "kvm"
    assert value(command_line, "-cpu") == "host,pmu=off"


def test_an_emulated_guest_is_told_how_fast_its_time_stamp_counter_runs() -> None:
    """But the user's word is the last, and a clone remembers."""
    command_line = planned(kernel_params="tsc_early_khz=1")
    assert command_line.calibrates_tsc
    argv = command_line.argv(FDS, tsc_khz=2599998)
    told, *_, last = argv[argv.index("-append") + 1].split()
    assert (told, last) == ("tsc_early_khz=2599998", "tsc_early_khz=1")
    assert not planned(accel=Accel.KVM).calibrates_tsc
    clone = {"memory_path": Path("/m"), "devices_state_path": Path("/s"), "boot_from_template": True}
    assert not planned(**clone).calibrates_tsc


@pytest.mark.parametrize(("model", "shown"), [("", "max"), ("host", "max"), ("EPYC", "EPYC")])
def test_an_emulated_cpu_is_never_the_hosts(model: str, shown: str) -> None:
    assert value(planned(cpu_model=model), "-cpu") == shown


def test_machine_accelerators_are_appended() -> None:
    assert value(planned(machine_accelerators="nvdimm=off,smm=off"), "-machine").startswith(
        "q35,nvdimm=off,smm=off,usb=off"
    )


def test_more_vcpus_than_the_maximum_raise_it() -> None:
    assert value(planned(default_vcpus=8), "-smp") == "8,maxcpus=8,sockets=8,cores=1,threads=1"


@pytest.mark.parametrize(
    ("changes", "memory"),
    [
        ({"default_maxmemory_mib": 1024}, "256M,slots=10,maxmem=1024M"),
        ({"memory_offset_mib": 64}, "256M,slots=10,maxmem=8256M"),
        ({"memory_slots": 0}, "256M"),
        ({"default_memory_mib": 8192}, "8192M"),
    ],
)
def test_room_for_memory_to_be_plugged(changes: dict[str, Any], memory: str) -> None:
    assert value(planned(**changes), "-m") == memory


def memory_backend(command_line: QemuCommandLine) -> str | None:
    backends = [option for option in values(command_line, "-object") if option.startswith("memory-backend")]
    assert len(backends) <= 1
    named = "memory-backend=dimm1" in value(command_line, "-machine")
    assert named == bool(backends)
    return backends[0] if backends else None


def test_memory_is_shared_only_when_a_vhost_user_device_needs_it() -> None:
    shared = "memory-backend-memfd,id=dimm1,size=256M,share=on"
    assert memory_backend(planned()) is None
    assert memory_backend(planned(shared_fs=SharedFS.VIRTIO_FS)) == shared
    assert memory_backend(planned(transport=AgentTransport.HVSOCK)) == shared
    assert memory_backend(planned(shared_fs=SharedFS.VIRTIO_FS, shared_path=None)) is None


def test_hugepages_and_preallocation() -> None:
    assert memory_backend(planned(enable_hugepages=True)) == (
        "memory-backend-memfd,id=dimm1,size=256M,share=on,hugetlb=on"
    )
    assert (
        memory_backend(planned(enable_mem_prealloc=True))
        == "memory-backend-ram,id=dimm1,size=256M,prealloc=on"
    )


def test_a_template_writes_its_memory_file_and_a_clone_does_not() -> None:
    files = {"memory_path": Path("/t/memory"), "devices_state_path": Path("/t/state")}
    template = planned(boot_to_be_template=True, **files)
    assert memory_backend(template) == "memory-backend-file,id=dimm1,size=256M,mem-path=/t/memory,share=on"
    assert "-incoming" not in template.argv(FDS)
    clone = planned(boot_from_template=True, **files)
    assert memory_backend(clone) == "memory-backend-file,id=dimm1,size=256M,mem-path=/t/memory,share=off"
    assert value(clone, "-incoming") == "defer"


def test_template_and_clone_have_the_same_devices() -> None:
    files = {"memory_path": Path("/t/memory"), "devices_state_path": Path("/t/state")}
    template = planned(boot_to_be_template=True, **files)
    assert template.devices == planned(boot_from_template=True, **files).devices


def test_virtio_fs() -> None:
    command_line = planned(shared_fs=SharedFS.VIRTIO_FS)
    assert "socket,id=fs,path=/run/vc/vm/pod/virtiofsd.sock" in values(command_line, "-chardev")
    assert "vhost-user-fs-pci,chardev=fs,tag=kataShared,queue-size=1024" in values(command_line, "-device")
    assert values(command_line, "-fsdev") == []


@pytest.mark.parametrize(
    "command_line", [planned(shared_path=None), planned(shared_fs=SharedFS.NONE)], ids=["no path", "none"]
)
def test_nothing_is_shared(command_line: QemuCommandLine) -> None:
    assert "kataShared" not in " ".join(command_line.argv(FDS))


def test_vsock_gives_qemu_the_device_and_its_context_id() -> None:
    command_line = planned(transport=AgentTransport.VSOCK)
    assert "vhost-vsock-pci,id=vsock0,vhostfd=12,guest-cid=77,disable-legacy=on" in values(
        command_line, "-device"
    )
    assert "virtio-serial" not in " ".join(command_line.argv(FDS))
    assert "agent.transport=vsock" in kernel_params(command_line)


def test_hvsock_is_vsock_to_the_guest() -> None:
    command_line = planned(transport=AgentTransport.HVSOCK)
    assert "socket,id=vsock,fd=13" in values(command_line, "-chardev")
    assert "vhost-user-vsock-pci,id=vsock0,chardev=vsock,disable-legacy=on" in values(command_line, "-device")
    assert "agent.transport=vsock" in kernel_params(command_line)


def test_an_image_is_the_root_on_a_read_only_nvdimm(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(3 << 20))
    command_line = planned(initrd=None, image=image)
    assert "nvdimm=on" in value(command_line, "-machine")
    assert f"memory-backend-file,id=mem0,mem-path={image},size={3 << 20},share=on,readonly=on" in values(
        command_line, "-object"
    )
    assert "nvdimm,id=nv0,memdev=mem0,unarmed=on" in values(command_line, "-device")
    assert value(command_line, "-m") == "256M,slots=10,maxmem=8195M"
    params = value(command_line, "-append")
    assert "root=/dev/pmem0p1 rootflags=dax,data=ordered,errors=remount-ro ro rootfstype=ext4" in params
    assert "systemd.unit=kata-containers.target" in params
    assert values(command_line, "-initrd") == []


def test_debugging_shows_in_guest_and_qemu() -> None:
    command_line = planned(
        agent=AgentConfig(enable_debug=True, enable_tracing=True, debug_console_enabled=True),
        enable_debug=True,
        extra_monitor_socket="hmp",
    )
    params = kernel_params(command_line)
    assert "quiet" not in params
    assert {"debug", "agent.log=debug", "agent.trace=true", "agent.debug_console"} < set(params)
    assert value(command_line, "-d") == "guest_errors,unimp"
    assert "extra,mode=readline" in values(command_line, "-mon")


@pytest.mark.parametrize(
    ("kind", "monitor"), [("qmp", "mode=control,pretty=off"), ("qmp-pretty", "mode=control,pretty=on")]
)
def test_the_extra_monitor_is_for_debugging_only(kind: str, monitor: str) -> None:
    assert f"extra,{monitor}" in values(planned(enable_debug=True, extra_monitor_socket=kind), "-mon")
    assert values(planned(extra_monitor_socket=kind), "-mon") == ["qmp,mode=control"]


def test_a_kernel_that_is_emulated_boots_on_one_vcpu_of_several() -> None:
    assert "maxcpus=1" in kernel_params(planned(default_vcpus=2))
    assert "maxcpus=1" not in kernel_params(planned(default_vcpus=1))
    assert "maxcpus=1" not in kernel_params(planned(default_vcpus=2, accel=Accel.KVM))


def test_the_users_kernel_parameters_come_last() -> None:
    assert kernel_params(planned(kernel_params="quiet=no  console=hvc0"))[-2:] == ["quiet=no", "console=hvc0"]


def test_seccomp_can_be_switched_off_and_firmware_given() -> None:
    command_line = planned(seccompsandbox="", firmware=Path("/f"))
    assert values(command_line, "-sandbox") == []
    assert value(command_line, "-bios") == "/f"


def test_root_ports_beside_those_that_are_always_there() -> None:
    ports = [d for d in planned(pcie_root_port=2).devices if d.first == "pcie-root-port"]
    assert len(ports) == 6
    assert len({d.properties["chassis"] for d in ports}) == 6


def test_the_agent_finds_a_bridges_slot_by_its_pci_path() -> None:
    bridges = [d for d in planned(default_bridges=2).devices if d.first == "pci-bridge"]
    slot = BridgeSlot(bridge=1, slot=30)
    assert slot.place == {"bus": bridges[1].properties["id"], "addr": "0x1e"}
    assert slot.pci_path == f"{int(str(bridges[1].properties['addr']), 16):02x}/1e" == "03/1e"
