"""Ways to the agent inside a machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

AGENT_PORT = 1024
"""The vsock port every Kata agent listens on."""


@dataclass(frozen=True)
class VsockAddress:
    """The host kernel's vsock; `cid` is the machine's context id."""

    cid: int
    port: int = AGENT_PORT

    def __str__(self) -> str:
        return f"vsock://{self.cid}:{self.port}"


@dataclass(frozen=True)
class HybridVsockAddress:
    """A unix socket before the guest's vsock, as Firecracker and vhost-device-vsock have it."""

    path: Path
    port: int = AGENT_PORT

    def __str__(self) -> str:
        return f"hvsock://{self.path}:{self.port}"


@dataclass(frozen=True)
class SerialAddress:
    """The unix socket of the QEMU chardev behind the guest's virtio-serial port `agent.channel.0`."""

    path: Path

    def __str__(self) -> str:
        return f"serial://{self.path}"


AgentAddress = VsockAddress | HybridVsockAddress | SerialAddress
