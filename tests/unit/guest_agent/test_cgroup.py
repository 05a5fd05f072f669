"""What the kernel has killed for memory, where its own notice is late."""

import asyncio
import os
from pathlib import Path

from guest.agent.cgroup import OOMWatcher


def test_who_was_killed_for_memory_is_told_once(tmp_path: Path) -> None:
    """Of a file that cannot be polled: no notice comes."""
    events = tmp_path / "memory.events"

    async def body() -> None:
        told: list[str] = []
        watcher = OOMWatcher(told.append)
        events.write_text("low 0\nmax 9\noom 1\noom_kill 0\n")
        watcher._files[os.open(events, os.O_RDONLY)] = ("hungry", 0)
        watcher.check("hungry")
        assert told == []
        events.write_text("low 0\nmax 9\noom 1\noom_kill 2\n")
        watcher.check("another")
        assert told == []
        watcher.check("hungry")
        watcher.check("hungry")
        assert told == ["hungry"]

    asyncio.run(body())
