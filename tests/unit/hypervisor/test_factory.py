import asyncio
import logging

import pytest

from virtcontainers.config import AgentConfig, FactoryConfig, HypervisorConfig
from virtcontainers.factory import new_factory
from virtcontainers.factory.direct import Direct
from virtcontainers.vm import VMConfig

CONFIG = VMConfig(HypervisorConfig(), AgentConfig())


@pytest.mark.parametrize(
    ("config", "warning"),
    [
        (FactoryConfig(), []),
        (
            FactoryConfig(enable_template=True),
            ["enable_template in [factory] is not implemented in this version: machines are booted"],
        ),
        (
            FactoryConfig(vm_cache_number=3),
            ["vm_cache_number in [factory] is not implemented in this version: machines are booted"],
        ),
    ],
)
@pytest.mark.parametrize("fetch_only", [True, False])
def test_what_there_is_not_yet_is_said_and_machines_are_booted(
    config: FactoryConfig, warning: list[str], fetch_only: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        factory = asyncio.run(new_factory(config, CONFIG, fetch_only=fetch_only))
    assert isinstance(factory, Direct)
    assert [record.message for record in caplog.records] == warning
