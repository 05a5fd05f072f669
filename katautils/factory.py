"""Where the pod's machine comes from, after Kata's `HandleFactory`."""

from __future__ import annotations

import logging
from dataclasses import replace

from katautils.config import RuntimeConfig
from virtcontainers.config import FactoryConfig
from virtcontainers.errors import KataError
from virtcontainers.factory import Factory, new_factory
from virtcontainers.vm import VMConfig

log = logging.getLogger(__name__)


async def handle_factory(config: RuntimeConfig) -> Factory:
    """The factory of [factory]: the one that is there, else a new one, else one that boots.

    A template or a cache makes pods faster. So a factory that cannot be had is a warning, never an error. It
    is made for the files' configuration: what a pod's annotations change is plugged in, or booted.
    """
    try:
        base = config.without_annotations
    except KataError as error:
        log.warning("the machine is booted: without the pod's annotations, %s", error)
        base = replace(config, factory=FactoryConfig())
    return await _handle(base.factory, VMConfig(hypervisor=base.hypervisor, agent=base.agent))


async def _handle(config: FactoryConfig, vm: VMConfig) -> Factory:
    async def without_cache() -> Factory:
        return await _handle(replace(config, vm_cache_number=0), vm)

    async def direct() -> Factory:
        return await new_factory(FactoryConfig(), vm, fetch_only=False)

    if config.vm_cache_number:
        try:
            factory = await new_factory(config, vm, fetch_only=True)
        except KataError as error:
            log.warning("the VM cache is not used: %s", error)
            return await without_cache()
        factory.otherwise = without_cache
        return factory
    if not config.enable_template:
        return await direct()
    try:
        factory = await new_factory(config, vm, fetch_only=True)
    except KataError as error:
        log.warning("a new template is made: %s", error)
        try:
            factory = await new_factory(config, vm, fetch_only=False)
        except KataError as failure:
            log.warning("no template can be made, the machine is booted: %s", failure)
            return await direct()
    factory.otherwise = direct
    return factory
