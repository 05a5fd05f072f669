"""What tests of templates share: a template_path of one's own, kata-py beside it, containerd's log."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import TIMEOUT_S, new_id
from private_containerd import REPO, Containerd, Settings, write_kata_config

KATA_PY = REPO / ".venv/bin/kata-py"

_RECORD = re.compile(
    r'^time=\S+ level=(?P<level>\w+) msg=(?P<message>"(?:[^"\\]|\\.)*") source=\S+'
    r"(?: sandbox=(?P<sandbox>\S+))?",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Templates:
    """One template_path, and a configuration that enables templates there."""

    path: Path
    configuration: Path
    settings: Settings

    @property
    def options(self) -> tuple[str, ...]:
        """Of `ctr run`."""
        return ("--runtime-config-path", str(self.configuration))

    @property
    def current(self) -> str:
        """Which of the templates that were ever made here counts now; "": none."""
        try:
            return (self.path / "current").readlink().name
        except FileNotFoundError:
            return ""

    def configure(self, settings: Settings) -> None:
        """On top of what there was at first."""
        merged = {section: dict(values) for section, values in self.settings.items()}
        for section, values in settings.items():
            merged.setdefault(section, {}).update(values)
        write_kata_config(self.configuration, merged)

    def factory(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`kata-py factory ...` in a pipe, to its end."""
        return subprocess.run(self.command(*arguments), capture_output=True, text=True, timeout=TIMEOUT_S)

    def command(self, *arguments: str) -> list[str]:
        return [str(KATA_PY), "factory", *arguments, "--config", str(self.configuration)]

    def status(self) -> dict[str, Any]:
        result = self.factory("status", "--json")
        assert (result.returncode, result.stderr) == (0, "")
        found: dict[str, Any] = json.loads(result.stdout)
        return found


@contextlib.contextmanager
def templates(directory: Path, settings: Settings) -> Iterator[Templates]:
    """At the end there is none any more, nor anything that one leaves beside it.

    The path has a name that `host_unchanged` knows for ours.
    """
    folder = directory / f"f\u00fcr {new_id('templates')}"
    folder.mkdir()
    # The kernel writes this path otherwise than the configuration does.
    path = directory / f"link-{folder.name}" / "template"
    path.parent.symlink_to(folder)
    merged = {section: dict(values) for section, values in settings.items()}
    factory = {"enable_template": True, "template_path": str(path)}
    merged["factory"] = factory | merged.get("factory", {})
    made = Templates(path, path.parent / "configuration.toml", merged)
    write_kata_config(made.configuration, merged)
    try:
        yield made
    finally:
        write_kata_config(made.configuration, merged)
        result = made.factory("destroy")
    assert (result.returncode, result.stderr) == (0, "")
    made.configuration.unlink()
    assert list(path.parent.iterdir()) == []


class Log:
    """What shims write into a containerd's log from now on."""

    def __init__(self, containerd: Containerd) -> None:
        self._file = containerd.log
        self._begin = self._file.stat().st_size

    def records(self, sandbox: str = "") -> list[tuple[str, str]]:
        """Level and message of each, of one sandbox or of all of this test run."""
        with self._file.open("rb") as file:
            file.seek(self._begin)
            text = file.read().decode(errors="replace")
        return [
            (match["level"], json.loads(match["message"]))
            for match in _RECORD.finditer(text)
            if not sandbox or match["sandbox"] == sandbox
        ]

    def warnings(self, sandbox: str = "") -> list[str]:
        """Without the one that all machines here have: that they are emulated."""
        return [
            message
            for level, message in self.records(sandbox)
            if level in ("warning", "error") and "emulated (TCG)" not in message
        ]

    def count(self, words: str) -> int:
        return sum(words in message for _, message in self.records())


def qemu_arguments(pid: int) -> list[str]:
    return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).rstrip("\0").split("\0")
