"""The clones that run on this host, and what each of them costs it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from virtcontainers.factory.grpccache import OWNER
from virtcontainers.hypervisor.process import MARK
from virtcontainers.hypervisor.qemu_cmdline import MachineFiles

MEMORY_COPY = "/memfd:kata-py-memory"
"""The memory of a clone that has a copy of the template's, as smaps names it."""

_DELETED = " (deleted)"
_UNMOUNTED = re.compile(r"/builds/[^/]+/memory")
"""A template's memory after its tmpfs was unmounted below its clones: of its path the mount's is gone."""

# "7f3d40000000-7f3d50000000 rw-p 00000000 00:2c 1037   /run/vc/vm/template/builds/0/memory"
_HEADER = re.compile(rb"([0-9a-f]+-[0-9a-f]+) (\S{4}) \S+ ([0-9a-f]+):([0-9a-f]+) (\d+)\s*(.*)")
_ENVIRON_BYTES = 1 << 16
_COMMAND_LINE_BYTES = 1 << 20
_SMAPS_BYTES = 64 << 20
"""Some 80000 mappings; the kernel's own bound is 65530 (vm.max_map_count)."""


class CloneMemory(StrEnum):
    """Where a clone's memory comes from."""

    TEMPLATE = "template"
    """The template that is there, whose pages it shares."""
    OLD_TEMPLATE = "old template"
    """One that was replaced or removed, and lives as long as its clones."""
    COPY = "copy"
    """A copy, for vhost-user daemons; it shares nothing. Whose template it was cannot be seen any more."""


@dataclass(frozen=True)
class Clone:
    """One QEMU.

    `shared_bytes`: pages of the template that it maps as they are. The host has them once for all clones, and
    would have them without any. smaps' Rss - Anonymous of that mapping.

    `own_bytes`: what the host would get back if it ended: smaps' Anonymous of all mappings, of which the
    template's pages that the guest has written are a part (a private mapping of a file has anonymous copies
    of them), and what memfds hold (the memory's copy, hot-plugged memory). Not in it: files of programs and
    libraries, which are page cache, the kernel's page tables, and the daemons and the shim beside QEMU.

    Sources: Linux, Documentation/filesystems/proc.rst (smaps, map_files).
    """

    pid: int
    vm_directory: Path
    memory: CloneMemory
    shared_bytes: int
    own_bytes: int

    @property
    def sandbox_id(self) -> str:
        """Of the pod that it is for; of one that waits in the VM cache its own id."""
        try:
            owner = (self.vm_directory / OWNER).read_text()
        except OSError:
            owner = ""
        # With a space it is a server that takes it back.
        return owner if owner and " " not in owner else self.vm_directory.name


def find_clones(template_path: Path) -> list[Clone]:
    """The clones of the template at `template_path`, and those with copies, by their pids.

    Processes that are not ours to look at (without root) are left out.
    """
    root = template_path.resolve()
    try:
        found = (root / "memory").stat()
        current = (found.st_dev, found.st_ino)
    except OSError:
        current = (0, 0)
    pids = sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    clones = (_clone(pid, template_path, f"{root}/", current) for pid in pids)
    return [clone for clone in clones if clone is not None]


@dataclass
class _Mapping:
    """An entry of smaps."""

    addresses: str
    private: bool
    file: tuple[int, int]
    """Its device and inode; (0, 0): none."""
    path: str
    rss: int = 0
    anonymous: int = 0


def _clone(pid: int, template_path: Path, root: str, current: tuple[int, int]) -> Clone | None:
    directory = _machine_of(pid)
    if directory is None or not _is_qemu(pid, directory):
        return None
    memory: CloneMemory | None = None
    shared = own = 0
    memfds = set()
    try:
        for mapping in _mappings(pid):
            own += mapping.anonymous
            # A machine that is being made a template maps its file shared, and is no clone.
            is_template = mapping.path.startswith(root) or (
                _UNMOUNTED.fullmatch(mapping.path)
                and _was_started_with(pid, f"{template_path}{mapping.path}")
            )
            if is_template and mapping.private:
                shared += mapping.rss - mapping.anonymous
                memory = CloneMemory.TEMPLATE if mapping.file == current else CloneMemory.OLD_TEMPLATE
            elif mapping.path.startswith("/memfd:") and mapping.file not in memfds:
                memfds.add(mapping.file)
                own += _held_by_memfd(pid, mapping)
                if mapping.path == MEMORY_COPY:
                    memory = CloneMemory.COPY
    except OSError:  # it has ended meanwhile, or is not ours to look at
        return None
    return Clone(pid, directory, memory, shared, own) if memory else None


def _machine_of(pid: int) -> Path | None:
    try:
        with Path(f"/proc/{pid}/environ").open("rb") as file:
            environ = file.read(_ENVIRON_BYTES)
    except OSError:
        return None
    mark = f"{MARK}=".encode()
    for variable in environ.split(b"\0"):
        if variable.startswith(mark):
            return Path(os.fsdecode(variable.removeprefix(mark)))
    return None


def _is_qemu(pid: int, directory: Path) -> bool:
    """And no daemon beside it, which may map the machine's memory too."""
    try:
        return MachineFiles(directory=directory).pid_file.read_text().strip() == str(pid)
    except OSError:
        return False


def _was_started_with(pid: int, memory: str) -> bool:
    with Path(f"/proc/{pid}/cmdline").open("rb") as file:
        command_line = file.read(_COMMAND_LINE_BYTES)
    # As it stands in QEMU's options.
    return os.fsencode("mem-path=" + memory.replace(",", ",,")) in command_line


def _mappings(pid: int) -> Iterator[_Mapping]:
    """Raises OSError (ProcessLookupError: it has ended)."""
    mapping: _Mapping | None = None
    with Path(f"/proc/{pid}/smaps").open("rb") as file:
        left = _SMAPS_BYTES
        for line in file:
            left -= len(line)
            if left < 0:
                break
            if line.startswith((b"Rss:", b"Anonymous:")):
                assert mapping is not None
                size = int(line.split()[1]) << 10
                if line.startswith(b"R"):
                    mapping.rss = size
                else:
                    mapping.anonymous = size
            elif match := _HEADER.fullmatch(line.rstrip(b"\n")):
                if mapping is not None:
                    yield mapping
                addresses, modes, major, minor, inode, name = match.groups()
                mapping = _Mapping(
                    addresses=addresses.decode(),
                    private=modes.endswith(b"p"),
                    file=(os.makedev(int(major, 16), int(minor, 16)), int(inode)),
                    path=os.fsdecode(name).removesuffix(_DELETED),
                )
    if mapping is not None:
        yield mapping


def _held_by_memfd(pid: int, mapping: _Mapping) -> int:
    """All of its pages, also those that QEMU has not looked at yet; without root those that it has."""
    try:
        return Path(f"/proc/{pid}/map_files/{mapping.addresses}").stat().st_blocks * 512
    except OSError:
        return mapping.rss
