"""What a sandbox refuses before it leaves a trace."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

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
from virtcontainers.errors import InvalidArgumentError
from virtcontainers.factory import Factory
from virtcontainers.factory.direct import Direct
from virtcontainers.persist import sandbox_dir
from virtcontainers.sandbox import _dns, create_sandbox
from virtcontainers.vm import VMConfig


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
    config = SandboxConfig(
        id=sandbox_id,
        hostname="",
        hypervisor=HypervisorConfig(),
        agent=AgentConfig(),
        factory=FactoryConfig(template_path=template_path),
        network=NetworkConfig(),
        container=ContainerConfig(
            id=sandbox_id,
            bundle=tmp_path,
            rootfs=RootFs(target=tmp_path),
            spec={},
            container_type=ContainerType.SINGLE_CONTAINER,
        ),
    )
    factory = Factory(Direct(VMConfig(config.hypervisor, config.agent)))
    with pytest.raises(
        InvalidArgumentError, match=f"sandbox id '{sandbox_id}': found a name of the VM factory"
    ):
        asyncio.run(create_sandbox(config, factory))
    assert not sandbox_dir(sandbox_id).exists()


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
