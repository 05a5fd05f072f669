"""QMP: qemu.qmp's client, with our errors and a timeout on everything."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qemu.qmp import ExecuteError, QMPClient, QMPError

from virtcontainers.hypervisor.base import HypervisorError, QMPClosed, QMPFailed, QMPTimeout

# What it logs at ERROR is raised as well, and here told with more words.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)

COMMAND_TIMEOUT_S = 10.0
_UNPLUG_AGAIN_S = 2.0
_POLL_S = 0.01


class QMP:
    """A connected monitor."""

    def __init__(self, client: QMPClient) -> None:
        """Use `connect`."""
        self._client = client
        self._sending_fd = asyncio.Lock()
        """QEMU keeps only the last that was sent, until it is given a name."""

    @classmethod
    async def connect(cls, path: Path, *, timeout_s: float) -> QMP:
        """Raises HypervisorError; nothing is left open then."""
        client = QMPClient()
        # Nobody reads the events; kept, they would grow with everything a guest can make QEMU tell.
        client.events.event_filter = lambda event: False
        try:
            async with asyncio.timeout(timeout_s):
                await client.connect(str(path))
        except TimeoutError:
            await _disconnect(client)
            raise HypervisorError(f"QEMU did not greet on {path} within {timeout_s:g} s") from None
        # The library asserts that it is connected, also when QEMU has ended by then.
        except (QMPError, OSError, EOFError, AssertionError) as error:
            await _disconnect(client)
            raise HypervisorError(f"no QMP on {path}: {str(error) or 'QEMU has ended'}") from error
        except BaseException:
            await _disconnect(client)
            raise
        return cls(client)

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> Any:
        """Raises QMPFailed, with the command's name and QEMU's reason, QMPTimeout when it does not answer,
        and QMPClosed when it ends."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._client.execute(command, arguments)
        except TimeoutError:
            raise QMPTimeout(f"QMP {command}: no answer within {timeout_s:g} s") from None
        except ExecuteError as error:
            raise QMPFailed(f"QMP {command}: {error}") from error
        except (QMPError, OSError, EOFError) as error:
            raise QMPClosed(f"QMP {command}: the connection to QEMU ended: {error}") from error

    async def send_fd(self, name: str, fd: int) -> None:
        """Give QEMU a duplicate of `fd` under a name, for `fd:NAME` in later commands. Raises QMPFailed."""
        await self._execute_with_fd("getfd", {"fdname": name}, fd)

    async def add_fd(self, fd: int) -> int:
        """Give QEMU a duplicate of `fd`; returns N of /dev/fdset/N, which is a file's name to it until
        `remove-fd`. Raises QMPFailed."""
        return int((await self._execute_with_fd("add-fd", {}, fd))["fdset-id"])

    async def _execute_with_fd(self, command: str, arguments: Mapping[str, object], fd: int) -> Any:
        async with self._sending_fd:
            try:
                self._client.send_fd_scm(fd)
            except (QMPError, OSError) as error:
                raise QMPClosed(f"QMP {command}: the descriptor was not sent: {error}") from error
            return await self.execute(command, arguments)

    async def unplug(self, device_id: str, *, timeout_s: float) -> None:
        """Have the guest let go of a device that was plugged in, and return when it is gone; idempotent.

        Raises HypervisorError when the guest keeps it.
        """
        clock = asyncio.get_running_loop().time
        deadline, never = clock() + timeout_s, float("-inf")
        asked_at = never
        while await self._has_device(device_id):
            if clock() > deadline and asked_at != never:
                raise HypervisorError(f"the guest has not let go of {device_id} within {timeout_s:g} s")
            if clock() - asked_at > _UNPLUG_AGAIN_S:
                asked_at = clock()
                # A guest that was just looking at the slot may have missed it.
                with contextlib.suppress(QMPFailed):
                    await self.execute("device_del", {"id": device_id})
            await asyncio.sleep(_POLL_S)

    async def _has_device(self, device_id: str) -> bool:
        devices = await self.execute("qom-list", {"path": "/machine/peripheral"})
        return any(device["name"] == device_id for device in devices)

    async def migrate(self, path: Path, *, timeout_s: float) -> None:
        """Write the device state to `path` (0600, replaced); the memory stays where it is.

        Memory is left out only where its backend is shared (x-ignore-shared). Raises QMPFailed.
        """
        await self._ignore_shared()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            # A file by descriptor: QEMU 7.2 has no file: URI, and exec: is denied by its sandbox.
            await self.send_fd("state", fd)
        finally:
            os.close(fd)
        await self.execute("migrate", {"uri": "fd:state"})
        await self._wait_migrated("migrate", timeout_s)

    async def migrate_incoming(self, path: Path, *, timeout_s: float) -> None:
        """Take the device state from `path`, into a QEMU with `-incoming defer`. Raises QMPFailed."""
        await self._ignore_shared()
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise QMPFailed(f"QMP migrate-incoming: {path}: {error.strerror}") from error
        try:
            await self.send_fd("state", fd)
        finally:
            os.close(fd)
        await self.execute("migrate-incoming", {"uri": "fd:state"})
        await self._wait_migrated("migrate-incoming", timeout_s)

    async def _ignore_shared(self) -> None:
        capability = {"capability": "x-ignore-shared", "state": True}
        await self.execute("migrate-set-capabilities", {"capabilities": [capability]})

    async def _wait_migrated(self, command: str, timeout_s: float) -> None:
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout_s
        while (status := (found := await self.execute("query-migrate")).get("status")) != "completed":
            if status in ("failed", "cancelled"):
                raise QMPFailed(f"QMP {command}: {found.get('error-desc', status)}")
            if clock() > deadline:
                raise QMPFailed(f"QMP {command}: {status} after {timeout_s:g} s, expected completed")
            await asyncio.sleep(0.002)

    async def close(self) -> None:
        """Idempotent; works on a dead QEMU."""
        await _disconnect(self._client)


async def _disconnect(client: QMPClient) -> None:
    # It raises what ended the connection; whoever had a command running has been told.
    with contextlib.suppress(QMPError, OSError, EOFError):
        await client.disconnect()
