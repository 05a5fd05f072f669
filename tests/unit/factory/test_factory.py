"""Which factory a pod gets, and what it gets when that one has no machine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from katautils.config import RuntimeConfig
from katautils.factory import handle_factory
from virtcontainers.config import FactoryConfig, SharedFS
from virtcontainers.errors import InvalidArgumentError, KataError, UnavailableError
from virtcontainers.factory import Factory, new_factory
from virtcontainers.factory.base import FactoryBase, OnPlanned
from virtcontainers.factory.direct import Direct
from virtcontainers.factory.template import Template, TemplateMisfit, TemplateMissing, read_template
from virtcontainers.hypervisor.base import Persisted, RestoreFailed
from virtcontainers.vm import VM, VMConfig


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vc/template"


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records if record.name != "asyncio"]


Warnings = Callable[[], list[str]]


def handle(vm: VMConfig, factory: FactoryConfig, **more: Any) -> Factory:
    config = RuntimeConfig(
        path=Path("configuration.toml"),
        drop_ins=(),
        warnings=(),
        hypervisor=vm.hypervisor,
        agent=vm.agent,
        factory=factory,
        **more,
    )
    return asyncio.run(handle_factory(config))


def changed(config: VMConfig, **hypervisor: Any) -> VMConfig:
    return VMConfig(replace(config.hypervisor, **hypervisor), config.agent)


# -- the choice


def test_without_a_word_machines_are_booted(vm_config: VMConfig, warnings: Warnings) -> None:
    factory = handle(vm_config, FactoryConfig())
    assert isinstance(factory.base, Direct) and factory.base.config == vm_config
    assert factory.otherwise is None
    assert warnings() == []


def test_a_template_that_fits_is_used(
    path: Path, vm_config: VMConfig, write_template: Any, warnings: Warnings
) -> None:
    write_template(path)
    factory = handle(vm_config, FactoryConfig(enable_template=True, template_path=path))
    assert isinstance(factory.base, Template) and factory.base.info == read_template(path)
    assert warnings() == []


def test_to_fetch_makes_nothing(path: Path, vm_config: VMConfig, write_template: Any) -> None:
    config = FactoryConfig(enable_template=True, template_path=path)
    with pytest.raises(TemplateMissing):
        asyncio.run(new_factory(config, vm_config, fetch_only=True))
    assert not path.parent.exists()
    write_template(path)
    with pytest.raises(TemplateMisfit):
        asyncio.run(new_factory(config, changed(vm_config, cpu_model="Nehalem"), fetch_only=True))
    assert sorted(entry.name for entry in path.iterdir()) == ["builds", "current"]


def lose(path: Path, config: VMConfig) -> VMConfig:
    (path / "current").unlink()
    return config


def break_state(path: Path, config: VMConfig) -> VMConfig:
    (path / "current/state").write_bytes(b"half")
    return config


def break_json(path: Path, config: VMConfig) -> VMConfig:
    (path / "current/template.json").write_text('{"made_of": null}')
    return config


def dangle(path: Path, config: VMConfig) -> VMConfig:
    (path / "current").unlink()
    (path / "current").symlink_to("builds/other")
    return config


def another(path: Path, config: VMConfig) -> VMConfig:
    return changed(config, kernel_params="foo")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lose, "there is no template in"),
        (break_state, "state: found 4 bytes"),
        (break_json, "template.json is not readable"),
        (dangle, "builds/other"),
        (another, "does not fit: kernel_params: found nothing, expected foo"),
    ],
)
def test_one_that_cannot_be_used_nor_made_is_a_warning(
    path: Path,
    vm_config: VMConfig,
    write_template: Any,
    warnings: Warnings,
    spoil: Callable[[Path, VMConfig], VMConfig],
    reason: str,
) -> None:
    """Never an error: a pod must not fail because a shortcut did."""
    write_template(path)
    wanted = spoil(path, vm_config)
    factory = handle(wanted, FactoryConfig(enable_template=True, template_path=path))
    assert isinstance(factory.base, Direct) and factory.base.config == wanted
    why, failure = warnings()
    assert why.startswith("a new template is made: ") and reason in why
    assert failure.startswith("no template can be made, the machine is booted: ")
    assert "is a folder with files in it" in failure


@pytest.mark.parametrize("where", ["template_path", "its folder"])
def test_a_template_path_that_cannot_be_is_a_warning(
    path: Path, vm_config: VMConfig, warnings: Warnings, where: str
) -> None:
    obstacle = path if where == "template_path" else path.parent
    obstacle.parent.mkdir(exist_ok=True)
    obstacle.touch()
    factory = handle(vm_config, FactoryConfig(enable_template=True, template_path=path))
    assert isinstance(factory.base, Direct)
    assert "the machine is booted" in warnings()[-1] and str(obstacle) in warnings()[-1]


def test_a_cache_that_is_not_there_is_a_warning(
    path: Path, vm_config: VMConfig, write_template: Any, warnings: Warnings
) -> None:
    config = FactoryConfig(vm_cache_number=3, vm_cache_endpoint=path.parent / "cache.sock")
    assert isinstance(handle(vm_config, config).base, Direct)
    (warning,) = warnings()
    assert warning.startswith("the VM cache is not used: ") and str(config.vm_cache_endpoint) in warning
    write_template(path)
    both = replace(config, enable_template=True, template_path=path)
    assert isinstance(handle(vm_config, both).base, Template)
    assert len(warnings()) == 2


def test_the_pods_annotations_make_no_other_template(
    path: Path, vm_config: VMConfig, write_template: Any, warnings: Warnings
) -> None:
    write_template(path)
    config = FactoryConfig(enable_template=True, template_path=path)

    def of_files() -> RuntimeConfig:
        return RuntimeConfig(
            path=Path("configuration.toml"),
            drop_ins=(),
            warnings=(),
            hypervisor=vm_config.hypervisor,
            agent=vm_config.agent,
            factory=config,
        )

    factory = handle(changed(vm_config, kernel_params="of the pod"), config, of_files=of_files)
    assert isinstance(factory.base, Template) and factory.base.config == vm_config
    assert warnings() == []


def test_files_that_make_no_sense_alone_are_a_warning(
    path: Path, vm_config: VMConfig, write_template: Any, warnings: Warnings
) -> None:
    write_template(path)

    def of_files() -> RuntimeConfig:
        raise InvalidArgumentError("kernel is missing")

    factory = handle(vm_config, FactoryConfig(enable_template=True, template_path=path), of_files=of_files)
    assert isinstance(factory.base, Direct) and factory.base.config == vm_config
    assert warnings() == ["the machine is booted: without the pod's annotations, kernel is missing"]


# -- when the factory has no machine


class Unable(FactoryBase):
    """Has never a machine."""

    def __init__(self, config: VMConfig, error: KataError) -> None:
        self.config = config
        self.error = error
        self.asked: list[str] = []
        self.rejected: list[str] = []

    async def get_base_vm(
        self, vm_id: str, config: VMConfig, *, shared_path: Path | None, on_planned: OnPlanned
    ) -> VM:
        self.asked.append(vm_id)
        raise self.error

    def reject(self, reason: str) -> None:
        self.rejected.append(reason)


def get_vm(factory: Factory, config: VMConfig) -> str:
    """The error: none of these has a machine."""

    def on_planned(persisted: Persisted, share_of: str | None = None) -> None:
        raise AssertionError("no machine was planned")

    with pytest.raises(KataError) as raised:
        asyncio.run(factory.get_vm("pod", config, shared_path=None, on_planned=on_planned))
    return str(raised.value)


BOOTED = "is not executable"
"""What the machine that would be booted fails with, before it leaves a trace."""


@pytest.mark.parametrize(
    ("hypervisor", "agent"),
    [
        ({}, {}),
        ({"default_vcpus": 3}, {}),
        ({"default_memory_mib": 512}, {}),
        ({"default_vcpus": 3, "default_memory_mib": 512}, {}),
        ({"virtio_fs_cache": "never"}, {}),
        ({"enable_mem_prealloc": True}, {}),
        ({}, {"dial_timeout_s": 90.0}),
        ({}, {"policy": "package agent_policy"}),
    ],
)
def test_a_pod_for_which_the_machine_is_right_or_can_be_made_gets_it(
    vm_config: VMConfig, warnings: Warnings, hypervisor: dict[str, Any], agent: dict[str, Any]
) -> None:
    base = Unable(vm_config, UnavailableError("none left"))
    wanted = VMConfig(replace(vm_config.hypervisor, **hypervisor), replace(vm_config.agent, **agent))
    assert get_vm(Factory(base), wanted) == "none left"
    assert base.asked == ["pod"]
    assert warnings() == []


@pytest.mark.parametrize(
    ("hypervisor", "agent", "part"),
    [
        ({"kernel_params": "foo"}, {}, "kernel_params: found nothing, expected foo"),
        ({"default_maxvcpus": 8}, {}, "vcpus"),
        ({"default_maxmemory_mib": 512}, {}, "memory"),
        ({"cpu_features": "pmu=off"}, {}, "cpu"),
        ({"shared_fs": SharedFS.VIRTIO_FS}, {}, "devices"),
        ({}, {"enable_debug": True}, "kernel_params: found nothing, expected agent.log=debug"),
    ],
)
def test_a_pod_for_which_it_can_not_is_booted(
    vm_config: VMConfig,
    warnings: Warnings,
    hypervisor: dict[str, Any],
    agent: dict[str, Any],
    part: str,
) -> None:
    base = Unable(vm_config, UnavailableError("none left"))
    wanted = VMConfig(replace(vm_config.hypervisor, **hypervisor), replace(vm_config.agent, **agent))
    assert BOOTED in get_vm(Factory(base), wanted)
    assert base.asked == [] and base.rejected == []
    (warning,) = warnings()
    assert warning.startswith("it is booted, for the pod's machine is none of Unable's: ") and part in warning


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("virtio_fs_cache", "never"),
        ("virtio_fs_extra_args", ("--thread-pool-size=2",)),
        ("enable_mem_prealloc", True),
        ("enable_hugepages", True),
        ("enable_virtio_mem", True),
    ],
)
def test_machines_that_run_already_are_none_for_a_pod_that_wants_them_started_otherwise(
    vm_config: VMConfig, warnings: Warnings, key: str, value: object
) -> None:
    base = Unable(vm_config, UnavailableError("none left"))
    base.shares_already = True
    assert BOOTED in get_vm(Factory(base), changed(vm_config, **{key: value}))
    assert f"{key}: found" in warnings()[0]
    assert base.asked == []
    assert get_vm(Factory(base), changed(vm_config, default_vcpus=3)) == "none left"


def test_another_kernel_for_a_pod_is_booted(vm_config: VMConfig, tmp_path: Path, warnings: Warnings) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_text("kernel")
    base = Unable(vm_config, UnavailableError("none left"))
    assert BOOTED in get_vm(Factory(base), changed(vm_config, kernel=kernel))
    assert str(kernel) in warnings()[0]


def test_direct_boots_whatever_is_wanted(vm_config: VMConfig, warnings: Warnings) -> None:
    wanted = changed(vm_config, kernel_params="foo", default_maxvcpus=8)
    assert BOOTED in get_vm(Factory(Direct(vm_config)), wanted)
    assert warnings() == []


def test_who_has_no_machine_is_no_error_when_there_is_another(
    vm_config: VMConfig, warnings: Warnings
) -> None:
    cache = Unable(vm_config, UnavailableError("the cache is empty"))
    template = Unable(vm_config, KataError("the template is gone"))

    async def direct() -> Factory:
        return Factory(Direct(vm_config))

    async def without_cache() -> Factory:
        return Factory(template, otherwise=direct)

    assert BOOTED in get_vm(Factory(cache, otherwise=without_cache), vm_config)
    assert cache.asked == template.asked == ["pod"]
    assert warnings() == [
        "no machine from Unable: the cache is empty",
        "no machine from Unable: the template is gone",
    ]
    # Neither is a reason never to ask again.
    assert cache.rejected == template.rejected == []


def test_a_copy_that_does_not_come_to_life_is_told_of(vm_config: VMConfig) -> None:
    base = Unable(vm_config, RestoreFailed("QEMU does not like it"))
    assert get_vm(Factory(base), vm_config) == "QEMU does not like it"
    assert base.rejected == ["QEMU does not like it"]


def test_a_template_that_is_gone_by_then_is_no_error(
    path: Path, vm_config: VMConfig, write_template: Any, warnings: Warnings
) -> None:
    """Between the look and the pod's machine somebody destroys it."""
    write_template(path)
    factory = handle(vm_config, FactoryConfig(enable_template=True, template_path=path))
    asyncio.run(factory.base.close_factory())
    assert BOOTED in get_vm(factory, vm_config)
    assert f"no machine from Template: there is no template in {path}" in warnings()[0]
