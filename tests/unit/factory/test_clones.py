from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from virtcontainers.factory.clones import Clone, CloneMemory, find_clones
from virtcontainers.hypervisor.process import MARK

PAGE = 4096
PR_SET_THP_DISABLE = 41  # <linux/prctl.h>
MEMORY_PAGES = 2560  # 10 MiB: next to it a Python's own memory is small

# A machine as find_clones sees it: its mark, QEMU's pid file, and the mapping of the guest's memory.
MACHINE = """
import mmap, os, sys
if "pid-file" in sys.argv:
    with open(os.environ["KATA_PY_VM"] + "/pid", "w") as file:
        print(os.getpid(), file=file)
how, path, touched, written = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
if how == "copy":
    fd = os.memfd_create("kata-py-memory")
    os.truncate(fd, {size})
    os.pwrite(fd, b"x" * touched * {page}, 0)
    memory = mmap.mmap(fd, {size})
else:
    fd = os.open(path, os.O_RDWR)
    memory = mmap.mmap(fd, {size}, mmap.MAP_PRIVATE if how == "clone" else mmap.MAP_SHARED)
    memory.madvise(mmap.MADV_RANDOM)
    for number in range(touched):
        memory[number * {page}]
for number in range(written):
    memory[number * {page}] = 1
print("ready", flush=True)
sys.stdin.read()
""".format(size=MEMORY_PAGES * PAGE, page=PAGE)

StartMachine = Callable[..., int]


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "template"
    build(path, "one")
    return path


def build(template: Path, name: str) -> None:
    (template / "builds" / name).mkdir(parents=True)
    (template / "builds" / name / "memory").write_bytes(os.urandom(PAGE) * MEMORY_PAGES)
    (template / "current").unlink(missing_ok=True)
    (template / "current").symlink_to(f"builds/{name}")
    if not (template / "memory").is_symlink():
        (template / "memory").symlink_to("current/memory")


@pytest.fixture
def start_machine(template: Path, tmp_path: Path) -> Iterator[StartMachine]:
    processes: list[subprocess.Popen[bytes]] = []
    libc = ctypes.CDLL(None)

    def start(
        vm_id: str, how: str = "clone", touched: int = 0, written: int = 0, is_qemu: bool = True
    ) -> int:
        directory = tmp_path / "vm" / vm_id
        directory.mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                MACHINE,
                how,
                template.resolve() / "current/memory",
                str(touched),
                str(written),
                f"memory-backend-file,mem-path={template / (template / 'current').readlink()}/memory",
                *(["pid-file"] if vm_id and is_qemu else []),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={MARK: str(directory)} if vm_id else {},
            # A huge page is all its own when a byte of it is.
            preexec_fn=lambda: libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0),
        )
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process.pid

    yield start
    for process in processes:
        process.communicate()


def clones_of(template: Path) -> list[Clone]:
    """Without what others run: of a copy it cannot be seen whose template it was."""
    machines = template.parent / "vm"
    return [clone for clone in find_clones(template) if clone.vm_directory.is_relative_to(machines)]


def only(clones: list[Clone]) -> Clone:
    (clone,) = clones
    return clone


def test_without_clones_there_are_none(template: Path, tmp_path: Path) -> None:
    assert clones_of(template) == []
    assert clones_of(tmp_path / "nothing") == []


def test_a_clone_shares_what_it_has_not_written(
    template: Path, start_machine: StartMachine, tmp_path: Path
) -> None:
    idle = start_machine("idle", touched=MEMORY_PAGES)
    busy = start_machine("busy", touched=MEMORY_PAGES, written=MEMORY_PAGES // 2)
    clones = {clone.pid: clone for clone in clones_of(template)}
    assert set(clones) == {idle, busy}
    assert clones[busy].vm_directory == tmp_path / "vm/busy"
    assert clones[busy].sandbox_id == "busy"
    assert clones[busy].memory is CloneMemory.TEMPLATE
    assert clones[idle].shared_bytes == MEMORY_PAGES * PAGE
    # The kernel may map more than was touched, and unmap a huge page of which one was written.
    assert MEMORY_PAGES // 4 * PAGE < clones[busy].shared_bytes <= MEMORY_PAGES // 2 * PAGE
    difference = clones[busy].own_bytes - clones[idle].own_bytes
    assert difference == pytest.approx(MEMORY_PAGES // 2 * PAGE, abs=1 << 20)


def test_a_clone_costs_little_that_is_not_its_own(template: Path, start_machine: StartMachine) -> None:
    """Programs and libraries are the page cache's, whoever is the only one to map them."""
    pid = start_machine("one", touched=MEMORY_PAGES)
    clone = only(clones_of(template))
    assert clone.pid == pid
    assert 1 << 20 < clone.own_bytes < MEMORY_PAGES * PAGE


def test_a_machine_with_a_copy_shares_nothing(template: Path, start_machine: StartMachine) -> None:
    start_machine("copy", how="copy", touched=MEMORY_PAGES // 2, written=1)
    clone = only(clones_of(template))
    assert clone.memory is CloneMemory.COPY
    assert clone.shared_bytes == 0
    # What was copied counts although nobody has looked at it yet; to see that takes root.
    least = MEMORY_PAGES // 2 * PAGE if os.geteuid() == 0 else PAGE
    assert clone.own_bytes > least


def test_the_machine_that_becomes_the_template_is_no_clone(
    template: Path, start_machine: StartMachine
) -> None:
    start_machine("template", how="builder", touched=1)
    assert clones_of(template) == []


def test_the_daemon_of_a_machine_is_no_clone(template: Path, start_machine: StartMachine) -> None:
    qemu = start_machine("machine", how="copy")
    start_machine("machine", how="copy", is_qemu=False)
    assert only(clones_of(template)).pid == qemu


def test_who_only_maps_the_file_is_no_machine(template: Path, start_machine: StartMachine) -> None:
    start_machine("", touched=1)
    assert clones_of(template) == []


def test_a_clone_of_an_older_template_is_told_from_the_others(
    template: Path, start_machine: StartMachine
) -> None:
    old = start_machine("old", touched=2)
    build(template, "two")
    new = start_machine("new", touched=2)
    expected = {old: CloneMemory.OLD_TEMPLATE, new: CloneMemory.TEMPLATE}
    assert {clone.pid: clone.memory for clone in clones_of(template)} == expected
    for file in (template / "builds/one").iterdir():
        file.unlink()
    assert {clone.pid: clone.memory for clone in clones_of(template)} == expected


def test_a_template_path_that_is_a_link(template: Path, start_machine: StartMachine, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(template)
    start_machine("one", touched=1)
    assert only(clones_of(tmp_path / "link")).memory is CloneMemory.TEMPLATE


def test_a_machine_of_the_cache_is_named_after_the_pod_that_has_it(
    template: Path, start_machine: StartMachine, tmp_path: Path
) -> None:
    start_machine("cache-0123456789ab", touched=1)
    assert only(clones_of(template)).sandbox_id == "cache-0123456789ab"
    owner = tmp_path / "vm/cache-0123456789ab/owner"
    for text, name in (("", owner.parent.name), ("4711 815", owner.parent.name), ("some-pod", "some-pod")):
        owner.write_text(text)
        assert only(clones_of(template)).sandbox_id == name


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
def test_a_clone_lives_on_without_its_template(
    tmp_path: Path, start_machine: StartMachine, template: Path
) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "template", template], check=True)
    try:
        build(template, "one")
        pid = start_machine("one", touched=7)
    finally:
        subprocess.run(["umount", "--lazy", template], check=True)
    clone = only(clones_of(template))
    assert (clone.pid, clone.memory) == (pid, CloneMemory.OLD_TEMPLATE)
    assert clone.shared_bytes >= 7 * PAGE
    # Nor is it taken for one of another template that went the same way.
    assert [clone for clone in find_clones(tmp_path / "other") if clone.pid == pid] == []
