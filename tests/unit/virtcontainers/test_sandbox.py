"""What a sandbox refuses before it leaves a trace, and updates that come at once."""

from __future__ import annotations

import asyncio
import os
import secrets
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from virtcontainers import persist, resource_control
from virtcontainers.agent import KataAgent
from virtcontainers.cleanup import cleanup
from virtcontainers.config import (
    RUN_VC,
    AgentConfig,
    ContainerConfig,
    ContainerType,
    FactoryConfig,
    HypervisorConfig,
    NetworkConfig,
    RootFs,
    SandboxConfig,
)
from virtcontainers.container import Container
from virtcontainers.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    KataError,
    NotFoundError,
    UnavailableError,
)
from virtcontainers.factory import Factory
from virtcontainers.factory.direct import Direct
from virtcontainers.persist import sandbox_dir
from virtcontainers.sandbox import Sandbox, _dns, _together, create_sandbox
from virtcontainers.vm import VM, VMConfig


def sandbox_config(
    sandbox_id: str, bundle: Path, template_path: Path = Path("/run/elsewhere")
) -> SandboxConfig:
    return SandboxConfig(
        id=sandbox_id,
        hostname="",
        hypervisor=HypervisorConfig(),
        agent=AgentConfig(),
        factory=FactoryConfig(template_path=template_path),
        network=NetworkConfig(),
        container=ContainerConfig(
            id=sandbox_id,
            bundle=bundle,
            rootfs=RootFs(target=bundle),
            spec={},
            container_type=ContainerType.SINGLE_CONTAINER,
        ),
    )


def factory(config: SandboxConfig) -> Factory:
    return Factory(Direct(VMConfig(config.hypervisor, config.agent)))


@pytest.mark.parametrize(
    ("sandbox_id", "template_path"),
    [
        ("template", FactoryConfig().template_path),
        ("template", Path("/run/elsewhere")),
        ("mine", RUN_VC / "vm/mine"),
        ("template-0123456789ab", FactoryConfig().template_path),
        ("cache-0123456789ab", FactoryConfig().template_path),
    ],
)
def test_a_name_of_the_factorys_is_no_pods(tmp_path: Path, sandbox_id: str, template_path: Path) -> None:
    """Its machine would live in the template's directory, or be ended as one that the cache has lost."""
    config = sandbox_config(sandbox_id, tmp_path, template_path)
    with pytest.raises(
        InvalidArgumentError, match=f"sandbox id '{sandbox_id}': found a name of the VM factory"
    ):
        asyncio.run(create_sandbox(config, factory(config)))
    assert not sandbox_dir(sandbox_id).exists()


def test_a_pod_that_is_being_ended_takes_no_container(tmp_path: Path) -> None:
    config = sandbox_config("ending", tmp_path)

    async def body() -> None:
        sandbox = Sandbox(config, factory(config))
        sandbox._vm = cast("VM", object())
        sandbox.is_ending = True
        with pytest.raises(UnavailableError, match="container late: sandbox ending is being ended"):
            await sandbox.create_container(replace(config.container, id="late"))
        assert sandbox.containers == {}

    asyncio.run(body())


def test_of_works_done_together_none_outlives_the_failure_of_one() -> None:
    async def body() -> None:
        undone = []

        async def stay() -> None:
            try:
                await asyncio.sleep(1000)
            finally:
                await asyncio.sleep(0)
                undone.append("stay")

        async def fail() -> None:
            await asyncio.sleep(0)
            raise FailedPreconditionError("no")

        with pytest.raises(FailedPreconditionError, match="no"):
            await _together(stay(), fail(), asyncio.sleep(0))
        assert undone == ["stay"]

    asyncio.run(body())


class Small(Sandbox):
    """Its machine has room for 1 GiB, and time passes until that is known."""

    async def update_resources(self) -> None:
        await asyncio.sleep(0.01)
        if any(c.resources["memory"]["limit"] > 1 << 30 for c in self.containers.values()):
            raise FailedPreconditionError("there is room for 1 GiB")


class Obedient:
    async def update_container(self, container_id: str, resources: dict[str, Any]) -> None:
        pass


def test_an_update_that_is_refused_takes_nothing_from_one_at_the_same_time(tmp_path: Path) -> None:
    config = sandbox_config("pod", tmp_path)

    async def body() -> None:
        sandbox = Small(config, factory(config))
        sandbox.agent = cast("KataAgent", Obedient())
        container = Container(sandbox, config.container)
        container.resources = {"memory": {"limit": 1 << 20}}
        sandbox.containers["pod"] = container
        updates: list[dict[str, Any]] = [{"memory": {"limit": 1 << 40}}, {"cpu": {"quota": 1000}}]
        refused, done = await asyncio.gather(*map(container.update, updates), return_exceptions=True)
        assert (type(refused), done) == (FailedPreconditionError, None)
        assert container.resources == {"memory": {"limit": 1 << 20}, "cpu": {"quota": 1000}}

    asyncio.run(body())


@pytest.mark.parametrize("by_another_process", [False, True])
def test_a_pod_of_which_something_would_not_go_is_known_until_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_another_process: bool
) -> None:
    if os.geteuid() != 0:
        pytest.skip("cgroups need root")
    name = f"kata-py-unit-test-{secrets.token_hex(3)}"
    monkeypatch.setattr(persist, "RUN_VC", tmp_path)
    monkeypatch.setattr(resource_control, "OVERHEAD_ROOT", f"/{name}/overhead")
    monkeypatch.setattr(resource_control, "_REMOVE_TIMEOUT_S", 0.0)
    config = sandbox_config(name, tmp_path)
    spec = {"linux": {"cgroupsPath": f"/{name}/pod"}}
    config = replace(config, container=replace(config.container, spec=spec))
    points = [hierarchy.mount_point for hierarchy in resource_control.find_hierarchies()]

    def left() -> set[str]:
        """Of the pod's cgroups, anywhere."""
        paths = {"overhead": f"{name}/overhead/{name}", "sandbox": f"{name}/kata_pod"}
        return {each for each, path in paths.items() if any((point / path).exists() for point in points)}

    async def body() -> None:
        sandbox = Sandbox(config, factory(config))
        container = Container(sandbox, config.container)
        sandbox.containers[name] = container
        sandbox._state.cgroups = sandbox._cgroups.paths
        sandbox.save()
        for cgroup in (sandbox._cgroups.sandbox, sandbox._cgroups.overhead):
            assert cgroup
            cgroup.create()
        assert left() == {"overhead", "sandbox"}
        below = [point / name / "overhead" / name / "below" for point in points]
        for directory in below:
            directory.mkdir()

        async def delete() -> None:
            await (cleanup(name, name) if by_another_process else sandbox.delete())

        for _ in range(2):
            with pytest.raises(KataError, match=f"cgroup .*/{name}: Device or resource busy"):
                await delete()
            assert left() == {"overhead"}
            assert persist.load(name).cgroups == sandbox._cgroups.paths
        for directory in below:
            directory.rmdir()
        await delete()
        assert left() == set()
        sandbox.remove_container(container)
        if not by_another_process:
            with pytest.raises(NotFoundError):
                persist.load(name)

    try:
        asyncio.run(body())
    finally:
        for point in points:
            for directory, _, _ in os.walk(point / name, topdown=False):
                Path(directory).rmdir()


def resolver_of(source: Path) -> Container:
    spec = {"mounts": [{"destination": "/etc/resolv.conf", "source": str(source)}]}
    return cast("Container", SimpleNamespace(config=SimpleNamespace(spec=spec)))


def test_the_name_servers_are_read_from_the_file_that_is_mounted(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("nameserver 192.0.2.1\n\nsearch example\n")
    (tmp_path / "resolv.conf").symlink_to("real")
    assert _dns(resolver_of(tmp_path / "resolv.conf")) == ["nameserver 192.0.2.1", "search example"]


def test_a_resolv_conf_that_never_ends_is_refused(tmp_path: Path) -> None:
    """A guest may have written it, or somebody means another file."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").write_bytes(b"\n" * 70_000)
    (tmp_path / "binary").write_bytes(b"\xff")
    for name, found in (
        ("fifo", "found no regular file"),
        ("large", "found more than 65536 bytes"),
        ("binary", "can't decode"),
    ):
        with pytest.raises(InvalidArgumentError, match=f"/{name} of /etc/resolv.conf: .*{found}"):
            _dns(resolver_of(tmp_path / name))
    with pytest.raises(InvalidArgumentError, match=r"/dev/zero of /etc/resolv.conf: found no regular file"):
        _dns(resolver_of(Path("/dev/zero")))
