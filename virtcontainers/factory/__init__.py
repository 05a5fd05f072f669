"""How a machine comes to be, after Kata's `factory.go`.

`direct` boots one for each pod, `template` clones one that was booted and saved, and `grpccache` asks a
server (`cache`) that keeps some of either ready.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

from virtcontainers.config import FactoryConfig
from virtcontainers.errors import KataError, UnavailableError
from virtcontainers.factory.base import FactoryBase, OnPlanned
from virtcontainers.factory.direct import Direct
from virtcontainers.hypervisor.base import HypervisorError, RestoreFailed, VMState
from virtcontainers.vm import VM, VMConfig

log = logging.getLogger(__name__)

_LEAST_TIMEOUT_S = 1.0

__all__ = ["Factory", "FactoryBase", "OnPlanned", "new_factory"]


class Factory:
    """Machines that are ready for their first container, from a base that may know less than is wanted.

    `otherwise` gives the factory to ask when the base has no machine to give; None: that is an error.
    """

    def __init__(
        self, base: FactoryBase, *, otherwise: Callable[[], Awaitable[Factory]] | None = None
    ) -> None:
        self.base = base
        self.otherwise = otherwise

    async def get_vm(
        self, vm_id: str, config: VMConfig, *, shared_path: Path | None, on_planned: OnPlanned
    ) -> VM:
        """A running machine of `config`, whose agent has answered, and which is nobody's twin.

        `on_planned` may be called more than once: what counts is the last call. Raises KataError's classes;
        nothing is left then.
        """
        logger = logging.LoggerAdapter(log, {"sandbox": vm_id})
        name = type(self.base).__name__
        if misfit := _misfit(self.base, config):
            logger.warning("it is booted, for the pod's machine is none of %s's: %s", name, misfit)
            return await Factory(Direct(config)).get_vm(
                vm_id, config, shared_path=shared_path, on_planned=on_planned
            )
        try:
            return await self._get_vm(vm_id, config, shared_path, on_planned)
        except KataError as error:
            if isinstance(error, RestoreFailed):
                self.base.reject(str(error))
            if self.otherwise is None:
                raise
            logger.warning("no machine from %s: %s", name, error)
        factory = await self.otherwise()
        return await factory.get_vm(vm_id, config, shared_path=shared_path, on_planned=on_planned)

    async def _get_vm(
        self, vm_id: str, config: VMConfig, shared_path: Path | None, on_planned: OnPlanned
    ) -> VM:
        clock = asyncio.get_running_loop().time
        started_at = clock()

        def left_s() -> float:
            # One dial_timeout for all of it: a pod whose clone hangs is to be booted in time.
            return max(_LEAST_TIMEOUT_S, started_at + config.agent.dial_timeout_s - clock())

        vm = await self.base.get_base_vm(vm_id, config, shared_path=shared_path, on_planned=on_planned)
        try:
            if vm.hypervisor.state is VMState.PAUSED:
                await vm.resume()
                try:
                    await vm.connect(left_s())
                except HypervisorError as error:
                    if vm.hypervisor.was_killed:
                        raise
                    raise RestoreFailed(str(error)) from error
                # Before anything else is asked of it: what it knows, other copies know.
                await vm.reseed_rng()
                await vm.sync_time()
                await vm.hypervisor.wait_plugged(left_s())
                log.info(
                    "the machine is from %s, after %.0f ms",
                    type(self.base).__name__,
                    1000 * (clock() - started_at),
                    extra={"sandbox": vm_id},
                )
            else:
                # The clock that it has from its RTC knows no parts of a second. A policy of the image's agent
                # may let nobody set it.
                try:
                    await vm.sync_time()
                except UnavailableError:
                    raise
                except KataError as error:
                    log.info("the clock stays as it is: %s", error, extra={"sandbox": vm_id})
            await _grow(vm, config)
        except BaseException:
            await asyncio.shield(vm.stop())
            raise
        return vm


async def _grow(vm: VM, wanted: VMConfig) -> None:
    vcpus = wanted.hypervisor.default_vcpus - vm.config.hypervisor.default_vcpus
    memory_mib = wanted.hypervisor.default_memory_mib - vm.config.hypervisor.default_memory_mib
    if vcpus <= 0 and memory_mib <= 0:
        return
    if vcpus > 0:
        await vm.add_cpus(vcpus)
    if memory_mib > 0:
        await vm.add_memory(memory_mib)
    await vm.online_cpu_memory()


def _misfit(base: FactoryBase, config: VMConfig) -> str:
    """How the base's machines differ from what is wanted, in ways that plugging cannot mend; "" for none."""
    found = base.config
    if isinstance(base, Direct) or found == config:
        return ""
    from virtcontainers.factory.fingerprint import differences, made_of, sharing

    hypervisor = replace(
        config.hypervisor,
        default_vcpus=found.hypervisor.default_vcpus,
        default_memory_mib=found.hypervisor.default_memory_mib,
    )
    misfits = differences(made_of(found), made_of(VMConfig(hypervisor, config.agent)))
    if base.shares_already:
        misfits += differences(sharing(found.hypervisor), sharing(hypervisor))
    return "; ".join(map(str, misfits))


async def new_factory(config: FactoryConfig, vm: VMConfig, *, fetch_only: bool) -> Factory:
    """The factory that [factory] asks for, for machines of `vm`.

    `fetch_only`: take what there is, and make nothing that outlives the pod. Raises KataError's classes when
    the cache's server does not answer, when there is no template, or it does not fit, or cannot be made.
    """

    if config.vm_cache_number > 0:
        from virtcontainers.factory.grpccache import GrpcCache

        return Factory(await GrpcCache.fetch(config.vm_cache_endpoint, vm))
    if config.enable_template:
        from virtcontainers.factory.template import Template

        path = config.template_path
        return Factory(Template.fetch(path, vm) if fetch_only else await Template.new(path, vm))
    return Factory(Direct(vm))
