"""CPUs and memory blocks that go online, on a directory that looks like sysfs; and what the guest tells of
its memory."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from guest.agent import hotplug
from guest.agent.metrics import meminfo
from ttrpc import Code, StatusError


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(hotplug, "_MEMORY", str(tmp_path))
    monkeypatch.setattr(hotplug, "_ATTEMPTS", 3)
    (tmp_path / "block_size_bytes").write_text("8000000\n")
    return tmp_path


def add_block(memory: Path, number: int, online: str) -> Path:
    block = memory / f"memory{number}"
    block.mkdir()
    (block / "online").write_text(f"{online}\n")
    return block / "online"


def test_every_block_that_is_there_goes_online(memory: Path) -> None:
    blocks = [add_block(memory, number, "1" if number < 2 else "0") for number in (0, 1, 32, 100)]
    asyncio.run(hotplug.online_memory())
    assert [block.read_text().strip() for block in blocks] == ["1"] * 4
    assert hotplug.memory_block_size() == 128 << 20


def test_a_block_that_stays_offline_is_named_with_the_kernels_reason(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_block(memory, 32, "0")
    full = add_block(memory, 33, "0")
    set_online = hotplug._set_online

    def refuse(path: str) -> str:
        return "Cannot allocate memory" if path == str(full) else set_online(path)

    monkeypatch.setattr(hotplug, "_set_online", refuse)
    with pytest.raises(StatusError) as raised:
        asyncio.run(hotplug.online_memory())
    assert raised.value.code is Code.DEADLINE_EXCEEDED
    assert raised.value.message == "memory blocks do not go online: memory33 (Cannot allocate memory)"
    assert (memory / "memory32/online").read_text() == "1"


@pytest.mark.parametrize(("ranges", "count"), [("0", 1), ("0-2,7\n", 4), ("", 0), ("0,2,4-5", 4)])
def test_cpus_are_counted(ranges: str, count: int) -> None:
    assert hotplug.count_cpus(ranges) == count


def test_memory_is_told_under_the_names_and_in_the_unit_of_katas_agent() -> None:
    found = meminfo(
        "MemTotal:         210008 kB\nActive(anon):        4 kB\nSReclaimable:        8 kB\n"
        "Committed_AS:        1 kB\nHugePages_Total:       3\nAnonHugePages:         0 kB\n"
        "DirectMap4k:           4 kB\nPercpu:                2 kB\n"
    )
    assert found.splitlines()[2:] == [
        'kata_guest_meminfo{item="mem_total"} 215048192',
        'kata_guest_meminfo{item="active_anon"} 4096',
        'kata_guest_meminfo{item="s_reclaimable"} 8192',
        'kata_guest_meminfo{item="committed_as"} 1024',
        'kata_guest_meminfo{item="hugepages_total"} 3',
        'kata_guest_meminfo{item="anon_hugepages"} 0',
        'kata_guest_meminfo{item="direct_map_4k"} 4096',
        'kata_guest_meminfo{item="per_cpu"} 2048',
    ]
