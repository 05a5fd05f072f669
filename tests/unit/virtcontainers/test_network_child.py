"""The process in a namespace: what it may enter, and that it passes on what is said and handed over there."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.descriptors import open_descriptors
from tests.unit.netns import own_namespace
from virtcontainers.errors import InvalidArgumentError, KataError
from virtcontainers.network.child import NamespaceChild, open_namespace

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="entering a namespace needs root")


def test_the_hosts_namespace_is_not_opened() -> None:
    before = open_descriptors()
    for path in ("/proc/self/ns/net", f"/proc/{os.getpid()}/ns/net"):
        with pytest.raises(InvalidArgumentError, match="found the host's, expected the pod's own"):
            open_namespace(Path(path))
    assert open_descriptors() <= before


def test_a_namespace_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=f"network namespace {tmp_path}/gone: No such file"):
        open_namespace(tmp_path / "gone")


def test_what_is_no_network_namespace_is_not_entered(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    before = open_descriptors()
    for path in (tmp_path / "file", tmp_path / "fifo", Path("/proc/self/ns/mnt")):
        with pytest.raises(InvalidArgumentError, match=f"{path}: found something else, expected a network"):
            open_namespace(path)
    assert open_descriptors() <= before


@needs_root
def test_what_cannot_be_entered_is_told_whatever_is_asked() -> None:
    async def enter() -> None:
        namespace = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        try:
            async with NamespaceChild.inside(namespace) as child:
                for _ in range(2):
                    with pytest.raises(KataError, match="entering the network namespace: Invalid argument"):
                        await child.call("watch")
        finally:
            os.close(namespace)

    asyncio.run(enter())


@pytest.fixture
def quiet() -> Iterator[Path]:
    """A namespace in which nobody else does anything."""
    with own_namespace() as pid:
        yield Path(f"/proc/{pid}/ns/net")


@needs_root
def test_descriptors_and_errors_come_over_and_nothing_stays(quiet: Path) -> None:
    before, pids = open_descriptors(), []

    async def look() -> None:
        namespace = open_namespace(quiet)
        try:
            async with NamespaceChild.inside(namespace) as child:
                pids.append(child._pid)
                names, (watch,) = await child.call("watch")
                assert "lo" in names
                with pytest.raises(BlockingIOError):
                    os.read(watch, 4096)
                assert not os.get_inheritable(watch)
                os.close(watch)
                with pytest.raises(KataError, match="interface no-such: MTU 1500"):
                    await child.call("set_mtu", name="no-such", mtu=1500)
                # It goes on after an error.
                found, fds = await child.call("scan")
                assert {"lo"} | {link["name"] for link in found["links"]} == set(names)
                assert fds == []
        finally:
            os.close(namespace)

    asyncio.run(look())
    assert open_descriptors() <= before
    assert not Path(f"/proc/{pids[0]}").exists(), "it has ended, and was waited for"
