"""The containerds of this host, and whether they find the shim."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SHIM = "containerd-shim-kata-py-v2"
RUNTIME = "io.containerd.kata-py.v2"

SYSTEMD_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""What a unit gets that says nothing of PATH: systemd.exec(5)."""

_TIMEOUT_S = 10


@dataclass(frozen=True)
class Containerd:
    """One containerd: a process, or (pid 0) the one that systemd would start."""

    pid: int
    program: Path
    path: str
    """Its PATH; "" when we may not read it."""

    def find_shim(self) -> Path | None:
        """Where it will find the shim: on its PATH, or beside itself."""
        found = shutil.which(SHIM, path=self.path) if self.path else None
        beside = self.program.parent / SHIM
        if found is None and os.access(beside, os.X_OK):
            return beside
        return Path(found) if found else None

    def version(self) -> str:
        """Such as "1.6.20"; "" when it does not say."""
        return version_of(self.program)


def find_containerds() -> list[Containerd]:
    """Those that run; else the one that systemd would start; else none."""
    running = list(_running())
    if running:
        return running
    program = shutil.which("containerd", path=f"{SYSTEMD_PATH}:{os.environ.get('PATH', '')}")
    return [Containerd(0, Path(program), _unit_path())] if program else []


def version_of(program: Path) -> str:
    """The last but one word of `containerd --version`: its package, version, revision."""
    words = output_of(program, "--version").split()
    return words[2].removeprefix("v") if len(words) > 2 else ""


def output_of(program: Path, *arguments: str) -> str:
    """What a program prints; "" when it cannot be run, fails, or takes too long."""
    try:
        result = subprocess.run(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout if result.returncode == 0 else ""


def _running() -> Iterator[Containerd]:
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            if (process / "comm").read_bytes() != b"containerd\n":
                continue
            program = (process / "exe").readlink()
        except PermissionError:
            program = Path("containerd")
        except OSError:
            continue
        yield Containerd(int(process.name), program, _path_of(process))


def _path_of(process: Path) -> str:
    try:
        environment = (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return ""
    for variable in environment:
        if variable.startswith(b"PATH="):
            return os.fsdecode(variable[5:])
    return ""


def _unit_path() -> str:
    shown = output_of(Path("systemctl"), "show", "--property=Environment", "--value", "containerd.service")
    for word in shown.split():
        if word.startswith("PATH="):
            return word[5:]
    return SYSTEMD_PATH
