from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from guest.image import elf
from tests.unit.guest_image.elf_files import elf_with_sections, kernel_module

PYTHON = Path(os.path.realpath(sys.executable))


def by_ldd(program: Path) -> dict[str, Path]:
    output = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"^\s*(\S+) => (\S+)", output, re.MULTILINE))
    linker = re.search(r"^\s*(/\S*/ld-linux\S*)", output, re.MULTILINE)
    if linker:
        found.setdefault(Path(linker[1]).name, linker[1])
    return {name: Path(path).resolve() for name, path in found.items()}


def test_the_libraries_of_a_program_are_those_that_ldd_finds() -> None:
    expected = by_ldd(PYTHON)
    directories = sorted({path.parent for path in expected.values()})
    found = elf.library_closure({"python": PYTHON.read_bytes()}, directories)
    assert {name: path.resolve() for name, path in found.items()} == expected


def test_a_library_asked_for_by_name_brings_its_own() -> None:
    expected = by_ldd(PYTHON)
    directories = sorted({path.parent for path in expected.values()})
    assert "libc.so.6" in elf.library_closure({}, directories, also=["libm.so.6"])


def test_a_library_that_is_nowhere_is_named_with_who_needs_it(tmp_path: Path) -> None:
    with pytest.raises(elf.ElfError, match=r"^crun needs lib\S+, which is in none of .*nowhere"):
        elf.library_closure({"crun": PYTHON.read_bytes()}, [tmp_path / "nowhere"])


def test_the_first_directory_wins(tmp_path: Path) -> None:
    library = elf_with_sections([])
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "libx.so.1").write_bytes(library)
    found = elf.library_closure({}, [tmp_path / "first", tmp_path / "second"], also=["libx.so.1"])
    assert found == {"libx.so.1": tmp_path / "first" / "libx.so.1"}


def test_a_static_program_needs_nothing() -> None:
    assert elf.needed(elf_with_sections([(".text", 1, b"\x90")])) == []


def test_a_script_is_refused() -> None:
    with pytest.raises(elf.ElfError, match="not a 64-bit little-endian ELF file"):
        elf.needed(b"#!/bin/sh\n")


def test_a_modules_information_is_read() -> None:
    module = kernel_module("9p", depends="9pnet,netfs", aliases=["fs-9p", "virtio:d00000009v*"])
    information = elf.module_information(module)
    assert information["depends"] == ["9pnet,netfs"]
    assert information["alias"] == ["fs-9p", "virtio:d00000009v*"]
