"""Copies of files for a guest, while somebody else changes the files."""

from __future__ import annotations

import asyncio
import logging
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from virtcontainers.agent import KataAgent
from virtcontainers.copied_files import CopiedFile, FileWatch
from virtcontainers.errors import KataError


class Agent:
    """Remembers what it was sent; refuses a path through what is no folder, as agents do."""

    def __init__(self, *, meanwhile: Callable[[], None] = lambda: None) -> None:
        self.has: dict[str, tuple[int, bytes]] = {}
        self._meanwhile = meanwhile

    async def copy_file(self, path: str, data: bytes, *, mode: int, uid: int, gid: int) -> None:
        self._meanwhile()
        above = path.rpartition("/")[0]
        if above in self.has and not stat.S_ISDIR(self.has[above][0]):
            raise KataError(f"CopyFile {path}: Not a directory")
        if not stat.S_ISDIR(mode):
            for gone in [name for name in self.has if name.startswith(path + "/")]:
                del self.has[gone]
        self.has[path] = mode, data


def update(copied: CopiedFile, agent: Agent) -> None:
    asyncio.run(copied.update(cast(KataAgent, agent)))


@pytest.mark.parametrize("kind", ["link", "way", "fifo"])
def test_a_file_that_another_pods_guest_changes_for_a_link_or_a_fifo_is_not_followed(
    tmp_path: Path, kind: str
) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/file").write_text("the host's")
    volume = tmp_path / "volume"
    (volume / "way").mkdir(parents=True)
    file = volume / "way/file"
    file.write_text("the volume's")

    def change() -> None:
        if kind == "way" and not (volume / "way").is_symlink():
            (volume / "way").rename(volume / "aside")
            (volume / "way").symlink_to(tmp_path / "secret")
        elif kind != "way" and file.is_file() and not file.is_symlink():
            file.unlink()
            file.symlink_to(tmp_path / "secret/file") if kind == "link" else os.mkfifo(file)

    agent = Agent(meanwhile=change)
    copied = CopiedFile(volume, "/copy")
    with pytest.raises(KataError, match=f"{file}: "):
        update(copied, agent)
    assert b"the host's" not in [data for _, data in agent.has.values()]


def test_a_folder_may_become_a_link_or_a_file(tmp_path: Path) -> None:
    for name in ("one/below", "two"):
        (tmp_path / "volume" / name).mkdir(parents=True)
        (tmp_path / "volume" / name / "file").write_text("old")
    agent, copied = Agent(), CopiedFile(tmp_path / "volume", "/copy")
    update(copied, agent)
    for name in ("one", "two"):
        (tmp_path / "volume" / name).rename(tmp_path / name)
    (tmp_path / "volume/one").symlink_to("two")
    (tmp_path / "volume/two").write_text("new")
    update(copied, agent)
    assert {path: data for path, (_, data) in agent.has.items()} == {
        "/copy": b"",
        "/copy/one": b"two",
        "/copy/two": b"new",
    }
    assert copied.folders == [""]


def publish(volume: Path, number: int) -> None:
    """As kubelet does: new files, then one link that makes them count; the old ones go."""
    new = volume / f"..{number}"
    new.mkdir()
    (new / "key").write_text(str(number))
    (volume / "..data_tmp").symlink_to(new.name)
    (volume / "..data_tmp").rename(volume / "..data")
    if number > 1:
        (volume / f"..{number - 1}/key").unlink()
        (volume / f"..{number - 1}").rmdir()


def test_what_is_exchanged_while_it_is_looked_at_is_not_half_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, 1)
    fwalk, numbers = os.fwalk, iter([2])

    def walk(*args: Any, **options: Any) -> Iterator[Any]:
        for found in fwalk(*args, **options):
            for number in numbers:
                publish(tmp_path, number)
            yield found

    monkeypatch.setattr(os, "fwalk", walk)
    agent = Agent()
    update(CopiedFile(tmp_path, "/copy"), agent)
    assert {path: data for path, (_, data) in agent.has.items()} == {
        "/copy": b"",
        "/copy/..2": b"",
        "/copy/..2/key": b"2",
        "/copy/..data": b"..2",
    }


def test_a_container_is_made_with_files_that_are_exchanged_while_they_are_sent(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    numbers = iter([2])

    def exchange() -> None:
        for number in numbers:
            publish(tmp_path, number)

    async def body() -> dict[str, tuple[int, bytes]]:
        agent = Agent(meanwhile=exchange)
        log = logging.LoggerAdapter(logging.getLogger(__name__))
        watch = FileWatch(cast(KataAgent, agent), [CopiedFile(tmp_path, "/copy")], log)
        try:
            await watch.start()
            return agent.has
        finally:
            await watch.close()

    has = asyncio.run(body())
    assert has["/copy/..data"][1] == b"..2"
    assert has["/copy/..2/key"][1] == b"2"
