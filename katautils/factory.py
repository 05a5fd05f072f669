"""Where the pod's machine comes from, after Kata's `HandleFactory`."""

from __future__ import annotations

import logging
from dataclasses import replace

from katautils.config import RuntimeConfig
from virtcontainers.errors import KataError
from virtcontainers.factory import Factory, new_factory
from virtcontainers.vm import VMConfig

log = logging.getLogger(__name__)


async def handle_factory(config: RuntimeConfig) -> Factory:
    """The factory of [factory]: the one that is there, else a new one, else one that boots.

    A template or a cache makes pods faster. So a factory that cannot be had is a warning, never an error.
    """
    vm = VMConfig(hypervisor=config.hypervisor, agent=config.agent)
    if config.factory.enable_template or config.factory.vm_cache_number:
        try:
            return await new_factory(config.factory, vm, fetch_only=True)
        except KataError as error:
            log.info("the VM factory is not there, it is made: %s", error)
        try:
            return await new_factory(config.factory, vm, fetch_only=False)
        except KataError as error:
            log.warning("the VM factory cannot be made, the machine is booted: %s", error)
    direct = replace(config.factory, enable_template=False, vm_cache_number=0)
    return await new_factory(direct, vm, fetch_only=False)
