"""What a sandbox refuses before it leaves a trace."""

from __future__ import annotations

import asyncio
from pathlib import Path

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
from virtcontainers.errors import InvalidArgumentError
from virtcontainers.factory import Factory
from virtcontainers.factory.direct import Direct
from virtcontainers.persist import sandbox_dir
from virtcontainers.sandbox import create_sandbox
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
