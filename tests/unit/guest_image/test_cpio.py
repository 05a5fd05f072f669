from __future__ import annotations

import stat

import pytest

from guest.image import cpio


def entries(archive: bytes) -> dict[str, tuple[list[int], bytes]]:
    """name -> the 13 numbers of its header, and its content; read as the kernel's documentation says."""
    found = {}
    position = 0
    while True:
        assert archive[position : position + 6] == b"070701"
        numbers = [int(archive[position + 6 + 8 * i : position + 14 + 8 * i], 16) for i in range(13)]
        name_start = position + 110
        name = archive[name_start : name_start + numbers[11] - 1].decode()
        data_start = (name_start + numbers[11] + 3) & ~3
        data = archive[data_start : data_start + numbers[6]]
        position = (data_start + numbers[6] + 3) & ~3
        if name == "TRAILER!!!":
            assert position == len(archive)
            return found
        found[name] = (numbers, data)


SOME = [
    cpio.file("/usr/bin/su", b"program", 0o755 | stat.S_ISUID),
    cpio.symlink("/bin", "usr/bin"),
    cpio.character_device("/dev/console", 5, 1),
    cpio.directory("/tmp", 0o1777),
]


def test_the_order_of_the_entries_does_not_matter() -> None:
    assert cpio.pack(SOME) == cpio.pack(reversed(SOME))


def test_everything_belongs_to_root_and_keeps_its_mode_and_has_no_time() -> None:
    found = entries(cpio.pack(SOME))
    for numbers, _ in found.values():
        _, _, user, group, _, time = numbers[:6]
        assert (user, group, time) == (0, 0, 0)
    assert found["usr/bin/su"][0][1] == stat.S_IFREG | 0o4755
    assert found["tmp"][0][1] == stat.S_IFDIR | 0o1777


def test_a_device_keeps_its_numbers_and_a_link_its_target() -> None:
    found = entries(cpio.pack(SOME))
    numbers, _ = found["dev/console"]
    assert stat.S_ISCHR(numbers[1])
    assert numbers[9:11] == [5, 1]
    assert found["bin"][1] == b"usr/bin"


def test_directories_come_before_what_is_in_them() -> None:
    names = list(entries(cpio.pack([cpio.file("/a/b/c", b""), cpio.file("/a/b.d", b"")])))
    assert names.index("a") < names.index("a/b") < names.index("a/b/c")


def test_a_path_that_occurs_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="/etc/passwd is in the image twice"):
        cpio.pack([cpio.file("/etc/passwd", b"1"), cpio.file("/etc/passwd", b"2")])


def test_every_file_has_an_inode_of_its_own() -> None:
    inodes = [numbers[0] for numbers, _ in entries(cpio.pack(SOME)).values()]
    assert len(set(inodes)) == len(inodes)


def test_contents_of_any_length_survive() -> None:
    contents = {f"/{length}": bytes(range(length)) for length in range(9)}
    archive = cpio.pack(cpio.file(path, data) for path, data in contents.items())
    assert {f"/{name}": data for name, (_, data) in entries(archive).items()} == contents
