"""What a sandbox needs of a hypervisor, under Kata's names (`virtcontainers/hypervisor.go`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent_client.transports import AgentAddress
from virtcontainers.errors import DeadlineExceededError, KataError, UnavailableError

if TYPE_CHECKING:
    from virtcontainers.hypervisor.hotplug_block import BlockDrive, PluggedDrive

Persisted = dict[str, Any]
"""Plain JSON: all that `Hypervisor.cleanup` needs in a fresh process."""


class HypervisorError(KataError):
    """The machine could not be made, changed or ended."""


class BootTimeout(HypervisorError, DeadlineExceededError):
    """QEMU, or a daemon beside it, was not ready in time; the message carries the tail of its log."""


class RestoreFailed(HypervisorError):
    """A saved machine cannot be continued: QEMU refuses its state, or what came of it does not answer."""


class QMPFailed(HypervisorError):
    """QEMU refused a QMP command; the message names the command and QEMU's reason."""


class QMPTimeout(QMPFailed):
    """QEMU has not answered in time; nothing is known of what it makes of the command."""


class QMPClosed(QMPFailed, UnavailableError):
    """QEMU is gone, or about to be."""


class VMState(Enum):
    """A machine's life; `Hypervisor.require` refuses what does not fit."""

    NEW = "new"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"


@dataclass(frozen=True)
class NetDevice:
    """A TAP, and the network card in front of it. The descriptors stay their owner's."""

    tap: str
    hardware_addr: str
    fds: Sequence[int]
    """One a queue."""
    vhost_fds: Sequence[int] = ()
    """As many, or none: QEMU itself carries the frames then."""


class Hypervisor(ABC):
    """One machine.

    `create_vm` only plans (command line, addresses); nothing exists on the host before `start_vm`, so
    `save()` taken between the two is all that a later `cleanup` needs.
    """

    state: VMState = VMState.NEW

    def require(self, *states: VMState) -> None:
        """Raise HypervisorError unless the machine is in one of `states`."""
        if self.state not in states:
            wanted = " or ".join(s.value for s in states)
            raise HypervisorError(f"the machine is {self.state.value}, expected {wanted}")

    @abstractmethod
    def create_vm(self) -> None:
        """Plan the machine: NEW -> CREATED. Raises InvalidArgumentError or HypervisorError for a missing
        kernel, initrd, QEMU or daemon, with the path and the key that names it. Touches nothing."""

    @abstractmethod
    async def start_vm(self, timeout_s: float) -> None:
        """Start QEMU (and virtiofsd, vhost-device-vsock): CREATED -> RUNNING. On failure everything that
        was started is gone again and the tail of QEMU's log is in the error."""

    @abstractmethod
    async def stop_vm(self) -> None:
        """End every process of the machine and wait for it; idempotent, from any state -> STOPPED."""

    @abstractmethod
    async def pause_vm(self) -> None:
        """RUNNING -> PAUSED."""

    @abstractmethod
    async def resume_vm(self) -> None:
        """PAUSED -> RUNNING."""

    @abstractmethod
    async def save_vm(self) -> None:
        """Save the device state of a PAUSED template machine to `devices_state_path`."""

    @property
    @abstractmethod
    def vcpus(self) -> int:
        """As many as the machine had when `find_size` or a change of it last asked."""

    @property
    @abstractmethod
    def memory_mib(self) -> int:
        """As much as the guest was given, likewise."""

    @abstractmethod
    async def find_size(self, *, timeout_s: float) -> None:
        """What is unplugged may go after nobody waits for it any more. Raises HypervisorError."""

    @abstractmethod
    async def hotplug_vcpus(self, count: int) -> int:
        """Plug up to `count` vCPUs into a RUNNING machine: as in Kata no more than the maximum allows, which
        is logged. Gives how many. Raises HypervisorError."""

    @abstractmethod
    async def hotunplug_vcpus(self, count: int, *, timeout_s: float) -> int:
        """Unplug up to `count` of those, as far as the guest lets go of them in time; the others stay, which
        is logged. Gives how many have gone. Raises HypervisorError."""

    @abstractmethod
    async def plan_hotplug_memory(self, mib: int, block_mib: int) -> list[int]:
        """What to give to `hotplug_memory`, one after another, to have `mib` more in the guest's memory
        blocks. Raises OutOfSlots or AboveMaximum."""

    @abstractmethod
    async def hotplug_memory(self, mib: int) -> None:
        """Plug memory into a RUNNING machine. Raises OutOfSlots, AboveMaximum, or another HypervisorError;
        nothing was plugged then."""

    @abstractmethod
    async def memory_not_taken(self) -> str:
        """Which of the plugged memory the guest is still to look at, in words; "" for none of it."""

    @abstractmethod
    async def hotunplug_memory(self, mib: int, *, timeout_s: float) -> int:
        """Take up to `mib` back of what was plugged, as far as the guest can spare it in time; the rest
        stays, which is logged. Gives how many MiB have gone. Raises HypervisorError."""

    @abstractmethod
    async def hotplug_block(self, drive: BlockDrive) -> PluggedDrive:
        """Plug a disk into a RUNNING machine. Raises HypervisorError; nothing was plugged then."""

    @abstractmethod
    async def hotunplug_block(self, plugged: PluggedDrive, *, timeout_s: float) -> None:
        """Unplug it. Raises HypervisorError when the guest does not let go of it in time: it stays then."""

    @abstractmethod
    async def resize_block(self, plugged: PluggedDrive, size_bytes: int) -> None:
        """Have the guest see that it has grown to so many bytes; a file does so. Raises InvalidArgumentError
        for fewer than it has, and HypervisorError."""

    @abstractmethod
    async def hotplug_net(self, device: NetDevice) -> str:
        """Plug a network card into a RUNNING machine; gives its PCI path, for the agent. The descriptors can
        be closed afterwards. Raises HypervisorError; nothing was plugged then."""

    @abstractmethod
    async def hotunplug_net(self, tap: str, *, timeout_s: float) -> None:
        """Return when the guest has let go of it and the TAP is closed. Raises HypervisorError."""

    @abstractmethod
    async def wait_dead(self) -> str:
        """Return when QEMU or virtiofsd has died, for whatever reason, with a sentence that says which
        and how (exit code or signal, tail of the log)."""

    @property
    @abstractmethod
    def was_killed(self) -> bool:
        """Somebody, or the kernel that was out of memory, has killed QEMU or a daemon: the guest is not to
        blame."""

    @property
    @abstractmethod
    def agent_address(self) -> AgentAddress:
        """Where the guest's agent can be dialled; valid from CREATED on."""

    @property
    @abstractmethod
    def pid(self) -> int:
        """QEMU's pid; RUNNING or PAUSED only."""

    @abstractmethod
    def get_pids(self) -> list[int]:
        """QEMU first, then its daemons."""

    @abstractmethod
    def get_thread_ids(self) -> dict[int, int]:
        """vCPU index -> thread id, as last asked from QEMU."""

    @abstractmethod
    def save(self) -> Persisted:
        """What `cleanup` needs; valid from CREATED on."""

    @classmethod
    @abstractmethod
    async def cleanup(cls, persisted: Persisted) -> None:
        """In a fresh process: end what is left of a machine saved by `save()`, remove its sockets and
        directory. Idempotent; never ends a process that is not this machine's."""


def vm_dir(run_vc: Path, vm_id: str) -> Path:
    """`/run/vc/vm/<id>`: sockets, logs, pid files of one machine. 0700."""
    return run_vc / "vm" / vm_id
