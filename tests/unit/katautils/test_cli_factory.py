from __future__ import annotations

import dataclasses
import json
import os
import pty
import re
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from katautils.cli import check as cli_check
from katautils.cli.check import Finding, Status
from katautils.cli.factory import vm_config
from katautils.config import load_configuration
from virtcontainers.factory.fingerprint import made_of
from virtcontainers.factory.template import TemplateInfo
from virtcontainers.hypervisor.process import MARK

WriteConfig = Callable[..., Path]

MIB = 1 << 20
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes root")


def factory(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "katautils.cli.main", "factory", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=120,
    )


def status_json(config: Path) -> dict[str, Any]:
    result = factory("status", "--json", "--config", config)
    assert (result.returncode, result.stderr) == (0, "")
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def clone_of_json(found: dict[str, Any], pid: int) -> dict[str, Any]:
    """Of others' machines with copies of memory nobody knows whose template it was: they are there too."""
    clones: list[dict[str, Any]] = found["clones"]
    (one,) = (clone for clone in clones if clone["pid"] == pid)
    return one


def table(output: str) -> dict[str, str]:
    """The lines that have a name and a value."""
    rows = [re.split(r"  +", line.strip(), maxsplit=1) for line in output.splitlines()]
    return {row[0]: row[1] for row in rows if len(row) == 2}


@pytest.fixture
def config(write_config: WriteConfig, tmp_path: Path) -> Path:
    """With a template, of files that are there."""
    for name in ("kernel", "initrd", "qemu"):
        (tmp_path / name).write_text(name)
    return write_config(
        hypervisor__qemu={
            "path": str(tmp_path / "qemu"),
            "kernel": str(tmp_path / "kernel"),
            "initrd": str(tmp_path / "initrd"),
            "shared_fs": "virtio-9p",
        },
        factory={
            "enable_template": True,
            "template_path": str(tmp_path / "template"),
            "vm_cache_endpoint": str(tmp_path / "cache.sock"),
        },
    )


@pytest.fixture
def template(config: Path, tmp_path: Path) -> Path:
    """A template that fits, as files; no machine could be cloned from it."""
    path = tmp_path / "template"
    build = path / "builds/1"
    build.mkdir(parents=True)
    (build / "memory").write_bytes(b"m" * MIB)
    (build / "state").write_bytes(b"state")
    info = TemplateInfo(
        directory=build,
        created=time.time() - 3 * 3600,
        made_of=made_of(vm_config(load_configuration(config))),
        memory_bytes=MIB,
        memory_allocated_bytes=MIB,
        memory_mtime_ns=(build / "memory").stat().st_mtime_ns,
        state_bytes=5,
        state_crc32=zlib.crc32(b"state"),
        booted_bytes=9 * MIB,
        given_back_bytes=5 * MIB,
        zero_bytes=3 * MIB,
    )
    written = {key: value for key, value in dataclasses.asdict(info).items() if key != "directory"}
    (build / "template.json").write_text(json.dumps(written))
    (path / "current").symlink_to("builds/1")
    (path / "memory").symlink_to("current/memory")
    return path


CLONE = """
import mmap, os, sys
with open(os.environ["KATA_PY_VM"] + "/pid", "w") as file:
    print(os.getpid(), file=file)
fd = os.open(sys.argv[1], os.O_RDWR)
memory = mmap.mmap(fd, 0, mmap.MAP_PRIVATE)
sum(memory[::4096])
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def clone(template: Path, tmp_path: Path) -> Iterator[int]:
    """A process that maps the template's memory as a clone does; its pid."""
    (tmp_path / "some-pod").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", CLONE, template / "memory"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={MARK: str(tmp_path / "some-pod")},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    yield process.pid
    process.communicate()


CACHE = """
import asyncio, sys
from pathlib import Path
from katautils.cli.factory import vm_config
from katautils.config import load_configuration
from virtcontainers.factory.cache import CacheServer
from virtcontainers.factory.direct import Direct
config = load_configuration(Path(sys.argv[1]))
vm = vm_config(config)
asyncio.run(CacheServer(config.factory.vm_cache_endpoint, 0, Direct(vm), vm).run())
"""


@pytest.fixture
def cache(config: Path, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server that has no machines, of the configuration at its start."""
    process = subprocess.Popen([sys.executable, "-c", CACHE, config])
    while status_json(config)["cache"]["server_pid"] is None:
        assert process.poll() is None
    yield process
    process.terminate()
    process.wait(timeout=60)


def test_an_action_is_needed() -> None:
    result = factory()
    assert result.returncode == 2
    assert "ACTION" in result.stderr
    assert all(action in factory("--help").stdout for action in ("init", "destroy", "status"))


# -- init


def test_init_of_nothing_names_the_keys(write_config: WriteConfig) -> None:
    path = write_config()
    result = factory("init", "--config", path)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"kata-py: {path}: [factory]: found neither enable_template nor vm_cache")
    assert len(result.stderr.splitlines()) == 1


@as_root
def test_init_takes_a_template_that_fits(config: Path, template: Path) -> None:
    for _ in range(2):
        result = factory("init", "--config", config)
        assert (result.returncode, result.stderr) == (0, "")
        assert re.fullmatch(
            rf"The template in {template} fits already: made 2.*, 1\.0 MiB; --force .*\.\n", result.stdout
        )


@as_root
def test_init_that_fails_says_so_in_a_sentence(config: Path, tmp_path: Path) -> None:
    (tmp_path / "kernel").unlink()
    result = factory("init", "--config", config)
    assert result.returncode == 1
    assert result.stderr == f"kata-py: {tmp_path}/kernel: No such file or directory\n"


@as_root
def test_init_says_why_it_makes_another_template(config: Path, template: Path, tmp_path: Path) -> None:
    (tmp_path / "kernel").write_text("another kernel")
    (tmp_path / "template/file-of-somebody-else").touch()
    result = factory("init", "--config", config)
    assert result.returncode == 1
    assert (
        f"kata-py: the template in {template} does not fit: kernel: found {tmp_path}/kernel" in result.stderr
    )


# -- destroy


@as_root
def test_destroy_removes_the_template_and_can_be_repeated(config: Path, template: Path) -> None:
    result = factory("destroy", "--config", config)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"The template in {template} is removed.\n" in result.stdout
    assert not template.exists()
    result = factory("destroy", "--config", config)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"There was no template in {template}.\n" in result.stdout


@as_root
def test_destroy_says_who_still_needs_the_memory(config: Path, template: Path, clone: int) -> None:
    result = factory("destroy", "--config", config)
    assert "Its memory stays until its last clone ends: 1 is running." in result.stdout
    assert clone_of_json(status_json(config), clone)["memory"] == "old template"


@as_root
def test_destroy_leaves_a_folder_that_is_not_the_templates(config: Path, template: Path) -> None:
    (template / "mine").touch()
    result = factory("destroy", "--config", config)
    assert result.returncode == 1
    assert f"kata-py: template_path {template}: found mine, expected a template alone\n" in result.stderr
    assert sorted(entry.name for entry in template.iterdir()) == ["builds", "current", "memory", "mine"]


@as_root
def test_destroy_ends_the_cache(config: Path, cache: subprocess.Popen[bytes], tmp_path: Path) -> None:
    result = factory("destroy", "--config", config)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"The VM cache at {tmp_path}/cache.sock has ended.\n" in result.stdout
    assert cache.wait(timeout=60) == 0
    assert (
        f"There was no VM cache at {tmp_path}/cache.sock.\n" in factory("destroy", "--config", config).stdout
    )


# -- status


def test_status_of_nothing(write_config: WriteConfig) -> None:
    result = factory("status", "--config", write_config(factory={"template_path": "/does/not/exist"}))
    assert (result.returncode, result.stderr) == (0, "")
    rows = table(result.stdout)
    assert (rows["enable_template"], rows["template_path"]) == ("off", "/does/not/exist")
    assert rows["state"] == "there is none"
    assert rows["vm_cache_number"] == "off"
    assert "\nclones\n  " in result.stdout  # others may run some with copies


def test_status_of_a_template_that_fits(config: Path, template: Path, tmp_path: Path) -> None:
    output = factory("status", "--config", config).stdout
    assert re.search(r"\n  memory +1\.0 MiB allocated of 1\.0 MiB\n", output)
    rows = table(output)
    assert rows["enable_template"] == "on"
    assert rows["state"] == "fits the configuration"
    assert rows["made"].endswith(", 3 hours ago")
    assert rows["saved"] == "8.0 MiB of 9.0 MiB: 5.0 MiB given back by the guest, 3.0 MiB zeros punched out"
    assert rows["initrd"].startswith(f"{tmp_path}/initrd (")
    assert "expected" not in rows


def test_status_as_json_has_bytes(config: Path, template: Path, clone: int) -> None:
    found = status_json(config)
    about = found["template"]
    assert (about["enabled"], about["state"], about["problem"], about["differences"]) == (
        True,
        "fits",
        None,
        [],
    )
    assert about["memory_bytes"] == about["memory_allocated_bytes"] == MIB
    assert (about["state_bytes"], about["given_back_bytes"], about["zero_bytes"]) == (5, 5 * MIB, 3 * MIB)
    assert set(about["made_of"]) >= {"kernel", "initrd", "qemu", "cpu", "vcpus", "memory", "kernel_params"}
    one = clone_of_json(found, clone)
    assert (one["sandbox"], one["memory"], one["shared_bytes"]) == ("some-pod", "template", MIB)
    assert found["total"] == {
        "clones": len(found["clones"]),
        "shared_bytes": sum(each["shared_bytes"] for each in found["clones"]),
        "own_bytes": sum(each["own_bytes"] for each in found["clones"]),
    }
    assert found["cache"]["enabled"] is False
    assert found["cache"]["machines"] == []


def test_status_of_clones_is_an_aligned_table(config: Path, template: Path, clone: int) -> None:
    output = factory("status", "--config", config).stdout
    lines = output[output.index("clones\n") : output.index("\nVM cache")].splitlines()[1:]
    assert re.fullmatch(r"  pod +pid  shared MiB +own MiB  memory", lines[0])
    (line,) = (line for line in lines if "some-pod" in line)
    assert re.fullmatch(rf"  some-pod +{clone} +1\.0 +\d+\.\d  template", line)
    assert re.fullmatch(r"  \d+ together +\d+\.\d +\d+\.\d", lines[-1])
    assert lines[0].index("memory") == line.index("template")


def test_status_names_the_parts_that_differ(
    config: Path, template: Path, write_config: WriteConfig, tmp_path: Path
) -> None:
    keys = {name: str(tmp_path / name) for name in ("kernel", "initrd")} | {"path": str(tmp_path / "qemu")}
    path = write_config(
        hypervisor__qemu=keys | {"shared_fs": "virtio-9p", "default_memory": 300},
        factory={"template_path": str(template)},
    )
    about = status_json(path)["template"]
    assert (about["enabled"], about["state"]) == (False, "misfit")
    (memory,) = (each for each in about["differences"] if each["part"] == "memory")
    assert memory["found"].startswith("256M")
    assert memory["expected"].startswith("300M")
    output = factory("status", "--config", path).stdout
    assert "does not fit the configuration" in output
    assert re.search(r"\n    memory +256M.*\n      expected +300M", output)
    assert not re.search(r"\n    kernel .*\n      expected ", output)


def test_status_when_the_configuration_names_a_file_that_is_gone(
    config: Path, template: Path, tmp_path: Path
) -> None:
    (tmp_path / "initrd").unlink()
    about = status_json(config)["template"]
    assert about["state"] == "misfit"
    assert about["problem"] == f"{tmp_path}/initrd: No such file or directory"


def test_status_of_a_broken_template_says_what_is_broken(config: Path, template: Path) -> None:
    os.truncate(template / "memory", 7)
    about = status_json(config)["template"]
    assert about["state"] == "broken"
    assert "found 7 bytes" in about["problem"]
    rows = table(factory("status", "--config", config).stdout)
    assert rows["state"].startswith("broken")
    assert "found 7 bytes" in rows["problem"]


def test_status_of_a_cache(config: Path, cache: subprocess.Popen[bytes], tmp_path: Path) -> None:
    endpoint = str(tmp_path / "cache.sock")
    assert status_json(config)["cache"] == {
        "enabled": False,
        "number": 0,
        "endpoint": endpoint,
        "server_pid": cache.pid,
        "machines": [],
        "problem": None,
    }
    rows = table(factory("status", "--config", config).stdout)
    assert rows["vm_cache_endpoint"] == endpoint
    assert rows["server"] == f"pid {cache.pid}, 0 machines ready"


def test_status_of_a_cache_of_another_configuration(config: Path, cache: subprocess.Popen[bytes]) -> None:
    config.write_text(config.read_text().replace("default_memory = 256", "default_memory = 300"))
    about = status_json(config)["cache"]
    assert about["server_pid"] == cache.pid
    assert re.search(r"does not fit: .*found 256, expected 300", about["problem"])


def test_status_of_a_cache_that_was_killed(config: Path, cache: subprocess.Popen[bytes]) -> None:
    cache.kill()
    cache.wait()
    about = status_json(config)["cache"]
    assert (about["server_pid"], about["problem"]) == (None, None)


# -- check


def template_findings(config: Path) -> list[Finding]:
    return [finding for finding in cli_check.examine(config) if finding.name == "template"]


def cache_findings(config: Path) -> list[Finding]:
    return [finding for finding in cli_check.examine(config) if finding.name == "VM cache"]


def test_check_looks_at_the_template_only_when_there_should_be_one(write_config: WriteConfig) -> None:
    assert template_findings(write_config()) == []


def test_check_of_a_template(config: Path, tmp_path: Path) -> None:
    (finding,) = template_findings(config)
    assert finding.status is Status.WARNING
    assert f"there is no template in {tmp_path}/template" in finding.found
    assert "kata-py factory init" in finding.way_out


def test_check_of_a_template_that_does_not_fit(config: Path, template: Path, tmp_path: Path) -> None:
    (tmp_path / "kernel").write_text("another kernel")
    finding = template_findings(config)[-1]
    assert finding.status is Status.WARNING
    assert finding.found == f"the one in {template} does not fit the configuration: it differs in kernel"


def test_check_of_a_template_path_that_is_taken(config: Path, tmp_path: Path) -> None:
    (tmp_path / "template").mkdir()
    (tmp_path / "template/file").touch()
    finding, _ = template_findings(config)
    assert finding == Finding(
        "template",
        Status.WARNING,
        f"template_path {tmp_path}/template has files in it and is no tmpfs",
        "set template_path in [factory] to a folder that is empty, or does not exist",
    )


def test_check_of_a_cache(config: Path, cache: subprocess.Popen[bytes], tmp_path: Path) -> None:
    assert cache_findings(config) == []
    config.write_text(config.read_text() + "vm_cache_number = 3\n")
    (finding,) = cache_findings(config)
    assert finding.status is Status.OK
    assert finding.found == f"{tmp_path}/cache.sock is served by pid {cache.pid}: 0 of 3 machines are ready"


def test_check_of_a_cache_that_nobody_serves(config: Path, tmp_path: Path) -> None:
    config.write_text(config.read_text() + "vm_cache_number = 1000000\n")
    nobody, large = cache_findings(config)
    assert (nobody.status, nobody.found) == (Status.WARNING, f"nobody serves {tmp_path}/cache.sock")
    assert (large.status, large.found.split(",")[0]) == (
        Status.WARNING,
        "1000000 machines may grow to 256000000 MiB",
    )


# -- progress

STEPS = """
import select, sys
from katautils.cli.output import Progress
with Progress() as progress:
    progress.step("one")
    progress.say("careful")
    select.select([sys.stdin], [], [], 60)
    progress.step("two")
    progress.close("Done.")
"""


def test_progress_in_a_pipe_is_a_line_for_each_step() -> None:
    command = [sys.executable, "-c", STEPS]
    result = subprocess.run(command, input="\n", capture_output=True, text=True, check=True)
    assert re.fullmatch(r"one \.\.\. \d+\.\d s\ntwo \.\.\. \d+\.\d s\nDone\.\n", result.stdout)
    assert result.stderr == "careful\n"


def test_progress_on_a_terminal_is_one_line_rewritten() -> None:
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", STEPS],
        stdin=subprocess.PIPE,
        stdout=terminal,
        stderr=terminal,
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(terminal)
    assert process.stdin is not None
    time_has_passed = re.compile(rb"\r\033\[K +(0\.[1-9]|[1-9]\d*\.\d) s  one\r")
    seen = b""
    try:
        while piece := os.read(main, 65536):
            seen += piece
            if time_has_passed.search(seen):
                process.stdin.close()
    except OSError:  # EIO: everybody has closed the terminal
        pass
    os.close(main)
    assert process.wait(timeout=60) == 0
    # What is written and not erased before the line's end stays.
    lines = [line.rpartition("\033[K")[2] for line in seen.decode().split("\r\n")]
    assert lines == ["careful", "Done.", ""]
    assert time_has_passed.search(seen)
