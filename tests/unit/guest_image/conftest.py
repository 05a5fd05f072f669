"""A package archive on disk, and an apt that knows no other."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest


class Archive:
    """Packages made on the spot. apt is real; it needs neither root nor a network for them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.pool = directory / "pool"
        self.pool.mkdir(parents=True)
        self.stanzas: list[str] = []
        for name in ("state/lists/partial", "cache/archives/partial", "etc/apt.conf.d", "etc/preferences.d"):
            (directory / name).mkdir(parents=True)
        (directory / "status").touch()
        (directory / "etc/sources.list").write_text(f"deb [trusted=yes] file:{self.pool} ./\n")
        self.configuration = directory / "apt.conf"
        self.configuration.write_text(
            f'Dir::State "{directory}/state";\n'
            f'Dir::State::status "{directory}/status";\n'
            f'Dir::Cache "{directory}/cache";\n'
            f'Dir::Etc "{directory}/etc";\n'
            'APT::Architecture "amd64";\n'
            'APT::Architectures { "amd64"; };\n'
        )

    def add(
        self,
        name: str,
        *,
        version: str = "1.0",
        section: str = "libs",
        depends: str = "",
        provides: str = "",
        files: dict[str, str] | None = None,
    ) -> Path:
        tree = self.directory / "trees" / f"{name}-{version.replace(':', '.')}"
        (tree / "DEBIAN").mkdir(parents=True)
        control = f"Package: {name}\nVersion: {version}\nArchitecture: amd64\nSection: {section}\n"
        control += "Maintainer: nobody <nobody@localhost>\nDescription: for a test\n"
        control += f"Depends: {depends}\n" if depends else ""
        control += f"Provides: {provides}\n" if provides else ""
        (tree / "DEBIAN/control").write_text(control)
        for path, content in (files or {}).items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_text(content)
        package = self.pool / f"{name}_{version.replace(':', '.')}_amd64.deb"
        subprocess.run(
            ["dpkg-deb", "--root-owner-group", "-b", tree, package], check=True, capture_output=True
        )
        data = package.read_bytes()
        self.stanzas.append(
            f"{control}Filename: ./{package.name}\nSize: {len(data)}\n"
            f"SHA256: {hashlib.sha256(data).hexdigest()}\n"
        )
        (self.pool / "Packages").write_text("\n".join(self.stanzas))
        return package


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Archive:
    made = Archive(tmp_path / "archive")
    monkeypatch.setenv("APT_CONFIG", str(made.configuration))
    return made
