"""The builder's packages, with the machine's apt and an archive of our own."""

from __future__ import annotations

from pathlib import Path

import pytest

from guest.image import apt
from tests.unit.guest_image.conftest import Archive


def libraries(package: apt.Package) -> bool:
    return package.section == "libs"


def silent(text: str) -> None:
    pass


@pytest.fixture
def store(tmp_path: Path) -> Path:
    directory = tmp_path / "store"
    directory.mkdir()
    return directory


def test_dependencies_are_followed_as_far_as_they_are_wanted(archive: Archive) -> None:
    archive.add("program", section="admin", depends="liba (>= 1.0), tool | tool-2, virtual")
    archive.add("liba", depends="libb")
    archive.add("libb", section="universe/libs")
    archive.add("tool", section="admin", depends="libtool")
    archive.add("libtool")
    archive.add("real", provides="virtual")
    archive.add("unrelated")
    apt.update()
    found = apt.resolve(["program"], libraries)
    assert [package.name for package in found] == ["liba", "libb", "program"]


def test_the_newest_version_is_taken_with_its_hash(archive: Archive) -> None:
    archive.add("program", version="1.0")
    archive.add("program", version="1:0.9-2")
    apt.update()
    (found,) = apt.resolve(["program"], libraries)
    assert found.version == "1:0.9-2"
    assert found.sha256 in archive.stanzas[1]


def test_an_unknown_package_is_named(archive: Archive) -> None:
    archive.add("program")
    apt.update()
    with pytest.raises(apt.AptError, match=r"apt knows no package crun\n.*universe"):
        apt.resolve(["program", "crun"], libraries)


def test_a_virtual_package_is_not_known(archive: Archive) -> None:
    archive.add("linux-image-amd64", provides="linux-image-generic")
    apt.update()
    assert apt.known("linux-image-amd64")
    assert not apt.known("linux-image-generic")
    assert not apt.known("linux-image-arm64")


def test_packages_are_fetched_and_unpacked_into_one_tree(
    archive: Archive, store: Path, tmp_path: Path
) -> None:
    archive.add("liba", version="2:1.0", files={"usr/lib/liba.so": "a"}, depends="libb")
    archive.add("libb", files={"usr/lib/libb.so": "b"})
    apt.update()
    packages = apt.resolve(["liba"], libraries)
    apt.fetch(packages, store, silent)
    apt.unpack(packages, store, tmp_path / "tree")
    assert (tmp_path / "tree/usr/lib/liba.so").read_text() == "a"
    assert (tmp_path / "tree/usr/lib/libb.so").read_text() == "b"
    assert {path.suffix for path in store.iterdir()} == {".deb"}


def test_what_is_in_the_store_is_not_fetched_again(archive: Archive, store: Path) -> None:
    file = archive.add("liba")
    apt.update()
    packages = apt.resolve(["liba"], libraries)
    apt.fetch(packages, store, silent)
    file.unlink()
    apt.fetch(packages, store, silent)


def test_a_package_that_cannot_be_fetched_is_named_with_its_version(archive: Archive, store: Path) -> None:
    archive.add("liba")
    archive.add("libb", version="2.5").unlink()
    apt.update()
    packages = [*apt.resolve(["liba"], libraries), *apt.resolve(["libb"], libraries)]
    with pytest.raises(apt.AptError, match=r"could not fetch .*libb 2\.5: .*\nCheck the network"):
        apt.fetch(packages, store, silent)


def test_a_package_with_another_content_is_not_taken(archive: Archive, store: Path) -> None:
    file = archive.add("liba")
    apt.update()
    packages = apt.resolve(["liba"], libraries)
    file.write_bytes(bytes(len(file.read_bytes())))
    with pytest.raises(apt.AptError, match=r"could not fetch liba 1\.0"):
        apt.fetch(packages, store, silent)
    assert list(store.iterdir()) == []


def test_lists_that_cannot_be_had_are_an_error(archive: Archive) -> None:
    (archive.directory / "etc/sources.list").write_text("deb [trusted=yes] file:/nowhere ./\n")
    with pytest.raises(apt.AptError, match=r"apt-get update: .*nowhere"):
        apt.update()
