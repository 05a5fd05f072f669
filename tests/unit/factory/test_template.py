"""Templates without machines: what of one is believed, what becomes of failures, and who may build."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from virtcontainers.config import AgentConfig
from virtcontainers.errors import DeadlineExceededError, FailedPreconditionError, KataError
from virtcontainers.factory import template
from virtcontainers.factory.template import (
    Template,
    TemplateMisfit,
    TemplateMissing,
    destroy,
    read_template,
    sweep,
)
from virtcontainers.vm import VMConfig


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vc/template"


# -- what is believed


def test_a_whole_one_is_taken(path: Path, vm_config: VMConfig, write_template: Any) -> None:
    build = write_template(path)
    fetched = Template.fetch(path, vm_config)
    assert fetched.config is vm_config
    assert fetched.info == read_template(path)
    assert fetched.info.memory == build / "memory" and fetched.info.state == build / "state"
    assert 0 <= time.time() - fetched.info.created < 60


def test_there_is_none(path: Path, vm_config: VMConfig, write_template: Any) -> None:
    for prepare in (
        lambda: None,
        lambda: path.parent.mkdir(),
        lambda: path.mkdir(),
        lambda: write_template(path),
    ):
        prepare()
        (path / "current").unlink(missing_ok=True)
        with pytest.raises(TemplateMissing, match=f"no template in {path}"):
            Template.fetch(path, vm_config)


def test_one_that_is_exchanged_while_it_is_read_is_read_again(
    path: Path, write_template: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = write_template(path)
    check = template._check_folder

    def exchanging(found: Path) -> None:
        check(found)
        if old.exists():
            write_template(path, "two")
            shutil.rmtree(old)

    monkeypatch.setattr(template, "_check_folder", exchanging)
    assert read_template(path).directory.name == "two"


def test_a_file_in_its_place_is_none(path: Path, vm_config: VMConfig) -> None:
    path.parent.mkdir()
    path.touch()
    with pytest.raises(TemplateMissing, match=str(path)):
        Template.fetch(path, vm_config)


def test_one_of_another_machine_is_told_by_its_parts(
    path: Path, vm_config: VMConfig, write_template: Any
) -> None:
    write_template(path)
    other = replace(vm_config.hypervisor, default_memory_mib=512, kernel_params="foo")
    with pytest.raises(TemplateMisfit) as raised:
        Template.fetch(path, VMConfig(other, vm_config.agent))
    assert {found.part for found in raised.value.differences} == {"memory", "kernel_params", "devices"}
    assert f"the template in {path} does not fit: memory: found 256M" in str(raised.value)
    assert "kernel_params: found nothing, expected foo" in str(raised.value)


def edit(build: Path, **changes: Any) -> None:
    found = json.loads((build / "template.json").read_text())
    found |= {key: value for key, value in changes.items() if value is not ...}
    for key, value in changes.items():
        if value is ...:
            del found[key]
    (build / "template.json").write_text(json.dumps(found))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


BREAKAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda b: b.rename(b.with_name("other")), "template.json"),
    "no memory": (lambda b: (b / "memory").unlink(), "memory"),
    "no state": (lambda b: (b / "state").unlink(), "state"),
    "no template.json": (lambda b: (b / "template.json").unlink(), "template.json"),
    "memory is a folder": (lambda b: replace_by_folder(b / "memory"), "memory"),
    "truncated memory": (lambda b: os.truncate(b / "memory", 4096), "memory: found 4096 bytes"),
    "longer memory": (lambda b: os.truncate(b / "memory", 2 << 20), "memory: found 2097152 bytes"),
    "empty memory": (lambda b: os.truncate(b / "memory", 0), "memory: found 0 bytes"),
    "written memory": (lambda b: flip(b / "memory"), "memory: found 1048576 bytes written at"),
    "truncated state": (lambda b: os.truncate(b / "state", 3), "state: found 3 bytes"),
    "empty state": (lambda b: os.truncate(b / "state", 0), "state: found 0 bytes"),
    "flipped state": (lambda b: flip(b / "state"), "state: found 19 bytes, CRC-32"),
    "huge state": (lambda b: os.truncate(b / "state", 1 << 40), "state: found"),
    "empty json": (lambda b: os.truncate(b / "template.json", 0), "template.json is not readable"),
    "half a json": (lambda b: os.truncate(b / "template.json", 100), "template.json is not readable"),
    "binary json": (lambda b: (b / "template.json").write_bytes(b"\xff\xfe\0"), "template.json is not"),
    "a list": (lambda b: (b / "template.json").write_text("[1]"), "template.json is not readable"),
    "a list in a list": (lambda b: (b / "template.json").write_text("[" * 100_000), "template.json is not"),
    "a number": (lambda b: (b / "template.json").write_text("1"), "template.json is not readable"),
    "a part is missing": (lambda b: edit(b, state_crc32=...), "state_crc32"),
    "a part more": (lambda b: edit(b, later="x"), "later"),
    "text for a number": (lambda b: edit(b, memory_bytes="1048576"), "memory_bytes"),
    "text for a checksum": (lambda b: edit(b, state_crc32="abc"), "state_crc32"),
    "a number for a time": (lambda b: edit(b, created=None), "created"),
    "made of nothing": (lambda b: edit(b, made_of=None), "made_of"),
    "made of a list": (lambda b: edit(b, made_of=["x"]), "made_of"),
    "made of numbers": (lambda b: edit(b, made_of={"kernel_params": 1}), "made_of"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_one_is_not_taken_and_what_is_broken_is_named(
    path: Path, vm_config: VMConfig, write_template: Any, name: str
) -> None:
    build = write_template(path)
    break_it, message = BREAKAGES[name]
    break_it(build)
    with pytest.raises(KataError) as raised:
        Template.fetch(path, vm_config)
    assert not isinstance(raised.value, TemplateMissing | TemplateMisfit)
    assert message in str(raised.value) and str(build) in str(raised.value)


# -- failures


class Progress(list[str]):
    """The steps of a builder."""

    def __call__(self, step: str) -> None:
        self.append(step)

    @property
    def tried(self) -> bool:
        return "making room" in self


@pytest.fixture
def in_the_way(path: Path) -> Path:
    """Somebody's file, because of which no template can be made there."""
    path.mkdir(parents=True)
    (path / "diary").write_text("dear")
    return path / "diary"


def new(path: Path, config: VMConfig, **options: Any) -> tuple[Progress, str]:
    """What a builder that must fail has done, and its error."""
    progress = Progress()
    with pytest.raises(KataError) as raised:
        asyncio.run(Template.new(path, config, on_progress=progress, **options))
    return progress, str(raised.value)


def test_files_of_others_are_not_mounted_over(path: Path, vm_config: VMConfig, in_the_way: Path) -> None:
    _, error = new(path, vm_config)
    assert f"template_path {path} is a folder with files in it" in error
    assert in_the_way.read_text() == "dear"
    assert not os.path.ismount(path)


@pytest.mark.parametrize("where", ["itself", "above"])
def test_a_file_where_the_folder_should_be_is_an_error_that_names_it(
    path: Path, vm_config: VMConfig, where: str
) -> None:
    (path.parent if where == "above" else path).parent.mkdir(exist_ok=True)
    (path.parent if where == "above" else path).touch()
    _, error = new(path, vm_config)
    assert str(path.parent) in error


def test_what_failed_is_not_tried_again_by_others_for_a_minute(
    path: Path, vm_config: VMConfig, in_the_way: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, error = new(path, vm_config)
    assert first.tried
    second, again = new(path, vm_config)
    assert not second.tried
    assert re.match(r"tried \d+ s ago: ", again) and error in again
    failed = path.with_name(".template.failed")
    assert failed.stat().st_mode & 0o777 == 0o600
    found = json.loads(failed.read_text())
    for ago_s, tried in ((30, False), (70, True)):
        failed.write_text(json.dumps(found | {"at": time.time() - ago_s}))
        assert new(path, vm_config)[0].tried is tried


@pytest.mark.parametrize("option", ["retry", "force"])
def test_a_person_may_try_again_at_once(
    path: Path, vm_config: VMConfig, in_the_way: Path, option: str
) -> None:
    new(path, vm_config)
    assert new(path, vm_config, **{option: True})[0].tried


def test_another_configuration_may_try_at_once(path: Path, vm_config: VMConfig, in_the_way: Path) -> None:
    new(path, vm_config)
    assert vm_config.hypervisor.kernel is not None
    os.utime(vm_config.hypervisor.kernel, ns=(1, 1))
    assert new(path, vm_config)[0].tried


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"at": "x", "made_of": {}, "reason": ""}'])
def test_an_unreadable_failure_is_none(path: Path, vm_config: VMConfig, in_the_way: Path, text: str) -> None:
    path.with_name(".template.failed").write_text(text)
    assert new(path, vm_config)[0].tried


def test_a_failure_of_the_future_is_none(path: Path, vm_config: VMConfig, in_the_way: Path) -> None:
    """The host's clock was set back."""
    new(path, vm_config)
    failed = path.with_name(".template.failed")
    failed.write_text(json.dumps(json.loads(failed.read_text()) | {"at": time.time() + 3600}))
    assert new(path, vm_config)[0].tried


def test_a_template_given_up_is_not_made_again_for_a_minute(
    path: Path, vm_config: VMConfig, write_template: Any
) -> None:
    write_template(path)
    Template.fetch(path, vm_config).reject("QEMU does not like it")
    with pytest.raises(TemplateMissing):
        Template.fetch(path, vm_config)
    progress, error = new(path, vm_config)
    assert not progress.tried
    assert "QEMU does not like it" in error


def test_who_gives_up_an_old_template_leaves_the_new_one(
    path: Path, vm_config: VMConfig, write_template: Any
) -> None:
    write_template(path, "one")
    old = Template.fetch(path, vm_config)
    write_template(path, "two")
    old.reject("QEMU does not like it")
    assert Template.fetch(path, vm_config).info.directory.name == "two"
    assert not path.with_name(".template.failed").exists()


def test_who_gives_up_a_template_that_was_destroyed_leaves_nothing(
    path: Path, vm_config: VMConfig, write_template: Any
) -> None:
    """Its clone was just starting: no wonder that it did not. The next pod may make a new one at once."""
    write_template(path)
    old = Template.fetch(path, vm_config)
    asyncio.run(destroy(path))
    old.reject("there is no state")
    assert list(path.parent.iterdir()) == []


# -- locks


HOLDER = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
fcntl.flock(fd, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def held(lock: Path) -> Iterator[subprocess.Popen[str]]:
    """By another process, until that dies."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch, vm_config: VMConfig) -> VMConfig:
    monkeypatch.setattr(template, "_LOCK_TIMEOUT_S", 0.2)
    monkeypatch.setattr(template, "_OTHERS_SAVE_S", 0.2)
    return VMConfig(vm_config.hypervisor, replace(vm_config.agent, dial_timeout_s=0.1))


def test_nobody_waits_for_ever(path: Path, impatient: VMConfig, in_the_way: Path) -> None:
    lock = path.with_name(".template.lock")
    with held(lock):
        progress, error = new(path, impatient)
        assert progress == ["waiting for another builder"]
        assert f"another builder holds {lock} for more than 0.3 s" in error
        with pytest.raises(DeadlineExceededError, match=f"another builder holds {lock}"):
            asyncio.run(destroy(path))
    # It is no failure of the template's.
    assert new(path, impatient)[0].tried


def test_a_pod_that_has_waited_in_vain_can_still_boot_in_time() -> None:
    """The kubelet's runtimeRequestTimeout is 2 minutes, and the wait and the boot are both in it."""
    patience_s = AgentConfig().dial_timeout_s + template._OTHERS_SAVE_S
    assert patience_s + AgentConfig().dial_timeout_s < 120


def test_a_builder_that_is_killed_blocks_nobody(path: Path, vm_config: VMConfig, write_template: Any) -> None:
    async def body(holder: subprocess.Popen[str]) -> None:
        progress = Progress()
        waiting = asyncio.create_task(Template.new(path, vm_config, on_progress=progress))
        while not progress:  # noqa: ASYNC110 - another builder's
            await asyncio.sleep(0.01)
        write_template(path)
        os.kill(holder.pid, signal.SIGKILL)
        async with asyncio.timeout(30):
            taken = await waiting
        assert taken.info.directory.name == "one"
        assert progress == ["waiting for another builder"]

    path.parent.mkdir()
    with held(path.with_name(".template.lock")) as holder:
        asyncio.run(body(holder))


def test_of_many_builders_one_fails_and_the_others_with_it(
    path: Path, vm_config: VMConfig, in_the_way: Path
) -> None:
    async def body() -> None:
        builders = [Progress() for _ in range(20)]
        errors = await asyncio.gather(
            *(Template.new(path, vm_config, on_progress=progress) for progress in builders),
            return_exceptions=True,
        )
        assert [progress.tried for progress in builders].count(True) == 1
        assert all(isinstance(error, KataError) for error in errors)
        assert all("is a folder with files in it" in str(error) for error in errors)

    asyncio.run(body())


def test_a_template_is_made_anew_only_by_force(path: Path, vm_config: VMConfig, write_template: Any) -> None:
    """Which here it cannot be: it is on a disk."""
    write_template(path)
    (path / "diary").touch()
    progress = Progress()
    taken = asyncio.run(Template.new(path, vm_config, on_progress=progress))
    assert taken.info.directory.name == "one" and progress == []
    assert new(path, vm_config, force=True)[0].tried
    # It failed, and the one before is as good as it was.
    assert Template.fetch(path, vm_config).info == taken.info


# -- the folder


def test_what_does_not_count_is_swept(path: Path, write_template: Any) -> None:
    for name in ("one", "two", "three"):
        (write_template(path, name) / "share").mkdir()
    asyncio.run(sweep(path))
    assert [build.name for build in (path / "builds").iterdir()] == ["three"]
    (path / "current").unlink()
    asyncio.run(sweep(path))
    asyncio.run(sweep(path))
    assert list((path / "builds").iterdir()) == []


def test_what_a_clone_is_about_to_use_is_not_swept(
    path: Path, vm_config: VMConfig, write_template: Any
) -> None:
    write_template(path, "one")
    fetched = Template.fetch(path, vm_config)
    with fetched._lease() as info:
        write_template(path, "two")
        asyncio.run(sweep(path))
        assert info.directory.name == "one" and info.memory.exists()
    asyncio.run(sweep(path))
    assert not info.directory.exists()
    # And who fetched it in time gets the one in its place.
    with fetched._lease() as info:
        assert info.directory.name == "two"


def test_who_comes_for_a_template_that_is_gone_is_told(
    path: Path, vm_config: VMConfig, write_template: Any
) -> None:
    write_template(path)
    fetched = Template.fetch(path, vm_config)
    assert asyncio.run(destroy(path))
    with pytest.raises(TemplateMissing), fetched._lease():
        pass


def test_destroy_can_be_repeated(path: Path, write_template: Any) -> None:
    path.parent.mkdir()
    assert not asyncio.run(destroy(path))
    write_template(path)
    assert asyncio.run(destroy(path))
    assert not path.exists()
    assert not asyncio.run(destroy(path))


def test_destroy_removes_what_is_left_of_a_broken_one(path: Path, write_template: Any) -> None:
    build = write_template(path)
    write_template(path, "half")
    (build / "memory").unlink()
    (build / ".template.json").touch()
    (build / "share").mkdir()
    (path / ".current").symlink_to("builds/half")
    (path / "memory").symlink_to("current/memory")
    assert asyncio.run(destroy(path))
    assert not path.exists()


def test_destroy_leaves_what_is_not_a_templates(path: Path, write_template: Any) -> None:
    write_template(path)
    (path / "diary").write_text("dear")
    with pytest.raises(FailedPreconditionError, match="found diary, expected a template alone"):
        asyncio.run(destroy(path))
    assert (path / "diary").read_text() == "dear"
    assert read_template(path)
