"""How a machine comes to be, after Kata's `factory.go`.

`direct` boots one for each pod. The other ways of [factory] will be chosen in `new_factory`.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from virtcontainers.config import FactoryConfig
from virtcontainers.hypervisor.base import Persisted
from virtcontainers.vm import VM, VMConfig

log = logging.getLogger(__name__)

OnPlanned = Callable[[Persisted], None]


class Factory(ABC):
    """A source of machines."""

    @abstractmethod
    async def get_vm(
        self, sandbox_id: str, config: VMConfig, *, shared_path: Path | None, on_planned: OnPlanned
    ) -> VM:
        """A running machine whose agent answers.

        `on_planned` gets what `Hypervisor.cleanup` needs, before the machine leaves its first trace on the
        host. Raises KataError's classes; nothing is left then.
        """


async def new_factory(config: FactoryConfig, vm: VMConfig, *, fetch_only: bool) -> Factory:
    """The factory that [factory] asks for.

    `fetch_only`: take what there is, and make nothing that outlives the pod. `vm` is the machine that a
    template or a cache would be for.
    """
    from virtcontainers.factory.direct import Direct

    for wanted, key in (
        (config.enable_template, "enable_template"),
        (config.vm_cache_number > 0, "vm_cache_number"),
    ):
        if wanted:
            log.warning("%s in [factory] is not implemented in this version: machines are booted", key)
    return Direct()
