from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from katautils.config import RuntimeConfig, find_configuration, load_configuration
from katautils.config.load import host_memory_mib
from katautils.config.schema import TABLES_BY_NAME, Kind
from virtcontainers.config import Accel, AgentTransport, BlockDeviceDriver, SharedFS
from virtcontainers.errors import InvalidArgumentError, NotFoundError

Load = Callable[..., RuntimeConfig]

ALL_KEYS = [(table, key) for table, schema in TABLES_BY_NAME.items() for key in schema]


def _of_wrong_types(kind: Kind) -> list[str]:
    """The TOML of every type that the kind is not of."""
    values = {
        "true": True,
        '"text"': "text",
        "7": 7,
        "7.5": 7.5,
        '["text"]': ["text"],
        "[{}]": [{}],
        "{}": {},
    }
    wrong = []
    for toml, value in values.items():
        try:
            kind.accept(value)
        except ValueError:
            wrong.append(toml)
    return wrong


@pytest.mark.parametrize(("table", "key"), ALL_KEYS)
def test_a_wrong_type_is_refused_with_file_key_found_and_expected(
    table: str, key: str, tmp_path: Path
) -> None:
    kind = TABLES_BY_NAME[table][key].kind
    wrong = _of_wrong_types(kind)
    assert len(wrong) >= 3
    path = tmp_path / "configuration.toml"
    for toml in wrong:
        path.write_text(f"[{table}]\n{key} = {toml}\n")
        with pytest.raises(InvalidArgumentError) as refused:
            load_configuration(path)
        message = str(refused.value)
        assert message.startswith(f"{path}: [{table}] {key}: found ")
        assert message.endswith(f", expected {kind.expected}")


@pytest.mark.parametrize(
    ("table", "key", "value", "expected"),
    [
        ("hypervisor.qemu", "kernel", "vmlinuz", "an absolute path"),
        ("hypervisor.qemu", "shared_fs", "virtio-fs-nydus", '"virtio-fs", "virtio-9p", "none"'),
        ("hypervisor.qemu", "rootfs_type", "btrfs", '"ext4", "xfs", "erofs"'),
        ("hypervisor.qemu", "machine_type", "microvm", '"q35"'),
        ("hypervisor.qemu", "machine_accelerators", "accel=xen", "accel=kvm or accel=tcg"),
        ("hypervisor.qemu", "block_device_driver", "ide", '"virtio-scsi", "virtio-blk"'),
        ("hypervisor.qemu", "block_device_driver", "nvdimm", '"virtio-scsi", "virtio-blk"'),
        ("hypervisor.qemu", "block_device_driver", "virtio-blk-ccw", '"virtio-scsi", "virtio-blk"'),
        ("hypervisor.qemu", "vm_rootfs_driver", "ide", '"virtio-blk-pci"'),
        ("hypervisor.qemu", "block_device_aio", "posix", '"io_uring"'),
        ("hypervisor.qemu", "block_device_logical_sector_size", 1000, "power of two"),
        ("hypervisor.qemu", "virtio_fs_cache", "sometimes", '"never"'),
        ("hypervisor.qemu", "virtio_fs_daemon", "virtiofsd", "an absolute path"),
        ("hypervisor.qemu", "virtio_fs_extra_args", "--xattr", "a list of strings"),
        ("hypervisor.qemu", "virtio_fs_queue_size", 4, "a power of two from 8 to 1024"),
        ("hypervisor.qemu", "virtio_fs_queue_size", 1000, "a power of two from 8 to 1024"),
        ("hypervisor.qemu", "virtio_fs_queue_size", 2048, "a power of two from 8 to 1024"),
        ("hypervisor.qemu", "virtio_fs_cache_size", -1, "an integer from 0"),
        ("hypervisor.qemu", "msize_9p", 4095, "an integer from 4096 to"),
        ("hypervisor.qemu", "msize_9p", 1 << 31, "an integer from 4096 to"),
        ("hypervisor.qemu", "extra_monitor_socket", "telnet", '"hmp", "qmp", "qmp-pretty"'),
        ("hypervisor.qemu", "cold_plug_vfio", "any-port", '"no-port"'),
        ("hypervisor.qemu", "default_memory", -1, "an integer from 0 to 4294967295"),
        ("hypervisor.qemu", "default_memory", 1 << 32, "an integer from 0 to 4294967295"),
        ("hypervisor.qemu", "kernel_params", "a\0b", "a string"),
        ("agent.kata", "transport", "tcp", '"auto", "vsock", "hvsock", "serial"'),
        ("runtime", "internetworking_model", "bridged", '"tcfilter"'),
        ("runtime", "emptydir_mode", "block", '"shared-fs"'),
        ("runtime", "hypervisor_name", "clh", '"qemu"'),
        ("runtime", "disable_new_netns", True, 'internetworking_model = "none"'),
        ("runtime", "sandbox_bind_mounts", ["/does/not/exist"], "a path that exists"),
    ],
)
def test_an_impossible_value_is_refused(load: Load, table: str, key: str, value: Any, expected: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        load(**{table.replace(".", "__"): {key: value}})
    assert f"[{table}] {key}: found " in str(refused.value)
    assert expected in str(refused.value).partition("expected ")[2]


def test_what_kata_calls_a_default_is_one(load: Load, host_cpus: int) -> None:
    """A zero is as good as nothing, as it is in Go."""
    zeros = {
        "path": "", "machine_type": "", "shared_fs": "", "virtio_fs_cache": "", "msize_9p": 0,
        "virtio_fs_queue_size": 0, "memory_slots": 0, "default_bridges": 0, "entropy_source": "",
        "default_vcpus": 0, "default_maxvcpus": 0, "default_memory": 0, "default_maxmemory": 0,
    }  # fmt: skip
    config = load(hypervisor__qemu=zeros, agent__kata={"dial_timeout": 0}, factory={"template_path": ""})
    hypervisor = config.hypervisor
    assert hypervisor.path == Path("/usr/bin/qemu-system-x86_64")
    assert hypervisor.machine_type == "q35"
    assert hypervisor.shared_fs is SharedFS.VIRTIO_FS
    assert hypervisor.virtio_fs_cache == "never"
    assert hypervisor.virtio_fs_queue_size == 1024
    assert hypervisor.msize_9p == 8192
    assert hypervisor.memory_slots == 10
    assert hypervisor.default_bridges == 1
    assert hypervisor.entropy_source == "/dev/urandom"
    assert (hypervisor.default_vcpus, hypervisor.default_maxvcpus) == (1, 8)
    assert (hypervisor.default_memory_mib, hypervisor.default_maxmemory_mib) == (2048, host_memory_mib())
    assert config.agent.dial_timeout_s == 45
    assert config.factory.template_path == Path("/run/vc/vm/template")
    assert not config.warnings


def test_a_disk_on_pci_has_another_name_in_runtime_rs(load: Load) -> None:
    for name in ("virtio-blk", "virtio-blk-pci"):
        found = load(hypervisor__qemu={"block_device_driver": name}).hypervisor
        assert found.block_device_driver is BlockDeviceDriver.VIRTIO_BLK


def test_no_cache_has_an_older_name(load: Load) -> None:
    assert load(hypervisor__qemu={"virtio_fs_cache": "none"}).hypervisor.virtio_fs_cache == "never"


@pytest.mark.parametrize(
    ("vcpus", "maximum", "expected"),
    [
        (3, 0, (3, 8)),
        (-1, 0, (8, 8)),
        (99, 99, (8, 8)),
        (1.5, 2, (2, 2)),
        (0.2, 4, (1, 4)),
        (-0.5, 0, (8, 8)),
    ],
)
def test_vcpus_are_never_more_than_the_hosts(
    load: Load, host_cpus: int, vcpus: float, maximum: int, expected: tuple[int, int]
) -> None:
    found = load(hypervisor__qemu={"default_vcpus": vcpus, "default_maxvcpus": maximum}).hypervisor
    assert (found.default_vcpus, found.default_maxvcpus) == expected


def test_a_huge_host_gives_what_qemu_can_take(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 512)
    found = load(hypervisor__qemu={"default_vcpus": -1}).hypervisor
    assert (found.default_vcpus, found.default_maxvcpus) == (240, 240)


def test_more_vcpus_than_the_maximum_are_refused(load: Load, host_cpus: int) -> None:
    with pytest.raises(InvalidArgumentError, match=r"default_maxvcpus: found 2, expected at least .* 4"):
        load(hypervisor__qemu={"default_vcpus": 4, "default_maxvcpus": 2})


def test_memory_has_to_fit_into_the_maximum(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("katautils.config.load.host_memory_mib", lambda: 4096)
    found = load(hypervisor__qemu={"default_memory": 300, "default_maxmemory": 1 << 20}).hypervisor
    assert (found.default_memory_mib, found.default_maxmemory_mib) == (300, 4096)
    with pytest.raises(InvalidArgumentError, match=r"default_memory: found 8192, expected at most .* 4096"):
        load(hypervisor__qemu={"default_memory": 8192})
    with pytest.raises(
        InvalidArgumentError, match=r"default_maxmemory: found 512, expected at least .* 2048"
    ):
        load(hypervisor__qemu={"default_memory": 0, "default_maxmemory": 512})


def test_too_little_memory_is_replaced_with_a_warning(load: Load) -> None:
    config = load(hypervisor__qemu={"default_memory": 128})
    assert config.hypervisor.default_memory_mib == 2048
    assert len(config.warnings) == 1
    assert "[hypervisor.qemu] default_memory: found 128" in config.warnings[0]


def test_an_initrd_that_does_not_fit_into_the_memory_is_refused(load: Load, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd.img"
    with initrd.open("wb") as file:
        file.truncate(300 << 20)
    with pytest.raises(
        InvalidArgumentError, match=r"initrd: found .* default_memory \(256 MiB\); it has 300"
    ):
        load(hypervisor__qemu={"initrd": str(initrd)})


def test_the_guest_is_an_initrd_or_an_image(load: Load) -> None:
    with pytest.raises(InvalidArgumentError, match='initrd: found "/i", expected initrd or image, not both'):
        load(hypervisor__qemu={"image": "/image"})
    with pytest.raises(InvalidArgumentError, match="found neither initrd nor image"):
        load(hypervisor__qemu={"initrd": None})
    assert load(hypervisor__qemu={"initrd": "", "image": "/image"}).hypervisor.image == Path("/image")


def test_a_template_needs_an_initrd(load: Load) -> None:
    assert load(factory={"enable_template": True}).factory.enable_template
    with pytest.raises(InvalidArgumentError) as refused:
        load(hypervisor__qemu={"initrd": None, "image": "/image"}, factory={"enable_template": True})
    message = str(refused.value)
    assert "[factory] enable_template: found true" in message
    assert "initrd= to be set (image= is not supported)" in message


def test_values_reach_the_library(load: Load, tmp_path: Path, host_cpus: int) -> None:
    config = load(
        hypervisor__qemu={
            "path": "/qemu", "kernel_params": " a=1   b ", "machine_accelerators": "nosmm, accel=tcg,,nopit",
            "cpu_features": "pmu=off, vmx=off", "shared_fs": "virtio-9p", "virtio_fs_extra_args": ["-o", "x"],
            "default_bridges": 9, "pcie_root_port": 99, "memory_offset": 7, "enable_debug": True,
            "firmware": "/fw", "virtio_fs_cache": "auto", "virtio_fs_cache_size": 64, "default_memory": 512,
            "seccompsandbox": "on,spawn=deny", "extra_monitor_socket": "qmp",
        },
        agent__kata={
            "kernel_modules": ["e1000e X=1", "i915"], "transport": "serial", "dial_timeout": 7,
            "launch_process_timeout": 3, "debug_console_enabled": True,
        },
        factory={"vm_cache_endpoint": "/cache.sock", "template_path": "/t"},
        runtime={
            "enable_debug": True, "internetworking_model": "none", "disable_new_netns": True,
            "disable_guest_seccomp": True, "sandbox_bind_mounts": [str(tmp_path)],
            "create_container_timeout": 9, "static_sandbox_resource_mgmt": True,
        },
    )  # fmt: skip
    hypervisor = config.hypervisor
    assert hypervisor.path == Path("/qemu")
    assert hypervisor.kernel == Path("/k")
    assert hypervisor.initrd == Path("/i")
    assert hypervisor.kernel_params == "a=1 b"
    assert (hypervisor.machine_accelerators, hypervisor.accel) == ("nosmm,nopit", Accel.TCG)
    assert hypervisor.cpu_features == "pmu=off,vmx=off"
    assert hypervisor.shared_fs is SharedFS.VIRTIO_9P
    assert hypervisor.virtio_fs_extra_args == ("-o", "x")
    assert (hypervisor.default_bridges, hypervisor.pcie_root_port) == (5, 16)
    assert hypervisor.memory_offset_mib == 7
    assert hypervisor.enable_debug
    assert hypervisor.firmware == Path("/fw")
    assert (hypervisor.virtio_fs_cache, hypervisor.virtio_fs_cache_size_mib) == ("auto", 64)
    assert hypervisor.default_memory_mib == 512
    assert hypervisor.seccompsandbox == "on,spawn=deny"
    assert hypervisor.extra_monitor_socket == "qmp"
    assert config.agent.kernel_modules == ("e1000e X=1", "i915")
    assert config.agent.transport is AgentTransport.SERIAL
    assert (config.agent.dial_timeout_s, config.agent.launch_process_timeout_s) == (7.0, 3.0)
    assert config.agent.debug_console_enabled
    assert config.factory.vm_cache_endpoint == Path("/cache.sock")
    assert config.factory.template_path == Path("/t")
    assert config.enable_debug
    assert config.internetworking_model == "none"
    assert config.disable_new_netns
    assert config.disable_guest_seccomp
    assert config.static_sandbox_resource_mgmt
    assert config.sandbox_bind_mounts == (str(tmp_path),)
    assert config.create_container_timeout_s == 9.0


def test_an_empty_seccompsandbox_leaves_qemu_in_its_sandbox(load: Load) -> None:
    assert load(hypervisor__qemu={"seccompsandbox": ""}).hypervisor.seccompsandbox.startswith("on,")
    assert load(hypervisor__qemu={"seccompsandbox": "off"}).hypervisor.seccompsandbox == "off"


def test_runtime_rs_has_some_keys_elsewhere(load: Load) -> None:
    config = load(
        hypervisor__qemu={"seccomp_sandbox": "on,spawn=deny", "dbg_monitor_socket": "hmp"},
        hypervisor__qemu__factory={"template_path": "/rs", "vm_cache_number": 3},
        agent__kata={"create_container_timeout": 33},
        factory={"vm_cache_number": 4},
    )
    assert config.hypervisor.seccompsandbox == "on,spawn=deny"
    assert config.hypervisor.extra_monitor_socket == "hmp"
    assert config.factory.template_path == Path("/rs")
    assert config.factory.vm_cache_number == 4
    assert config.create_container_timeout_s == 33


def test_bind_mounts_share_a_directory(load: Load, tmp_path: Path) -> None:
    paths = [tmp_path / "a/same", tmp_path / "b/same"]
    for path in paths:
        path.mkdir(parents=True)
    with pytest.raises(
        InvalidArgumentError, match=r"sandbox_bind_mounts: found .*expected different last names"
    ):
        load(runtime={"sandbox_bind_mounts": [str(path) for path in paths]})


def test_bind_mounts_need_a_share(load: Load, tmp_path: Path) -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"sandbox_bind_mounts: found .*expected \[\] with shared_fs"
    ):
        load(hypervisor__qemu={"shared_fs": "none"}, runtime={"sandbox_bind_mounts": [str(tmp_path)]})


def test_vfio_is_plugged_hot_or_cold(load: Load) -> None:
    with pytest.raises(InvalidArgumentError, match='hot_plug_vfio: found "root-port"'):
        load(hypervisor__qemu={"hot_plug_vfio": "root-port", "cold_plug_vfio": "bridge-port"})


# -- warnings


def test_a_typo_is_one_warning_with_the_nearest_key(load: Load) -> None:
    config = load(
        hypervisor__qemu={"defualt_vcpus": 1, "kernel_param": "x", "zzz": 1},
        runtime={"default_memory": 7},
        agent__kata={},
        agent__katta={"enable_debug": True},
    )
    assert len(config.warnings) == 1
    warning = config.warnings[0]
    assert "[hypervisor.qemu] defualt_vcpus (nearest: default_vcpus)" in warning
    assert "[hypervisor.qemu] kernel_param (nearest: kernel_params)" in warning
    assert "[hypervisor.qemu] zzz," in warning
    assert "[runtime] default_memory (nearest: [hypervisor.qemu] default_memory)" in warning
    assert "[agent.katta] (nearest: [agent.kata])" in warning


def test_keys_that_we_do_not_implement_are_in_the_same_warning(load: Load) -> None:
    config = load(
        hypervisor__qemu={
            "enable_iommu": True, "rootless": False, "hot_plug_vfio": "no-port", "tyop": 1,
            "vhost_user_store_path": "/v", "enable_numa": True, "numa_mapping": ["0"],
        },
        hypervisor__clh={"path": "/clh"},
    )  # fmt: skip
    assert len(config.warnings) == 1
    unknown, _, without_effect = config.warnings[0].partition("; ")
    assert "tyop" in unknown
    assert "[hypervisor.clh]" in without_effect
    assert "[hypervisor.qemu] enable_iommu = true" in without_effect
    assert "[hypervisor.qemu] enable_numa = true" in without_effect
    # They ask for what we do anyway, or belong to a key that is off, or that is named already.
    for key in ("rootless", "hot_plug_vfio", "vhost_user_store_path", "numa_mapping"):
        assert key not in config.warnings[0]


def test_a_typo_in_a_drop_in_is_named_with_its_file(load: Load, tmp_path: Path) -> None:
    drop_in = tmp_path / "config.d/10-mine.toml"
    drop_in.parent.mkdir()
    drop_in.write_text("[runtime]\nenable_debgu = true\n")
    assert f"[runtime] enable_debgu of {drop_in} (nearest: enable_debug)" in load().warnings[0]


@pytest.mark.parametrize(("table", "name"), [("hypervisor.qemu", "hypervisor"), ("agent.kata", "agent")])
def test_a_key_that_is_said_to_work_is_read_by_somebody(table: str, name: str) -> None:
    """And one that is said not to work is not: whoever implements it says so in the schema."""
    repository = Path(load_configuration.__code__.co_filename).parents[2]
    sources = [p for p in (repository / "virtcontainers").rglob("*.py") if p.name != "config.py"]
    text = "\n".join(source.read_text() for source in sources)
    for key_name, key in TABLES_BY_NAME[table].items():
        known_to_us = ("valid_", "enable_annotations", "create_container_timeout")
        if key.field and not key.field.startswith(known_to_us):
            assert (f".{key.field}" in text) is key.is_implemented, key_name


def test_what_has_no_effect_on_a_template_is_warned_of(load: Load, tmp_path: Path) -> None:
    keys = {"enable_hugepages": True, "enable_mem_prealloc": True}
    assert not load(hypervisor__qemu=keys).warnings
    warnings = load(hypervisor__qemu=keys, factory={"enable_template": True}).warnings
    assert [warning.partition(", which")[0] for warning in warnings] == [
        f"{tmp_path}/configuration.toml: [hypervisor.qemu] {key}: found true" for key in keys
    ]


def test_a_cache_whose_socket_cannot_be_is_refused(load: Load) -> None:
    endpoint = "/" + "x" * 107
    load(factory={"vm_cache_endpoint": endpoint})
    load(factory={"vm_cache_endpoint": endpoint[1:].replace("x", "/", 1), "vm_cache_number": 1})
    with pytest.raises(InvalidArgumentError, match=r"vm_cache_endpoint: found .* at most 107 bytes"):
        load(factory={"vm_cache_endpoint": endpoint, "vm_cache_number": 1})


# -- files


def test_drop_ins_are_merged_in_the_order_of_their_names(load: Load, tmp_path: Path) -> None:
    directory = tmp_path / "config.d"
    directory.mkdir()
    (directory / "20.toml").write_text('[hypervisor.qemu]\nkernel = "/k20"\nkernel_params = "twenty"\n')
    (directory / "10.toml").write_text('[hypervisor.qemu]\nkernel = "/k10"\n[agent.kata]\ndial_timeout = 5\n')
    (directory / "99.conf").write_text("not ours")
    config = load(hypervisor__qemu={"virtio_fs_extra_args": ["a"]})
    assert config.hypervisor.kernel == Path("/k20")
    assert config.hypervisor.kernel_params == "twenty"
    assert config.hypervisor.initrd == Path("/i")
    assert config.hypervisor.virtio_fs_extra_args == ("a",)
    assert config.agent.dial_timeout_s == 5
    assert config.drop_ins == (directory / "10.toml", directory / "20.toml")


def test_a_drop_in_can_turn_off_and_empty(load: Load, tmp_path: Path) -> None:
    (tmp_path / "config.d").mkdir()
    (tmp_path / "config.d/a.toml").write_text(
        '[hypervisor.qemu]\nimage = ""\ninitrd = "/i2"\nvirtio_fs_extra_args = []\n'
        "[runtime]\nenable_debug = false\n"
    )
    config = load(
        hypervisor__qemu={"image": "/image", "initrd": None, "virtio_fs_extra_args": ["a"]},
        runtime={"enable_debug": True},
    )
    assert (config.hypervisor.image, config.hypervisor.initrd) == (None, Path("/i2"))
    assert config.hypervisor.virtio_fs_extra_args == ()
    assert config.enable_debug is False


def test_an_error_in_a_drop_in_names_it(load: Load, tmp_path: Path) -> None:
    drop_in = tmp_path / "config.d/a.toml"
    drop_in.parent.mkdir()
    drop_in.write_text("[runtime]\nenable_debug = 1\n")
    with pytest.raises(InvalidArgumentError) as refused:
        load()
    assert str(refused.value) == f"{drop_in}: [runtime] enable_debug: found 1, expected true or false"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"[hypervisor.qemu\n", "not TOML"),
        (b"\xff\xfe", "not TOML"),
        (b"runtime = 1\n", "runtime: found 1, expected a table"),
        (b"[hypervisor]\nqemu = 1\n", "hypervisor.qemu: found 1, expected a table"),
        (b"[runtime]\n", "found no hypervisor, expected [hypervisor.qemu]"),
        (b'[hypervisor.clh]\npath = "/x"\n', "found [hypervisor.clh], expected [hypervisor.qemu]"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: bytes, said: str) -> None:
    path = tmp_path / "configuration.toml"
    path.write_bytes(text)
    with pytest.raises(InvalidArgumentError) as refused:
        load_configuration(path)
    assert str(refused.value).startswith(f"{path}: {said}")


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{tmp_path}: Is a directory"):
        load_configuration(tmp_path)


def test_where_the_file_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    monkeypatch.setattr("katautils.config.files.SEARCH_PATHS", (first, second))
    with pytest.raises(NotFoundError, match=f"none of {first}, {second} exists"):
        find_configuration(None, {})
    second.touch()
    assert find_configuration(None, {}) == second
    first.touch()
    assert find_configuration(None, {}) == first
    with pytest.raises(NotFoundError, match=rf"{third} \(KATA_CONF_FILE\): found nothing there"):
        find_configuration(None, {"KATA_CONF_FILE": str(third)})
    third.symlink_to(second)
    assert find_configuration(None, {"KATA_CONF_FILE": str(third)}) == second
    assert find_configuration(first, {"KATA_CONF_FILE": str(third)}) == first
    with pytest.raises(NotFoundError, match="configuration file /does/not/exist"):
        find_configuration(Path("/does/not/exist"), {})
