"""What is decided before there is a machine; the machines are in tests/integration."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from katautils.config import RuntimeConfig
from katautils.create import create_container, create_sandbox
from katautils.factory import handle_factory
from virtcontainers.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from virtcontainers.factory.direct import Direct
from virtcontainers.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from virtcontainers.config import ContainerConfig

CRI = {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "pod"}


def create(bundle: Path, config: Path | None, container_id: str = "kata-py-unit-test") -> None:
    asyncio.run(create_sandbox(bundle, container_id, [], config, terminal=False))


class KnownSandbox:
    id = "pod"
    hypervisor_pid = 4711

    def __init__(self) -> None:
        self.containers: list[str] = []

    async def create_container(self, config: ContainerConfig) -> KnownContainer:
        self.containers.append(config.id)
        return KnownContainer(self, config)

    async def while_alive(self, work: Awaitable[None]) -> None:
        await work


class KnownContainer:
    def __init__(self, sandbox: KnownSandbox, config: ContainerConfig) -> None:
        self.sandbox = sandbox
        self.config = config

    async def delete(self) -> None:
        self.sandbox.containers.remove(self.config.id)


def test_a_container_of_a_pod_needs_its_pod(write_bundle: Callable[..., Path]) -> None:
    bundle = write_bundle({"annotations": CRI})
    with pytest.raises(FailedPreconditionError, match="belongs to sandbox pod, which has not been created"):
        create(bundle, None)


def test_only_containers_of_the_pod_join_it(write_bundle: Callable[..., Path]) -> None:
    pod = cast(Sandbox, KnownSandbox())

    def join(annotations: dict[str, str]) -> None:
        bundle = write_bundle({"annotations": annotations})
        asyncio.run(create_container(pod, bundle, "c2", [], terminal=False))

    with pytest.raises(InvalidArgumentError, match="c2: found a sandbox of its own, expected"):
        join({})
    with pytest.raises(InvalidArgumentError, match="c2: found sandbox other, expected pod"):
        join({**CRI, "io.kubernetes.cri.sandbox-id": "other"})


def test_a_creation_given_up_while_its_hooks_run_is_undone_with_the_hooks_for_it(
    write_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    def shell(script: str) -> dict[str, Any]:
        return {"path": "/bin/sh", "args": ["sh", "-c", script]}

    hooks = {
        "createRuntime": [shell(f"touch {tmp_path}/begun; exec sleep 1000")],
        "poststop": [shell(f"touch {tmp_path}/undone")],
    }
    bundle = write_bundle({"annotations": CRI, "hooks": hooks})
    pod = KnownSandbox()

    async def give_up() -> None:
        creating = asyncio.create_task(create_container(cast(Sandbox, pod), bundle, "c2", [], terminal=False))
        while not (tmp_path / "begun").exists():
            assert not creating.done()
            await asyncio.sleep(0.01)
        creating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await creating

    asyncio.run(give_up())
    assert (tmp_path / "undone").exists()
    assert pod.containers == []


def test_what_is_wrong_before_the_machine_is_told(
    write_bundle: Callable[..., Path], write_config: Callable[..., Path]
) -> None:
    bundle = write_bundle({"annotations": {"io.katacontainers.config.hypervisor.kernel": "/evil"}})
    with pytest.raises(InvalidArgumentError, match=r"hypervisor\.kernel is not enabled"):
        create(bundle, write_config())
    with pytest.raises(NotFoundError, match="configuration file /does/not/exist"):
        create(bundle, Path("/does/not/exist"))
    with pytest.raises(InvalidArgumentError, match=r"process\.args"):
        create(write_bundle({"process": {"cwd": "/"}}), write_config())


def test_the_warnings_and_the_debug_level_of_the_configuration_reach_the_log(
    write_bundle: Callable[..., Path], write_config: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    level = logging.getLogger().level
    config = write_config(hypervisor__qemu={"typo": 1}, runtime={"enable_debug": True})
    process = {"args": ["sh"], "cwd": "/", "terminal": True}
    mount = {"destination": "/dev/shm", "type": "bind", "source": "/does/not/exist"}
    try:
        with pytest.raises(InvalidArgumentError, match="mount /dev/shm: /does/not/exist"):
            create(write_bundle({"process": process, "mounts": [mount]}), config)
        assert logging.getLogger().level == logging.DEBUG
    finally:
        logging.getLogger().setLevel(level)
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "[hypervisor.qemu] typo" in warnings[0].getMessage()
    assert warnings[0].__dict__["sandbox"] == "kata-py-unit-test"
    assert "process.terminal is true in the spec and false in the request" in warnings[1].getMessage()


def test_without_a_factory_machines_are_booted(load: Callable[..., RuntimeConfig]) -> None:
    assert isinstance(asyncio.run(handle_factory(load())).base, Direct)


def test_a_factory_that_cannot_be_had_is_a_warning(
    load: Callable[..., RuntimeConfig], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    config = load(factory={"enable_template": True, "template_path": str(tmp_path / "file/template")})
    assert isinstance(asyncio.run(handle_factory(config)).base, Direct)
    assert "a new template is made: there is no template in" in caplog.text
    assert "no template can be made, the machine is booted:" in caplog.text
