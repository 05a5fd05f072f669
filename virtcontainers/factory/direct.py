"""The factory that boots."""

from __future__ import annotations

import asyncio
from pathlib import Path

from virtcontainers.factory import Factory, OnPlanned
from virtcontainers.vm import VM, VMConfig


class Direct(Factory):
    """Boots a machine for each pod."""

    async def get_vm(
        self, sandbox_id: str, config: VMConfig, *, shared_path: Path | None, on_planned: OnPlanned
    ) -> VM:
        vm = VM.new(sandbox_id, config, shared_path=shared_path)
        try:
            on_planned(vm.hypervisor.save())
            await vm.start()
        except BaseException:
            await asyncio.shield(vm.stop())
            raise
        return vm
