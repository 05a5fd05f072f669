"""Copies of what is watched, as a program sees them that waits for changes."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from guest.agent.watcher import Watcher
from virtcontainers.inotify import Inotify

TIMEOUT_S = 60


def publish(volume: Path, number: int, **files: str) -> None:
    """As kubelet does: new files, then one link that makes them count."""
    new = volume / f"..{number}"
    new.mkdir()
    for name, text in files.items():
        (new / name).write_text(text)
    (volume / "..data_tmp").symlink_to(new.name)
    (volume / "..data_tmp").rename(volume / "..data")
    for name in files:
        if not (volume / name).is_symlink():
            (volume / name).symlink_to(f"..data/{name}")


def withdraw(volume: Path, number: int, *gone: str) -> None:
    for name in gone:
        (volume / name).unlink()
    for file in (volume / f"..{number}").iterdir():
        file.unlink()
    (volume / f"..{number}").rmdir()


def watching(source: Path, target: Path, body: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        watcher = Watcher()
        assert await watcher.add(str(source), str(target))
        try:
            await asyncio.wait_for(body(), TIMEOUT_S)
        finally:
            watcher.remove(str(target))
        await until(lambda: not target.exists())

    asyncio.run(run())


async def until(look: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not look():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_who_waits_for_kubelets_link_is_told_and_finds_new_files_only(tmp_path: Path) -> None:
    volume, copy = tmp_path / "volume", tmp_path / "copy"
    volume.mkdir(mode=0o750)
    publish(volume, 1, colour="red", size="1")
    (volume / "..1/size").chmod(0o400)

    async def body() -> None:
        assert ((copy / "colour").read_text(), (copy / "size").read_text()) == ("red", "1")
        assert (copy.stat().st_mode & 0o777, (copy / "size").stat().st_mode & 0o777) == (0o750, 0o400)
        watch = Inotify()
        try:
            told = asyncio.Event()
            asyncio.get_running_loop().add_reader(watch.fd, told.set)
            watch.add(copy)
            publish(volume, 2, colour="green", shape="round")
            withdraw(volume, 1, "size")
            await told.wait()
            await until(lambda: (copy / "..data").readlink() == Path("..2"))
            assert (copy / "colour").read_text() == "green"
            await until(lambda: names(copy) == ["..2", "..data", "colour", "shape"])
            assert (copy / "shape").read_text() == "round"
        finally:
            asyncio.get_running_loop().remove_reader(watch.fd)
            watch.close()

    watching(volume, copy, body)


def test_files_without_kubelets_links_are_followed_too(tmp_path: Path) -> None:
    volume, copy = tmp_path / "volume", tmp_path / "copy"
    (volume / "folder").mkdir(parents=True)
    (volume / "folder/file").write_text("old")
    (volume / "link").symlink_to("folder")

    async def body() -> None:
        assert (copy / "link/file").read_text() == "old"
        (volume / "folder/file").write_text("newer")
        await until(lambda: (copy / "folder/file").read_text() == "newer")
        (volume / "link").unlink()
        (volume / "link").write_text("a file now")
        await until(lambda: not (copy / "link").is_symlink())
        (volume / "folder/file").unlink()
        (volume / "folder").rmdir()
        await until(lambda: names(copy) == ["link"])

    watching(volume, copy, body)


def test_a_folder_may_become_a_file_and_a_link_to_another_folder(tmp_path: Path) -> None:
    volume, copy = tmp_path / "volume", tmp_path / "copy"
    for name in ("one", "two", "kept"):
        (volume / name).mkdir(parents=True)
        (volume / name / "file").write_text(name)

    async def body() -> None:
        for name in ("one", "two"):
            (volume / name / "file").unlink()
            (volume / name).rmdir()
        (volume / "one").write_text("a file now")
        (volume / "two").symlink_to("kept")
        await until(lambda: (copy / "one").is_file() and (copy / "two").is_symlink())
        (volume / "last").touch()
        await until((copy / "last").exists)
        assert (copy / "one").read_text() == "a file now"
        assert (copy / "two/file").read_text() == "kept"

    watching(volume, copy, body)


def test_what_is_too_much_is_not_copied_and_what_becomes_it_stays_as_it_was(tmp_path: Path) -> None:
    volume, copy = tmp_path / "volume", tmp_path / "copy"
    volume.mkdir()
    (volume / "file").write_text("old")

    async def body() -> None:
        with (volume / "big").open("wb") as file:
            file.truncate((16 << 20) + 1)
        (volume / "file").write_text("newer")
        assert not await Watcher().add(str(volume), str(tmp_path / "other"))
        await asyncio.sleep(1.5)
        assert names(copy) == ["file"]
        (volume / "big").unlink()
        await until(lambda: (copy / "file").read_text() == "newer")

    watching(volume, copy, body)


def test_a_share_that_is_silent_holds_up_nobody_and_its_copy_goes_when_it_answers(tmp_path: Path) -> None:
    volume, copy = tmp_path / "volume", tmp_path / "copy"
    volume.mkdir()
    source = volume / "file"
    source.write_text("old")

    async def body() -> None:
        waits = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGIO, waits.set)
        watcher = Watcher()
        assert await watcher.add(str(volume), str(copy))
        # Who opens the file will wait, and is told of.
        with source.open("r+") as file:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            file.write("newer")
            file.flush()
            await waits.wait()
            assert (copy / "file").read_text() == "old"
            watcher.remove(str(copy))
            again = asyncio.ensure_future(watcher.add(str(volume), str(copy)))
            await asyncio.sleep(0.1)
            assert not again.done()
            assert (copy / "file").read_text() == "old"
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        assert await again
        assert (copy / "file").read_text() == "newer"
        watcher.remove(str(copy))
        await until(lambda: not copy.exists())

    asyncio.run(asyncio.wait_for(body(), TIMEOUT_S))


@pytest.mark.parametrize("moment", ["listed", "looked at", "being copied"])
def test_what_is_exchanged_while_it_is_copied_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    volume, copy = tmp_path / "volume", tmp_path / "copy"
    volume.mkdir()
    publish(volume, 1, colour="red", size="1")
    exchanges = iter([2])

    def exchange() -> None:
        for number in exchanges:
            publish(volume, number, colour="green", size="2")
            withdraw(volume, 1)

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            exchange()
            return function(*args, **options)

        return wrapped

    def walk(top: str) -> Iterator[tuple[str, list[str], list[str]]]:
        for found in os_walk(top):
            exchange()
            yield found

    os_walk = os.walk
    if moment == "listed":
        monkeypatch.setattr(os, "walk", walk)
    elif moment == "looked at":
        monkeypatch.setattr(os, "lstat", before(os.lstat))
    else:
        monkeypatch.setattr(shutil, "copyfile", before(shutil.copyfile))

    async def body() -> None:
        assert names(copy) == ["..2", "..data", "colour", "size"]
        assert ((copy / "colour").read_text(), (copy / "size").read_text()) == ("green", "2")

    watching(volume, copy, body)


def test_a_link_that_is_renamed_while_it_is_looked_at_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume, copy = tmp_path / "volume", tmp_path / "copy"
    volume.mkdir()
    publish(volume, 1, colour="red")
    (volume / "..data_tmp").symlink_to("..1")
    lstat = os.lstat

    def look(path: str, **options: Any) -> os.stat_result:
        status = lstat(path, **options)
        if path.endswith("..data_tmp"):
            (volume / "..data_tmp").rename(volume / "..data")
        return status

    monkeypatch.setattr(os, "lstat", look)

    async def body() -> None:
        assert names(copy) == ["..1", "..data", "colour"]
        assert (copy / "colour").read_text() == "red"

    watching(volume, copy, body)
