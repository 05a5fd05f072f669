from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator

import pytest

from virtcontainers.hypervisor.memory_file import (
    PAGE_BYTES,
    allocated_bytes,
    copy_extents,
    data_extents,
    punch_zeros,
)

CHUNK_PAGES = 1024
"""Files are looked at in pieces of 4 MiB."""

Memory = Callable[[int], int]


@pytest.fixture
def memory() -> Iterator[Memory]:
    """`memory(size)`: a file of that size, all of it a hole, on a tmpfs."""
    fds: list[int] = []

    def create(size: int) -> int:
        fds.append(os.memfd_create("test-memory-file"))
        os.ftruncate(fds[-1], size)
        return fds[-1]

    yield create
    for fd in fds:
        os.close(fd)


def write_pages(fd: int, pages: dict[int, bytes]) -> None:
    for number, content in pages.items():
        os.pwrite(fd, content, number * PAGE_BYTES)


def content(fd: int) -> bytes:
    size = os.fstat(fd).st_size
    data = os.pread(fd, size, 0)
    assert len(data) == size
    return data


def extents(*pages: tuple[int, int]) -> list[tuple[int, int]]:
    return [(first * PAGE_BYTES, count * PAGE_BYTES) for first, count in pages]


ZERO = bytes(PAGE_BYTES)
FULL = b"x" * PAGE_BYTES
LAST_BYTE = bytes(PAGE_BYTES - 1) + b"x"
FIRST_BYTE = b"x" + bytes(PAGE_BYTES - 1)


@pytest.mark.parametrize(
    "size",
    [0, 1, PAGE_BYTES - 1, PAGE_BYTES, 5 << 20, (4 << 20) + 1, (8 << 20) - 1],
)
def test_an_untouched_file_has_no_data_and_costs_nothing(memory: Memory, size: int) -> None:
    fd = memory(size)
    assert list(data_extents(fd)) == []
    assert allocated_bytes(fd) == 0
    assert punch_zeros(fd) == 0
    target = memory(size)
    assert list(copy_extents(fd, target)) == []
    assert allocated_bytes(target) == 0


@pytest.mark.parametrize(
    ("size", "pages"),
    [
        (16 * PAGE_BYTES, {0: FULL, 15: FULL}),
        (16 * PAGE_BYTES, {1: FULL, 2: ZERO, 3: FULL, 9: LAST_BYTE}),
        # On both sides of the border between two pieces, and only there.
        (3 * CHUNK_PAGES * PAGE_BYTES, {CHUNK_PAGES - 1: FULL, CHUNK_PAGES: FULL}),
        (3 * CHUNK_PAGES * PAGE_BYTES, dict.fromkeys(range(CHUNK_PAGES + 7, 2 * CHUNK_PAGES + 9), FULL)),
        # No whole number of pages or of pieces.
        (5 * PAGE_BYTES + 100, {0: FULL, 5: b"y" * 100}),
        (CHUNK_PAGES * PAGE_BYTES + 1, {CHUNK_PAGES: b"z"}),
    ],
)
def test_a_copy_has_the_same_bytes_and_the_same_holes(
    memory: Memory, size: int, pages: dict[int, bytes]
) -> None:
    source, target = memory(size), memory(size)
    write_pages(source, pages)
    copied = sum(copy_extents(source, target))
    assert content(target) == content(source)
    assert list(data_extents(target)) == list(data_extents(source))
    assert allocated_bytes(target) == allocated_bytes(source) == len(pages) * PAGE_BYTES
    assert copied == sum(length for _, length in data_extents(source))


def test_a_copy_is_made_in_pieces(memory: Memory) -> None:
    """So that others of the event loop run meanwhile."""
    size = 10 << 20
    source, target = memory(size), memory(size)
    os.pwrite(source, b"x" * size, 0)
    pieces = list(copy_extents(source, target))
    assert sum(pieces) == size and max(pieces) <= 4 << 20


def test_a_copy_of_a_file_that_shrinks_is_an_error(memory: Memory) -> None:
    source, target = memory(12 << 20), memory(12 << 20)
    os.pwrite(source, b"x" * (12 << 20), 0)
    copying = copy_extents(source, target)
    next(copying)
    os.ftruncate(source, 5 << 20)
    with pytest.raises(OSError, match=f"ends at {5 << 20}, expected {12 << 20}"):
        list(copying)


@pytest.mark.parametrize(
    ("size", "pages", "kept"),
    [
        pytest.param(8 * PAGE_BYTES, dict.fromkeys(range(8), ZERO), [], id="all zero"),
        pytest.param(8 * PAGE_BYTES, dict.fromkeys(range(8), FULL), [(0, 8)], id="none zero"),
        pytest.param(
            8 * PAGE_BYTES,
            {0: ZERO, 1: LAST_BYTE, 2: ZERO, 3: ZERO, 4: FIRST_BYTE, 5: FULL, 6: ZERO, 7: FULL},
            [(1, 1), (4, 2), (7, 1)],
            id="one byte keeps its page",
        ),
        pytest.param(
            3 * CHUNK_PAGES * PAGE_BYTES,
            dict.fromkeys(range(3 * CHUNK_PAGES), ZERO) | {CHUNK_PAGES: FULL, 2 * CHUNK_PAGES - 1: FULL},
            [(CHUNK_PAGES, 1), (2 * CHUNK_PAGES - 1, 1)],
            id="the first and the last page of a piece",
        ),
        pytest.param(
            2 * CHUNK_PAGES * PAGE_BYTES,
            dict.fromkeys(range(2 * CHUNK_PAGES), FULL) | {CHUNK_PAGES - 1: ZERO, CHUNK_PAGES: ZERO},
            [(0, CHUNK_PAGES - 1), (CHUNK_PAGES + 1, CHUNK_PAGES - 1)],
            id="zeros over the border of two pieces",
        ),
        pytest.param(
            2 * CHUNK_PAGES * PAGE_BYTES,
            {5: ZERO, 6: FULL, 7: ZERO, CHUNK_PAGES + 4: ZERO, CHUNK_PAGES + 5: FULL},
            [(6, 1), (CHUNK_PAGES + 5, 1)],
            id="between holes",
        ),
        pytest.param(
            CHUNK_PAGES * PAGE_BYTES + 3 * PAGE_BYTES,
            {CHUNK_PAGES: ZERO, CHUNK_PAGES + 1: FULL, CHUNK_PAGES + 2: ZERO},
            [(CHUNK_PAGES + 1, 1)],
            id="no multiple of a piece",
        ),
    ],
)
def test_zero_pages_become_holes_and_nothing_else_changes(
    memory: Memory, size: int, pages: dict[int, bytes], kept: list[tuple[int, int]]
) -> None:
    fd = memory(size)
    write_pages(fd, pages)
    before, allocated = content(fd), allocated_bytes(fd)
    freed = punch_zeros(fd)
    assert content(fd) == before
    assert list(data_extents(fd)) == extents(*kept)
    assert freed == allocated - allocated_bytes(fd)
    assert allocated_bytes(fd) == sum(count for _, count in kept) * PAGE_BYTES
    assert punch_zeros(fd) == 0


def test_a_last_page_that_is_no_whole_one_keeps_its_bytes(memory: Memory) -> None:
    size = 2 * PAGE_BYTES + 10
    fd = memory(size)
    os.pwrite(fd, bytes(2 * PAGE_BYTES) + b"0123456789", 0)
    assert punch_zeros(fd) == 2 * PAGE_BYTES
    assert content(fd) == bytes(2 * PAGE_BYTES) + b"0123456789"


@pytest.mark.parametrize("seed", range(5))
def test_any_pattern_survives(memory: Memory, seed: int) -> None:
    chance = random.Random(seed)
    pages = 2 * CHUNK_PAGES + chance.randrange(CHUNK_PAGES)
    fd = memory(pages * PAGE_BYTES + chance.randrange(PAGE_BYTES))
    dirty = set()
    for number in range(pages):
        match chance.randrange(4):
            case 0:
                os.pwrite(fd, ZERO, number * PAGE_BYTES)
            case 1:
                os.pwrite(fd, b"x", number * PAGE_BYTES + chance.randrange(PAGE_BYTES))
                dirty.add(number)
    before = content(fd)
    punch_zeros(fd)
    assert content(fd) == before
    assert allocated_bytes(fd) == len(dirty) * PAGE_BYTES
    target = memory(os.fstat(fd).st_size)
    assert sum(copy_extents(fd, target)) == len(dirty) * PAGE_BYTES
    assert content(target) == before
    assert list(data_extents(target)) == list(data_extents(fd))
