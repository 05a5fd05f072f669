from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from guest.image import apt, build
from tests.unit.guest_image.conftest import Archive

PACKAGE = apt.Package(name="crun", version="1.8", section="admin", size=1, sha256="aa")


def key_with(package: apt.Package) -> str:
    return build.key_of(build.inputs([package]))


def test_the_key_is_that_of_the_inputs() -> None:
    assert key_with(PACKAGE) == key_with(PACKAGE)
    assert key_with(PACKAGE) != key_with(apt.Package("crun", "1.9", "admin", 1, "aa"))
    assert key_with(PACKAGE) != key_with(apt.Package("crun", "1.8", "admin", 1, "bb"))


def test_another_agent_is_another_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = key_with(PACKAGE)
    source = build.python.Source(tmp_path / "main.py", "guest/agent/main")
    source.path.write_text("def main(): ...\n")
    others = [one for one in build.python.own_sources() if one.module != source.module]
    monkeypatch.setattr(build.python, "own_sources", lambda: [source, *others])
    assert key_with(PACKAGE) != before


def make_image(directory: Path, key: str) -> Path:
    directory.mkdir()
    files = {}
    for name in ("vmlinuz", "initrd.img"):
        (directory / name).write_bytes(name.encode())
        files[name] = {"sha256": hashlib.sha256(name.encode()).hexdigest()}
    (directory / "manifest.json").write_text(json.dumps({"key": key, "files": files}))
    return directory


def test_a_damaged_image_is_not_whole(tmp_path: Path) -> None:
    image = make_image(tmp_path / "image", "key")
    assert build.is_whole(image, "key")
    assert not build.is_whole(image, "other key")
    (image / "initrd.img").write_bytes(b"")
    assert not build.is_whole(image, "key")
    assert not build.is_whole(tmp_path / "nothing", "key")


def test_installing_replaces_what_was_there(tmp_path: Path) -> None:
    image = make_image(tmp_path / "image", "key")
    output = make_image(tmp_path / "output", "old key")
    running = (output / "vmlinuz").open("rb")
    (output / "vmlinuz").write_bytes(b"the old kernel")
    build.install(image, output)
    assert build.is_whole(output, "key")
    with running:
        assert running.read() == b"the old kernel"
    assert sorted(path.name for path in output.iterdir()) == ["initrd.img", "manifest.json", "vmlinuz"]


def test_a_host_without_the_packages_is_told_what_is_missing(
    archive: Archive, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive.add("linux-image-amd64", section="kernel")
    status = build.main(["--output", str(tmp_path / "output"), "--cache", str(tmp_path / "cache")])
    assert status == 1
    errors = capsys.readouterr().err
    assert "error: apt knows no package busybox-static, crun" in errors
    assert "apt-get update" in errors
    assert not (tmp_path / "output").exists()


def test_a_host_without_a_kernel_package_is_told_so(
    archive: Archive, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive.add("something-else")
    assert build.main(["--output", str(tmp_path / "output"), "--cache", str(tmp_path / "cache")]) == 1
    assert "error: apt knows none of the kernels linux-image-amd64" in capsys.readouterr().err
