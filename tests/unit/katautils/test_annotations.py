from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from katautils.config import RuntimeConfig
from katautils.config.annotations import AGENT_PREFIX, HYPERVISOR_PREFIX, RUNTIME_PREFIX
from virtcontainers.config import SharedFS
from virtcontainers.errors import InvalidArgumentError

Load = Callable[..., RuntimeConfig]

ALL = {"enable_annotations": [".*"]}


def test_a_hypervisor_annotation_needs_to_be_enabled(load: Load) -> None:
    name = HYPERVISOR_PREFIX + "kernel_params"
    with pytest.raises(InvalidArgumentError) as refused:
        load({name: "x"}, hypervisor__qemu={"enable_annotations": ["enable_iommu", "path$"]})
    message = str(refused.value)
    assert message.startswith(f"annotation {name} is not enabled")
    assert "[hypervisor.qemu] enable_annotations" in message
    with pytest.raises(InvalidArgumentError, match="is not enabled"):
        load({name: "x"})
    for expression in ("kernel_params", "^kernel_.*$", "kernel", ".*"):
        config = load({name: "x"}, hypervisor__qemu={"enable_annotations": [expression]})
        assert config.hypervisor.kernel_params == "x"


def test_a_bad_expression_is_refused(load: Load) -> None:
    with pytest.raises(InvalidArgumentError, match=r'enable_annotations: found "\(", expected regular expr'):
        load({HYPERVISOR_PREFIX + "kernel_params": "x"}, hypervisor__qemu={"enable_annotations": ["("]})


def test_an_administrators_key_cannot_be_set_by_a_pod(load: Load, tmp_path: Path) -> None:
    program = tmp_path / "evil"
    program.touch()
    config = load(
        {
            HYPERVISOR_PREFIX + "enable_annotations": '["x"]',
            HYPERVISOR_PREFIX + "valid_hypervisor_paths": f'["{program}"]',
            HYPERVISOR_PREFIX + "seccompsandbox": "off",
        },
        hypervisor__qemu=ALL,
    )
    assert config.hypervisor.seccompsandbox != "off"
    assert all(key in config.warnings[0] for key in ("seccompsandbox", "valid_hypervisor_paths"))


def test_values_replace_those_of_the_file(load: Load, host_cpus: int) -> None:
    config = load(
        {
            HYPERVISOR_PREFIX + "default_vcpus": "2.5",
            HYPERVISOR_PREFIX + "default_max_vcpus": "6",
            HYPERVISOR_PREFIX + "default_memory": "512",
            HYPERVISOR_PREFIX + "shared_fs": "virtio-9p",
            HYPERVISOR_PREFIX + "enable_hugepages": "T",
            HYPERVISOR_PREFIX + "enable_mem_prealloc": "false",
            HYPERVISOR_PREFIX + "kernel_params": "b=2 d",
            HYPERVISOR_PREFIX + "virtio_fs_extra_args": '["--x", "--y=1,2"]',
            HYPERVISOR_PREFIX + "msize_9p": "4096",
            RUNTIME_PREFIX + "disable_guest_seccomp": "true",
            RUNTIME_PREFIX + "create_container_timeout": "7",
            RUNTIME_PREFIX + "sandbox_cgroup_only": "1",
            AGENT_PREFIX + "kernel_modules": "e1000e X=1,2;i915",
            AGENT_PREFIX + "enable_tracing": "true",
            AGENT_PREFIX + "policy": base64.b64encode(b"package agent_policy").decode(),
            "io.katacontainers.enable_vcpus_pinning": "true",
            "io.kubernetes.cri.sandbox-id": "abc",
        },
        hypervisor__qemu={
            **ALL,
            "enable_mem_prealloc": True,
            "kernel_params": "a=1 b=1 c",
            "virtio_fs_extra_args": ["--z"],
        },
        agent__kata={"kernel_modules": ["old"]},
    )
    hypervisor = config.hypervisor
    assert (hypervisor.default_vcpus, hypervisor.default_maxvcpus) == (3, 6)
    assert hypervisor.default_memory_mib == 512
    assert hypervisor.shared_fs is SharedFS.VIRTIO_9P
    assert hypervisor.enable_hugepages
    assert not hypervisor.enable_mem_prealloc
    assert hypervisor.kernel_params == "a=1 c b=2 d"
    assert hypervisor.virtio_fs_extra_args == ("--z", "--x", "--y=1,2")
    assert hypervisor.msize_9p == 4096
    assert config.disable_guest_seccomp
    assert config.create_container_timeout_s == 7
    assert config.sandbox_cgroup_only
    assert config.enable_vcpus_pinning
    assert config.agent.kernel_modules == ("e1000e X=1,2", "i915")
    assert config.agent.enable_tracing
    assert config.agent.policy == "package agent_policy"


def test_runtime_rs_separates_arguments_by_commas(load: Load) -> None:
    config = load({HYPERVISOR_PREFIX + "virtio_fs_extra_args": "--x,--y"}, hypervisor__qemu=ALL)
    assert config.hypervisor.virtio_fs_extra_args == ("--x", "--y")


@pytest.mark.parametrize(
    ("annotation", "text", "expected"),
    [
        (HYPERVISOR_PREFIX + "default_vcpus", "many", "a number"),
        (HYPERVISOR_PREFIX + "default_vcpus", "-1", "a number from 0 to the host's 8 CPUs"),
        (HYPERVISOR_PREFIX + "default_vcpus", "9", "a number from 0 to the host's 8 CPUs"),
        (HYPERVISOR_PREFIX + "default_vcpus", "nan", "a number"),
        (HYPERVISOR_PREFIX + "default_vcpus", "inf", "a number"),
        (HYPERVISOR_PREFIX + "default_max_vcpus", "9", "at most the host's 8 CPUs"),
        (HYPERVISOR_PREFIX + "default_memory", "255", "at least 256 (MiB)"),
        (HYPERVISOR_PREFIX + "default_memory", "1e3", "an integer from 0 to 4294967295"),
        (HYPERVISOR_PREFIX + "default_memory", "", "an integer from 0 to 4294967295"),
        (HYPERVISOR_PREFIX + "default_memory", "\u0665\u0660\u0660", "an integer from 0 to 4294967295"),
        (HYPERVISOR_PREFIX + "msize_9p", "0", "a positive integer"),
        (HYPERVISOR_PREFIX + "shared_fs", "none", '"virtio-fs" or "virtio-9p"'),
        (HYPERVISOR_PREFIX + "shared_fs", "nfs", 'one of "virtio-fs", "virtio-9p", "none"'),
        (HYPERVISOR_PREFIX + "indep_iothreads", "51", "an integer from 1 to 50"),
        (HYPERVISOR_PREFIX + "enable_hugepages", "yes", "true or false"),
        (HYPERVISOR_PREFIX + "kernel", "vmlinuz", "an absolute path"),
        (HYPERVISOR_PREFIX + "machine_type", "pc", '"q35"'),
        (HYPERVISOR_PREFIX + "virtio_fs_extra_args", "[1]", "a list of strings"),
        (HYPERVISOR_PREFIX + "virtio_fs_extra_args", '["a', "a list of strings"),
        (HYPERVISOR_PREFIX + "virtio_fs_extra_args", "-o,no_xattr,-o,modcaps=+sys_admin", "the sandbox"),
        (HYPERVISOR_PREFIX + "virtio_fs_extra_args", '["--sandbox", "none"]', "the sandbox"),
        (HYPERVISOR_PREFIX + "msize_9p", "4000", "an integer from 4096"),
        (HYPERVISOR_PREFIX + "virtio_fs_cache", "maybe", '"never", "metadata", "auto", "always", "none"'),
        (HYPERVISOR_PREFIX + "blk_logical_sector_size", "100", "a power of two"),
        (RUNTIME_PREFIX + "sandbox_cgroup_only", "on", "true or false"),
        (RUNTIME_PREFIX + "internetworking_model", "bridged", '"tcfilter"'),
        (RUNTIME_PREFIX + "create_container_timeout", "-1", "an integer from 0 to"),
        (AGENT_PREFIX + "policy", "!", "UTF-8 text in base64"),
        ("io.katacontainers.enable_vcpus_pinning", "maybe", "true or false"),
    ],
)
def test_a_bad_value_names_the_annotation(
    load: Load, host_cpus: int, annotation: str, text: str, expected: str
) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        load({annotation: text}, hypervisor__qemu=ALL)
    assert str(refused.value).startswith(f"annotation {annotation}: found ")
    assert expected in str(refused.value).partition(", expected ")[2]


@pytest.mark.parametrize(
    ("key", "allowed_by"),
    [
        ("path", "valid_hypervisor_paths"),
        ("virtio_fs_daemon", "valid_virtio_fs_daemon_paths"),
        ("entropy_source", "valid_entropy_sources"),
        ("vhost_user_store_path", "valid_vhost_user_store_paths"),
        ("jailer_path", "valid_jailer_paths"),
    ],
)
def test_a_path_needs_to_be_in_the_allow_list(load: Load, tmp_path: Path, key: str, allowed_by: str) -> None:
    allowed = tmp_path / "bin/qemu-1"
    allowed.parent.mkdir()
    allowed.touch()
    (tmp_path / "other").touch()
    name = HYPERVISOR_PREFIX + key

    def refusal(path: str, patterns: list[str] | None) -> str:
        with pytest.raises(InvalidArgumentError) as refused:
            load({name: path}, hypervisor__qemu={**ALL, allowed_by: patterns})
        assert str(refused.value).startswith(f'annotation {name}: found "{path}", expected a path that ')
        return str(refused.value)

    for pattern in (str(allowed), f"{tmp_path}/bin/*", f"{tmp_path}/*/qemu-[0-9]", f"{tmp_path}/b?n/qemu-1"):
        config = load({name: str(allowed)}, hypervisor__qemu={**ALL, allowed_by: ["/x", pattern]})
        if key == "path":
            assert config.hypervisor.path == allowed
    assert f"{allowed_by} of" in refusal(str(allowed), None)
    for patterns in ([], ["/usr/bin/*"], [f"{tmp_path}/*"]):
        refusal(str(allowed), patterns)
    refusal(f"{tmp_path}/bin/../other", [f"{tmp_path}/bin/*/*", f"{tmp_path}/*/*/*"])
    assert "exists" in refusal(f"{tmp_path}/bin/none", [f"{tmp_path}/bin/*"])


def test_a_pods_initrd_replaces_the_configured_image(load: Load) -> None:
    image = {**ALL, "initrd": None, "image": "/image"}
    config = load({HYPERVISOR_PREFIX + "initrd": "/pod"}, hypervisor__qemu=image)
    assert (config.hypervisor.initrd, config.hypervisor.image) == (Path("/pod"), None)
    config = load({HYPERVISOR_PREFIX + "image": "/pod"}, hypervisor__qemu=ALL)
    assert (config.hypervisor.initrd, config.hypervisor.image) == (None, Path("/pod"))
    both = {HYPERVISOR_PREFIX + "image": "/a", HYPERVISOR_PREFIX + "initrd": "/b"}
    with pytest.raises(
        InvalidArgumentError, match=r"annotation .*initrd: found ./b., expected initrd or image"
    ):
        load(both, hypervisor__qemu=ALL)


def test_a_file_must_have_the_hash_that_comes_with_it(load: Load, tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(b"kernel")
    right = hashlib.sha512(b"kernel").hexdigest()
    path, hash_ = HYPERVISOR_PREFIX + "kernel", HYPERVISOR_PREFIX + "kernel_hash"
    config = load({path: str(kernel), hash_: right}, hypervisor__qemu=ALL)
    assert config.hypervisor.kernel == kernel
    assert not config.warnings
    with pytest.raises(InvalidArgumentError, match=f"annotation {hash_}: found .*, expected {right}"):
        load({path: str(kernel), hash_: "0" * 128}, hypervisor__qemu=ALL)
    with pytest.raises(InvalidArgumentError, match=f"annotation {path}: /none: No such file"):
        load({path: "/none", hash_: right}, hypervisor__qemu=ALL)
    with pytest.raises(InvalidArgumentError, match='asset_hash_type: found "md5", expected "sha512"'):
        annotations = {path: str(kernel), hash_: right, "io.katacontainers.asset_hash_type": "md5"}
        load(annotations, hypervisor__qemu=ALL)


def test_annotations_without_effect_are_one_warning(load: Load) -> None:
    config = load(
        {
            HYPERVISOR_PREFIX + "defualt_memory": "512",
            HYPERVISOR_PREFIX + "enable_iommu": "true",
            HYPERVISOR_PREFIX + "rootless": "false",
            RUNTIME_PREFIX + "sandbox_bind_mounts": "/etc",
            "io.katacontainers.container.resource.swappiness": "60",
            "io.katacontainers.pkg.oci.bundle_path": "/b",
            "io.other": "x",
        },
        hypervisor__qemu=ALL,
    )
    assert len(config.warnings) == 1
    warning = config.warnings[0]
    nearest = f"(nearest: {HYPERVISOR_PREFIX}default_memory)"
    assert f"unknown {HYPERVISOR_PREFIX}defualt_memory {nearest}" in warning
    assert f"{HYPERVISOR_PREFIX}enable_iommu is not implemented" in warning
    assert f"unknown {RUNTIME_PREFIX}sandbox_bind_mounts" in warning
    assert config.sandbox_bind_mounts == ()
    for quiet in ("rootless", "swappiness", "bundle_path", "io.other"):
        assert quiet not in warning


def test_hot_plug_by_annotation_turns_the_configured_cold_plug_off(load: Load) -> None:
    cold: dict[str, Any] = {**ALL, "cold_plug_vfio": "root-port"}
    assert load({HYPERVISOR_PREFIX + "hot_plug_vfio": "root-port"}, hypervisor__qemu=cold)


def test_the_configuration_of_the_files_alone_is_there_too(load: Load) -> None:
    config = load(
        {HYPERVISOR_PREFIX + "default_memory": "512", AGENT_PREFIX + "kernel_modules": "tun"},
        hypervisor__qemu=ALL | {"default_memory": 300},
        factory={"enable_template": True},
    )
    assert (config.hypervisor.default_memory_mib, config.agent.kernel_modules) == (512, ("tun",))
    assert config.without_annotations == load(
        hypervisor__qemu=ALL | {"default_memory": 300}, factory={"enable_template": True}
    )


@pytest.mark.parametrize(
    "of_pod", [None, {}, {"io.kubernetes.cri.sandbox-name": "x"}, {AGENT_PREFIX + "x": ""}]
)
def test_without_annotations_that_say_something_it_is_the_same(
    load: Load, of_pod: dict[str, str] | None
) -> None:
    config = load(of_pod)
    assert config.without_annotations is config


def test_files_that_need_the_pods_annotations_are_refused_only_when_asked_for(
    load: Load, tmp_path: Path
) -> None:
    initrd = tmp_path / "initrd"
    initrd.touch()
    config = load({HYPERVISOR_PREFIX + "initrd": str(initrd)}, hypervisor__qemu=ALL | {"initrd": None})
    assert config.hypervisor.initrd == initrd
    with pytest.raises(InvalidArgumentError, match="neither initrd nor image"):
        _ = config.without_annotations
