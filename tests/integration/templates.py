"""What tests of templates share: a template_path of one's own, kata-py beside it, containerd's log."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from harness import TIMEOUT_S, new_id
from private_containerd import REPO, Containerd, Settings, write_kata_config

from katautils.config import load_configuration
from virtcontainers import mount
from virtcontainers.config import SandboxConfig
from virtcontainers.factory import Factory
from virtcontainers.factory.fingerprint import made_of
from virtcontainers.factory.template import Template, destroy
from virtcontainers.vm import VMConfig

Pods = Callable[[SandboxConfig], Factory]
"""Where the machine of a pod without containerd comes from."""

KATA_PY = REPO / ".venv/bin/kata-py"

_RECORD = re.compile(
    r'^time=\S+ level=(?P<level>\w+) msg=(?P<message>"(?:[^"\\]|\\.)*") source=\S+'
    r"(?: sandbox=(?P<sandbox>\S+))?",
    re.MULTILINE,
)

_ORIGIN = re.compile(r"(a new|no|the) template |(it|the machine) is booted|no machine from ")
"""How warnings begin that tell where a machine comes from."""


@dataclass(frozen=True)
class ReadyTemplates:
    """A template of each machine that a test wants one of without wanting it made: of all that want the same
    only the first has it booted, whichever worker it runs in, and the others have a copy."""

    directory: Path
    """Seen by all workers."""

    def put(self, path: Path, config: VMConfig) -> Template:
        """Have one in `path`, which is the caller's to spoil and to destroy."""
        parts = json.dumps(made_of(config), sort_keys=True)
        kept = self.directory / hashlib.sha256(parts.encode()).hexdigest()
        with kept.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if kept.exists():
                path.mkdir(mode=0o700, parents=True)
                mount.mount("kata-py-template", path, "tmpfs", data="mode=0700")
                _copy(kept, path)
                Template.fetch(path, config)
            # Also takes one that is there, and leaves beside it what belongs there. The caller's thread may
            # have a loop that runs.
            with ThreadPoolExecutor(1) as thread:
                made = thread.submit(asyncio.run, Template.new(path, config)).result()
            if not kept.exists():
                new = kept.with_suffix(".new")
                shutil.rmtree(new, ignore_errors=True)
                new.mkdir()
                _copy(path, new)
                new.rename(kept)
            return made

    @contextlib.contextmanager
    def cloning(self, directory: Path) -> Iterator[Pods]:
        """For pods of which it is all the same whether they are booted. The templates are in `directory`,
        and gone at the end."""
        paths: list[Path] = []

        def factory(config: SandboxConfig) -> Factory:
            paths.append(directory / new_id("template"))
            return Factory(self.put(paths[-1], VMConfig(config.hypervisor, config.agent)))

        try:
            yield factory
        finally:
            for path in paths:
                asyncio.run(destroy(path))


def _copy(source: Path, target: Path) -> None:
    """With all times, by which a template knows its memory."""
    subprocess.run(["cp", "--archive", "--sparse=always", f"{source}/.", target], check=True)


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

    def put(self, ready: ReadyTemplates) -> None:
        """Have one, as after `kata-py factory init`."""
        config = load_configuration(self.configuration)
        ready.put(self.path, VMConfig(config.hypervisor, config.agent))

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


def builders_lock(path: Path) -> IO[str]:
    """Whoever wants to build the template there waits until this is closed."""
    lock = path.with_name(f".{path.name}.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


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

    def of_the_factory(self) -> list[str]:
        """The warnings that tell where machines come from: on a busy host others tell what takes long."""
        return [message for message in self.warnings() if _ORIGIN.match(message)]

    def count(self, words: str) -> int:
        return sum(words in message for _, message in self.records())


def qemu_arguments(pid: int) -> list[str]:
    return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).rstrip("\0").split("\0")
