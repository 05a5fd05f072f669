"""A machine whose agent answers, after Kata's `vm.go`."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from agent_client.client import AgentClient
from agent_client.transports import AgentDialFailed, AgentDialTimeout
from virtcontainers.agent import KataAgent
from virtcontainers.config import RUN_VC, AgentConfig, HypervisorConfig
from virtcontainers.errors import KataError, UnavailableError
from virtcontainers.hypervisor.base import BootTimeout, HypervisorError, VMState
from virtcontainers.hypervisor.qemu import Qemu
from virtcontainers.online import ONLINE_TIMEOUT_S, Online

if TYPE_CHECKING:
    from virtcontainers.protocols.cache_pb2 import GrpcVM, GrpcVMConfig

log = logging.getLogger(__name__)

_SEED_BYTES = 512
"""As in Kata."""
_TIME_ROUND_TRIP_S = 0.08
_TIME_ATTEMPTS = 4


@dataclass(frozen=True)
class VMConfig:
    """All that a new machine depends on."""

    hypervisor: HypervisorConfig
    agent: AgentConfig

    def to_grpc(self) -> GrpcVMConfig:
        """Equal for equal configurations, and only for them."""
        from virtcontainers.protocols.cache_pb2 import GrpcVMConfig

        return GrpcVMConfig(
            Data=json.dumps(asdict(self.hypervisor), default=str).encode(),
            AgentConfig=json.dumps(asdict(self.agent), default=str).encode(),
        )


class VM:
    """One machine and the connection to its agent."""

    agent: AgentClient
    """There once `start` has returned."""

    def __init__(self, vm_id: str, config: VMConfig, hypervisor: Qemu) -> None:
        """Use `new`."""
        self.id = vm_id
        self.config = config
        self.hypervisor = hypervisor
        self._log = logging.LoggerAdapter(log, {"sandbox": vm_id})

    @classmethod
    def new(
        cls,
        vm_id: str,
        config: VMConfig,
        *,
        shared_path: Path | None,
        run_vc: Path = RUN_VC,
        outlives_us: bool = False,
    ) -> VM:
        """Plan a machine; nothing exists before `start`. Raises as `Hypervisor.create_vm`.

        It dies with this process, unless it `outlives_us`.
        """
        hypervisor = Qemu(
            vm_id,
            config.hypervisor,
            config.agent,
            shared_path=shared_path,
            run_vc=run_vc,
            outlives_us=outlives_us,
        )
        hypervisor.create_vm()
        return cls(vm_id, config, hypervisor)

    async def start(self, timeout_s: float | None = None) -> None:
        """Boot, and return when the agent has answered, with all vCPUs in use; None: within the agent's
        dial_timeout.

        A clone (`boot_from_template`) comes up paused: its agent is for `resume` and `connect`.

        Raises BootTimeout, with the end of the guest's console, when it does not; HypervisorError when
        QEMU or a daemon dies before; UnavailableError. Nothing is left then.
        """
        timeout_s = self.config.agent.dial_timeout_s if timeout_s is None else timeout_s
        deadline = asyncio.get_running_loop().time() + timeout_s
        await self.hypervisor.start_vm(timeout_s)
        if self.hypervisor.state is VMState.PAUSED:
            return
        try:
            await self.connect(max(0.0, deadline - asyncio.get_running_loop().time()))
            if self.hypervisor.command_line.boots_on_one_vcpu:
                await self._bring_up_vcpus()
        except BaseException:
            await asyncio.shield(self.stop())
            raise

    async def _bring_up_vcpus(self) -> None:
        try:
            await KataAgent(self.agent).online_cpu_mem(
                self.config.hypervisor.default_vcpus, cpu_only=True, timeout_s=ONLINE_TIMEOUT_S
            )
        except UnavailableError:
            raise
        except KataError as error:
            self._log.warning("the guest uses one vCPU: %s", error)

    async def connect(self, timeout_s: float) -> None:
        """Reach the agent, while watching that there still is a machine to answer. Raises as `start`."""
        deadline = asyncio.get_running_loop().time() + timeout_s

        async def dial() -> AgentClient:
            await self.hypervisor.wait_dialable(timeout_s)
            left_s = max(0.0, deadline - asyncio.get_running_loop().time())
            return await AgentClient.connect(self.hypervisor.agent_address, timeout_s=left_s)

        agent = asyncio.create_task(dial())
        death = asyncio.create_task(self.hypervisor.wait_dead())
        try:
            await asyncio.wait({agent, death}, return_when=asyncio.FIRST_COMPLETED)
            if not agent.done():
                raise HypervisorError(f"the machine ended before its agent answered: {death.result()}")
            self.agent = agent.result()
        except AgentDialTimeout as error:
            told = f"{error} (dial_timeout in [agent.kata]); {await self.hypervisor.describe_vcpus()}"
            raise BootTimeout(self.hypervisor.with_console_tail(told)) from error
        except AgentDialFailed as error:
            raise HypervisorError(str(error)) from error
        finally:
            await _cancel(agent, death)

    async def stop(self) -> None:
        """End everything of the machine; idempotent."""
        await self.disconnect()
        await self.hypervisor.stop_vm()

    async def pause(self) -> None:
        await self.hypervisor.pause_vm()

    async def resume(self) -> None:
        await self.hypervisor.resume_vm()

    async def unplug_hvsock(self) -> None:
        """Rid a running machine, disconnected, of what cannot be saved, and only its maker can dial."""
        await self.hypervisor.unplug_hvsock()

    async def save(self) -> None:
        """Save the devices' state of a machine booted to be a template; it must be paused."""
        await self.hypervisor.save_vm()

    async def reseed_rng(self) -> None:
        """Randomness of the host's for the guest's generator: nothing it gives from now on was known before.
        Raises KataError's classes."""
        await KataAgent(self.agent).reseed_random_dev(os.urandom(_SEED_BYTES))

    async def sync_time(self) -> None:
        """The host's time for the guest. Raises KataError's classes."""
        clock = asyncio.get_running_loop().time
        for _ in range(_TIME_ATTEMPTS):
            asked_at = clock()
            await KataAgent(self.agent).set_guest_date_time(time.time_ns())
            # The guest is behind by a part of the round trip.
            if clock() - asked_at <= _TIME_ROUND_TRIP_S:
                return

    async def find_size(self) -> None:
        """Ask the machine how large it is: what it was to give back earlier may have gone since. Raises
        HypervisorError."""
        await self._online.find_size()

    async def add_cpus(self, count: int) -> int:
        """Plug up to `count` vCPUs, as many as `default_maxvcpus` leaves room for; gives how many. They are
        of use after `online_cpu_memory`. Raises HypervisorError."""
        return await self._online.add_cpus(count)

    async def add_memory(self, mib: int, timeout_s: float = ONLINE_TIMEOUT_S) -> None:
        """Plug `mib`, rounded up to the guest's memory blocks; of use after `online_cpu_memory`.

        When the guest could not hold the page structures of all at once, it gets them in steps, each online
        before the next; `timeout_s` is for one. Raises OutOfSlots and AboveMaximum before anything is
        plugged, else as `online_cpu_memory`, with the steps before left to the guest.
        """
        await self._online.add_memory(mib, timeout_s)

    async def online_cpu_memory(self, timeout_s: float = ONLINE_TIMEOUT_S) -> None:
        """Return when the guest uses all that was plugged: its own total is what was asked for.

        Raises NotOnline, which names what is missing, or another KataError when QEMU or the agent fails; what
        the guest does not use is unplugged then, as far as it lets go of it.
        """
        await self._online.online(timeout_s)

    @cached_property
    def _online(self) -> Online:
        return Online(self.hypervisor, KataAgent(self.agent), self._log)

    def to_grpc(self) -> GrpcVM:
        """A paused machine, for `from_grpc` in another process."""
        from virtcontainers.protocols.cache_pb2 import GrpcVM

        config = self.hypervisor.config
        return GrpcVM(
            id=self.id,
            hypervisor=json.dumps(self.hypervisor.to_grpc()).encode(),
            cpu=config.default_vcpus,
            memory=config.default_memory_mib,
        )

    @classmethod
    def from_grpc(
        cls, found: GrpcVM, config: VMConfig, *, shared_path: Path | None, run_vc: Path = RUN_VC
    ) -> VM:
        """A machine of another process, for `attach`; nothing is touched before. Raises KataError for what
        `to_grpc` has not made."""
        try:
            hypervisor = Qemu.from_grpc(
                found.id,
                json.loads(found.hypervisor),
                config.hypervisor,
                config.agent,
                shared_path=shared_path,
                run_vc=run_vc,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise KataError(f"machine {found.id!r} cannot be taken over: {error!r}") from error
        return cls(found.id, config, hypervisor)

    def assign_sandbox(self, sandbox_id: str) -> None:
        """Before `attach`: whose machine it is to be. Its own id stays."""
        self.hypervisor.assign_sandbox(sandbox_id)

    async def attach(self, timeout_s: float) -> None:
        """Take it over, paused. Raises HypervisorError; what there is is for `stop` then."""
        await self.hypervisor.attach(timeout_s)

    async def detach(self) -> None:
        """Let go of a paused machine, for another process to `attach` to it; it can still be stopped.

        Before `pause`: `unplug_hvsock`."""
        await self.disconnect()
        await self.hypervisor.detach()

    async def disconnect(self) -> None:
        """Close the connection to the agent; idempotent."""
        if hasattr(self, "agent"):
            await self.agent.close()


async def _cancel(*tasks: asyncio.Task[object]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
