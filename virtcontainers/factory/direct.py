"""The factory that boots."""

from __future__ import annotations

import asyncio
from pathlib import Path

from virtcontainers.factory.base import FactoryBase, OnPlanned
from virtcontainers.vm import VM, VMConfig


class Direct(FactoryBase):
    """Boots a machine for each pod; any configuration fits."""

    def __init__(self, config: VMConfig) -> None:
        self.config = config

    async def get_base_vm(
        self, vm_id: str, config: VMConfig, *, shared_path: Path | None, on_planned: OnPlanned
    ) -> VM:
        vm = VM.new(vm_id, config, shared_path=shared_path, outlives_us=self.outlives_us)
        try:
            on_planned(vm.hypervisor.save())
            await vm.start()
        except BaseException:
            await asyncio.shield(vm.stop())
            raise
        return vm
