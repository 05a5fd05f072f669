"""What a fresh process needs to clean a pod up, on disk before the thing itself exists.

`/run/vc/sbs/<sandbox>/persist.json`, after Kata's place and name; the content is ours.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from virtcontainers import syscalls
from virtcontainers.config import RUN_VC
from virtcontainers.errors import NotFoundError

PERSIST_FILE = "persist.json"
_FORMAT = 1


@dataclass
class SandboxState:
    """One pod as persisted; paths are strings, `hypervisor` is `Hypervisor.save()`."""

    id: str
    shim_pid: int
    hypervisor: dict[str, Any] = field(default_factory=dict)
    rootfs: dict[str, str] = field(default_factory=dict)
    """Container id -> the host directory on which we mounted its root."""
    cgroups: list[str] = field(default_factory=list)
    """Paths in each hierarchy, in the order of their making."""
    network: dict[str, Any] = field(default_factory=dict)
    """`virtcontainers.network`'s, for its `cleanup`."""
    format: int = _FORMAT


def sandbox_dir(sandbox_id: str) -> Path:
    return RUN_VC / "sbs" / sandbox_id


def management_socket(sandbox_id: str) -> Path:
    """Kata's shim management; it goes with all that is here."""
    return sandbox_dir(sandbox_id) / "shim-monitor.sock"


@contextlib.contextmanager
def management_address(sandbox_id: str) -> Iterator[str]:
    """What to bind or connect to instead of `management_socket`: that may be longer than a socket's address
    can be. Raises OSError when there is no such sandbox."""
    path = management_socket(sandbox_id)
    with syscalls.opened(path.parent) as directory:
        yield str(syscalls.fd_path(directory) / path.name)


def store(state: SandboxState) -> None:
    """Write atomically: a reader sees the old state or the new one. Not synced: /run does not survive a
    power loss, and neither does what it describes."""
    directory = sandbox_dir(state.id)
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = directory / f".{PERSIST_FILE}.{os.getpid()}"
    temporary.write_text(json.dumps(asdict(state)))
    temporary.replace(directory / PERSIST_FILE)


def load(sandbox_id: str) -> SandboxState:
    """Raises NotFoundError when there is no such sandbox, or nothing readable of it."""
    path = sandbox_dir(sandbox_id) / PERSIST_FILE
    try:
        found = json.loads(path.read_text())
        return SandboxState(**found)
    except FileNotFoundError:
        raise NotFoundError(f"sandbox {sandbox_id} is not known: {path} does not exist") from None
    except (ValueError, TypeError) as error:
        raise NotFoundError(f"sandbox {sandbox_id}: {path} is not readable: {error}") from None


def destroy(sandbox_id: str) -> None:
    """Forget the sandbox; idempotent, also while another process does the same."""
    directory = sandbox_dir(sandbox_id)
    with contextlib.suppress(FileNotFoundError):
        for entry in list(directory.iterdir()):
            entry.unlink(missing_ok=True)
        directory.rmdir()
