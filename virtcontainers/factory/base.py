"""What every factory is made of, after Kata's `factory/base`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Protocol

from virtcontainers.hypervisor.base import Persisted
from virtcontainers.vm import VM, VMConfig


class OnPlanned(Protocol):
    """Told of a machine before it, or our hold on it, leaves its first trace on the host.

    `persisted` is what `Hypervisor.cleanup` needs. `share_of` names a machine whose share is there already:
    the sandbox takes it over by renaming it; None: the sandbox makes its own.
    """

    def __call__(self, persisted: Persisted, share_of: str | None = None) -> None: ...


class FactoryBase(ABC):
    """One way of making machines."""

    config: VMConfig
    """Its machines, before anything is plugged into them."""

    outlives_us: bool = False
    """Its machines live on when this process dies."""

    shares_already: bool = False
    """Its machines run and come with their share: how is no choice of the pod's any more."""

    @abstractmethod
    async def get_base_vm(
        self, vm_id: str, config: VMConfig, *, shared_path: Path | None, on_planned: OnPlanned
    ) -> VM:
        """A machine of `self.config`, with the share that `config` and `shared_path` name.

        It is RUNNING and its agent has answered, or it is PAUSED: then it is a copy, and knows neither the
        time nor any randomness of its own. Raises KataError's classes; nothing is left then.
        """

    def reject(self, reason: str) -> None:
        """Told that a copy could not be brought to life: the next machine is to come from something else."""
        return

    async def close_factory(self) -> None:
        """Remove what the factory keeps for machines to come; idempotent."""
        return
