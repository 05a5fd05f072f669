"""What `delete` does when there is something to clean up."""

from __future__ import annotations

import asyncio

from virtcontainers import persist
from virtcontainers.cleanup import cleanup
from virtcontainers.errors import NotFoundError


def clean_up(sandbox_id: str, container_id: str) -> int:
    """Returns the pid that the hypervisor had, 0 when it is not known. Raises KataError."""
    try:
        pid = persist.load(sandbox_id).hypervisor.get("pid", 0)
    except NotFoundError:
        pid = 0
    asyncio.run(cleanup(sandbox_id, container_id))
    return pid if isinstance(pid, int) else 0
