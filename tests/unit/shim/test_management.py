"""The management socket, between the shim and kata-py."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import cast

import pytest

from katautils.shim_client import do_get
from shim.events import Publisher
from shim.pod import Pod
from tests.unit.shim.local_sandbox import LocalSandbox
from virtcontainers import persist
from virtcontainers.errors import KataError, NotFoundError
from virtcontainers.sandbox import Sandbox


@pytest.mark.parametrize("sandbox_id", ["pod", "p" * 128])
def test_a_pod_is_reached_however_long_its_id_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sandbox_id: str
) -> None:
    """A socket's address has 108 bytes."""
    monkeypatch.setattr(persist, "RUN_VC", tmp_path)

    async def body() -> None:
        with pytest.raises(NotFoundError, match="nobody serves"):
            do_get(sandbox_id, "/agent-url")
        persist.store(persist.SandboxState(id=sandbox_id, shim_pid=7))
        with pytest.raises(NotFoundError, match="nobody serves"):
            do_get(sandbox_id, "/agent-url")
        pod = Pod("default", cast("Publisher", None))
        await pod._serve_management(cast("Sandbox", LocalSandbox(sandbox_id)))
        assert persist.management_socket(sandbox_id).is_socket()
        with pytest.raises(KataError, match="GET /nosuch: /nosuch: expected one of /metrics"):
            await asyncio.to_thread(do_get, sandbox_id, "/nosuch")
        assert pod._management is not None
        pod._management.close()
        persist.destroy(sandbox_id)

    asyncio.run(body())
