"""Copies of files for a guest, while somebody else changes the files."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from virtcontainers.agent import KataAgent
from virtcontainers.copied_files import CopiedFile
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
